"""What no extraction can do, refused before anything is looked at: names of outputs and of devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from internvit_cli.encode.options import check_kind, parse_device
from internvit_cli.errors import UsageError
from internvit_cli.extract.multi_device.engine import ALL_DEVICES
from internvit_cli.storage.output import Output
from internvit_cli.storage.output_names import check_features_name

if TYPE_CHECKING:
    from internvit_cli.options import ExtractOptions, RunOptions


def find_output(options: ExtractOptions) -> Output:
    """The output of a command; nothing is read or written.

    Raises:
        UsageError: nothing can be written by its name, or the name and the options contradict each other.
    """
    store = options.store
    check_features_name(store.output)
    output = Output(store.output, store.format)
    if output.is_file and store.shard_bytes is not None:
        raise UsageError(
            f"--shard-size: {store.output} is one file, and has no shards",
            "leave it out, or name a folder, such as -o feats/",
        )
    return output


def check_words(run: RunOptions) -> None:
    """Refuse devices that no machine has, and what a named kind of device cannot do.

    Raises:
        DeviceError: fp8 on a device that is not CUDA's.
        UsageError: no device's name, or torch.compile on a device that is not CUDA's.
    """
    for name in run.devices:
        if name != ALL_DEVICES:
            check_kind(name, parse_device(name).kind, run.dtype, compile=run.compile)
