"""What a pruning run shows: probabilities, masks, counts, MACs, expected length."""

from __future__ import annotations

from torch import Tensor, nn

from spp_lightning.method.layer import PrunedLayer
from spp_lightning.method.masks import output_positions
from spp_lightning.method.rule import count_updates
from spp_lightning.method.settings import SPPSettings

__all__ = ["PruningProgress"]


class PruningProgress:
    """The readable side of :class:`~spp_lightning.SPPPruner`."""

    settings: SPPSettings
    _layers: list[PrunedLayer]
    _attached: bool
    _finished: bool
    # One buffer each for the groups of all layers, (groups,).
    _probability: Tensor
    _sampled: Tensor

    def __repr__(self) -> str:
        layers = ", ".join(f"{x.name} {x.num_pruned}/{x.target}" for x in self._layers)
        return f"{type(self).__name__}({layers} {self.settings.granularity}s pruned)"

    @property
    def finished(self) -> bool:
        """Whether every layer has pruned its target number of groups."""
        return self._finished

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers under pruning, by name."""
        return {layer.name: layer.module for layer in self._layers}

    @property
    def probability(self) -> dict[str, Tensor]:
        """Pruning probability per group, ``(groups,)``, by layer. Views of the state."""
        return {layer.name: self._probability[layer.span] for layer in self._layers}

    @property
    def mask(self) -> dict[str, Tensor]:
        """The mask of the current step, ``(groups,)``, bool, True = kept, by layer. Views.

        With ``masking="scale"``: the factor 1 − p per group, float32.
        """
        return {layer.name: self._sampled[layer.span] for layer in self._layers}

    @property
    def sparsity(self) -> dict[str, float]:
        """Share of the groups pruned so far, by layer."""
        return {layer.name: layer.num_pruned / layer.groups.count for layer in self._layers}

    @property
    def total_sparsity(self) -> float:
        """Share of the groups pruned so far, over all layers."""
        pruned = sum(layer.num_pruned for layer in self._layers)
        return pruned / sum(layer.groups.count for layer in self._layers)

    @property
    def num_groups(self) -> dict[str, int]:
        """Number of groups, by layer."""
        return {layer.name: layer.groups.count for layer in self._layers}

    @property
    def num_pruned(self) -> dict[str, int]:
        """Number of groups pruned so far, by layer."""
        return {layer.name: layer.num_pruned for layer in self._layers}

    @property
    def num_target(self) -> dict[str, int]:
        """Number of groups to prune, by layer."""
        return {layer.name: layer.target for layer in self._layers}

    @property
    def num_recovered(self) -> dict[str, int]:
        """Number of groups whose p fell in the last update, by layer."""
        return {layer.name: layer.num_recovered for layer in self._layers}

    @property
    def macs(self) -> dict[str, tuple[int, int]]:
        """MACs per input, dense and now, by layer. Layers that have not run uncompiled are absent.

        A layer that runs several times per input counts once.
        """
        self._note_positions()
        return {layer.name: layer.macs for layer in self._layers if layer.positions}

    @property
    def expected_updates(self) -> int:
        """Updates from the start until every layer is finished, if ranks never changed."""
        s = self.settings
        return max(
            count_updates(x.groups.count, x.ratio, s.A, s.u, s.crossing) for x in self._layers
        )

    @property
    def expected_steps(self) -> int:
        """Optimizer steps from step 0 until every layer is finished, if ranks never changed."""
        updates = self.expected_updates
        return self.settings.start_step + (updates - 1) * self.settings.interval if updates else 0

    def _note_positions(self) -> None:
        """Take over the output positions that the masked layers have counted."""
        if self._attached:
            for layer in self._layers:
                layer.positions = output_positions(layer.module) or layer.positions
