"""Look for wrong results, crashes and hostile files with random cases.

    python benchmarks/fuzz.py layers --seeds 0:1000     # these seeds
    python benchmarks/fuzz.py graphs --minutes 60       # as many as there is time for
    python benchmarks/fuzz.py files --seeds 5:6         # one case again
    python benchmarks/fuzz.py graphs --minutes 60 --save

``layers`` compares random compact layers with float64 torch. ``int8`` compares random int8 layers
with exact sums, bit for bit, by every instruction set. ``graphs`` compacts random networks,
compares them with the networks, and with themselves after saving and loading. ``quantized``
quantises such networks, and compares them with the float ones, and with their copies, bit for bit.
``files`` loads and runs damaged and crafted files in a process of limited memory, and watches what
it does.

A seed makes the same case on every machine. Of a case that fails, a small one that fails, too, is
printed, and the command exits with 1. ``--save`` writes the counts to
``benchmarks/results/fuzz.md``.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fuzzing import files, graphs, int8, layers, quantized
from fuzzing.case import Failure, shrink

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fuzz.md"


class Fuzzer(NamedTuple):
    """A kind of cases: how to draw one, check it, and make it smaller."""

    draw: Callable[[int], Any]
    check: Callable[[Any], str | None]
    smaller: Callable[[Any], Iterable[Any]]


FUZZERS = {
    "layers": Fuzzer(layers.draw, layers.check, layers.smaller),
    "int8": Fuzzer(int8.draw, int8.check, int8.smaller),
    "graphs": Fuzzer(graphs.draw, graphs.check, graphs.smaller),
    "quantized": Fuzzer(quantized.draw, quantized.check, quantized.smaller),
    "files": Fuzzer(files.draw, files.check, files.smaller),
}


def run(fuzzer: Fuzzer, seeds: Iterable[int]) -> tuple[Counter[str], list[tuple[int, str, Any]]]:
    """Check the cases of seeds.

    Returns:
        How often a check said what, and per failure: its seed, what was wrong, and a small case.
    """
    said: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        case = fuzzer.draw(seed)
        failure = _failure(fuzzer, case, said)
        if failure is not None:
            small = shrink(case, fuzzer.smaller, lambda x: _failure(fuzzer, x) is not None)
            failures.append((seed, failure, small))
            print(f"seed {seed}: {failure}\n  {_failure(fuzzer, small)}\n  {small}", flush=True)
    return said, failures


def _failure(fuzzer: Fuzzer, case: Any, said: Counter[str] | None = None) -> str | None:
    """What is wrong with a case, None if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = fuzzer.check(case)
    except Failure as failure:
        return str(failure)
    except ValueError:
        outcome = "no such case"  # a smaller one often can't be built
    if said is not None:
        said[outcome or "held"] += 1
    return None


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kind", choices=FUZZERS)
    parser.add_argument("--seeds", type=_range, default=None, help="FIRST:BEHIND")
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    first = options.seeds.start if options.seeds else 0
    seeds: Iterator[int] | range = options.seeds or range(1000)
    if options.minutes is not None:
        seeds = _until(begin + 60 * options.minutes, count(first))
    said, failures = run(FUZZERS[options.kind], seeds)
    minutes = (time.monotonic() - begin) / 60
    cases = sum(said.values()) + len(failures)
    detail = ", ".join(f"{number} {name}" for name, number in said.most_common())
    print(f"{options.kind}: {cases} cases from seed {first} in {minutes:.1f} minutes: {detail}")
    print(f"{len(failures)} failures: seeds {[seed for seed, *_ in failures]}")
    if options.save:
        _save(
            options.kind, f"{first} to {first + cases - 1}", cases, minutes, detail, len(failures)
        )
    sys.exit(bool(failures))


def _range(text: str) -> range:
    first, _, behind = text.partition(":")
    return range(int(first), int(behind or int(first) + 1))


def _until(end: float, seeds: Iterator[int]) -> Iterator[int]:
    for seed in seeds:
        if time.monotonic() > end:
            return
        yield seed


HEAD = """# Fuzzing

Made by `python benchmarks/fuzz.py KIND --minutes N --save`, one process with one thread at a time.
What each kind checks is said in the file. A run may have found what the next row's commit mended.

| kind | seeds | cases | minutes | what came of them | failures | commit | date, machine |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def _save(kind: str, seeds: str, cases: int, minutes: float, detail: str, failures: int) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    ).stdout.strip()
    context = f"{date.today()}, {_processor()}, torch {torch.__version__}"
    cells = (kind, seeds, cases, f"{minutes:.0f}", detail, failures, commit, context)
    lines = (RESULT.read_text() if RESULT.exists() else HEAD).splitlines()
    row = "| " + " | ".join(str(cell) for cell in cells) + " |"
    end = max(i for i, line in enumerate(lines) if line.startswith("|")) + 1  # of the table
    RESULT.write_text("\n".join([*lines[:end], row, *lines[end:]]) + "\n")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
