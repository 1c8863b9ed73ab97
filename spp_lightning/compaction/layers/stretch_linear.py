"""The linear layer of a stretch, alone or behind compact layers."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

from spp_lightning.compaction.kernels.cpu.call_list import CallKind, CallListMaker
from spp_lightning.compaction.kernels.cpu.chain import Linear
from spp_lightning.compaction.layers.flat_linear import linear_of
from spp_lightning.compaction.layers.stretch_parts import Part, Prepared, ReadsAll

__all__ = ["add_linear", "prepared_linear"]


def prepared_linear(module: nn.Module) -> Prepared | None:
    """A linear layer as the kernels compute it, if they may read its tensors."""
    linear = linear_of(module)
    return None if linear is None else _Linear(module, linear)


def add_linear(
    maker: CallListMaker, linear: Linear, x: Hashable, out: Hashable, threads: int
) -> None:
    """Add the call of a linear layer, whose input is flattened from its second dimension on.

    Raises:
        ValueError: If the input has another number of features.
    """
    shape = maker.shapes[x]
    linear.check(shape)
    maker.add(
        *(CallKind.LINEAR, x, out, (shape[0], linear.out_features)),
        what=linear.address,
        batch=shape[0],
        threads=threads,
        held=linear,
    )


class _Linear(ReadsAll):
    def __init__(self, module: nn.Module, linear: Linear) -> None:
        self._module, self._linear = module, linear

    def holds(self) -> bool:
        return linear_of(self._module) is self._linear

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        add_linear(maker, self._linear, part.args[0], part.out, threads)
