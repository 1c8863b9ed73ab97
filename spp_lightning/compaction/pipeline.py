"""compact(): makes a pruned network fast. The steps stand in the order in which they are taken."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from spp_lightning.compaction.agreement import computes_the_same
from spp_lightning.compaction.graph.channels import remove_channels
from spp_lightning.compaction.graph.constants import compute_constants
from spp_lightning.compaction.graph.fold import absorb_constants, fold_batch_norms
from spp_lightning.compaction.graph.inputs import bind, propagate
from spp_lightning.compaction.graph.lift import make_layers
from spp_lightning.compaction.graph.linear import (
    fold_linear_norms,
    remove_features,
    replace_linears,
)
from spp_lightning.compaction.graph.linear_gates import rewrite_linear_gates
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.parts import replace_parts
from spp_lightning.compaction.graph.replace import (
    Decision,
    has_hooks,
    replace_convolutions,
    replace_one_by_one,
)
from spp_lightning.compaction.graph.slices import drop_whole_slices
from spp_lightning.compaction.graph.trace import trace
from spp_lightning.compaction.graph.tune import tune_chains
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.column_linear import ColumnLinear
from spp_lightning.compaction.timing import interleaved_ms
from spp_lightning.method.computed import remove_parametrizations
from spp_lightning.method.evaluation import in_evaluation
from spp_lightning.method.masks import is_masked

__all__ = ["compact"]

_NOTHING: Mapping[str, Any] = {}


def compact(
    model: nn.Module,
    example_input: Any,
    fold: bool = True,
    tune: bool = False,
) -> nn.Module:
    """Make a pruned network fast: store and compute only the columns that pruning kept.

    Every convolution with pruned columns becomes a :class:`ColumnConv2d`, and every linear layer a
    :class:`ColumnLinear`. Channels that no layer reads any more are removed, with the filters that
    compute them. Batch norms, additions, ReLUs
    and pools behind a convolution are computed together with it. Layers that are faster dense stay
    dense. The result is in evaluation mode; it computes what ``model.eval()`` computes, up to
    rounding, for batches and images of any size that the network takes.

    Which layers stay dense and which kernels run follows from a written cost model: the same
    network and example always give the same result. With ``tune`` it is measured instead.
    :func:`compact_report` tells what was chosen and why.

    A network that ``torch.fx`` cannot trace, such as a detector, keeps its own ``forward``. Its
    largest parts that can be traced become a :class:`CompactNetwork` each; what is left of the
    convolutions is replaced one by one. A module in a network that cannot be traced is called as it
    is, and so made compact inside. If no layer is faster compact and no channel can be
    removed, the dense network's graph is returned. Warnings say so.

    Args:
        model: The pruned network; it is left as it was.
        example_input: A batch of the size that is to be fast, on the network's device; or what
            else the network takes, a list or dict of tensors; or a tuple of the positional
            arguments, if the network takes several.
        fold: Whether batch norms are folded into the convolutions before them, and what follows
            from the network's own tensors alone is kept in the place of being computed. Without,
            the network keeps its batch norms, as it should for training it further.
        tune: Whether to measure what is fastest for the example, on this device, now. The network
            keeps the choices as long as it lives; copies and files of it don't have them.

    Returns:
        The compact network, on the device of ``model``: a :class:`CompactNetwork`, or a network
        of the class of ``model`` if it cannot be traced.

    Raises:
        ValueError: If ``model`` isn't a network or is still being pruned, ``example_input`` isn't
            made of tensors, one of the two has no values (device "meta"), the network fails for
            the example, or ``fold`` or ``tune`` isn't a bool.

    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3))
    >>> with torch.no_grad():
    ...     _ = net[2].weight[:, 4:].zero_()  # reads 4 of the first layer's 16 channels
    >>> fast = compact(net, torch.zeros(1, 3, 32, 32))
    >>> len(fast.get_submodule("0").bias)  # which makes no others any more
    4
    >>> x = torch.randn(5, 3, 32, 32)
    >>> torch.allclose(fast(x), net(x), atol=1e-5)
    True
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    _check(model, inputs)
    for name, flag in (("fold", fold), ("tune", tune)):
        if not isinstance(flag, bool):
            raise ValueError(f"`{name}` must be True or False, got {flag!r}.")
    recipe = _Recipe(fold, tune)
    inputs = _laid_out(inputs)
    try:
        network, decisions = recipe.make(model, inputs)
    except _NotCompactError as error:
        return recipe.by_parts(model, inputs, str(error))
    reason = _too_slow(network, model, inputs, {}, decisions, tune)
    if reason is None:
        return network
    warnings.warn(
        f"The network has too few pruned columns for a compact one to be faster: {reason}. It stays"
        " dense.",
        stacklevel=2,
    )
    return _dense(model, inputs, {})


class _NotCompactError(Exception):
    """A network can't be traced, or isn't the same when it is; the text says why."""


class _Recipe:
    """The steps from a network to a compact one."""

    def __init__(self, fold: bool, tune: bool) -> None:
        self._fold, self._tune = fold, tune

    def make(
        self, original: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any] = _NOTHING
    ) -> tuple[CompactNetwork, dict[str, Decision]]:
        """The compact network of a copy of ``original``, and what was decided about its layers.

        Raises:
            _NotCompactError: If there is none.
        """
        graph = _traced(original, inputs, named)
        make_layers(graph)
        drop_whole_slices(graph)
        if self._fold:
            compute_constants(graph)
            fold_batch_norms(graph)
            fold_linear_norms(graph)
            absorb_constants(graph)
        if _first_tensor(inputs, named).is_cpu and is_available() and rewrite_linear_gates(graph):
            propagate(graph, bind(original, inputs, named))
        remove_channels(graph)
        remove_features(graph)
        propagate(graph, bind(original, inputs, named))
        _drop_layouts(graph)
        decisions = replace_convolutions(graph, self._tune) | replace_linears(graph, self._tune)
        network = CompactNetwork.of(graph)
        opaque = network.opaque_layers
        if opaque:
            replace_parts(network, lambda: network(*inputs, **named), self._make_part, opaque)
            replace_one_by_one(network, opaque)
        if self._tune and _first_tensor(inputs, named).is_cpu:
            tune_chains(network, inputs, named)
        if not any(parameter.requires_grad for parameter in original.parameters()):
            network.requires_grad_(False)
        if not computes_the_same(network, original, inputs, named):
            raise _NotCompactError("computes something else when it is traced")
        return network, decisions

    def by_parts(self, original: nn.Module, inputs: tuple[Any, ...], reason: str) -> nn.Module:
        """A copy of a network with its largest parts compact, and of the rest each layer."""
        model = copy.deepcopy(original).eval()
        parts: list[str] = []
        if not isinstance(model, CompactNetwork):
            parts = replace_parts(model, lambda: model(*inputs), self._make_part)
        layers = ", ".join(replace_one_by_one(model)) or "none"
        rest = "of the rest nothing is fused and no channels are removed"
        if parts:
            which = f"these parts of it are made compact: {', '.join(parts)}; {rest}"
        else:
            which = "nothing in it is fused and no channels are removed"
        warnings.warn(
            f"The network {reason.splitlines()[0]}, so {which}; these layers are made compact one"
            f" by one: {layers}.",
            stacklevel=3,
        )
        return model

    def _make_part(
        self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]
    ) -> nn.Module | None:
        network, decisions = self.make(module, inputs, named)
        slow = _too_slow(network, module, inputs, named, decisions, self._tune)
        return network if slow is None else None


def _traced(
    original: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> fx.GraphModule:
    model = copy.deepcopy(original).eval()
    for module in model.modules():
        remove_parametrizations(module)
    if _first_tensor(inputs, named).is_cpu:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    hooked = [name or "the network" for name, module in model.named_modules() if has_hooks(module)]
    if hooked:
        names = ", ".join(hooked)
        raise _NotCompactError(f"can't be traced (ValueError: it has forward hooks, at {names})")
    try:
        return trace(model, inputs, named)
    except Exception as error:  # whatever a network may raise that cannot be traced
        reason = f"can't be traced ({type(error).__name__}: {error})"
        raise _NotCompactError(reason) from error


def _laid_out(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs as the CPU kernels read them."""
    laid_out: tuple[Any, ...] = tree_map(
        lambda x: x.contiguous() if isinstance(x, Tensor) and x.is_cpu else x, inputs
    )
    return laid_out


def _first_tensor(*values: Any) -> Tensor:
    return next(x for x in tree_leaves(values) if isinstance(x, Tensor))


def _check(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`model` must be a network, an instance of nn.Module, got {type(model).__name__}."
        )
    leaves = tree_leaves(inputs)
    wrong = [type(x).__name__ for x in leaves if not isinstance(x, Tensor)]
    if wrong or not leaves:
        raise ValueError(
            "`example_input` must be a tensor, a list or dict of tensors, or the positional"
            f" arguments as a tuple of tensors, got {', '.join(wrong) or 'no tensor'}."
        )
    for name, tensors in (("model", model.state_dict().values()), ("example_input", leaves)):
        if any(isinstance(x, Tensor) and x.is_meta for x in tensors):
            raise ValueError(f"`{name}` must hold values, but has tensors on the device meta.")
    masked = [name for name, layer in model.named_modules() if is_masked(layer)]
    if masked:
        raise ValueError(
            f"`model` is still being pruned (layers {', '.join(masked)}); call `fold()` of the"
            " pruner first, or let the fit end."
        )
    try:
        with in_evaluation(model):
            model(*inputs)
    except Exception as error:
        given = "; ".join(f"{tuple(x.shape)}, {x.dtype}, on {x.device}" for x in leaves)
        raise ValueError(
            f"`example_input` (={given}) must be an input of `model`, but the network fails for it:"
            f" {error}"
        ) from error


def _drop_layouts(graph: fx.GraphModule) -> None:
    """Remove calls that lay out tensors channels-last: the values stay the same."""
    for node in list(graph.graph.nodes):
        if node.op != "call_method":
            continue
        channels_last = node.kwargs == {"memory_format": torch.channels_last}
        if node.target in ("contiguous", "to") and len(node.args) == 1 and channels_last:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()


def _dense(
    original: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> CompactNetwork:
    return CompactNetwork.of(trace(copy.deepcopy(original).eval(), inputs, named))


def _too_slow(
    network: nn.Module,
    original: nn.Module,
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
    decisions: dict[str, Decision],
    tune: bool,
) -> str | None:
    """Why the network should stay dense; None if it shouldn't."""
    if tune:
        dense = _dense(original, inputs, named)
        with torch.no_grad():
            dense_ms, compact_ms = interleaved_ms(
                [lambda: dense(*inputs, **named), lambda: network(*inputs, **named)], turn=0
            )
        measured = f"{dense_ms:.3f} ms dense, {compact_ms:.3f} ms compact for the example input"
        return None if compact_ms <= dense_ms else measured
    if any(decision.is_compact for decision in decisions.values()):
        return None
    if any(isinstance(x, (ColumnConv2d, ColumnLinear)) for x in network.modules()):  # in others
        return None
    if _num_weights(network) < _num_weights(original):  # channels were removed
        return None
    return "no layer is faster compact for the example input, by the cost model"


def _num_weights(network: nn.Module) -> int:
    kinds = (nn.Conv2d, nn.Linear)
    return sum(x.weight.numel() for x in network.modules() if isinstance(x, kinds))
