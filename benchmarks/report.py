"""Tables and pictures of the appendix, from its lines alone.

python benchmarks/report.py --schedule short
"""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def lines_path(schedule: str) -> Path:
    """The file of a schedule's lines."""
    return RESULTS / f"appendix_{schedule}.jsonl"


def write(schedule: str) -> None:
    """Write a schedule's tables and pictures."""
