"""Numbers of a configuration over its seeds, from the lines of finished runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from reproduction.rows import BASELINE, Configuration

__all__ = ["Results", "Sample", "layer_spread", "on_grid"]

Line = dict[str, Any]


class Sample(NamedTuple):
    """Numbers of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Their standard deviation (of a sample); None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def show(self, digits: int = 1) -> str:
        """For tables: ``mean ± deviation``, or the number alone.

        >>> Sample((80.0, 82.0)).show()
        '81.0 ± 1.4'
        """
        if self.deviation is None:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.deviation:.{digits}f}"


class Results:
    """Lines of finished runs, by configuration.

    Args:
        lines: One line per finished run.
        latencies: Lines of measured latencies, the last of a configuration counts.
    """

    def __init__(self, lines: Sequence[Line], latencies: Sequence[Line] = ()) -> None:
        self.lines: dict[Configuration, dict[int, Line]] = {}
        for line in lines:
            row = Configuration.from_dict(line["configuration"])
            self.lines.setdefault(row, {})[line["seed"]] = line
        self.latencies = {Configuration.from_dict(x["configuration"]): x for x in latencies}

    def of(self, row: Configuration) -> list[Line]:
        """The lines of a configuration, by seed; empty if none has finished."""
        return [line for _, line in sorted(self.lines.get(row, {}).items())]

    def accuracy(self, row: Configuration) -> Sample | None:
        """Test accuracies in percent; None if there is no finished run."""
        return self.numbers(row, "accuracy")

    def numbers(self, row: Configuration, key: str) -> Sample | None:
        """What the lines of a configuration say under a key; None if none of them does."""
        found = tuple(line[key] for line in self.of(row) if key in line)
        return Sample(found) if found else None

    def drop(self, row: Configuration, reference: Configuration = BASELINE) -> Sample | None:
        """Each seed's accuracy subtracted from that of its baseline or reference, in points."""
        bases = {seed: line["accuracy"] for seed, line in self.lines.get(reference, {}).items()}
        if reference == BASELINE:  # if there are several, the one that the run started from
            bases |= {
                line["seed"]: line["baseline_accuracy"]
                for line in self.of(row)
                if "baseline_accuracy" in line
            }
        found = [line for line in self.of(row) if line["seed"] in bases]
        values = tuple(bases[line["seed"]] - line["accuracy"] for line in found)
        return Sample(values) if values else None

    def pruning_iterations(self, row: Configuration) -> Sample | None:
        """Updates times t: pruning iterations, converted to the full schedule."""
        values = tuple(line["updates"] * row.interval for line in self.of(row))
        return Sample(values) if values else None

    def finished(self, row: Configuration) -> bool:
        """Whether all runs of a configuration reached their target sparsity."""
        shares = dict(row.ratios or ())
        return all(
            share >= shares.get(name, 1 - 1 / row.speedup) - 1e-9
            for line in self.of(row)
            for name, share in line["sparsity"].items()
        )

    @property
    def every_line(self) -> list[Line]:
        """All lines."""
        return [line for seeds in self.lines.values() for line in seeds.values()]


def on_grid(curve: Sequence[Sequence[float]], points: int = 101) -> list[list[float]]:
    """Layer sparsity over normalised iterations, from 0, the first update, to 1, the last.

    Args:
        curve: ``[step, share of layer 1, …]`` at every update.
        points: Points of the grid.

    Returns:
        Shares by layer at each point, ``points`` lists.

    >>> on_grid([[0, 0.0, 0.0], [5, 0.5, 0.25], [10, 0.75, 0.75]], points=3)
    [[0.0, 0.0], [0.5, 0.25], [0.75, 0.75]]
    """
    first, last = curve[0][0], curve[-1][0]
    grid = []
    for point in range(points):
        step = first + (last - first) * point / (points - 1)
        grid.append(list([row for row in curve if row[0] <= step + 1e-9][-1][1:]))
    return grid


def layer_spread(curve: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Distance between the layers' sparsities while pruning.

    Returns:
        The standard deviation over layers, averaged over normalised iterations; and the largest
        distance of two layers at any time. Both as shares of columns.

    >>> layer_spread([[0, 0.0, 0.0], [1, 0.25, 0.75], [2, 0.75, 0.75]])[1]
    0.5
    """
    grid = on_grid(curve)
    deviation = statistics.fmean(statistics.pstdev(shares) for shares in grid)
    return deviation, max(max(shares) - min(shares) for shares in grid)
