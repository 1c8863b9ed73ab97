"""Smaller cases of a convolution: what layers of every precision have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

__all__ = ["smaller_case"]


_Case = TypeVar("_Case")


def smaller_case(like: _Case, simple: Mapping[str, Any]) -> Iterator[_Case]:
    """Cases with one thing less.

    Args:
        like: A frozen dataclass with a ``geometry``, a ``size`` and ``columns``.
        simple: The simplest value of each of its fields that is no number of its shape.
    """
    case: Any = like
    g = case.geometry
    for name, value in simple.items():
        if getattr(case, name) != value:
            yield replace(case, **{name: value})
    half = len(case.columns) // 2
    for columns in (case.columns[:half], case.columns[half:], case.columns[1:], case.columns[:-1]):
        if columns != case.columns:
            yield replace(case, columns=columns)
    for axis in (0, 1):
        for less in (case.size[axis] // 2, case.size[axis] - 1):
            size = tuple(less if i == axis else case.size[i] for i in (0, 1))
            if less >= 1:
                yield replace(case, size=size)
    for name, value in {"stride": (1, 1), "dilation": (1, 1), "padding": (0, 0)}.items():
        if getattr(g, name) != value:
            yield replace(case, geometry=g._replace(**{name: value}))
    filters = g.groups * max(1, g.filters // g.groups // 2)
    if filters < g.filters:
        yield replace(case, geometry=g._replace(filters=filters))
    if g.groups == 1 and g.channels > 1:
        channels = g.channels // 2
        kept = tuple(k for k in case.columns if k < channels * g.taps)
        yield replace(case, geometry=g._replace(channels=channels), columns=kept)
