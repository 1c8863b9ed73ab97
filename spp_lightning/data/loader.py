"""Loading pictures in batches, in an order that a resumed run takes up where it was."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from spp_lightning.data.arrays import ArrayDataset, Batch


class EpochSampler(DistributedSampler[int]):
    """A new order every epoch, decided by the seed and the epoch's number alone.

    Lightning sets the epoch, so a resumed run sees the orders that an uninterrupted run sees;
    in a plain loop each pass counts as an epoch. Torch's own ``RandomSampler`` would start over
    after a resume. With more than one rank, each takes its own part of the order.
    """

    def __iter__(self) -> Iterator[int]:
        """Go through this rank's positions for one epoch."""
        order = list(super().__iter__())
        self.epoch += 1
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
    _restored = False  # whether these two are a checkpoint's, to be taken up by the next pass

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch says its own class
        """Go through one epoch, or through what a loaded state has left of it."""
        # A generator, so this runs when the first batch is asked for: Lightning makes the iterator
        # before it sets the sampler's epoch, and workers fetch as soon as there is an iterator.
        if not isinstance(self.sampler, EpochSampler):
            yield from super().__iter__()
            return
        epoch = self.sampler.epoch
        # A state of the last batch of an epoch that `limit_train_batches` cut short is of an epoch
        # that is over.
        seen = self._batches if self._restored and epoch == self._epoch else 0
        self._epoch, self._batches, self._restored = epoch, seen, False
        for batch in islice(super().__iter__(), seen, None):
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position: ``epoch``, and ``batches`` handed out in it, in [0, len)."""
        if self._batches >= len(self):
            return {"epoch": self._epoch + 1, "batches": 0}
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next pass begin at a position, if it's of the same epoch."""
        self._epoch, self._batches = state_dict["epoch"], state_dict["batches"]
        self._restored = True
        if isinstance(self.sampler, EpochSampler):
            self.sampler.set_epoch(self._epoch)


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
