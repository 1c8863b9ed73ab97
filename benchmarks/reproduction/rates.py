"""Learning rates, weight decay and batches that depend on the phase of a pruning run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from spp_lightning import ConvNet

__all__ = ["ClassifierDecay", "LastBatches", "PhaseRates"]


class PhaseRates(Callback):
    """Multiplies the learning rate by a factor while pruning, by another in retraining.

    Args:
        pruning: Factor until pruning is over.
        retraining: Factor from then until step ``until``.
        over: Whether pruning is over.
        until: Step from which the learning rate is the network's own again.
    """

    def __init__(
        self, pruning: float, retraining: float, over: Callable[[], bool], until: int
    ) -> None:
        self.pruning = pruning
        self.retraining = retraining
        self.over = over
        self.until = until
        self.factor = 1.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        factor = self.retraining if trainer.global_step < self.until else 1.0
        if not self.over():
            factor = self.pruning
        if factor != self.factor:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= factor / self.factor
            self.factor = factor

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self.factor = state_dict["factor"]


class ClassifierDecay(Callback):
    """Gives the weight of ConvNet's last layer a weight decay of its own."""

    def __init__(self, weight_decay: float) -> None:
        self.weight_decay = weight_decay

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        assert isinstance(pl_module, ConvNet)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if any(parameter is pl_module.ip1.weight for parameter in group["params"]):
                    group["weight_decay"] = self.weight_decay


class LastBatches(Callback):
    """Makes batches larger, by accumulating gradients, from a step on."""

    def __init__(self, factor: int, start: int) -> None:
        self.factor = factor
        self.start = start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        if trainer.global_step >= self.start:
            trainer.accumulate_grad_batches = self.factor
