"""Compute features of pictures in memory, with the values that `internvit extract` stores.

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
"""Batches in flight: one on the device and one that waits, so that the device is never idle."""


class Extractor:
    """A model that is ready to encode pictures; use it in a `with` block, or close it.

    The features are those that `open_features` reads after an extraction with the same options. On a CPU they are equal
    bit for bit, because no value depends on which pictures are encoded together.

    Pictures are decoded in this process, one at a time, so a picture that makes a decoder crash or hang affects the
    whole process. Use `internvit extract` for untrusted pictures. Only one thread at a time may use an extractor.

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
            model: A hub id, an alias (`300m`, `6b`), a directory, or `tiny-random`.
            **options: The options of `ExtractorOptions`, such as `tokens="patch"` or `device="cuda"`.

        Raises:
            ModelError: The model is not available.
            DeviceError: The device does not exist.
            UsageError: Options are invalid or contradict each other.
        """
        wanted = extract_options(model, options)
        with ModelInUse(wanted, None) as in_use:
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
        """Return an extractor with the recipe and the weights of a feature file.

        Args:
            features: A feature file or folder, or its path.
            tokens: Other tokens than those of the file; `none` encodes little more than the pooled vector needs.
            model: Where the weights are, if they are not where the file says.
            device: auto, cpu, cuda, cuda:N or mps.
            observer: Receives the progress of loading.

        Raises:
            ModelError: The weights are not available, or are not those of the file.

        >>> features = open_features("feats.h5")
        >>> with Extractor.like(features, tokens="none", device="cpu") as extractor:
        ...     bool((extractor("imgs/lund.jpg").pooled == features["lund.jpg"].pooled).all())
        True
        """
        opened = features if isinstance(features, Features) else open_features(features)
        recipe, attributes = opened.recipe, opened.attributes
        if tokens is not None:
            recipe = replace(recipe.before_projection, tokens=choice("tokens", Tokens, tokens))
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
        """The encoder; None after `close`."""
        self.recipe = replace(recipe, compute_dtype=encoder.info.dtype)
        """The recipe, which equals that of a feature file made with the same options."""
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
            images: One picture or an iterable of them. A picture is a path (str or os.PathLike), the bytes of a file
                (bytes, bytearray, memoryview), a file opened in binary mode (BytesIO too), a dict with "bytes" or
                "path" as Hugging Face's datasets store pictures, a Pillow image in any mode, or a uint8 array
                [height, width] or [height, width, 1 to 4 channels].

        Returns:
            The features of each picture, in order. A picture that cannot be used has a status other than done and a
            reason; reading its features raises SkippedImageError.

        Raises:
            UsageError: Something is not a picture.
            ClosedError: The extractor was closed.
            DeviceError: The device ran out of memory.
        """
        if is_picture(images):
            return next(self.stream([cast("Picture", images)]))
        return list(self.stream(cast("Iterable[Picture]", images)))

    def stream(self, images: Iterable[Picture]) -> Iterator[ImageFeatures]:
        """Encode pictures one by one, reading a few ahead; memory does not grow with their number.

        Args:
            images: An iterable of pictures, as for a call.

        Raises:
            UsageError: Something is not a picture, raised when its turn comes.
            ClosedError: The extractor was closed.

        >>> with Extractor("tiny-random", tokens="none", device="cpu") as extractor:
        ...     for image in extractor.stream(["imgs/lund.jpg", "missing.jpg"]):
        ...         print(image.key, image.status)
        imgs/lund.jpg done
        missing.jpg vanished
        """
        self._open_encoder()
        if is_picture(images):
            raise UsageError(
                "a single picture is not an iterable of pictures", f"give an iterable of pictures; {ACCEPTED}"
            )
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
        """Release threads and memory; closing again does nothing."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            encoder.close()

    def _open_encoder(self) -> Encoder:
        if self._encoder is None:
            raise ClosedError("the Extractor was closed", "create a new one, or encode inside its `with` block")
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
        """Return the features of a picture whose tiles are encoded."""
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
    """A picture that is being encoded."""

    named: ImageName
    tiled: TiledPicture | Skipped
    parts: list[TileFeatures] = field(default_factory=list)
    """The features of its tiles, in order."""

    @property
    def is_encoded(self) -> bool:
        """Whether all tiles are encoded."""
        return isinstance(self.tiled, Skipped) or sum(map(len, self.parts)) == len(self.tiled.tiles)


class _Flow:
    """Fills batches across pictures, with two in flight."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._batch: list[tuple[_Pending, NDArray[Any]]] = []
        self._in_flight: deque[tuple[PendingBatch, list[tuple[_Pending, NDArray[Any]]]]] = deque()

    def take(self, pending: _Pending) -> None:
        """Add a picture's tiles, and submit batches that are full."""
        for tile in () if isinstance(pending.tiled, Skipped) else pending.tiled.tiles:
            self._batch.append((pending, tile))
            if len(self._batch) >= self._encoder.info.batch_tiles:
                self._submit()

    def finish(self) -> None:
        """Submit the remaining tiles, and wait for all batches."""
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
        """Assign the features of the oldest batch to their pictures, one block per picture."""
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
        torch.set_num_threads(threads)  # keep the caller's setting
