r"""Compact networks as small files that need neither the network's class nor trust to load.

A file is a header, the structure and the payload, and nothing else:

=========  =====================================================================
8 bytes    ``\x89SPP\r\n\x1a\n``, which no other kind of file begins with
4 bytes    version of the format, little-endian like the other numbers
8 bytes    length of the structure
8 bytes    length of the payload
32 bytes   SHA-256 of the three numbers, the structure and the payload
structure  JSON in UTF-8: steps, layers, and the shapes of the tensors
payload    the tensors' numbers, as :mod:`~spp_lightning.compaction.file.tensors` packs them
=========  =====================================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import secrets
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spp_lightning.compaction.file.graph import describe_network, rebuild_network
from spp_lightning.compaction.file.tensors import TensorStore, unpack
from spp_lightning.compaction.graph.network import CompactNetwork

__all__ = ["MAX_BYTES", "load_compact", "save_compact", "why"]

MAX_BYTES = 2**31
_MAGIC, _VERSION = b"\x89SPP\r\n\x1a\n", 3
_NUMBERS = struct.Struct("<IQQ")  # version, bytes of the structure, bytes of the payload
_HEADER = len(_MAGIC) + _NUMBERS.size + hashlib.sha256().digest_size
_MOST_STRUCTURE = 2**22  # bytes: enough for several thousand layers
_FORMAT_1 = b"spp_lightning.compaction"  # stands near the beginning of files of version 1


def save_compact(model: nn.Module, path: str | Path) -> None:
    """Write a compact network to a file.

    The file holds the steps, the layers' arguments and the tensors, compressed without loss, and
    no code. If writing fails, the file that was there before stays.

    Args:
        model: The network, made by ``compact()`` or read by :func:`load_compact`.
        path: The file. A file that exists is overwritten.

    Raises:
        ValueError: If ``model`` isn't a compact network (the error names the parts of it that
            are), or holds a layer or a function that a file can't hold; or if ``path`` isn't a
            path, or exists and isn't a file.
        FileNotFoundError: If the folder of ``path`` doesn't exist.
        OSError: If the file can't be written.

    >>> import tempfile
    >>> from torch import fx
    >>> net = CompactNetwork.of(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_compact(net, f"{folder}/net.spp")
    ...     again = load_compact(f"{folder}/net.spp")
    >>> x = torch.ones(1, 3, 2, 2)
    >>> torch.equal(again(x), net(x))
    True
    """
    _check_path(path)
    if not isinstance(model, CompactNetwork):
        raise ValueError(_not_compact(model))
    target = Path(os.path.realpath(path))  # a link stays one
    if target.exists() and not target.is_file():
        raise ValueError(f"`path` (={path}) must be a file to write, but is something else.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"`path` (={path}) must be in a folder that exists.")
    store = TensorStore()
    try:
        network = describe_network(model, store)
    except ValueError as error:
        raise ValueError(f"`model` can't be saved: {error}.") from error
    table, payload = store.pack()
    structure = json.dumps({**network, "packed": table}, separators=(",", ":")).encode()
    if len(structure) > _MOST_STRUCTURE:
        raise ValueError(
            f"`model` can't be saved: its structure takes {len(structure)} bytes, more than"
            f" {_MOST_STRUCTURE}."
        )
    numbers = _NUMBERS.pack(_VERSION, len(structure), len(payload))
    checksum = _checksum(numbers, structure, payload)
    _replace(target, b"".join([_MAGIC, numbers, checksum, structure, payload]))


def load_compact(path: str | Path, max_bytes: int = MAX_BYTES) -> CompactNetwork:
    """Read a compact network from a file.

    Nothing in a file is executed, and nothing that it names is looked up in Python. Its layers and
    functions come from fixed tables; a file that names another one is refused.

    Args:
        path: A file that :func:`save_compact` wrote.
        max_bytes: The most bytes that the network's tensors, and the file, may have. Loading takes
            about three times the tensors' bytes at its peak.

    Returns:
        The network, in evaluation mode and on the CPU, with the same tensors bit for bit. Its
        parameters can be trained as those that were saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If ``path`` isn't a path; if the file isn't a compact network's, is of another
            version, damaged, or larger than ``max_bytes`` allows; or if ``max_bytes`` isn't a
            whole number of at least 1.
    """
    _check_path(path)
    if type(max_bytes) is not int or max_bytes < 1:
        raise ValueError(f"`max_bytes` must be a whole number of at least 1, got {max_bytes!r}.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a file, but {Path(path).absolute()} isn't one.")
    with torch.device("cpu"):  # whatever the default device is
        structure, payload = _read(path, max_bytes)
        try:
            data = _parse(structure)
            return rebuild_network(data, unpack(data["packed"], payload, max_bytes))
        except Exception as error:  # a wrong file can be wrong in any way
            raise ValueError(
                f"`path` (={path}) holds no network that can be loaded: {why(error)}"
            ) from error


def _read(path: str | Path, max_bytes: int) -> tuple[bytes, bytes]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(4096)
        if not head.startswith(_MAGIC):
            raise ValueError(
                f"`path` (={path}) must be a file that `save_compact` wrote{_kind(head)}"
            )
        if len(head) < _HEADER:
            raise ValueError(f"`path` (={path}) is damaged: it is cut short.")
        version, *lengths = _NUMBERS.unpack_from(head, len(_MAGIC))
        if version != _VERSION:
            raise ValueError(
                f"`path` (={path}) is of version {version} of the format; this spp_lightning reads"
                f" version {_VERSION}."
            )
        if size != _HEADER + sum(lengths):
            raise ValueError(
                f"`path` (={path}) is damaged: it is cut short or too long, {size} bytes where"
                f" {_HEADER + sum(lengths)} belong."
            )
        if size > max_bytes or lengths[0] > _MOST_STRUCTURE:
            raise ValueError(
                f"`path` (={path}) is too large: {size} bytes, {lengths[0]} of structure, where"
                f" `max_bytes` (={max_bytes}) and {_MOST_STRUCTURE} of structure are allowed."
            )
        file.seek(_HEADER)
        structure, payload = file.read(lengths[0]), file.read(lengths[1])
    numbers = head[len(_MAGIC) : len(_MAGIC) + _NUMBERS.size]
    if _checksum(numbers, structure, payload) != head[len(_MAGIC) + _NUMBERS.size : _HEADER]:
        raise ValueError(f"`path` (={path}) is damaged: its checksum is wrong.")
    return structure, payload


def _kind(head: bytes) -> str:
    """What a file is that begins like this, if it isn't a compact network of today."""
    if not head.startswith(b"PK"):
        return "."
    if _FORMAT_1 in head:
        return (
            f" in version {_VERSION} of the format; this one is of version 1. Make it anew with"
            " `compact` and `save_compact`."
        )
    return "; it is another file of torch, or a zip file."


def _parse(structure: bytes) -> dict[str, Any]:
    def whole(digits: str) -> int:
        if len(digits) > 20:
            raise ValueError(f"a number must have at most 20 digits, got {len(digits)}")
        return int(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(f"a key must be there once, got {[key for key, _ in pairs]}")
        return found

    data = json.loads(structure, parse_int=whole, object_pairs_hook=unique)
    expected = {"steps", "modules", "layers", "tensors", "packed"}
    if not isinstance(data, dict) or data.keys() != expected:
        raise ValueError(f"its structure must have {sorted(expected)}")
    return data


def _checksum(*parts: bytes) -> bytes:
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(part)
    return checksum.digest()


def _not_compact(model: object) -> str:
    """Why something that isn't a compact network can't be saved, and what of it can."""
    text = (
        "`model` must be a network that `compact` made of a traceable one (a CompactNetwork), got"
        f" {type(model).__name__}."
    )
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    parts = [f"`model.{name}`" for name, part in modules if isinstance(part, CompactNetwork)]
    if not parts:
        return text
    return (
        f"{text} Save each of its compact parts by itself, {', '.join(parts)}, and set what"
        " `load_compact` returns in their places."
    )


def _check_path(path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"`path` must be a str or a path, got {path!r}.")


def why(error: Exception) -> str:
    """Why a file can't be loaded, in one line, of what torch says about it in many."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):  # whose text advises to trust the file
        found = re.search(r"GLOBAL (\S+)", text)
        if found is None:
            return "what it holds can't be read as tensors and plain data"
        return f"it holds a {found[1]}, which isn't read, since that may run code"
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0]}"


def _replace(path: Path, content: bytes) -> None:
    # Written beside the file and moved over it in one stroke: a reader sees the old or the new one.
    new = path.parent / f".spp-{secrets.token_hex(8)}.tmp"
    try:
        with open(new, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
