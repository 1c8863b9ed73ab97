"""Loads images in batches, in an order that a resumed run continues."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from spp_lightning.data.arrays import ArrayDataset, Batch


class EpochSampler(DistributedSampler[int]):
    """A new order every epoch, which depends on the seed and the epoch's number only.

    Lightning sets the epoch, so a resumed run sees the same orders as an uninterrupted run. In a
    plain loop each pass is an epoch. With several ranks, each gets its own part of the order.
    Torch's ``RandomSampler`` would draw other orders after a resume.
    """

    shift = 0  # added to the epoch that was set

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's positions of one epoch."""
        self.epoch += self.shift
        order = list(super().__iter__())
        self.epoch += 1 - self.shift
        return iter(order)


class TrainLoader(DataLoader[Batch]):
    """A loader over an :class:`EpochSampler` that resumes in the middle of an epoch.

    Its state is the epoch and the number of batches it has yielded in that epoch, the same on
    every rank. Batches prefetched by worker processes don't count. Lightning saves the state in
    checkpoints. With another sampler, as under ``overfit_batches``, every pass starts at its first
    batch.
    """

    # Not set by an `__init__`: Lightning rebuilds loaders from DataLoader's arguments.
    _epoch = 0  # the pass that is under way
    _batches = 0  # batches yielded in it
    _restored = False  # whether both come from a checkpoint and apply to the next pass

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch says its own class
        """Iterate over one epoch, or over the rest of it after a loaded state."""
        # A generator: it runs when the first batch is requested. Lightning makes the iterator
        # before it sets the sampler's epoch, and workers would fetch at once.
        if not isinstance(self.sampler, EpochSampler):
            yield from super().__iter__()
            return
        sampler, seen = self.sampler, 0
        if self._restored and sampler.epoch + sampler.shift == self._epoch:
            seen = self._batches
        elif self._restored:
            # Lightning is past that epoch: `limit_train_batches` ended it, or no batch was left.
            # Its number may be wrong: after a resume from the end of an epoch, Lightning
            # counts that epoch twice, and after another such resume it lags behind.
            sampler.shift = self._epoch + (self._batches > 0) - sampler.epoch
        self._epoch, self._batches = sampler.epoch + sampler.shift, seen
        self._restored = False
        if self._images.resident:
            batches = self._resident_batches(seen)
        else:
            batches = islice(super().__iter__(), seen, None)
        for batch in batches:
            self._batches += 1
            yield batch

    @property
    def _images(self) -> ArrayDataset:
        assert isinstance(self.dataset, ArrayDataset), "made by make_loader"
        return self.dataset

    def _resident_batches(self, first: int) -> Iterator[Batch]:
        # One copy moves the epoch's order to the device; a step only indexes.
        size, images = self.batch_size or 1, self._images
        order = torch.tensor(list(self.sampler)).to(images.indices.device)
        for batch in range(first, len(self)):
            yield images.take(order[batch * size : (batch + 1) * size])

    def state_dict(self) -> dict[str, int]:
        """Return the position.

        Returns:
            ``epoch``; ``batches`` yielded in it, in [0, len); ``shift``, the difference between
            this epoch and Lightning's.
        """
        over = self._batches >= len(self)
        epoch, batches = (self._epoch + 1, 0) if over else (self._epoch, self._batches)
        return {"epoch": epoch, "batches": batches, "shift": getattr(self.sampler, "shift", 0)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start the next pass at a position."""
        self._epoch, self._batches = state_dict["epoch"], state_dict["batches"]
        self._restored = True
        if isinstance(self.sampler, EpochSampler):
            self.sampler.shift = state_dict["shift"]
            self.sampler.set_epoch(self._epoch - self.sampler.shift)


def _as_it_is(batch: Any) -> Any:
    """Collate nothing: the dataset returns batches. No lambda, because workers pickle it."""
    return batch


def make_loader(
    dataset: ArrayDataset,
    batch_size: int,
    sampler: EpochSampler | None = None,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Make a loader of batches ``(uint8 (b, 3, 32, 32), int64 (b,))``.

    Args:
        dataset: The images.
        batch_size: Images per batch.
        sampler: Order for training: the loader is a :class:`TrainLoader` and drops the last
            incomplete batch. ``None``: all images in order.
        num_workers: Loader processes. 0 is usually fastest: a batch is one indexing operation.
        pin_memory: Whether batches lie in page-locked memory, for copies to a GPU.
    """
    kind = DataLoader if sampler is None else TrainLoader
    return kind(
        dataset,
        batch_size,
        sampler=sampler,
        drop_last=sampler is not None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )
