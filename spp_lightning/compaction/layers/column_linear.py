"""ColumnLinear: a linear layer that stores and computes only the columns that pruning kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning.compaction.geometry import Geometry, dense_weight, kept_columns
from spp_lightning.compaction.kernels.cpu.checks import check_columns

__all__ = ["ColumnLinear"]


class ColumnLinear(nn.Module):
    """A linear layer without its pruned columns, which are input features.

    Gathers the kept features and multiplies them by the kept weights, both by torch. It trains like
    any layer; pruned columns stay pruned.

    Args:
        in_features: Input features, pruned ones included.
        weight: Kept columns, ``(out_features, columns)``.
        columns: Indices of the kept columns, ``(columns,)``, int32, ascending.
        bias: ``(out_features,)``, or None.

    Raises:
        ValueError: If the shapes or dtypes don't fit, or ``columns`` aren't ascending or don't
            exist.

    >>> linear = nn.Linear(4, 2)
    >>> with torch.no_grad():
    ...     _ = linear.weight[:, 1].zero_()
    >>> compact = ColumnLinear.of(linear)
    >>> compact
    ColumnLinear(in_features=4, out_features=2, columns=3 of 4)
    >>> x = torch.ones(5, 7, 4)
    >>> torch.allclose(compact(x), linear(x), atol=1e-6)
    True
    """

    columns: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, weight: Tensor, columns: Tensor, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        if not weight.is_floating_point() or (bias is not None and bias.dtype != weight.dtype):
            dtypes = weight.dtype if bias is None else f"{weight.dtype} and {bias.dtype}"
            raise ValueError(f"`weight` and `bias` must be of one floating dtype, got {dtypes}.")
        if weight.dim() != 2 or weight.shape[1] != len(columns):
            raise ValueError(
                f"`weight` must be (out_features, columns) with {len(columns)} columns, got"
                f" {tuple(weight.shape)}."
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"`bias` must be ({len(weight)},), got {tuple(bias.shape)}.")
        check_columns(columns, Geometry(in_features, max(len(weight), 1), (1, 1)))
        self.in_features, self.out_features = in_features, len(weight)
        self.weight = nn.Parameter(weight.detach().clone())
        own = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_parameter("bias", own)
        self.register_buffer("columns", columns.clone())

    @classmethod
    def of(cls, linear: nn.Linear) -> ColumnLinear:
        """The compact layer of a linear layer: without the columns that are all 0.

        Args:
            linear: The layer; it is left as it was.
        """
        geometry = Geometry(linear.in_features, linear.out_features, (1, 1))
        weight, columns = kept_columns(linear.weight.detach()[:, :, None, None], geometry)
        layer = cls(linear.in_features, weight, columns, linear.bias)
        layer.weight.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: ``(…, in_features)`` to ``(…, out_features)``."""
        if len(self.columns) == self.in_features:
            return F.linear(x, self.weight, self.bias)
        if x.dim() != 2 and x.is_contiguous():  # torch gathers from matrices several times faster
            tokens = x.view(-1, self.in_features).index_select(1, self.columns)
            kept = tokens.view(*x.shape[:-1], len(self.columns))
        else:
            kept = x.index_select(-1, self.columns)
        return F.linear(kept, self.weight, self.bias)

    def to_dense(self) -> nn.Linear:
        """The layer as an ``nn.Linear``, zeros in pruned columns."""
        weight = self.weight
        linear = nn.Linear(
            *(self.in_features, self.out_features, self.bias is not None),
            device=weight.device,
            dtype=weight.dtype,
        )
        geometry = Geometry(self.in_features, self.out_features, (1, 1))
        with torch.no_grad():
            linear.weight.copy_(dense_weight(weight, self.columns, geometry)[:, :, 0, 0])
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        linear.weight.requires_grad_(weight.requires_grad)
        if self.bias is not None:
            linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:  # noqa: D102
        columns = f"columns={len(self.columns)} of {self.in_features}"
        bias = ", bias=False" if self.bias is None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {columns}{bias}"
