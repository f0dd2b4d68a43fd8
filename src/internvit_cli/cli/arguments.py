"""Declare the options that `extract`, `plan` and `bench` share, and build `ExtractOptions` from them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from internvit_cli.cli.settings import is_on_command_line
from internvit_cli.cli.values import AUTO, UnusableWordError, layers_or_auto, number, size
from internvit_cli.config import (
    DEFAULT_DECODE_TIMEOUT,
    DEFAULT_LOWEST_COSINE,
    DEFAULT_MAX_PIXELS,
    DEFAULT_MODEL,
    DEFAULT_WORKER_MEMORY,
    MOST_GREY,
    ComputeDtype,
    Format,
    GreyRange,
    OnOverflow,
    Pool,
    Preprocess,
    Resize,
    StoreDtype,
    Tokens,
    Truncated,
    member_named,
)
from internvit_cli.errors import UsageError
from internvit_cli.options import (
    ExtractOptions,
    ModelOptions,
    PictureOptions,
    RunOptions,
    StoreOptions,
    color_named,
)
from internvit_cli.sources.interface import DiscoverOptions
from internvit_cli.storage.output_names import is_single_file

MODEL, PICTURES, STORE, RUN, SOURCES = "Model", "Pictures", "What is stored", "How it runs", "Sources"
EXISTING = "Existing output"
LEAST_WORKER_MEMORY = 512 << 20
MOST_DEVICES = 64
MOST_TILES = 65536
"""Largest accepted batch size, in tiles."""
MEASURED = 0
"""The batch of `--batch-size auto`."""


def relocation(word: str) -> tuple[bytes, bytes]:
    """Parse OLD=NEW into the old and the new absolute path of a folder that moved."""
    old, _, new = word.partition("=")
    if not old or not new:
        raise UnusableWordError("OLD=NEW", "give both folders, such as --relocate /mnt/a=/mnt/b")
    return os.fsencode(os.path.abspath(old)), os.fsencode(os.path.abspath(new))


def device_list(word: str) -> tuple[str, ...]:
    """Parse a list of devices into their names; plain numbers mean CUDA devices."""
    names = tuple(f"cuda:{name}" if name.isascii() and name.isdigit() else name for name in word.split(","))
    if len(names) > MOST_DEVICES or not all(names) or ("all" in names and len(names) > 1):
        raise UnusableWordError("a list of devices", "give all, or a list such as 0,1 or cpu,cpu")
    if repeated := {name for name in names if names.count(name) > 1} - {"cpu"}:
        raise UnusableWordError("a list of different devices", f"name {min(repeated)} once")
    return names


def color(word: str) -> tuple[int, int, int]:
    """Parse a color into red, green and blue, 0 to 255 each."""
    found = color_named(word)
    if found is None:
        raise UnusableWordError("a color", "give a name or a value, such as white or '#ffffff'")
    return found


def grey_range_named(word: str) -> GreyRange | int:
    """Parse --grey-range: the value that becomes white, or the rule that finds it."""
    if (found := member_named(GreyRange, word)) is not None:
        return found
    most: int = number(word, int, f"{' or '.join(GreyRange)} or a number", 1, MOST_GREY)
    return most


def batch_size_named(word: str) -> int:
    """Parse a number of tiles; auto becomes `MEASURED`."""
    return MEASURED if word == AUTO else number(word, int, "auto or a number of tiles", 1, MOST_TILES)


def picture_sources(
    sources: Annotated[
        Optional[list[str]],  # noqa: UP045 - Typer on Python 3.10 reads it
        typer.Argument(
            help="Folders, files, globs, or NAME=DIR to prefix the keys of DIR with NAME/; - reads a list from "
            "standard input."
        ),
    ] = None,
) -> tuple[str, ...]:
    """Return the sources as they were named."""
    return tuple(sources or ())


def discover_options(
    files_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Read the paths of pictures from FILE, one per line; - is standard input.",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    null: Annotated[
        bool, typer.Option("-0", "--null", help="Expect NUL after each path of a list.", rich_help_panel=SOURCES)
    ] = False,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Make the keys of files and lists relative to DIR.",
            show_default="the folder of a file; the working directory for lists",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    follow_links: Annotated[
        bool,
        typer.Option(
            "--follow-links", help="Follow links that leave a source, and links to folders.", rich_help_panel=SOURCES
        ),
    ] = False,
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="PATTERN",
            help="Leave out files and folders that fit PATTERN, written as in a .gitignore, such as thumbs/; "
            "!PATTERN takes back.",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    include: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="PATTERN",
            help="Take only pictures that fit PATTERN, or lie in a folder that does.",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    no_default_excludes: Annotated[
        bool,
        typer.Option(
            "--no-default-excludes",
            help="Take thumbnails, deleted files, snapshots and the like, which are left out by default.",
            rich_help_panel=SOURCES,
        ),
    ] = False,
    sniff: Annotated[
        bool,
        typer.Option(
            "--sniff",
            help="Also take files that are pictures by their first bytes, whatever their name.",
            rich_help_panel=SOURCES,
        ),
    ] = False,
) -> DiscoverOptions:
    """Return where pictures are looked for, and which are left out."""
    return DiscoverOptions(
        files_from=files_from,
        null_separated=null,
        root=root,
        follow_links=follow_links,
        exclude=tuple(exclude or ()),
        include=tuple(include or ()),
        default_excludes=not no_default_excludes,
        sniff=sniff,
    )


def model_options(
    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="Encode with this model: a Hugging Face id, an alias (300m, 6b), a folder, or tiny-random, which has "
            "random weights and serves to try the tool.",
            rich_help_panel=MODEL,
        ),
    ] = DEFAULT_MODEL,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="REVISION", help="Use this branch, tag or commit of the model on the hub.", rich_help_panel=MODEL
        ),
    ] = None,
    layer: Annotated[
        tuple[int, ...] | None,
        typer.Option(
            metavar="INDEX[,INDEX...]",
            help="Take features from this hidden state, such as -4, or from several, such as -4,-1; auto is the choice "
            "of the checkpoint.",
            parser=layers_or_auto,
            show_default=AUTO,
            rich_help_panel=MODEL,
        ),
    ] = None,
) -> ModelOptions:
    """Return which model encodes."""
    return ModelOptions(model, revision, layer)


def picture_options(
    tile_size: Annotated[
        int | None,
        typer.Option(
            min=14,
            max=4480,
            metavar="PIXELS",
            help="Cut square tiles with this side.",
            show_default="that of the model",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    min_tiles: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="Cut at least N tiles per picture, besides the thumbnail.", rich_help_panel=PICTURES
        ),
    ] = 1,
    max_tiles: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="Cut at most N tiles per picture, besides the thumbnail.", rich_help_panel=PICTURES
        ),
    ] = 12,
    thumbnail: Annotated[
        bool,
        typer.Option(help="Add the whole picture as one more tile where there are several.", rich_help_panel=PICTURES),
    ] = True,
    preprocess: Annotated[
        Preprocess,
        typer.Option(
            metavar="HOW",
            help="Cut the picture into tiles, squash it into one tile, or crop its center as CLIP does.",
            rich_help_panel=PICTURES,
        ),
    ] = Preprocess.TILES,
    exif: Annotated[
        bool, typer.Option(help="Turn pictures upright as their EXIF orientation says.", rich_help_panel=PICTURES)
    ] = True,
    background: Annotated[
        tuple[int, int, int] | None,
        typer.Option(
            metavar="COLOR",
            help="Compose transparent pictures over this color, such as white or '#ffffff'.",
            parser=color,
            show_default="alpha is dropped",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Skip pictures with more than N pixels.", rich_help_panel=PICTURES)
    ] = DEFAULT_MAX_PIXELS,
    truncated: Annotated[
        Truncated,
        typer.Option(
            metavar="ACTION",
            help="Skip pictures that lack their end, or accept what is there; the rest is gray or black.",
            rich_help_panel=PICTURES,
        ),
    ] = Truncated.SKIP,
    grey_range: Annotated[
        GreyRange | int,
        typer.Option(
            metavar="full|auto|MAX",
            help="Make this value white in gray pictures of 16 bits: full is 65535, auto fits the bits that a picture "
            "uses, 4095 suits 12 bits.",
            parser=grey_range_named,
            show_default=GreyRange.FULL.value,
            rich_help_panel=PICTURES,
        ),
    ] = GreyRange.FULL,
) -> PictureOptions:
    """Return how pictures become tiles."""
    return PictureOptions(
        tile_size=tile_size,
        min_tiles=min_tiles,
        max_tiles=max_tiles,
        thumbnail=thumbnail,
        preprocess=preprocess,
        exif=exif,
        background=background,
        max_pixels=max_pixels,
        truncated=truncated,
        grey_range=grey_range,
    )


def store_options(
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Write the features to OUT: one file if the name ends in .h5, otherwise a folder of shards.",
        ),
    ] = "",
    tokens: Annotated[
        Tokens,
        typer.Option(
            metavar="KIND",
            help="Store 256 visual or 1,024 patch tokens per tile, tokens projected for the language model, or none.",
            rich_help_panel=STORE,
        ),
    ] = Tokens.VISUAL,
    pool: Annotated[
        Pool,
        typer.Option(
            metavar="HOW",
            help="Make the vector of a picture from the mean of its tokens, the CLS token, or both.",
            rich_help_panel=STORE,
        ),
    ] = Pool.MEAN,
    tile_pooled: Annotated[
        bool, typer.Option("--tile-pooled", help="Store a vector of every tile too.", rich_help_panel=STORE)
    ] = False,
    store_dtype: Annotated[
        StoreDtype, typer.Option(metavar="TYPE", help="Store tokens in this type.", rich_help_panel=STORE)
    ] = StoreDtype.FLOAT16,
    on_overflow: Annotated[
        OnOverflow,
        typer.Option(
            metavar="ACTION",
            help="Skip a picture with a value that is too large for --store-dtype, or clamp the value.",
            rich_help_panel=STORE,
        ),
    ] = OnOverflow.SKIP,
    shard_format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="Write the shards of a folder in this format.",
            show_default=Format.NPY.value,
            rich_help_panel=STORE,
        ),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            help="Limit the shards of a folder to this size.",
            parser=size(least=1),
            show_default="4GiB",
            rich_help_panel=STORE,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an output that was made with another recipe.", rich_help_panel=EXISTING
        ),
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Drop the rows of pictures that were deleted, or that are excluded now.",
            rich_help_panel=EXISTING,
        ),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Let --prune drop more than half of the rows.", rich_help_panel=EXISTING)
    ] = False,
    retry_skipped: Annotated[
        bool,
        typer.Option(
            "--retry-skipped",
            help="Try all pictures again that were skipped before, not only those that a raised limit admits.",
            rich_help_panel=EXISTING,
        ),
    ] = False,
    relocate: Annotated[
        Optional[list[tuple[bytes, bytes]]],  # noqa: UP045
        typer.Option(
            metavar="OLD=NEW",
            help="Find the pictures of folder OLD, which was moved, in folder NEW.",
            parser=relocation,
            rich_help_panel=EXISTING,
        ),
    ] = None,
    no_lock: Annotated[
        bool,
        typer.Option(
            "--no-lock", help="Do not lock the output, on filesystems that have no locks.", rich_help_panel=EXISTING
        ),
    ] = False,
) -> StoreOptions:
    """Return what is stored where, and what becomes of an output that exists."""
    return StoreOptions(
        output=output,
        format=shard_format,
        shard_bytes=shard_bytes_for(shard_size, has_shards=bool(output) and not is_single_file(output)),
        tokens=tokens,
        pool=pool,
        tile_pooled=tile_pooled,
        store_dtype=store_dtype,
        on_overflow=on_overflow,
        overwrite=overwrite,
        prune=prune,
        yes=yes,
        retry_skipped=retry_skipped,
        relocations=tuple(relocate or ()),
        lock=not no_lock,
    )


def run_options(
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Compute on this device: auto, cpu, cuda, cuda:N or mps.",
            show_default=AUTO,
            rich_help_panel=RUN,
        ),
    ] = None,
    devices: Annotated[
        tuple[str, ...] | None,
        typer.Option(
            metavar="LIST",
            help="Compute on several devices: all, for every GPU, or a list such as 0,1.",
            parser=device_list,
            rich_help_panel=RUN,
        ),
    ] = None,
    dtype: Annotated[
        ComputeDtype, typer.Option(metavar="TYPE", help="Compute in this type.", rich_help_panel=RUN)
    ] = ComputeDtype.AUTO,
    max_error: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="COSINE",
            help="Accept --dtype fp8 if every token of the first pictures has at least this cosine to its bfloat16 "
            "form.",
            rich_help_panel=RUN,
        ),
    ] = DEFAULT_LOWEST_COSINE,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Encode N tiles at once. On a GPU, auto measures which number is fastest, which may differ from run "
            "to run, and with it the last bits of features.",
            parser=batch_size_named,
            show_default="32 on a GPU, or what its memory holds",
            rich_help_panel=RUN,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=512,
            help="Decode pictures in N processes.",
            show_default="from the number of cores",
            rich_help_panel=RUN,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=512, help="Encode with N threads on a CPU.", show_default="one per core", rich_help_panel=RUN
        ),
    ] = None,
    resize: Annotated[
        Resize,
        typer.Option(
            metavar="WHERE",
            help="Resize pictures in the decode processes (cpu) or where they are encoded (device); auto means device "
            "on an NVIDIA GPU. The pixels are the same.",
            rich_help_panel=RUN,
        ),
    ] = Resize.AUTO,
    compile_model: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="On CUDA, use torch.compile instead of internvit's own kernels; it takes minutes to start.",
            rich_help_panel=RUN,
        ),
    ] = False,
    decode_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=86_400,
            metavar="SECONDS",
            help="Skip a picture that takes longer to decode.",
            rich_help_panel=RUN,
        ),
    ] = DEFAULT_DECODE_TIMEOUT,
    worker_memory: Annotated[
        int,
        typer.Option(
            metavar="SIZE",
            help="Limit the memory of each decode process; a picture that needs more is skipped.",
            parser=size(least=LEAST_WORKER_MEMORY),
            show_default="4GiB",
            rich_help_panel=RUN,
        ),
    ] = DEFAULT_WORKER_MEMORY,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first picture that cannot be used.", rich_help_panel=RUN)
    ] = False,
) -> RunOptions:
    """Return how the work is done.

    Raises:
        UsageError: Both --device and --devices are given.
    """
    return RunOptions(
        devices=chosen_devices(device, devices),
        dtype=dtype,
        lowest_cosine=max_error,
        batch_tiles=batch_size or None,
        measure_batch=batch_size == MEASURED,
        workers=workers,
        threads=threads,
        resize=resize,
        compile=compile_model,
        decode_timeout=decode_timeout,
        worker_memory=worker_memory,
        strict=strict,
    )


BUILDERS: dict[str, Callable[..., Any]] = {
    "sources": picture_sources,
    "discover": discover_options,
    "model": model_options,
    "pictures": picture_options,
    "store": store_options,
    "run": run_options,
}
"""What makes each field of `ExtractOptions` from the words of a command line; its parameters declare the options."""
_PARAMETERS = {field: inspect.signature(builder, eval_str=True).parameters for field, builder in BUILDERS.items()}


def shared_parameters() -> list[inspect.Parameter]:
    """Return the parameters of all builders: the sources and the output first, then group by group."""
    parameters = [parameter for declared in _PARAMETERS.values() for parameter in declared.values()]
    return sorted(parameters, key=lambda parameter: parameter.name not in ("sources", "output"))


def build_options(words: dict[str, Any]) -> ExtractOptions:
    """Turn the words of a command line into options.

    Args:
        words: The value of every shared parameter, by its name.

    Raises:
        UsageError: Options contradict each other.
    """
    parts = {field: BUILDERS[field](**{name: words[name] for name in names}) for field, names in _PARAMETERS.items()}
    return ExtractOptions(**parts)


def require_sources(options: ExtractOptions) -> None:
    """Raise a `UsageError` if the command line names no sources."""
    if not options.has_sources:
        raise UsageError("no sources given", "name a folder of pictures, such as: internvit extract ./imgs -o feats.h5")


def takes_extract_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add the options of all builders to a command, which receives the `ExtractOptions` built from them."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]

    def wrapper(**words: Any) -> int:
        own_words = {parameter.name: words.pop(parameter.name) for parameter in own}
        return command(build_options(words), **own_words)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared_parameters(), *own)]
    wrapper.__doc__ = command.__doc__
    wrapper.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": int}
    return wrapper


def shard_bytes_for(shard_size: int | None, *, has_shards: bool) -> int | None:
    """Return the value of `--shard-size` that applies to an output.

    If the output has no shards, a value from a variable or a file is ignored, because it may be meant for another
    command; a value from the command line is kept, so that the command can refuse it.
    """
    return shard_size if has_shards or is_on_command_line("shard_size") else None


def chosen_devices(device: str | None, devices: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of the devices that --device or --devices selects.

    Raises:
        UsageError: Both options are given.
    """
    if devices is None:
        return (device or AUTO,)
    if device is not None:
        raise UsageError("--device and --devices contradict each other", "give only --devices")
    return devices
