"""The settings of SPPCallback: those of pruning, and how a Trainer computes meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from spp_lightning.compaction.layers.kept import Kernels
from spp_lightning.method.settings import SPPSettings

__all__ = ["TrainingSettings"]


@dataclass(frozen=True)
class TrainingSettings(SPPSettings):
    """The arguments of :class:`~spp_lightning.SPPCallback`.

    Args:
        kernels: What computes the pruned layers in training, ``"auto"``, ``"dense"`` or
            ``"compact"``.

    Raises:
        ValueError: If an argument has the wrong type or is out of range.

    >>> TrainingSettings(speedup=4).of_pruner()["speedup"]
    4
    """

    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernels not in get_args(Kernels):
            rule = ", ".join(f'"{choice}"' for choice in get_args(Kernels))
            raise ValueError(f"`kernels` must be one of {rule}, got {self.kernels!r}.")

    def of_pruner(self) -> dict[str, Any]:
        """Those that are arguments of :class:`~spp_lightning.SPPPruner`."""
        return {name: value for name, value in vars(self).items() if name != "kernels"}
