"""Make the archive of one version: pictures, the outputs of its extract command, and some whose run was killed.

git worktree add /tmp/before COMMIT
python tests/data/outputs/make.py /tmp/before/src tests/data/outputs/COMMIT.tar.xz [OPTIONS OF EXTRACT]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path("/tmp/internvit-before")
"""The outputs record the absolute path of the pictures."""
PICTURES = {"a.png": (60, 60), "b/wide.png": (120, 60), "b/tall.png": (60, 120), "c.jpg": (64, 48), "d.png": (90, 60)}
"""Width and height, pixels."""
OUTPUTS = {"feats.h5": [], "npy": [], "h5": ["--format", "h5"]}
OPTIONS = ["--model", "tiny-random", "--dtype", "float32", "--device", "cpu", "--tile-size", "56", "--max-tiles", "3"]
OPTIONS += ["--tile-pooled", "--workers", "1"]

KILLED = """
import os, signal
try:
    from internvit_cli.storage.write.commit import ShardWriter
except ImportError:  # before storage had packages of its own
    from internvit_cli.storage.commit import ShardWriter
from internvit_cli.__main__ import main

name = "record" if hasattr(ShardWriter, "record") else "write"  # of an image, on its way to a commit
write, calls = getattr(ShardWriter, name), 0

def struck(writer, *arguments, **options):
    global calls
    calls += 1
    if calls == 3:
        writer.checkpoint()
        os.kill(os.getpid(), signal.SIGKILL)
    return write(writer, *arguments, **options)

setattr(ShardWriter, name, struck)
main()
"""
"""The command, killed when two images are committed and the third is about to be written."""


def make_pictures(folder: Path) -> None:
    for number, (name, (width, height)) in enumerate(PICTURES.items()):
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 40 * number)], -1).astype(np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    (folder / "text.jpg").write_bytes(b"no picture")
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        os.utime(path, (1_700_000_000 + number,) * 2)  # whole seconds, which an archive keeps


def main() -> None:
    source, archive, *more = sys.argv[1:]
    shutil.rmtree(FOLDER, ignore_errors=True)
    make_pictures(FOLDER / "pictures")
    (FOLDER / "options.json").write_text(json.dumps(more))
    for state, start in (("finished", ["-m", "internvit_cli"]), ("unfinished", ["-c", KILLED])):
        (FOLDER / state).mkdir()
        for name, options in OUTPUTS.items():
            line = [sys.executable, *start, "extract", "pictures", "-o", f"{state}/{name}", *options, *OPTIONS, *more]
            code = subprocess.run(line, cwd=FOLDER, env=os.environ | {"PYTHONPATH": source}).returncode
            assert code == (3 if state == "finished" else -9), (name, code)
    parts = ["options.json", "pictures", "finished", "unfinished"]
    line = ["tar", "--sort=name", "--owner=0", "--group=0", "--create", "--xz", "--file", Path(archive).absolute()]
    subprocess.run([*line, *parts], cwd=FOLDER, check=True)


if __name__ == "__main__":
    main()
