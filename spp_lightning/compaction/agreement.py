"""Whether a compact network computes what the network that it was made of does."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["computes_the_same"]

_ROUNDINGS = 10  # of the rounding errors of a network, allowed in its compact one


def computes_the_same(
    compacted: nn.Module,
    original: nn.Module,
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
) -> bool:
    """Whether two networks agree on a random input; they do unless tracing lost something.

    Some networks magnify rounding errors: a norm of values that hardly differ, for example. Where
    the two don't agree, the network's own rounding error, measured in float64, decides.

    Args:
        compacted: The compact network.
        original: The network that it was made of; it is left as it was.
        inputs: An example, of whose shapes the random one is.
        named: Inputs by name, likewise.
    """
    tensors = [x for x in tree_leaves((inputs, dict(named))) if isinstance(x, Tensor)]
    floating = [x for x in tensors if x.is_floating_point()]
    generator = torch.Generator(tensors[0].device).manual_seed(0)

    def drawn(x: Any) -> Any:
        if not _is_floating(x):
            return x
        return torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)

    def run(network: nn.Module) -> list[Any]:
        # Of copies: a network may write to its input.
        args, kwargs = tree_map(lambda x: x.clone() if _is_floating(x) else x, (inputs, named))
        with torch.no_grad():
            return tree_leaves(network(*args, **kwargs))

    inputs, named = tree_map(drawn, (inputs, dict(named)))
    dense = copy.deepcopy(original).eval()
    expected, found = run(dense), run(compacted)
    is_exact = all(x.dtype in (torch.float32, torch.float64) for x in floating)
    close = [1e-3 if is_exact else 0.1] * len(expected)
    if _agree(expected, found, close):
        return True
    if not is_exact or not _agree(expected, run(dense), close):  # it draws random numbers
        return False
    inputs, named = tree_map(lambda x: x.double() if _is_floating(x) else x, (inputs, named))
    try:
        true = run(dense.double())
    except RuntimeError:  # a constant of its own is float32
        return False
    errors = [_distance(a, b) for a, b in zip(true, expected, strict=True)]
    return _agree(expected, found, [_ROUNDINGS * error for error in errors])


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _agree(expected: Sequence[Any], found: Sequence[Any], tolerances: Sequence[float]) -> bool:
    return len(expected) == len(found) and all(
        not isinstance(a, Tensor)
        or (a.shape == b.shape and _distance(a, b) <= tolerance)
        or not bool(a.isfinite().all())
        for a, b, tolerance in zip(expected, found, tolerances, strict=True)
    )


def _distance(expected: Any, found: Any) -> float:
    """Distance of two tensors, relative to the first."""
    if not isinstance(expected, Tensor):
        return 0.0
    size = float(expected.double().norm())
    return float((expected.double() - found.double()).norm()) / max(size, 1e-30)
