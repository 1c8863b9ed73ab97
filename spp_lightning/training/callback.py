"""SPPCallback: prunes the network that a Lightning Trainer trains."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from spp_lightning.compaction.layers.kept import kept_columns
from spp_lightning.method.arguments import takes_settings
from spp_lightning.method.pruner import SPPPruner
from spp_lightning.planning.plan import Plan
from spp_lightning.planning.table import short_count, text_table
from spp_lightning.training.settings import TrainingSettings
from spp_lightning.training.targets import given_plan, report_end, shape_of_inputs, solved_plans
from spp_lightning.training.tensorboard import log_layout, log_update

__all__ = ["SPPCallback"]


class SPPCallback(Callback):
    """Prunes a trained network's convolutions by SPP while a Trainer trains it on.

    Add it to a Trainer and fit. It prunes until exactly the target share of every layer's weight
    groups is pruned; the rest of the fit retrains the network. At the end of the fit pruned weights
    are exactly 0, and the network is a plain one. If it trains on without the callback, pruned
    weights grow back.

    At all times ``state_dict`` is that of the unpruned network, and so are checkpoints. They also
    hold the state of the pruning: a run resumed by ``fit(ckpt_path=…)`` ends as if it had never
    stopped, given the batches that the uninterrupted run would have seen. Another fit of the same
    module goes on where the last one ended; another module is pruned from the start.

    A target of the whole network (``speedup=3, of="network"``, ``of="latency"``, ``macs`` or
    ``latency_ms``) is solved into a ratio per layer at the start of the fit, as by
    :func:`~spp_lightning.plan`, with the loss of ``training_step`` on two batches. Rank 0 solves.
    The ratios are part of the state: a resumed run keeps them.

    A step is a batch after which an optimizer has stepped: with gradient accumulation one step,
    not one micro-batch. Validation while pruning uses the expected mask, weights times 1 − p.

    The sparsity is in the progress bar and in the Trainer's metrics as ``sparsity``. At every
    update the Trainer's loggers get sparsity, recovered groups and MACs; TensorBoard also gets
    histograms of p and a chart of all layers.

    Args:
        settings: The fields of :class:`~spp_lightning.method.settings.SPPSettings`, each as an
            argument: ``prune_ratio``, ``speedup``, ``granularity``, ``criterion``, ``use_rank``,
            ``interval``, ``A``, ``u``, ``crossing``, ``recovery``, ``masking``, ``layers``,
            ``start_step``, ``seed``, ``input_shape``; and those of
            :class:`~spp_lightning.planning.target.TargetSettings`: ``of``, ``macs``,
            ``latency_ms``, ``device``, ``threads``; and ``kernels``, what computes
            the pruned layers in training. ``"auto"``: on CPUs the kernels that read only the
            columns that the mask keeps, wherever the cost model says that a step is faster so;
            ``"compact"``: those kernels wherever they can; ``"dense"``: never.

    Attributes:
        settings: The checked settings.
        plan: The ratio of each layer, MACs and latency of the last fit; ``None`` before the first,
            or if there is no target and nothing tells the shape of the inputs.
        pruner: The :class:`~spp_lightning.SPPPruner` of the last fit; ``None`` before the first.

    Raises:
        ValueError: At once if a setting is out of range. At the start of a fit if a pattern matches
            no layer, the strategy shards weights, a checkpoint is of other layers or settings, or
            a target cannot be reached.
            At an update if a weight is not finite.

    Source: Wang et al., BMVC 2018.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[SPPCallback(speedup=4)], logger=False)
    """

    @takes_settings(TrainingSettings)
    def __init__(self, settings: TrainingSettings) -> None:
        self._begin(settings)

    def _begin(self, settings: TrainingSettings) -> None:
        self.settings = settings
        self.pruner: SPPPruner | None = None
        self.plan: Plan | None = None
        self._input_shape = settings.input_shape
        self._restored: dict[str, Any] | None = None
        self._fitting = False
        self._step = 0  # optimizer steps that pruning has counted, over all fits
        self._global_step = 0  # the Trainer's count at the last batch
        self._show_sparsity = False

    # -- beginning and end ---------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        sharding = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
        if stage == "fit" and isinstance(trainer.strategy, sharding):
            raise ValueError(
                "`strategy` must keep whole weights on every device for SPPCallback to prune them,"
                f" got {type(trainer.strategy).__name__}, which shards them; use 'ddp'."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        # By now the network is on its device, and a checkpoint's state is loaded.
        if self.pruner is None or self.pruner.model is not pl_module:
            self._input_shape = shape_of_inputs(trainer, pl_module, self.settings)
            self.plan = self._planned(trainer, pl_module)
            self.pruner = self._new_pruner(pl_module)
            self._step = 0
        self._fitting = True
        if self._restored is not None:
            self.load_state_dict(self._restored)
            self._restored = None
        self._active_pruner.attach()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        pruner = self._active_pruner
        self._global_step = trainer.global_step
        self._show_sparsity = True
        for saving in trainer.checkpoint_callbacks:
            # After a resume ModelCheckpoint does not know what it saved last. With gradient
            # accumulation it would save at once, in the middle of a step, without the gradients.
            if isinstance(saving, ModelCheckpoint) and trainer.global_step:
                saving._last_global_step_saved = trainer.global_step
        self._announce(trainer, pruner)
        log_layout(trainer.loggers)
        if pruner.step(self._step, *trainer.optimizers):
            self._after_update(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        pruner = self._active_pruner
        if not pruner.finished:
            there = "; ".join(
                f"{name} {pruner.num_pruned[name]} of {target}"
                for name, target in pruner.num_target.items()
            )
            rank_zero_warn(
                f"Training ended before SPP reached its target: after {self._step} steps and"
                f" {pruner.num_updates} updates {pruner.total_sparsity:.1%} of the"
                f" {pruner.settings.granularity}s are pruned ({there}). To go on, fit longer from"
                " the last checkpoint: trainer.fit(…, ckpt_path=…)."
            )
        pruner.fold(*trainer.optimizers)
        if self.plan is not None and self.plan.ms is not None:
            report_end(trainer, pl_module, self.settings, self.plan, pruner)
        elif pruner.settings.granularity == "coupled-channel":
            dense, now = (sum(column) for column in zip(*pruner.macs.values(), strict=True))
            rank_zero_info(f"SPP ends with {short_count(now)} of {short_count(dense)} MACs.")

    def on_exception(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._leave(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._restored = None  # of a fit that never began, or of a checkpoint that was tested
        if stage == "fit":
            self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        """Leave a plain network, however the fit ends. The state stays for saving and resuming."""
        self._fitting = False
        if self.pruner is not None:
            self.pruner.fold(*trainer.optimizers)

    # -- every step ----------------------------------------------------------------------------

    def on_train_batch_end(  # noqa: D102
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            self._step += 1
            pruner = self._active_pruner
            if pruner.step(self._step, *trainer.optimizers):
                self._after_update(trainer)
                self._show_sparsity = True
                if pruner.finished:
                    rank_zero_info(
                        f"SPP has reached its target after {self._step} steps and"
                        f" {pruner.num_updates} updates; retraining begins."
                    )
        if self._show_sparsity and not trainer.barebones:
            sparsity = self._active_pruner.total_sparsity
            pl_module.log("sparsity", sparsity, prog_bar=True, logger=False, on_step=True)
            self._show_sparsity = False

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of the pruning: a plain dict, for ``torch.load(weights_only=True)``."""
        state = None if self.pruner is None else self.pruner.state_dict()
        plan = None if self._solved is None else self._solved.as_dict()
        return {"step": self._step, "pruner": state, "plan": plan}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state: at once if a fit has begun, else at the start of the next fit.

        Raises:
            ValueError: If the state is of other layers or other settings.
        """
        missing = {"step", "pruner", "plan"} - state_dict.keys()
        if missing:
            raise ValueError(f"The state of SPPCallback lacks {', '.join(sorted(missing))}.")
        step = state_dict["step"]
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"The state's step must be a whole number, got {step!r}.")
        if state_dict["pruner"] is None:
            # Saved before any fit: a tuner does so, trains a little, and loads the state again.
            self.pruner, self._step = None, 0
        elif not self._fitting:
            self._restored = state_dict
        else:
            # First load, then attach: a state that is refused must not change loaded weights.
            self._active_pruner.load_state_dict(state_dict["pruner"])
            self._active_pruner.attach()
            self._step = step

    # -- inside --------------------------------------------------------------------------------

    def _new_pruner(self, pl_module: LightningModule) -> SPPPruner:
        ratios = None if self._solved is None else self._solved.ratios
        arguments = self.settings.of_pruner(ratios) | {"input_shape": self._input_shape}
        pruner = SPPPruner(pl_module, **arguments)
        pruner.compute_with(kept_columns(self.settings.kernels))
        return pruner

    @property
    def _solved(self) -> Plan | None:
        """The plan, if a target was solved into it."""
        return None if self.settings.target is None else self.plan

    def _planned(self, trainer: Trainer, pl_module: LightningModule) -> Plan | None:
        """The plan of a checkpoint, a new one for the target, or what the given ratios come to."""
        target = self.settings.target
        if target is None:
            return given_plan(trainer, pl_module, self.settings)
        if self._restored is None:
            return solved_plans(trainer, pl_module, self.settings, [target])[0]
        if self._restored["plan"] is None:
            raise ValueError(f"The state must hold a plan for {target}, but has none.")
        plan = Plan.from_dict(self._restored["plan"])
        if plan.target != target.in_words():
            raise ValueError(
                f"The state must be of a run with this target, but it was {plan.target!r} and is"
                f" {target.in_words()!r}."
            )
        return plan

    @property
    def _active_pruner(self) -> SPPPruner:
        assert self.pruner is not None, "made in on_fit_start"
        return self.pruner

    def _after_update(self, trainer: Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            # Lightning's WeightAveraging and StochasticWeightAveraging: at the end the average
            # would bring back what it holds of the pruned weights.
            average = getattr(callback, "_average_model", None)
            if isinstance(average, AveragedModel):
                average = average.module
            if isinstance(average, nn.Module):
                self._active_pruner.zero_pruned(average)
        if trainer.is_global_zero:
            log_update(trainer.loggers, self._active_pruner, trainer.global_step)

    def _announce(self, trainer: Trainer, pruner: SPPPruner) -> None:
        """Say what is pruned and how long it takes; warn if the Trainer stops before that."""
        table = _table(pruner) if self.plan is None else self.plan.table(costs=False)
        rank_zero_info(f"SPP prunes {pruner.settings.granularity}s:\n{table}")
        if self.plan is not None:
            rank_zero_info(self.plan.summary())
        if pruner.skipped:
            left = ", ".join(f"{name} ({reason})" for name, reason in pruner.skipped.items())
            rank_zero_info(f"SPP leaves out: {left}.")
        if pruner.finished:
            rank_zero_info("SPP has nothing left to prune; the masks are fixed.")
            return
        needed = pruner.expected_steps - self._step
        rank_zero_info(
            f"SPP takes about {pruner.expected_updates} updates, so {pruner.expected_steps}"
            f" steps in all, to its target; {self._step} steps are done."
        )
        remaining = trainer.estimated_stepping_batches - trainer.global_step
        if not trainer.lightning_module.automatic_optimization:
            # The Trainer counts each optimizer's step, this class each batch that steps.
            remaining //= max(len(trainer.optimizers), 1)
        if remaining < needed:
            smaller = f", or take a smaller `interval` than {pruner.settings.interval}"
            advice = "" if self._step else smaller  # a resumed run keeps its settings
            rank_zero_warn(
                f"SPP takes about {needed} more steps to its target, but the Trainer stops after"
                f" {remaining}. Fit longer{advice}."
            )


def _table(pruner: SPPPruner) -> str:
    """What is pruned, layer by layer, without MACs: nothing tells the shape of the inputs."""
    rows = [
        [name, f"{pruner.num_groups[name]}", f"{target}", f"{target / pruner.num_groups[name]:.1%}"]
        for name, target in pruner.num_target.items()
    ]
    return text_table(["layer", "groups", "pruned", "ratio"], rows)
