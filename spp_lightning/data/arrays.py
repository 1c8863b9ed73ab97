"""Arrays of pictures: what a record is, splitting it, and loading it in batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

# One picture and its label. An array of these holds a whole data set in one .npy file.
RECORD = np.dtype([("label", np.uint8), ("image", np.uint8, (3, 32, 32))])

Records = NDArray[np.void]  # of dtype RECORD
Batch = tuple[Tensor, Tensor]


def to_records(images: Any, labels: Any) -> Records:
    """Put pictures and labels into one array of records.

    Args:
        images: Pixels, uint8 ``(n, 3, 32, 32)``, in 0 … 255.
        labels: Class indices, ``(n,)``.

    Returns:
        Array of ``RECORD``, ``(n,)``.

    >>> records = to_records(np.zeros((2, 3, 32, 32), np.uint8), [4, 7])
    >>> records["label"].tolist(), records["image"].shape
    ([4, 7], (2, 3, 32, 32))
    """
    records: Records = np.empty(len(labels), RECORD)
    records["image"] = images
    records["label"] = labels
    return records


def stratified_split(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices in two, so that both parts hold the classes in the same shares.

    Args:
        labels: Class index per picture, int64 ``(n,)``.
        size: Number of pictures in the second part, in [0, n].
        seed: Decides which pictures are taken; nothing else does.

    Returns:
        Indices of the first part ``(n - size,)`` and of the second ``(size,)``, both ascending.
        A class's count is off its exact share by less than one picture.

    >>> first, second = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), size=3, seed=0)
    >>> len(first), len(second), int((second < 4).sum())
    (3, 3, 2)
    """
    n = len(labels)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    taken = torch.zeros(n, dtype=torch.bool)
    if size:
        # Evenly spaced picks from pictures sorted by class take from each class its share.
        taken[by_class[(2 * torch.arange(size) + 1) * n // (2 * size)]] = True
    return torch.nonzero(~taken).flatten(), torch.nonzero(taken).flatten()


class ArrayDataset(Dataset[Batch]):
    """Pictures in one tensor; a whole batch is taken by one indexing operation.

    Args:
        records: Array of ``RECORD``, ``(n,)``. Its memory is shared, not copied.
        indices: Which records to use, int64 ``(m,)``; ``None`` for all.
    """

    def __init__(self, records: Records, indices: Tensor | None = None) -> None:
        self.images = torch.from_numpy(records["image"])
        self.labels = torch.from_numpy(records["label"].astype(np.int64))
        self.indices = torch.arange(len(records)) if indices is None else indices

    def __len__(self) -> int:
        """Return the number of pictures, m."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        """Return one picture ``(3, 32, 32)`` and its label ``()``."""
        i = self.indices[index]
        return self.images[i], self.labels[i]

    def __getitems__(self, batch: list[int]) -> Batch:
        """Return the pictures ``(b, 3, 32, 32)`` and labels ``(b,)`` of a batch of positions."""
        i = self.indices[torch.as_tensor(batch)]
        return self.images[i], self.labels[i]


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
        sampler: Order for training, where the last incomplete batch is dropped; ``None`` goes
            through all pictures in order.
        num_workers: Loader processes; indexing is so cheap that 0 is usually fastest.
        pin_memory: Whether batches lie in page-locked memory, for copies to a GPU.
    """
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        drop_last=sampler is not None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )
