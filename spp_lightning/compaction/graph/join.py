"""Which compact layers of a network follow each other, so that one call can compute them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from torch import nn

from spp_lightning.compaction.graph.heads import MOST_WEIGHTS, flattens
from spp_lightning.compaction.graph.steps import Step, Value, users_of
from spp_lightning.compaction.kernels.cpu.chain import may_follow
from spp_lightning.compaction.layers.column_conv import ColumnConv2d

__all__ = ["Row", "join"]


class Row(NamedTuple):
    """Layers that one call computes.

    Attributes:
        layers: Positions of the compact layers' steps.
        linear: Position of the linear layer's step that reads the last one's result flattened.
        replaced: Positions of all steps that the call replaces.
        position: Where in the list of steps the call stands.
    """

    layers: tuple[int, ...]
    linear: int | None
    replaced: tuple[int, ...]
    position: int

    @property
    def result(self) -> int:
        """Position of the step whose result the call returns."""
        return self.layers[-1] if self.linear is None else self.linear


def join(
    steps: Sequence[Step], layer_of: Callable[[str], nn.Module], others: Collection[int] = ()
) -> tuple[Row, ...]:
    """Find layers of which each is read by the next one only.

    Args:
        steps: The network.
        layer_of: The layer of a name.
        others: Positions of steps that other calls replace.

    Returns:
        Rows of two or more layers; a linear layer counts.
    """
    return _Finder(steps, layer_of, others).rows()


class _Finder:
    def __init__(
        self,
        steps: Sequence[Step],
        layer_of: Callable[[str], nn.Module],
        others: Collection[int],
    ) -> None:
        self._others = others
        self._steps, self._users = steps, users_of(steps)
        self._modules = {
            i: layer_of(str(step.target)) for i, step in enumerate(steps) if step.kind == "layer"
        }
        names = (step.target for step in steps if step.kind == "layer")
        self._calls = Counter(str(name) for name in names)
        # A layer whose tensor is read by itself stays a layer of its own.
        self._calls.update(
            str(step.target).rpartition(".")[0] for step in steps if step.kind == "tensor"
        )

    def rows(self) -> tuple[Row, ...]:
        found = []
        for first in range(len(self._steps)):
            if self._compact(first) is None or self._previous(first) is not None:
                continue
            layers = [first]
            while (after := self._only_user(layers[-1])) is not None:
                if self._previous(after) != layers[-1]:
                    break
                layers.append(after)
            row = self._row(layers)
            if row is not None:
                found.append(row)
        return tuple(found)

    def _row(self, layers: list[int]) -> Row | None:
        first, last = layers[0], layers[-1]
        flat, linear = self._linear_after(last)
        if len(layers) == 1 and linear is None:
            return None
        residual = self._steps[last].args[1:]
        later = bool(residual) and isinstance(residual[0], Value) and residual[0].step > first
        if later and not all(self._writes_nothing(i) for i in range(first, last)):
            # The first layer would read its input behind a step that may write to it.
            return self._row(layers[:-1])
        behind = () if flat is None or linear is None else (flat, linear)
        return Row(tuple(layers), linear, (*layers, *behind), last if later else first)

    def _compact(self, position: int) -> ColumnConv2d | None:
        layer, step = self._modules.get(position), self._steps[position]
        if position in self._others:
            return None
        if type(layer) is not ColumnConv2d or "forward" in vars(layer) or step.kwargs:
            return None
        return layer if self._calls[str(step.target)] == 1 else None

    def _only_user(self, position: int) -> int | None:
        users = self._users[position]
        return users[0] if len(users) == 1 else None

    def _previous(self, position: int) -> int | None:
        """The layer whose result a layer reads, if one call can compute both."""
        layer, args = self._compact(position), self._steps[position].args
        if layer is None or not isinstance(args[0], Value):
            return None
        before = args[0].step
        earlier = self._compact(before)
        if (
            earlier is None
            or not may_follow(earlier.geometry, layer.geometry)
            or self._only_user(before) != position
            or len(self._steps[before].args) != 1  # only the last layer of a row adds a residual
            or args[0] in args[1:]
        ):
            return None
        return before

    def _linear_after(self, position: int) -> tuple[int | None, int | None]:
        """The steps that flatten a layer's result and pass it to a linear layer."""
        flat = self._only_user(position)
        if flat is None or not flattens(self._steps[flat], self._modules.get(flat)):
            return None, None
        after = self._only_user(flat)
        linear = None if after is None else self._modules.get(after)
        if (
            after is None
            or type(linear) is not nn.Linear
            or linear.weight.numel() > MOST_WEIGHTS
            or self._steps[after].args != (Value(flat),)
            or self._steps[after].kwargs
            or self._calls[str(self._steps[after].target)] != 1
        ):
            return None, None
        return flat, after

    def _writes_nothing(self, position: int) -> bool:
        kinds = (ColumnConv2d, nn.Conv2d, nn.BatchNorm2d)
        step = self._steps[position]
        return step.kind in ("input", "tensor") or type(self._modules.get(position)) in kinds
