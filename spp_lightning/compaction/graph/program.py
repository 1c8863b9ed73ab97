"""Steps compiled to a program: a flat list of instructions over numbered slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from spp_lightning.compaction.epilogue import Clamp, PlaneOp
from spp_lightning.compaction.graph.between import Call, Combination, Gate, GlobalPool
from spp_lightning.compaction.graph.heads import FlatLinear
from spp_lightning.compaction.graph.join import Row
from spp_lightning.compaction.graph.pools import PlanePool
from spp_lightning.compaction.graph.steps import Step, Value, values_in
from spp_lightning.compaction.layers.between import channel_gate, channel_means, concat_norm
from spp_lightning.compaction.layers.chain import column_chain
from spp_lightning.compaction.layers.flat_linear import flat_linear
from spp_lightning.compaction.layers.pools import pool_planes

__all__ = [
    "REQUIRED",
    "Instruction",
    "Program",
    "compile_steps",
    "find",
    "picker",
    "run_concat",
    "run_gate",
    "run_head",
    "run_layer",
    "run_means",
    "run_norm",
    "run_pool",
    "run_row",
    "run_sum",
]

REQUIRED = object()  # default value of an input that has none

Run = Callable[[nn.Module, Any, Sequence[Any], dict[str, Any]], Any]


class Instruction(NamedTuple):
    """A call.

    Attributes:
        run: What makes the call: a function of the network, ``target``, and the arguments.
        target: What is called.
        args: Slots of the positional arguments.
        pick: Reads the positional arguments from the slots.
        kwargs: Names and slots of the keyword arguments.
        out: Slot of the result.
        free: Slots that no later instruction reads.
    """

    run: Run
    target: Any
    args: tuple[int, ...]
    pick: Callable[[Any], tuple[Any, ...]]
    kwargs: tuple[tuple[str, int], ...]
    out: int
    free: tuple[int, ...]


class Program(NamedTuple):
    """A network's instructions.

    Attributes:
        inputs: Names of the inputs, which are the first slots.
        defaults: Their defaults, :data:`REQUIRED` where there is none.
        others: The slots behind them before the first instruction: constants, and None.
        instructions: The calls, in order.
        output: Slot of the network's result.
    """

    inputs: tuple[str, ...]
    defaults: tuple[Any, ...]
    others: tuple[Any, ...]
    instructions: tuple[Instruction, ...]
    output: int


def compile_steps(
    steps: Sequence[Step], rows: Sequence[Row] = (), between: Sequence[Call | FlatLinear] = ()
) -> Program:
    """The program of a network.

    Args:
        steps: The network.
        rows: Layers that one call is to compute.
        between: Steps between layers that one call is to compute.
    """
    return _Compiler(steps, rows, between).program()


def find(network: nn.Module, path: tuple[str, ...]) -> Any:
    """The module at a path, read from the modules' own dicts: as attributes they take longer."""
    module: Any = network
    for part in path:
        module = module._modules[part]
    return module


def run_layer(network: nn.Module, target: tuple[str, ...], args: Sequence[Any], kwargs: Any) -> Any:
    """Call the layer at a path."""
    return find(network, target)(*args, **kwargs)


def _tensor(network: nn.Module, target: tuple[str, ...], args: Sequence[Any], kwargs: Any) -> Any:
    return getattr(find(network, target[:-1]), target[-1])


def _function(network: nn.Module, target: Any, args: Sequence[Any], kwargs: Any) -> Any:
    return target(*args, **kwargs)


_SELF = (Tensor, torch.Size, fx.Proxy)
_NOBODY = nn.Module()  # in the place of a network, for calls that don't read it


def _method(network: nn.Module, target: str, args: Sequence[Any], kwargs: Any) -> Any:
    value, *others = args
    if not isinstance(value, _SELF):
        raise TypeError(f"A network calls methods of tensors only, not {target!r} of {value!r}.")
    return getattr(value, target)(*others, **kwargs)


class _Joined(NamedTuple):
    """What the call of a row calls.

    Attributes:
        paths: Of the compact layers, and behind them of the linear layer, if there is one.
        has_linear: Whether there is one.
        pick: Reads them all from the network's own children; None if some are further inside.
    """

    paths: tuple[tuple[str, ...], ...]
    has_linear: bool
    pick: Callable[[Any], tuple[Any, ...]] | None


def run_row(network: nn.Module, target: _Joined, args: Sequence[Any], kwargs: Any) -> Tensor:
    """Call layers in a row."""
    paths, has_linear, pick = target
    if pick is None:
        modules = tuple([find(network, path) for path in paths])
    else:
        modules = pick(network._modules)
    if has_linear:
        return column_chain(*args, *modules[:-1], linear=modules[-1])
    return column_chain(*args, *modules)


_Pool = tuple[str, ...] | Callable[[Tensor], Tensor]  # path of a module, or what calls a function


def _pool_of(network: nn.Module, pool: _Pool) -> Callable[[Tensor], Tensor]:
    return find(network, pool) if isinstance(pool, tuple) else pool  # type: ignore[no-any-return]


class _GateCall(NamedTuple):
    """What the call of a gate calls: the pool, and two layers."""

    pool: _Pool
    layers: tuple[tuple[str, ...], tuple[str, ...]]


def run_gate(network: nn.Module, target: _GateCall, args: Sequence[Any], kwargs: Any) -> Tensor:
    """Call a gate."""
    pool, (reduce, expand) = target
    return channel_gate(
        args[0], _pool_of(network, pool), find(network, reduce), find(network, expand)
    )


class _MeansCall(NamedTuple):
    """What the call of a global pool calls, and whether the result is ``(B, C, 1, 1)``."""

    pool: _Pool
    keeps: bool


def run_means(network: nn.Module, target: _MeansCall, args: Sequence[Any], kwargs: Any) -> Tensor:
    """Call a global average pool."""
    return channel_means(args[0], _pool_of(network, target.pool), target.keeps)


class _PoolCall(NamedTuple):
    """What the call of a pool calls: the module, None where it is a function, and the pool."""

    module: tuple[str, ...] | None
    op: PlaneOp


def run_pool(network: nn.Module, target: _PoolCall, args: Sequence[Any], kwargs: Any) -> Tensor:
    """Call a pool."""
    module = None if target.module is None else find(network, target.module)
    return pool_planes(args[0], target.op, module)


class _NormCall(NamedTuple):
    """What the call of a norm calls: the norm, the module that clamps, or None, and its limits."""

    norm: tuple[str, ...]
    activation: tuple[str, ...] | None
    clamp: Clamp


def run_norm(network: nn.Module, target: _NormCall, args: Sequence[Any], kwargs: Any) -> Tensor:
    """Call a norm."""
    relu = F.relu if target.activation is None else find(network, target.activation)
    return concat_norm(args, find(network, target.norm), relu, target.clamp)


def run_head(
    network: nn.Module, target: tuple[str, ...], args: Sequence[Any], kwargs: Any
) -> Tensor:
    """Call a linear layer, whose input is flattened."""
    return flat_linear(args[0], find(network, target))


def run_concat(network: nn.Module, target: None, args: Sequence[Any], kwargs: Any) -> Tensor:
    """Concatenate along the channels."""
    return torch.cat(list(args), 1)


def run_sum(network: nn.Module, target: None, args: Sequence[Any], kwargs: Any) -> Any:
    """Add two results."""
    x, y = args
    return x + y


def picker(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """A function that reads items as a tuple: of few, several times faster than a comprehension."""
    # operator.itemgetter is as fast, but torch.compile can't trace it.
    if len(keys) == 1:
        (a,) = keys
        return lambda items: (items[a],)
    if len(keys) == 2:
        a, b = keys
        return lambda items: (items[a], items[b])
    if len(keys) == 3:
        a, b, c = keys
        return lambda items: (items[a], items[b], items[c])
    if len(keys) == 4:
        a, b, c, d = keys
        return lambda items: (items[a], items[b], items[c], items[d])
    return lambda items: tuple([items[key] for key in keys])


def _list(*parts: Any) -> list[Any]:
    return list(parts)


def _tuple(*parts: Any) -> tuple[Any, ...]:
    return parts


def _dict(keys: tuple[Any, ...], *parts: Any) -> dict[Any, Any]:
    return dict(zip(keys, parts, strict=True))


class _Compiler:
    """Gives every value a slot: inputs first, then constants and results."""

    def __init__(
        self, steps: Sequence[Step], rows: Sequence[Row], between: Sequence[Call | FlatLinear]
    ) -> None:
        self._steps = steps
        self._inputs = [i for i, step in enumerate(steps) if step.kind == "input"]
        self._slots = {position: slot for slot, position in enumerate(self._inputs)}
        self._start: list[Any] = [
            step.args[0] if step.args else REQUIRED for step in steps if step.kind == "input"
        ]
        self._calls: list[Instruction] = []
        self._rows = {row.position: row for row in rows}
        self._between = {call.result: call for call in between}
        self._replaced = {position for call in (*rows, *between) for position in call.replaced}

    def program(self) -> Program:
        for position, step in enumerate(self._steps):
            if position in self._rows:
                self._add_row(self._rows[position])
            elif position in self._between:
                self._slots[position] = self._add_between(self._between[position])
            elif position not in self._replaced and step.kind not in ("input", "output"):
                self._add_step(position, step)
        output = self._slot_of(self._steps[-1].args[0])
        names = tuple(str(self._steps[i].target) for i in self._inputs)
        defaults, others = self._start[: len(names)], self._start[len(names) :]
        return Program(names, tuple(defaults), tuple(others), self._with_frees(output), output)

    def _add_step(self, position: int, step: Step) -> None:
        runs: dict[str, Run] = {
            "layer": run_layer,
            "tensor": _tensor,
            "function": _function,
            "method": _method,
        }
        target: Any = step.target
        if step.kind in ("layer", "tensor"):
            target = tuple(str(target).split("."))
        args = [self._slot_of(x) for x in step.args]
        kwargs = [(key, self._slot_of(x)) for key, x in step.kwargs.items()]
        self._slots[position] = self._add(runs[step.kind], target, args, kwargs)

    def _path(self, position: int) -> tuple[str, ...]:
        return tuple(str(self._steps[position].target).split("."))

    def _add_between(self, call: Call | FlatLinear) -> int:
        if isinstance(call, FlatLinear):
            return self._add(run_head, self._path(call.result), [self._slot_of(call.x)])
        if isinstance(call, Gate):
            layers = (self._path(call.layers[0]), self._path(call.layers[1]))
            target = _GateCall(self._pool_at(call.pool), layers)
            return self._add(run_gate, target, [self._slot_of(call.x)])
        if isinstance(call, GlobalPool):
            means = _MeansCall(self._pool_at(call.result), call.keeps)
            return self._add(run_means, means, [self._slot_of(call.x)])
        if isinstance(call, Combination):
            run: Run = run_sum if call.adds else run_concat
            return self._add(run, None, [self._slot_of(x) for x in call.parts])
        is_module = self._steps[call.result].kind == "layer"
        module = self._path(call.result) if is_module else None
        if isinstance(call, PlanePool):
            return self._add(run_pool, _PoolCall(module, call.op), [self._slot_of(call.x)])
        norm = _NormCall(self._path(call.norm), module, call.clamp)
        return self._add(run_norm, norm, [self._slot_of(x) for x in call.parts])

    def _pool_at(self, position: int) -> _Pool:
        step = self._steps[position]
        if step.kind == "layer":
            return self._path(position)
        run: Run = _method if step.kind == "method" else _function
        return lambda x: run(_NOBODY, step.target, (x, *step.args[1:]), step.kwargs)

    def _add_row(self, row: Row) -> None:
        path = self._path
        x, residual = self._steps[row.layers[0]].args[0], self._steps[row.layers[-1]].args[1:]
        args = [self._slot_of(x), self._slot_of(residual[0] if residual else None)]
        paths = tuple(path(i) for i in (*row.layers, row.linear) if i is not None)
        children = all(len(path) == 1 for path in paths)
        pick = picker([path[0] for path in paths]) if children else None
        target = _Joined(paths, row.linear is not None, pick)
        self._slots[row.result] = self._add(run_row, target, args)

    def _add(
        self, run: Run, target: Any, args: Sequence[int], kwargs: Sequence[tuple[str, int]] = ()
    ) -> int:
        out = len(self._start)
        self._start.append(None)
        call = Instruction(run, target, tuple(args), picker(args), tuple(kwargs), out, ())
        self._calls.append(call)
        return out

    def _slot_of(self, argument: Any) -> int:
        """The slot of an argument. Containers are made anew in every call."""
        if isinstance(argument, Value):
            return self._slots[argument.step]
        if isinstance(argument, slice):
            return self._collect(slice, (argument.start, argument.stop, argument.step))
        if isinstance(argument, list):
            return self._collect(_list, argument)
        if isinstance(argument, dict):
            return self._collect(_dict, (tuple(argument), *argument.values()))
        if isinstance(argument, tuple) and values_in(argument):
            named = hasattr(argument, "_fields")
            return self._collect(type(argument) if named else _tuple, argument)
        self._start.append(argument)
        return len(self._start) - 1

    def _collect(self, make: Callable[..., Any], parts: Sequence[Any]) -> int:
        return self._add(_function, make, [self._slot_of(x) for x in parts])

    def _with_frees(self, output: int) -> tuple[Instruction, ...]:
        """The instructions, each with the results that it is the last one to read."""
        made = {call.out for call in self._calls} | set(range(len(self._inputs)))
        seen, calls = {output}, list[Instruction]()
        for call in reversed(self._calls):
            used = {*call.args, *(slot for _, slot in call.kwargs), call.out} & made
            calls.append(call._replace(free=tuple(sorted(used - seen))))
            seen |= used
        return tuple(reversed(calls))
