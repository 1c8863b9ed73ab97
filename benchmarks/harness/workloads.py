"""Layers and networks that the benchmarks time, with random weights and randomly pruned columns."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from spp_lightning import ConvNet

__all__ = ["LAYERS", "NETWORKS", "POINTWISE", "RATIOS", "layer", "network", "prune_randomly"]

RATIOS = (0.0, 0.5, 0.75, 0.9)  # shares of pruned columns: 1, 2, 4 and 10 times fewer MACs
Shape = tuple[int, int, int, int]  # channels, filters, kernel size, image size
LAYERS: tuple[Shape, ...] = (  # VGG's and ResNets'
    *((64, 64, 3, 112), (256, 256, 3, 28), (512, 512, 3, 14)),
    *((64, 64, 3, 56), (128, 128, 3, 28), (256, 256, 3, 14)),
)
POINTWISE: tuple[Shape, ...] = (
    *((256, 64, 1, 56), (64, 256, 1, 56), (512, 128, 1, 28), (1024, 256, 1, 14)),
)
IMAGENET = (3, 224, 224)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ConvNet, batch 64": (ConvNet, (64, 3, 32, 32)),
    "ConvNet, batch 1": (ConvNet, (1, 3, 32, 32)),
    "ResNet-18, batch 1": (torchvision.models.resnet18, (1, *IMAGENET)),
    "ResNet-50, batch 1": (torchvision.models.resnet50, (1, *IMAGENET)),
    "ResNet-50, batch 8": (torchvision.models.resnet50, (8, *IMAGENET)),
    "VGG-16 convolutions, batch 1": (lambda: torchvision.models.vgg16().features, (1, *IMAGENET)),
}


def layer(shape: Shape, batch: int) -> tuple[str, nn.Conv2d, Tensor]:
    """A layer's name, the layer, and an input; the same every time."""
    channels, filters, kernel, size = shape
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, filters, kernel, padding=kernel // 2)
    name = f"{kernel}×{kernel} {channels}→{filters} @{size}, batch {batch}"
    return name, conv, torch.randn(batch, channels, size, size)


def network(name: str) -> tuple[nn.Module, Tensor]:
    """One of NETWORKS and an input; the same every time."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    # Pixels of a ConvNet are minus their mean, but not scaled.
    return net, torch.randn(shape) * (50 if isinstance(net, ConvNet) else 1)


def prune_randomly(net: nn.Module, ratio: float) -> nn.Module:
    """A copy with ``ratio`` of every convolution's columns 0, but for depthwise ones."""
    pruned = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    for module in pruned.modules():
        if isinstance(module, nn.Conv2d) and not 1 < module.groups == module.in_channels:
            matrix = module.weight.data.flatten(1)
            count = matrix.shape[1]
            out = torch.randperm(count, generator=generator)[: round(ratio * count)]
            module.weight.data.copy_(matrix.index_fill(1, out, 0).view(module.weight.shape))
    return pruned
