"""Lines of code per room of the package, in one or several revisions.

    python benchmarks/count_lines.py e7a558f HEAD

Counts all lines, and those of code: neither blank, nor a comment alone, nor of a docstring.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from collections import Counter
from pathlib import PurePosixPath

from harness.context import ROOT
from harness.results import markdown_table

FOLDERS = ("spp_lightning", "benchmarks", "tests", "examples")
ENDINGS = {".py": "#", ".cpp": "//", ".h": "//", ".inc": "//"}  # and how comments start


def git(*words: str) -> str:
    """What git prints."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def room_of(file: PurePosixPath) -> str:
    """The folder of a file; the package's by room, and compaction's by room, too.

    >>> room_of(PurePosixPath("spp_lightning/compaction/kernels/cpu/library.py"))
    'spp_lightning/compaction/kernels'
    >>> room_of(PurePosixPath("tests/method/test_rule.py"))
    'tests'
    """
    folders = file.parts[:-1]
    depth = 1 if folders[0] != "spp_lightning" else 3 if "compaction" in folders else 2
    return "/".join(folders[:depth])


def lines_of(text: str, ending: str) -> tuple[int, int]:
    r"""All lines of a source text, and those of code.

    >>> lines_of('def f():\n    # why\n    return 1\n', ".py")
    (3, 2)
    """
    lines = text.splitlines()
    comment = ENDINGS[ending]
    stripped = enumerate((line.strip() for line in lines), 1)
    rest = {i for i, line in stripped if line and not line.startswith(comment)}
    if ending == ".py":
        for node in ast.walk(ast.parse(text)):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            value = getattr(first, "value", None)
            if isinstance(first, ast.Expr) and isinstance(getattr(value, "value", None), str):
                rest -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines), len(rest)


def count(revision: str) -> dict[str, tuple[int, int]]:
    """Lines and lines of code by room."""
    every: Counter[str] = Counter()
    code: Counter[str] = Counter()
    for name in git("ls-tree", "-r", "--name-only", revision, *FOLDERS).splitlines():
        file = PurePosixPath(name)
        if file.suffix in ENDINGS:
            lines, of_code = lines_of(git("show", f"{revision}:{name}"), file.suffix)
            every[room_of(file)] += lines
            code[room_of(file)] += of_code
    every["all"], code["all"] = every.total(), code.total()
    return {room: (every[room], code[room]) for room in every}


def main() -> None:
    """Count and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("revisions", nargs="*", default=["HEAD"])
    revisions = parser.parse_args().revisions
    counts = [count(revision) for revision in revisions]
    rooms = [*sorted(set().union(*counts) - {"all"}), "all"]

    def cell(found: dict[str, tuple[int, int]], room: str) -> str:
        return f"{found[room][0]:,} ({found[room][1]:,})" if room in found else ""

    table = [[room, *(cell(found, room) for found in counts)] for room in rooms]
    print(markdown_table(["lines (of code)", *revisions], table))


if __name__ == "__main__":
    main()
