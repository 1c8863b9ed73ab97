"""What pruning would bring a network, without training: the data behind ``spp-lightning plan``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from spp_lightning.planning.plan import Plan
from spp_lightning.planning.solve import Planner
from spp_lightning.planning.table import short_count, text_table
from spp_lightning.planning.target import Target

__all__ = ["Overview", "overview"]

_SPEEDUPS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Overview(NamedTuple):
    """A plan for one target, and MACs and latency for several.

    Attributes:
        plan: The plan.
        speedups: One dict for each factor of the network's MACs, with ``speedup``, ``macs``,
            ``ms`` and ``latency_speedup``; ``macs`` is None if the factor can't be reached.
    """

    plan: Plan
    speedups: list[dict[str, float | None]]

    def as_dict(self) -> dict[str, Any]:
        """Both as plain dicts, lists, numbers and strings."""
        return {"plan": self.plan.as_dict(), "speedups": self.speedups}

    def __str__(self) -> str:
        head = ["speedup of the MACs", "MACs", "ms", "speedup of the latency"]
        rows = []
        for row in self.speedups:
            cells = [f"{row['speedup']:g}", "not reachable", "", ""]
            if row["macs"] is not None:
                cells[1:] = [
                    short_count(row["macs"]),
                    f"{row['ms']:.3f}",
                    f"{row['latency_speedup']:.2f}",
                ]
            rows.append(cells)
        return f"target: {self.plan.target}\n{self.plan}\n\n{text_table(head, rows, left=0)}"


def overview(
    planner: Planner, target: Target | None, speedups: Sequence[float] = _SPEEDUPS
) -> Overview:
    """Solve a target, and what several factors of the network's MACs come to.

    Args:
        planner: The network, measured.
        target: The target of the plan; None for the ratios that the planner's settings give.
        speedups: The factors.

    Raises:
        ValueError: If the target cannot be reached.
    """
    planner.measure()
    plan = planner.solve(target)
    rows: list[dict[str, float | None]] = []
    for speedup in speedups:
        try:
            at = planner.solve(Target("macs", "speedup", speedup))
        except ValueError:
            at = None
        row: dict[str, float | None] = {"speedup": speedup, "macs": None, "ms": None}
        row["latency_speedup"] = None
        if at is not None and at.ms is not None and at.dense_ms is not None:
            row |= {"macs": at.macs, "ms": at.ms, "latency_speedup": at.dense_ms / at.ms}
        rows.append(row)
    return Overview(plan, rows)
