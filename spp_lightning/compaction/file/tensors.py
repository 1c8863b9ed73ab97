"""Tensors as few bytes, without loss.

All tensors of a dtype stand one behind the other, and of their numbers all first bytes, then all
second bytes and so on: the bytes with the exponents are alike and compress well, those of the
mantissas don't. Column numbers ascend, so the differences between them are stored.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["TensorStore", "unpack"]

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.complex64, torch.complex128),
    )
}


class TensorStore:
    """Tensors to be packed, each once however often it is added.

    >>> store = TensorStore()
    >>> weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    >>> [store.add(tensor) for tensor in (weight, torch.arange(3), weight)]
    [0, 1, 0]
    >>> unpack(*store.pack())
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
        name = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.is_meta or name not in _DTYPES:
            raise ValueError(
                f"a tensor must be dense, not on the meta device, and of {', '.join(_DTYPES)}; got"
                f" {tensor.dtype}, {tensor.layout}, on {tensor.device}"
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
        entries, by_dtype = [], {name: list[Tensor]() for name in _DTYPES}
        for tensor in self.tensors:
            # The clone has no gaps, and the strides that the tensor has without them.
            dense = tensor.detach().cpu().clone(memory_format=torch.preserve_format)
            dense = dense.resolve_conj().resolve_neg()
            name = str(tensor.dtype).removeprefix("torch.")
            by_dtype[name].append(dense.as_strided((dense.numel(),), (1,)))
            entries.append(
                {
                    "dtype": name,
                    "shape": list(dense.shape),
                    "stride": list(dense.stride()),
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


def unpack(table: dict[str, Any], payload: bytes) -> list[Tensor]:
    """The tensors that :meth:`TensorStore.pack` packed, on the CPU.

    Raises:
        ValueError: If the table and the bytes don't fit.
    """
    entries = [_checked(entry) for entry in table["entries"]]
    position = 0
    flat = {}
    for name, lengths in table["planes"].items():
        count = sum(math.prod(entry["shape"]) for entry in entries if entry["dtype"] == name)
        dtype = _DTYPES[name]
        if len(lengths) != dtype.itemsize:
            raise ValueError(f"{len(lengths)} byte planes for {name}")
        planes = []
        for length in lengths:
            planes.append(_decompress(payload[position : position + length], count))
            position += length
        flat[name] = _join(planes, dtype)
    if position != len(payload):
        raise ValueError(f"{len(payload)} bytes of tensors where {position} belong")
    tensors = []
    for entry in entries:
        size = math.prod(entry["shape"])
        own, flat[entry["dtype"]] = flat[entry["dtype"]].tensor_split([size])
        tensor = own.clone().as_strided(entry["shape"], entry["stride"])
        if entry["parameter"]:
            tensor = nn.Parameter(tensor, requires_grad=entry["requires_grad"])
        tensors.append(tensor)
    return tensors


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    shape, stride = entry["shape"], entry["stride"]
    numbers = [*shape, *stride]
    if (
        entry["dtype"] not in _DTYPES
        or len(shape) != len(stride)
        or not all(type(x) is int and x >= 0 for x in numbers)
    ):
        raise ValueError(f"{entry!r} isn't a tensor")
    return entry


def _split(flat: Tensor) -> np.ndarray[Any, Any]:
    if flat.dtype == torch.int32:
        flat = torch.from_numpy(np.diff(flat.numpy(), prepend=np.int32(0)))
    size = flat.dtype.itemsize
    planes: np.ndarray[Any, Any] = flat.view(torch.uint8).numpy().reshape(-1, size).T
    return planes


def _join(planes: list[bytes], dtype: torch.dtype) -> Tensor:
    by_plane = np.stack([np.frombuffer(plane, np.uint8) for plane in planes], axis=1)
    flat = torch.from_numpy(by_plane.reshape(-1)).view(dtype)
    if dtype == torch.int32:
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
    if len(plane) != count or not stream.eof:
        raise ValueError(f"a byte plane must hold {count} bytes")
    return plane
