"""A network's graph as plain data, and back."""

from __future__ import annotations

import copy
import keyword
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from spp_lightning.compaction.file.allowlist import (
    ATTRIBUTES,
    GETATTR,
    function_name,
    functions,
    methods,
)
from spp_lightning.compaction.file.layers import describe, rebuild
from spp_lightning.compaction.file.tensors import TensorStore
from spp_lightning.compaction.file.values import decode, encode
from spp_lightning.compaction.graph.join import join, take_apart

__all__ = ["describe_graph", "rebuild_graph"]


def describe_graph(model: fx.GraphModule, store: TensorStore) -> dict[str, Any]:
    """A network as plain data; its tensors are added to ``store``.

    Raises:
        ValueError: If it holds a layer, a function or a value that a file can't hold.
    """
    if type(model.graph._codegen) is not fx.graph.CodeGen:
        raise ValueError("its inputs and outputs must be plain tensors, not trees of them")
    model = fx.GraphModule(model, copy.deepcopy(model.graph))
    take_apart(model)
    nodes = []
    modules: list[dict[str, Any]] = []
    places: dict[int, int] = {}  # of the modules
    targets: dict[str, int] = {}
    attributes: dict[str, int] = {}
    for node in model.graph.nodes:
        target = node.target
        try:
            if node.op == "call_function":
                target = function_name(node.target)
                if target is None:
                    raise ValueError(f"no file may name the function {node.target!r}")
            elif node.op == "call_module":
                module = model.get_submodule(target)
                if id(module) not in places:
                    places[id(module)] = len(modules)
                    modules.append(describe(module, store))
                targets[target] = places[id(module)]
            elif node.op == "get_attr":
                parent, _, name = target.rpartition(".")
                value = getattr(model.get_submodule(parent), name)
                if not isinstance(value, Tensor):
                    raise ValueError(f"the attribute must be a tensor, got {type(value)}")
                attributes[target] = store.add(value)
            kwargs = {key: encode(value) for key, value in node.kwargs.items()}
            row = [node.op, node.name, target, [encode(value) for value in node.args], kwargs]
            _check_node(row)
        except ValueError as error:
            raise ValueError(f"{node.op} {node.target!s} ({node.name}): {error}") from error
        nodes.append(row)
    return {"nodes": nodes, "modules": modules, "targets": targets, "attributes": attributes}


def rebuild_graph(data: dict[str, Any], tensors: Sequence[Tensor]) -> fx.GraphModule:
    """The network that :func:`describe_graph` described, in evaluation mode.

    Args:
        data: Plain data.
        tensors: Those that it refers to; the network holds these, not copies.

    Raises:
        ValueError: If it isn't a network that :func:`describe_graph` describes.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    rows = data["nodes"]
    if [row[0] == "output" for row in rows] != [False] * (len(rows) - 1) + [True]:
        raise ValueError("a network must have one output, its last node")
    for row in rows:
        _check_node(row)
        op, name, target, args, kwargs = row
        if name in nodes:
            raise ValueError(f"two nodes are called {name!r}")
        nodes[name] = graph.create_node(
            op,
            functions()[target] if op == "call_function" else target,
            tuple(decode(value, nodes) for value in args),
            {key: decode(value, nodes) for key, value in kwargs.items()},
            name,
        )
    modules = [rebuild(description, tensors) for description in data["modules"]]
    root: dict[str, nn.Module | Tensor] = {
        **{target: modules[index] for target, index in data["targets"].items()},
        **{target: tensors[index] for target, index in data["attributes"].items()},
    }
    graph.lint()
    model = fx.GraphModule(root, graph).eval()  # type: ignore[arg-type]
    join(model)
    return model


def _check_node(row: list[Any]) -> None:
    """Check a node: torch.fx writes Python code from it, where every name stands as it is."""
    op, name, target, args, kwargs = row
    if not isinstance(target, str) or not all(_is_name(key) for key in (name, *kwargs)):
        raise ValueError(f"{name!r} must be a name, and its arguments' names {[*kwargs]}, too")
    if op == "call_function":
        if target not in functions():
            raise ValueError(f"no file may name the function {target!r}")
        if target == GETATTR and (
            len(args) != 2 or not _is_node(args[0]) or args[1] not in ATTRIBUTES or kwargs
        ):
            raise ValueError(f"no file may ask for the attribute {args[1:]!r}")
    elif op == "call_method":
        if target not in methods() or not args or not _is_node(args[0]):
            raise ValueError(f"no file may name the method {target!r}")
    elif op in ("call_module", "get_attr"):
        parts = target.split(".")
        if (
            not all(re.fullmatch(r"[\w-]+", part) for part in parts)
            or any(part.startswith("__") or hasattr(nn.Module, part) for part in parts)
            or hasattr(fx.GraphModule, parts[0])
        ):
            raise ValueError(f"{target!r} must be the name of a layer or a tensor")
    elif op == "placeholder":
        if not _is_name(target):
            raise ValueError(f"an input's name must be a name, got {target!r}")
    elif op != "output":
        raise ValueError(f"there is no kind of node {op!r}")


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def _is_node(data: object) -> bool:
    return isinstance(data, dict) and [*data] == ["node"]
