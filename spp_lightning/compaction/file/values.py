"""Arguments of steps and layers as plain data that JSON can hold, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spp_lightning.compaction.graph.steps import Value

__all__ = ["DTYPES", "decode", "encode"]

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.complex64, torch.complex128),
    )
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
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d{1,3})?", re.ASCII)
_TEXT = re.compile(r"[\w .,>:-]{0,256}", re.ASCII)  # a mode, a dtype's name, an equation of einsum
_MOST_DEPTH = 16


def encode(value: Any) -> Any:
    """An argument as numbers, strings, lists and dicts.

    Numbers, strings and lists stand for themselves. Anything else is a dict of one entry, whose key
    names the type.

    Raises:
        ValueError: If it is of a type that a file can't hold.

    >>> encode((1, [2.5, float("inf")], slice(None), torch.float16, Value(3)))
    {'tuple': [1, [2.5, inf], {'slice': [None, None, None]}, {'dtype': 'float16'}, {'step': 3}]}
    """
    data = _encoded(value)
    decode(data, limit=2**31)  # refuses what couldn't be read
    return data


def _encoded(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if value is ...:
        return {"ellipsis": None}
    if isinstance(value, Value):
        return {"step": value.step}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [_encoded(x) for x in value]}
    if isinstance(value, list):
        return [_encoded(x) for x in value]
    if isinstance(value, dict):
        return {"dict": [[_encoded(key), _encoded(x)] for key, x in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encoded(x) for x in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    raise ValueError(f"{value!r} of {type(value)} is nothing that a file of a network can hold")


def decode(data: Any, limit: int = 0) -> Any:
    """The argument that :func:`encode` made ``data`` of.

    Args:
        data: Plain data.
        limit: How many earlier steps there are: a :class:`Value` must name one of them.

    Raises:
        ValueError: If :func:`encode` makes no such data.

    >>> decode(encode((1, [2.5, float("inf")], slice(None), torch.float16)))
    (1, [2.5, inf], slice(None, None, None), torch.float16)
    """
    return _decoded(data, limit, _MOST_DEPTH)


def _decoded(data: Any, limit: int, depth: int) -> Any:
    if data is None or type(data) in (bool, float):
        return data
    if type(data) is int and -(2**63) <= data < 2**63:
        return data
    if isinstance(data, str) and _TEXT.fullmatch(data):
        return data
    if depth == 0:
        raise ValueError(f"an argument must be nested at most {_MOST_DEPTH} levels deep")
    if isinstance(data, list):
        return [_decoded(x, limit, depth - 1) for x in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError(f"{_short(data)} isn't an argument")
    ((kind, content),) = data.items()
    if kind in _CONTAINERS and isinstance(content, list):
        return _CONTAINERS[kind](_decoded(content, limit, depth - 1))
    if kind in _NAMED and isinstance(content, str) and content in _NAMED[kind]:
        return _NAMED[kind][content]
    if kind == "step" and type(content) is int and 0 <= content < limit:
        return Value(content)
    if kind == "device" and isinstance(content, str) and _DEVICE.fullmatch(content):
        return torch.device(content)
    if kind == "ellipsis" and content is None:
        return ...
    raise ValueError(f"{_short(data)} isn't an argument")


def _dict(pairs: list[Any]) -> dict[Any, Any]:
    if not all(isinstance(x, list) and len(x) == 2 and type(x[0]) in (str, int) for x in pairs):
        raise ValueError("a dict must have text or whole numbers as keys")
    return dict(pairs)


def _slice(parts: list[Any]) -> slice:
    if len(parts) != 3:
        raise ValueError(f"a slice has a start, a stop and a step, got {_short(parts)}")
    return slice(*parts)


_CONTAINERS: Mapping[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "size": torch.Size,
    "slice": _slice,
    "dict": _dict,
}
_NAMED: Mapping[str, Mapping[str, Any]] = {"dtype": DTYPES, "memory_format": _FORMATS}


def _short(data: object) -> str:
    text = repr(data)
    return text if len(text) < 100 else f"{text[:100]}…"
