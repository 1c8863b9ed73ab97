"""What is under pruning: units with a ratio each, and the layers on whose weights masks act."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from spp_lightning.method.groups import Criterion, WeightGroups, weight_of

__all__ = ["MaskedLayer", "PrunedLayer", "PrunedUnit", "Zero"]

Zero = Callable[..., None]
"""Sets pruned groups to 0, in place, in any number of tensors of one parameter's shape."""


@dataclass
class MaskedLayer:
    """A layer on whose weight a mask acts, and where the mask lies in the buffers."""

    name: str
    module: nn.Module
    groups: WeightGroups
    span: slice  # of the masks of all layers
    positions: int = 0  # output positions per input; 0 until the layer has run uncompiled


@dataclass
class PrunedUnit(ABC):
    """What has a ratio of its own: where its groups lie in the pruner's buffers, and its counts."""

    name: str
    ratio: float  # target sparsity
    target: int  # groups to prune
    span: slice  # of the groups of all units
    num_pruned: int = field(default=0, init=False)
    num_recovered: int = field(default=0, init=False)  # groups whose p fell in the last update

    @property
    def finished(self) -> bool:
        """Whether the target is reached."""
        return self.num_pruned == self.target

    @property
    def count(self) -> int:
        """Number of weight groups, N_c in the paper."""
        return int(self.span.stop - self.span.start)

    @property
    @abstractmethod
    def layers(self) -> dict[str, nn.Module]:
        """The layers that have weights in its groups, by name; norms don't count."""

    @property
    @abstractmethod
    def devices(self) -> set[torch.device]:
        """The devices of its weights."""

    @abstractmethod
    def importance(self, criterion: Criterion) -> Tensor:
        """One importance per group, ``(groups,)``, in float32 at least."""

    @abstractmethod
    def zeros(
        self, alive: Tensor, model: nn.Module | None = None
    ) -> Iterator[tuple[nn.Parameter, Zero]]:
        """Every parameter that has groups, and what sets the pruned ones of them to 0.

        Args:
            alive: Which groups are kept, ``(groups,)``, bool.
            model: A copy of the network whose parameters are meant. Default: the network itself.
        """


@dataclass
class PrunedLayer(PrunedUnit):
    """A layer whose weight groups are pruned and masked, whatever other layers prune."""

    layer: MaskedLayer

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layer."""
        return {self.name: self.layer.module}

    @property
    def devices(self) -> set[torch.device]:
        """The device of its weight."""
        return {weight_of(self.layer.module).device}

    def importance(self, criterion: Criterion) -> Tensor:
        """The norm of each group, ``(groups,)``."""
        return self.layer.groups.importance(weight_of(self.layer.module), criterion)

    def zeros(
        self, alive: Tensor, model: nn.Module | None = None
    ) -> Iterator[tuple[nn.Parameter, Zero]]:
        """The weight alone."""
        layer = self.layer.module if model is None else model.get_submodule(self.name)
        yield weight_of(layer), partial(self.layer.groups.zero, alive)

    @property
    def macs(self) -> tuple[int, int]:
        """MACs per input, dense and without the pruned groups; 0 until the layer has run."""
        per_group = self.layer.positions * self.layer.groups.size
        return per_group * self.count, per_group * (self.count - self.num_pruned)
