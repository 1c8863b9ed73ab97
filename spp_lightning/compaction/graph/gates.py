"""Which convolutions of a traced network are the layers of a gate."""

from __future__ import annotations

from torch import fx, nn

from spp_lightning.compaction.graph.between import averages_planes, multiplies
from spp_lightning.compaction.graph.fuse import fused_after
from spp_lightning.compaction.graph.query import Node, module_of, single_user
from spp_lightning.compaction.graph.steps import Value, steps_of

__all__ = ["gate_layers"]


def gate_layers(graph: fx.GraphModule) -> frozenset[str]:
    """Names of the convolutions that become parts of gates, if both are made compact layers.

    Args:
        graph: The traced network. Its nodes know their shapes.
    """
    steps, nodes = steps_of(graph.graph), list(graph.graph.nodes)
    places = {node: Value(position) for position, node in enumerate(nodes)}
    names: set[str] = set()
    for pool, step in zip(nodes, steps, strict=True):
        x, end, layers = next(iter(pool.args), None), pool, list[str]()
        if not averages_planes(step, graph.get_submodule) or not isinstance(x, Node):
            continue
        for _ in range(2):
            conv = single_user(end)
            if conv is None or not _is_pointwise(module_of(graph, conv)):
                break
            fused = fused_after(graph, conv)
            if fused.residual is not None or fused.post:
                break
            end = fused.end
            layers.append(str(conv.target))
        product = single_user(end)
        if len(layers) < 2 or product is None:
            continue
        if multiplies(steps[places[product].step], places[x], places[end]):
            names.update(layers)
    return frozenset(names)


def _is_pointwise(module: nn.Module | None) -> bool:
    if type(module) is not nn.Conv2d:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.groups)
    return sizes == ((1, 1), (1, 1), (0, 0), 1)
