"""Draw labelled pictures to try `internvit probe` on: noisy backgrounds with one shape each.

    python examples/shapes.py FOLDER [--each 30] [--seed 0]

FOLDER/NAME/... holds the pictures of a shape, so the first folder of a key is its label.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 224


def corners(name: str, x: int, y: int, size: int) -> list[list[tuple[int, int]]]:
    """Return the polygons of a shape around a point."""
    thin = size // 4
    box = [(x - size, y - size), (x + size, y - size), (x + size, y + size), (x - size, y + size)]
    match name:
        case "square":
            return [box]
        case "triangle":
            return [[(x, y - size), box[2], box[3]]]
        case "cross":
            across = [(x - size, y - thin), (x + size, y - thin), (x + size, y + thin), (x - size, y + thin)]
            return [across, [(x + dy - y, y + dx - x) for dx, dy in across]]
        case "stripes":
            tops = range(y - size, y + size, max(2, thin))
            return [[(x - size, t), (x + size, t), (x + size, t + thin // 2), (x - size, t + thin // 2)] for t in tops]
    angles = np.linspace(0, 2 * np.pi, 60)
    return [[(round(x + size * np.cos(angle)), round(y + size * np.sin(angle))) for angle in angles]]


def picture(name: str, random: np.random.Generator) -> Image.Image:
    """Return one picture of a shape, of any color, size and place."""
    noise = random.normal(random.uniform(60, 200), random.uniform(5, 50), (SIDE, SIDE, 3))
    image = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    size = int(random.integers(25, 70))
    x, y = (int(place) for place in random.integers(size, SIDE - size, 2))
    color = tuple(int(part) for part in random.integers(0, 256, 3))
    for polygon in corners(name, x, y, size):
        ImageDraw.Draw(image).polygon(polygon, fill=color)
    return image


def main() -> None:
    """Draw the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    for name in ("circle", "cross", "square", "stripes", "triangle"):
        folder = arguments.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(arguments.each):
            picture(name, random).save(folder / f"{arguments.seed}-{number:03d}.png")


if __name__ == "__main__":
    main()
