"""Decoded images in one .npy file, written atomically, and written anew when it does not fit."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from spp_lightning.data.arrays import RECORD, Records

HOUR = 3600  # seconds


def load(path: Path) -> Records | None:
    """Map a cache file into memory.

    Returns:
        Array of ``RECORD``, ``(n,)``; ``None`` if the file is missing, cut off or something else.
    """
    try:
        # Copy on write: ranks share the pages, and torch gets a writable array.
        records = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(records, np.ndarray) or records.dtype != RECORD or records.ndim != 1:
        return None
    return records


def save(path: Path, records: Records) -> None:
    """Write a cache file and remove older ones of the same part.

    The file is written under another name and then renamed, so it is complete or absent.

    Args:
        path: ``<folder>/<part>-<fingerprint>.npy``; the folder is made.
        records: Array of ``RECORD``, ``(n,)``.

    Raises:
        OSError: If the folder can't be written.
    """
    path.parent.mkdir(exist_ok=True)
    handle, temporary = tempfile.mkstemp(".tmp", path.name, path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, records)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; other users may share the folder
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _remove_leftovers(path)


def _remove_leftovers(path: Path) -> None:
    part = path.name.split("-")[0]
    for old in path.parent.glob(f"{part}-*"):
        with contextlib.suppress(OSError):  # another process may have removed the file
            # Another process may still be writing a recent temporary file.
            in_use = old.suffix == ".tmp" and time.time() - old.stat().st_mtime < HOUR
            if old != path and not in_use:
                old.unlink()
