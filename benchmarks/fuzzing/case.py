"""What the three fuzzers share: a failure, and the search for a smaller case that fails."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

__all__ = ["Failure", "any_kernel", "shrink"]

Case = TypeVar("Case")


class Failure(Exception):
    """What must hold doesn't."""


@contextmanager
def any_kernel(seed: int) -> Iterator[None]:
    """Let chance choose where kernels would be timed: faster, and it reaches all of them."""
    r = random.Random(seed)

    def choose(functions: list[Any]) -> int:
        for function in functions:
            function()
        return r.randrange(len(functions))

    with mock.patch.multiple("spp_lightning.compaction.timing", fastest=choose):
        timed = [
            module
            for name, module in sys.modules.items()
            if name.startswith("spp_lightning.compaction.kernels") and hasattr(module, "fastest")
        ]
        patches = [mock.patch.object(module, "fastest", choose) for module in timed]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


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
