"""What a stretch is made of: its parts, and what their modules have prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from spp_lightning.compaction.kernels.cpu.call_list import CallListMaker

__all__ = ["Part", "Path", "Prepared", "ReadsAll", "check_residual", "residual_of"]

Path = tuple[str, ...]


class Part(NamedTuple):
    """One of the calls of a stretch.

    Attributes:
        kind: ``"row"`` of compact layers, or a module of an int8 kind, ``"gate"``, ``"means"`` of
            planes, ``"pool"``, ``"norm"``, ``"concat"``, ``"sum"`` or ``"linear"``.
        layers: Paths of the compact layers, of the int8 module, or of the norm.
        other: Path of the linear layer, alone or behind a row, of the pool, or of a norm's
            activation; None where there is none, or a function stands in its place.
        args: Names of what it reads. That of a row's residual may stand for nothing.
        out: Name of what it makes.
        free: Names of results of the stretch that it is the last one to read.
        how: Whether means are ``(B, C, 1, 1)``, or ``(B, C)``; the pool; or a norm's limits.
    """

    kind: str
    layers: tuple[Path, ...]
    other: Path | None
    args: tuple[int, ...]
    out: int
    free: tuple[int, ...]
    how: Any = None


class Prepared(Protocol):
    """A part with what its modules have prepared; it never changes."""

    def holds(self) -> bool:
        """Whether the modules are what they were when this was made."""
        ...

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        """Add the part's calls for the shapes that the maker knows.

        Args:
            part: The part.
            maker: What makes the list of calls.
            threads: Of torch.
            reader: The only part that reads the result, as its input, if there is one.

        Raises:
            ValueError: If a shape doesn't fit.
        """
        ...

    def channels_read(self, shape: Sequence[int], threads: int) -> Tensor | None:
        """Which channels of its input it reads, ``(C,)``, bool; None if that may be all.

        Args:
            shape: Of the input.
            threads: Of torch.
        """
        ...


class ReadsAll:
    """A prepared part that reads all channels of its input."""

    def channels_read(self, shape: Sequence[int], threads: int) -> Tensor | None:
        """None; the arguments are those of :class:`Prepared`."""
        return None


def residual_of(part: Part, maker: CallListMaker) -> int | None:
    """Name of the residual that a part adds, if it is there."""
    return next((name for name in part.args[1:] if name in maker.shapes), None)


def check_residual(maker: CallListMaker, residual: Any, shape: tuple[int, ...]) -> None:
    """Check the shape of a residual, if there is one.

    Raises:
        ValueError: If it is another one.
    """
    if residual is not None and maker.shapes[residual] != shape:
        raise ValueError(f"`residual` must be {shape}, got {maker.shapes[residual]}.")
