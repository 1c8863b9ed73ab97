"""What the three fuzzers share: a failure, and the search for a smaller case that fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

from spp_lightning.compaction.kernels.cpu import cost

__all__ = ["Failure", "any_kernel", "shrink"]

Case = TypeVar("Case")


class Failure(Exception):
    """What must hold doesn't."""


@contextmanager
def any_kernel(seed: int) -> Iterator[None]:
    """Let chance choose kernels, chains and layers, where the cost model would: all are reached."""
    r, choose, choose_chain = random.Random(seed), cost.choose, cost.choose_chain

    def any_config(*args: Any) -> cost.Choice:
        best = choose(*args)
        spec, _, _, dtype, threads, *_ = args
        return best._replace(config=r.choice(cost.candidates(best.config, spec, dtype, threads)))

    def any_chain(layers: Any, shape: Any, threads: int) -> cost.ChainChoice:
        best = choose_chain(layers, shape, threads)
        return best._replace(threads=r.choice([0, 1, threads])) if best.possible else best

    with mock.patch.multiple(
        cost,
        choose=any_config,
        choose_chain=any_chain,
        dense_us=lambda *_: r.choice([0.0, 1e9, 1e9]),
    ):
        yield


def shrink(
    case: Case,
    smaller: Callable[[Case], Iterable[Case]],
    fails: Callable[[Case], bool],
    most: int = 500,
) -> Case:
    """A case that fails like ``case``, and of which no smaller one does.

    Args:
        case: A case that fails.
        smaller: The cases that are a little smaller than one.
        fails: Whether a case fails.
        most: How many cases to try.

    >>> less = lambda x: (x[:i] + x[i + 1 :] for i in range(len(x)))
    >>> shrink([3, 1, 7, 2], less, lambda x: 7 in x)
    [7]
    """
    tried, found = 0, True
    while found and tried < most:
        found = False
        for candidate in smaller(case):
            tried += 1
            if tried >= most:
                break
            if fails(candidate):
                case, found = candidate, True
                break
    return case
