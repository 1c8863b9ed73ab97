"""Checks of arguments: an error names the argument, its value and the rule."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, get_args

__all__ = ["check", "check_choice", "is_whole", "number"]


def number(value: object) -> float:
    """The value, if it is a number; else NaN, which is in no range."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    return math.nan


def is_whole(value: object, lowest: int) -> bool:
    """Whether a value is a whole number of at least ``lowest``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= lowest


def check(name: str, value: object, rule: str, holds: bool) -> None:
    """Raise a ValueError that names the argument, its value and the rule, unless the rule holds."""
    if not holds:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise a ValueError unless a value is one of those that a ``Literal`` type lists."""
    allowed = get_args(choices)
    rule = "one of " + ", ".join(f'"{choice}"' for choice in allowed)
    check(name, value, rule, value in allowed)
