"""The charts of the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib

from reproduction.results import Results, on_grid
from reproduction.rows import (
    BASELINE,
    BEYOND,
    COMPARED,
    CONTROL,
    DEFAULT,
    METHODS,
    PLAIN_L1,
    Configuration,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_beyond", "draw_comparison", "draw_figure1"]

LAYERS = ("conv1", "conv2", "conv3")


def draw_figure1(results: Results, path: Path) -> bool:
    """Layer sparsity over normalised iterations: by ranks, and by the L1 norm itself.

    Returns:
        Whether it was drawn: both rows must be measured. The other charts return the same.
    """
    rows = {"ranks": (DEFAULT, "-"), "plain L1": (PLAIN_L1, "--")}
    if any(not results.of(row) for row, _ in rows.values()):
        return False
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (row, style) in rows.items():
        grid = on_grid(results.of(row)[0]["curve"])
        for index, layer in enumerate(LAYERS):
            axes.plot(
                [point / (len(grid) - 1) for point in range(len(grid))],
                [100 * shares[index] for shares in grid],
                style,
                color=f"C{index}",
                label=f"{layer}, {name}",
            )
    axes.set(
        xlabel="share of the pruning iterations",
        ylabel="columns pruned (%)",
        title="Layer sparsity while pruning, R = 0.75",
    )
    _save(figure, axes, path)
    return True


def draw_comparison(results: Results, path: Path) -> bool:
    """Accuracy over MACs, and over the latency of the compact networks on a CPU."""
    rows = {
        name: [
            row
            for row in (replace(method, speedup=speedup) for speedup in COMPARED)
            if results.of(row)
        ]
        for name, method in METHODS.items()
    }
    base, control = results.accuracy(BASELINE), results.accuracy(CONTROL)
    if base is None or control is None or not all(rows.values()):
        return False
    timed = {
        name: [row for row in found if row in results.latencies] for name, found in rows.items()
    }
    panels = 2 if any(timed.values()) else 1
    figure, all_axes = plt.subplots(
        1, panels, figsize=(5.5 * panels, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for name, found in rows.items():
        accuracies = [results.accuracy(row) for row in found]
        all_axes[0][0].errorbar(
            [_macs(results, row) / 1e6 for row in found],
            [sample.mean for sample in accuracies if sample],
            yerr=[sample.deviation or 0 for sample in accuracies if sample],
            marker="o",
            label=name,
        )
    all_axes[0][0].set(xlabel="MACs of the convolutions (millions)", ylabel="test accuracy (%)")
    if panels == 2:
        for name, found in timed.items():
            all_axes[0][1].plot(
                [results.latencies[row]["compact_ms_64"] for row in found],
                [sample.mean for row in found if (sample := results.accuracy(row))],
                marker="o",
                label=name,
            )
        all_axes[0][1].set(xlabel="latency of the compact network, batch 64, CPU (ms)")
    for axes in all_axes[0]:
        axes.axhline(control.mean, color="black", linestyle=":", label="control, not pruned")
        axes.axhline(base.mean, color="grey", linestyle=":", label="baseline")
        axes.grid(alpha=0.3)
    all_axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def draw_beyond(results: Results, path: Path) -> bool:
    """Accuracy at 10x of what was tried."""
    found = [(name, sample) for name, row in BEYOND.items() if (sample := results.accuracy(row))]
    base = results.accuracy(BASELINE)
    if len(found) < 2 or base is None:
        return False
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(found) + 1.2), layout="constrained")
    axes.barh(
        [name for name, _ in found],
        [sample.mean for _, sample in found],
        xerr=[sample.deviation or 0 for _, sample in found],
    )
    axes.axvline(base.mean, color="grey", linestyle=":", label="baseline")
    axes.set(xlabel="test accuracy at 10x (%)", xlim=(min(s.mean for _, s in found) - 2, None))
    axes.invert_yaxis()
    _save(figure, axes, path)
    return True


def _macs(results: Results, row: Configuration) -> float:
    lines = results.of(row)
    return float(lines[0]["conv_macs"])


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
