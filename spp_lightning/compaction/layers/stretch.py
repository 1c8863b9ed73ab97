"""Compact layers, and what stands between them, in a row as one call of the CPU kernels.

Between two calls Python takes longer than a small layer. So a stretch is prepared when all that is
called in it has been called: then one pass over the modules says whether they are what they were,
and one call runs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn

from spp_lightning.compaction.kernels.cpu import autotune
from spp_lightning.compaction.kernels.cpu.call_list import CallList, CallListMaker
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.kernels.cpu.tables import ShapeTable
from spp_lightning.compaction.layers.stretch_between import prepared_between
from spp_lightning.compaction.layers.stretch_int8 import INT8_KINDS, prepared_int8
from spp_lightning.compaction.layers.stretch_linear import prepared_linear
from spp_lightning.compaction.layers.stretch_parts import Part, Path, Prepared
from spp_lightning.compaction.layers.stretch_rows import prepared_row
from spp_lightning.compaction.layers.unwatched import is_eager, is_hooked, is_plain, is_readable

__all__ = ["Stretch"]

_Modules = dict[str, nn.Module | None]
_Edge = tuple[_Modules, str, nn.Module]  # a module's children, and the name of one of them


class _State:
    """What is prepared of a stretch. It never changes, but for the lists, which follow from it."""

    def __init__(self, root: _Modules, edges: Sequence[_Edge], parts: Sequence[Prepared]) -> None:
        self._root, self._edges, self.parts = root, tuple(edges), tuple(parts)
        self.lists: ShapeTable[tuple[CallList | None]] = ShapeTable()

    def holds(self, network: nn.Module) -> bool:
        """Whether all modules are in their places, and what they were."""
        if self._root is not network._modules:
            return False
        for parent, name, child in self._edges:  # loops: `all` takes longer
            if parent.get(name) is not child:
                return False
        for part in self.parts:  # noqa: SIM110
            if not part.holds():
                return False
        return True


class Stretch:
    """Parts in a row, of which only the last one's result is read elsewhere.

    Args:
        parts: The parts, two or more.
        inputs: Names of what they read and don't make.
    """

    def __init__(self, parts: Sequence[Part], inputs: Sequence[int]) -> None:
        self._parts, self._inputs = tuple(parts), tuple(inputs)
        self._state: _State | None = None

    @property
    def num_prepared(self) -> int:
        """For how many input shapes something is prepared, at most 32."""
        return 0 if self._state is None else len(self._state.lists)

    def run(self, network: nn.Module, args: Sequence[Tensor | None]) -> Tensor | None:
        """Run the parts by one call.

        Args:
            network: Whose modules the parts are.
            args: The inputs; None stands for a residual that isn't there.

        Returns:
            The last part's result, the same bit for bit as the parts give one by one; None where
            they must be called one by one, since somebody wants to see them, or they aren't
            prepared yet.
        """
        if is_hooked() or not is_eager() or not is_available():
            return None
        given = [x for x in args if x is not None]
        records = is_grad_enabled()
        for x in given:
            if not (is_readable(x) or _is_uint8(x)) or (records and x.requires_grad):
                return None
            if not x.numel():
                return None
        state = self._state
        if state is None or not state.holds(network):
            state = self._prepare(network)
            if state is None or not state.holds(network):
                return None
            self._state = state
        threads = torch.get_num_threads()
        sizes = [(x.shape, x.dtype) for x in given]
        key = (threads, autotune.generation(), *sizes)
        found = state.lists.get(key)
        if found is None:
            found = state.lists.put(key, (self._make(state, args, threads),))
        (calls,) = found
        return None if calls is None else calls(given)

    def _prepare(self, network: nn.Module) -> _State | None:
        """What the modules have prepared by now; None if that isn't all."""
        edges: dict[tuple[int, str], _Edge] = {}

        def module(path: Path) -> Any:
            found = network
            for name in path:
                parent, child = found._modules, found._modules[name]
                assert child is not None, path
                edges[id(parent), name] = (parent, name, child)
                found = child
            return found

        parts = []
        for part in self._parts:
            other = None if part.other is None else module(part.other)
            layers = [module(path) for path in part.layers]
            found = _prepared(part, layers, other)
            if found is None:
                return None
            parts.append(found)
        return _State(network._modules, list(edges.values()), parts)

    def _make(self, state: _State, args: Sequence[Tensor | None], threads: int) -> CallList | None:
        """The calls for inputs of these shapes; None if a shape doesn't fit."""
        pairs = zip(self._inputs, args, strict=True)
        shapes: dict[Hashable, tuple[int, ...]] = {
            name: tuple(x.shape) for name, x in pairs if x is not None
        }
        given = zip(self._inputs, args, strict=True)
        uint8 = {name for name, x in given if x is not None and x.dtype is torch.uint8}
        maker = CallListMaker(shapes, self._parts[-1].out, uint8)
        times = Counter(name for part in self._parts for name in part.args)
        # Which part reads a result that is read once, as the input.
        readers = {
            part.args[0]: found
            for part, found in zip(self._parts, state.parts, strict=True)
            if times[part.args[0]] == 1
        }
        try:
            for part, found in zip(self._parts, state.parts, strict=True):
                found.add(part, maker, threads, readers.get(part.out))
                for name in part.free:
                    maker.free(name)
        except ValueError:  # the module that is called says it better
            return None
        return maker.made()


def _prepared(part: Part, layers: Sequence[Any], other: nn.Module | None) -> Prepared | None:
    """What the modules of a part have prepared by now; None if that isn't all."""
    if part.kind == "linear":
        assert other is not None
        return prepared_linear(other)
    if part.kind != "row":
        return prepared_between(part, layers, other)
    if type(layers[0]) in INT8_KINDS:
        return prepared_int8(layers[0])
    return prepared_row(layers, other)


def _is_uint8(x: Tensor) -> bool:
    """Whether the int8 kernels can read a tensor."""
    return type(x) is Tensor and x.dtype is torch.uint8 and x.is_cpu and is_plain(x)
