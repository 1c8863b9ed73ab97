"""plan(): ratios per layer that reach a target of the whole network."""

from __future__ import annotations

import copy
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spp_lightning.compaction.macs import count_macs
from spp_lightning.compaction.report import compact_report
from spp_lightning.method.groups import (
    Criterion,
    Granularity,
    LayerGranularity,
    WeightGroups,
    weight_of,
)
from spp_lightning.method.rule import target_count
from spp_lightning.method.selection import Selection, is_convolution, select_layers
from spp_lightning.planning.allocation import allocate, fit_exactly
from spp_lightning.planning.coupled import CoupledPlanner
from spp_lightning.planning.latency import (
    Bench,
    LayerTimes,
    layer_times,
    on_device,
    using_threads,
)
from spp_lightning.planning.plan import LayerPlan, Plan
from spp_lightning.planning.sensitivity import (
    MOST,
    RATIOS,
    Sensitivity,
    loss_sensitivity,
    weight_sensitivity,
)
from spp_lightning.planning.target import Of, Target, TargetSettings
from spp_lightning.planning.trial import trial_network

__all__ = ["Planner", "plan"]

_STEPS = 64  # candidates of a layer: kept shares in 64ths
_MEASURED = (0.0, *RATIOS)  # ratios at which layers are timed
_TOLERANCE = 0.03  # of a latency
_AIM = 0.01  # nearer than this, no further trial is made
_TRIALS = 8  # networks that are measured on the way to a latency
_GUESSES = 30
_WEIGHTS = 0.1  # of the estimate by weights beside that by the loss, which is a noisy one

Inputs = tuple[Tensor, ...]

_log = logging.getLogger(__name__)  # says at INFO what is being measured


def plan(
    model: nn.Module,
    example_input: Tensor | Inputs,
    speedup: float | None = None,
    of: Of = "network",
    macs: float | None = None,
    latency_ms: float | None = None,
    layers: Sequence[str] | None = None,
    granularity: Granularity = "column",
    criterion: Criterion = "l1",
    loss: Callable[[nn.Module], float] | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Plan:
    """Find the ratio of every layer with which a network reaches a target as a whole.

    What a layer costs is estimated by the loss on a few batches without the layer's least important
    groups, or by their share of the layer's squared norm. What it saves is counted in MACs, or
    measured in milliseconds: ``compact`` makes trial networks at six ratios, and each of their
    layers is timed. A knapsack then picks the ratios of least total cost that reach the target.

    Coupled channels are all pruned at the same ratio, the one that the target takes. Their target
    can't be a latency.

    MACs end at most one group below the target. A latency is measured for a trial network at the
    ratios found, and corrected until it is within 3 % of the target.

    Args:
        model: The network; it is left as it was.
        example_input: The batch that it is to be fast for, or a tuple of the positional arguments.
            MACs are those of its first image.
        speedup: Target: how many times fewer MACs or milliseconds, by ``of``. Default: 4, unless
            ``macs`` or ``latency_ms`` is given.
        of: ``"network"``: MACs of the whole network. ``"latency"``: its latency, that of the
            unpruned network in torch over that of the pruned one when it is compact. ``"layers"``:
            the same ratio for every layer.
        macs: Target: MACs left in the whole network for one image.
        latency_ms: Target: milliseconds of the compact network for the batch.
        layers: Patterns of the layers to prune, as in :class:`~spp_lightning.SPPPruner`.
        granularity: The weight group, likewise.
        criterion: Importance of a group, likewise.
        loss: The loss of a network on a few batches: it is called with copies of ``model`` in
            evaluation mode. Default: the estimate by weights.
        device: Device whose latency counts. Default: the network's.
        threads: CPU threads to measure with. Default: as many as torch uses.

    Returns:
        The plan; its ``ratios`` are for ``prune_ratio``.

    Raises:
        ValueError: If an argument is out of range, or the target cannot be reached; the error says
            what can.

    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    >>> found = plan(net, torch.zeros(1, 3, 12, 12), speedup=2, of="network")
    >>> found.dense_macs, found.macs <= 190656 / 2
    (190656, True)
    >>> list(found.ratios)
    ['0', '2']
    """
    settings = TargetSettings(
        speedup=speedup,
        layers=layers,
        granularity=granularity,
        criterion=criterion,
        of=of if macs is None and latency_ms is None else "layers",
        macs=macs,
        latency_ms=latency_ms,
        device=device,
        threads=threads,
    )
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    if granularity == "coupled-channel":
        return CoupledPlanner(model, inputs, settings).solve(settings.target)
    return Planner(model, inputs, settings, loss).solve(settings.target)


@dataclass(frozen=True)
class _Layer:
    """A layer that can be pruned."""

    name: str
    size: tuple[int, ...]
    groups: int
    macs: int  # for one image
    counts: NDArray[np.int64]  # of pruned groups: the candidates

    @property
    def ratios(self) -> NDArray[np.float64]:
        return self.counts / self.groups

    @property
    def unit(self) -> int:
        """MACs of one group."""
        return self.macs // self.groups


class Planner:
    """Measures a network once, and solves any number of targets from that.

    Args:
        model: The network; it is left as it was.
        inputs: The positional arguments that it is to be fast for.
        settings: What may be pruned, and where the latency is measured.
        loss: The loss of a network on a few batches; None for the estimate by weights.

    Attributes:
        loss: Likewise; it may be set until the first target is solved.
        dense_macs: MACs of the unpruned network for one image.
        left_out: Convolutions that are not pruned, by name, with the reason.

    Raises:
        ValueError: If the network fails for the inputs, there is no such device, or there is no
            layer to prune.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        settings: TargetSettings,
        loss: Callable[[nn.Module], float] | None = None,
    ) -> None:
        if settings.granularity == "coupled-channel":
            raise ValueError(
                '`granularity` must be "column", "channel" or "filter" to plan layer by layer, got'
                f" {settings.granularity!r}."
            )
        device = on_device(settings.device, model)
        self._source = model
        self._granularity: LayerGranularity = settings.granularity
        self.settings = settings
        self.loss = loss
        self.model = copy.deepcopy(model).eval().to(device)
        self.inputs = tuple(x.to(device) for x in inputs)
        selection = select_layers(self.model, settings.ratio, settings.layers)
        macs = _dense_macs(self.model, self.inputs)
        self.dense_macs = sum(macs.values())
        self.left_out = dict(selection.skipped)
        self._layers = self._candidates(selection, macs)
        self._ratios = selection.ratios
        self._bench: Bench | None = None
        self._times: LayerTimes | None = None
        self._sensitivity: Sensitivity | None = None
        self._estimate = "weights"

    @property
    def loss_macs(self) -> int:
        """MACs per image of all the losses that a plan computes."""
        return self.dense_macs * (1 + len(self._layers) * len(RATIOS))

    # -- what is measured, once each -----------------------------------------------------------

    @property
    def bench(self) -> Bench:
        """The dense network, measured."""
        if self._bench is None:
            self._bench = Bench(self.model, self.inputs)
        return self._bench

    @property
    def times(self) -> LayerTimes:
        """Milliseconds of each layer over its ratio."""
        if self._times is None:
            networks = []
            for ratio in _MEASURED:
                _log.info("Measuring the network with %.0f%% of every layer pruned.", 100 * ratio)
                network = self.bench.compacted(self._trial(self._uniform(ratio)))
                networks.append((ratio, network, self.bench.ms(network)))
            names = [layer.name for layer in self._layers]
            self._times = layer_times(names, networks, self.inputs)
        return self._times

    @property
    def sensitivity(self) -> Sensitivity:
        """What each layer costs over its ratio."""
        if self._sensitivity is None:
            s = self.settings
            modules = {x.name: self._source.get_submodule(x.name) for x in self._layers}
            by_weights = weight_sensitivity(modules, self._granularity, s.criterion)
            self._sensitivity = by_weights
            if self.loss is not None:
                _log.info("Computing the loss without parts of each of %d layers.", len(modules))
                by_loss = loss_sensitivity(
                    self._source, list(modules), self.loss, self._granularity, s.criterion
                )
                self._estimate = "loss"
                self._sensitivity = {
                    name: rises + _WEIGHTS * by_weights[name] for name, rises in by_loss.items()
                }
        return self._sensitivity

    def measure(self) -> None:
        """Measure each layer now, also for targets that don't need it."""
        with using_threads(self.settings.threads):
            _ = self.times, self.sensitivity

    def go_beyond(self, plan: Plan) -> None:
        """From now on, prune at least what a plan prunes of each layer."""
        before = {layer.name: layer.pruned for layer in plan.layers}
        for i, layer in enumerate(self._layers):
            more = layer.counts[layer.counts > before[layer.name]]
            counts = np.concatenate([[before[layer.name]], more])
            self._layers[i] = replace(layer, counts=counts)

    # -- solving -------------------------------------------------------------------------------

    def solve(self, target: Target | None, latency: bool = True) -> Plan:
        """The plan for a target.

        Args:
            target: The target; None for the ratios that the settings give.
            latency: Whether the latency is measured where the target doesn't need it.

        Raises:
            ValueError: If the target cannot be reached.
        """
        with using_threads(self.settings.threads):
            if target is None:
                ratios = [self._ratios[layer.name] for layer in self._layers]
                pairs = zip(self._layers, ratios, strict=True)
                counts = [target_count(layer.groups, ratio) for layer, ratio in pairs]
            elif target.quantity == "layers":
                counts = self._uniform(1 - 1 / target.value)
            elif target.quantity == "macs":
                counts = self._solve_macs(target)
            else:
                return self._solve_latency(target)
            if not latency:
                return self._plan(target, counts)
            network = self.bench.compacted(self._trial(counts))
            return self._plan(target, counts, network, self.bench.ms(network))

    def _solve_macs(self, target: Target) -> list[int]:
        least = self._macs([int(layer.counts[-1]) for layer in self._layers])
        limit = target.limit(self.dense_macs)
        self._check_reach(target, limit, least, self.dense_macs, self.dense_macs)
        fixed = self._macs([layer.groups for layer in self._layers])
        sizes = [layer.macs * (1 - layer.ratios) for layer in self._layers]
        chosen = allocate(self._costs(), sizes, limit - fixed)
        assert chosen is not None, "the limit is at least the smallest sizes"
        counts = [int(x.counts[i]) for x, i in zip(self._layers, chosen, strict=True)]
        more = fit_exactly(
            [n - int(x.counts[0]) for x, n in zip(self._layers, counts, strict=True)],
            [int(x.counts[-1] - x.counts[0]) for x in self._layers],
            [layer.unit for layer in self._layers],
            self._macs(counts) - math.floor(limit),
        )
        return [n + int(x.counts[0]) for x, n in zip(self._layers, more, strict=True)]

    def _solve_latency(self, target: Target) -> Plan:
        times, costs = self.times, self._costs()
        limit, dense_ms = target.limit(self.bench.dense_ms), self.bench.dense_ms
        sizes = [
            np.interp(layer.ratios, times.ratios, times.layers[layer.name])
            for layer in self._layers
        ]
        least, most = min(times.whole) / (1 + _TOLERANCE), times.whole[0] * (1 + _TOLERANCE)
        self._check_reach(target, limit, least, most, dense_ms)
        tried: dict[tuple[int, ...], float] = {}
        known: list[tuple[float, float]] = []
        for _ in range(_GUESSES):
            guess = _next_guess(known, limit)
            counts = tuple(self._allocate_ms(costs, sizes, guess))
            if counts not in tried:
                if len(tried) == _TRIALS:
                    break
                _log.info("Measuring trial %d for %s.", len(tried) + 1, target)
                tried[counts] = self._measured(counts, limit)
            known.append((guess, tried[counts]))
            if abs(tried[counts] / limit - 1) <= _AIM:
                break
        counts, ms = min(tried.items(), key=lambda trial: abs(trial[1] / limit - 1))
        if abs(ms / limit - 1) > _TOLERANCE:
            reached = ", ".join(f"{target.given(x, dense_ms):.3g}" for x in sorted(tried.values()))
            raise ValueError(
                f"{target} must be reached to within {_TOLERANCE:.0%}, but the ratios tried reach"
                f" {reached} on {self._measured_on()}; ask for one of these."
            )
        return self._plan(target, counts, self.bench.compacted(self._trial(counts)), ms)

    def _measured(self, counts: Sequence[int], limit: float) -> float:
        """Milliseconds at these ratios; measured three times where the limit is near."""
        trial = self._trial(counts)
        ms = [self.bench.ms(self.bench.compacted(trial))]
        if abs(ms[0] / limit - 1) <= 2 * _TOLERANCE:
            ms += [self.bench.ms(self.bench.compacted(trial)) for _ in range(2)]
        return statistics.median(ms)

    def _check_reach(
        self, target: Target, limit: float, least: float, most: float, dense: float
    ) -> None:
        if least <= limit <= most:
            return
        low, high = sorted(target.given(x, dense) for x in (least, most))
        where = f" on {self._measured_on()}" if target.quantity == "latency" else ""
        digits = ",.0f" if target.argument == "macs" else ".4g"
        raise ValueError(
            f"{target} must be from {low:{digits}} to {high:{digits}}: the network reaches this"
            f" with 0 to {MOST:.0%} of each layer pruned{where}."
        )

    def _allocate_ms(
        self,
        costs: Sequence[NDArray[np.float64]],
        sizes: Sequence[NDArray[np.float64]],
        limit: float,
    ) -> list[int]:
        """The groups to prune for a modelled latency."""
        rest = self.times.rest
        chosen = [len(layer.counts) - 1 for layer in self._layers]
        ratio = 1.0
        for _ in range(3):  # what all else takes depends a little on how much is pruned
            other = float(np.interp(ratio, self.times.ratios, rest))
            found = allocate(costs, sizes, limit - other)
            chosen = chosen if found is None else found
            ratio = self._mean_ratio(
                [x.counts[i] for x, i in zip(self._layers, chosen, strict=True)]
            )
        return [int(x.counts[i]) for x, i in zip(self._layers, chosen, strict=True)]

    def _modelled(self, counts: Sequence[int], sizes: Sequence[NDArray[np.float64]]) -> float:
        """Milliseconds of the network by the sum of its layers' times."""
        rows = zip(self._layers, sizes, counts, strict=True)
        layers = sum(float(np.interp(n, layer.counts, size)) for layer, size, n in rows)
        ratio = self._mean_ratio(counts)
        return layers + float(np.interp(ratio, self.times.ratios, self.times.rest))

    # -- inside --------------------------------------------------------------------------------

    def _candidates(self, selection: Selection, macs: Mapping[str, int]) -> list[_Layer]:
        layers = []
        for name, module in selection.layers.items():
            if not macs.get(name):
                self.left_out[name] = "not computed in evaluation mode"
                continue
            groups = WeightGroups.of(module, self._granularity).count
            steps = np.arange(int(MOST * _STEPS) + 1) / _STEPS
            counts = np.unique(np.minimum(np.round(steps * groups), groups - 1).astype(np.int64))
            size = tuple(weight_of(module).shape)
            layers.append(_Layer(name, size, groups, macs[name], counts))
        if not layers:
            raise ValueError("`model` must compute a layer to prune for `example_input`.")
        return layers

    def _costs(self) -> list[NDArray[np.float64]]:
        """What each candidate of each layer costs."""
        at = np.array([0.0, *RATIOS])
        return [
            np.interp(layer.ratios, at, np.concatenate([[0.0], self.sensitivity[layer.name]]))
            for layer in self._layers
        ]

    def _uniform(self, ratio: float) -> list[int]:
        return [max(target_count(x.groups, ratio), int(x.counts[0])) for x in self._layers]

    def _macs(self, counts: Sequence[int]) -> int:
        saved = sum(x.unit * n for x, n in zip(self._layers, counts, strict=True))
        return self.dense_macs - saved

    def _mean_ratio(self, counts: Sequence[int]) -> float:
        saved = self.dense_macs - self._macs(counts)
        return saved / sum(layer.macs for layer in self._layers)

    def _trial(self, counts: Sequence[int]) -> nn.Module:
        pruned = {x.name: n for x, n in zip(self._layers, counts, strict=True)}
        return trial_network(self.model, pruned, self._granularity, self.settings.criterion)

    def _measured_on(self) -> str:
        x = self.inputs[0]
        threads = torch.get_num_threads()
        on = f"{x.device}" + ("" if x.is_cuda else f" with {threads} thread{'s' * (threads > 1)}")
        return f"{on} for a batch of {'×'.join(map(str, x.shape))}"

    def _plan(
        self,
        target: Target | None,
        counts: Sequence[int],
        network: nn.Module | None = None,
        ms: float | None = None,
    ) -> Plan:
        dense = {} if network is None else self._kept_dense(network)
        times = None if self._times is None else self._times.layers
        costs = {} if self._sensitivity is None else self._sensitivity
        layers = tuple(
            LayerPlan(
                layer.name,
                layer.size,
                layer.groups,
                n,
                layer.macs,
                None if times is None else float(times[layer.name][0]),
                {
                    f"{ratio:g}": float(cost)
                    for ratio, cost in zip(RATIOS, costs.get(layer.name, ()), strict=False)
                },
                dense.get(layer.name),
            )
            for layer, n in zip(self._layers, counts, strict=True)
        )
        return Plan(
            "the given ratios" if target is None else target.in_words(),
            layers,
            self.left_out,
            self.dense_macs,
            self._macs(counts),
            None if ms is None else self.bench.dense_ms,
            ms,
            "" if ms is None else self._measured_on(),
            self._estimate,
        )

    def _kept_dense(self, network: nn.Module) -> dict[str, str]:
        try:
            rows = compact_report(network, self.inputs).layers
        except ValueError:  # no convolutions are left
            return {}
        return {row.name: row.reason for row in rows if row.kernel == "dense"}


def _next_guess(known: Sequence[tuple[float, float]], limit: float) -> float:
    """The modelled latency at which the measured one should be the limit.

    Args:
        known: Modelled and measured milliseconds so far.
        limit: The milliseconds to reach.

    Returns:
        The limit at first; then in proportion to the nearest measurement; and interpolated between
        models on both sides of the limit, once there are.

    >>> _next_guess([], 3.0), _next_guess([(1.0, 2.0)], 3.0)
    (3.0, 1.5)
    >>> _next_guess([(1.0, 2.0), (3.0, 4.0)], 2.5)
    1.5
    """
    if not known:
        return limit
    below = [x for x in known if x[1] <= limit]
    above = [x for x in known if x[1] > limit]
    if not below or not above:
        modelled, ms = min(known, key=lambda x: abs(x[1] - limit))
        return modelled * limit / ms
    low, high = max(below), min(above)
    share = (limit - low[1]) / (high[1] - low[1])
    # Not too near to either: both may stand for many models with the same ratios.
    share = min(max(share, 0.1), 0.9)
    return low[0] + share * (high[0] - low[0])


def _dense_macs(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """MACs of every layer for the first image, as if nothing were pruned."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in twin.modules():
            if is_convolution(layer) or isinstance(layer, nn.Linear):
                weight_of(layer).fill_(1)
    batch = len(inputs[0]) if inputs and inputs[0].dim() else 1
    one = tuple(x[:1] if x.dim() > 1 and len(x) == batch else x for x in inputs)
    try:
        return count_macs(twin, one)
    except Exception as error:  # whatever a network raises for an input that doesn't fit
        given = "; ".join(f"{tuple(x.shape)}, {x.dtype}, on {x.device}" for x in inputs)
        raise ValueError(
            f"`example_input` (={given}) must be an input of the network, but it fails for it:"
            f" {str(error).splitlines()[0]}"
        ) from error
