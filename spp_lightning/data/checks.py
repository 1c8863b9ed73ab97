"""Checks of the data modules' arguments."""

from __future__ import annotations

import math
from typing import get_args

from spp_lightning.data.pixels import Normalize


def check_int(name: str, value: int, lowest: int) -> int:
    """Return ``value`` if it is an integer of at least ``lowest``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"`{name}` must be an integer of at least {lowest}, got {value!r}.")
    return value


def check_bool(name: str, value: bool) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")
    return value


def check_normalize(value: Normalize) -> Normalize:
    """Return ``value`` if it is a known way to normalise."""
    if value not in get_args(Normalize):
        allowed = " or ".join(f'"{name}"' for name in get_args(Normalize))
        raise ValueError(f"`normalize` must be {allowed}, got {value!r}.")
    return value


def check_val_size(value: int | float) -> int | float:
    """Return ``value`` if it is a number (int) or a share (float) of images."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"`val_size` must be a number of at least 0, got {value!r}.")
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"`val_size` must be in [0, 1) as a share (float), got {value}.")
    return value


def val_count(val_size: int | float, n: int) -> int:
    """Number of validation images. A share is rounded up, so it is never 0."""
    count = math.ceil(val_size * n) if isinstance(val_size, float) else val_size
    if count >= n:
        raise ValueError(f"`val_size` must be in [0, {n}), got {val_size}.")
    return count
