"""Why a layer of a quantised network stayed float32, kept at the layer."""

from __future__ import annotations

from torch import nn

__all__ = ["note_reason", "reason_of"]

_REASON = "_float_reason"  # a layer's attribute


def reason_of(module: nn.Module) -> str | None:
    """Why a layer stayed float32, if it was quantised in this process: files don't know."""
    reason: str | None = module.__dict__.get(_REASON)
    return reason


def note_reason(module: nn.Module, reason: str) -> None:
    """Keep why a layer stays float32, for :func:`reason_of`."""
    module.__dict__[_REASON] = reason
