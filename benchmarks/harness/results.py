"""Rows of results as JSON and Markdown, each with what it depends on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.context import RESULTS

__all__ = ["Results", "context_text", "markdown_table"]

Row = dict[str, Any]  # "name", maybe "threads", "context", and figures


class Results:
    """``benchmarks/results/STEM.json``, a list of rows, and the Markdown made from it.

    A row is known by its name and number of threads. A row that is saved replaces the one known by
    the same; rows of several commits may stand in one file, and the Markdown says which are whose.

    Args:
        stem: The files' name without its ending.
        report: Makes the Markdown of the rows; what they depend on is added below it.
        folder: Where the files lie.
    """

    def __init__(
        self, stem: str, report: Callable[[list[Row]], str], folder: Path = RESULTS
    ) -> None:
        self.file = folder / f"{stem}.json"
        self.report = report

    def rows(self) -> list[Row]:
        """The saved rows; none if there is no file."""
        rows: list[Row] = json.loads(self.file.read_text()) if self.file.is_file() else []
        return rows

    def add(self, *rows: Row) -> None:
        """Save rows; says which rows of other commits they replace."""
        new = {_key(row): row for row in rows}
        old = {_key(row): row for row in self.rows()}
        for key in new.keys() & old.keys():
            was, now = (row[key]["context"]["commit"] for row in (old, new))
            if was != now:
                print(f"replaces {key[0]}, measured at commit {was}")
        self._write(list((old | new).values()))

    def replace(self, rows: Sequence[Row]) -> None:
        """Save rows instead of all that are there."""
        for row in self.rows()[:1]:
            print(f"replaces the rows of commit {row['context']['commit']}")
        self._write(list(rows))

    def write_report(self) -> None:
        """Write the Markdown anew."""
        rows = self.rows()
        text = "\n".join([self.report(rows), "", *context_lines(rows)])
        self.file.with_suffix(".md").write_text(text + "\n")

    def _write(self, rows: list[Row]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        self.write_report()


def _key(row: Row) -> tuple[str, int | None]:
    return row["name"], row.get("threads")


def context_text(context: Row) -> str:
    """What a row depends on, in one line.

    >>> context_text({"device": "a CPU", "versions": {"torch": "2.14.1"}, "seed": 0,
    ...     "commit": "a1b2c3d", "command": "python benchmarks/speed.py"})
    'device a CPU; torch 2.14.1; seed 0; commit a1b2c3d; `python benchmarks/speed.py`'
    """
    words = []
    for key, value in context.items():
        if isinstance(value, dict):
            words += [", ".join(f"{name} {number}" for name, number in value.items())]
        elif key != "command":
            words.append(f"{key} {value}")
    return "; ".join([*words, *([f"`{context['command']}`"] if "command" in context else [])])


def context_lines(rows: Sequence[Row]) -> Iterator[str]:
    """What rows depend on; where that differs, most rows' first, then which others'."""
    rows_of: dict[str, list[Row]] = {}
    for row in rows:
        rows_of.setdefault(context_text(row["context"]), []).append(row)
    for i, text in enumerate(sorted(rows_of, key=lambda text: -len(rows_of[text]))):
        if i == 0:
            yield f"{text}."
            continue
        for threads in dict.fromkeys(row.get("threads") for row in rows_of[text]):
            names = "; ".join(x["name"] for x in rows_of[text] if x.get("threads") == threads)
            yield f"\n{names}{f' (threads: {threads})' if threads else ''}: {text}."


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table.

    >>> print(markdown_table(["layer", "ms"], [["conv1", 1.5]]))
    | layer | ms |
    | --- | --- |
    | conv1 | 1.5 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in cells)} |" for cells in lines)
