"""Training on the kept columns alone, once the masks are fixed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from reproduction.simpler import convolutions
from spp_lightning import ConvNet
from spp_lightning.compaction.epilogue import LRN_ALPHA, Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.method.groups import weight_of

__all__ = ["KeptColumns"]

NORM = PlaneOp("local_response_norm", (3, 3), alpha=LRN_ALPHA)
# What follows each convolution of ConvNet. Its max pool and its ReLU may change places.
EPILOGUES = {
    "conv1": (PlaneOp("max_pool", (3, 3), (2, 2), ceil_mode=True), NORM),
    "conv2": (PlaneOp("avg_pool", (3, 3), (2, 2), ceil_mode=True), NORM),
    "conv3": (PlaneOp("avg_pool", (3, 3), (2, 2), ceil_mode=True),),
}


class KeptColumns(Callback):
    """Computes a ConvNet's training steps on the package's CPU kernels once its masks are fixed.

    The parameters, the optimizer and the checkpoints stay those of the whole network: before every
    step the kept columns are copied into compact layers, and their gradients are copied back. The
    gradient of a pruned weight is 0, as with masks.

    Args:
        over: Whether the masks are fixed, asked before every step.
    """

    def __init__(self, over: Callable[[], bool]) -> None:
        self.over = over
        self.layers: dict[str, ColumnConv2d] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        assert isinstance(pl_module, ConvNet)
        if not self.over():
            return
        if not self.layers:
            self._begin(pl_module)
        with torch.no_grad():
            for name, layer in self.layers.items():
                weight = weight_of(pl_module.get_submodule(name))
                layer.weight.copy_(weight.flatten(1).index_select(1, layer.columns))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        for name, layer in self.layers.items():
            weight = weight_of(pl_module.get_submodule(name))
            assert layer.weight.grad is not None
            whole = torch.zeros(weight.flatten(1).shape)
            whole.index_copy_(1, layer.columns.long(), layer.weight.grad)
            gradient = whole.view(weight.shape)
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
            layer.weight.grad = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._end(pl_module)

    def on_exception(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._end(pl_module)

    def _begin(self, net: ConvNet) -> None:
        for name, conv in convolutions(copy.deepcopy(net)).items():  # a copy is without masks
            with torch.no_grad():
                conv.weight.copy_(convolutions(net)[name].weight)
            layer = ColumnConv2d.of(conv, Epilogue(Clamp(0.0), EPILOGUES[name]))
            layer.bias = net.get_parameter(f"{name}.bias")
            self.layers[name] = layer

        def forward(x: Tensor) -> Tensor:
            for layer in self.layers.values():
                x = layer(x)
            return net.ip1(x.flatten(1))

        net.forward = forward  # type: ignore[method-assign]

    def _end(self, net: LightningModule) -> None:
        if self.layers:
            self.layers = {}
            del net.forward
