"""Networks for CIFAR-10 that benchmarks train for a short while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning import CIFAR10DataModule, ConvNet

__all__ = ["CLASSIFIERS", "ResNet20", "data_for"]


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut.

    Where the shapes differ, the shortcut subsamples and pads with zeros, or is a 1×1 convolution.
    """

    def __init__(self, channels: int, filters: int, stride: int, projects: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.stride, self.more = stride, filters - channels
        self.shortcut: nn.Module | None = None
        if projects and stride > 1:
            convolution = nn.Conv2d(channels, filters, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(x + y)


class ResNet20(LightningModule):
    """The network of 20 layers for CIFAR-10 of He et al., 2016.

    Args:
        lr: Learning rate at the beginning. It falls to a fiftieth in a straight line.
        steps: In so many steps.
        width: Factor of the numbers of channels.
        projects: Whether shortcuts between two sizes are 1×1 convolutions.
        weight_decay: Weight decay of all parameters.
    """

    def __init__(
        self,
        lr: float = 0.1,
        steps: int = 2000,
        width: float = 1.0,
        projects: bool = False,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        self.steps: int = steps
        a, b, c = (round(width * channels) for channels in (16, 32, 64))
        sizes = [(a, a, 1)] * 3 + [(a, b, 2)] + [(b, b, 1)] * 2 + [(b, c, 2)] + [(c, c, 1)] * 2
        self.conv = nn.Conv2d(3, a, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(a)
        self.blocks = nn.Sequential(*(Block(*size, projects) for size in sizes))
        self.head = nn.Linear(c, 10)
        self.example_input_array = torch.zeros(1, 3, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, ``(B, 10)``."""
        return self.head(self.blocks(F.relu(self.norm(self.conv(x)))).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: D102
        right = self(batch[0]).argmax(1) == batch[1]
        self.log("val_acc", right.float().mean(), batch_size=len(right))

    def configure_optimizers(self) -> Any:  # noqa: D102
        optimizer = torch.optim.SGD(self.parameters(), self.lr, 0.9, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _convnet(steps: int) -> LightningModule:
    return ConvNet(milestones=(steps * 6 // 7, steps * 13 // 14))


# A network to be trained for so many steps, by name.
CLASSIFIERS: dict[str, Callable[[int], LightningModule]] = {
    "convnet": _convnet,
    "resnet20": lambda steps: ResNet20(steps=steps),
}


def data_for(name: str, folder: Any) -> CIFAR10DataModule:
    """CIFAR-10 as a network of ``CLASSIFIERS`` expects it."""
    if name == "convnet":
        return CIFAR10DataModule(folder)
    return CIFAR10DataModule(folder, 128, "mean_std", flip=True, crop_padding=4)
