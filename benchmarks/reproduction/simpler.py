"""Simpler pruning methods that SPP is compared with, as callbacks with fixed masks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

__all__ = ["ColumnMasks", "FilterMasks", "MagnitudeMasks", "Masks", "filters_to_keep"]


def convolutions(net: nn.Module) -> dict[str, nn.Conv2d]:
    """A network's convolutions by name, in order."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}


class Masks(Callback, ABC):
    """Sets pruned weights to 0 after every optimizer step.

    Prunes at once, or by a cubic schedule: after a share x of the updates the masks have reached
    the share ``1 − (1 − x)³`` of the target.

    Args:
        speedup: Factor by which the MACs are to fall.
        updates: Number of updates of the masks. The first comes before the first step.
        interval: Steps between two updates.

    Source of the cubic schedule: Zhu, Gupta: To prune, or not to prune, arXiv 1710.01878.
    """

    def __init__(self, speedup: float, updates: int = 1, interval: int = 1) -> None:
        self.speedup = speedup
        self.updates = updates
        self.interval = interval
        self.done = 0
        self.masks: dict[str, Tensor] = {}

    @abstractmethod
    def choose(self, net: nn.Module, share: float) -> dict[str, Tensor]:
        """Masks by parameter name, True = kept, at a share in [0, 1] of the target."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._grow(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        self._grow(trainer, pl_module)

    def _grow(self, trainer: Trainer, net: LightningModule) -> None:
        step = trainer.global_step
        if self.done < self.updates and step >= self.done * self.interval:
            self.done += 1
            share = 1 - (1 - self.done / self.updates) ** 3
            with torch.no_grad():
                self.masks = self.choose(net, share)
        parameters = dict(net.named_parameters())  # of masked layers, too
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.masks[name] = mask.to(net.device)  # loaded masks are on the CPU
                parameters[name].mul_(self.masks[name])

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"done": self.done, "masks": self.masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self.done, self.masks = state_dict["done"], state_dict["masks"]


class ColumnMasks(Masks):
    """Prunes the columns of smallest L1 norm, the same share of every layer."""

    def choose(self, net: nn.Module, share: float) -> dict[str, Tensor]:  # noqa: D102
        masks = {}
        for name, layer in convolutions(net).items():
            norms = layer.weight.abs().sum(0)
            pruned = math.ceil(share * (1 - 1 / self.speedup) * norms.numel() - 1e-9)
            masks[f"{name}.weight"] = _all_but_smallest(norms, pruned)
        return masks


class MagnitudeMasks(Masks):
    """Prunes the single weights of smallest magnitude, the same share of every layer.

    Source: Han, Pool, Tran, Dally: Learning both weights and connections, NIPS 2015.
    """

    def choose(self, net: nn.Module, share: float) -> dict[str, Tensor]:  # noqa: D102
        masks = {}
        for name, layer in convolutions(net).items():
            pruned = math.ceil(share * (1 - 1 / self.speedup) * layer.weight.numel() - 1e-9)
            masks[f"{name}.weight"] = _all_but_smallest(layer.weight.abs(), pruned)
        return masks


class FilterMasks(Masks):
    """Prunes the filters of smallest L1 norm, and the next layer's channels that read them.

    For convolutions in a row. :func:`filters_to_keep` gives the numbers of filters.

    Source: Li, Kadav, Durdanovic, Samet, Graf: Pruning filters for efficient ConvNets, ICLR 2017.
    """

    def __init__(self, speedup: float, positions: tuple[int, ...]) -> None:
        super().__init__(speedup)
        self.positions = positions

    def choose(self, net: nn.Module, share: float) -> dict[str, Tensor]:  # noqa: D102
        layers = convolutions(net)
        shapes = [tuple(layer.weight.shape) for layer in layers.values()]
        keep = filters_to_keep(shapes, self.positions, self.speedup)
        masks = {}
        channels: Tensor | None = None  # outputs of the layer before, True = kept
        for (name, layer), kept in zip(layers.items(), keep, strict=True):
            filters = _all_but_smallest(layer.weight.abs().sum((1, 2, 3)), len(layer.weight) - kept)
            mask = filters[:, None, None, None].expand_as(layer.weight)
            masks[f"{name}.weight"] = mask if channels is None else mask & channels[:, None, None]
            masks[f"{name}.bias"] = channels = filters
        return masks


def filters_to_keep(
    shapes: list[tuple[int, ...]], positions: tuple[int, ...], speedup: float
) -> tuple[int, ...]:
    """Number of filters that each convolution in a row keeps for a speedup: one share for all.

    Args:
        shapes: Shapes of the weights, ``(N, C, kh, kw)``; C is the N of the layer before.
        positions: Output positions of each layer.
        speedup: Factor by which the MACs are to fall.

    Returns:
        The largest numbers whose MACs don't exceed the target.

    >>> filters_to_keep([(8, 3, 1, 1), (8, 8, 1, 1)], (4, 4), speedup=2)
    (5, 5)
    """
    dense = sum(math.prod(shape) * places for shape, places in zip(shapes, positions, strict=True))
    best = tuple(1 for _ in shapes)
    for step in range(1, 1001):
        keep = tuple(max(1, round(shape[0] * step / 1000)) for shape in shapes)
        inputs = (shapes[0][1], *keep[:-1])
        macs = sum(
            n * c * math.prod(shape[2:]) * places
            for n, c, shape, places in zip(keep, inputs, shapes, positions, strict=True)
        )
        if macs * speedup <= dense:
            best = keep
    return best


def _all_but_smallest(values: Tensor, count: int) -> Tensor:
    """A mask of the shape of ``values``: False for the ``count`` smallest, ties by position."""
    mask = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
    mask[values.flatten().argsort(stable=True)[:count]] = False
    return mask.view(values.shape)
