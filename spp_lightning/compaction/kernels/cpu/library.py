"""The kernels' library, its functions and structures as ctypes."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from spp_lightning import native

__all__ = ["instruction_set", "is_available", "library"]


class _Geometry(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("channels", "filters", "groups")] + [
        (name, ctypes.c_int32 * 2) for name in ("kernel", "stride", "padding", "dilation")
    ]


class _PlaneOp(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("kernel", ctypes.c_int32 * 2),
        ("stride", ctypes.c_int32 * 2),
        ("padding", ctypes.c_int32 * 2),
        ("ceil_mode", ctypes.c_int32),
        ("count_include_pad", ctypes.c_int32),
        ("alpha", ctypes.c_float),
    ]


@cache
def library() -> Any:
    """The kernels' functions, or None where they weren't built; a warning says so once."""
    functions = native.library()
    if functions is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        functions.spp_plan.restype = pointer
        functions.spp_plan.argtypes = [
            *(pointer, pointer, number, pointer, pointer),
            *(ctypes.c_float, ctypes.c_float, pointer, number, number),
        ]
        functions.spp_free.argtypes = [pointer]
        functions.spp_free.restype = None
        functions.spp_drop_filters.argtypes = [pointer]
        functions.spp_drop_filters.restype = None
        functions.spp_forward.argtypes = [pointer] * 5
        functions.spp_sequence.restype = pointer
        functions.spp_sequence.argtypes = [pointer, pointer, number]
        functions.spp_free_sequence.argtypes = [pointer]
        functions.spp_free_sequence.restype = None
        functions.spp_forward_sequence.argtypes = [pointer] * 5
        functions.spp_linear.argtypes = [pointer, pointer, ctypes.c_int64, number, pointer]
        functions.spp_linear.restype = None
        functions.spp_backward.argtypes = [pointer] * 5 + [number] + [pointer] * 3
        functions.spp_isa.restype = ctypes.c_char_p
        functions.spp_set_isa.argtypes = [ctypes.c_char_p]
        return functions
    folder = Path(native.__file__).parent
    warnings.warn(
        f"The CPU kernels of spp_lightning aren't there (in {folder}): compact networks compute the"
        " same on the CPU, but more slowly than dense ones. Either no C++ compiler was found when"
        " it was installed: install one, such as g++, and spp_lightning once more. Or a checkout"
        " is imported in which nothing was built: build it by `pip install -e .` in there, or run"
        " Python in another folder.",
        stacklevel=3,
    )
    return None


def is_available() -> bool:
    """Whether the kernels were built; a warning says once if they weren't."""
    return library() is not None


def instruction_set() -> str:
    """What the kernels use: ``"avx512"``, ``"avx2"``, ``"base"``, or ``"none"`` without them."""
    functions = library()
    return functions.spp_isa().decode() if functions else "none"


class _NativeWay(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("height", "width", "conv_height", "conv_width")),
        *((name, ctypes.c_int32) for name in ("threads", "variant", "bfloat16")),
    ]
