"""The data modules' common part: checks, split, loaders, normalisation on the device."""

from __future__ import annotations

import random
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from spp_lightning.data.arrays import ArrayDataset, Batch, Records, stratified_split
from spp_lightning.data.checks import (
    check_bool,
    check_int,
    check_normalize,
    check_val_size,
    val_count,
)
from spp_lightning.data.loader import EpochSampler, make_loader
from spp_lightning.data.pixels import Normalize, augment, statistics


class ImageDataModule(LightningDataModule):
    """Base class for batches of 3x32x32 images. A subclass implements ``load``.

    Loaders give ``(uint8 (b, 3, 32, 32), int64 (b,))``. Batches are normalised on the device.
    """

    input_shape: tuple[int, int, int] = (3, 32, 32)
    num_classes: int = 10
    class_names: tuple[str, ...]

    def __init__(
        self,
        batch_size: int,
        normalize: Normalize,
        flip: bool,
        crop_padding: int,
        val_size: int | float,
        seed: int,
        num_workers: int,
        resident: bool,
    ) -> None:
        super().__init__()
        self.batch_size = check_int("batch_size", batch_size, lowest=1)
        self.normalize = check_normalize(normalize)
        self.flip = check_bool("flip", flip)
        self.crop_padding = check_int("crop_padding", crop_padding, lowest=0)
        self.val_size = check_val_size(val_size)
        self.seed = check_int("seed", seed, lowest=0)
        self.num_workers = check_int("num_workers", num_workers, lowest=0)
        self.resident = check_bool("resident", resident)
        if self.resident and self.num_workers:
            raise ValueError(
                "`num_workers` must be 0 if `resident` is True, as there is nothing to load then,"
                f" got {num_workers}."
            )
        self._train: ArrayDataset | None = None
        self._batches_seen = 0  # in training; with the seed it decides flips and crops

    def load(self) -> tuple[Records, Records]:
        """Return training and test images. Called on every rank."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load the images, split off the validation images, and compute the statistics."""
        if self._train is not None:
            return
        train, test = self.load()
        held_out = val_count(self.val_size, len(train))
        labels = torch.from_numpy(train["label"].astype("int64"))
        fit, val = stratified_split(labels, held_out, self.seed)
        self._test = ArrayDataset(test)
        self._val = ArrayDataset(train, val) if held_out else self._test
        self._train = ArrayDataset(train, fit)
        self._shift, self._scale = statistics(self._train.images, fit, self.normalize)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Loader of the training images, in a new order every epoch, without an incomplete batch.

        Every new loader starts at epoch 0: in a plain loop, make one loader and iterate over it
        once per epoch. Its ``state_dict`` is its position, so a Trainer resumes in the middle of an
        epoch.
        """
        dataset = self._ready()
        ranks, rank = 1, 0
        if self.trainer is not None:
            ranks, rank = self.trainer.world_size, self.trainer.global_rank
        # The sampler adds the epoch to its seed. Seeds this far apart never share an order.
        seed = self.seed * 1_000_000
        sampler = EpochSampler(dataset, ranks, rank, seed=seed, drop_last=True)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"`batch_size` must be in [1, {len(sampler)}], the number of training images "
                f"per process, got {self.batch_size}."
            )
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Loader of the images split off by ``val_size``, or of the test images if that is 0."""
        self._ready()
        return self._loader(self._val)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Loader of the test images, in order."""
        self._ready()
        return self._loader(self._test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Loader of the test images, in order."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise a batch of uint8 images; in training, crop and flip it first.

        Any other batch is returned unchanged.
        """
        match batch:
            case (Tensor(dtype=torch.uint8) as images, labels):
                pass
            case _:
                return batch
        if self.trainer is not None and self.trainer.training:
            images = self._augment(images)
        if self._shift.device != images.device:
            self._shift = self._shift.to(images.device)
            self._scale = self._scale.to(images.device)
        pixels = (images.float() - self._shift) / self._scale
        if self.trainer is not None:
            # Lightning converts batches before this hook. At that time this one is uint8.
            pixels = self.trainer.precision_plugin.convert_input(pixels)
        return pixels, labels

    def state_dict(self) -> dict[str, int]:
        """Return the number of training batches seen, which decides crops and flips."""
        return {"batches_seen": self._batches_seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a number of training batches seen."""
        self._batches_seen = state_dict["batches_seen"]

    def _augment(self, images: Tensor) -> Tensor:
        rank = self.trainer.global_rank if self.trainer else 0
        chance = random.Random(f"{self.seed}/{rank}/{self._batches_seen}")
        self._batches_seen += 1
        if not (self.flip or self.crop_padding):
            return images
        generator = torch.Generator(images.device).manual_seed(chance.getrandbits(63))
        return augment(images, self.flip, self.crop_padding, generator)

    def _ready(self) -> ArrayDataset:
        if self._train is None:
            raise RuntimeError(
                "The images are not loaded yet. Call `prepare_data()` and `setup()` first, "
                "or pass the data module to a Trainer."
            )
        return self._train

    def _loader(
        self, dataset: ArrayDataset, sampler: EpochSampler | None = None
    ) -> DataLoader[Batch]:
        device = torch.device("cpu")
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
        if self.resident:
            dataset.reside(device)
        return make_loader(
            dataset,
            self.batch_size,
            sampler,
            num_workers=self.num_workers,
            pin_memory=device.type == "cuda" and not self.resident,
        )
