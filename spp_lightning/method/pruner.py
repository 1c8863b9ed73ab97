"""SPPPruner: the engine that prunes a network in any PyTorch training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spp_lightning.method.groups import Criterion, Granularity, WeightGroups, weight_of
from spp_lightning.method.masks import (
    Masking,
    is_masked,
    mask_layer,
    output_positions,
    unmask_layer,
)
from spp_lightning.method.rule import count_updates, target_count, update_probability
from spp_lightning.method.sampling import sample_masks
from spp_lightning.method.selection import select_layers
from spp_lightning.method.settings import SPPSettings
from spp_lightning.method.state import checked_probabilities, pack_state

__all__ = ["SPPPruner"]

_ROUNDING = 1e-7  # a change of p below this is none


@dataclass
class _Layer:
    """One layer under pruning: where its groups lie in the flat buffers, and how many are out."""

    name: str
    module: nn.Module
    groups: WeightGroups
    ratio: float
    target: int
    span: slice
    num_pruned: int = 0
    num_recovered: int = 0
    positions: int = 0  # output positions per input; 0 as long as they aren't known

    @property
    def finished(self) -> bool:
        return self.num_pruned == self.target

    @property
    def weight(self) -> nn.Parameter:
        return weight_of(self.module)


class SPPPruner:
    """Prunes the weight groups of a network's convolutions while the network trains.

    Every weight group has a pruning probability p. Every ``interval`` optimizer steps p rises for
    the unimportant groups and falls for the important ones; at every step a mask is drawn from it,
    and the layers compute with ``weight · mask``. A group whose p reaches 1 is pruned for good: its
    weights and its optimizer state are set to 0. When exactly the target number of a layer's groups
    is pruned, the other groups of the layer are kept for good.

    The masks act from the construction on, until :meth:`fold`. The network's parameters keep their
    names and values meanwhile: ``state_dict`` is that of the unpruned network. In training mode
    the mask drawn last acts. In evaluation mode the expected mask acts, as in dropout: every group
    is multiplied by 1 − p, so pruned groups are exactly 0.

    All state lies on the network's device; only :meth:`update` reads from it, once. While the masks
    act, a layer's attribute ``weight`` is the masked weight: read it, but write to the parameter
    that ``named_parameters`` gives.

    Args:
        model: The trained network. Its layers change their class for a subclass until
            :meth:`fold`; copies and pickles of it are plain.
        prune_ratio: Share of weight groups to prune, in [0, 1), of every layer or by pattern of
            layer names, of which the first that matches counts and without which a layer isn't
            pruned. Give this, or ``speedup``, or neither for 0.75.
        speedup: Factor by which the layers' MACs are to fall, at least 1; S is a ratio of 1 − 1/S.
        granularity: What one weight group is: ``"column"`` of the weight matrix (an input position
            ``(c, i, j)`` across the filters), input ``"channel"`` or ``"filter"``.
        criterion: Importance of a group: its ``"l1"`` or ``"l2"`` norm.
        use_rank: Move p by the rank of the importance; if False, by the importance itself.
        interval: Optimizer steps between two updates of p, at least 1.
        A: Change of p at rank 0 in one update, in (0, 1].
        u: Flatness of an update, in (0, 1).
        crossing: Rank at which p doesn't change, from the target (0) to the last group (1), in
            (0, 1]. The method's own is 0.5.
        recovery: Whether p may fall again; the method's own rule lets it.
        masking: ``"sample"`` draws masks from p at every step, the method's own way; ``"scale"``
            multiplies every group by 1 − p instead.
        layers: Patterns (``fnmatch``) of the names of the layers to prune; default every
            convolution but depthwise ones.
        start_step: Optimizer step at which pruning starts.
        seed: Decides the masks, together with the step and nothing else.

    Raises:
        ValueError: If an argument is outside its range, ``prune_ratio`` and ``speedup`` are both
            given, a pattern matches no layer, there is no layer to prune, a layer named by
            ``layers`` has a lazy or shared weight, the layers are spread over several devices, or
            another pruner is at work on the network.

    Attributes:
        model: The network.
        settings: The checked arguments.
        skipped: Convolutions that are left out, by name, with the reason.
        num_updates: Updates of p so far.

    Source: Wang et al., BMVC 2018.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    >>> pruner = SPPPruner(net, prune_ratio=0.75, interval=2)
    >>> step = 0
    >>> while not pruner.finished:
    ...     updated = pruner.step(step, optimizer)
    ...     net(torch.ones(1, 3, 8, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     step += 1
    >>> pruner.fold()
    >>> pruner.num_pruned
    {'0': 21, '2': 54}
    >>> int((net[2].weight == 0).all(0).sum())
    54
    """

    def __init__(
        self,
        model: nn.Module,
        prune_ratio: float | Mapping[str, float] | None = None,
        speedup: float | None = None,
        granularity: Granularity = "column",
        criterion: Criterion = "l1",
        use_rank: bool = True,
        interval: int = 180,
        A: float = 0.05,
        u: float = 0.25,
        crossing: float = 0.5,
        recovery: bool = True,
        masking: Masking = "sample",
        layers: Sequence[str] | None = None,
        start_step: int = 0,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"`model` must be a network, an instance of nn.Module, got {model!r}.")
        self.settings = SPPSettings(
            prune_ratio=prune_ratio,
            speedup=speedup,
            granularity=granularity,
            criterion=criterion,
            use_rank=use_rank,
            interval=interval,
            A=A,
            u=u,
            crossing=crossing,
            recovery=recovery,
            masking=masking,
            layers=layers,
            start_step=start_step,
            seed=seed,
        )
        selection = select_layers(model, self.settings.ratio, layers)
        self.model = model
        self.skipped = selection.skipped
        self.num_updates = 0
        self._last_update = -1  # step of the last update
        self._step = start_step
        self._settled = False  # whether the masks are the final ones
        self._layers: list[_Layer] = []
        start = 0
        for name, module in selection.layers.items():
            groups = WeightGroups.of(module, granularity)
            ratio = selection.ratios[name]
            target = target_count(groups.count, ratio)
            span = slice(start, start + groups.count)
            self._layers.append(_Layer(name, module, groups, ratio, target, span))
            start = span.stop
        self._finished = all(layer.finished for layer in self._layers)
        device = self._device()
        # float64 keeps sums of Δ exact enough to be the same on every machine; MPS has none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._probability = torch.zeros(start, dtype=dtype, device=device)
        self._alive = torch.ones(start, dtype=torch.bool, device=device)
        self._expected = torch.ones(start, dtype=torch.float32, device=device)
        self._sampled = self._expected if masking == "scale" else self._alive.clone()
        self._generator = torch.Generator(device)
        self._attached = False
        self.attach()

    # -- the loop ------------------------------------------------------------------------------

    def step(self, step: int, *optimizers: Optimizer) -> bool:
        """Prepare an optimizer step: update p where one is due, then draw the step's masks.

        Args:
            step: Number of the step, from 0: how many optimizer steps were taken before it.
            optimizers: The optimizers that hold the network's weights.

        Returns:
            Whether p was updated.

        Raises:
            RuntimeError: If the masks are folded.
            ValueError: At an update, if a weight isn't finite or the layers are now on several
                devices; nothing is changed then.
        """
        self._follow_device()
        self._step = step
        passed = step - self.settings.start_step
        due = passed >= 0 and passed % self.settings.interval == 0 and step > self._last_update
        due = due and not self._finished
        if due:
            self.update(*optimizers)
        self.sample(step)
        return due

    def update(self, *optimizers: Optimizer) -> None:
        """Update p once in every layer that isn't finished, and zero what is pruned by it.

        Args:
            optimizers: The optimizers whose state of the pruned weights is to be zeroed.

        Raises:
            RuntimeError: If the masks are folded.
            ValueError: If a layer's weight isn't finite; nothing is changed then.
        """
        self._check_attached()
        if self._finished:
            return
        self._device()  # The layers must still be on one device.
        unfinished = [layer for layer in self._layers if not layer.finished]
        new, finite = self._probability.clone(), []
        with torch.no_grad():
            for layer in unfinished:
                importance = layer.groups.importance(layer.weight, self.settings.criterion)
                new[layer.span] = update_probability(
                    self._probability[layer.span],
                    importance,
                    layer.ratio,
                    layer.num_pruned,
                    self.settings.A,
                    self.settings.u,
                    self.settings.use_rank,
                    self.settings.crossing,
                    self.settings.recovery,
                )
                finite.append(importance.amax())  # the greatest of any and NaN is NaN
            alive = new < 1
            fell = new < self._probability - _ROUNDING
            counts = [
                torch.stack([x[layer.span].sum() for layer in unfinished]) for x in (alive, fell)
            ]
            # The only time the host waits for the device.
            read = torch.stack([torch.stack(finite) < math.inf, *counts]).tolist()
        for layer, is_finite in zip(unfinished, read[0], strict=True):
            if not is_finite:
                raise ValueError(
                    f"The weight of layer {layer.name!r} must be finite to be pruned, but holds NaN"
                    f" or infinity at step {self._step}. Pruning is as it was after update"
                    f" {self.num_updates}; go on from a checkpoint before that step."
                )
        for layer in self._layers:
            layer.num_recovered = 0
        for layer, num_alive, num_recovered in zip(unfinished, *read[1:], strict=True):
            # The groups that a finished layer lets go of don't count as recovered.
            layer.num_pruned = layer.groups.count - num_alive
            layer.num_recovered = 0 if layer.finished else num_recovered
        self._probability.copy_(new)
        self._refresh_masks()
        self._finished = all(layer.finished for layer in self._layers)
        self.num_updates += 1
        self._last_update = self._step
        self._zero_pruned(optimizers)

    def sample(self, step: int) -> None:
        """Draw the masks of a step: every group is out with its probability p.

        Args:
            step: Number of the step; with the seed, and the kind of device, it decides the masks.

        Raises:
            RuntimeError: If the masks are folded.
        """
        self._check_attached()
        self._step = step
        if not (self._finished and self._settled):
            if self.settings.masking == "sample":
                seed = self.settings.seed
                sample_masks(self._probability, seed, step, self._generator, self._sampled)
            self._settled = self._finished  # every p is 0 or 1 now: the masks are the same for ever

    def fold(self, *optimizers: Optimizer) -> None:
        """Leave a plain network: pruned weights are exactly 0, and nothing masks the others.

        Trained on without masks, pruned weights grow back. The state stays readable, and
        :meth:`attach` goes on from it.

        Args:
            optimizers: The optimizers whose state of the pruned weights is to be zeroed, if the
                network goes on training without masks.
        """
        if self._attached:
            self._follow_device()
            self._zero_pruned(optimizers)
            self._unmask()

    def zero_pruned(self, copy: nn.Module) -> None:
        """Set the pruned groups to 0 in a copy of the network, such as a running average of it.

        Args:
            copy: A network with layers of the same names and shapes.
        """
        for layer in self._layers:
            if layer.num_pruned:
                weight = weight_of(copy.get_submodule(layer.name))
                layer.groups.zero(self._alive[layer.span], weight)

    def attach(self) -> None:
        """Let the masks act (again), where :meth:`fold` has taken them off.

        Raises:
            ValueError: If another pruner's masks act on the network.
        """
        if not self._attached:
            taken = [layer.name for layer in self._layers if is_masked(layer.module)]
            if taken:
                raise ValueError(
                    f"`model` is being pruned already (layers {', '.join(taken)}); call `fold()` of"
                    " the other pruner first."
                )
            for layer in self._layers:
                sampled, expected = self._sampled[layer.span], self._expected[layer.span]
                mask_layer(layer.module, layer.groups, sampled, expected)
            self._attached = True
            self._follow_device()

    # -- what there is to see ------------------------------------------------------------------

    def __repr__(self) -> str:
        layers = ", ".join(f"{x.name} {x.num_pruned}/{x.target}" for x in self._layers)
        return f"SPPPruner({layers} {self.settings.granularity}s pruned)"

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
        """Pruning probability per group by layer, ``(groups,)`` each; views of the state."""
        return {layer.name: self._probability[layer.span] for layer in self._layers}

    @property
    def mask(self) -> dict[str, Tensor]:
        """The masks drawn last by layer, ``(groups,)`` each, bool, True = kept; views.

        With ``masking="scale"`` the factors that act instead, float32.
        """
        return {layer.name: self._sampled[layer.span] for layer in self._layers}

    @property
    def sparsity(self) -> dict[str, float]:
        """Share of the groups pruned so far, by layer."""
        return {layer.name: layer.num_pruned / layer.groups.count for layer in self._layers}

    @property
    def total_sparsity(self) -> float:
        """Share of the groups of all layers pruned so far."""
        pruned = sum(layer.num_pruned for layer in self._layers)
        return pruned / sum(layer.groups.count for layer in self._layers)

    @property
    def num_groups(self) -> dict[str, int]:
        """Number of groups by layer."""
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
        """MACs per input by layer, dense and now; of the layers that have run uncompiled.

        A layer that an input passes several times counts once.
        """
        macs = {}
        for layer in self._layers:
            if self._attached:
                layer.positions = output_positions(layer.module) or layer.positions
            if layer.positions:
                groups, left = layer.groups, layer.groups.count - layer.num_pruned
                macs[layer.name] = (
                    layer.positions * groups.size * groups.count,
                    layer.positions * groups.size * left,
                )
        return macs

    @property
    def expected_updates(self) -> int:
        """Updates until every layer is finished, from the start, if ranks never changed."""
        s = self.settings
        return max(
            count_updates(x.groups.count, x.ratio, s.A, s.u, s.crossing) for x in self._layers
        )

    @property
    def expected_steps(self) -> int:
        """Optimizer steps until every layer is finished, from step 0, if ranks never changed."""
        updates = self.expected_updates
        return self.settings.start_step + (updates - 1) * self.settings.interval if updates else 0

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as a plain dict of tensors and numbers.

        It loads with ``torch.load(weights_only=True)``. The network's weights aren't in it.
        """
        return pack_state(
            self.settings.as_dict(),
            {name: p.to("cpu", copy=True) for name, p in self.probability.items()},
            {"num_updates": self.num_updates, "last_update": self._last_update, "step": self._step},
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: same layers, same settings. The pruned weights are set to 0.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the state isn't one of this version, these layers and these settings, or
                holds a probability outside [0, 1]. Nothing is changed then.
        """
        probabilities, counters = checked_probabilities(
            state, self.settings.as_dict(), self.num_target, self.num_groups
        )
        for layer in self._layers:
            values = probabilities[layer.name]
            layer.num_pruned = int((values >= 1).sum())
            layer.num_recovered = 0
            self._probability[layer.span] = values.to(self._probability)
        self._refresh_masks()
        self._finished = all(layer.finished for layer in self._layers)
        self._settled = False
        self.num_updates = counters["num_updates"]
        self._last_update = counters["last_update"]
        self._step = counters["step"]
        self._zero_pruned(())
        if self._attached:
            self.sample(self._step)

    # -- inside --------------------------------------------------------------------------------

    def _zero_pruned(self, optimizers: Sequence[Optimizer]) -> None:
        # All pruned groups, not just the new ones: whatever has written to them is undone here.
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                # Its past directions, mixed over all weights, would move the pruned ones again.
                optimizer.state.clear()
        for layer in self._layers:
            if layer.num_pruned:
                tensors = _tensors_like(layer.weight, optimizers)
                layer.groups.zero(self._alive[layer.span], *tensors)

    def _refresh_masks(self) -> None:
        """Make the masks that follow from p alone."""
        torch.lt(self._probability, 1, out=self._alive)
        torch.sub(1, self._probability, out=self._expected)

    def _check_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("The masks are folded; call `attach()` to go on pruning.")

    def _device(self) -> torch.device:
        devices = {layer.weight.device for layer in self._layers}
        if len(devices) > 1:
            names = ", ".join(sorted(str(device) for device in devices))
            raise ValueError(f"The pruned layers must be on one device, but are on {names}.")
        return devices.pop()

    def _follow_device(self) -> None:
        if self._layers[0].weight.device == self._probability.device:
            return
        device = self._device()
        attached = self._attached
        self._unmask()
        self._probability = self._probability.to(device)
        self._alive = self._alive.to(device)
        self._expected = self._expected.to(device)
        scaled = self.settings.masking == "scale"
        self._sampled = self._expected if scaled else self._sampled.to(device)
        self._generator = torch.Generator(device)
        if attached:
            self.attach()

    def _unmask(self) -> None:
        for layer in self._layers:
            if self._attached:
                layer.positions = output_positions(layer.module) or layer.positions
            unmask_layer(layer.module)
        self._attached = False


def _tensors_like(weight: nn.Parameter, optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    """The weight, its gradient, and every tensor of its shape that an optimizer keeps for it."""
    yield weight
    if weight.grad is not None:
        yield weight.grad
    for optimizer in optimizers:
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                yield value
