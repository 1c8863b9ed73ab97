"""Draw the README's chart from the committed rows of ``benchmarks/speed.py``.

    python docs/draw_speed.py

Reads ``benchmarks/results/speed_avx512.json`` and writes ``docs/images/speed.png``.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "results" / "speed_avx512.json"
CHART = ROOT / "docs" / "images" / "speed.png"

THREADS = 2
NETWORKS = {
    "VGG-16 convolutions, batch 1": "tab:red",
    "ConvNet, batch 64": "tab:green",
    "ResNet-50, batch 1": "tab:blue",
    "ConvNet, batch 1": "tab:orange",
}
FEWER_MACS = {"0.0": 1, "0.5": 2, "0.75": 4, "0.9": 10}  # by share of pruned columns


def main() -> None:
    """Draw speedup over MACs saved, for whole networks."""
    rows = {row["name"]: row for row in json.loads(ROWS.read_text()) if row["threads"] == THREADS}
    figure, axes = plt.subplots(figsize=(7.6, 3.9), layout="constrained")
    axes.plot([1, 10], [1, 10], "--", color="grey", label="as many times faster as fewer MACs")
    axes.axhline(1, color="black", linewidth=1)
    axes.text(10.4, 1.04, "fastest dense engine", ha="right", fontsize=9)
    for name, colour in NETWORKS.items():
        row = rows[name]
        dense_ms = row["milliseconds"][row["dense"]]["p50"]
        axes.plot(
            list(FEWER_MACS.values()),
            [row["speedup"][ratio] for ratio in FEWER_MACS],
            "o-",
            color=colour,
            label=f"{name} (dense {dense_ms:.3g} ms)",
        )
    axes.set(xscale="log", yscale="log", xlabel="fewer MACs", ylabel="times as fast")
    axes.set_xticks(list(FEWER_MACS.values()))
    axes.set_yticks([1, 2, 4, 8, 12])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}×")
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=9)
    figure.savefig(CHART, dpi=110)


if __name__ == "__main__":
    main()
