"""Sets pruned groups to 0 in a weight, its gradient and the optimizers' state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from spp_lightning.method.layer import PrunedUnit

__all__ = ["zero_pruned"]


def zero_pruned(
    units: Iterable[PrunedUnit],
    alive: Tensor,
    optimizers: Sequence[Optimizer] = (),
    model: nn.Module | None = None,
) -> None:
    """Set every pruned group to 0, in place.

    All pruned groups are zeroed, not only new ones: this undoes whatever else wrote to them.

    Args:
        units: What is under pruning.
        alive: Which groups of all units are kept, ``(groups,)``, bool.
        optimizers: Optimizers whose state of the pruned weights is set to 0, too.
        model: A copy of the network that is meant. Default: the network itself.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            # Its past directions mix all weights and would move the pruned ones again.
            optimizer.state.clear()
    for unit in units:
        if unit.num_pruned:
            for parameter, zero in unit.zeros(alive[unit.span], model):
                zero(*_tensors_of(parameter, optimizers))


def _tensors_of(weight: nn.Parameter, optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    """A parameter, its gradient, and every tensor of its shape that an optimizer keeps for it."""
    yield weight
    if weight.grad is not None:
        yield weight.grad
    for optimizer in optimizers:
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                yield value
