"""A network as a list of steps: what is called, with what, and in which order.

The passes of ``compact()`` work on a ``torch.fx`` graph. Its last form is a list of steps: plain
data that can be checked, saved and run without generating code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch.nn import functional as F

__all__ = ["OPS", "Step", "Value", "map_values", "steps_of", "text_of", "users_of", "values_in"]

Kind = Literal["input", "tensor", "layer", "function", "method", "output"]

_KINDS: dict[str, Kind] = {
    "placeholder": "input",
    "get_attr": "tensor",
    "call_module": "layer",
    "call_function": "function",
    "call_method": "method",
    "output": "output",
}

# What torch.fx calls each kind of step.
OPS: dict[str, str] = {kind: op for op, kind in _KINDS.items()}


@dataclass(frozen=True)
class Value:
    """The result of an earlier step, as an argument of a later one.

    Attributes:
        step: Position of the earlier step in the list.
    """

    step: int


@dataclass(frozen=True)
class Step:
    """One step of a network.

    Attributes:
        kind: ``input`` is an argument of the network, ``tensor`` one of its own tensors; ``layer``
            calls a module, ``function`` a function, ``method`` a method of the first argument;
            ``output``, the last step, returns its argument.
        name: Name of the result, unique in the network.
        target: Name of the input, dotted name of the tensor or layer, the function, or name of the
            method.
        args: Positional arguments. A :class:`Value` may stand in tuples, lists, dicts and slices
            at any depth. An input has its default value here, if any.
        kwargs: Keyword arguments.
    """

    kind: Kind
    name: str
    target: str | Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle looks a function up by its name. `F.max_pool2d` and its like don't know theirs.
        name = next((key for key, value in vars(F).items() if value is self.target), None)
        target = self.target if name is None else None
        return _unpickled, (self.kind, self.name, target, self.args, self.kwargs, name)


def _unpickled(
    kind: Kind, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], of: str
) -> Step:
    return Step(kind, name, target if of is None else getattr(F, of), args, kwargs)


def map_values(argument: Any, function: Callable[[Any], Any]) -> Any:
    """An argument with ``function`` applied to everything in it that isn't a container.

    >>> map_values([Value(0), {"size": (1, Value(2))}], str)
    ['Value(step=0)', {'size': ('1', 'Value(step=2)')}]
    """
    if isinstance(argument, tuple) and not isinstance(argument, torch.Size):  # holds numbers only
        parts = [map_values(x, function) for x in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    if isinstance(argument, list):
        return [map_values(x, function) for x in argument]
    if isinstance(argument, dict):
        return {key: map_values(x, function) for key, x in argument.items()}
    if isinstance(argument, slice):
        parts = [map_values(x, function) for x in (argument.start, argument.stop, argument.step)]
        return slice(*parts)
    return function(argument)


def values_in(*arguments: Any) -> list[Value]:
    """The results of earlier steps that arguments hold, in order."""
    found: list[Value] = []
    map_values(list(arguments), lambda x: found.append(x) if isinstance(x, Value) else None)
    return found


def users_of(steps: Sequence[Step]) -> list[list[int]]:
    """Per step, the positions of the steps that read its result, each once."""
    users: list[list[int]] = [[] for _ in steps]
    for position, step in enumerate(steps):
        for value in dict.fromkeys(values_in(step.args, step.kwargs)):
            users[value.step].append(position)
    return users


def steps_of(graph: fx.Graph) -> tuple[Step, ...]:
    """The steps of a ``torch.fx`` graph."""
    places: dict[fx.Node, int] = {}

    def convert(value: Any) -> Any:
        return Value(places[value]) if isinstance(value, fx.Node) else value

    steps = []
    for node in graph.nodes:
        args, kwargs = map_values(tuple(node.args), convert), map_values(node.kwargs, convert)
        steps.append(Step(_KINDS[node.op], node.name, node.target, args, kwargs))
        places[node] = len(places)
    return tuple(steps)


def text_of(steps: Sequence[Step]) -> str:
    """Steps as lines to read."""
    return "\n".join(_line(steps, step) for step in steps)


def _line(steps: Sequence[Step], step: Step) -> str:
    def text(argument: Any) -> str:
        named = map_values(
            argument, lambda x: _Text(steps[x.step].name if isinstance(x, Value) else repr(x))
        )
        return repr(named)

    args = [text(x) for x in step.args]
    args += [f"{key}={text(x)}" for key, x in step.kwargs.items()]
    if step.kind == "output":
        return f"return {args[0]}"
    if step.kind == "input":
        return f"input {step.target}" + (f" = {args[0]}" if args else "")
    if step.kind == "tensor":
        return f"{step.name} = self.{step.target}"
    if step.kind == "layer":
        return f"{step.name} = self.{step.target}({', '.join(args)})"
    if step.kind == "method":
        return f"{step.name} = {args[0]}.{step.target}({', '.join(args[1:])})"
    name = getattr(step.target, "__name__", str(step.target))
    return f"{step.name} = {name}({', '.join(args)})"


class _Text(str):
    """Text that stands for itself in the text of a container."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
