"""Monte Carlo sampling of masks: the same on every rank and after a resume."""

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
    """Draw the mask of one step: a group is masked with its pruning probability.

    The result depends on the arguments only. CPUs and GPUs draw different masks from one seed.

    Args:
        probability: Pruning probabilities, ``(groups,)``.
        seed: Seed of the run.
        step: Number of the optimizer step.
        generator: A generator to reuse, on the device of ``probability``. It is seeded anew.
        out: Output tensor, ``(groups,)``, bool.

    Returns:
        The mask, ``(groups,)``, bool, True = kept: always if p is 0, never if p is 1.

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
    # Torch's CPU generator uses the low 32 bits of its seed. In these bits this is a bijection of
    # the step, so every step of a run has its own draw. The odd factor separates seeds.
    return (seed * 0x9E3779B97F4A7C15 + step * 0x85EBCA6B + 1) % 2**63
