"""Tables and pictures of the appendix, from the lines of finished runs alone.

    python benchmarks/report.py --schedule short

Writes ``benchmarks/results/appendix_SCHEDULE.md`` and pictures beside it. What has no line yet
says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reproduction import lines
from reproduction.pictures import draw_beyond, draw_comparison, draw_figure1
from reproduction.results import Results
from reproduction.schedules import SCHEDULES
from reproduction.tables import report

RESULTS = Path(__file__).resolve().parent / "results"


def lines_path(schedule: str) -> Path:
    """The file of a schedule's lines."""
    return RESULTS / f"appendix_{schedule}.jsonl"


def latency_path(schedule: str) -> Path:
    """The file of the measured latencies of a schedule's networks."""
    return RESULTS / f"appendix_{schedule}_latency.jsonl"


def write(schedule: str) -> None:
    """Write a schedule's tables and pictures."""
    results = Results(lines.read(lines_path(schedule)), lines.read(latency_path(schedule)))
    stem = f"appendix_{schedule}"
    drawn = []
    for name, draw in (
        ("figure1", draw_figure1),
        ("comparison", draw_comparison),
        ("beyond", draw_beyond),
    ):
        if draw(results, RESULTS / f"{stem}_{name}.png"):
            drawn.append(f"{stem}_{name}.png")
    (RESULTS / f"{stem}.md").write_text(report(SCHEDULES[schedule], results, drawn))


def main() -> None:
    """Write the report of a schedule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedule", choices=SCHEDULES, default="full")
    schedule = parser.parse_args().schedule
    write(schedule)
    print((RESULTS / f"appendix_{schedule}.md").read_text())


if __name__ == "__main__":
    main()
