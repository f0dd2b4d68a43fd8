"""Measure where the time goes from the start of `internvit extract` to its first stored row.

    python benchmarks/start_up.py PHOTOS [--model FOLDER] [--images 8] [--rounds 5] [-- options of extract]

Every round runs the command in a new process with a new output, and records when each stage begins and ends, counted
from the moment at which the process was started. The first round only fills the caches. The table has the medians of
the others; stages whose times overlap run at the same time. Without --model, random bfloat16 weights of the 300M shape
are written first. Small tiles (`-- --tile-size 56`) keep the encoding of the first tile short on a CPU. With --against,
the rounds alternate with those of another version, whose `src` folder it names.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

BLOCKS_300M = 24
START = "the interpreter and the command line"
FIRST_ROW = "write the first row"
IMPORTS = {"torch": "import torch", "internvit_cli.encode.encoder": "import the encoder, with torch"}
"""Stages that are the import of a module."""
CALLS = {
    "internvit_cli.sources.find_images:find_images": "list the sources",
    "internvit_cli.extract.resume:load_existing": "read the output",
    "internvit_cli.model.checkpoint:Checkpoint.open": "locate the weights",
    "internvit_cli.model.checkpoint:Checkpoint.digest": "hash the weights",
    "internvit_cli.plan.scan:plan_images": "read the headers of the pictures",
    "internvit_cli.decode.decoder:Decoder.__init__": "start the decode workers",
    "internvit_cli.encode.encoder:Encoder.load": "load the encoder",
    "internvit_cli.model.kernels.choice:kernels_for": "choose and probe the kernels",
    "internvit_cli.model.loading:load_vit": "load the weights",
    "internvit_cli.storage.write.commit:create_shard": "create and reserve the shard",
    "internvit_cli.decode.decoder:Decoder._result": "decode, until the first picture is there",
    "internvit_cli.encode.encoder:Encoder.submit": "encode the first batch",
    "internvit_cli.storage.write.commit:ShardWriter.write_rows": FIRST_ROW,
}
"""Stages that are the first call of a function."""
LASTING = {
    "decode, until the first picture is there": "create and reserve the shard",
    "encode the first batch": None,
}
"""Stages that begin where another one ends, and stages that end where the first row is written."""


class Timeline(MetaPathFinder):
    """Records the begin and the end of every stage in this process, by wrapping its function once it is imported."""

    def __init__(self, started: float) -> None:
        self._started = started
        self.spans: dict[str, tuple[float, float]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        wrapped = [place for place in CALLS if place.partition(":")[0] == fullname]
        if fullname not in IMPORTS and not wrapped:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader, fullname, wrapped)
        return spec

    def _watch(self, loader: Loader, name: str, wrapped: list[str]) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            begin = time.monotonic()
            execute(module)
            if name in IMPORTS:
                self._record(IMPORTS[name], begin)
            for place in wrapped:
                self._wrap(module, place)

        loader.exec_module = exec_module  # type: ignore[method-assign]

    def _wrap(self, module: ModuleType, place: str) -> None:
        *owners, name = place.partition(":")[2].split(".")
        owner: Any = functools.reduce(getattr, owners, module)
        is_class_method = owners and isinstance(vars(owner)[name], classmethod)
        call: Callable[..., Any] = vars(owner)[name].__func__ if is_class_method else vars(owner)[name]

        @functools.wraps(call)
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.monotonic()
            try:
                return call(*arguments, **options)
            finally:
                self._record(CALLS[place], begin)

        setattr(owner, name, classmethod(timed) if is_class_method else timed)

    def _record(self, stage: str, begin: float) -> None:
        self.spans.setdefault(START, (0.0, begin - self._started))
        self.spans.setdefault(stage, (begin - self._started, time.monotonic() - self._started))


def run_side(started: float, result: Path, arguments: list[str]) -> None:
    """Run the command in this process, and write the timeline to a file."""
    timeline = Timeline(started)
    sys.meta_path.insert(0, timeline)
    sys.argv = ["internvit", "extract", *arguments]
    from internvit_cli.__main__ import main

    try:
        main()
    finally:
        result.write_text(json.dumps(timeline.spans))


def one_round(
    scratch: Path, pictures: Path, model: str, options: list[str], source: Path | None
) -> dict[str, tuple[float, float]]:
    """Run the command of a version once with a new output, and return its timeline."""
    paths = [] if source is None else [str(source.resolve())]
    paths += [path for path in sys.path[1:] if path]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        result = Path(folder, "timeline.json")
        line = [sys.executable, __file__, "--side", str(time.monotonic()), str(result)]
        line += [str(pictures), "-o", f"{folder}/feats.h5", "--model", model, "--follow-links", "--quiet", *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env=environment)
        spans: dict[str, tuple[float, float]] = json.loads(result.read_text())
    for stage, earlier in LASTING.items():
        begin, end = spans[stage]
        spans[stage] = (begin, spans[FIRST_ROW][0]) if earlier is None else (spans[earlier][1], end)
    return spans


def print_table(rounds: Sequence[dict[str, tuple[float, float]]]) -> None:
    """Print the median begin and end of every stage, in the order in which they begin."""
    stages = {
        stage: tuple(statistics.median(spans[stage][side] for spans in rounds) for side in (0, 1))
        for stage in rounds[0]
    }
    print("| stage | begins, s | ends, s | takes, s |\n|---|---|---|---|")
    for stage, (begin, end) in sorted(stages.items(), key=lambda item: item[1]):
        print(f"| {stage} | {begin:.2f} | {end:.2f} | {end - begin:.2f} |")
    ends = sorted(spans[FIRST_ROW][1] for spans in rounds)
    print(f"\nfirst row stored after {statistics.median(ends):.2f} s ({ends[0]:.2f} to {ends[-1]:.2f})\n")


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        run_side(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
        return
    mine, dashes, options = sys.argv[1:], None, []
    if "--" in mine:
        dashes = mine.index("--")
        mine, options = mine[:dashes], mine[dashes + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", help="a folder or a hub id (default: random weights of the 300M shape)")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--scratch", type=Path, help="where weights and outputs are written (default: the temporary folder)"
    )
    parser.add_argument("--against", type=Path, help="the src folder of a version to compare with")
    arguments = parser.parse_args(mine)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        pictures = Path(scratch, "pictures")
        pictures.mkdir()
        photos = [path for path in sorted(arguments.photos.resolve().iterdir()) if path.suffix in {".jpg", ".jpeg"}]
        for path in photos[: arguments.images]:
            (pictures / path.name).symlink_to(path)
        model = arguments.model
        if model is None:
            from host_path import make_checkpoint

            model = f"{scratch}/model"
            make_checkpoint(Path(model), blocks=BLOCKS_300M, dtype="bfloat16")
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "h5py", "pillow"))
        print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
        print(f"{len(list(pictures.iterdir()))} pictures, options of extract: {' '.join(options) or 'none'}\n")
        sources = [None] if arguments.against is None else [arguments.against, None]
        rounds = [
            [one_round(Path(scratch), pictures, model, options, source) for source in sources]
            for _ in range(arguments.rounds + 1)
        ]
    for source, of_one in zip(sources, zip(*rounds[1:], strict=True), strict=True):
        print(f"{source or 'this version'}:\n")
        print_table(of_one)


if __name__ == "__main__":
    main()
