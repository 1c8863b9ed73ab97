"""How long a run trains: the method's own schedule, and a short one for two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SCHEDULES", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of the runs, and the precision they train in.

    Args:
        name: What it is called on the command line and in the results.
        baseline_steps: Steps of the baseline, from scratch.
        steps: Steps of every other run, from the baseline's weights.
        divisor: What pruning intervals are divided by; they are given as the paper gives them.
        precision: Lightning's name of the precision.
    """

    name: str
    baseline_steps: int
    steps: int
    divisor: int
    precision: str

    def interval(self, t: int) -> int:
        """The steps between two updates that stand for the paper's ``t``."""
        if t % self.divisor:
            raise ValueError(f"`t` must be a multiple of {self.divisor} here, got {t}.")
        return t // self.divisor

    @staticmethod
    def milestones(steps: int) -> tuple[int, int]:
        """Steps at which the learning rate falls to a tenth: after 6/7 and 13/14 of a run."""
        return round(steps * 6 / 7), round(steps * 13 / 14)


SCHEDULES = {
    "full": Schedule("full", 70_000, 70_000, 1, "32-true"),
    # A tenth of the steps for the baseline, a thirtieth for everything else.
    "short": Schedule("short", 7_000, 2_333, 30, "bf16-mixed"),
    # To tell causes apart, on one core without fast bfloat16.
    "causes": Schedule("causes", 6_000, 2_000, 30, "32-true"),
}
