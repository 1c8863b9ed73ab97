"""Contenders timed in turns, so that what slows one slows all."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

__all__ = ["in_turns", "keep_freed_memory", "now", "quantiles", "ratio", "repeats_of", "turn_ms"]

TURN = 0.02  # seconds of a turn, at least
PAUSE = 0.01  # seconds before a turn, in which the last contender's threads fall asleep

Call = Callable[[], Any]
Clock = Callable[[], float]  # seconds


def now() -> float:
    """Seconds, when a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def orders(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """An order of the names per round: who comes first, and who before whom, changes.

    >>> list(orders(["a", "b", "c"], 3))
    [['c', 'b', 'a'], ['b', 'c', 'a'], ['b', 'a', 'c']]
    """
    for turn in range(rounds):
        shift = turn % len(names)
        order = [*names[shift:], *names[:shift]]
        yield order if turn % 2 else order[::-1]


def repeats_of(call: Call, seconds: float = TURN) -> int:
    """How many calls take ``seconds``; at least 1. Calls twice."""
    call()
    start = now()
    call()
    return max(1, round(seconds / (now() - start)))


def turn_ms(call: Call, repeats: int, untimed: int = 1, clock: Clock = now) -> float:
    """Milliseconds of a call: the mean of some, after ``untimed`` ones that warm the caches."""
    for _ in range(untimed):
        call()
    start = clock()
    for _ in range(repeats):
        call()
    return 1000 * (clock() - start) / repeats


def in_turns(calls: Mapping[str, Call], rounds: int, clock: Clock = now) -> dict[str, list[float]]:
    """Milliseconds of a call, one number per contender and round.

    With ``time.process_time`` as the clock they are of the CPU: for one thread, on a machine that
    does other work, too.
    """
    repeats = {name: repeats_of(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for order in orders(list(calls), rounds):
        for name in order:
            time.sleep(PAUSE)
            times[name].append(turn_ms(calls[name], repeats[name], clock=clock))
    return times


def quantiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """20 %, 50 % and 80 % of some times.

    >>> quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    {'p20': 2.0, 'p50': 3.5, 'p80': 5.0}
    """
    cuts = statistics.quantiles(milliseconds, n=5, method="inclusive")
    p50 = statistics.median(milliseconds)
    return {"p20": round(cuts[0], 4), "p50": round(p50, 4), "p80": round(cuts[3], 4)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios within a round.

    >>> ratio([2.0, 6.0, 12.0], [1.0, 2.0, 3.0])
    [2.5, 3.0, 3.5]
    """
    shares = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.quantiles(shares, n=4, method="inclusive")


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep freed memory; False where malloc is another.

    Otherwise glibc hands large outputs back to the system call by call, or doesn't, depending on
    who came before. Who gets new pages pays for them, up to as much time again as for computing.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    most = 2**25  # the largest mmap threshold that there is
    return mallopt is not None and all(
        [mallopt(trim_threshold, 2**30), mallopt(mmap_threshold, most)]
    )
