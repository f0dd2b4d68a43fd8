"""Stream stored features in a shuffled order, split over ranks and workers, and resumable at a sample.

>>> from torch.utils.data import DataLoader
>>> from internvit_cli import FeatureStream, collate_padded
>>> stream = FeatureStream("feats.h5", seed=0, batch_size=2)
>>> loader = DataLoader(stream, batch_size=2, collate_fn=collate_padded)
>>> [len(batch["key"]) for batch in loader]
[2, 2]
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from internvit_cli.api.dataset import TOKENS, Sample, choose_arrays
from internvit_cli.errors import UsageError
from internvit_cli.options import named_path
from internvit_cli.runtime.words import counted
from internvit_cli.storage.format.layout import dataset_of, stored_layer
from internvit_cli.storage.read.compact import CompactShard
from internvit_cli.storage.read.image import kinds_of_layer
from internvit_cli.storage.read.places import find_places

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

DEFAULT_MIXED_SHARDS = 8
DEFAULT_PREFETCH = 4
"""Samples that the system reads ahead into its cache."""
SETTINGS = ("shuffle", "seed", "mixed_shards", "ranks")
"""What decides the order of an epoch, together with the output."""


class FeatureStream(IterableDataset[Sample]):
    """The images with features of a file or folder, as an iterable dataset for training.

    Samples are those of `FeatureDataset` by image, with tokens in the order in which their chat model reads them. The
    order of an epoch depends on the seed and the epoch alone: shards are shuffled, and the images of a few of them at a
    time are mixed. Each rank takes an equal share of it, without the few images that remain, and workers take turns
    with batches, so the order of samples in a rank does not depend on the number of workers.

    The index takes 21 bytes per image and those of its key, and an epoch's order 4. Nothing stays open between reads.
    Skipped images are left out.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        arrays: Sequence[str] | None = None,
        layer: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        mixed_shards: int = DEFAULT_MIXED_SHARDS,
        batch_size: int = 1,
        rank: int | None = None,
        ranks: int | None = None,
        prefetch: int = DEFAULT_PREFETCH,
    ) -> None:
        """Read the index, one shard after the other.

        Args:
            path: A feature file or folder.
            arrays: Which of `tokens`, `pooled` and `tile_pooled` a sample has; None means all that are stored.
            layer: The stored layer of the arrays, as for `Features.at_layer`; None means the deepest.
            shuffle: Whether to shuffle; otherwise samples come in the stored order.
            seed: The seed of the order.
            mixed_shards: The number of shards whose images are mixed; more shuffle better, fewer read a disk in longer
                runs.
            batch_size: The batch size of the DataLoader, so that several workers give the order that one gives.
            rank: The number of this process from 0; None means that of torch.distributed if it is initialized.
            ranks: The number of processes; None means that of torch.distributed.
            prefetch: Samples that the system reads ahead into its cache (on Linux), for each worker; 0 for none.

        Raises:
            OutputError: There is no output, or it is damaged.
            UsageError: An array or a layer is not stored, a number is out of range, or there are fewer images than
                ranks.
        """
        self._rank, self._ranks = _share(rank, ranks)
        for name, value, least in (("mixed_shards", mixed_shards, 1), ("batch_size", batch_size, 1),
                                   ("prefetch", prefetch, 0)):  # fmt: skip
            if value < least:
                raise UsageError(f"{name}={value}", f"give {least} or more")
        self._path = os.path.abspath(named_path(path))
        self._shards = [CompactShard(place.load()) for place in find_places(self._path)]
        self._lengths = np.array([len(shard) for shard in self._shards], np.int64)
        self._first = np.concatenate([[0], np.cumsum(self._lengths)])
        """The position of each shard's first image, and the number of all images."""
        last = self._shards[-1]
        self._layer = None if layer is None else stored_layer(layer, last.recipe, last.model_layers, self._path)
        stored = kinds_of_layer(dict.fromkeys(name for shard in self._shards for name in shard.stored), self._layer)
        self._arrays = choose_arrays(stored, arrays, self._path)
        wanted = {last.recipe.tokens.dataset if name == TOKENS else name for name in self._arrays}
        self._datasets = tuple(dataset_of(kind, self._layer) for kind in stored if kind in wanted)
        self._shuffle, self._seed, self._mixed_shards = shuffle, seed, mixed_shards
        self._batch_size, self._prefetch = batch_size, prefetch
        if len(self) == 0:
            images = counted(self._images, "image")
            raise UsageError(f"{self._path} has {images} with features for {counted(self._ranks, 'rank')}", "use fewer")
        self._epoch = 0
        self._start = 0
        """The sample of this rank's share with which iteration begins."""
        self._passed = 0
        """The samples that this object has yielded since then; in a worker, those of the worker."""
        self._skipped = 0
        """The samples of a worker that the next iteration leaves out."""

    def __repr__(self) -> str:
        share = "" if self._ranks == 1 else f" of rank {self._rank} of {self._ranks}"
        what = f"{counted(len(self), 'image')}{share}, each with {', '.join(self._arrays)}"
        return f"<{type(self).__name__} of {self._path!r}: {what}>"

    def __len__(self) -> int:
        """Return the number of samples of this rank in an epoch."""
        return self._images // self._ranks

    @property
    def _images(self) -> int:
        return int(self._first[-1])

    @property
    def index_bytes(self) -> int:
        """The size of the index in bytes, including that of an epoch's order."""
        return sum(shard.nbytes for shard in self._shards) + 4 * self._images

    # ------------------------------------------------------------------------------------------------------- the order

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, and begin at its first sample; call it before each epoch."""
        self._epoch, self._start, self._passed, self._skipped = epoch, 0, 0, 0

    def order(self) -> NDArray[Any]:
        """Return this rank's samples of the epoch, as positions among all images with features, [n] uint32."""
        positions = np.arange(self._images, dtype=np.uint32)
        if self._shuffle:
            random = np.random.default_rng([self._seed, self._epoch])
            shards = random.permutation(len(self._shards))
            positions = np.concatenate([positions[self._first[shard] : self._first[shard + 1]] for shard in shards])
            ends = np.cumsum(self._lengths[shards])[self._mixed_shards - 1 :: self._mixed_shards]
            for mixed in np.split(positions, ends):
                random.shuffle(mixed)
        share: NDArray[Any] = positions[self._rank * len(self) :][: len(self)].copy()
        return share

    def __iter__(self) -> Iterator[Sample]:
        """Return an iterator over the samples of this rank, or of this worker, from where the state says."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        left = self.order()[self._start :]
        is_own = np.arange(len(left)) // self._batch_size % workers == number
        self._passed, self._skipped = self._skipped, 0
        return self._counted(left[is_own][self._passed :])

    def _counted(self, positions: NDArray[Any]) -> Iterator[Sample]:
        """Yield samples while the system reads those that follow into its cache."""
        numbers = positions.tolist()
        for coming in numbers[: self._prefetch]:
            self._read_ahead(coming)
        for place, position in enumerate(numbers):
            if self._prefetch and place + self._prefetch < len(numbers):
                self._read_ahead(numbers[place + self._prefetch])
            sample = self._sample(position)
            self._passed += 1
            yield sample

    # ------------------------------------------------------------------------------------------------------- the state

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return the state from which `load_state_dict` goes on with the next sample.

        Args:
            consumed: The samples of this rank that training has taken since the start of the iteration; needed with
                workers of a plain DataLoader, which read ahead in processes of their own. None means those that this
                object has yielded: right without workers, and in the workers of torchdata's StatefulDataLoader.
        """
        settings = {name: getattr(self, f"_{name}") for name in SETTINGS}
        state = settings | {"images": self._images, "epoch": self._epoch}
        if get_worker_info() is not None and consumed is None:
            return state | {"start": self._start, "skipped": self._passed}
        return state | {"start": self._start + (self._passed if consumed is None else consumed), "skipped": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken, with any number of workers.

        Raises:
            UsageError: The state is of another output, order, or number of ranks.
        """
        own = self.state_dict()
        for name in (*SETTINGS, "images"):
            if state.get(name) != own[name]:
                raise UsageError(
                    f"the state is of a stream with {name}={state.get(name)}, and this one has {name}={own[name]}",
                    "make the stream as it was made then",
                )
        self._epoch, self._start, self._skipped = (int(state[name]) for name in ("epoch", "start", "skipped"))
        self._passed = 0

    # ------------------------------------------------------------------------------------------------------ the samples

    def _sample(self, position: int) -> Sample:
        shard, number = self._place(position)
        image = shard.image(number, self._layer)
        facts = {"key": image.key, "grid": tuple(image.grid), "has_thumbnail": image.has_thumbnail}
        return facts | {name: image.to_torch(name, model_order=True) for name in self._arrays}

    def _read_ahead(self, position: int) -> None:
        shard, number = self._place(position)
        shard.read_ahead(number, self._datasets)

    def _place(self, position: int) -> tuple[CompactShard, int]:
        """Return the shard of an image, and its number there."""
        shard = int(np.searchsorted(self._first, position, side="right")) - 1
        return self._shards[shard], position - int(self._first[shard])


def _share(rank: int | None, ranks: int | None) -> tuple[int, int]:
    """Return the number of this process and the number of processes.

    Raises:
        UsageError: They contradict each other.
    """
    distributed = torch.distributed
    if rank is None and ranks is None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    if (rank is None) != (ranks is None):
        raise UsageError("rank and ranks belong together", "give both, or none for those of torch.distributed")
    rank, ranks = (0, 1) if rank is None or ranks is None else (rank, ranks)
    if not 0 <= rank < ranks:
        raise UsageError(f"rank={rank} of ranks={ranks}", "ranks are numbered from 0")
    return rank, ranks
