"""DistillationCallback: a teacher's answers become a part of the loss of any LightningModule."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

__all__ = ["DistillationCallback", "distillation_loss"]


def distillation_loss(scores: Tensor, answers: Tensor, temperature: float = 4.0) -> Tensor:
    """How far class scores are from a teacher's.

    Args:
        scores: Scores before the softmax, ``(B, classes, ...)``.
        answers: The teacher's, of the same shape.
        temperature: Divides both scores. Above 1, classes that the teacher holds for unlikely
            count more.

    Raises:
        ValueError: If the two aren't of the same shape.

    Returns:
        The Kullback-Leibler divergence from the teacher's probabilities, per image, times
        ``temperature²``: of the size of a cross-entropy at any temperature. A scalar.

    >>> scores = torch.tensor([[0.0, 0.0]])
    >>> distillation_loss(scores, scores).item()
    0.0
    """
    if scores.shape != answers.shape:
        raise ValueError(
            f"`answers` must have the shape of `scores`, {tuple(scores.shape)}, got"
            f" {tuple(answers.shape)}."
        )
    ours, theirs = (F.log_softmax(x.float() / temperature, 1) for x in (scores, answers))
    divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


class DistillationCallback(Callback):
    """Trains a network to give a teacher's answers, besides what its ``training_step`` asks.

    The loss of a step becomes ``(1 − share) · loss + share · distillation_loss(...)``. The module
    and its ``training_step`` stay as they are: the callback sees what the network is given and what
    it returns in a training step, and asks the teacher the same.

    Args:
        teacher: Takes what the network takes and returns class scores. It is put into evaluation
            mode, and its parameters are frozen. None: the network as it is when the fit begins,
            which is the unpruned one when SPP prunes. That copy is part of the callback's state in
            checkpoints, so a resumed run has the same teacher.
        share: Weight of the teacher in the loss, in [0, 1].
        temperature: Temperature of the softmax, above 0.
        module: Name of the submodule whose outputs are the class scores; ``""`` is the
            LightningModule itself, called as ``self(x)`` in its ``training_step``.

    Raises:
        ValueError: If ``share`` or ``temperature`` is out of range; at the start of the fit, if
            there is no such ``module`` or the optimization is manual; in the first step, if
            ``training_step`` doesn't call it or it doesn't return a tensor.

    Source: Hinton, Vinyals, Dean, Distilling the knowledge in a neural network, 2015.

    >>> DistillationCallback(share=1.5)
    Traceback (most recent call last):
        ...
    ValueError: `share` must be in [0, 1], got 1.5.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        share: float = 0.7,
        temperature: float = 4.0,
        module: str = "",
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"`share` must be in [0, 1], got {share!r}.")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature!r}.")
        self.teacher, self.share, self.temperature = teacher, share, temperature
        self.module = module
        self._is_copy = teacher is None
        self._saved: dict[str, Any] | None = None  # the copy's parameters, from a checkpoint
        self._calls: list[tuple[Any, Any, Any]] | None = None  # of the network, in a training step
        self._hook: RemovableHandle | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not pl_module.automatic_optimization:
            raise ValueError(
                "DistillationCallback changes the loss that `training_step` returns, but this"
                " module has `automatic_optimization=False`. Add `distillation_loss` to the loss"
                " in your `training_step` instead."
            )
        student = self._student(pl_module)
        if self._is_copy and (self.teacher is None or self._saved is not None):
            self.teacher = copy.deepcopy(student)
            if self._saved is not None:
                self.teacher.load_state_dict(self._saved)
                self._saved = None
        assert self.teacher is not None
        self.teacher.eval().requires_grad_(False).to(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._hook = self._student(pl_module).register_forward_hook(self._note, with_kwargs=True)
        step = pl_module.training_step

        @functools.wraps(step)
        def distilled(*args: Any, **kwargs: Any) -> Any:
            self._calls = []
            try:
                return self._with_answers(step(*args, **kwargs), self._calls)
            finally:
                self._calls = None

        vars(pl_module)["training_step"] = distilled

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._leave(pl_module)

    def on_exception(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._leave(pl_module)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        if not self._is_copy or self.teacher is None:
            return {}
        return {"teacher": self.teacher.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self._saved = state_dict.get("teacher")

    def _student(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            known = ", ".join(repr(name) for name, _ in pl_module.named_children())
            raise ValueError(
                f"`module` must name a submodule of the network, got {self.module!r}; its children"
                f" are {known}."
            ) from None

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._calls is not None:
            self._calls.append((args, kwargs, output))

    def _with_answers(self, output: Any, calls: list[tuple[Any, Any, Any]]) -> Any:
        """What ``training_step`` returned, with the teacher's share in its loss."""
        if output is None:  # the step is skipped
            return None
        if not calls:
            raise ValueError(
                f"`module` (={self.module!r}) must be what `training_step` calls to get class"
                " scores, but `training_step` didn't call it."
            )
        distances = []
        assert self.teacher is not None
        for args, kwargs, scores in calls:
            if not isinstance(scores, Tensor):
                raise ValueError(
                    f"`module` (={self.module!r}) must return a tensor of class scores, got"
                    f" {type(scores).__name__}."
                )
            with torch.no_grad():
                answers = self.teacher(*args, **kwargs)
            distances.append(distillation_loss(scores, answers, self.temperature))
        distance = sum(distances) / len(distances)
        is_dict = isinstance(output, dict)
        loss = output["loss"] if is_dict else output
        total = (1 - self.share) * loss + self.share * distance
        return {**output, "loss": total} if is_dict else total

    def _leave(self, pl_module: LightningModule) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            vars(pl_module).pop("training_step", None)
