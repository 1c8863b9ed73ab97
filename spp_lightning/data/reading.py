"""CIFAR-10 on disk: finds its pictures in either of two layouts and decodes them."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from spp_lightning.data.arrays import Records, to_records

Part = Literal["train", "test"]
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
NUM_CLASSES = len(CLASS_NAMES)
REPAIR = "Run again with `download=True`, or unpack the archive again."
LAYOUTS = (
    "torchvision's batches (`cifar-10-batches-py/data_batch_1` …) or an image-folder tree "
    "(`train/<class>/*.png` and `test/<class>/*.png`, also .jpg, ten class folders)"
)


class Source(Protocol):
    """One part of CIFAR-10 as it lies on disk."""

    files: list[Path]
    class_names: tuple[str, ...]

    def read(self) -> Records:
        """Decode all pictures."""


@dataclass
class FolderSource:
    """``<part>/<class>/*``: labels are the places of the class folders in alphabetical order."""

    files: list[Path]
    labels: list[int]
    class_names: tuple[str, ...]

    @classmethod
    def find(cls, data_dir: Path, part: Part) -> FolderSource:
        """List the pictures, without opening them."""
        folder = data_dir / part
        names = _class_folders(folder)
        if names != (others := _class_folders(data_dir / "train")):
            raise ValueError(
                f"{folder} must hold the same class folders as {data_dir / 'train'}, "
                f"but only one has {sorted(set(names) ^ set(others))}."
            )
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            pictures = _pictures_in(folder / name)
            if not pictures:
                raise ValueError(f"{folder / name} must hold .png or .jpg pictures, found none.")
            files += pictures
            labels += [label] * len(pictures)
        return cls(files, labels, tuple(names))

    def read(self) -> Records:
        """Decode all pictures, in the order of ``files``."""
        return to_records(np.stack([decode(path) for path in self.files]), self.labels)


@dataclass
class BatchesSource:
    """``cifar-10-batches-py``: pixels as they were published, read by torchvision."""

    data_dir: Path
    part: Part
    files: list[Path]
    class_names: tuple[str, ...] = CLASS_NAMES

    @classmethod
    def find(cls, data_dir: Path, part: Part) -> BatchesSource:
        """List the files, of both parts: torchvision reads neither unless both are whole."""
        files = [path for path, _ in _checksums(data_dir)]
        if missing := [path.name for path in files if not path.is_file()]:
            raise FileNotFoundError(
                f"{data_dir / CIFAR10.base_folder} is incomplete, missing: {', '.join(missing)}. "
                f"{REPAIR}"
            )
        return cls(data_dir, part, files)

    def read(self) -> Records:
        """Unpack the batches, whose checksums are compared before."""
        for path, md5 in _checksums(self.data_dir):
            if not check_integrity(path, md5):
                raise ValueError(f"{path} is cut off or damaged (md5 isn't {md5}). {REPAIR}")
        with warnings.catch_warnings():
            # The batches were pickled by an old NumPy, in a way that NumPy 2.4 warns about.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            data = CIFAR10(self.data_dir, train=self.part == "train")
        return to_records(data.data.transpose(0, 3, 1, 2), data.targets)


def _checksums(data_dir: Path) -> list[tuple[Path, str]]:
    listed = [*CIFAR10.train_list, *CIFAR10.test_list]
    listed.append([CIFAR10.meta["filename"], CIFAR10.meta["md5"]])
    return [(data_dir / CIFAR10.base_folder / name, md5) for name, md5 in listed]


def find_layout(data_dir: Path) -> Literal["batches", "folders"] | None:
    """Find which layout a folder holds; ``None`` for neither. Batches win over pictures.

    Raises:
        ValueError: If only one of the folders ``train`` and ``test`` is there.
    """
    if (data_dir / CIFAR10.base_folder).is_dir():
        return "batches"
    parts = [part for part in ("train", "test") if (data_dir / part).is_dir()]
    if len(parts) == 1:
        raise ValueError(
            f"{data_dir} must hold both folders `train` and `test`, found only `{parts[0]}`."
        )
    return "folders" if parts else None


def decode(path: Path) -> NDArray[np.uint8]:
    """Decode one PNG or JPEG file.

    Returns:
        Pixels, uint8 ``(3, 32, 32)``.

    Raises:
        ValueError: If the file can't be decoded or isn't 32x32 pixels.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow has no error of its own for broken files: it depends on the format and the place.
        raise ValueError(f"{path} can't be decoded as a picture: {error}") from error
    height, width, _ = pixels.shape
    if (height, width) != (32, 32):
        raise ValueError(f"{path} must be 32x32 pixels, got {width}x{height}.")
    return pixels.transpose(2, 0, 1)


def fingerprint(files: list[Path]) -> str:
    """Digest names, sizes and modification times, so that it changes when the files do."""
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        name = f"{path.parent.name}/{path.name}"
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    if len(names) != NUM_CLASSES:
        raise ValueError(
            f"{folder} must hold {NUM_CLASSES} class folders, found {len(names)}: {names}."
        )
    return tuple(names)


def _pictures_in(folder: Path) -> list[Path]:
    names = (name for name in os.listdir(folder) if name[0] != ".")
    return [folder / n for n in sorted(names) if n.lower().endswith(PICTURE_SUFFIXES)]
