"""CIFAR-10, from a folder or downloaded, as batches of uint8 images."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from torchvision.datasets import CIFAR10

from spp_lightning.data import cache
from spp_lightning.data.arrays import Records
from spp_lightning.data.base import ImageDataModule
from spp_lightning.data.pixels import Normalize
from spp_lightning.data.reading import (
    CLASS_NAMES,
    LAYOUTS,
    BatchesSource,
    FolderSource,
    Part,
    Source,
    find_layout,
    fingerprint,
)

CACHE_FOLDER = "spp-cache"


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 3x32x32 images of ten classes.

    Loaders give ``(uint8 (b, 3, 32, 32), int64 (b,))``. Images are normalised, and in training
    cropped and flipped, on the device. They are decoded once and cached in a sub-folder of
    ``data_dir``, about 185 MB. If it can't be written, they are kept in memory.

    Args:
        data_dir: Folder of CIFAR-10: torchvision's batches (``cifar-10-batches-py``), or a tree of
            PNG or JPEG files (``train/<class>/*``, ``test/<class>/*``; classes in alphabetical
            order) with at least one image per class.
        batch_size: Images per batch and process.
        normalize: ``"mean_image"``: pixels in 0 … 255 minus the mean training image.
            ``"mean_std"``: per channel, minus the mean, divided by the standard deviation.
        flip: Whether training images are flipped left to right with probability 0.5.
        crop_padding: Pixels of zero padding around a training image before a random 32x32
            crop; 0 for no crops.
        val_size: Training images set aside for validation, stratified by class: a number (int)
            or a share (float, rounded up). With 0, validation uses the test images.
        seed: Seed of the split, the order of every epoch, flips and crops.
        download: Whether torchvision may download CIFAR-10 (170 MB) if ``data_dir`` lacks it.
        num_workers: Loader processes. 0 is usually fastest: a batch is one indexing operation.
        resident: Keep all images on the device that trains, 185 MB. A step then copies no data.

    Raises:
        ValueError: If an argument is out of range or the files in ``data_dir`` are broken.
        FileNotFoundError: If CIFAR-10 is not in ``data_dir`` and can't be downloaded.

    >>> data = CIFAR10DataModule(batch_size=128, flip=True, crop_padding=4)
    >>> data.num_classes, data.input_shape, data.class_names[3]
    (10, (3, 32, 32), 'cat')
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] = "data/cifar10",
        batch_size: int = 100,
        normalize: Normalize = "mean_image",
        flip: bool = False,
        crop_padding: int = 0,
        val_size: int | float = 0,
        seed: int = 0,
        download: bool = True,
        num_workers: int = 0,
        resident: bool = False,
    ) -> None:
        super().__init__(
            batch_size, normalize, flip, crop_padding, val_size, seed, num_workers, resident
        )
        self.data_dir = Path(data_dir).expanduser()
        self.download = download
        self.class_names = CLASS_NAMES
        self._loaded: tuple[Records, Records] | None = None

    def prepare_data(self) -> None:
        """Decode and cache CIFAR-10, after a download if needed. Runs on rank zero only."""
        try:
            self.load()
        except (FileNotFoundError, ValueError):
            if not self.download or find_layout(self.data_dir) == "folders":
                raise
            self._download()
            self.load()

    def load(self) -> tuple[Records, Records]:
        """Return training and test images, from the cache if it is valid."""
        if self._loaded is None:
            train, train_cached = self._load_part("train")
            test, test_cached = self._load_part("test")
            if not (train_cached and test_cached):
                rank_zero_warn(
                    f"{self.data_dir / CACHE_FOLDER} can't be written, so the decoded images are "
                    "kept in memory and decoded again next time. Make it writable to avoid that."
                )
            self._loaded = train, test
        return self._loaded

    def _load_part(self, part: Part) -> tuple[Records, bool]:
        """Return a part's images, and whether they are cached."""
        source = self._source(part)
        path = self.data_dir / CACHE_FOLDER / f"{part}-{fingerprint(source.files)}.npy"
        records = cache.load(path)
        if records is not None:
            return records, True
        records = source.read()
        try:
            cache.save(path, records)
        except OSError:
            return records, False
        return records, True

    def _source(self, part: Part) -> Source:
        layout = find_layout(self.data_dir)
        if layout is None:
            raise FileNotFoundError(_nothing_in(self.data_dir))
        kind = BatchesSource if layout == "batches" else FolderSource
        source: Source = kind.find(self.data_dir, part)
        self.class_names = source.class_names
        return source

    def _download(self) -> None:
        missing = [x for x in (self.data_dir, *self.data_dir.parents) if not x.exists()]
        try:
            CIFAR10(self.data_dir, download=True)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):  # leaves folders that are not empty
                for folder in missing:
                    folder.rmdir()
            raise FileNotFoundError(
                f"{_nothing_in(self.data_dir)} Downloading it failed: {error}"
            ) from error


def _nothing_in(folder: Path) -> str:
    """Error message: the folder, what it holds, and what to do."""
    if folder.is_dir():
        names = sorted(os.listdir(folder))
        found = f"found: {', '.join(names[:10])}{' …' if names[10:] else ''}" if names else "empty"
    else:
        found = "no such folder"
    return (
        f"No complete CIFAR-10 in `data_dir` {folder.absolute()} ({found}). "
        f"It must hold {LAYOUTS}. Put it there, point `data_dir` at it, or use `download=True` "
        "with a network; `DigitsDataModule` needs neither data nor network."
    )
