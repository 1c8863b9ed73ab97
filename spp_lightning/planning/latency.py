"""The latency of trial networks: of all of one, and of each layer over its ratio."""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spp_lightning.compaction.pipeline import compact
from spp_lightning.compaction.timing import interleaved_ms
from spp_lightning.method.selection import is_convolution

__all__ = ["Bench", "LayerTimes", "layer_times", "on_device", "using_threads"]

_ROUNDS = 60  # of a network: more than elsewhere, since targets are reached to within 3 %
_TURN = 0.003  # least seconds of a turn
_LAYER_ROUNDS = 20
_LAYER_BUDGET = 3.0  # seconds
_LEAST_ROUNDS = 5

Inputs = tuple[Tensor, ...]


@contextlib.contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Let torch use this many CPU threads inside of the block; None: as many as before."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_device(device: str | torch.device | None, like: nn.Module) -> torch.device:
    """The device to measure on: the given one, or the one of a network's first parameter.

    Raises:
        ValueError: If there is no such device here.
    """
    if device is None:
        tensor = next(iter(like.parameters()), torch.empty(0))
        return tensor.device
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each backend raises its own
        raise ValueError(
            f"`device` (={str(device)!r}) must be a device of this machine, to measure a latency"
            f" on it: {str(error).splitlines()[0]}"
        ) from error
    return torch.device(device)


class Bench:
    """Measures compact networks in turns with the unpruned one.

    The dense latency is that of ``compact(model)`` for the unpruned network. Every other latency is
    measured in turns with it and scaled to it: a change of the processor's speed does not count.

    Args:
        model: The unpruned network, on the device of ``inputs``; left as it was.
        inputs: The positional arguments.

    Attributes:
        inputs: The positional arguments.
        dense_ms: Milliseconds of the unpruned network.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.inputs = inputs
        self._dense = self.compacted(model)
        self.dense_ms = 0.0
        self.dense_ms = self._in_turns(self._dense)[0]

    def compacted(self, trial: nn.Module) -> nn.Module:
        """What ``compact`` makes of a network; what it warns of shows in the latency."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compact(trial, self.inputs)

    def ms(self, network: nn.Module) -> float:
        """Milliseconds of a compact network for the inputs, on the scale of ``dense_ms``."""
        dense_ms, ms = self._in_turns(self._dense, network)
        return self.dense_ms * ms / dense_ms

    def _in_turns(self, *networks: nn.Module) -> list[float]:
        with torch.no_grad():
            calls = [partial(x, *self.inputs) for x in networks]
            return interleaved_ms(calls, _ROUNDS, _TURN, _clock(self.inputs))


class LayerTimes(NamedTuple):
    """Milliseconds of a network's parts, at several ratios.

    Attributes:
        ratios: The ratios, ascending; the first is 0.
        layers: By pruned layer, milliseconds at each of the ratios. They include what stands
            behind the layer (norms, activations), and the depthwise convolutions in front of it,
            whose channels go with the layer's columns.
        rest: Milliseconds of all else, at each of the ratios.
        whole: Milliseconds of the network, at each of the ratios.
    """

    ratios: tuple[float, ...]
    layers: dict[str, NDArray[np.float64]]
    rest: NDArray[np.float64]
    whole: tuple[float, ...]


def layer_times(
    names: Sequence[str],
    networks: Sequence[tuple[float, nn.Module, float]],
    inputs: Inputs,
) -> LayerTimes:
    """Measure the layers of compact networks that are pruned at several ratios.

    Args:
        names: Names of the pruned layers.
        networks: A ratio, the compact network with all layers at this ratio, and its milliseconds;
            by ascending ratio.
        inputs: The networks' arguments.
    """
    rows: dict[str, list[float]] = {name: [] for name in names}
    rest = []
    for _, network, ms in networks:
        measured, whole = _module_ms(network, inputs)
        scale = ms / whole  # the hooks take time, and layers in a row are one call without them
        owners = _owners(network, list(measured), set(names))
        sums = dict.fromkeys(names, 0.0)
        for module, milliseconds in measured.items():
            owner = owners[module]
            if owner is not None:
                sums[owner] += scale * milliseconds
        for name, milliseconds in sums.items():
            rows[name].append(milliseconds)
        rest.append(max(ms - sum(sums.values()), 0.0))
    # A layer at a higher ratio computes less: what looks slower is noise.
    layers = {name: np.minimum.accumulate(np.array(row)) for name, row in rows.items()}
    ratios, _, whole_ms = zip(*networks, strict=True)
    return LayerTimes(ratios, layers, np.array(rest), whole_ms)


def _module_ms(network: nn.Module, inputs: Inputs) -> tuple[dict[str, float], float]:
    """Median milliseconds of every module without children, in the order of the calls; of all."""
    calls: dict[str, float] = {}
    begin = 0.0
    clock = _clock(inputs)

    def before(*_: Any) -> None:
        nonlocal begin
        _wait(inputs)
        begin = clock()

    def after(name: str, *_: Any) -> None:
        _wait(inputs)
        calls[name] = calls.get(name, 0.0) + clock() - begin

    leaves = {name: x for name, x in network.named_modules() if not list(x.children())}
    hooks = [x.register_forward_pre_hook(before) for x in leaves.values()]
    hooks += [x.register_forward_hook(partial(after, name)) for name, x in leaves.items()]
    rounds: list[tuple[dict[str, float], float]] = []
    try:
        with torch.no_grad():
            for _ in range(2):
                network(*inputs)
            start = time.perf_counter()
            while len(rounds) < _LAYER_ROUNDS and (
                len(rounds) < _LEAST_ROUNDS or time.perf_counter() - start < _LAYER_BUDGET
            ):
                calls.clear()
                first = clock()
                network(*inputs)
                _wait(inputs)
                rounds.append((dict(calls), clock() - first))
    finally:
        for hook in hooks:
            hook.remove()
    whole = statistics.median(seconds for _, seconds in rounds)
    names = rounds[0][0]
    return {
        name: 1e3 * statistics.median(seconds[name] for seconds, _ in rounds) for name in names
    }, 1e3 * whole


def _owners(network: nn.Module, order: list[str], pruned: set[str]) -> dict[str, str | None]:
    """To which pruned layer the time of each module counts.

    What follows a pruned layer counts to it, up to the next convolution. A convolution that isn't
    pruned itself, such as a depthwise one, and what follows it, count to the next pruned layer:
    they compute the channels that this one reads.
    """
    owners: dict[str, str | None] = {}
    current: str | None = None
    waiting: list[str] = []
    for name in order:
        if name in pruned:
            current = name
            owners |= dict.fromkeys([*waiting, name], name)
            waiting = []
        elif waiting or is_convolution(network.get_submodule(name)):
            waiting.append(name)
        else:
            owners[name] = current
    return owners | dict.fromkeys(waiting, current)


def _clock(inputs: Inputs) -> Callable[[], float]:
    """The clock of a latency.

    One thread on a CPU is timed by its own processor time, which other programs do not stretch.
    """
    alone = inputs[0].is_cpu and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def _wait(inputs: Inputs) -> None:
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
