"""Calls that a tracer records as nodes of an ONNX graph, of the domain of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spp_lightning.compaction.epilogue import KINDS, PlaneOp
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.spec import ConvSpec

__all__ = ["DOMAIN", "NodeCall", "geometry_numbers", "post_attributes", "record", "sizes_of"]

DOMAIN = "spp_lightning"
_GEOMETRY = 11  # numbers of a convolution's geometry in front of its description


class NodeCall(NamedTuple):
    """A node without its inputs.

    Attributes:
        operator: Its name in the domain.
        attributes: Makes the node's attributes; the suffix of a name says of which type it is.
        shape: Of the output for the example input.
        dtype: Of the output.
    """

    operator: str
    attributes: Callable[[], dict[str, Any]]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


def record(call: NodeCall, *inputs: Tensor) -> Tensor:
    """Call a node: zeros of its output's shape, and the node itself where a tracer watches."""
    y: Tensor = _Operator.apply(call, *inputs)
    return y


def sizes_of(x: Tensor) -> tuple[int, ...]:
    """A tensor's shape as numbers, also where a tracer watches."""
    return tuple(int(n) for n in x.shape)


def geometry_numbers(geometry: Geometry) -> list[int]:
    """The part of the attribute ``geometry`` that describes a layer."""
    return ConvSpec(geometry).pack()[0][:_GEOMETRY]


def post_attributes(ops: Iterable[tuple[int, PlaneOp]]) -> dict[str, Any]:
    """The attributes ``post`` and ``alpha`` of operations, each with the place of its layer."""
    given = list(ops)
    return {
        "post_i": [
            n
            for i, op in given
            for n in (
                *(i, KINDS.index(op.kind), *op.kernel_size, *op.stride, *op.padding),
                *(int(op.ceil_mode), int(op.count_include_pad)),
            )
        ],
        "alpha_f": [op.alpha for _, op in given],
    }


class _Operator(torch.autograd.Function):
    """What the tracer sees of a node; it computes nothing, since only its shape is wanted."""

    @staticmethod
    def forward(ctx: Any, call: NodeCall, x: Tensor, *_: Tensor) -> Tensor:
        return x.new_zeros(call.shape, dtype=call.dtype)

    @staticmethod
    def symbolic(g: Any, call: NodeCall, x: Any, *inputs: Any) -> Any:
        y = g.op(f"{DOMAIN}::{call.operator}", x, *inputs, **call.attributes())
        return y.setType(x.type().with_dtype(call.dtype).with_sizes([None, *call.shape[1:]]))
