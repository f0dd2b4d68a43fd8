"""Draw labelled pictures to try `internvit probe` on: noisy backgrounds with one shape each.

    python examples/shapes.py FOLDER [--each 30] [--seed 0] [--masks MASKS]

FOLDER/NAME/... holds the pictures of a shape, so the first folder of a key is its label. MASKS gets a mask per picture,
whose pixels are 0 for the background and 1, 2, ... for the shapes, and their names in classes.txt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 224
NAMES = ("circle", "cross", "square", "stripes", "triangle")


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


def picture(name: str, random: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Return one picture of a shape, of any color, size and place, and its mask."""
    noise = random.normal(random.uniform(60, 200), random.uniform(5, 50), (SIDE, SIDE, 3))
    image = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    mask = Image.new("L", image.size)
    size = int(random.integers(25, 70))
    x, y = (int(place) for place in random.integers(size, SIDE - size, 2))
    color = tuple(int(part) for part in random.integers(0, 256, 3))
    for polygon in corners(name, x, y, size):
        ImageDraw.Draw(image).polygon(polygon, fill=color)
        ImageDraw.Draw(mask).polygon(polygon, fill=1 + NAMES.index(name))
    return image, mask


def main() -> None:
    """Draw the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--masks", type=Path)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    for name in NAMES:
        for number in range(arguments.each):
            file = f"{name}/{arguments.seed}-{number:03d}.png"
            for folder, drawn in zip((arguments.folder, arguments.masks), picture(name, random), strict=True):
                if folder is not None:
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    drawn.save(folder / file)
    if arguments.masks is not None:
        (arguments.masks / "classes.txt").write_text("\n".join(("background", *NAMES)) + "\n")


if __name__ == "__main__":
    main()
