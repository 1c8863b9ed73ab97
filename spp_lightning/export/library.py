"""The library of operators that onnxruntime loads."""

from __future__ import annotations

from pathlib import Path

from spp_lightning import native

__all__ = ["onnx_library"]


def onnx_library() -> Path:
    """The library with the operators of ``export_onnx``: one file, which needs no Python.

    Returns:
        Its path, for onnxruntime's ``SessionOptions.register_custom_ops_library``.

    Raises:
        FileNotFoundError: If it wasn't built, since there was no C++ compiler.
    """
    path = native.library_path()
    if not path.exists():
        raise FileNotFoundError(f"The kernels were not built: there is no {path}.")
    return path
