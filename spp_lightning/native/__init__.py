"""The C++ sources, and the library built from them when the package is installed."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

__all__ = ["library", "library_path"]


def library_path() -> Path:
    """Where the library is, if it was built."""
    return Path(__file__).resolve().parent / "kernels.so"


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None where there was no compiler for it; who calls it declares the types."""
    path = library_path()
    if not path.exists():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # built for another machine
        return None
