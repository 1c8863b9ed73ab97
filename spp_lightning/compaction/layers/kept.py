"""Training on kept columns: masked layers compute what their masks keep, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from spp_lightning.compaction.epilogue import Epilogue
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.layers.kept_convolution import KeptConvolution
from spp_lightning.compaction.layers.kept_linear import KeptLinear
from spp_lightning.method.groups import WeightGroups
from spp_lightning.method.masks import Computation, computation_of

__all__ = ["Kernels", "kept_columns", "with_epilogue"]

Kernels = Literal["auto", "dense", "compact"]


def kept_columns(
    kernels: Kernels = "auto",
) -> Callable[[nn.Module, WeightGroups], Computation | None]:
    """Makes what :meth:`SPPPruner.compute_with` takes: training on kept columns.

    Args:
        kernels: ``"auto"`` computes kept columns where the cost model says that it pays,
            ``"compact"`` wherever it can, ``"dense"`` nowhere.

    Returns:
        A function of a layer and its weight groups. It returns None for layers that are computed
        densely: all but ``nn.Linear`` and ``nn.Conv2d`` with zeros as padding, pruned by columns
        or channels.

    Raises:
        ValueError: If ``kernels`` is another one.

    >>> from spp_lightning import SPPPruner
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> pruner = SPPPruner(net, speedup=4)
    >>> pruner.compute_with(kept_columns())
    """
    if kernels not in ("auto", "dense", "compact"):
        raise ValueError(f'`kernels` must be one of "auto", "dense", "compact", got {kernels!r}.')

    def make(layer: nn.Module, groups: WeightGroups) -> Computation | None:
        if kernels == "dense" or groups.granularity == "filter":
            return None
        cls, if_it_pays = type(layer), kernels == "auto"
        # Subclasses with a forward of their own compute something else.
        if isinstance(layer, nn.Linear):
            return KeptLinear(if_it_pays) if cls.forward is nn.Linear.forward else None
        if not isinstance(layer, nn.Conv2d) or cls.forward is not nn.Conv2d.forward:
            return None
        if vars(nn.Conv2d)["_conv_forward"] is not getattr(cls, "_conv_forward", None):
            return None
        try:
            return KeptConvolution(Geometry.of(layer), if_it_pays)
        except ValueError:  # padding that the kernels don't have
            return None

    return make


def with_epilogue(
    layer: nn.Module, x: Tensor, epilogue: Epilogue, otherwise: Callable[[Tensor], Tensor]
) -> Tensor:
    """Run a convolution and what follows it, in one pass where the layer trains on kept columns.

    Args:
        layer: The convolution.
        x: Its input, ``(B, C, H, W)``.
        epilogue: What follows, as the kernels compute it.
        otherwise: The same in torch, of the convolution's output.

    Returns:
        The epilogue's output, ``(B, N, H', W')``.
    """
    if not torch.compiler.is_compiling():
        computation = computation_of(layer)
        y = None if computation is None else computation(layer, x, epilogue)
        if y is not None:
            return y
    return otherwise(layer(x))
