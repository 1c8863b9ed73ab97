"""Tables and charts of the appendix, from the lines of finished runs alone.

    python benchmarks/report.py --schedule short

Writes ``benchmarks/results/appendix_SCHEDULE.md`` and charts beside it. Where there are lines of
several precisions it writes a report for each. A row that has no line yet says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reproduction import lines
from reproduction.charts import draw_beyond, draw_comparison, draw_figure1
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


def write(schedule: str) -> list[Path]:
    """Write a schedule's tables and charts: one report for each precision among its lines.

    Returns:
        The reports.
    """
    by_precision: dict[str, list[dict[str, Any]]] = {}
    for line in lines.read(lines_path(schedule)):
        by_precision.setdefault(line["precision"], []).append(line)
    reports = []
    for precision, found in by_precision.items():
        latencies = [
            line
            for line in lines.read(latency_path(schedule))
            # The oldest lines don't name theirs.
            if line.get("precision", "bf16-mixed") == precision
        ]
        results = Results(found, latencies)
        stem = f"appendix_{schedule}" + (f"_{precision}" if len(by_precision) > 1 else "")
        drawn = []
        for name, draw in (
            ("figure1", draw_figure1),
            ("comparison", draw_comparison),
            ("beyond", draw_beyond),
        ):
            if draw(results, RESULTS / f"{stem}_{name}.png"):
                drawn.append(f"{stem}_{name}.png")
        reports.append(RESULTS / f"{stem}.md")
        reports[-1].write_text(report(SCHEDULES[schedule], results, drawn))
    return reports


def main() -> None:
    """Write the report of a schedule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedule", choices=SCHEDULES, default="full")
    schedule = parser.parse_args().schedule
    for path in write(schedule):
        print(path.read_text())


if __name__ == "__main__":
    main()
