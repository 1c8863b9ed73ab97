"""Time the compact networks of the appendix's comparison on this machine's CPU.

    python benchmarks/latency.py --schedule short --threads 2

Compacts the networks that ``appendix.py --only comparison`` trained into ``runs/appendix/``. Times
them and the dense network in turns, at batch 64 and 1. Appends a line for each network to
``benchmarks/results/appendix_SCHEDULE_latency.jsonl`` and writes the report again.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from reproduction import lines
from reproduction.rows import ALL_TABLES, BASELINE, Configuration
from reproduction.schedules import PRECISIONS, SCHEDULES, fast_precision
from reproduction.training import Run, context

from spp_lightning import compact
from spp_lightning.compaction.timing import interleaved_ms

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (64, 1)


def main() -> None:
    """Measure, append and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedule", choices=SCHEDULES, default="full")
    parser.add_argument("--precision", choices=PRECISIONS, default=fast_precision())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = ROOT / "data" / "cifar10"
    folder, precision = ROOT / "runs" / "appendix", arguments.precision
    runs = [
        Run(folder, data, SCHEDULES[arguments.schedule], row, seed=0, precision=precision)
        for row in (BASELINE, *ALL_TABLES["comparison"])
    ]
    missing = [run.configuration.name for run in runs if not run.final.is_file()]
    if missing:
        parser.error(
            "`runs/appendix/` must hold the networks that appendix.py trains, but these are"
            f" missing: {', '.join(missing)}"
        )
    measured: dict[Configuration, dict[str, Any]] = {run.configuration: {} for run in runs}
    for batch in BATCHES:
        x = 60 * torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        dense, *pruned = (run.network().requires_grad_(False) for run in runs)
        # The dense network is timed in both layouts, and fused by `compact` with nothing pruned:
        # what fusing gains is no gain of pruning.
        fused = compact(dense, x)
        other = runs[0].network().requires_grad_(False).to(memory_format=torch.contiguous_format)
        other.channels_last = False
        nets = [dense, other, fused, *(compact(net, x) for net in pruned)]
        with torch.no_grad():
            whole = interleaved_ms([partial(net, x) for net in nets])
        times = [min(whole[:3]), *whole[3:]]
        for run, milliseconds in zip(runs, times, strict=True):
            measured[run.configuration][f"compact_ms_{batch}"] = round(milliseconds, 4)
            measured[run.configuration][f"speedup_{batch}"] = round(times[0] / milliseconds, 3)
    for row, numbers in measured.items():
        line = {"configuration": row.as_dict(), "precision": precision, **numbers, **context(data)}
        lines.append(report.latency_path(arguments.schedule), line)
        print(f"{row.name}: {numbers}")
    report.write(arguments.schedule)


if __name__ == "__main__":
    main()
