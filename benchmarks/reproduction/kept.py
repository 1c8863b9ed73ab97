"""Training on kept columns where a simpler method prunes them; SPPCallback does so by itself."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from reproduction.simpler import ColumnMasks, convolutions
from spp_lightning import kept_columns
from spp_lightning.compaction.layers.kept import Kernels
from spp_lightning.method.groups import WeightGroups
from spp_lightning.method.masks import is_masked, mask_layer, unmask_layer

__all__ = ["KeptColumns"]


class KeptColumns(Callback):
    """Computes the columns that :class:`ColumnMasks` keeps, and no others.

    The parameters, the optimizer and the checkpoints stay those of the whole network. The gradient
    of a pruned weight is 0. That changes nothing, since ColumnMasks zeroes the weight after each
    step.

    Args:
        pruning: What prunes; stands before this callback.
        kernels: As those of SPPCallback.
    """

    def __init__(self, pruning: ColumnMasks, kernels: Kernels = "auto") -> None:
        self.pruning = pruning
        self.make = kept_columns(kernels)
        self.masks: dict[str, Tensor] = {}  # of the layers that are masked

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        for name, layer in convolutions(pl_module).items():
            mask = self.pruning.masks[f"{name}.weight"]
            if mask is not self.masks.get(name):
                self._mask(layer, mask.flatten())
                self.masks[name] = mask

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._end(pl_module)

    def on_exception(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._end(pl_module)

    def _mask(self, layer: nn.Module, mask: Tensor) -> None:
        if is_masked(layer):
            unmask_layer(layer)
        groups = WeightGroups.of(layer)
        mask_layer(layer, groups, mask, mask, self.make(layer, groups))

    def _end(self, net: nn.Module) -> None:
        self.masks = {}
        for layer in convolutions(net).values():
            if is_masked(layer):
                unmask_layer(layer)
