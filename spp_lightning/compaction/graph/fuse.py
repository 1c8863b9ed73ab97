"""What follows a convolution and can be its epilogue: an addition, an activation, pools, norms."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from spp_lightning.compaction.epilogue import Activation, Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.graph.patterns import (
    add_operands,
    as_activation,
    as_clamp,
    as_plane_op,
)
from spp_lightning.compaction.graph.query import Node, shape_of, single_user

__all__ = ["FusedNodes", "fused_after"]


@dataclass
class FusedNodes:
    """A convolution's node, and the nodes after it that become the epilogue of one layer."""

    conv: Node
    nodes: list[Node] = field(default_factory=list)
    residual: Node | None = None
    clamp: Clamp = Clamp()  # noqa: RUF009 (immutable)
    post: tuple[PlaneOp, ...] = ()
    activation: Activation = "none"

    @property
    def epilogue(self) -> Epilogue:
        """The layer's epilogue."""
        return Epilogue(self.clamp, self.post, self.activation)

    @property
    def end(self) -> Node:
        """The last node: its output is the layer's."""
        return self.nodes[-1] if self.nodes else self.conv


def fused_after(graph: fx.GraphModule, conv: Node) -> FusedNodes:
    """As many nodes after a convolution as an epilogue can compute, each read by the next only.

    An epilogue adds a residual, then clamps or applies an activation, then pools or norms planes.
    """
    fused = FusedNodes(conv)
    while (node := single_user(fused.end)) is not None and node.op != "output":
        operands, clamp = add_operands(node), as_clamp(graph, node)
        plane_op, activation = as_plane_op(graph, node), as_activation(graph, node)
        unclamped = fused.clamp == Clamp() and fused.activation == "none"
        if operands is not None and fused.residual is None and unclamped and not fused.post:
            first, second = operands
            if first is second or "get_attr" in (first.op, second.op):  # the latter has no batch
                break
            # A side of 1 pixel: for a larger image this operand may be broadcast to the other one.
            if 1 in (shape_of(first) or ())[2:]:
                break
            fused.residual = second if first is fused.end else first
        # A max pool may come first: clamps are monotone, so the maximum of clamped numbers is the
        # clamped maximum. An operation that isn't monotone can't be moved in front of a pool.
        elif clamp is not None and unclamped and all(op.kind == "max_pool" for op in fused.post):
            fused.clamp = clamp
        elif activation is not None and unclamped and not fused.post:
            fused.activation = activation
        elif plane_op is not None:
            fused.post = (*fused.post, plane_op)
        else:
            break
        fused.nodes.append(node)
    return fused
