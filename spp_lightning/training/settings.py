"""The settings of SPPCallback: pruning, a target, and what computes the layers meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spp_lightning.compaction.layers.kept import Kernels
from spp_lightning.method.checks import check, check_choice, is_whole, number
from spp_lightning.planning.target import TargetSettings

__all__ = ["StagedSettings", "TrainingSettings"]


@dataclass(frozen=True)
class TrainingSettings(TargetSettings):
    """The arguments of :class:`~spp_lightning.SPPCallback`.

    Args:
        kernels: What computes the pruned layers in training. ``"auto"``: on CPUs the kernels that
            read only the columns that the mask keeps, wherever the cost model says that a step is
            faster so; ``"compact"``: those kernels wherever they can; ``"dense"``: never.

    Raises:
        ValueError: If an argument has the wrong type or is out of range.

    >>> TrainingSettings(speedup=4).of_pruner()["speedup"]
    4
    """

    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kernels", self.kernels, Kernels)


@dataclass(frozen=True)
class StagedSettings(TrainingSettings):
    """The arguments of :class:`~spp_lightning.StagedSPPCallback`.

    Args:
        monitor: The metric that must hold, logged in validation, such as ``"val_acc"``.
        max_drop: How much of the metric may be lost, in the metric's own unit: 0.5 is half a point
            of a percentage, 0.005 of a share.
        mode: Whether a higher (``"max"``) or a lower (``"min"``) metric is better.
        stages: Speedups of the stages, ascending, of what ``of`` says. Stages that can't be reached
            are left out.
        patience: Validations that a stage has to retrain in, from its last pruned group on. The
            stage has failed if the metric holds in none of them.
        baseline: The metric of the unpruned network. Default: that of the first validation; the
            network trains unpruned until then.

    Raises:
        ValueError: If an argument has the wrong type or is out of range, or if ``prune_ratio``,
            ``speedup``, ``macs`` or ``latency_ms`` is given.

    >>> StagedSettings(monitor="val_acc", max_drop=0.5).stages
    (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    """

    monitor: str = ""
    max_drop: float = 0.0
    mode: Literal["max", "min"] = "max"
    stages: Sequence[float] = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    patience: int = 3
    baseline: float | None = None

    def __post_init__(self) -> None:
        given = [
            name
            for name in ("prune_ratio", "speedup", "macs", "latency_ms")
            if getattr(self, name) is not None
        ]
        if given:
            raise ValueError(
                f"`{given[0]}` must not be given beside `stages`, which are the speedups, got"
                f" {getattr(self, given[0])!r}."
            )
        super().__post_init__()
        named = isinstance(self.monitor, str) and bool(self.monitor)
        check("monitor", self.monitor, "the name of a metric", named)
        finite = 0 <= number(self.max_drop) < math.inf
        check("max_drop", self.max_drop, "a finite number of at least 0", finite)
        check_choice("mode", self.mode, Literal["max", "min"])
        check("patience", self.patience, "a whole number of at least 1", is_whole(self.patience, 1))
        is_list = isinstance(self.stages, Sequence) and not isinstance(self.stages, str)
        speedups = [number(x) for x in self.stages] if is_list else []
        ascending = all(a < b < math.inf for a, b in zip([1.0, *speedups], speedups, strict=False))
        rule = "a list of ascending speedups above 1"
        check("stages", self.stages, rule, ascending and len(speedups) > 0)
        if self.baseline is not None:
            check(
                "baseline", self.baseline, "a finite number", math.isfinite(number(self.baseline))
            )

    def holds(self, value: float, baseline: float) -> bool:
        """Whether a metric is within ``max_drop`` of the baseline; NaN never is."""
        drop = baseline - value if self.mode == "max" else value - baseline
        return drop <= self.max_drop
