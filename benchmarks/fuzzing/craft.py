"""Changes of a compact network's file: damage, and structures that mean harm."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import random
import struct
import zlib
from typing import Any, NamedTuple

from spp_lightning.compaction.file.allowlist import LAYERS, METHODS, functions

__all__ = ["Change", "apply", "draw_changes"]

_NUMBERS = struct.Struct("<IQQ")
_MAGIC = 8
_HEADER = _MAGIC + _NUMBERS.size + 32

RAW = ("flip", "cut", "append", "header")
CRAFTED = ("value", "number", "delete", "copy", "repeat", "payload", "name", "call", "layer")


class Change(NamedTuple):
    """A change of a file, and what chance decides about it."""

    kind: str
    seed: int


def draw_changes(seed: int) -> tuple[Change, ...]:
    """Random changes: damage, or some crafted ones."""
    r = random.Random(seed)
    if r.random() < 0.1:
        return (Change(r.choice(RAW), r.randrange(2**32)),)
    weighted = (*CRAFTED, *(6 * ("call",)), *(2 * ("layer",)))
    count = r.choice([1, 1, 1, 2, 3, 5])
    return tuple(Change(r.choice(weighted), r.randrange(2**32)) for _ in range(count))


def apply(content: bytes, changes: tuple[Change, ...]) -> bytes:
    """A file with changes; crafted ones get the checksum that belongs to them."""
    if changes[0].kind in RAW:
        return _damage(content, changes[0])
    version, size, _ = _NUMBERS.unpack_from(content, _MAGIC)
    data = json.loads(content[_HEADER : _HEADER + size])
    payload = content[_HEADER + size :]
    for change in changes:
        r = random.Random(change.seed)
        try:
            if change.kind == "payload":
                payload = _payload(r, data, payload)
            else:
                _CHANGES[change.kind](r, data)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, zlib.error):
            continue  # what an earlier change has left doesn't have it
    structure = json.dumps(data).encode()
    numbers = _NUMBERS.pack(version, len(structure), len(payload))
    checksum = hashlib.sha256(numbers + structure + payload).digest()
    return content[:_MAGIC] + numbers + checksum + structure + payload


def _damage(content: bytes, change: Change) -> bytes:
    r, damaged = random.Random(change.seed), bytearray(content)
    if change.kind == "cut":
        return content[: r.randrange(len(content))]
    if change.kind == "append":
        return content + r.randbytes(r.randint(1, 100))
    last = _HEADER if change.kind == "header" else len(content)
    for _ in range(r.choice([1, 1, 2, 8])):
        damaged[r.randrange(last)] ^= r.randint(1, 255)
    return bytes(damaged)


# --- values ---

_INTS = [-1, 0, 1, 2, 3, 4, 7, 16, 1000, 2**15, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63)]
_FLOATS = [0.0, 0.5, -1.0, 1e-30, 1e30, math.inf, -math.inf, math.nan]
_TEXTS = [
    *("", "x", "sum", "mean", "nearest", "bilinear", "bicubic", "area", "reflect", "constant"),
    *("replicate", "same", "valid", "floor", "trunc", "tanh", "meta", "cpu", "cuda", "fro", "nuc"),
    *("abcd->", "ab...->b", "ij", "__class__", "float32", "amax", "prod"),
]


def _value(r: random.Random, steps: int, depth: int = 2) -> Any:
    """A value that an argument might have, or that hopefully nobody expects."""
    kind = r.randrange(16 if depth else 8)
    if kind < 3:
        return r.choice(_INTS[:8] if r.random() < 0.7 else _INTS)
    if kind == 3:
        return r.choice(_FLOATS)
    if kind == 4:
        return r.choice([None, True, False])
    if kind == 5:
        return r.choice(_TEXTS)
    if kind in (6, 7):
        return {"step": r.randrange(max(1, steps))}
    inner = [_value(r, steps, depth - 1) for _ in range(r.choice([0, 1, 2, 2, 3, 4]))]
    whole = [r.choice(_INTS[:8]) for _ in range(r.choice([1, 2, 2, 4]))]
    return [
        inner,
        whole,
        {"tuple": inner},
        {"tuple": whole},
        {"slice": [r.choice([None, *_INTS]) for _ in range(3)]},
        {"dtype": r.choice(["float32", "float64", "bool", "int64", "uint8", "complex64", "int8"])},
        {"size": whole},
        r.choice([{"ellipsis": None}, {"device": "cpu"}, {"dict": [["a", 1]]}, {"size": inner}]),
    ][kind - 8]


def _nodes(data: Any) -> list[tuple[Any, Any]]:
    """Every place in a structure: a container, and a key."""
    found: list[tuple[Any, Any]] = []
    rest = [data]
    while rest:
        container = rest.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                rest.append(container[key])
    return found


def _change_value(r: random.Random, data: Any) -> None:
    container, key = r.choice(_nodes(data))
    container[key] = _value(r, len(data["steps"]))


def _change_number(r: random.Random, data: Any) -> None:
    container, key = r.choice([(c, k) for c, k in _nodes(data) if type(c[k]) is int])
    number = container[key]
    container[key] = r.choice([number + 1, number - 1, 2 * number, -number, r.choice(_INTS)])


def _delete(r: random.Random, data: Any) -> None:
    container, key = r.choice(_nodes(data))
    del container[key]


def _copy(r: random.Random, data: Any) -> None:
    nodes = _nodes(data)
    (source, first), (target, second) = r.choice(nodes), r.choice(nodes)
    target[second] = copy.deepcopy(source[first])


def _repeat(r: random.Random, data: Any) -> None:
    lists = [c[k] for c, k in _nodes(data) if isinstance(c[k], list) and c[k]]
    some = r.choice(lists)
    some.extend(copy.deepcopy(some[r.randrange(len(some))]) for _ in range(r.choice([1, 2, 100])))


_NAMES = [
    *("ｔo_folder", "to_folder", "forward", "__class__", "_modules", "training", "steps", "a.b.c"),
    *("weight", "x'); import os #", "", ".", "..", "a..b", "0", "é", "_program", "compact_steps"),
]


def _rename(r: random.Random, data: Any) -> None:
    table = data[r.choice(["layers", "tensors"])]
    old = r.choice(list(table))
    new = r.choice([*_NAMES, *(f"{name}.{part}" for name in table for part in ("weight", "bias"))])
    table[new] = table.pop(old)
    for step in data["steps"]:
        if step[2] == old:
            step[2] = new


def _call(r: random.Random, data: Any) -> None:
    """Call an allowed function or method, with anything."""
    steps = data["steps"]
    place = r.randint(1, len(steps) - 1)
    if r.random() < 0.5:
        kind, target = "function", r.choice(sorted(functions()))
    else:
        kind, target = "method", r.choice(sorted(METHODS))
    tensor = {"step": r.randrange(place)}
    args: list[Any] = [] if r.random() < 0.05 else [tensor]
    args += [_value(r, place) for _ in range(r.choice([0, 0, 1, 1, 2, 3, 5]))]
    if r.random() < 0.2:
        args[0:1] = [[tensor, {"step": r.randrange(place)}]]
    names = ["dim", "keepdim", "size", "out", "inplace", "p", "dtype", "mode", "stride", "padding"]
    kwargs = {r.choice(names): _value(r, place) for _ in range(r.choice([0, 0, 0, 1, 2]))}
    _insert(r, data, place, [kind, f"added_{place}_{len(steps)}", target, args, kwargs])


def _layer(r: random.Random, data: Any) -> None:
    """Call an allowed layer that was made with anything."""
    place = r.randint(1, len(data["steps"]) - 1)
    kind = r.choice(sorted(LAYERS))
    parameters = [
        name
        for name in inspect.signature(LAYERS[kind]).parameters
        if name not in ("device", "args")
    ]
    arguments = {name: _value(r, 0) for name in parameters if r.random() < 0.6}
    name = f"added{len(data['modules'])}"
    data["modules"].append({"class": kind, "arguments": arguments, "tensors": {}})
    data["layers"][name] = len(data["modules"]) - 1
    row = ["layer", f"{name}_{place}", name, [{"step": r.randrange(place)}], {}]
    _insert(r, data, place, row)


def _insert(r: random.Random, data: Any, place: int, row: list[Any]) -> None:
    """Put a step into a network, and let later steps read it, if chance says so."""
    steps = data["steps"]
    steps.insert(place, row)
    read = r.random() < 0.8
    for step in steps[place + 1 :]:
        for container, key in _nodes(step):
            if key == "step" and type(container[key]) is int and container[key] >= place:
                container[key] += 1
            elif key == "step" and read and container[key] == place - 1:
                container[key] = place


def _payload(r: random.Random, data: Any, payload: bytes) -> bytes:
    """Other numbers, or other bytes where numbers should be."""
    name = r.choice(list(data["packed"]["planes"]))
    lengths = data["packed"]["planes"][name]
    i, position = r.randrange(len(lengths)), 0
    for key, others in data["packed"]["planes"].items():
        if key == name:
            position += sum(lengths[:i])
            break
        position += sum(others)
    old = payload[position : position + lengths[i]]
    plane = bytearray(zlib.decompress(old))
    for _ in range(r.choice([1, 3, 100])):
        plane[r.randrange(len(plane))] = r.randrange(256)
    if r.random() < 0.2:
        plane = bytearray(r.choice([0, 1, 127, 255]) for _ in range(1)) * r.choice(
            [len(plane), 2**24]
        )
    new = r.choice([zlib.compress(bytes(plane), 9), bytes(plane), old + b"x", old[:-1]])
    lengths[i] = len(new)
    return payload[:position] + new + payload[position + len(old) :]


_CHANGES = {
    "value": _change_value,
    "number": _change_number,
    "delete": _delete,
    "copy": _copy,
    "repeat": _repeat,
    "name": _rename,
    "call": _call,
    "layer": _layer,
}
