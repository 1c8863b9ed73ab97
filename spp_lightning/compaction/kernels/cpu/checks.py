"""Checks of what the kernels read: they trust addresses and shapes, so nothing else may."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spp_lightning.compaction.geometry import Geometry

__all__ = ["check_columns", "check_size", "check_tensor"]


def check_columns(columns: Tensor, geometry: Geometry) -> None:
    """Check that columns are ascending and exist.

    Raises:
        ValueError: If they aren't int32 of one dimension, not ascending, or out of range.
    """
    if columns.dtype != torch.int32 or columns.dim() != 1:
        raise ValueError(
            f"`columns` must be int32 of one dimension, got {columns.dtype} of shape"
            f" {tuple(columns.shape)}."
        )
    if len(columns) and not (
        int(columns[0]) >= 0
        and int(columns[-1]) < geometry.num_columns
        and bool((columns[1:] > columns[:-1]).all())
    ):
        raise ValueError(
            f"`columns` must be ascending and in [0, {geometry.num_columns}), the columns of"
            f" {geometry.channels} channels and a kernel of {geometry.kernel_size}, got"
            f" {columns.tolist() if len(columns) < 9 else [*columns[:8].tolist(), '…']}."
        )


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Check that a tensor is on the CPU and of a shape.

    Raises:
        ValueError: If it isn't.
    """
    if tensor.shape != shape or not tensor.is_cpu:
        raise ValueError(
            f"`{name}` must be of shape {shape} on the CPU, got {tuple(tensor.shape)} on"
            f" {tensor.device}."
        )


def check_size(*shapes: Sequence[int]) -> None:
    """Check that an image of each shape, ``(B, C, H, W)``, has numbers that int32 counts.

    Raises:
        ValueError: If it has more.
    """
    for shape in shapes:
        if math.prod(shape[1:]) >= 2**31:
            raise ValueError(
                f"An image must have fewer than 2³¹ numbers, got {tuple(shape)}; split it."
            )
