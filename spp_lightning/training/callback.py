"""SPPCallback: prunes the network that a Lightning Trainer trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from spp_lightning.method.groups import Criterion, Granularity
from spp_lightning.method.masks import Masking
from spp_lightning.method.pruner import SPPPruner
from spp_lightning.method.settings import SPPSettings
from spp_lightning.training.tensorboard import log_layout, log_update

__all__ = ["SPPCallback"]


class SPPCallback(Callback):
    """Prunes a trained network's convolutions by SPP while a Trainer trains it on.

    Add it to a Trainer and fit: it prunes until exactly the target share of every layer's weight
    groups is out, then the rest of the fit retrains what is left. At the end of the fit pruned
    weights are exactly 0 and nothing of the pruning is left on the network. The network's
    ``state_dict`` is that of the unpruned network at all times, and so are its checkpoints; the
    pruning's own state is saved with them, and a run resumed by ``fit(ckpt_path=…)`` goes on as if
    it had never stopped. Another fit of the same module goes on where the last one ended; another
    module is pruned from the start. Trained on without the callback, pruned weights grow back.

    A step is a batch after which an optimizer has stepped: with gradient accumulation one step,
    not one micro-batch.

    The sparsity is in the progress bar and in the Trainer's metrics as ``sparsity``; sparsity,
    recovered groups and MACs go to the Trainer's loggers at every update, histograms of the
    pruning probabilities and a chart of all layers to TensorBoard.

    Args:
        prune_ratio: Share of weight groups to prune, in [0, 1), of every layer or by pattern of
            layer names, of which the first that matches counts and without which a layer isn't
            pruned. Give this, or ``speedup``, or neither for 0.75.
        speedup: Factor by which the layers' MACs are to fall, at least 1; S is a ratio of 1 − 1/S.
        granularity: What one weight group is: ``"column"`` of the weight matrix (an input position
            ``(c, i, j)`` across the filters), input ``"channel"`` or ``"filter"``.
        criterion: Importance of a group: its ``"l1"`` or ``"l2"`` norm.
        use_rank: Move p by the rank of the importance; if False, by the importance itself.
        interval: Optimizer steps between two updates of p, at least 1.
        A: Change of p at rank 0 in one update, in (0, 1].
        u: Flatness of an update, in (0, 1).
        crossing: Rank at which p doesn't change, from the target (0) to the last group (1), in
            (0, 1]. The method's own is 0.5.
        recovery: Whether p may fall again; the method's own rule lets it.
        masking: ``"sample"`` draws masks from p at every step, the method's own way; ``"scale"``
            multiplies every group by 1 − p instead.
        layers: Patterns (``fnmatch``) of the names of the layers to prune; default every
            convolution but depthwise ones.
        start_step: Optimizer step at which pruning starts.
        seed: Decides the masks, together with the step and nothing else.

    Attributes:
        pruner: The :class:`~spp_lightning.SPPPruner` of the last fit; ``None`` before the first.

    Raises:
        ValueError: At once if an argument is outside its range or ``prune_ratio`` and ``speedup``
            are both given; at the start of a fit if a pattern matches no layer, the strategy
            shards weights, or a checkpoint is of other layers or settings; at an update if a
            weight isn't finite.

    Source: Wang et al., BMVC 2018.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[SPPCallback(speedup=4)], logger=False)
    """

    def __init__(
        self,
        prune_ratio: float | dict[str, float] | None = None,
        speedup: float | None = None,
        granularity: Granularity = "column",
        criterion: Criterion = "l1",
        use_rank: bool = True,
        interval: int = 180,
        A: float = 0.05,
        u: float = 0.25,
        crossing: float = 0.5,
        recovery: bool = True,
        masking: Masking = "sample",
        layers: Sequence[str] | None = None,
        start_step: int = 0,
        seed: int = 0,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "prune_ratio": prune_ratio,
            "speedup": speedup,
            "granularity": granularity,
            "criterion": criterion,
            "use_rank": use_rank,
            "interval": interval,
            "A": A,
            "u": u,
            "crossing": crossing,
            "recovery": recovery,
            "masking": masking,
            "layers": layers,
            "start_step": start_step,
            "seed": seed,
        }
        SPPSettings(**self._arguments)  # Bad input fails here, not in the middle of a fit.
        self.pruner: SPPPruner | None = None
        self._restored: dict[str, Any] | None = None
        self._fitting = False
        self._step = 0  # steps taken since pruning began to count
        self._global_step = 0  # the Trainer's count when last looked at
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
        # The network is on its device by now, and a checkpoint's state is loaded.
        if self.pruner is None or self.pruner.model is not pl_module:
            self.pruner = SPPPruner(pl_module, **self._arguments)
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
            # ModelCheckpoint forgets over a resume what it saved last: with gradient accumulation
            # it would save again at once, in the middle of a step, without the gradients.
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

    def on_exception(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._leave(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._restored = None  # left by a fit that never began, or by a test of a checkpoint
        if stage == "fit":
            self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        """Leave a plain network, however the fit ends. The state stays, to be saved and resumed."""
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
        """The pruning's state, plain: loads with ``torch.load(weights_only=True)``."""
        state = None if self.pruner is None else self.pruner.state_dict()
        return {"step": self._step, "pruner": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state: now if a fit has begun, else at the start of the next one.

        Raises:
            ValueError: If the state isn't one of these layers and settings.
        """
        missing = {"step", "pruner"} - state_dict.keys()
        if missing:
            raise ValueError(f"The state of SPPCallback lacks {', '.join(sorted(missing))}.")
        step = state_dict["step"]
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"The state's step must be a whole number, got {step!r}.")
        if state_dict["pruner"] is None:
            # Saved before any fit, as by a tuner that tries one out and then takes it back.
            self.pruner, self._step = None, 0
        elif not self._fitting:
            self._restored = state_dict
        else:
            # Attached only then: a state that is refused must leave the loaded weights alone.
            self._active_pruner.load_state_dict(state_dict["pruner"])
            self._active_pruner.attach()
            self._step = step

    # -- inside --------------------------------------------------------------------------------

    @property
    def _active_pruner(self) -> SPPPruner:
        assert self.pruner is not None, "made in on_fit_start"
        return self.pruner

    def _after_update(self, trainer: Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            # Lightning's WeightAveraging and StochasticWeightAveraging: an average would bring
            # back, at the end, what it remembers of the pruned weights.
            average = getattr(callback, "_average_model", None)
            if isinstance(average, AveragedModel):
                average = average.module
            if isinstance(average, nn.Module):
                self._active_pruner.zero_pruned(average)
        if trainer.is_global_zero:
            log_update(trainer.loggers, self._active_pruner, trainer.global_step)

    def _announce(self, trainer: Trainer, pruner: SPPPruner) -> None:
        """Say what will be pruned and how long it takes; warn if the Trainer stops before."""
        groups = ", ".join(
            f"{name} {target} of {pruner.num_groups[name]}"
            for name, target in pruner.num_target.items()
        )
        rank_zero_info(f"SPP prunes {pruner.settings.granularity}s: {groups}.")
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
            # Each optimizer counts there where one step counts here.
            remaining //= max(len(trainer.optimizers), 1)
        if remaining < needed:
            smaller = f", or take a smaller `interval` than {pruner.settings.interval}"
            advice = "" if self._step else smaller  # a resumed run must keep its settings
            rank_zero_warn(
                f"SPP takes about {needed} more steps to its target, but the Trainer stops after"
                f" {remaining}. Fit longer{advice}."
            )
