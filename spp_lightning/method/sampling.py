"""Monte Carlo sampling of masks, the same on every rank and after every resume."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sample_masks"]


def sample_masks(
    probability: Tensor,
    seed: int,
    step: int,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Draw the masks of one step: a group is out with its pruning probability.

    A function of its arguments alone. CPUs and GPUs draw different masks from the same seed.

    Args:
        probability: Pruning probabilities, ``(groups,)``.
        seed: Seed of the run.
        step: Number of the optimizer step.
        generator: A generator to seed anew, on the device of ``probability``, to save making one.
        out: Where to put the masks, ``(groups,)``, bool.

    Returns:
        The masks, ``(groups,)``, bool, True = kept: always where p is 0, never where p is 1.

    >>> p = torch.tensor([0.0, 0.5, 0.5, 0.5, 1.0])
    >>> sample_masks(p, seed=0, step=7).tolist() == sample_masks(p, seed=0, step=7).tolist()
    True
    """
    if generator is None:
        generator = torch.Generator(probability.device)
    generator.manual_seed(_mix(seed, step))
    draw = torch.rand(
        len(probability), generator=generator, dtype=torch.float32, device=probability.device
    )
    return torch.ge(draw, probability, out=out)


def _mix(seed: int, step: int) -> int:
    # Torch's CPU generator uses the low 32 bits of a seed: a bijection of the step in these bits
    # gives every step of a run its own draw, and the odd factor takes seeds apart.
    return (seed * 0x9E3779B97F4A7C15 + step * 0x85EBCA6B + 1) % 2**63
