"""Tensors as few bytes, without loss.

All tensors of a dtype stand one after the other. Of their numbers, all first bytes come first, then
all second bytes, and so on: each such plane of bytes is compressed by itself. The bytes with the
exponents are alike and compress well, those of the mantissas don't. Column numbers ascend, so the
differences between them are stored.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spp_lightning.compaction.file.values import DTYPES

__all__ = ["TensorStore", "unpack"]

_MOST_TENSORS = 2**16
_MOST_DIMS = 8
_DEFLATE = 1032  # deflate makes at most so many bytes of one


class TensorStore:
    """Tensors to be packed, each once however often it is added.

    >>> store = TensorStore()
    >>> weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    >>> [store.add(tensor) for tensor in (weight, torch.arange(3), weight)]
    [0, 1, 0]
    >>> unpack(*store.pack(), max_bytes=100)
    [Parameter containing:
    tensor([[1., 2.]], requires_grad=True), tensor([0, 1, 2])]
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def add(self, tensor: Tensor) -> int:
        """Add a tensor.

        Returns:
            Its index.

        Raises:
            ValueError: If it isn't an ordinary tensor of numbers.
        """
        if (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.is_meta
            or tensor.dtype not in DTYPES.values()
            or tensor.dim() > _MOST_DIMS
        ):
            raise ValueError(
                f"a tensor must be a plain dense one of at most {_MOST_DIMS} dimensions, not on the"
                f" meta device, and of {', '.join(DTYPES)}; got a {type(tensor).__name__} of"
                f" {tensor.dtype}, {tensor.layout}, {tensor.dim()} dimensions, on {tensor.device}"
            )
        if id(tensor) not in self._places:
            self._places[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self._places[id(tensor)]

    def pack(self) -> tuple[dict[str, Any], bytes]:
        """All tensors as bytes.

        Returns:
            What :func:`unpack` needs to know of them, as plain data, and the bytes.
        """
        entries, by_dtype = [], {name: list[Tensor]() for name in DTYPES}
        for tensor in self.tensors:
            name = str(tensor.dtype).removeprefix("torch.")
            order = _order(tensor)
            values = tensor.detach().cpu().resolve_conj().resolve_neg()
            by_dtype[name].append(values.permute(order).reshape(-1))
            entries.append(
                {
                    "dtype": name,
                    "shape": list(tensor.shape),
                    "order": order,
                    "parameter": isinstance(tensor, nn.Parameter),
                    "requires_grad": tensor.requires_grad,
                }
            )
        parts, lengths = [], {}
        for name, flat in by_dtype.items():
            if flat:
                planes = [_compress(plane.tobytes()) for plane in _split(torch.cat(flat))]
                parts += planes
                lengths[name] = [len(plane) for plane in planes]
        return {"entries": entries, "planes": lengths}, b"".join(parts)


def unpack(table: Mapping[str, Any], payload: bytes, max_bytes: int) -> list[Tensor]:
    """The tensors that :meth:`TensorStore.pack` packed, on the CPU.

    Args:
        table: What ``pack`` says of them.
        payload: The bytes.
        max_bytes: What all tensors together may take. Nothing is allocated before this is checked.

    Raises:
        ValueError: If the table and the bytes don't fit, or the tensors are larger than
            ``max_bytes``.
    """
    entries, planes = _checked(table["entries"]), table["planes"]
    counts = dict.fromkeys(dict.fromkeys(entry["dtype"] for entry in entries), 0)
    for entry in entries:
        counts[entry["dtype"]] += math.prod(entry["shape"])
    total = sum(count * DTYPES[name].itemsize for name, count in counts.items())
    if total > max_bytes:
        raise ValueError(
            f"its tensors take {total} bytes, more than `max_bytes` (={max_bytes}) allows"
        )
    _check_planes(planes, counts, len(payload))
    position, flat = 0, {}
    for name, lengths in planes.items():
        by_plane = np.empty((counts[name], DTYPES[name].itemsize), np.uint8)
        for i, length in enumerate(lengths):
            plane = _decompress(payload[position : position + length], counts[name])
            by_plane[:, i] = np.frombuffer(plane, np.uint8)
            position += length
        flat[name] = _join(by_plane, name)
    tensors = []
    for entry in entries:
        own, flat[entry["dtype"]] = flat[entry["dtype"]].tensor_split([math.prod(entry["shape"])])
        tensors.append(_tensor(own.clone(), entry))
    return tensors


def _tensor(flat: Tensor, entry: Mapping[str, Any]) -> Tensor:
    order = entry["order"]
    dense = flat.view([entry["shape"][axis] for axis in order])
    tensor = dense.permute([order.index(axis) for axis in range(len(order))])
    if entry["parameter"]:
        return nn.Parameter(tensor, requires_grad=entry["requires_grad"])
    return tensor


def _order(tensor: Tensor) -> list[int]:
    """The dimensions from the one with the largest steps in memory to that with the smallest."""
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _checked(entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or len(entries) > _MOST_TENSORS:
        raise ValueError(f"a file must hold a list of at most {_MOST_TENSORS} tensors")
    keys = {"dtype", "shape", "order", "parameter", "requires_grad"}
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != keys:
            raise ValueError(f"a tensor is described by {', '.join(sorted(keys))}, got {entry!r}")
        shape, order = entry["shape"], entry["order"]
        if (
            entry["dtype"] not in DTYPES
            or not isinstance(shape, list)
            or len(shape) > _MOST_DIMS
            or not all(type(x) is int and 0 <= x < 2**48 for x in shape)
            or not isinstance(order, list)
            or not all(type(x) is int for x in order)
            or sorted(order) != list(range(len(shape)))
            or type(entry["parameter"]) is not bool
            or type(entry["requires_grad"]) is not bool
        ):
            raise ValueError(f"{entry!r} isn't a tensor")
    return entries


def _check_planes(planes: Any, counts: Mapping[str, int], size: int) -> None:
    if not isinstance(planes, dict) or planes.keys() != counts.keys():
        raise ValueError("the byte planes must be those of the tensors' dtypes")
    for name, lengths in planes.items():
        if (
            not isinstance(lengths, list)
            or len(lengths) != DTYPES[name].itemsize
            or not all(type(x) is int and x >= 0 for x in lengths)
        ):
            raise ValueError(f"{lengths!r} aren't the lengths of the byte planes of {name}")
        if any(counts[name] > _DEFLATE * length for length in lengths):
            raise ValueError(
                f"{counts[name]} numbers of {name} can't be in byte planes of {lengths} bytes"
            )
    total = sum(sum(lengths) for lengths in planes.values())
    if total != size:
        raise ValueError(f"{size} bytes of tensors where {total} belong")


def _split(flat: Tensor) -> np.ndarray[Any, Any]:
    size = flat.dtype.itemsize
    if not flat.numel():  # numpy's empty arrays have strides that torch can't view
        return np.empty((size, 0), np.uint8)
    if flat.dtype == torch.int32:
        flat = torch.from_numpy(np.diff(flat.numpy(), prepend=np.int32(0)))
    planes: np.ndarray[Any, Any] = flat.view(torch.uint8).numpy().reshape(-1, size).T
    return planes


def _join(by_plane: np.ndarray[Any, Any], name: str) -> Tensor:
    if not by_plane.size:
        return torch.empty(0, dtype=DTYPES[name])
    if name == "bool" and by_plane.max() > 1:
        raise ValueError("a bool must be 0 or 1")  # torch relies on it
    flat = torch.from_numpy(by_plane.reshape(-1)).view(DTYPES[name])
    if name == "int32":
        flat = torch.from_numpy(np.cumsum(flat.numpy(), dtype=np.int32))
    return flat


def _compress(plane: bytes) -> bytes:
    # Exponents have a distribution but no patterns: searching for any takes 50 times as long, and
    # those that chance makes cost more bits than they save. Runs of zeros are found all the same.
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return stream.compress(plane) + stream.flush()


def _decompress(data: bytes, count: int) -> bytes:
    stream = zlib.decompressobj()
    plane = stream.decompress(data, count + 1)  # never more, whatever the data says
    if len(plane) != count or not stream.eof or stream.unused_data:
        raise ValueError(f"a byte plane must hold {count} bytes")
    return plane
