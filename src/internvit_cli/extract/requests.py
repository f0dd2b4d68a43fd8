"""Refuse names of outputs and devices that no extraction can use, before anything is read."""

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
    """Return the output of a command without reading or writing anything.

    Raises:
        UsageError: Its name is invalid, or contradicts the options.
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
    """Refuse devices that do not exist on any machine, and options that a kind of device does not support.

    Raises:
        DeviceError: fp8 is requested on a device other than CUDA.
        UsageError: A name is not that of a device, or torch.compile is requested on a device other than CUDA.
    """
    for name in run.devices:
        if name != ALL_DEVICES:
            check_kind(name, parse_device(name).kind, run.dtype, compile=run.compile)
