"""SPPPruner: the engine that prunes a network in any PyTorch training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spp_lightning.method.arguments import takes_model_and_settings
from spp_lightning.method.buffers import MaskBuffers
from spp_lightning.method.groups import WeightGroups
from spp_lightning.method.layer import PrunedUnit
from spp_lightning.method.layout import lay_out
from spp_lightning.method.masks import Computation, is_masked, mask_layer, unmask_layer
from spp_lightning.method.progress import PruningProgress
from spp_lightning.method.rule import update_probability
from spp_lightning.method.settings import SPPSettings
from spp_lightning.method.state import checked_probabilities, pack_state
from spp_lightning.method.zeroing import zero_pruned

__all__ = ["SPPPruner"]

MakeComputation = Callable[[nn.Module, WeightGroups], Computation | None]

_ROUNDING = 1e-7  # a smaller change of p counts as none


class SPPPruner(PruningProgress):
    """Prunes the weight groups of a network's convolutions while the network trains.

    Every weight group has a pruning probability p. Every ``interval`` optimizer steps, p rises for
    unimportant groups and falls for important ones. At every step a mask is drawn from p, and the
    layers compute with ``weight · mask``. A group whose p reaches 1 is pruned for good: its weights
    and its optimizer state are set to 0. When a layer has pruned exactly its target number of
    groups, its other groups are kept for good.

    The masks act from construction until :meth:`fold`. Meanwhile the network's parameters keep
    their names and values, and ``state_dict`` is that of the unpruned network. In training mode
    the mask of the current step acts. In evaluation mode the expected mask acts, as in dropout:
    every group is multiplied by 1 − p, and pruned groups are exactly 0.

    All state lies on the network's device. Only :meth:`update` waits for the device, once. While
    the masks act, a layer's attribute ``weight`` is the masked weight: read it, but write to the
    parameter that ``named_parameters`` gives.

    Args:
        model: The trained network. Until :meth:`fold` its pruned layers have a subclass of their
            own class; copies and pickles of them are plain.
        settings: The fields of :class:`~spp_lightning.method.settings.SPPSettings`, each as an
            argument: ``prune_ratio``, ``speedup``, ``granularity``, ``criterion``, ``use_rank``,
            ``interval``, ``A``, ``u``, ``crossing``, ``recovery``, ``masking``, ``layers``,
            ``start_step``, ``seed``, ``input_shape``.

    Raises:
        ImportError: If channels are coupled and Torch-Pruning is not installed.
        ValueError: If a setting is out of range, a pattern matches no layer, there is no layer to
            prune, a layer named by ``layers`` has a lazy or shared weight, a layer computes another
            weight from the stored one, the speedup of coupled channels can't be reached, the layers
            are on several devices, or another pruner is at work on the network.

    Attributes:
        model: The network.
        settings: The checked settings.
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

    @takes_model_and_settings(SPPSettings)
    def __init__(self, model: nn.Module, settings: SPPSettings) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"`model` must be a network, an instance of nn.Module, got {model!r}.")
        layout = lay_out(model, settings)
        self.model = model
        self.settings = settings
        self.skipped = layout.skipped
        self.num_updates = 0
        self._last_update = -1  # step of the last update
        self._step = settings.start_step
        self._settled = False  # whether the masks are the final ones
        self._units, self._masked, self._macs = layout.units, layout.masked, layout.macs
        self._finished = all(unit.finished for unit in self._units)
        device = self._device()
        num_groups = self._units[-1].span.stop
        # float64 keeps sums of Δ exact enough to be the same on every machine; MPS has none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._probability = torch.zeros(num_groups, dtype=dtype, device=device)
        self._masks = MaskBuffers(num_groups, settings.masking, layout.spread, device)
        self._make_computation: MakeComputation | None = None
        self._attached = False
        self.attach()

    # -- the loop ------------------------------------------------------------------------------

    def step(self, step: int, *optimizers: Optimizer) -> bool:
        """Prepare an optimizer step: update p where an update is due, then draw the mask.

        Args:
            step: Number of the step, from 0: the optimizer steps taken before it.
            optimizers: The optimizers that hold the network's weights.

        Returns:
            Whether p was updated.

        Raises:
            RuntimeError: If the masks are folded.
            ValueError: At an update, if a weight is not finite or the layers are on several
                devices. Nothing is changed then.
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
        """Update p once in every unfinished layer, and zero the groups that this prunes.

        Args:
            optimizers: The optimizers whose state of the pruned weights is set to 0.

        Raises:
            RuntimeError: If the masks are folded.
            ValueError: If a layer's weight is not finite. Nothing is changed then.
        """
        self._check_attached()
        if self._finished:
            return
        self._device()  # The layers must still be on one device.
        unfinished = [unit for unit in self._units if not unit.finished]
        new, largest = self._probability.clone(), []
        with torch.no_grad():
            for unit in unfinished:
                importance = unit.importance(self.settings.criterion)
                new[unit.span] = self._updated(unit, importance)
                largest.append(importance.amax())  # NaN if any importance is NaN
            alive = new < 1
            fell = new < self._probability - _ROUNDING
            counts = [
                torch.stack([x[unit.span].sum() for unit in unfinished]) for x in (alive, fell)
            ]
            # The only time the host waits for the device.
            read = torch.stack([torch.stack(largest) < math.inf, *counts]).tolist()
        for unit, is_finite in zip(unfinished, read[0], strict=True):
            if not is_finite:
                raise ValueError(
                    f"The weight of layer {unit.name!r} must be finite to be pruned, but holds NaN"
                    f" or infinity at step {self._step}. Pruning is as it was after update"
                    f" {self.num_updates}; go on from a checkpoint before that step."
                )
        for unit in self._units:
            unit.num_recovered = 0
        for unit, num_alive, num_recovered in zip(unfinished, *read[1:], strict=True):
            unit.num_pruned = unit.count - num_alive
            # What is finished lets its other groups go back to 0: that is no recovery.
            unit.num_recovered = 0 if unit.finished else num_recovered
        self._probability.copy_(new)
        self._masks.follow(self._probability)
        self._finished = all(unit.finished for unit in self._units)
        self.num_updates += 1
        self._last_update = self._step
        zero_pruned(self._units, self._masks.alive, optimizers)

    def _updated(self, unit: PrunedUnit, importance: Tensor) -> Tensor:
        s = self.settings
        return update_probability(
            self._probability[unit.span],
            importance,
            unit.ratio,
            unit.num_pruned,
            s.A,
            s.u,
            s.use_rank,
            s.crossing,
            s.recovery,
        )

    def sample(self, step: int) -> None:
        """Draw the mask of a step: every group is masked with its probability p.

        Args:
            step: Number of the step. With p, the seed and the kind of device it decides the mask.

        Raises:
            RuntimeError: If the masks are folded.
        """
        self._check_attached()
        self._step = step
        if self.settings.masking == "sample" and not (self._finished and self._settled):
            self._masks.sample(self._probability, self.settings.seed, step)
            self._settled = self._finished  # every p is 0 or 1 now: the mask never changes again

    def fold(self, *optimizers: Optimizer) -> None:
        """Leave a plain network: pruned weights are exactly 0, and no mask acts.

        If the network trains on without masks, pruned weights grow back. The state stays readable,
        and :meth:`attach` goes on from it.

        Args:
            optimizers: The optimizers whose state of the pruned weights is set to 0, for a network
                that trains on without masks.
        """
        if self._attached:
            self._follow_device()
            zero_pruned(self._units, self._masks.alive, optimizers)
            self._unmask()

    def zero_pruned(self, copy: nn.Module) -> None:
        """Set the pruned groups to 0 in a copy of the network, such as a running average.

        Args:
            copy: A network with layers of the same names and shapes.
        """
        zero_pruned(self._units, self._masks.alive, model=copy)

    def attach(self) -> None:
        """Let the masks act again after :meth:`fold`.

        Raises:
            ValueError: If another pruner's masks act on the network.
        """
        if not self._attached:
            taken = [layer.name for layer in self._masked if is_masked(layer.module)]
            if taken:
                raise ValueError(
                    f"`model` is being pruned already (layers {', '.join(taken)}); call `fold()` of"
                    " the other pruner first."
                )
            for layer in self._masked:
                sampled = self._masks.layer_sampled[layer.span]
                expected = self._masks.layer_expected[layer.span]
                make = self._make_computation
                computation = None if make is None else make(layer.module, layer.groups)
                mask_layer(layer.module, layer.groups, sampled, expected, computation)
            self._attached = True
            self._follow_device()

    def compute_with(self, make: MakeComputation | None) -> None:
        """Choose what computes the masked layers; without a choice it is the dense product.

        The choice changes no mask, no count and no state, and outputs and gradients by rounding
        alone.

        Args:
            make: Given a layer and its weight groups, returns what computes the layer, or None for
                the dense product; :func:`~spp_lightning.kept_columns` makes one. None chooses the
                dense product for all layers.
        """
        self._make_computation = make
        if self._attached:
            self._unmask()
            self.attach()

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of the pruning, as a plain dict of tensors and numbers.

        It loads with ``torch.load(weights_only=True)``. It does not hold the network's weights.
        """
        return pack_state(
            self.settings.as_dict(),
            {name: p.to("cpu", copy=True) for name, p in self.probability.items()},
            {"num_updates": self.num_updates, "last_update": self._last_update, "step": self._step},
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same layers and settings. Sets the pruned weights to 0.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is of another version, of other layers or other settings, or
                holds a probability outside [0, 1]. Nothing is changed then.
        """
        probabilities, counters = checked_probabilities(
            state, self.settings.as_dict(), self.num_target, self.num_groups
        )
        for unit in self._units:
            values = probabilities[unit.name]
            unit.num_pruned = int((values >= 1).sum())
            unit.num_recovered = 0
            self._probability[unit.span] = values.to(self._probability)
        self._masks.follow(self._probability)
        self._finished = all(unit.finished for unit in self._units)
        self._settled = False
        self.num_updates = counters["num_updates"]
        self._last_update = counters["last_update"]
        self._step = counters["step"]
        zero_pruned(self._units, self._masks.alive)
        if self._attached:
            self.sample(self._step)

    # -- inside --------------------------------------------------------------------------------

    def _check_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("The masks are folded; call `attach()` to go on pruning.")

    def _device(self) -> torch.device:
        devices = {device for unit in self._units for device in unit.devices}
        if len(devices) > 1:
            names = ", ".join(sorted(str(device) for device in devices))
            raise ValueError(f"The pruned layers must be on one device, but are on {names}.")
        return devices.pop()

    def _follow_device(self) -> None:
        """Move the state to the device of the layers, if they were moved."""
        if self._probability.device in self._units[0].devices:
            return
        device = self._device()
        attached = self._attached
        self._unmask()
        self._probability = self._probability.to(device)
        self._masks.to(device)
        if attached:
            self.attach()

    def _unmask(self) -> None:
        self._note_positions()
        for layer in self._masked:
            unmask_layer(layer.module)
        self._attached = False
