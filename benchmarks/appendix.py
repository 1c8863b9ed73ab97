"""Reproduce the paper's appendix on CIFAR-10, and compare SPP with simpler ways to prune.

    python benchmarks/appendix.py                      # everything: days on a CPU
    python benchmarks/appendix.py --schedule short     # the same, shorter
    python benchmarks/appendix.py --schedule causes    # what else could lower the accuracy
    python benchmarks/appendix.py --only table2 --seeds 3
    timeout 3h python benchmarks/appendix.py --seeds 1 # as far as three hours go

Trains the baselines first, then one run for every row and seed that has no line yet in
``benchmarks/results/appendix_SCHEDULE.jsonl``. The rows that say most come first. A stopped run
goes on from its checkpoint in ``runs/appendix/``, also on another machine if that folder is copied
there. A finished run is never repeated, and the baselines of the full schedule are committed with
the results. At the end ``report.py`` writes tables and charts.

Every line names its precision and its device. Runs of one precision start from a baseline of that
precision, and tables never mix two precisions.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import report
import torch
from filelock import FileLock, Timeout
from reproduction import lines
from reproduction.baselines import keep as keep_baseline
from reproduction.baselines import restore
from reproduction.jobs import cores, finish
from reproduction.rows import ALL_TABLES, BASELINE, Configuration, by_worth
from reproduction.schedules import PRECISIONS, SCHEDULES, fast_precision
from reproduction.training import Run

from spp_lightning import CIFAR10DataModule

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run what has no line yet and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", choices=ALL_TABLES, nargs="+", help="default: what the schedule is for"
    )
    parser.add_argument("--schedule", choices=SCHEDULES, default="full")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default 3)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: bfloat16 where this device computes it"
    )
    parser.add_argument(
        "--jobs", type=int, help="runs side by side (default 4 on a GPU, else one per core)"
    )
    parser.add_argument("--compile", action="store_true", help="train with torch.compile")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "cifar10")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"`--seeds` must be at least 1, got {arguments.seeds}.")
    jobs = arguments.jobs
    if jobs is None:
        jobs = 4 if torch.cuda.is_available() else cores()
    if jobs < 1:
        parser.error(f"`--jobs` must be at least 1, got {jobs}.")

    folder = ROOT / "runs" / "appendix"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{arguments.schedule}.lock", timeout=0):
        run(arguments, jobs, folder, parser)


def run(
    arguments: argparse.Namespace, jobs: int, folder: Path, parser: argparse.ArgumentParser
) -> None:
    """Run what has no line yet, as the only one to do so."""
    path = report.lines_path(arguments.schedule)
    precision = arguments.precision or fast_precision()
    finished = {
        (Configuration.from_dict(line["configuration"]), line["seed"])
        for line in lines.read(path)
        if line["precision"] == precision
    }
    schedule = SCHEDULES[arguments.schedule]
    runs = [
        Run(folder, arguments.data.absolute(), schedule, row, seed, precision)
        for seed in range(arguments.seeds)  # so that a whole seed is there before the next begins
        for row in by_worth(arguments.only or schedule.tables)
        if (row, seed) not in finished
    ]
    # A line can outlive its checkpoint, from which the others start, and the other way round.
    bases = {run.seed: run.baseline for run in runs}
    there = {seed: restore(base) for seed, base in bases.items()}
    baselines = [
        base for seed, base in bases.items() if (BASELINE, seed) not in finished or not there[seed]
    ]
    others = [run for run in runs if run.configuration != BASELINE]
    steps = sum(run.steps for run in [*baselines, *others] if not run.final.is_file())
    print(f"{len(runs)} runs to do in {precision}, {steps:,} steps; {len(finished)} are done.")

    def keep(line: dict[str, Any]) -> None:
        key = (Configuration.from_dict(line["configuration"]), line["seed"])
        if key not in finished:
            lines.append(path, line)
        if key[0] == BASELINE and schedule.name == "full":  # hours of a CPU, 0.4 MB
            keep_baseline(bases[key[1]])

    if runs:
        try:
            CIFAR10DataModule(arguments.data).prepare_data()  # downloaded and decoded here, once
        except (FileNotFoundError, ValueError) as error:
            parser.error(f"`--data` must hold CIFAR-10: {error}")
    # Ended by a signal, the processes of the runs end, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stages = iter([baselines, others])
    try:
        errors = finish(stages, steps, jobs, arguments.compile, keep)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on where it was.")
    report.write(arguments.schedule)
    if errors:
        sys.exit(f"{len(errors)} runs failed; the others are kept.")


if __name__ == "__main__":
    try:
        main()
    except Timeout:
        sys.exit("Another process is at work on this schedule; wait for it, or stop it.")
