"""Loading pictures in batches, in an order that a resumed run takes up where it was."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from spp_lightning.data.arrays import ArrayDataset, Batch


class EpochSampler(DistributedSampler[int]):
    """A new order every epoch, decided by the seed and the epoch's number alone.

    Lightning sets the epoch, so a resumed run sees the orders that an uninterrupted run sees;
    in a plain loop each pass counts as an epoch. Torch's own ``RandomSampler`` would start over
    after a resume. With more than one rank, each takes its own part of the order.
    """

    shift = 0  # what to add to the number that was set

    def __iter__(self) -> Iterator[int]:
        """Go through this rank's positions for one epoch."""
        self.epoch += self.shift
        order = list(super().__iter__())
        self.epoch += 1 - self.shift
        return iter(order)


class TrainLoader(DataLoader[Batch]):
    """A loader over an :class:`EpochSampler` that goes on in the middle of an epoch.

    Its state is the epoch and the number of batches handed out in it, the same on every rank;
    batches that worker processes hold ready don't count. Lightning saves it in checkpoints. With
    another sampler (``overfit_batches`` puts one in) every pass starts at its first batch.
    """

    # Set here and not by an `__init__`: Lightning makes loaders anew from DataLoader's arguments.
    _epoch = 0  # the pass that is under way
    _batches = 0  # batches of it that were handed out
    _restored = False  # whether these are a checkpoint's, to be taken up by the next pass

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch says its own class
        """Go through one epoch, or through what a loaded state has left of it."""
        # A generator, so this runs when the first batch is asked for: Lightning makes the iterator
        # before it sets the sampler's epoch, and workers fetch as soon as there is an iterator.
        if not isinstance(self.sampler, EpochSampler):
            yield from super().__iter__()
            return
        sampler, seen = self.sampler, 0
        if self._restored and sampler.epoch + sampler.shift == self._epoch:
            seen = self._batches
        elif self._restored:
            # Lightning is past that epoch: `limit_train_batches` has cut it short, or there was
            # nothing left of it. It may be one too far: with `max_steps`, resuming from the end of
            # an epoch, it counts that epoch twice.
            sampler.shift = self._epoch + (self._batches > 0) - sampler.epoch
        self._epoch, self._batches = sampler.epoch + sampler.shift, seen
        self._restored = False
        if self._pictures.resident:
            batches = self._resident_batches(seen)
        else:
            batches = islice(super().__iter__(), seen, None)
        for batch in batches:
            self._batches += 1
            yield batch

    @property
    def _pictures(self) -> ArrayDataset:
        assert isinstance(self.dataset, ArrayDataset), "made by make_loader"
        return self.dataset

    def _resident_batches(self, first: int) -> Iterator[Batch]:
        # The epoch's order goes to the device in one copy; a step only launches the indexing.
        size, pictures = self.batch_size or 1, self._pictures
        order = torch.tensor(list(self.sampler)).to(pictures.indices.device)
        for batch in range(first, len(self)):
            yield pictures.take(order[batch * size : (batch + 1) * size])

    def state_dict(self) -> dict[str, int]:
        """Return the position.

        Returns:
            ``epoch``; ``batches`` handed out in it, in [0, len); ``shift``, what to add to
            Lightning's number of the epoch to get this one.
        """
        over = self._batches >= len(self)
        epoch, batches = (self._epoch + 1, 0) if over else (self._epoch, self._batches)
        return {"epoch": epoch, "batches": batches, "shift": getattr(self.sampler, "shift", 0)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next pass begin at a position."""
        self._epoch, self._batches = state_dict["epoch"], state_dict["batches"]
        self._restored = True
        if isinstance(self.sampler, EpochSampler):
            self.sampler.shift = state_dict["shift"]
            self.sampler.set_epoch(self._epoch - self.sampler.shift)


def _as_it_is(batch: Any) -> Any:
    """Collate nothing: the dataset already returns a batch. A function, as workers pickle it."""
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
        dataset: The pictures.
        batch_size: Pictures per batch.
        sampler: Order for training, where the last incomplete batch is dropped and the loader is a
            :class:`TrainLoader`; ``None`` goes through all pictures in order.
        num_workers: Loader processes; indexing is so cheap that 0 is usually fastest.
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
