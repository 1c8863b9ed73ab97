"""Two networks compared: their outputs, and the time that they take."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Times", "difference", "interleaved_ms", "measure"]

_ROUNDS = 30
_BUDGET = 4.0  # seconds after which no round begins, once there were _LEAST
_LEAST = 5  # rounds
_TURN = 0.01  # least seconds of a turn: shorter ones measure the clock


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
    """The largest difference between the outputs of two networks, over the largest output.

    Args:
        model: A network whose output for ``x`` is a tensor.
        fast: Another network.
        x: Input of both.

    Returns:
        A number without a unit; 0 for equal outputs.

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
    """Time a network and its compact network in turns, on the CPU.

    The dense network is timed twice, in NCHW and channels-last; the faster layout counts.

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
    functions: Sequence[Callable[[], object]],
    rounds: int = _ROUNDS,
    turn: float = _TURN,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median milliseconds per call of functions that take turns: what slows one slows all.

    Args:
        functions: What to time; each is called twice before.
        rounds: Most turns of each function.
        turn: Least seconds of a turn; 0 for a single call.
        clock: Seconds since some moment. With ``time.thread_time`` what other programs do meanwhile
            does not count; nor does work in other threads.

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
            begin = clock()
            for _ in range(count):
                function()
            _wait()
            milliseconds.append(1000 * (clock() - begin) / count)
    return [statistics.median(milliseconds) for milliseconds in turns]


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
