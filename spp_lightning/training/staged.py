"""StagedSPPCallback: prunes in stages for as long as a metric holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from spp_lightning.method.arguments import takes_settings
from spp_lightning.planning.plan import Plan
from spp_lightning.planning.table import short_count, text_table
from spp_lightning.training.callback import SPPCallback
from spp_lightning.training.settings import StagedSettings
from spp_lightning.training.targets import solved_plans

__all__ = ["StagedSPPCallback"]

_HELD_STAGE = "held_stage"


@dataclass(frozen=True)
class _Held:
    """The last stage that held: what brings the network back to it."""

    stage: int
    weights: dict[str, Tensor]
    pruner: dict[str, Any]


class StagedSPPCallback(SPPCallback):
    """Finds the fastest network that loses at most ``max_drop`` of a metric, in one fit.

    Each stage prunes further, by ``stages``, then retrains. A stage has held once a validation
    behind its last pruned group shows the metric within ``max_drop`` of the unpruned network's;
    then the next one begins. A stage that has not held after ``patience`` validations has failed.
    The fit ends there, or after the last stage, with the network as it was when the last stage
    held. If the Trainer stops first, the network goes back to that stage, too.

    Two metrics tell checkpoints and early stopping what to look at. They are in the Trainer's
    callback metrics, and the loggers get them:

    - ``pruned_MONITOR``, such as ``pruned_val_acc``: the metric of a stage that is pruned to its
      end. It is absent while nothing is pruned and while a stage prunes.
    - ``held_stage``: number of the stage that has held, from 1. It is present only in the
      validation in which the stage has held.

    ``ModelCheckpoint(monitor="held_stage", mode="max")`` saves each stage that has held and keeps
    the last one. A ``ModelCheckpoint`` that monitors one of the two saves nothing while it is
    absent: its best checkpoint is never an unpruned network. Give ``EarlyStopping`` of such a
    metric ``strict=False``. To resume, save with another ``ModelCheckpoint``: the state of this
    callback holds the weights of the last stage that held, beside the checkpoint's own.

    The ratios of all stages are solved at the start of the fit, as a target is by
    :class:`~spp_lightning.SPPCallback`, of which this class has all else.

    Args:
        settings: The fields of :class:`~spp_lightning.training.settings.StagedSettings`, each as an
            argument: ``monitor``, ``max_drop``, ``mode``, ``stages``, ``patience``, ``baseline``,
            and those of :class:`~spp_lightning.SPPCallback`.

    Attributes:
        plans: The plan of each stage, the first one that of stage 1.
        stage: Number of the current stage; 0 is the unpruned network.
        baseline: The metric of the unpruned network; None until it is known.
        values: The metric with which each stage was judged last, by stage.

    Raises:
        ValueError: As by :class:`~spp_lightning.SPPCallback`. At the start of the fit if there is
            no validation. At the end of the first validation, which is the sanity check before the
            first step, if it doesn't log ``monitor``.

    >>> from lightning.pytorch import Trainer
    >>> pruning = StagedSPPCallback(monitor="val_acc", max_drop=0.005, of="network")
    >>> trainer = Trainer(callbacks=[pruning], logger=False)
    """

    settings: StagedSettings

    @takes_settings(StagedSettings)
    def __init__(self, settings: StagedSettings) -> None:
        self._begin(settings)
        self.plans: list[Plan] = []
        self.stage = 0
        self.baseline: float | None = None
        self.values: dict[int, float] = {}
        self._tries = 0  # validations of the current stage that did not hold
        self._held: _Held | None = None
        self._saved_at: dict[int, int] = {}  # steps of the last saving of what is held back
        self._over = False  # whether a stage has failed, or the last one has held

    # -- beginning and end ---------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not trainer.enable_validation:
            raise ValueError(
                f"`monitor` (={self.settings.monitor!r}) must be logged in validation, but the"
                " Trainer runs none: the module has no validation_step, or there is no validation"
                " data."
            )
        if self.baseline is None and self.settings.baseline is not None:
            self._hold(pl_module)
            self.baseline = self.settings.baseline
            self._enter(pl_module, 1)
        super().on_train_start(trainer, pl_module)
        if self._over:
            rank_zero_info(f"SPP has ended with stage {self.stage}; the fit only retrains.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not self._over:
            self._go_back(pl_module)
            rank_zero_warn(
                "Training ended before SPP knew how far it can prune; the network is as it was when"
                f" stage {self.stage} held. To go on, fit longer from the last checkpoint:"
                " trainer.fit(…, ckpt_path=…)."
            )
        super().on_train_end(trainer, pl_module)
        rank_zero_info(f"SPP ends with stage {self.stage}:\n{self.table()}")

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        super().on_train_batch_end(trainer, *args, **kwargs)
        self._hold_checkpoints_back(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._hold_checkpoints_back(trainer)

    # -- judging -------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if trainer.state.fn != TrainerFn.FITTING:
            return
        monitor, metrics = self.settings.monitor, trainer.callback_metrics
        if monitor not in metrics:
            logged = ", ".join(sorted(metrics)) or "none"
            raise ValueError(
                f"`monitor` must be a metric that the module logs in validation, got {monitor!r};"
                f" metrics logged: {logged}."
            )
        if trainer.sanity_checking:
            return
        for name in self._own_metrics:
            metrics.pop(name, None)
        # Ranks may have seen other images, but must agree.
        value = float(trainer.strategy.broadcast(float(metrics[monitor])))
        if not self._over:
            self._judge(trainer, pl_module, value)
        self._hold_checkpoints_back(trainer)

    def _judge(self, trainer: Trainer, pl_module: LightningModule, value: float) -> None:
        """Go on to the next stage, retrain longer, or end."""
        if self.baseline is None:
            self.baseline = value
            self._hold(pl_module)
            rank_zero_info(f"SPP: {self.settings.monitor} of the unpruned network is {value:.6g}.")
            self._enter(pl_module, 1)
            return
        if not self._active_pruner.finished:
            return
        self.values[self.stage] = value
        self._log(trainer, f"pruned_{self.settings.monitor}", value)
        if self.settings.holds(value, self.baseline):
            rank_zero_info(f"SPP: stage {self.stage} holds, {self._told(value)}.")
            self._log(trainer, _HELD_STAGE, self.stage)
            self._hold(pl_module)
            if self.stage < len(self.plans):
                self._enter(pl_module, self.stage + 1)
                return
            self._over = True
        else:
            self._tries += 1
            if self._tries < self.settings.patience:
                return
            rank_zero_info(f"SPP: stage {self.stage} has failed, {self._told(value)}.")
            self._over = True
            self._go_back(pl_module)
            trainer.callback_metrics.pop(f"pruned_{self.settings.monitor}")  # of what is gone now
        trainer.should_stop = True

    def _told(self, value: float) -> str:
        return f"{self.settings.monitor} {value:.6g} of {self.baseline:.6g} unpruned"

    @property
    def _own_metrics(self) -> tuple[str, str]:
        return f"pruned_{self.settings.monitor}", _HELD_STAGE

    def _log(self, trainer: Trainer, name: str, value: float) -> None:
        # `self.log` isn't allowed in on_validation_end, and before that the metric isn't there.
        trainer.callback_metrics[name] = torch.tensor(float(value))
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({name: float(value)}, trainer.global_step)

    def _hold_checkpoints_back(self, trainer: Trainer) -> None:
        """Let no ModelCheckpoint save that monitors a metric of this class which is absent."""
        for saving in trainer.checkpoint_callbacks:
            if not isinstance(saving, ModelCheckpoint) or saving.monitor not in self._own_metrics:
                continue
            # It saves at most once per step, and remembers at which step it did.
            if saving.monitor not in trainer.callback_metrics:
                self._saved_at.setdefault(id(saving), saving._last_global_step_saved)
                saving._last_global_step_saved = trainer.global_step
            elif id(saving) in self._saved_at:
                saving._last_global_step_saved = self._saved_at.pop(id(saving))

    # -- stages --------------------------------------------------------------------------------

    def table(self) -> str:
        """The stages so far: what each was to reach, and what the metric was."""
        rows = []
        for stage, plan in enumerate([_unpruned(self.plans[0]), *self.plans] if self.plans else []):
            value = self.baseline if stage == 0 else self.values.get(stage)
            held = value is not None and self.settings.holds(value, self.baseline or 0.0)
            rows.append(
                [
                    str(stage),
                    "" if stage == 0 else plan.target,
                    short_count(plan.macs),
                    "-" if plan.ms is None else f"{plan.ms:.3f}",
                    "-" if value is None else f"{value:.6g}",
                    "-" if value is None else ("yes" if held else "no"),
                ]
            )
        head = ["stage", "target", "MACs", "ms", self.settings.monitor, "holds"]
        return text_table(head, rows, left=2)

    def _enter(self, pl_module: LightningModule, stage: int) -> None:
        """Begin a stage, with what is pruned already."""
        # Updates begin behind this step, also if a run is resumed here.
        state = self._active_pruner.state_dict() | {"last_update": self._step}
        self._set_stage(pl_module, stage, state)

    def _hold(self, pl_module: LightningModule) -> None:
        """Note the current stage as the last one that held."""
        weights = {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in pl_module.state_dict().items()
        }
        self._held = _Held(self.stage, weights, self._active_pruner.state_dict())

    def _go_back(self, pl_module: LightningModule) -> None:
        """Bring the network back to the last stage that held."""
        if self._held is not None and self._held.stage != self.stage:
            self._active_pruner.fold()
            pl_module.load_state_dict(self._held.weights)
            self._set_stage(pl_module, self._held.stage, self._held.pruner)

    def _set_stage(
        self, pl_module: LightningModule, stage: int, pruner_state: dict[str, Any]
    ) -> None:
        self.stage, self._tries = stage, 0
        self.plan = self._plan_of(stage)
        self._active_pruner.fold()
        self.pruner = self._new_pruner(pl_module)
        settings = self.pruner.settings.as_dict()
        self.pruner.load_state_dict({**pruner_state, "settings": settings})

    def _plan_of(self, stage: int) -> Plan:
        return self.plans[stage - 1] if stage else _unpruned(self.plans[0])

    @property
    def _solved(self) -> Plan | None:
        return self.plan

    def _planned(self, trainer: Trainer, pl_module: LightningModule) -> Plan:
        if self._restored is None:
            targets = [self.settings.target_at(float(x)) for x in self.settings.stages]
            self.plans = solved_plans(trainer, pl_module, self.settings, targets)
            self.stage, self._tries, self._over = 0, 0, False
            self.baseline, self._held, self.values = None, None, {}
        else:
            self._restore(self._restored)
        return self._plan_of(self.stage)

    def _announce(self, trainer: Trainer, pruner: Any) -> None:
        rank_zero_info(
            f"SPP prunes {pruner.settings.granularity}s in {len(self.plans)} stages, for as long as"
            f" {self.settings.monitor} loses at most {self.settings.max_drop:g}; it is at stage"
            f" {self.stage}:\n{self.table()}"
        )

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state: that of the pruning, the stages, and the weights of the last that held."""
        stages = {
            "arguments": self._arguments(),
            "plans": [plan.as_dict() for plan in self.plans],
            "stage": self.stage,
            "baseline": self.baseline,
            "values": dict(self.values),
            "tries": self._tries,
            "over": self._over,
            "held": None if self._held is None else vars(self._held),
        }
        return {**super().state_dict(), "stages": stages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state: at once if a fit has begun, else at the start of the next fit.

        Raises:
            ValueError: If the state is of other layers or other settings.
        """
        if "stages" not in state_dict:
            raise ValueError("The state of StagedSPPCallback lacks stages.")
        if self._fitting and state_dict["pruner"] is not None and self.pruner is not None:
            self._restore(state_dict)
            module = self.pruner.model
            assert isinstance(module, LightningModule)
            self._set_stage(module, self.stage, state_dict["pruner"])
            self._tries = state_dict["stages"]["tries"]
        super().load_state_dict(state_dict)

    def _restore(self, state: dict[str, Any]) -> None:
        stages = state["stages"]
        saved, now = stages["arguments"], self._arguments()
        different = [
            f"{name} was {saved.get(name)!r} and is {now[name]!r}"
            for name in now
            if saved.get(name) != now[name]
        ]
        if different:
            raise ValueError(
                f"The state must be of a run with these settings, but {'; '.join(different)}."
            )
        self.plans = [Plan.from_dict(plan) for plan in stages["plans"]]
        self.stage, self.baseline = stages["stage"], stages["baseline"]
        self.values, self._tries = dict(stages["values"]), stages["tries"]
        self._over = stages["over"]
        self._held = None if stages["held"] is None else _Held(**stages["held"])

    def _arguments(self) -> dict[str, Any]:
        s = self.settings
        return {
            "monitor": s.monitor,
            "max_drop": float(s.max_drop),
            "mode": s.mode,
            "stages": [float(x) for x in s.stages],
            "of": s.of,
            "patience": int(s.patience),
        }


def _unpruned(plan: Plan) -> Plan:
    """The plan of stage 0, of the layers of another plan."""
    layers = tuple(replace(layer, pruned=0, kept_dense=None) for layer in plan.layers)
    return replace(plan, target="unpruned", layers=layers, macs=plan.dense_macs, ms=plan.dense_ms)
