"""The options that `extract` and `plan` share, and how their words become `ExtractOptions`."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from internvit_cli.config import (
    DEFAULT_MAX_PIXELS,
    DEFAULT_MODEL,
    ComputeDtype,
    Format,
    OnOverflow,
    Pool,
    Preprocess,
    StoreDtype,
    Tokens,
)
from internvit_cli.errors import UsageError
from internvit_cli.options import (
    ExtractOptions,
    ModelOptions,
    PictureOptions,
    RunOptions,
    StoreOptions,
    parse_color,
)
from internvit_cli.sources.interface import DiscoverOptions

MODEL, PICTURES, STORE, RUN, SOURCES = "Model", "Pictures", "What is stored", "How it runs", "Sources"
BINARY_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
LEAST_WORKER_MEMORY = 512 << 20
MOST_BYTES = 1 << 63
MOST_DEVICES = 64


def build_options(
    sources: Annotated[
        Optional[list[str]],  # noqa: UP045 - Typer on Python 3.10 reads it
        typer.Argument(help="Folders, files, globs, NAME=DIR, or - for a list on standard input.", show_default=False),
    ] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="feats.h5 for one file, feats/ for shards.", show_default=False)
    ] = "",
    files_from: Annotated[
        str | None, typer.Option(help="A file with one path a line; - is standard input.", rich_help_panel=SOURCES)
    ] = None,
    null: Annotated[
        bool, typer.Option("-0", "--null", help="Paths of lists end in NUL.", rich_help_panel=SOURCES)
    ] = False,
    root: Annotated[
        str | None, typer.Option(help="What keys of files and lists are relative to.", rich_help_panel=SOURCES)
    ] = None,
    follow_links: Annotated[
        bool,
        typer.Option("--follow-links", help="Follow links out of a source, and to folders.", rich_help_panel=SOURCES),
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            "-m", "--model", help="Hub id, alias (300m, 6b), directory, or tiny-random.", rich_help_panel=MODEL
        ),
    ] = DEFAULT_MODEL,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=MODEL)
    ] = None,
    layer: Annotated[
        str, typer.Option(help="Hidden state to take: auto, or an index such as -4.", rich_help_panel=MODEL)
    ] = "auto",
    tile_size: Annotated[
        int | None,
        typer.Option(min=14, max=4480, help="Side of a tile, pixels. (default: the model's)", rich_help_panel=PICTURES),
    ] = None,
    min_tiles: Annotated[
        int, typer.Option(min=1, max=1000, help="Fewest tiles of a grid.", rich_help_panel=PICTURES)
    ] = 1,
    max_tiles: Annotated[
        int, typer.Option(min=1, max=1000, help="Most tiles of a grid.", rich_help_panel=PICTURES)
    ] = 12,
    thumbnail: Annotated[
        bool, typer.Option(help="Add the whole picture as a last tile.", rich_help_panel=PICTURES)
    ] = True,
    preprocess: Annotated[
        Preprocess, typer.Option(help="Tiles, one squashed view, or CLIP's centre crop.", rich_help_panel=PICTURES)
    ] = Preprocess.TILES,
    exif: Annotated[bool, typer.Option(help="Turn pictures upright by their EXIF.", rich_help_panel=PICTURES)] = True,
    background: Annotated[
        str | None,
        typer.Option(metavar="COLOR", help="Compose transparency over it first.", rich_help_panel=PICTURES),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Skip pictures with more.", rich_help_panel=PICTURES)
    ] = DEFAULT_MAX_PIXELS,
    tokens: Annotated[Tokens, typer.Option(help="Which tokens of each tile.", rich_help_panel=STORE)] = Tokens.VISUAL,
    pool: Annotated[Pool, typer.Option(help="How the picture's vector is made.", rich_help_panel=STORE)] = Pool.MEAN,
    tile_pooled: Annotated[
        bool, typer.Option("--tile-pooled", help="Store a vector of every tile too.", rich_help_panel=STORE)
    ] = False,
    store_dtype: Annotated[
        StoreDtype, typer.Option(help="Type of stored tokens.", rich_help_panel=STORE)
    ] = StoreDtype.FLOAT16,
    on_overflow: Annotated[
        OnOverflow, typer.Option(help="A value too large for that type.", rich_help_panel=STORE)
    ] = OnOverflow.SKIP,
    shard_format: Annotated[
        Format | None,
        typer.Option("--format", help="Of the shards of a folder. (default: npy)", rich_help_panel=STORE),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes of a shard.", rich_help_panel=STORE)
    ] = "4GiB",
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. (default: auto)", rich_help_panel=RUN)
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Several at once: all cards, or such as 0,1.", rich_help_panel=RUN),
    ] = None,
    dtype: Annotated[
        ComputeDtype, typer.Option(help="Type the encoder computes in.", rich_help_panel=RUN)
    ] = ComputeDtype.AUTO,
    batch_size: Annotated[
        str, typer.Option(metavar="TILES", help="Tiles a batch: auto measures.", rich_help_panel=RUN)
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, max=512, help="Decode processes. (default: by cores)", rich_help_panel=RUN)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=512, help="Encoder threads on a CPU. (default: one a core)", rich_help_panel=RUN),
    ] = None,
    compile_model: Annotated[
        bool,
        typer.Option("--compile", help="CUDA: torch.compile instead of our kernels; slow start.", rich_help_panel=RUN),
    ] = False,
    decode_timeout: Annotated[
        float,
        typer.Option(
            min=0.1, max=86_400, metavar="SECONDS", help="Skip a picture that takes longer.", rich_help_panel=RUN
        ),
    ] = 30.0,
    worker_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Most memory of a decode process.", rich_help_panel=RUN)
    ] = "4GiB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output of another recipe.", rich_help_panel=RUN)
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Drop the rows of deleted pictures.", rich_help_panel=RUN)
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Let --prune drop more than half of the rows.", rich_help_panel=RUN)
    ] = False,
    retry_skipped: Annotated[
        bool, typer.Option("--retry-skipped", help="Try skipped pictures again.", rich_help_panel=RUN)
    ] = False,
    relocate: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="OLD=NEW", help="A source tree that moved.", rich_help_panel=RUN),
    ] = None,
    no_lock: Annotated[
        bool, typer.Option("--no-lock", help="For filesystems without locks.", rich_help_panel=RUN)
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first picture that cannot be used.", rich_help_panel=RUN)
    ] = False,
) -> ExtractOptions:
    """Turn the words of a command line into options.

    Raises:
        UsageError: a word that means nothing, or options that contradict each other.
    """
    return ExtractOptions(
        sources=tuple(sources or ()),
        discover=DiscoverOptions(files_from=files_from, null_separated=null, root=root, follow_links=follow_links),
        model=ModelOptions(model, revision, parse_layer(layer)),
        pictures=PictureOptions(
            tile_size=tile_size,
            min_tiles=min_tiles,
            max_tiles=max_tiles,
            thumbnail=thumbnail,
            preprocess=preprocess,
            exif=exif,
            background=None if background is None else parse_color(background),
            max_pixels=max_pixels,
        ),
        store=StoreOptions(
            output=output,
            format=shard_format,
            shard_bytes=parse_size("--shard-size", shard_size, least=1),
            tokens=tokens,
            pool=pool,
            tile_pooled=tile_pooled,
            store_dtype=store_dtype,
            on_overflow=on_overflow,
            overwrite=overwrite,
            prune=prune,
            yes=yes,
            retry_skipped=retry_skipped,
            relocations=tuple(parse_relocation(text) for text in relocate or ()),
            lock=not no_lock,
        ),
        run=RunOptions(
            devices=parse_devices(device, devices),
            dtype=dtype,
            batch_tiles=parse_batch_size(batch_size),
            workers=workers,
            threads=threads,
            compile=compile_model,
            decode_timeout=decode_timeout,
            worker_memory=parse_size("--worker-memory", worker_memory, least=LEAST_WORKER_MEMORY),
            strict=strict,
        ),
    )


def require_sources(options: ExtractOptions) -> None:
    """Refuse a command line that names no pictures."""
    if not options.has_sources:
        raise UsageError("no sources given", "name a folder of pictures, such as: internvit extract ./imgs -o feats.h5")


def takes_extract_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the options of `build_options` beside its own; it is called with what they make."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    shared = list(inspect.signature(build_options, eval_str=True).parameters.values())

    def wrapper(**words: Any) -> int:
        own_words = {parameter.name: words.pop(parameter.name) for parameter in own}
        return command(build_options(**words), **own_words)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared, *own)]
    wrapper.__doc__ = command.__doc__
    wrapper.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": int}
    return wrapper


def parse_size(option: str, text: str, least: int) -> int:
    """Bytes from a size such as `4GiB`, `500M` or `1000000`; units are powers of 1024."""
    match = SIZE.fullmatch(text.strip())
    size = float(match[1]) * BINARY_UNITS[match[2].lower()] if match else 0
    if not least <= size < MOST_BYTES:
        raise UsageError(
            f"{option} {text}: not a size of at least {least:,} bytes", f"give a size such as {option} 4GiB"
        )
    return int(size)


def parse_relocation(text: str) -> tuple[bytes, bytes]:
    """Old and new absolute path of a tree that moved."""
    old, _, new = text.partition("=")
    if not old or not new:
        raise UsageError(f"--relocate {text}: not OLD=NEW", "give both folders, such as --relocate /mnt/a=/mnt/b")
    return os.fsencode(os.path.abspath(old)), os.fsencode(os.path.abspath(new))


def parse_devices(device: str | None, devices: str | None) -> tuple[str, ...]:
    """Names of the devices to use: numbers are CUDA devices."""
    if devices is None:
        return (device or "auto",)
    if device is not None:
        raise UsageError("--device and --devices contradict each other", "give --devices alone")
    names = tuple(f"cuda:{name}" if name.isascii() and name.isdigit() else name for name in devices.split(","))
    if len(names) > MOST_DEVICES or not all(names) or ("all" in names and len(names) > 1):
        raise UsageError(f"--devices {devices}: not a list of devices", "give all, or a list such as 0,1 or cpu,cpu")
    if repeated := {name for name in names if names.count(name) > 1} - {"cpu"}:
        raise UsageError(f"--devices {devices}: {min(repeated)} is named twice", "name each card once")
    return names


def parse_layer(text: str) -> int | None:
    """An index into hidden_states, or None for `auto`."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"--layer {text}: neither auto nor a whole number", "give an index such as --layer -4"
        ) from None


def parse_batch_size(text: str) -> int | None:
    """Tiles a batch, or None for `auto`."""
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= 65536:
        raise UsageError(
            f"--batch-size {text}: neither auto nor a number of tiles", "give a number such as --batch-size 64"
        )
    return int(text)
