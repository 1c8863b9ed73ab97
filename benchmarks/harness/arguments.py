"""The options that every benchmark has."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["Options", "each_thread_count", "make_parser", "quiet"]


class Options(argparse.Namespace):
    """Parsed options: ``threads``, ``rounds``, ``quick``, ``save``, and a benchmark's own."""

    threads: list[int]
    rounds: int
    quick: bool
    save: bool


class Parser(argparse.ArgumentParser):
    """A parser whose ``rounds`` follow ``--quick`` where they aren't given."""

    def __init__(self, *args: Any, rounds: int, quick_rounds: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.usual_rounds = {False: rounds, True: quick_rounds}

    def parse_args(self, args: Sequence[str] | None = None) -> Options:  # type: ignore[override]
        """Parse the command line, or ``args``."""
        options = super().parse_args(args, Options())
        if options.rounds is None:
            options.rounds = self.usual_rounds[options.quick]
        if options.rounds < 2:
            self.error(f"`--rounds` must be at least 2, got {options.rounds}.")
        return options


def make_parser(
    doc: str | None, *, rounds: int, quick_rounds: int = 3, threads: list[int] | None = None
) -> Parser:
    """A parser with ``--threads``, ``--rounds``, ``--quick`` and ``--save``.

    Args:
        doc: The script's docstring, whose first line describes the command.
        rounds: How many rounds are measured by default.
        quick_rounds: And with ``--quick``.
        threads: Default numbers of threads; torch's if None.
    """
    first = (doc or "").splitlines()[0]
    parser = Parser(description=first, rounds=rounds, quick_rounds=quick_rounds)
    usual = threads or [torch.get_num_threads()]
    parser.add_argument(
        *("--threads", "-t"), type=int, nargs="+", default=usual, help="of the CPU, one or several"
    )
    parser.add_argument("--rounds", type=int, help=f"default {rounds}; {quick_rounds} if quick")
    parser.add_argument("--quick", action="store_true", help="less to measure, to see that it runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    return parser


def each_thread_count(options: Options) -> Iterator[int]:
    """Each number of threads asked for; torch computes with it meanwhile."""
    for threads in options.threads:
        torch.set_num_threads(threads)
        yield threads


def quiet() -> None:
    """Silence what Lightning, the exporters and torch.compile say to short runs."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
