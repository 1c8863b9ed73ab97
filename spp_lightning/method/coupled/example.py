"""Example: an input that shows how a network connects its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Example", "example_of"]


@dataclass(frozen=True)
class Example:
    """The arguments of a network's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        tensors = [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]
        return ", ".join(str(tuple(x.shape)) for x in tensors)

    def run(self, model: nn.Module) -> Any:
        """The network's outputs for it."""
        return model(*self.args, **self.kwargs)

    def random(self) -> Example:
        """An example of the same shapes with normal numbers, the same every time."""
        generator = torch.Generator().manual_seed(0)

        def drawn(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return torch.randn(x.shape, generator=generator).to(x)

        args, kwargs = tree_map(drawn, (self.args, self.kwargs))
        return Example(args, kwargs)


def example_of(model: nn.Module, input_shape: Sequence[int] | None = None) -> Example:
    """An input of a network.

    Args:
        model: The network.
        input_shape: Shape of its input, such as ``(1, 3, 224, 224)``. Default: what the network's
            ``example_input_array`` gives, as Lightning reads it: a tensor, a tuple of the
            positional arguments, or a dict of the keyword arguments.

    Returns:
        The input, with floating point numbers of the network's type, on its device.

    Raises:
        ValueError: If there is neither.

    >>> example_of(nn.Conv2d(3, 8, 3), (1, 3, 8, 8)).args[0].shape
    torch.Size([1, 3, 8, 8])
    """
    given: Any = getattr(model, "example_input_array", None)
    if input_shape is not None:
        given = torch.zeros(tuple(input_shape))
    if given is None:
        raise ValueError(
            '`input_shape` must be given for granularity="coupled-channel", such as'
            " (1, 3, 224, 224): got None, and the network has no `example_input_array`."
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(like) if x.is_floating_point() else x.to(like.device)

    given = tree_map(moved, given)
    if isinstance(given, dict):
        return Example((), given)
    return Example(given if isinstance(given, tuple) else (given,), {})
