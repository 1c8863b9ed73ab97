"""Whether this checkout is slower than an older one, row by row, in one run.

    python benchmarks/versus.py OLD_CHECKOUT --name before --save
    python benchmarks/versus.py OLD_CHECKOUT --quick --only networks training

Both checkouts have their library built (by ``pip install -e .``, or as
their CONTRIBUTING.md says). One process of
each builds a row from the same seed; then they take turns, one at work while the other sleeps, and
who comes first changes. A row's ratio is the median, over the rounds, of new time over old time
within a round. Rows over ``--most`` are built and measured anew, up to twice; a row is slower when
it was over it every time. Samples of the outputs must agree. Ends with 1 if a row is slower.

Parts: ``layers`` (convolutions of VGG and ResNet, 3×3 and 1×1), ``networks``, both compact with
0 to 90 % of the columns pruned; ``training`` (a training step with SPP, what SPP adds to it, an
update of p, a step of Lightning's Trainer).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.arguments import Options, make_parser
from harness.context import commit_of, context
from harness.results import Results, markdown_table
from harness.rounds import orders, ratio
from harness.workloads import LAYERS, NETWORKS, POINTWISE, RATIOS, layer

MOST_APART = 1e-3  # outputs, over the largest one
PAUSE = 0.005  # seconds before a turn, in which the other process' threads fall asleep
WORKER = Path(__file__).with_name("versus_worker.py")
PARTS = ("layers", "networks", "training")
TRAINING = {  # kinds of rows of the worker
    "step": "a training step with SPP",
    "pruner": "what SPP adds to a step",
    "update": "an update of p",
}

Row = dict[str, Any]


class Checkout:
    """A process that has imported the package of one checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        if not list(self.folder.glob("spp_lightning/native/*.so")):
            raise ValueError(f"`{folder}` must be a checkout with its library built.")
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
        )

    def __enter__(self) -> Checkout:
        about = self._answer()
        assert Path(about["package"]).parent == self.folder
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # closes its input, at which it ends

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process of `{self.folder}` ended; its error stands above.")
        answer: dict[str, Any] = json.loads(line)
        return answer


def rows(parts: list[str], quick: bool) -> Iterator[Row]:
    """What there is to measure, for one number of threads."""
    ratios = (0.75,) if quick else RATIOS
    if "layers" in parts:
        for number, shape in enumerate((*LAYERS, *POINTWISE)):
            for batch in (1,) if quick else (1, 8):
                name = layer(shape, batch)[0]
                for share in ratios:
                    row = {"kind": "layer", "arguments": [number, batch, share]}
                    yield row | {"name": f"{name}, R = {share:g}"}
    if "networks" in parts:
        for name in NETWORKS:
            for share in ratios:
                row = {"kind": "network", "arguments": [name, share]}
                yield row | {"name": f"{name}, R = {share:g}"}
    if "training" in parts:
        for name in ("ConvNet", "ResNet-18"):
            for kind, what in TRAINING.items():
                yield {"kind": kind, "arguments": [name], "name": f"{name}, {what}"}
        yield {
            "kind": "fit",
            "arguments": ["ConvNet"],
            "name": "ConvNet, a step in a Trainer with SPPCallback",
        }


def measure(row: Row, checkouts: dict[str, Checkout], rounds: int) -> Row:
    """A row's times in both checkouts, its ratio, and whether the outputs agree."""
    request = {key: row[key] for key in ("kind", "arguments", "threads")}
    built = {name: checkout.ask(**request) for name, checkout in checkouts.items()}
    repeats = max(answer["repeats"] for answer in built.values())
    times: dict[str, list[float]] = {name: [] for name in checkouts}
    for order in orders(list(checkouts), rounds):
        for name in order:
            time.sleep(PAUSE)
            times[name].append(checkouts[name].ask(turn=repeats)["ms"])
    largest = max(map(abs, built["old"]["sample"])) or 1.0
    pairs = zip(built["new"]["sample"], built["old"]["sample"], strict=True)
    low, middle, high = ratio(times["new"], times["old"])
    return {
        "name": row["name"],
        "threads": row["threads"],
        "old_ms": statistics.median(times["old"]),
        "new_ms": statistics.median(times["new"]),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "difference": max(abs(a - b) for a, b in pairs) / largest,
    }


def measure_up_to_thrice(row: Row, checkouts: dict[str, Checkout], options: Options) -> Row:
    """A row measured until it isn't over the limit, thrice at most; with the earlier ratios."""
    earlier: list[float] = []
    while True:
        found = measure(row, checkouts, options.rounds)
        if found["ratio"] <= options.most or len(earlier) == 2:
            return found | {"earlier_ratios": earlier}
        earlier.append(found["ratio"])


def line(row: Row, most: float) -> list[str]:
    """A row's cells."""
    low, high = row["ratio_quartiles"]
    earlier = ", ".join(f"{value:.3f}" for value in row["earlier_ratios"])
    return [
        row["name"],
        str(row["threads"]),
        f"{row['old_ms']:.4g} ms",
        f"{row['new_ms']:.4g} ms",
        f"{row['ratio']:.3f} ({low:.3f} … {high:.3f})",
        earlier + (" **slower**" if row["ratio"] > most else ""),
        f"{row['difference']:.0e}" if row["difference"] else "0",
    ]


def report(rows: list[Row], most: float) -> str:
    """Rows as Markdown: those that are slower, then a summary, then all."""
    slower = [row for row in rows if row["ratio"] > most]
    again = sum(bool(row["earlier_ratios"]) for row in rows)
    ratios = sorted(row["ratio"] for row in rows)
    names = "".join(f"\n- {row['name']}, {row['threads']} threads" for row in slower)
    head = [
        "row",
        "threads",
        "old",
        "new",
        "new / old (quartiles)",
        "measured before",
        "difference",
    ]
    return (
        "# Two versions in turns\n\n"
        f"{len(slower)} of {len(rows)} rows are slower by more than {most - 1:.0%}; {again} rows"
        f" were over that at first and were built and measured anew, up to twice.\n{names}\n"
        f"Ratios: smallest {ratios[0]:.3f}, median {statistics.median(ratios):.3f}, largest"
        f" {ratios[-1]:.3f}. `before` are ratios over the limit that were measured anew; the"
        " difference is that of the outputs, over the largest one.\n\n"
        + markdown_table(head, (line(row, most) for row in rows))
    )


def main() -> int:
    """Measure all rows, those over the limit again, and save if asked to."""
    parser = make_parser(__doc__, rounds=15, quick_rounds=5, threads=[1, 2])
    parser.add_argument("old", type=Path, help="the older checkout, with its library built")
    parser.add_argument("--name", default="before", help="of the results, versus_NAME")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--most", type=float, default=1.05, help="largest ratio (default 1.05)")
    options = parser.parse_args()
    about = context("lightning", old_commit=commit_of(options.old), rounds=options.rounds)
    wanted = [
        row | {"threads": threads}
        for threads in options.threads
        for row in rows(options.only, options.quick)
    ]
    measured = []
    with Checkout(options.old) as old, Checkout(WORKER.parents[1]) as new:
        for row in wanted:
            found = measure_up_to_thrice(row, {"old": old, "new": new}, options)
            measured.append(found | {"context": about})
            print(" | ".join(line(measured[-1], options.most)), flush=True)
    if options.save:
        stem = f"versus_{options.name}"
        Results(stem, lambda rows: report(rows, options.most)).replace(measured)
    print(report(measured, options.most).split("\n|")[0])
    return int(
        any(row["ratio"] > options.most or row["difference"] > MOST_APART for row in measured)
    )


if __name__ == "__main__":
    sys.exit(main())
