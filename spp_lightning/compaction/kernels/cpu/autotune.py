"""Measures calls against each other, where a network is tuned on the device that runs it.

Nothing here runs unless somebody asks for it: by itself every choice follows from the cost model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

__all__ = ["generation", "milliseconds", "note_choice"]

_ROUNDS = 30
_LEAST_ROUNDS = 5
_SECONDS = 0.05  # of all rounds, where _LEAST_ROUNDS take less


_choices = [0]


def generation() -> int:
    """How many choices were made: what was prepared before the last one may be out of date."""
    return _choices[0]


def note_choice() -> None:
    """Note that what a layer or a chain is to use was chosen by a measurement."""
    _choices[0] += 1


def milliseconds(functions: Sequence[Callable[[], object]]) -> list[float]:
    """The first quartile of a function's times, for functions that take turns.

    Not the median, since other programs may hold up all but a few turns; nor the shortest time,
    since threads that wait for each other rarely have such luck.

    >>> slow, fast = milliseconds([lambda: time.sleep(0.002), lambda: None])
    >>> fast < slow
    True
    """
    taken: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    start = time.perf_counter()
    while len(taken[0]) < _LEAST_ROUNDS or (
        len(taken[0]) < _ROUNDS and time.perf_counter() - start < _SECONDS
    ):
        for function, times in zip(functions, taken, strict=True):
            begin = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - begin))
    return [statistics.quantiles(times, n=4)[0] for times in taken]
