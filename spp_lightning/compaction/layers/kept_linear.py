"""A masked linear layer on the input features that its mask keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning.compaction.kernels.cpu import training_cost
from spp_lightning.compaction.layers.kept_mask import KeptNumbers, is_plain_call
from spp_lightning.method.groups import weight_of

__all__ = ["KeptLinear"]


class KeptLinear:
    """Computes a masked linear layer in torch, from the features that its mask keeps.

    Args:
        if_it_pays: Whether the cost model is asked. If not, all that can be is computed so.
    """

    def __init__(self, if_it_pays: bool) -> None:
        self.if_it_pays = if_it_pays
        self._kept = KeptNumbers()

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """Run the layer; None where the dense layer must, or had better."""
        weight, bias = weight_of(layer), layer._parameters["bias"]
        if not is_plain_call(x, weight) or not x.dim() or x.shape[-1] != weight.shape[1]:
            return None
        kept = self._kept.of(layer)
        if kept is None:
            return None
        if self.if_it_pays and not _pays(weight, len(kept), x):
            return None
        return F.linear(x.index_select(-1, kept), weight.index_select(1, kept), bias)


def _pays(weight: Tensor, num_features: int, x: Tensor) -> bool:
    autocast = torch.is_autocast_enabled("cpu")
    if training_cost.has_fast_products(torch.get_autocast_dtype("cpu") if autocast else x.dtype):
        return False  # selecting takes as long as ever, multiplying doesn't
    out, features = weight.shape
    passes = 1 + torch.is_grad_enabled() * (x.requires_grad + weight.requires_grad)
    return training_cost.linear_pays((out, features), num_features, x.numel() // features, passes)
