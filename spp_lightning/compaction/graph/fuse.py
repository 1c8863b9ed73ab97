"""What follows a convolution and can be computed on the way: additions, clamps and pools."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from spp_lightning.compaction.epilogue import Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.graph.patterns import add_operands, as_clamp, as_plane_op
from spp_lightning.compaction.graph.query import Node, shape_of, single_user

__all__ = ["Chain", "chain_after"]


@dataclass
class Chain:
    """A convolution's node, and the nodes after it that one layer computes together with it."""

    conv: Node
    nodes: list[Node] = field(default_factory=list)
    residual: Node | None = None
    clamp: Clamp = Clamp()  # noqa: RUF009 (immutable)
    post: tuple[PlaneOp, ...] = ()

    @property
    def epilogue(self) -> Epilogue:
        """What the layer computes behind the convolution."""
        return Epilogue(self.clamp, self.post)

    @property
    def end(self) -> Node:
        """The node whose output is that of the whole chain."""
        return self.nodes[-1] if self.nodes else self.conv


def chain_after(graph: fx.GraphModule, conv: Node) -> Chain:
    """The longest chain that begins with a convolution: residual, clamp, operations on planes."""
    chain = Chain(conv)
    while (node := single_user(chain.end)) is not None and node.op != "output":
        operands, clamp = add_operands(node), as_clamp(graph, node)
        plane_op = as_plane_op(graph, node)
        fresh = chain.clamp == Clamp()
        if operands is not None and chain.residual is None and fresh and not chain.post:
            first, second = operands
            if first is second or "get_attr" in (first.op, second.op):  # the latter has no batch
                break
            if 1 in (shape_of(first) or ())[2:]:  # of larger pictures one may be broadcast
                break
            chain.residual = second if first is chain.end else first
        # A clamp behind a max pool does the same in front of it.
        elif clamp is not None and fresh and all(op.kind == "max_pool" for op in chain.post):
            chain.clamp = clamp
        elif plane_op is not None:
            chain.post = (*chain.post, plane_op)
        else:
            break
        chain.nodes.append(node)
    return chain
