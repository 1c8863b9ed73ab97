"""A network's steps as plain data, and back: the door at which a file is checked."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from spp_lightning.compaction.file.allowlist import (
    METHODS,
    check_call,
    function_name,
    functions,
)
from spp_lightning.compaction.file.layers import describe, rebuild
from spp_lightning.compaction.file.tensors import TensorStore
from spp_lightning.compaction.file.values import decode, encode
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.steps import Step, Value, map_values, values_in

__all__ = ["describe_network", "rebuild_network"]

_MOST_STEPS = 2**15
_MOST_LAYERS = 2**14
_MOST_PARTS = 16  # of a dotted name
_PART = re.compile(r"[A-Za-z0-9_-]{1,128}")  # a number in an nn.Sequential
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


def describe_network(model: CompactNetwork, store: TensorStore) -> dict[str, Any]:
    """A network as plain data; its tensors are added to ``store``.

    Raises:
        ValueError: If it holds a layer, a function or a value that a file can't hold.
    """
    rows = []
    modules: list[dict[str, Any]] = []
    places: dict[int, int] = {}  # of the modules
    layers: dict[str, int] = {}
    tensors: dict[str, int] = {}
    for position, step in enumerate(model.compact_steps):
        target: Any = step.target
        try:
            if step.kind == "function":
                target = function_name(target)
                if target is None:
                    raise ValueError(f"no file may name the function {step.target!r}")
            elif step.kind == "layer":
                module = model.get_submodule(target)
                if id(module) not in places:
                    places[id(module)] = len(modules)
                    modules.append(describe(module, store))
                layers[target] = places[id(module)]
            elif step.kind == "tensor":
                parent, _, last = target.rpartition(".")
                tensors[target] = store.add(getattr(model.get_submodule(parent), last))
            name = step.name if _is_name(step.name) else f"step_{position}"
            args = [encode(value) for value in step.args]
            kwargs = {key: encode(value) for key, value in step.kwargs.items()}
            rows.append([step.kind, name, target, args, kwargs])
            _check_step(_step(rows[-1], position))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{step.kind} {step.target!s} ({step.name}): {error}") from error
    data = {"steps": rows, "modules": modules, "layers": layers, "tensors": tensors}
    _check_names(data)
    _check_tensors(data)
    return data


def rebuild_network(data: Mapping[str, Any], tensors: Sequence[Tensor]) -> CompactNetwork:
    """The network that :func:`describe_network` described, in evaluation mode.

    Args:
        data: Plain data.
        tensors: Those that it refers to; the network holds these, not copies.

    Raises:
        ValueError: If :func:`describe_network` describes no such network.
    """
    rows, modules = data["steps"], data["modules"]
    if not isinstance(rows, list) or not 0 < len(rows) <= _MOST_STEPS:
        raise ValueError(f"a network must have from 1 to {_MOST_STEPS} steps")
    if not isinstance(modules, list) or len(modules) > _MOST_LAYERS:
        raise ValueError(f"a network must have at most {_MOST_LAYERS} layers")
    steps = [_step(row, position) for position, row in enumerate(rows)]
    for step in steps:
        _check_step(step)
    _check_order(steps)
    _check_dtypes(steps)
    _check_names(data)
    _check_tensors(data)
    for kind, table in (("layer", "layers"), ("tensor", "tensors")):
        named = {step.target for step in steps if step.kind == kind}
        if named != data[table].keys():
            raise ValueError(f"the steps call the {table} {named}, got {[*data[table]]}")
    _check_indices([*data["layers"].values()], len(modules))
    _check_indices([*data["tensors"].values()], len(tensors))
    made = [rebuild(description, tensors) for description in modules]
    return CompactNetwork(
        steps,
        {name: made[index] for name, index in data["layers"].items()},
        {name: tensors[index] for name, index in data["tensors"].items()},
    )


def _step(row: Any, position: int) -> Step:
    """The step of a row, its function looked up in the table."""
    if not isinstance(row, list) or len(row) != 5:
        raise ValueError("a step must have a kind, a name, a target and arguments")
    kind, name, target, args, kwargs = row
    if not isinstance(target, str) or not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError(f"step {position} must have a target, a list and a dict of arguments")
    found: Any = target
    if kind == "function":
        if target not in functions():
            raise ValueError(f"no file may name the function {target!r}")
        found = functions()[target]
    given = tuple(decode(value, position) for value in args)
    return Step(kind, name, found, given, {k: decode(x, position) for k, x in kwargs.items()})


def _check_step(step: Step) -> None:
    target, args, kwargs = step.target, step.args, step.kwargs
    if not all(_is_name(name) for name in (step.name, *kwargs)):
        raise ValueError(f"{step.name!r} and {[*kwargs]} must be names of ASCII letters")
    if step.kind == "function":
        name = function_name(target)  # type: ignore[arg-type]
        check_call(str(name), args, kwargs)
    elif step.kind == "method":
        if target not in METHODS:
            raise ValueError(f"no file may name the method {target!r}")
        check_call(str(target), args, kwargs)
    elif step.kind in ("layer", "tensor"):
        _check_path(str(target))
        if step.kind == "tensor" and (args or kwargs):
            raise ValueError(f"the tensor {target!r} takes no arguments")
    elif step.kind == "input":
        if not _is_name(target) or len(args) > 1 or kwargs or values_in(args):
            raise ValueError(f"an input must have a name and at most a default, got {target!r}")
    elif step.kind != "output" or target != "output" or len(args) != 1 or kwargs:
        raise ValueError(f"there is no step of the kind {step.kind!r} like this")


def _check_path(name: str) -> None:
    """Check the dotted name of a layer or a tensor: nothing may be hidden by it."""
    parts = name.split(".")
    for part in parts:
        taken = hasattr(fx.GraphModule, part) or hasattr(CompactNetwork, part)
        if not _PART.fullmatch(part) or taken or part.startswith("__") or part in _OWN:
            raise ValueError(
                f"{name!r} must be the name of a layer or a tensor: ASCII letters, digits and _,"
                " and no attribute of nn.Module"
            )
    if len(parts) > _MOST_PARTS:
        raise ValueError(f"{name!r} must have at most {_MOST_PARTS} parts")


_OWN = frozenset(vars(CompactNetwork([Step("output", "output", "output", (None,))], {})))


def _check_order(steps: Sequence[Step]) -> None:
    if [step.kind == "output" for step in steps] != [False] * (len(steps) - 1) + [True]:
        raise ValueError("a network must have one output, its last step")
    for kind, names in (
        ("steps", [step.name for step in steps]),
        ("inputs", [step.target for step in steps if step.kind == "input"]),
    ):
        if len({*names}) != len(names):
            raise ValueError(f"two {kind} have one name")


def _check_dtypes(steps: Sequence[Step]) -> None:
    """Check that no step reads a tensor's memory as another dtype, as ``view(dtype)`` does.

    A dtype may be an argument itself, so that it is found here, and not be in a container.
    """
    made = {
        i for i, step in enumerate(steps) if step.target is getattr and step.args[1:] == ("dtype",)
    }

    def is_dtype(x: Any) -> bool:
        return isinstance(x, torch.dtype) or (isinstance(x, Value) and x.step in made)

    for step in steps:
        if step.kind in ("output", "input"):
            continue
        direct = [*step.args, *step.kwargs.values()]
        inner: list[Any] = []
        map_values([x for x in direct if isinstance(x, (tuple, list, dict, slice))], inner.append)
        if any(is_dtype(x) for x in inner):
            raise ValueError(f"{step.name} must be given a dtype by itself, not in a container")
        if step.target == "view" and any(is_dtype(x) for x in direct):
            raise ValueError(f"{step.name} must not read memory as another dtype; use `to`")


def _check_names(data: Mapping[str, Any]) -> None:
    """Check that no name lies inside of a layer or a tensor, and none is both."""
    layers, tensors = data["layers"], data["tensors"]
    taken = {*layers, *tensors}
    if len(taken) != len(layers) + len(tensors):
        raise ValueError("a name must be that of a layer or of a tensor, not of both")
    containers = set()
    for name in taken:
        parts = name.split(".")
        containers |= {".".join(parts[:i]) for i in range(1, len(parts))}
    if len(containers) > _MOST_LAYERS:
        raise ValueError(f"a network must have at most {_MOST_LAYERS} modules")
    for name in sorted(containers & taken):
        inner = next(x for x in taken if x.startswith(f"{name}."))
        raise ValueError(
            f"{inner!r} must not be inside of the layer {name!r}, which owns its tensors"
        )


def _check_tensors(data: Mapping[str, Any]) -> None:
    """Check that no step reads a tensor that belongs to a layer."""
    owned = {index for module in data["modules"] for index in module["tensors"].values()}
    for name, index in data["tensors"].items():
        if index in owned:
            raise ValueError(f"the tensor {name!r} must not be one that belongs to a layer")


def _check_indices(indices: Sequence[Any], count: int) -> None:
    wrong = [x for x in indices if type(x) is not int or not 0 <= x < count]
    if wrong:
        raise ValueError(f"{wrong[0]!r} must be an index below {count}")


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and not keyword.iskeyword(name)
