"""Compact networks as small files that need neither the class of the network nor trust to load."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from spp_lightning.compaction.file.graph import describe_graph, rebuild_graph
from spp_lightning.compaction.file.tensors import TensorStore, unpack

__all__ = ["load_compact", "save_compact"]

_FORMAT, _VERSION = "spp_lightning.compaction", 1


def save_compact(model: nn.Module, path: str | Path) -> None:
    """Write a compact network to a file.

    The file holds the graph, the layers' arguments and the tensors, compressed without loss, and
    no code; a crash while it is written leaves what was there before.

    Args:
        model: The network, made by ``compact()`` or read by :func:`load_compact`.
        path: The file, overwritten if it is there.

    Raises:
        ValueError: If ``model`` isn't a compact network, or holds a layer or a function that a
            file can't hold; or ``path`` isn't a path, or is there and isn't a file.
        FileNotFoundError: If there is no folder for it.
        OSError: If it can't be written.

    >>> import tempfile
    >>> from spp_lightning.compaction.layers.column_conv import ColumnConv2d
    >>> net = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_compact(net, f"{folder}/net.spp")
    ...     again = load_compact(f"{folder}/net.spp")
    >>> x = torch.ones(1, 3, 2, 2)
    >>> torch.equal(again(x), net(x))
    True
    """
    _check_path(path)
    if not isinstance(model, fx.GraphModule):
        raise ValueError(
            "`model` must be a network that `compact` made of a traceable one (a"
            f" torch.fx.GraphModule), got {type(model).__name__}."
        )
    target = Path(os.path.realpath(path))  # a link stays one
    if target.exists() and not target.is_file():
        raise ValueError(f"`path` (={path}) must be a file to write, but is something else.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"`path` (={path}) must be in a folder that exists.")
    store = TensorStore()
    try:
        graph = describe_graph(model, store)
    except ValueError as error:
        raise ValueError(f"`model` can't be saved: {error}.") from error
    table, payload = store.pack()
    structure = json.dumps({**graph, "tensors": table}, separators=(",", ":"))
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "structure": structure,
        "payload": torch.from_numpy(np.frombuffer(payload, np.uint8).copy()),
        "checksum": _checksum(structure, payload),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    _replace(target, buffer.getbuffer())


def load_compact(path: str | Path) -> fx.GraphModule:
    """Read a compact network from a file.

    Nothing in a file is executed, and nothing is looked up that it names: it can hold the layers
    of ``torch.nn`` and functions that compute tensors, and a file with anything else is refused.

    Args:
        path: A file that :func:`save_compact` wrote.

    Returns:
        The network, in evaluation mode and on the CPU, with the same tensors bit for bit; its
        parameters can be trained as those that were saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If ``path`` isn't a path, or the file isn't a compact network's, is of another
            version, or damaged.
    """
    _check_path(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a file, but {Path(path).absolute()} isn't one.")
    with torch.device("cpu"):  # whatever the default device is
        structure, payload = _read(path)
        try:
            data = json.loads(structure)
            return rebuild_graph(data, unpack(data["tensors"], payload))
        except Exception as error:  # a wrong file can be wrong in any way
            raise ValueError(
                f"`path` (={path}) holds no network that can be loaded: {why(error)}"
            ) from error


def _read(path: str | Path) -> tuple[str, bytes]:
    if not zipfile.is_zipfile(path):  # as all that torch saves; it would try to unpickle others
        raise ValueError(
            f"`path` (={path}) must be a file that `save_compact` wrote; it is none of torch's, or"
            " is cut short."
        )
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different one for every way a file can be bad
        raise ValueError(
            f"`path` (={path}) isn't a compact network's file, or is damaged: {why(error)}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(
            f"`path` (={path}) must be a file that `save_compact` wrote; it is another file of"
            " torch."
        )
    if content.get("version") != _VERSION:
        raise ValueError(
            f"`path` (={path}) is of version {content.get('version')!r} of the format; this"
            f" spp_lightning reads version {_VERSION}."
        )
    structure, payload = content.get("structure"), content.get("payload")
    if not isinstance(structure, str) or not isinstance(payload, torch.Tensor):
        raise ValueError(f"`path` (={path}) is damaged: parts of it are missing.")
    numbers = payload.numpy().tobytes()
    if content.get("checksum") != _checksum(structure, numbers):
        raise ValueError(f"`path` (={path}) is damaged: its checksum is wrong.")
    return structure, numbers


def _checksum(structure: str, payload: bytes) -> str:
    return hashlib.sha256(structure.encode() + b"\0" + payload).hexdigest()


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


def _replace(path: Path, content: memoryview) -> None:
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
