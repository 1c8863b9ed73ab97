"""Pools of planes as nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spp_lightning.compaction.epilogue import PlaneOp
from spp_lightning.compaction.graph.pools import find_pools
from spp_lightning.compaction.graph.steps import Step
from spp_lightning.compaction.layers.unwatched import is_untouched
from spp_lightning.export.node import NodeCall, post_attributes, record, sizes_of

__all__ = ["PoolNode", "pool_nodes"]


class PoolNode:
    """A pool as an operator: onnxruntime's means differ in ceil mode from release to release.

    Args:
        op: The pool.
    """

    def __init__(self, op: PlaneOp) -> None:
        self.op = op

    def __call__(self, x: Tensor) -> Tensor:
        """What a tracer records as the node; a standard one for other than planes of float32."""
        shape = sizes_of(x)
        operators = {torch.float32: "PlanePool"}
        if self.op.kind == "max_pool":
            operators[torch.uint8] = "Int8MaxPool"
        if len(shape) != 4 or x.dtype not in operators:
            return self.op(x)
        shape = (*shape[:2], *self.op.out_size(*shape[2:]))
        attributes = partial(post_attributes, [(0, self.op)])
        return record(NodeCall(operators[x.dtype], attributes, shape, x.dtype), x)


def pool_nodes(
    steps: Sequence[Step], layer_of: Callable[[str], nn.Module]
) -> dict[int, tuple[PoolNode, object]]:
    """The nodes that replace the pools of a network, by position, each with what it reads.

    Args:
        steps: The network.
        layer_of: The layer of a name.
    """
    nodes: dict[int, tuple[PoolNode, object]] = {}
    for pool in find_pools(steps, layer_of):
        step = steps[pool.result]
        layer = layer_of(str(step.target)) if step.kind == "layer" else None
        if layer is None or is_untouched(layer, type(layer)):
            nodes[pool.result] = PoolNode(pool.op), pool.x
    return nodes
