"""Triton, if it is installed, and its decorator; without it the kernels are left uncompiled.

The other modules take ``triton`` and ``tl`` from here, so that they can be imported anywhere.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # there are no wheels for this platform
    triton = tl = None

__all__ = ["interpreted", "is_available", "jit", "tl", "triton"]


def is_available() -> bool:
    """Whether Triton is there, with a GPU or (``TRITON_INTERPRET=1``) its interpreter."""
    return triton is not None and (interpreted() or torch.cuda.is_available())


@functools.cache
def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def jit(function: Any) -> Any:
    """A kernel, or a part of kernels, compiled by Triton when it is first called."""
    if triton is None:
        return function
    # These numbers only choose the blocks; nothing is gained from compiling for their values.
    return triton.jit(function, do_not_specialize=["kept_class", "pixel_class"])
