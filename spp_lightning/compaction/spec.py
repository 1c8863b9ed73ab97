"""One description of a layer, as it crosses every border: to the operators and to the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from spp_lightning.compaction.epilogue import Epilogue
from spp_lightning.compaction.geometry import Geometry, Pair

__all__ = ["ConvSpec"]

_GEOMETRY_NUMBERS = 11


class ConvSpec(NamedTuple):
    """A convolution and its epilogue: all of a layer but its tensors.

    >>> spec = ConvSpec(Geometry(3, 8, (3, 3)), Epilogue())
    >>> ConvSpec.unpack(*spec.pack()) == spec
    True
    """

    geometry: Geometry
    epilogue: Epilogue = Epilogue()

    def check(self) -> None:
        """Check all attributes.

        Raises:
            ValueError: If one is of another type or out of range.
        """
        self.geometry.check()
        self.epilogue.check()

    def pack(self) -> tuple[list[int], list[float]]:
        """All of it as two flat lists, as operators of torch take it."""
        g = self.geometry
        sizes, scalars = self.epilogue.numbers()
        pairs = (*g.kernel_size, *g.stride, *g.padding, *g.dilation)
        return [g.channels, g.filters, *pairs, g.groups, *sizes], scalars

    @classmethod
    def unpack(cls, sizes: Sequence[int], scalars: Sequence[float]) -> ConvSpec:
        """The description of which :meth:`pack` made two lists."""
        channels, filters, kh, kw, sh, sw, ph, pw, dh, dw, groups = sizes[:_GEOMETRY_NUMBERS]
        pairs = (kh, kw), (sh, sw), (ph, pw), (dh, dw)
        geometry = Geometry(channels, filters, *pairs, groups)
        return cls(geometry, Epilogue.of(sizes[_GEOMETRY_NUMBERS:], scalars))

    def out_size(self, height: int, width: int) -> Pair:
        """Height and width of the output for an input of ``height`` by ``width``.

        Raises:
            ValueError: If the input is smaller than the kernel or than a window of the epilogue.
        """
        return self.epilogue.out_size(*self.geometry.out_size(height, width))
