"""Finds and decodes CIFAR-10 on disk, in either of two layouts."""

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
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
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
    """The files of one part of CIFAR-10."""

    files: list[Path]
    class_names: tuple[str, ...]

    def read(self) -> Records:
        """Decode all images."""


@dataclass
class FolderSource:
    """``<part>/<class>/*``: a label is the index of the class folder in alphabetical order."""

    files: list[Path]
    labels: list[int]
    class_names: tuple[str, ...]

    @classmethod
    def find(cls, data_dir: Path, part: Part) -> FolderSource:
        """List the images without opening them."""
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
            images = _images_in(folder / name)
            if not images:
                raise ValueError(f"{folder / name} must hold .png or .jpg images, found none.")
            files += images
            labels += [label] * len(images)
        return cls(files, labels, tuple(names))

    def read(self) -> Records:
        """Decode all images, in the order of ``files``."""
        return to_records(np.stack([decode(path) for path in self.files]), self.labels)


@dataclass
class BatchesSource:
    """``cifar-10-batches-py``: the published pixels, read by torchvision."""

    data_dir: Path
    part: Part
    files: list[Path]
    class_names: tuple[str, ...] = CLASS_NAMES

    @classmethod
    def find(cls, data_dir: Path, part: Part) -> BatchesSource:
        """List the files of both parts: torchvision reads one only if both are complete."""
        files = [path for path, _ in _checksums(data_dir)]
        if missing := [path.name for path in files if not path.is_file()]:
            raise FileNotFoundError(
                f"{data_dir / CIFAR10.base_folder} is incomplete, missing: {', '.join(missing)}. "
                f"{REPAIR}"
            )
        return cls(data_dir, part, files)

    def read(self) -> Records:
        """Compare the checksums, then unpack the batches."""
        for path, md5 in _checksums(self.data_dir):
            if not check_integrity(path, md5):
                raise ValueError(f"{path} is cut off or damaged (md5 isn't {md5}). {REPAIR}")
        with warnings.catch_warnings():
            # NumPy 2.4 warns about the pickles, which an old NumPy wrote.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            data = CIFAR10(self.data_dir, train=self.part == "train")
        return to_records(data.data.transpose(0, 3, 1, 2), data.targets)


def _checksums(data_dir: Path) -> list[tuple[Path, str]]:
    listed = [*CIFAR10.train_list, *CIFAR10.test_list]
    listed.append([CIFAR10.meta["filename"], CIFAR10.meta["md5"]])
    return [(data_dir / CIFAR10.base_folder / name, md5) for name, md5 in listed]


def find_layout(data_dir: Path) -> Literal["batches", "folders"] | None:
    """Find the layout of a folder; ``None`` for neither. Batches win over image folders.

    Raises:
        ValueError: If only one of the folders ``train`` and ``test`` exists.
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
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises different errors for broken files, by format and by place.
        raise ValueError(f"{path} can't be decoded as a image: {error}") from error
    height, width, _ = pixels.shape
    if (height, width) != (32, 32):
        raise ValueError(f"{path} must be 32x32 pixels, got {width}x{height}.")
    return pixels.transpose(2, 0, 1)


def fingerprint(files: list[Path]) -> str:
    """Hash names, sizes and modification times: the hash changes when a file does."""
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


def _images_in(folder: Path) -> list[Path]:
    names = (name for name in os.listdir(folder) if name[0] != ".")
    return [folder / n for n in sorted(names) if n.lower().endswith(IMAGE_SUFFIXES)]
