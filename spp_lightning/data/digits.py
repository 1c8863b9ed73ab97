"""scikit-learn's handwritten digits: a data set that needs no download."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate

from spp_lightning.data.arrays import Records, stratified_split, to_records
from spp_lightning.data.base import ImageDataModule
from spp_lightning.data.pixels import Normalize


class DigitsDataModule(ImageDataModule):
    """The 1,797 8x8 images of scikit-learn's digits, enlarged to 3x32x32.

    Batches and normalisation are those of ``CIFAR10DataModule``: a network for CIFAR-10 trains on
    them in seconds. The three channels are equal.

    Args:
        batch_size: Images per batch and process.
        normalize: ``"mean_image"`` or ``"mean_std"``, as in ``CIFAR10DataModule``.
        val_size: Training images set aside for validation: a number (int) or a share (float).
            With 0, validation uses the test images.
        test_size: Share of the images used for testing, in [0.001, 1). They do not depend on
            ``seed``, so runs with different seeds have the same test images.
        seed: Seed of the validation split and of the order of every epoch.

    Raises:
        ValueError: If an argument is out of range.

    >>> data = DigitsDataModule(batch_size=50)
    >>> data.setup()
    >>> images, labels = next(iter(data.train_dataloader()))
    >>> images.shape, images.dtype, labels.shape
    (torch.Size([50, 3, 32, 32]), torch.uint8, torch.Size([50]))
    """

    class_names = tuple("0123456789")

    def __init__(
        self,
        batch_size: int = 100,
        normalize: Normalize = "mean_image",
        val_size: int | float = 0,
        test_size: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size,
            normalize,
            flip=False,
            crop_padding=0,
            val_size=val_size,
            seed=seed,
            num_workers=0,
            resident=False,
        )
        if not isinstance(test_size, float) or not 0.001 <= test_size < 1:
            raise ValueError(f"`test_size` must be in [0.001, 1), got {test_size!r}.")
        self.test_size = test_size

    def load(self) -> tuple[Records, Records]:
        """Return training and test images.

        Raises:
            ImportError: If scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "`DigitsDataModule` takes its images from scikit-learn, which is not installed. "
                "Install it with `pip install scikit-learn`."
            ) from error
        data = load_digits()
        grey = torch.from_numpy(data.images).float()[:, None] * (255 / 16)  # pixels are 0 … 16
        large = interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
        images = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        records = to_records(images.numpy(), data.target)
        labels = torch.from_numpy(data.target.astype(np.int64))
        train, test = stratified_split(labels, round(self.test_size * len(labels)), seed=0)
        return records[train.numpy()], records[test.numpy()]
