"""Arguments of graph nodes and layers as plain data that JSON can hold, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["decode", "encode"]

_DTYPES = {
    name: value for name, value in sorted(vars(torch).items()) if isinstance(value, torch.dtype)
}
_FORMATS = {
    str(value).removeprefix("torch."): value
    for value in (
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
        torch.channels_last_3d,
    )
}


def encode(value: Any) -> Any:
    """An argument as numbers, strings, lists and dicts.

    Numbers, strings and lists stand for themselves; anything else is a dict of one entry, whose
    key says what it is.

    Raises:
        ValueError: If it is of a type that a file can't hold.

    >>> encode((1, [2.5, float("inf")], slice(None), torch.float16))
    {'tuple': [1, [2.5, inf], {'slice': [None, None, None]}, {'dtype': 'float16'}]}
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if value is ...:
        return {"ellipsis": None}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Size):
        return {"size": [encode(x) for x in value]}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode(x) for x in value]}
    if isinstance(value, list):
        return [encode(x) for x in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(x)] for key, x in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(x) for x in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    raise ValueError(f"{value!r} of {type(value)} is nothing that a file of a network can hold")


def decode(data: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """The argument that :func:`encode` made ``data`` of.

    Args:
        data: Plain data.
        nodes: The nodes that it may refer to, by name.

    Raises:
        ValueError: If it is nothing that :func:`encode` makes.

    >>> decode(encode((1, [2.5, float("inf")], slice(None), torch.float16)))
    (1, [2.5, inf], slice(None, None, None), torch.float16)
    """
    if data is None or type(data) in (bool, int, float, str):
        return data
    if isinstance(data, list):
        return [decode(x, nodes) for x in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError(f"{data!r} isn't an argument")
    ((kind, content),) = data.items()
    lists: dict[str, Callable[[list[Any]], Any]] = {
        "tuple": tuple,
        "size": torch.Size,
        "slice": lambda parts: slice(*parts),
        "dict": dict,
    }
    names: dict[str, Mapping[str, Any]] = {
        "dtype": _DTYPES,
        "memory_format": _FORMATS,
        "node": nodes or {},
    }
    if kind in lists and isinstance(content, list):
        return lists[kind](decode(content, nodes))
    if kind in names and isinstance(content, str) and content in names[kind]:
        return names[kind][content]
    if kind == "device" and isinstance(content, str):
        return torch.device(content)
    if kind == "ellipsis":
        return ...
    raise ValueError(f"{data!r} isn't an argument")
