"""A network as a graph: traced with torch.fx, without calls that change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from spp_lightning.compaction.graph.in_place import write_nothing_in_place
from spp_lightning.compaction.graph.inputs import bind, propagate
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.query import arguments, is_opaque, module_of
from spp_lightning.compaction.graph.tracer import Tracer

__all__ = ["trace"]


def trace(
    model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """The graph of a network, with the shapes of its tensors. No node of it writes in place.

    Modules inside of the network that torch.fx cannot trace are called as they are. An input that
    isn't given and is None, a bool or text by default is no input of the graph.

    Args:
        model: The network, in evaluation mode. The graph shares its modules.
        inputs: The positional arguments that the network is run with, once.
        named: The keyword arguments, likewise.

    Raises:
        Exception: Whatever a network raises that can't be traced.
    """
    if isinstance(model, CompactNetwork):
        raise ValueError("it is compact already")
    given = bind(model, inputs, named)
    tracer = Tracer(given)
    traced = fx.GraphModule(model, tracer.trace(model), type(model).__name__).eval()
    _check_opaque(traced, tracer.failures)
    if tracer.takes_list:
        _check_loops(traced)
    _drop_calls_without_effect(traced)
    wrote = write_nothing_in_place(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    seen = _OpaqueModules(traced)
    propagate(traced, given)
    seen.check(wrote)
    _check_names(traced)
    _check_methods(traced)
    return traced


def _check_opaque(graph: fx.GraphModule, failures: Mapping[str, str]) -> None:
    """Check that the graph is of more than modules that can't be traced."""
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    opaque = {name: why for name, why in failures.items() if name in called}
    inside = {id(x): x for name in opaque for x in graph.get_submodule(name).parameters()}
    weights = sum(x.numel() for x in inside.values())
    if 2 * weights > sum(x.numel() for x in graph.parameters()):
        name, why = next(iter(opaque.items()))
        raise ValueError(f"most of its weights are in modules like {name}: {why}")


def _check_loops(graph: fx.GraphModule) -> None:
    """Check that no layer is called for several items of a list: another list may be longer."""
    calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    often = [name for name, count in calls.items() if count > 1]
    if often:
        raise ValueError(f"{often[0]} is called for several items of a list")


def _check_names(graph: fx.GraphModule) -> None:
    """Check that a compact network can have the layers and tensors under their names."""
    for node in graph.graph.nodes:
        first = str(node.target).partition(".")[0]
        if node.op in ("call_module", "get_attr") and hasattr(CompactNetwork, first):
            raise ValueError(f"the name {first!r} isn't free in a CompactNetwork")


def _check_methods(graph: fx.GraphModule) -> None:
    """Check that all methods are those of tensors: nothing else has a place in a network."""
    for node in graph.graph.nodes:
        kind = node.args[0].meta.get("type") if node.op == "call_method" else Tensor
        if not issubclass(kind, (Tensor, torch.Size)):
            raise ValueError(f"it calls the method {node.target} of a {kind.__name__}")


_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth.stochastic_depth"
_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
)


def _drop_calls_without_effect(graph: fx.GraphModule) -> None:
    """Remove assertions, identities, and what passes its input on in evaluation."""
    for node in reversed(graph.graph.nodes):
        if _is_identity(module_of(graph, node)) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
        elif node.op != "call_function":
            continue
        elif node.target in _DROPOUTS or _name_of(node.target) == _STOCHASTIC_DEPTH:
            mode = () if node.target in _DROPOUTS else ("mode",)
            given = arguments(node, ("input", "p", *mode, "training"))
            if given.get("training", True) is not False:
                continue
            node.replace_all_uses_with(given["input"])
        elif node.target is not torch._assert:
            continue
        graph.graph.erase_node(node)
    graph.recompile()


def _is_identity(module: nn.Module | None) -> bool:
    """Whether a module passes its input on, in training as in evaluation."""
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"


class _OpaqueModules:
    """Watches what the modules that torch.fx can't trace do to their inputs, in the next run."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._wrote: list[str] = []
        self._aliased: list[str] = []
        self._hooks: list[Any] = []
        names = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
        for name in sorted(names):
            module = graph.get_submodule(name)
            if is_opaque(module):
                self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        versions: list[tuple[Tensor, int]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            versions[:] = [(x, x._version) for x in _tensors((args, kwargs))]

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if any(x._version != version for x, version in versions):
                self._wrote.append(name)
            memory = {x.untyped_storage().data_ptr() for x, _ in versions}
            if any(x.untyped_storage().data_ptr() in memory for x in _tensors(output)):
                self._aliased.append(name)

        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(after, with_kwargs=True))

    def check(self, network_writes: bool) -> None:
        """Check that none wrote to its inputs, and where the network writes, none passed them on.

        Raises:
            ValueError: Otherwise: what a compact network computes first could be read later.
        """
        for hook in self._hooks:
            hook.remove()
        if self._wrote:
            raise ValueError(f"{self._wrote[0]}, which can't be traced, writes to its inputs")
        if self._aliased and network_writes:
            raise ValueError(
                f"{self._aliased[0]}, which can't be traced, returns its input or a view of it, and"
                " the network writes in place"
            )


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]
