"""The settings of SPPCallback: pruning, a target, and what computes the layers meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from spp_lightning.compaction.layers.kept import Kernels
from spp_lightning.method.checks import check_choice
from spp_lightning.planning.target import TargetSettings

__all__ = ["TrainingSettings"]


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
