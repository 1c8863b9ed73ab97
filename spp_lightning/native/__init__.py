"""The C++ sources, and the library built from them when the package is installed."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

__all__ = ["library"]

_FOLDER = Path(__file__).resolve().parent


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None where there was no compiler for it; who calls it declares the types."""
    path = _FOLDER / "kernels.so"
    if not path.exists():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # built for another machine
        return None
