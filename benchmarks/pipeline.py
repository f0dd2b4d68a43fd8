"""Compare the whole pipeline with a typical script, in one run on one machine.

    python benchmarks/pipeline.py PHOTOS [--repeat 4] [--rounds 3]
    python benchmarks/pipeline.py PHOTOS --device cuda --model FOLDER

The script uses a DataLoader whose workers cut tiles with PIL as in the model card, transformers' InternVLVisionModel,
and one HDF5 group per image. Both sides encode the same pictures with the shape of tiny-random, or with the weights of
FOLDER in transformers' layout, and store visual tokens and pooled vectors. On a card, both compute in bfloat16. Each
round runs every side once, one after another, in separate processes; a side's figure is its median. Time is measured
from the start of the work, including planning and loading the model, until the file is closed;
imports are excluded on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

SIDES = {
    "cpu": {
        "script, float32": ["peer", "float32"],
        "internvit, best dtype": ["ours", "auto"],
        "internvit, float32": ["ours", "float32"],
    },
    "cuda": {"script, bfloat16": ["peer", "bfloat16"], "internvit, bfloat16": ["ours", "bfloat16"]},
}
"""What is compared on a device; the first side is the one that the others are compared with."""


def peer(arguments: argparse.Namespace, dtype_name: str) -> dict[str, float]:
    """Run the typical script."""
    folder, device = arguments.photos, arguments.device
    import h5py
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from transformers import InternVLVisionConfig, InternVLVisionModel

    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)

    def closest_grid(width: int, height: int, size: int = 448, most: int = 12) -> tuple[int, int]:
        grids = sorted(
            {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most}, key=lambda g: g[0] * g[1]
        )
        best, best_difference = (1, 1), float("inf")
        for grid in grids:
            difference = abs(width / height - grid[0] / grid[1])
            if difference < best_difference:
                best, best_difference = grid, difference
            elif difference == best_difference and width * height > 0.5 * size * size * grid[0] * grid[1]:
                best = grid
        return best

    def load_image(path: str, size: int = 448) -> torch.Tensor:
        image = Image.open(path).convert("RGB")
        columns, rows = closest_grid(*image.size)
        whole = image.resize((size * columns, size * rows))
        tiles = [
            whole.crop((c * size, r * size, (c + 1) * size, (r + 1) * size))
            for r in range(rows)
            for c in range(columns)
        ]
        if len(tiles) > 1:
            tiles.append(image.resize((size, size)))
        pixels = [torch.from_numpy(np.asarray(tile).copy()).permute(2, 0, 1).float().div(255) for tile in tiles]
        return torch.stack([(tile - mean) / std for tile in pixels])

    class Photos(Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
            return os.path.basename(self.paths[index]), load_image(self.paths[index])

    def unshuffle(tokens: torch.Tensor) -> torch.Tensor:
        n, side, channels = tokens.shape[0], int(tokens.shape[1] ** 0.5), tokens.shape[2]
        tokens = tokens.reshape(n, side, side // 2, 2 * channels).permute(0, 2, 1, 3)
        tokens = tokens.reshape(n, side // 2, side // 2, 4 * channels).permute(0, 2, 1, 3)
        return tokens.reshape(n, -1, 4 * channels)

    started = time.perf_counter()
    config = InternVLVisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        image_size=[448, 448],
        attention_bias=True,
        norm_type="layer_norm",
        attn_implementation="sdpa",
    )
    if arguments.model is None:
        model = InternVLVisionModel(config)
    else:
        model = InternVLVisionModel.from_pretrained(arguments.model, attn_implementation="sdpa")
    dtype = getattr(torch, dtype_name)
    model = model.to(device, dtype).eval()
    tiles = 0
    with h5py.File(arguments.output, "w") as file, torch.inference_mode():
        for name, pixels in DataLoader(Photos(), batch_size=None, num_workers=arguments.workers):
            hidden = model(pixel_values=pixels.to(device, dtype)).last_hidden_state
            group = file.create_group(name)
            group["tokens"] = unshuffle(hidden[:, 1:]).half().cpu().numpy()
            group["pooled"] = hidden[-1, 1:].float().mean(dim=0).cpu().numpy()
            tiles += len(pixels)
    return {"seconds": time.perf_counter() - started, "tiles": tiles}


def ours(arguments: argparse.Namespace, dtype: str) -> dict[str, float]:
    """Run internvit as its command line does."""
    import torch  # noqa: F401 - imported before the clock starts, as in the script

    from internvit_cli.config import ComputeDtype
    from internvit_cli.extract.pipeline import extract
    from internvit_cli.options import ExtractOptions, ModelOptions, RunOptions, StoreOptions
    from internvit_cli.runtime.signals import StopRequest

    options = ExtractOptions(
        sources=(arguments.photos,),
        store=StoreOptions(output=arguments.output),
        model=ModelOptions(name=arguments.model or "tiny-random"),
        run=RunOptions(dtype=ComputeDtype(dtype), devices=(arguments.device,)),
    )
    return extract(options, StopRequest()).to_json()


def run_side(side: list[str], folder: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one side in a separate process and return its result."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, folder, "--side", *side, "--output", f"{scratch}/features.h5"]
        command += ["--workers", str(arguments.workers), "--device", arguments.device]
        command += [] if arguments.model is None else ["--model", arguments.model]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def repeat_photos(photos: str, repeat: int, scratch: str) -> int:
    """Copy all pictures of a folder under new names and return their number."""
    count = 0
    for name in sorted(os.listdir(photos)):
        if name.endswith((".jpg", ".png", ".webp")):
            for number in range(repeat):
                shutil.copy(os.path.join(photos, name), os.path.join(scratch, f"{number}_{name}"))
                count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("--repeat", type=int, default=4, help="copies of each photograph")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="workers of the script's DataLoader"
    )
    parser.add_argument("--device", choices=SIDES, default="cpu")
    parser.add_argument("--model", help="the folder of a checkpoint (default: random weights of a small shape)")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        kind, dtype = arguments.side
        print(json.dumps(peer(arguments, dtype) if kind == "peer" else ours(arguments, dtype)))
        return
    sides = SIDES[arguments.device]
    with tempfile.TemporaryDirectory() as scratch:
        images = repeat_photos(arguments.photos, arguments.repeat, scratch)
        results: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                results[name].append(run_side(side, scratch, arguments))
    report(images, results)


def processor() -> str:
    """Return the processor's name."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")


def report(images: int, results: dict[str, list[dict[str, float]]]) -> None:
    """Print a Markdown table; ratios compare runs of the same round."""
    import torch

    first = next(iter(results.values()))
    print(f"{processor()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}")
    print(f"{images} images, {first[0]['tiles']:.0f} tiles, {len(first)} rounds\n")
    print("| side | images/s | tiles/s | ratio to the script, median (least..most) | stages, share of the main part |")
    print("|---|---|---|---|---|")
    script = [run["seconds"] for run in first]
    for name, runs in results.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        ratios = [theirs / run["seconds"] for theirs, run in zip(script, runs, strict=True)]
        stages = runs[0].get("stages", {})
        split = ", ".join(
            f"{stage} {100 * stages[stage] / stages['wall']:.0f} %" for stage in stages if stage != "wall"
        )
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        dtype = f" ({runs[0]['dtype']})" if "dtype" in runs[0] else ""
        print(f"| {name}{dtype} | {images / seconds:.1f} | {runs[0]['tiles'] / seconds:.0f} | {spread} | {split} |")


if __name__ == "__main__":
    main()
