"""A graph whose float layers become int8 layers, with a quantisation wherever float numbers end."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import fx

from spp_lightning.compaction.graph.patterns import as_plane_op
from spp_lightning.compaction.graph.query import Node, module_of, set_module
from spp_lightning.compaction.int8_spec import TensorScale
from spp_lightning.compaction.layers.int8_pool import max_pool_uint8
from spp_lightning.compaction.layers.quantized import Quantize, QuantizedConv2d
from spp_lightning.compaction.quantize.convert import quantized
from spp_lightning.compaction.quantize.values import Domain, moved

__all__ = ["int8_layers", "rewrite"]


def int8_layers(
    graph: fx.GraphModule,
    names: Collection[str],
    scales: Mapping[Domain, TensorScale],
) -> dict[str, QuantizedConv2d]:
    """The int8 layers of a graph's layers, by name.

    Args:
        graph: The float network, fused.
        names: Of the layers.
        scales: Of the domains.
    """
    given: dict[tuple[Node, int], TensorScale] = {}
    outputs: dict[Node, TensorScale] = {}
    for domain, scale in scales.items():
        given |= dict.fromkeys(domain.readers, scale)
        if domain.is_inner:
            outputs |= dict.fromkeys(domain.roots, scale)
    return {
        str(node.target): quantized(
            graph.get_submodule(str(node.target)),
            given[node, 0],
            outputs.get(node),
            given.get((node, 1)),
        )
        for node in graph.graph.nodes
        if node.op == "call_module" and node.target in names
    }


def rewrite(
    graph: fx.GraphModule,
    layers: Mapping[str, QuantizedConv2d],
    scales: Mapping[Domain, TensorScale],
) -> None:
    """Put int8 layers in the places of the float ones, and quantise what they read.

    Args:
        graph: The float network, fused; changed in place.
        layers: The int8 layers by name.
        scales: Of the domains.
    """
    for name, layer in layers.items():
        set_module(graph, name, layer)
    for domain, scale in scales.items():
        for root in domain.roots:
            if domain.is_inner and root.op == "call_module" and root.target in layers:
                continue
            _quantize(graph, root, scale, None if domain.is_inner else domain.readers)
    _replace_pools(graph)
    _join_post(graph)
    graph.graph.lint()
    graph.delete_all_unused_submodules()


def _replace_pools(graph: fx.GraphModule) -> None:
    """Call the max pool for uint8 where a max pool reads uint8."""
    small: set[Node] = set()
    for node in list(graph.graph.nodes):
        module, sources = module_of(graph, node), moved(graph, node)
        if isinstance(module, Quantize) or getattr(module, "output_scale", None) is not None:
            small.add(node)
        elif sources and small.issuperset(sources):
            small.add(node)
            op = as_plane_op(graph, node)
            if op is None:
                continue
            with graph.graph.inserting_after(node):
                args = (sources[0], op.kernel_size, op.stride, op.padding, op.ceil_mode)
                call = graph.graph.call_function(max_pool_uint8, args)
            node.replace_all_uses_with(call)
            graph.graph.erase_node(node)
            small.add(call)


def _join_post(graph: fx.GraphModule) -> None:
    """Let quantisations compute the pools and norms that only they read."""
    for node in list(graph.graph.nodes):
        layer, source, post = module_of(graph, node), node, []
        if not isinstance(layer, Quantize):
            continue
        while (op := as_plane_op(graph, source.args[0])) is not None:
            if len(source.args[0].users) > 1:
                break
            post.append(op)
            source = source.args[0]
        if not post:
            continue
        scale = TensorScale(float(layer.scale), int(layer.zero_point))
        set_module(graph, str(node.target), Quantize(scale, tuple(reversed(post))).eval())
        passed, node.args = node.args[0], (source.args[0],)
        for _ in post:
            passed, gone = passed.args[0], passed
            graph.graph.erase_node(gone)


def _quantize(
    graph: fx.GraphModule,
    node: Node,
    scale: TensorScale,
    readers: Sequence[tuple[Node, int]] | None,
) -> None:
    """Quantise a node's numbers for some of its readers, or for all."""
    name = _free_name(graph, f"quantize_{node.name.strip('_')}")
    graph.add_submodule(name, Quantize(scale).eval())
    users = list(node.users)
    with graph.graph.inserting_after(node):
        call = graph.graph.call_module(name, (node,))
    for user in users if readers is None else dict.fromkeys(user for user, _ in readers):
        places = range(len(user.args)) if readers is None else [i for x, i in readers if x is user]
        if readers is None:
            user.replace_input_with(node, call)
            continue
        user.args = tuple(
            call if i in places and argument is node else argument
            for i, argument in enumerate(user.args)
        )


def _free_name(graph: fx.GraphModule, name: str) -> str:
    taken = {x.partition(".")[0] for x, _ in graph.named_modules()} | {*vars(graph), *dir(graph)}
    found, count = name, 0
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    return found
