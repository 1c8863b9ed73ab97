"""How long a run trains: the method's own schedule and shorter ones; and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

__all__ = ["PRECISIONS", "SCHEDULES", "Precision", "Schedule", "fast_precision"]

Precision = Literal["32-true", "bf16-mixed"]  # Lightning's names
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def fast_precision() -> Precision:
    """The precision that this device computes fast: bfloat16 where it has instructions for it."""
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if fast else "32-true"


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of the runs.

    Args:
        name: Its name on the command line and in the results.
        baseline_steps: Steps of the baseline, from scratch.
        steps: Steps of every other run, from the baseline's weights.
        divisor: Pruning intervals are the paper's t divided by this.
        tables: The tables of ``rows.ALL_TABLES`` that are measured on this schedule.
    """

    name: str
    baseline_steps: int
    steps: int
    divisor: int
    tables: tuple[str, ...]

    def interval(self, t: int) -> int:
        """Steps between two updates that correspond to the paper's ``t``."""
        if t % self.divisor:
            raise ValueError(f"`t` must be a multiple of {self.divisor} here, got {t}.")
        return t // self.divisor

    @staticmethod
    def milestones(steps: int) -> tuple[int, int]:
        """Steps at which the learning rate falls to a tenth: after 6/7 and 13/14 of a run."""
        return round(steps * 6 / 7), round(steps * 13 / 14)


PAPER = ("table1", "table2", "table3", "figure1", "comparison", "beyond")
SCHEDULES = {
    "full": Schedule("full", 70_000, 70_000, 1, (*PAPER, "causes", "recipes")),
    # A tenth of the steps for the baseline, a thirtieth for everything else.
    "short": Schedule("short", 7_000, 2_333, 30, PAPER),
    # To tell causes apart on one core.
    "causes": Schedule("causes", 6_000, 2_000, 30, ("causes", "recipes")),
}
