"""Features of pictures in memory: the values that `internvit extract` stores, without a file in between.

>>> from internvit_cli import Extractor
>>> with Extractor("tiny-random", device="cpu", dtype="float32") as extractor:
...     street, lund = extractor(["imgs/street.jpg", "imgs/lund.jpg"])
>>> street.visual_tokens.shape, street.pooled.shape, lund.grid
((13, 256, 256), (64,), Grid(columns=4, rows=3))
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np

from internvit_cli.api.given import ACCEPTED, is_picture, tile_given
from internvit_cli.api.in_memory import ImageName, done_image, skipped_image
from internvit_cli.api.settings import ExtractorOptions, choice, extract_options, model_name
from internvit_cli.config import DEFAULT_MAX_PIXELS, DEFAULT_MODEL, Skipped, Status, Tokens
from internvit_cli.encode.tile_features import UNFIT
from internvit_cli.errors import ClosedError, UsageError
from internvit_cli.model.recorded import open_recorded
from internvit_cli.recipes import ModelInUse, check_layers, encoder_options, encoder_options_of_run, pixel_rule
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.storage.image_rows import image_arrays
from internvit_cli.storage.read.reader import Features, open_features

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Self, Unpack

    from internvit_cli.api.given import Picture
    from internvit_cli.config import Recipe
    from internvit_cli.decode.direct import TiledPicture
    from internvit_cli.encode.encoder import Encoder
    from internvit_cli.encode.interface import PendingBatch
    from internvit_cli.encode.options import EncoderOptions
    from internvit_cli.encode.tile_features import TileFeatures
    from internvit_cli.model.checkpoint import Checkpoint
    from internvit_cli.storage.read.image import ImageFeatures

BATCHES_IN_FLIGHT = 2
"""One that the device works on and one that waits, so that the device never does."""


class Extractor:
    """A model that is ready to encode pictures; use it in a `with` block, or close it.

    What comes back is what `open_features` would read after an extraction with the same options: on a CPU bit for
    bit, since no value there depends on which pictures are encoded together.

    Pictures are decoded in this process, one at a time: a picture that makes a decoder crash or hang takes the process
    along. For folders of pictures from anywhere there is `internvit extract`. One thread at a time may use it.

    Example:
        >>> from PIL import Image
        >>> with Extractor("tiny-random", tokens="patch", max_tiles=6, device="cpu") as extractor:
        ...     image = extractor(Image.open("imgs/portrait.jpg"))
        >>> image.token_map().shape
        (96, 64, 64)
    """

    def __init__(self, model: str | os.PathLike[str] = DEFAULT_MODEL, **options: Unpack[ExtractorOptions]) -> None:
        """Load a model.

        Args:
            model: hub id, alias (`300m`, `6b`), directory, or `tiny-random`.
            **options: as `ExtractorOptions` lists them, such as `tokens="patch"`, `device="cuda"`.

        Raises:
            ModelError: the model cannot be had.
            DeviceError: the device is not there.
            UsageError: options that mean nothing or contradict each other.
        """
        wanted = extract_options(model, options)
        in_use = ModelInUse(wanted, None)
        recipe, run = in_use.recipe, wanted.run
        how = encoder_options_of_run(run, recipe, run.devices[0])
        self._start(in_use.checkpoint, recipe, how, wanted.pictures.max_pixels)

    @classmethod
    def like(
        cls,
        features: Features | str | os.PathLike[str],
        *,
        tokens: Tokens | str | None = None,
        model: str | os.PathLike[str] | None = None,
        device: str = "auto",
        observer: Observer = SILENT,
    ) -> Self:
        """An extractor that goes on where a feature file left off: its recipe, its weights.

        Args:
            features: a feature file or folder, or its path.
            tokens: other tokens than the file's; `none` encodes little more than what the pooled vector needs.
            model: where the weights are, when not where the file says.
            device: auto, cpu, cuda, cuda:N or mps.
            observer: told how the loading goes.

        Raises:
            ModelError: the weights cannot be had, or are not those of the file.

        >>> features = open_features("feats.h5")
        >>> with Extractor.like(features, tokens="none", device="cpu") as extractor:
        ...     bool((extractor("imgs/lund.jpg").pooled == features["lund.jpg"].pooled).all())
        True
        """
        opened = features if isinstance(features, Features) else open_features(features)
        recipe, attributes = opened.recipe, opened.attributes
        if tokens is not None:
            recipe = replace(recipe, tokens=choice("tokens", Tokens, tokens))
            check_layers(recipe.tokens, recipe.layers)
        name = None if model is None else model_name(model)
        checkpoint = open_recorded(recipe, attributes, name, observer)
        self = cls.__new__(cls)
        batch_tiles = int(attributes.get("batch_tiles", 0)) or None
        self._start(checkpoint, recipe, encoder_options(recipe, device, batch_tiles), DEFAULT_MAX_PIXELS)
        return self

    def _start(self, checkpoint: Checkpoint, recipe: Recipe, how: EncoderOptions, max_pixels: int) -> None:
        encoder = _load(checkpoint, how)
        self._encoder: Encoder | None = encoder
        """None once it was closed."""
        self.recipe = replace(recipe, compute_dtype=encoder.info.dtype)
        """What decides its values; that of a feature file made with the same options is equal."""
        self.device_name = encoder.info.device_name
        self._model_layers = checkpoint.card.vision.num_layers
        self._rule = pixel_rule(recipe, max_pixels)

    @overload
    def __call__(self, images: Picture) -> ImageFeatures: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, images: Iterable[Picture]) -> list[ImageFeatures]: ...
    def __call__(self, images: Picture | Iterable[Picture]) -> ImageFeatures | list[ImageFeatures]:
        """Encode one picture, or many, whose tiles share batches.

        Args:
            images: one picture or an iterable of them. A picture is a path (str or os.PathLike), the bytes of a file
                (bytes, bytearray, memoryview), a file opened in binary mode (BytesIO too), a dict with "bytes" or
                "path" as Hugging Face's datasets keep pictures, a Pillow image in any mode, or a uint8 array
                [height, width] or [height, width, 1 to 4 channels].

        Returns:
            For each picture, in order, its features. One that cannot be used is there too, with a status other than
            done and its reason; asking it for features raises SkippedImageError.

        Raises:
            UsageError: something that is no picture.
            ClosedError: the extractor was closed.
            DeviceError: the device ran out of memory.
        """
        if is_picture(images):
            return next(self.stream([cast("Picture", images)]))
        return list(self.stream(cast("Iterable[Picture]", images)))

    def stream(self, images: Iterable[Picture]) -> Iterator[ImageFeatures]:
        """Encode pictures as they come, a few ahead of what is taken; memory does not grow with their number.

        Args:
            images: as for a call.

        Raises:
            UsageError: something that is no picture, when its turn comes.
            ClosedError: the extractor was closed.

        >>> with Extractor("tiny-random", tokens="none", device="cpu") as extractor:
        ...     for image in extractor.stream(["imgs/lund.jpg", "missing.jpg"]):
        ...         print(image.key, image.status)
        imgs/lund.jpg done
        missing.jpg vanished
        """
        self._open_encoder()
        if is_picture(images):
            raise UsageError("one picture is no stream of them", f"give an iterable of pictures; {ACCEPTED}")
        return self._stream(images)

    def _stream(self, images: Iterable[Picture]) -> Iterator[ImageFeatures]:
        flow = _Flow(self._open_encoder())
        waiting: deque[_Pending] = deque()
        for number, image in enumerate(images):
            self._open_encoder()
            waiting.append(_Pending(*tile_given(number, image, self._rule)))
            flow.take(waiting[-1])
            while waiting and waiting[0].is_encoded:
                yield self._finish(waiting.popleft())
        self._open_encoder()
        flow.finish()
        while waiting:
            yield self._finish(waiting.popleft())

    def close(self) -> None:
        """Give up threads and memory; closing again does nothing."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            encoder.close()

    def _open_encoder(self) -> Encoder:
        if self._encoder is None:
            raise ClosedError("the Extractor was closed", "make a new one, or encode inside its `with` block")
        return self._encoder

    def __enter__(self) -> Self:
        self._open_encoder()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = "closed " if self._encoder is None else ""
        dtype, tokens = self.recipe.compute_dtype.value, self.recipe.tokens.value
        return f"<{closed}Extractor in {dtype} on {self.device_name}, {tokens} tokens>"

    def _finish(self, pending: _Pending) -> ImageFeatures:
        """The features of a picture whose tiles are encoded."""
        if isinstance(pending.tiled, Skipped):
            return skipped_image(pending.named, self.recipe, pending.tiled)
        worst = max(int(part.fits.max()) for part in pending.parts)
        if worst:
            return skipped_image(pending.named, self.recipe, Skipped(Status.OVERFLOW, "", UNFIT[worst]))
        blocks = image_arrays([part.layers for part in pending.parts], self.recipe)
        arrays = {name: np.concatenate(parts) for name, parts in blocks.items()}
        return done_image(pending.named, self.recipe, pending.tiled, arrays, self._model_layers)


@dataclass(slots=True)
class _Pending:
    """A picture on its way through the encoder."""

    named: ImageName
    tiled: TiledPicture | Skipped
    parts: list[TileFeatures] = field(default_factory=list)
    """Features of its tiles, in order."""

    @property
    def is_encoded(self) -> bool:
        """Whether all its features are there."""
        return isinstance(self.tiled, Skipped) or sum(map(len, self.parts)) == len(self.tiled.tiles)


class _Flow:
    """Batches across pictures, two in flight."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._batch: list[tuple[_Pending, NDArray[Any]]] = []
        self._in_flight: deque[tuple[PendingBatch, list[tuple[_Pending, NDArray[Any]]]]] = deque()

    def take(self, pending: _Pending) -> None:
        """Send a picture's tiles off, batch by batch as they become full."""
        for tile in () if isinstance(pending.tiled, Skipped) else pending.tiled.tiles:
            self._batch.append((pending, tile))
            if len(self._batch) == self._encoder.info.batch_tiles:
                self._submit()

    def finish(self) -> None:
        """Send off what is left, and wait for all of it."""
        if self._batch:
            self._submit()
        while self._in_flight:
            self._fetch()

    def _submit(self) -> None:
        if len(self._in_flight) == BATCHES_IN_FLIGHT:
            self._fetch()
        batch, self._batch = self._batch, []
        self._in_flight.append((self._encoder.submit([tile for _, tile in batch]), batch))

    def _fetch(self) -> None:
        """Give the oldest batch's features to their pictures, the tiles of one picture as one block."""
        encoded, batch = self._in_flight.popleft()
        features = encoded.result()
        start = 0
        for stop in range(1, len(batch) + 1):
            if stop == len(batch) or batch[stop][0] is not batch[start][0]:
                batch[start][0].parts.append(features.take(slice(start, stop)))
                start = stop


def _load(checkpoint: Checkpoint, how: EncoderOptions) -> Encoder:
    import torch

    from internvit_cli.encode.encoder import Encoder

    threads = torch.get_num_threads()
    try:
        return Encoder.load(checkpoint, how)
    finally:
        torch.set_num_threads(threads)  # a program of its own keeps the setting of its own
