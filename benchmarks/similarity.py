"""Measure how well vectors, tokens and pictures distinguish copies of photographs from other photographs.

    python benchmarks/similarity.py PHOTOS --model MODEL [--save FEATURES.npz] [--load FEATURES.npz]

It makes copies of every photograph (saved again, smaller, cropped) and a burst, encodes all of them, and prints

1. for each way to compare images, the highest similarity of different photographs, and the share of copies above it;
2. what `duplicates` finds in outputs of few, similar and many images, with and without the pictures;
3. how often a copy finds its original first.

The figures are meaningful only with trained weights. Pillow makes the pixels, the same on every machine; --save keeps
the vectors, and --load uses them instead of encoding.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from outputs import write_output
from PIL import Image, ImageOps

from internvit_cli.similarity.alignment import SAME, agreement
from internvit_cli.similarity.duplicates import DuplicateOptions, find_duplicates
from internvit_cli.similarity.gray_squares import to_gray_square
from internvit_cli.similarity.search import SearchOptions, search
from internvit_cli.similarity.similarity_space import RAW, choose_space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ONE_PICTURE = (("057_metadata", "074_metadata"), ("021_exif", "055_exif"))
"""Photographs that show the same picture: in two formats, and with another digit drawn on it."""
ONE_SCENE = ("052_opensfm", "072_opensfm")
"""Two frames of one street, which are different photographs."""
BURST, RE_SAVED = 20, 5


def saved(image: Image.Image, kind: str, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, kind, quality=quality)
    return Image.open(stream).convert("RGB")


def smaller(image: Image.Image, share: float) -> Image.Image:
    size = max(1, round(image.width * share)), max(1, round(image.height * share))
    return image.resize(size, Image.Resampling.LANCZOS)


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    box = width * left, height * top, width * (1 - right), height * (1 - bottom)
    return image.crop(tuple(map(round, box)))  # type: ignore[arg-type]


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG at 40": lambda image: saved(image, "JPEG", 40),
    "WebP at 50": lambda image: saved(image, "WEBP", 50),
    "a third as large": lambda image: smaller(image, 1 / 3),
    "a third, JPEG at 40": lambda image: saved(smaller(image, 1 / 3), "JPEG", 40),
    "5 % off each border": lambda image: cropped(image, 0.05, 0.05, 0.05, 0.05),
    "10 % off each border": lambda image: cropped(image, 0.1, 0.1, 0.1, 0.1),
    "10 % off the left": lambda image: cropped(image, 0.1, 0, 0, 0),
}


def upright(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def burst(scene: Image.Image, passer: Image.Image) -> Iterator[Image.Image]:
    """Yield frames in which the camera drifts over a scene while something in front of it moves."""
    scene, passer = ImageOps.fit(scene, (1200, 900)), ImageOps.fit(passer, (360, 540))
    for number in range(BURST):
        frame = scene.copy()
        frame.paste(passer, (20 + 40 * number, 300))
        drift = 0.002 * number
        yield cropped(frame, drift, 0, 0.05 - drift, 0.02)


@dataclass(frozen=True)
class Pictures:
    """Files, with what each shows and how it was made."""

    paths: list[Path]
    scenes: np.ndarray
    """Number of the photograph that each file is a copy of, [n]."""
    changes: list[str]
    """`original`, a name of `CHANGES`, `frame` or `frame, JPEG at 40`."""
    one_scene: list[int]
    """Row numbers of the frames of one street."""

    def rows(self, *changes: str) -> np.ndarray:
        return np.flatnonzero([change in changes for change in self.changes])


def make_pictures(files: list[Path], folder: Path, side: int = 10_000, *, with_burst: bool = True) -> Pictures:
    """Write the copies, lossless except for the change itself; photographs are first reduced to at most `side`."""
    paths, scenes, changes = [], [], []

    def add(image: Image.Image, scene: int, change: str) -> None:
        path = folder / f"{len(paths):05d}.png"
        image.save(path, compress_level=1)
        paths.append(path)
        scenes.append(scene)
        changes.append(change)

    for number, file in enumerate(files):
        photograph = upright(file)
        photograph.thumbnail((side, side), Image.Resampling.LANCZOS)
        add(photograph, number, "original")
        for name, change in CHANGES.items():
            add(change(photograph), number, name)
    first = len(files)
    frames = burst(upright(files[2]), upright(files[-1])) if with_burst else ()
    for number, frame in enumerate(frames):
        add(frame, first + number, "frame")
        if number % (BURST // RE_SAVED) == 0:
            add(saved(frame, "JPEG", 40), first + number, "frame, JPEG at 40")
    for one, other in ONE_PICTURE:
        found = [[number for number, file in enumerate(files) if file.name.startswith(name)] for name in (one, other)]
        if all(found):
            scenes = [found[0][0] if scene == found[1][0] else scene for scene in scenes]
    street = [number for number, file in enumerate(files) if file.name.startswith(ONE_SCENE)]
    return Pictures(paths, np.array(scenes), changes, street)


def encode(pictures: Pictures, model: str) -> dict[str, np.ndarray]:
    """Return the mean and class token of every picture, [n, d] each, and its tokens, [n, t, d] float16."""
    from internvit_cli import Extractor

    pooled, tokens = [], []
    with Extractor(model, tokens="patch", pool="cls+mean", max_tiles=1) as extractor:
        for number, image in enumerate(extractor.stream(map(str, pictures.paths)), 1):
            pooled.append(image.pooled)
            tokens.append(image.patch_tokens[-1].astype(np.float16))
            print(f"\rencoded {number} of {len(pictures.paths)}", end="", flush=True)
    print()
    both = np.stack(pooled)
    width = both.shape[1] // 2
    return {"cls": both[:, :width], "mean": both[:, width:], "tokens": np.stack(tokens)}


# ---------------------------------------------------------------------------------------------------- ways to compare


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def whitened(vectors: np.ndarray, shrinkage: float | None) -> np.ndarray:
    """Return centered vectors, whitened with a covariance that is shrunk as given, or as Ledoit and Wolf propose."""
    centered = vectors - vectors.mean(axis=0)
    count, width = centered.shape
    covariance = centered.T @ centered / count
    average = np.trace(covariance) / width
    if shrinkage is None:
        squared = np.square(covariance).sum()
        error = (np.square(np.square(centered).sum(axis=1)).mean() - squared) / count
        shrinkage = max(0.05, float(np.clip(error / (squared - width * average**2), 0, 1)))
    matrix = (1 - shrinkage) * covariance + shrinkage * average * np.eye(width)
    return unit(centered @ np.linalg.inv(np.linalg.cholesky(matrix)).T)


def balanced(vectors: np.ndarray) -> np.ndarray:
    return choose_space(vectors).embed(vectors)  # type: ignore[arg-type]


WAYS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "raw": ("mean", RAW.embed),
    "centered": ("mean", lambda vectors: unit(vectors - vectors.mean(axis=0))),
    "whitened, shrunk by n": ("mean", lambda vectors: whitened(vectors, None)),
    "whitened, shrunk by 0.8": ("mean", lambda vectors: whitened(vectors, 0.8)),
    "balanced": ("mean", balanced),
    "class token, balanced": ("cls", balanced),
}


def compare_ways(pictures: Pictures, features: dict[str, np.ndarray]) -> None:
    """Print one line per way: the highest similarities of different photographs, and the copies above them."""
    rows = pictures.rows("original", *CHANGES)
    scenes = pictures.scenes[rows]
    changes = np.array(pictures.changes)[rows]
    original = {
        int(scene): int(place) for place, scene in reversed(list(enumerate(scenes))) if changes[place] == "original"
    }
    copies = {change: np.flatnonzero(changes == change) for change in CHANGES}
    partner = np.array([original[int(scene)] for scene in scenes])
    first, second = np.nonzero(np.triu(scenes[:, None] != scenes, 1))
    of_street = np.isin(scenes[first], pictures.one_scene) & np.isin(scenes[second], pictures.one_scene)

    def line(name: str, similar: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        values = similar(first, second)
        highest = values[~of_street].max()
        street = values[of_street].max() if of_street.any() else np.nan
        found = [similar(places, partner[places]) for places in copies.values()]
        shares = [
            f"{(cosines > highest).mean():4.0%}, {(cosines > max(highest, street)).mean():4.0%}" for cosines in found
        ]
        print(
            f"| {name} | {highest:.3f} | {street:.3f} | "
            + " | ".join(shares)
            + f" | {min(c.min() for c in found):.3f} |"
        )

    print(
        "| compared by | highest of different scenes | of the street's frames | "
        + " | ".join(CHANGES)
        + " | lowest copy |"
    )
    nearest = None
    for name, (kind, embed) in WAYS.items():
        embedded = embed(features[kind][rows])
        line(name, lambda ones, others, e=embedded: np.einsum("pd,pd->p", e[ones], e[others]))
        if name == "balanced":
            nearest = np.einsum("pd,pd->p", embedded[first], embedded[second])
    assert nearest is not None
    kept = np.argsort(-nearest)[:1000]
    first, second, of_street = first[kept], second[kept], of_street[kept]
    if "tokens" in features:
        mean = features["tokens"][rows].mean(axis=(0, 1), dtype=np.float32)
        tokens = features["tokens"][rows]
        line(
            "tokens, best matches (of the 1,000 nearest pairs)",
            lambda ones, others: token_matches(tokens, mean, ones, others),
        )
    looks = np.stack([to_gray_square(upright(path)) for path in pictures.paths])[rows]
    line(
        "pictures laid over each other (of the 1,000 nearest pairs)",
        lambda ones, others: agreement(looks[ones], looks[others]),
    )


def token_matches(tokens: np.ndarray, mean: np.ndarray, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the mean cosine of tokens with their best matches, the lower of both directions, [p]."""
    found = []
    for one, other in zip(ones.tolist(), others.tolist(), strict=True):
        cosines = unit(tokens[one].astype(np.float32) - mean) @ unit(tokens[other].astype(np.float32) - mean).T
        found.append(min(cosines.max(axis=0).mean(), cosines.max(axis=1).mean()))
    return np.array(found)


# ------------------------------------------------------------------------------------------------------------- outputs


def sets_of(pictures: Pictures) -> dict[str, np.ndarray]:
    originals, copies = pictures.rows("original"), pictures.rows(*CHANGES)
    of_first = np.flatnonzero(
        (pictures.scenes == pictures.scenes[0]) & np.isin(pictures.changes, ["original", *CHANGES])
    )
    frames, re_saved = pictures.rows("frame"), pictures.rows("frame, JPEG at 40")
    few = originals[:6:2]
    crowd = np.resize(of_first, 20)
    return {
        "1 photograph": originals[:1],
        "2 different ones": originals[:2],
        "3 different ones": originals[:3],
        "2 copies": of_first[:2],
        "3 copies": of_first[:3],
        "20 copies of one": crowd,
        "3 copies, 2 others": np.concatenate([of_first[:3], originals[1:3]]),
        "3 photographs, 7 copies of each": np.flatnonzero(
            np.isin(pictures.scenes, pictures.scenes[few]) & np.isin(pictures.changes, ["original", *CHANGES])
        ),
        "a burst": frames,
        "a burst, 5 frames saved anew": np.concatenate([frames, re_saved]),
        "the photographs": originals,
        "with a copy of every 6th": np.concatenate([originals, copies[:: 6 * len(CHANGES) + 1]]),
        "with 7 copies of each": np.concatenate([originals, copies]),
        "with 7 copies of each and the burst": np.arange(len(pictures.paths)),
    }


def try_outputs(pictures: Pictures, vectors: np.ndarray) -> None:
    """Print what `duplicates` finds: pairs of one picture in one group, and groups that join different pictures."""
    print(
        "\n| output | images | space | copies found, pictures there | false joins"
        " | copies found, pictures gone | false joins |"
    )
    for name, rows in sets_of(pictures).items():
        told, space = [], ""
        for are_there in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                path, keys = output_of(pictures, vectors, rows, Path(folder), are_there=are_there)
                found = find_duplicates(DuplicateOptions(str(path)))
                space = found.comparison.space.name if found.comparison else "none"
                told.append(counted_groups(found, keys, pictures.scenes[rows]))
        cells = [f"{copies} of {of} | {joins}" for copies, of, joins in told]
        print(f"| {name} | {len(rows)} | {space} | {' | '.join(cells)} |", flush=True)


def output_of(
    pictures: Pictures, vectors: np.ndarray, rows: np.ndarray, folder: Path, *, are_there: bool
) -> tuple[Path, list[str]]:
    """Write an output of some of the pictures, each under its own name."""
    (folder / "pictures").mkdir()
    keys, sizes, digests = [], [], []
    for place, row in enumerate(rows.tolist()):
        key = f"{place:05d}.png"
        data = pictures.paths[row].read_bytes()
        # A picture that occurs twice in a set becomes two files with the same pixels.
        data += b"\0" * place
        digests.append(hashlib.sha256(data).digest())
        with Image.open(pictures.paths[row]) as opened:
            sizes.append(opened.size)
        if are_there:
            (folder / "pictures" / key).write_bytes(data)
        keys.append(key)
    path = folder / "feats.h5"
    write_output(
        path,
        keys,
        vectors.shape[1],
        [vectors[rows]],
        sizes=sizes,
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
        root=str(folder / "pictures"),
    )
    return path, keys


def counted_groups(found: Any, keys: list[str], scenes: np.ndarray) -> tuple[int, int, int]:
    """Return images that are grouped with another of their scene, those that could be, and groups of several scenes."""
    place = {key: number for number, key in enumerate(keys)}
    groups = [[int(scenes[place[member.image.key]]) for member in group] for group in found.similar]
    copies = sum(len(group) - len(set(group)) for group in groups)
    return copies, len(scenes) - len(set(scenes.tolist())), sum(len(set(group)) > 1 for group in groups)


def try_search(pictures: Pictures, vectors: np.ndarray) -> None:
    """Print how often a copy finds its original first, among the originals and among all pictures."""
    print("\n| copies of | looked for among | first | among the first 3 |")
    originals, copies = pictures.rows("original"), pictures.rows(*CHANGES)
    frames, re_saved = pictures.rows("frame"), pictures.rows("frame, JPEG at 40")
    for name, known, queries in (
        ("photographs", originals, copies),
        ("frames", frames, re_saved),
        ("frames", np.concatenate([originals, frames]), re_saved),
    ):
        space = choose_space(vectors[known])  # type: ignore[arg-type]
        cosines = space.embed(vectors[queries]) @ space.embed(vectors[known]).T
        order = pictures.scenes[known][np.argsort(-cosines, axis=1)]
        hit = order == pictures.scenes[queries][:, None]
        first, third = hit[:, 0].mean(), hit[:, :3].any(axis=1).mean()
        print(f"| {name} | {len(known)} images, {space.name} | {first:.0%} | {third:.0%} |")
    with tempfile.TemporaryDirectory() as folder:
        rows = np.concatenate([originals, copies])
        path, keys = output_of(pictures, vectors, rows, Path(folder), are_there=False)
        scene = dict(zip(keys, pictures.scenes[rows].tolist(), strict=True))
        answers = search(SearchOptions(str(path), keys=keys[len(originals) :], count=3)).answers
        hits = np.array(
            [[scene[hit.image.key] == scene[answer.query.key] for hit in answer.hits] for answer in answers]
        )
        print(
            f"| photographs, by --key | {len(rows)} images | {hits[:, 0].mean():.0%} | {hits.any(axis=1).mean():.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", default="300m")
    parser.add_argument("--save", type=Path, help="write the vectors to this file")
    parser.add_argument("--load", type=Path, help="read the vectors from this file; tokens are then not compared")
    arguments = parser.parse_args()
    files = sorted(
        path for path in arguments.photos.iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"}
    )
    with tempfile.TemporaryDirectory() as folder:
        pictures = make_pictures(files, Path(folder))
        if arguments.load:
            with np.load(arguments.load) as arrays:
                features = {name: arrays[name].astype(np.float32) for name in ("mean", "cls")}
        else:
            features = encode(pictures, arguments.model)
        if arguments.save:
            np.savez_compressed(arguments.save, mean=features["mean"], cls=features["cls"])
        print(
            f"{len(files)} photographs, {len(pictures.paths)} pictures, {arguments.model}; same picture from {SAME}\n"
        )
        compare_ways(pictures, features)
        try_outputs(pictures, features["mean"])
        try_search(pictures, features["mean"])


if __name__ == "__main__":
    main()
