"""A network beside its compact one: outputs, and the time that both take."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Times", "difference", "fastest", "interleaved_ms", "measure"]

_ROUNDS = 30
_BUDGET = 4.0  # seconds, after which there are no more rounds than _LEAST
_LEAST = 5
_CHOICE = 0.002  # seconds that a choice takes, where _LEAST turns take less
_TURN = 0.01  # seconds of a turn, at least: shorter ones measure the clock


class Times(NamedTuple):
    """Median milliseconds per batch."""

    batch: int
    dense_ms: float
    compact_ms: float

    @property
    def speedup(self) -> float:
        """How many times as fast the compact network is."""
        return self.dense_ms / self.compact_ms


def difference(model: nn.Module, fast: nn.Module, x: Tensor) -> float:
    """The largest difference between two networks' outputs, as a share of the largest output.

    Args:
        model: A network whose output for ``x`` is a tensor.
        fast: Another one.
        x: Input of both.

    Raises:
        ValueError: If an output isn't a tensor, or the shapes differ.

    >>> difference(nn.Identity(), nn.Hardtanh(), torch.tensor([1.0, -4.0]))
    0.75
    """
    with torch.no_grad():
        expected, found = model.eval()(x), fast.eval()(x)
    if not isinstance(expected, Tensor) or expected.shape != getattr(found, "shape", None):
        raise ValueError(
            f"`model` and `fast` must output tensors of one shape, got {type(expected).__name__}"
            f" {getattr(expected, 'shape', '')} and {type(found).__name__}"
            f" {getattr(found, 'shape', '')}."
        )
    largest = float(expected.abs().max())
    return float((found - expected).abs().max()) / largest if largest else float(found.abs().max())


def measure(model: nn.Module, fast: nn.Module, shape: tuple[int, ...], batch: int) -> Times:
    """Time a network and its compact one side by side, on the CPU.

    The network is timed with NCHW and with channels-last weights and inputs; the faster one counts.

    Args:
        model: The network; left as it was.
        fast: The compact network.
        shape: Of one input, ``(C, H, W)``.
        batch: Inputs at a time.
    """
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    functions = [partial(fast, x)]
    for layout in (torch.contiguous_format, torch.channels_last):
        dense = copy.deepcopy(model).eval().to(memory_format=layout)  # type: ignore[call-overload]
        if hasattr(dense, "channels_last"):  # ConvNet lays out its input itself
            dense.channels_last = layout == torch.channels_last  # type: ignore[assignment]
        functions.append(partial(dense, x.contiguous(memory_format=layout)))
    with torch.no_grad():
        compact_ms, *dense_ms = interleaved_ms(functions)
    return Times(batch, min(dense_ms), compact_ms)


def interleaved_ms(
    functions: Sequence[Callable[[], object]], rounds: int = _ROUNDS, turn: float = _TURN
) -> list[float]:
    """Median milliseconds of functions that take turns, so that what slows one slows all.

    Args:
        functions: What to time; each is called twice before.
        rounds: Turns of each, at most.
        turn: Seconds of a turn, at least; 0 for a single call.

    >>> short, long = interleaved_ms([lambda: None, lambda: time.sleep(0.01)])
    >>> short < 1 and 10 < long
    True
    """
    repeats = []
    for function in functions:
        function()
        _wait()
        start = time.perf_counter()
        function()
        _wait()
        repeats.append(1 + int(turn / (time.perf_counter() - start + 1e-9)))
    turns: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    for i in range(rounds):
        if i >= _LEAST and time.perf_counter() - start > _BUDGET:
            break
        for function, count, milliseconds in zip(functions, repeats, turns, strict=True):
            begin = time.perf_counter()
            for _ in range(count):
                function()
            _wait()
            milliseconds.append(1000 * (time.perf_counter() - begin) / count)
    return [statistics.median(milliseconds) for milliseconds in turns]


def fastest(functions: Sequence[Callable[[], object]]) -> int:
    """Which of some functions takes the least time, by the first quartile of a few turns of each.

    Not the median, since other programs may hold up all but a few turns; nor the shortest one,
    since threads that wait for each other rarely have such luck.

    >>> fastest([lambda: time.sleep(0.002), lambda: None])
    1
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    start = time.perf_counter()
    while len(seconds[0]) < _LEAST or (
        len(seconds[0]) < _ROUNDS and time.perf_counter() - start < _CHOICE
    ):
        for function, taken in zip(functions, seconds, strict=True):
            begin = time.perf_counter()
            function()
            taken.append(time.perf_counter() - begin)
    quartiles = [statistics.quantiles(taken, n=4)[0] for taken in seconds]
    return quartiles.index(min(quartiles))


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
