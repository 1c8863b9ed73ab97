"""The kernels' library as ctypes: its functions, its structures, its errors.

Every function that can fail raises: the library returns a status, which becomes an exception with
the library's message. Functions take the number of elements of every tensor and refuse what doesn't
fit the plan.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from spp_lightning import native

__all__ = [
    "NativeCall",
    "NativeConcatPart",
    "NativeConfig",
    "NativeEpilogueOp",
    "NativeGate",
    "NativeGateLayer",
    "NativeGeometry",
    "NativeInt8Rounding",
    "NativeInt8Scales",
    "NativeLinear",
    "NativeNorm",
    "NativePlace",
    "instruction_set",
    "is_available",
    "library",
]

_POINTER, _NUMBER, _COUNT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_TENSOR = (_POINTER, _COUNT)


class NativeGeometry(ctypes.Structure):
    """``Geometry`` of ``native/geometry.h``, as the classes below are its other structures."""

    _fields_ = [(name, _NUMBER) for name in ("channels", "filters", "groups")] + [
        (name, _NUMBER * 2) for name in ("kernel", "stride", "padding", "dilation")
    ]


class NativeEpilogueOp(ctypes.Structure):
    """An operation on the planes of a convolution's output."""

    _fields_ = [
        ("kind", _NUMBER),
        *((name, _NUMBER * 2) for name in ("kernel", "stride", "padding")),
        *((name, _NUMBER) for name in ("ceil_mode", "count_include_pad")),
        ("alpha", ctypes.c_float),
    ]


class NativeConfig(ctypes.Structure):
    """How a plan computes inputs of one shape."""

    _fields_ = [
        ("batch", _COUNT),
        *((name, _NUMBER) for name in ("height", "width", "conv_height", "conv_width")),
        *((name, _NUMBER) for name in ("threads", "kernel", "bfloat16")),
    ]


class NativeLinear(ctypes.Structure):
    """A linear layer's tensors."""

    _fields_ = [
        *(("weight", _POINTER), ("weight_count", _COUNT)),
        *(("bias", _POINTER), ("bias_count", _COUNT)),
        *((name, _NUMBER) for name in ("in_features", "out_features")),
    ]


class NativeGateLayer(ctypes.Structure):
    """One of the two layers of a gate."""

    _fields_ = [
        *(("weight", _POINTER), ("weight_count", _COUNT), ("bias", _POINTER)),
        *(("columns", _POINTER), ("num_columns", _NUMBER), ("filters", _NUMBER)),
        *(("low", ctypes.c_float), ("high", ctypes.c_float), ("activation", _NUMBER)),
    ]


class NativeGate(ctypes.Structure):
    """Squeeze and excitation."""

    _fields_ = [
        *(("reduce", NativeGateLayer), ("expand", NativeGateLayer), ("channels", _NUMBER)),
    ]


class NativeNorm(ctypes.Structure):
    """A batch norm and a clamp."""

    _fields_ = [
        *((name, _POINTER) for name in ("mean", "variance", "weight", "bias")),
        ("channels", _NUMBER),
        *((name, ctypes.c_float) for name in ("eps", "low", "high")),
    ]


class NativeConcatPart(ctypes.Structure):
    """One of the tensors that are concatenated."""

    _fields_ = [("data", _POINTER), ("count", _COUNT), ("channels", _COUNT)]


class NativeInt8Scales(ctypes.Structure):
    """``Int8Scales`` of ``native/int8_plan.h``: the scales of an int8 layer's tensors."""

    _fields_ = [
        *((name, _NUMBER) for name in ("input_zero", "has_residual", "residual_zero")),
        ("residual_scale", ctypes.c_float),
        *((name, _NUMBER) for name in ("is_quantised", "output_zero")),
        *((name, ctypes.c_float) for name in ("output_inverse", "low", "high")),
    ]


class NativeInt8Rounding(ctypes.Structure):
    """Pools and norms of planes of floats, which are then rounded to uint8."""

    _fields_ = [
        *(("ops", ctypes.POINTER(NativeEpilogueOp)), ("count", _NUMBER)),
        *(("inverse", ctypes.c_float), ("zero", _NUMBER)),
    ]


class NativePlace(ctypes.Structure):
    """Where a tensor of a listed call lies: the offset is in bytes, the count in numbers."""

    _fields_ = [(name, _COUNT) for name in ("memory", "offset", "count")]


class NativeCall(ctypes.Structure):
    """``ListedCall`` of ``native/call_list.h``."""

    _fields_ = [
        *(("kind", _NUMBER), ("threads", _NUMBER), ("what", _POINTER), ("with_", _POINTER)),
        *((name, _COUNT) for name in ("batch", "height", "width")),
        *((name, NativePlace) for name in ("input", "residual", "output")),
        *(("parts", ctypes.POINTER(NativePlace)), ("num_parts", _COUNT)),
    ]


_STRUCTURES = (
    *(NativeGeometry, NativeEpilogueOp, NativeConfig, NativeLinear),
    *(NativeGateLayer, NativeGate, NativeNorm, NativeConcatPart, NativeInt8Scales),
    *(NativeInt8Rounding, NativeCall),
)

# Arguments of the functions that return a status.
_ARGUMENTS = {
    "spp_set_isa": (ctypes.c_char_p,),
    "spp_set_pairs": (ctypes.c_char_p,),
    "spp_plan_create": (
        *(_POINTER, _POINTER, _NUMBER, *_TENSOR, *_TENSOR, ctypes.c_float, ctypes.c_float),
        *(_NUMBER, _POINTER, _NUMBER, _NUMBER, _POINTER),
    ),
    "spp_forward": (_POINTER, _POINTER, *_TENSOR, *_TENSOR, *_TENSOR),
    "spp_backward": (_POINTER, _POINTER, *3 * _TENSOR, _NUMBER, *3 * _TENSOR),
    "spp_chain_create": (_POINTER, _POINTER, _NUMBER, _POINTER),
    "spp_chain_forward": (_POINTER, *_TENSOR, *_TENSOR, _POINTER, *_TENSOR),
    "spp_gate": (_POINTER, *_TENSOR, _COUNT, _COUNT, _NUMBER, *_TENSOR),
    "spp_norm": (_POINTER, _POINTER, _NUMBER, _POINTER, _COUNT, _COUNT, _NUMBER, *_TENSOR),
    "spp_plane_means": (*_TENSOR, _COUNT, _COUNT, _NUMBER, *_TENSOR),
    "spp_pool": (_POINTER, _COUNT, *3 * (_NUMBER,), *2 * _TENSOR),
    "spp_run_calls": (_POINTER, _NUMBER, _POINTER, _NUMBER),
    "spp_linear": (_POINTER, *_TENSOR, _COUNT, _NUMBER, *_TENSOR),
    "spp_int8_set_isa": (ctypes.c_char_p,),
    "spp_int8_create": (_POINTER, _POINTER, _NUMBER, *3 * _TENSOR, _POINTER, _POINTER),
    "spp_int8_forward": (_POINTER, _POINTER, *3 * _TENSOR),
    "spp_int8_max_pool": (_POINTER, _COUNT, *3 * (_NUMBER,), *2 * _TENSOR),
    "spp_int8_post": (
        *(_POINTER, _NUMBER, _COUNT, _NUMBER, _NUMBER, ctypes.c_float, _NUMBER, _NUMBER),
        *2 * _TENSOR,
    ),
    "spp_int8_quantize": (ctypes.c_float, _NUMBER, _NUMBER, *2 * _TENSOR),
}
# By status, from 1 on; 0 is success.
_ERRORS = (MemoryError, ValueError, NotImplementedError, RuntimeError)


@cache
def library() -> Any:
    """The kernels' functions, or None where they weren't built; a warning says so once.

    Its functions raise ``MemoryError`` where memory runs out, ``ValueError`` for arguments that
    don't fit, and ``NotImplementedError`` for what the processor doesn't have.
    """
    functions = native.library()
    if functions is not None:
        _declare(functions)
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


def _declare(functions: Any) -> None:
    """Declare the functions' types, and compare the structures with the library's.

    Raises:
        RuntimeError: If the library was built of other sources.
    """
    for name in ("spp_error", "spp_isa", "spp_int8_isa", "spp_int8_plan_isa"):
        getattr(functions, name).restype = ctypes.c_char_p
    functions.spp_int8_plan_isa.argtypes = (_POINTER,)
    functions.spp_tiles_pay.argtypes = (_NUMBER, _NUMBER, ctypes.c_double)
    functions.spp_struct_size.restype = _COUNT
    ours = [ctypes.sizeof(structure) for structure in _STRUCTURES]
    theirs = [functions.spp_struct_size(index) for index in range(len(ours) + 1)]
    if theirs != [*ours, -1]:
        raise RuntimeError(
            f"The CPU kernels were built of other sources than this Python code: their structures"
            f" have {theirs} bytes, not {[*ours, -1]}. Build them once more by `pip install -e .`."
        )

    def check(status: int) -> None:
        if status:
            raise _ERRORS[status - 1](functions.spp_error().decode())

    for name, arguments in _ARGUMENTS.items():
        function = getattr(functions, name)
        function.argtypes = arguments
        function.restype = check
    for name in ("spp_plan_free", "spp_chain_free", "spp_int8_free"):
        function = getattr(functions, name)
        function.argtypes = (_POINTER,)
        function.restype = None
