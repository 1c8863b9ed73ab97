"""Plan: a ratio for each layer, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from glob import escape
from typing import Any

from spp_lightning.planning.table import short_count, text_table

__all__ = ["LayerPlan", "Plan"]


@dataclass(frozen=True)
class LayerPlan:
    """What is planned for a layer.

    Attributes:
        name: Of the layer.
        size: Of its weight, ``(N, C / groups, *kernel)``.
        groups: Its weight groups, such as columns.
        pruned: How many of them are to be pruned.
        macs: MACs of the unpruned layer for one image.
        ms: Milliseconds of the unpruned compact layer, with what follows it; None if no latency
            was measured.
        sensitivity: What it costs to prune the layer, by ratio, as text; see ``Plan.estimate``.
        kept_dense: Why ``compact`` keeps the layer dense; None if it doesn't, or wasn't called.
    """

    name: str
    size: tuple[int, ...]
    groups: int
    pruned: int
    macs: int
    ms: float | None = None
    sensitivity: dict[str, float] = field(default_factory=dict)
    kept_dense: str | None = None

    @property
    def ratio(self) -> float:
        """Share of the groups to prune."""
        return self.pruned / self.groups


@dataclass(frozen=True)
class Plan:
    """A ratio for each layer that reaches a target of the whole network; as text, a table.

    Attributes:
        target: The target in words.
        layers: One entry per layer that can be pruned, in the network's order.
        left_out: Convolutions that are not pruned, by name, with the reason.
        dense_macs: MACs of the unpruned network for one image.
        macs: MACs of the pruned network for one image, of kept columns.
        dense_ms: Latency of the unpruned network in torch; None if no latency was measured.
        ms: Latency of a compact trial network at these ratios, likewise.
        measured_on: Device, threads and batch of the latencies, in words.
        estimate: What ``sensitivity`` counts: ``"loss"``, its rise on the given batches, or
            ``"weights"``, the share of the layer's squared norm.
    """

    target: str
    layers: tuple[LayerPlan, ...]
    left_out: dict[str, str]
    dense_macs: int
    macs: int
    dense_ms: float | None = None
    ms: float | None = None
    measured_on: str = ""
    estimate: str = "weights"

    @property
    def ratios(self) -> dict[str, float]:
        """The ratio of each layer, for ``prune_ratio``."""
        return {escape(layer.name): layer.ratio for layer in self.layers}

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain dicts, lists, numbers and strings."""
        plain = asdict(self)
        plain["layers"] = [{**layer, "size": list(layer["size"])} for layer in plain["layers"]]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Plan:
        """The plan of which :meth:`as_dict` made a dict.

        Raises:
            ValueError: If it isn't one.
        """
        try:
            layers = tuple(
                LayerPlan(**{**layer, "size": tuple(layer["size"])}) for layer in plain["layers"]
            )
            return cls(**{**plain, "layers": layers})
        except (TypeError, KeyError) as error:
            raise ValueError(f"The plan in the state must be one of SPP's: {error}.") from error

    def ended(
        self, num_pruned: Mapping[str, int], dense_ms: float | None = None, ms: float | None = None
    ) -> Plan:
        """The plan with what a fit has reached.

        Args:
            num_pruned: Pruned groups, by layer.
            dense_ms: Latency of the unpruned network, measured anew.
            ms: Latency of the pruned network, likewise.
        """
        layers = tuple(replace(x, pruned=num_pruned.get(x.name, 0)) for x in self.layers)
        saved = sum(layer.macs // layer.groups * layer.pruned for layer in layers)
        macs = self.dense_macs - saved
        return replace(self, layers=layers, macs=macs, dense_ms=dense_ms, ms=ms)

    def summary(self) -> str:
        """The MACs and the latency, dense and expected, in one line each."""
        lines = [f"MACs     {_told(self.dense_macs, self.macs, short_count)}"]
        if self.dense_ms is not None and self.ms is not None:
            numbers = _told(self.dense_ms, self.ms, lambda ms: f"{ms:.3f} ms")
            lines.append(f"latency  {numbers}, {self.measured_on}")
        return "\n".join(lines)

    def table(self, costs: bool = True) -> str:
        """One row per layer.

        Args:
            costs: Whether the sensitivity is shown, too.
        """
        head = ["layer", "size", "groups", "pruned", "ratio", "MACs", "share"]
        timed = any(layer.ms is not None for layer in self.layers)
        points = list(self.layers[0].sensitivity) if costs else []
        head += ["ms"] * timed + [f"{float(point):.0%} costs" for point in points]
        rows = []
        for layer in self.layers:
            row = [layer.name, "×".join(map(str, layer.size)), f"{layer.groups}", f"{layer.pruned}"]
            row += [f"{layer.ratio:.1%}", short_count(layer.macs)]
            row += [f"{layer.macs / self.dense_macs:.1%}"]
            row += ["-" if layer.ms is None else f"{layer.ms:.3f}"] * timed
            rows.append(row + [f"{layer.sensitivity[point]:.3f}" for point in points])
        return text_table(head, rows, left=2)

    def notes(self) -> str:
        """What the costs are of, what isn't pruned and what ``compact`` keeps dense, and why."""
        dense = {x.name: x.kept_dense for x in self.layers if x.kept_dense is not None}
        rows = [("not pruned", self.left_out), ("compact keeps dense", dense)]
        notes = [f"{what}: {_by_reason(reasons)}" for what, reasons in rows if reasons]
        if any(layer.sensitivity for layer in self.layers):
            notes.insert(0, f"costs: by the {self.estimate}")
        return "\n".join(notes)

    def __str__(self) -> str:
        return "\n".join(x for x in (self.table(), self.notes(), self.summary()) if x)


def _told(dense: float, pruned: float, told: Any) -> str:
    """Two numbers and how many times as small the second one is."""
    return f"{told(dense)} dense, {told(pruned)} pruned: {dense / pruned:.2f}×"


def _by_reason(reasons: Mapping[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(group)} ({reason})" for reason, group in names.items())
