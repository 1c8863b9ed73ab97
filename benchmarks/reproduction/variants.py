"""Variants of SPP that are measured, one cause at a time; callbacks beside SPPCallback.

Source: what the authors' published Caffe code does that the paper doesn't say; and growing
penalties in the place of masks: Wang et al., Structured pruning for efficient ConvNets via
incremental regularization, IJCNN 2019. Importance by Taylor expansion: Molchanov et al.,
Importance estimation for neural network pruning, CVPR 2019.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from spp_lightning import SPPCallback, SPPPruner
from spp_lightning.method.groups import Criterion, WeightGroups, weight_of

__all__ = ["Importance", "Penalize", "StraightThrough"]

TAYLOR_MEMORY = 0.95  # share of the mean before that stays at every step


class Variant(Callback):
    """A callback that acts on what SPPCallback prunes."""

    def __init__(self, pruning: SPPCallback) -> None:
        self.pruning = pruning

    @property
    def pruner(self) -> SPPPruner:
        """The pruner at work."""
        assert self.pruning.pruner is not None, "made in on_fit_start"
        return self.pruning.pruner


class StraightThrough(Variant):
    """Masks act in the forward pass only.

    The gradient of a layer's input goes through its whole weights. The gradient of masked weights
    is cut only once the layer has lost its first column.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        for name, layer in self.pruner.layers.items():
            assert isinstance(layer, nn.Conv2d)
            layer.forward = partial(  # type: ignore[method-assign]
                straight_through, self.pruner, name, layer
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._leave()

    def on_exception(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        for layer in self.pruner.layers.values():
            vars(layer).pop("forward", None)


def straight_through(pruner: SPPPruner, name: str, layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A masked convolution whose backward pass goes through whole weights.

    Args:
        pruner: Whose masks act.
        name: The layer's name.
        layer: The layer.
        x: Its input, ``(B, C, H, W)``.

    Returns:
        The layer's output, ``(B, N, H', W')``.
    """
    if not layer.training or pruner.finished:
        return type(layer).forward(layer, x)
    weight = weight_of(layer)
    mask = pruner.mask[name].view(1, *weight.shape[1:])
    cut = pruner.num_pruned[name] > 0
    y: Tensor = _MaskedForward.apply(x, weight, mask, layer.bias, cut, layer.stride, layer.padding)
    return y


class _MaskedForward(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor,
        cut: bool,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mask.clone())  # the next step's mask takes its place
        ctx.cut, ctx.stride, ctx.padding = cut, stride, padding
        return nn.functional.conv2d(x, weight * mask, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mask = ctx.saved_tensors
        dx, dw, db = torch.ops.aten.convolution_backward(
            *(grad, x, weight, [len(weight)], ctx.stride, ctx.padding, (1, 1)),
            *(False, (0, 0), 1, (*ctx.needs_input_grad[:2], True)),
        )
        return dx, dw * mask if ctx.cut else dw, None, db, None, None, None


@dataclass(frozen=True)
class _Scores(WeightGroups):
    """Weight groups with another importance.

    It is a running sum, over the filters that something reads; or a running mean of how much the
    loss would change without a group.
    """

    decay: float = 0.0
    score: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)

    def importance(self, weight: Tensor, criterion: Criterion = "l1") -> Tensor:
        if "taylor" in self.score:
            return self.score["taylor"]
        if "filters" in self.read:
            weight = weight.detach() * self.read["filters"].view(-1, 1, 1, 1)
        norm = super().importance(weight, criterion)
        if self.decay:
            norm = norm + self.decay * self.score.get("sum", torch.zeros_like(norm)).to(norm)
            self.score["sum"] = norm
        return norm


class Importance(Variant):
    """Another importance of columns, in a plain chain of convolutions. Stands before SPP.

    Args:
        pruning: What it acts on.
        decay: Share of the score before that is added to the norm of an update's weights.
        dead_filters: Whether a filter whose output the next layer doesn't read any more counts in
            the importance of its layer's columns.
        taylor: Whether the importance is ``|Σ weight · gradient|``, averaged over steps, in the
            place of the norm. The update before the first step goes by the norm.
    """

    def __init__(
        self, pruning: SPPCallback, decay: float, dead_filters: bool, taylor: bool = False
    ) -> None:
        super().__init__(pruning)
        self.decay = decay
        self.dead_filters = dead_filters
        self.taylor = taylor
        self._groups: dict[str, _Scores] = {}
        self._restored: dict[str, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        for layer in self.pruner._masked:  # no option of the package's: nobody else wants it
            groups = _Scores(tuple(weight_of(layer.module).shape), decay=self.decay)
            groups.score.update(self._restored.get(layer.name, {}))
            layer.groups = self._groups[layer.name] = groups
        self._look()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        self._look()
        if self.taylor and not self.pruner.finished:
            self._average()

    def _average(self) -> None:
        for name, layer in self.pruner.layers.items():
            weight, score = weight_of(layer), self._groups[name].score
            assert weight.grad is not None
            change = (weight.detach() * weight.grad).sum(0).abs().flatten()
            score["taylor"] = torch.lerp(score.get("taylor", change), change, 1 - TAYLOR_MEMORY)

    def _look(self) -> None:
        if self.dead_filters or self.pruner.finished:
            return
        layers = list(self.pruner.layers.items())
        for (name, _), (after, reader) in pairwise(layers):
            alive = self.pruner.probability[after].view(weight_of(reader).shape[1:]) < 1
            self._groups[name].read["filters"] = alive.any(2).any(1)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {name: dict(groups.score) for name, groups in self._groups.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self._restored = state_dict


class Penalize(Variant):
    """Penalties in the place of masks: a group decays by p, times a ceiling. Stands after SPP.

    p moves as ever, but nothing is masked before its p is 1. Until then p times ``ceiling`` is
    added to its weight decay.

    Args:
        pruning: What it acts on.
        ceiling: Weight decay of a group that is about to be pruned.
    """

    def __init__(self, pruning: SPPCallback, ceiling: float) -> None:
        super().__init__(pruning)
        self.ceiling = ceiling

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._unmask()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        self._unmask()

    def on_before_optimizer_step(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.pruner.finished:
            return
        for name, layer in self.pruner.layers.items():
            weight = weight_of(layer)
            assert weight.grad is not None
            p = self.pruner.probability[name].to(weight).view(1, *weight.shape[1:])
            weight.grad.addcmul_(weight.detach(), self.ceiling * p)

    def _unmask(self) -> None:
        for name, mask in self.pruner.mask.items():
            mask.copy_(self.pruner.probability[name] < 1)
