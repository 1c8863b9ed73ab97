"""Arrays of images: their record type, a stratified split, and a data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

# One image and its label. One array of these, in one .npy file, holds a whole data set.
RECORD = np.dtype([("label", np.uint8), ("image", np.uint8, (3, 32, 32))])

Records = NDArray[np.void]  # of dtype RECORD
Batch = tuple[Tensor, Tensor]


def to_records(images: Any, labels: Any) -> Records:
    """Put images and labels into one array of records.

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
    """Split indices into two parts with the same share of every class.

    Args:
        labels: Class index per image, int64 ``(n,)``.
        size: Number of images in the second part, in [0, n].
        seed: Decides which images are taken.

    Returns:
        Indices of the first part ``(n - size,)`` and of the second ``(size,)``, both ascending.
        A class's count differs from its exact share by less than one image.

    >>> first, second = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), size=3, seed=0)
    >>> len(first), len(second), int((second < 4).sum())
    (3, 3, 2)
    """
    n = len(labels)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    taken = torch.zeros(n, dtype=torch.bool)
    if size:
        # Images sorted by class, picked at even distances: each class gives its share.
        taken[by_class[(2 * torch.arange(size) + 1) * n // (2 * size)]] = True
    return torch.nonzero(~taken).flatten(), torch.nonzero(taken).flatten()


class ArrayDataset(Dataset[Batch]):
    """Images in one tensor. One indexing operation takes a whole batch.

    Args:
        records: Array of ``RECORD``, ``(n,)``. The data set shares its memory.
        indices: Which records to use, int64 ``(m,)``; ``None`` for all.
    """

    def __init__(self, records: Records, indices: Tensor | None = None) -> None:
        self.images = torch.from_numpy(records["image"])
        self.labels = torch.from_numpy(records["label"].astype(np.int64))
        self.indices = torch.arange(len(records)) if indices is None else indices
        self.resident = False

    def reside(self, device: torch.device) -> None:
        """Move the images to a device, the one that trains, and keep them there."""
        self.images = self.images.to(device)
        self.labels = self.labels.to(device)
        self.indices = self.indices.to(device)
        self.resident = True

    def __len__(self) -> int:
        """Return the number of images, m."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        """Return one image ``(3, 32, 32)`` and its label ``()``."""
        i = self.indices[index]
        return self.images[i], self.labels[i]

    def __getitems__(self, batch: list[int]) -> Batch:
        """Return the images ``(b, 3, 32, 32)`` and labels ``(b,)`` of a batch of positions."""
        return self.take(torch.as_tensor(batch))

    def take(self, positions: Tensor) -> Batch:
        """Return the images ``(b, 3, 32, 32)`` and labels ``(b,)`` at positions ``(b,)``."""
        i = self.indices[positions]
        return self.images[i], self.labels[i]
