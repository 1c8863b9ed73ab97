"""What a pruning run shows: probabilities, masks, counts, MACs, expected length."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spp_lightning.method.buffers import MaskBuffers
from spp_lightning.method.coupled.macs import NetworkMacs
from spp_lightning.method.layer import MaskedLayer, PrunedLayer, PrunedUnit
from spp_lightning.method.masks import output_positions
from spp_lightning.method.rule import count_updates
from spp_lightning.method.settings import SPPSettings

__all__ = ["PruningProgress"]


class PruningProgress:
    """The readable side of :class:`~spp_lightning.SPPPruner`.

    With coupled channels a set of channels stands where a layer does else, under the name of the
    first layer that writes them. Only ``layers`` and ``macs`` are by single layers.
    """

    settings: SPPSettings
    _units: Sequence[PrunedUnit]
    _masked: list[MaskedLayer]
    _macs: NetworkMacs | None
    _masks: MaskBuffers
    _attached: bool
    _finished: bool
    _probability: Tensor  # of the groups of all units, (groups,)

    def __repr__(self) -> str:
        layers = ", ".join(f"{x.name} {x.num_pruned}/{x.target}" for x in self._units)
        return f"{type(self).__name__}({layers} {self.settings.granularity}s pruned)"

    @property
    def finished(self) -> bool:
        """Whether every layer has pruned its target number of groups."""
        return self._finished

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers under pruning, by name."""
        return {name: layer for unit in self._units for name, layer in unit.layers.items()}

    @property
    def probability(self) -> dict[str, Tensor]:
        """Pruning probability per group, ``(groups,)``, by layer. Views of the state."""
        return {unit.name: self._probability[unit.span] for unit in self._units}

    @property
    def mask(self) -> dict[str, Tensor]:
        """The mask of the current step, ``(groups,)``, bool, True = kept, by layer. Views.

        With ``masking="scale"``: the factor 1 − p per group, float32.
        """
        return {unit.name: self._masks.sampled[unit.span] for unit in self._units}

    @property
    def sparsity(self) -> dict[str, float]:
        """Share of the groups pruned so far, by layer."""
        return {unit.name: unit.num_pruned / unit.count for unit in self._units}

    @property
    def total_sparsity(self) -> float:
        """Share of the groups pruned so far, over all layers."""
        pruned = sum(unit.num_pruned for unit in self._units)
        return pruned / sum(unit.count for unit in self._units)

    @property
    def num_groups(self) -> dict[str, int]:
        """Number of groups, by layer."""
        return {unit.name: unit.count for unit in self._units}

    @property
    def num_pruned(self) -> dict[str, int]:
        """Number of groups pruned so far, by layer."""
        return {unit.name: unit.num_pruned for unit in self._units}

    @property
    def num_target(self) -> dict[str, int]:
        """Number of groups to prune, by layer."""
        return {unit.name: unit.target for unit in self._units}

    @property
    def num_recovered(self) -> dict[str, int]:
        """Number of groups whose p fell in the last update, by layer."""
        return {unit.name: unit.num_recovered for unit in self._units}

    @property
    def macs(self) -> dict[str, tuple[int, int]]:
        """MACs per input, dense and now, by layer. Layers that have not run uncompiled are absent.

        A layer that runs several times per input counts once. With coupled channels all
        convolutions and linear layers of the network are there, and each call counts.
        """
        if self._macs is not None:
            dense, now = self._macs.layers({}), self._macs.layers(self.num_pruned)
            return {name: (dense[name], now[name]) for name in dense}
        self._note_positions()
        units = [x for x in self._units if isinstance(x, PrunedLayer)]
        return {x.name: x.macs for x in units if x.layer.positions}

    @property
    def expected_updates(self) -> int:
        """Updates from the start until every layer is finished, if ranks never changed."""
        s = self.settings
        return max(count_updates(x.count, x.ratio, s.A, s.u, s.crossing) for x in self._units)

    @property
    def expected_steps(self) -> int:
        """Optimizer steps from step 0 until every layer is finished, if ranks never changed."""
        updates = self.expected_updates
        return self.settings.start_step + (updates - 1) * self.settings.interval if updates else 0

    def _note_positions(self) -> None:
        """Take over the output positions that the masked layers have counted."""
        if self._attached:
            for layer in self._masked:
                layer.positions = output_positions(layer.module) or layer.positions
