"""The masks of all weight groups, and of the layers on which they act."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spp_lightning.method.masks import Masking
from spp_lightning.method.sampling import sample_masks

__all__ = ["MaskBuffers", "Spread"]


class Spread(NamedTuple):
    """Which channel of which layer is masked with which group.

    Attributes:
        size: Channels of all layers: the length of the masks of all layers.
        places: Those that can be pruned, ``(places,)``, int64. The others are never masked.
        groups: The group of each place, likewise.
    """

    size: int
    places: Tensor
    groups: Tensor

    def to(self, device: torch.device) -> Spread:
        """The same on a device."""
        return Spread(self.size, self.places.to(device), self.groups.to(device))


class MaskBuffers:
    """Masks that follow from the pruning probabilities, in buffers that keep their place.

    Args:
        num_groups: Weight groups of all units.
        masking: Whether the training mask is drawn, or is the expected one.
        spread: Which channels of which layers each group masks. Default: the masks of the layers
            are those of the groups.
        device: Where the buffers are to be.

    Attributes:
        alive: Which groups have p < 1, ``(groups,)``, bool.
        expected: The expected mask 1 − p, ``(groups,)``, float32.
        sampled: The mask of the current step, ``(groups,)``, bool; or ``expected`` itself.
        layer_sampled: The mask of the current step in all layers, ``(places,)``.
        layer_expected: The expected mask in all layers, likewise.
    """

    def __init__(
        self, num_groups: int, masking: Masking, spread: Spread | None, device: torch.device
    ) -> None:
        self._spread = None if spread is None else spread.to(device)
        self._generator = torch.Generator(device)
        self.alive = torch.ones(num_groups, dtype=torch.bool, device=device)
        self.expected = torch.ones(num_groups, dtype=torch.float32, device=device)
        self.sampled = self.expected if masking == "scale" else self.alive.clone()
        self.layer_expected, self.layer_sampled = self.expected, self.sampled
        if spread is not None:
            self.layer_expected = torch.ones(spread.size, device=device)
            self.layer_sampled = self.layer_expected
            if masking == "sample":
                self.layer_sampled = torch.ones(spread.size, dtype=torch.bool, device=device)

    def follow(self, probability: Tensor) -> None:
        """Compute what follows from p alone."""
        torch.lt(probability, 1, out=self.alive)
        torch.sub(1, probability, out=self.expected)
        self._fill(self.layer_expected, self.expected)

    def sample(self, probability: Tensor, seed: int, step: int) -> None:
        """Draw the mask of a step."""
        sample_masks(probability, seed, step, self._generator, self.sampled)
        self._fill(self.layer_sampled, self.sampled)

    def to(self, device: torch.device) -> None:
        """Move the buffers."""
        scaled = self.sampled is self.expected
        self.alive, self.expected = self.alive.to(device), self.expected.to(device)
        self.sampled = self.expected if scaled else self.sampled.to(device)
        if self._spread is None:
            self.layer_expected, self.layer_sampled = self.expected, self.sampled
        else:
            self._spread = self._spread.to(device)
            self.layer_expected = self.layer_expected.to(device)
            self.layer_sampled = self.layer_expected if scaled else self.layer_sampled.to(device)
        self._generator = torch.Generator(device)

    def _fill(self, layers: Tensor, groups: Tensor) -> None:
        if self._spread is not None:
            _, places, numbers = self._spread
            layers.index_copy_(0, places, groups.index_select(0, numbers))
