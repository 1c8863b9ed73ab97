"""How tests reach the CPU kernels: one place, so that no test knows how a handle is made inside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from cases import SENTINEL, Case, Tensors, guarded, intact
from torch import Tensor

from spp_lightning.compaction.epilogue import Epilogue
from spp_lightning.compaction.kernels.cpu.chain import ChainHandle
from spp_lightning.compaction.kernels.cpu.config import WINOGRAD, Kernel, KernelConfig
from spp_lightning.compaction.kernels.cpu.handle import Handle, Prepared
from spp_lightning.compaction.kernels.cpu.library import library
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.spec import ConvSpec

__all__ = [
    "EXACT",
    "WINOGRAD",
    "Kernel",
    "assert_writes",
    "chain_of",
    "gradients",
    "handle",
    "has_pairs",
    "output",
    "pairs_by",
    "prepared",
    "set_instruction_set",
]

EXACT = (Kernel.PIXELS, Kernel.CHANNELS)  # outputs of the same bits


def handle(case: Case, t: Tensors, epilogue: Epilogue | None = None) -> Handle:
    """The handle of a case, with its epilogue or another one."""
    spec = ConvSpec(case.geometry, case.epilogue if epilogue is None else epilogue)
    return Handle(t.weight, t.columns, t.bias, spec)


def prepared(made: Handle, x: Tensor, kernel: Kernel, threads: int) -> Prepared:
    """What a handle prepares for an input."""
    return made.prepare(x.shape, x.dtype, KernelConfig(kernel, threads))


def output(
    made: Handle, x: Tensor, residual: Tensor | None, kernel: Kernel, threads: int = 1
) -> Tensor:
    """What a kernel gives, from memory full of NaN and with guards around the output."""
    how = prepared(made, x, kernel, threads)
    out = guarded(torch.full(how.out_shape, torch.nan, dtype=x.dtype), SENTINEL)
    if out.numel():
        made.run(how, x, residual, out)
    assert intact(out), f"{kernel}, {threads} threads"
    return out


def gradients(
    made: Handle,
    t: Tensors,
    grad: Tensor,
    fused: bool,
    threads: int,
    wanted: Sequence[bool] = (True, True, True),
) -> list[Tensor]:
    """Gradients of input, weight and bias, in guarded memory full of NaN; all NaN if not wanted."""
    config = KernelConfig(Kernel.PIXELS, threads)
    how = made.prepare(t.x.shape, t.x.dtype, config, with_epilogue=fused)
    filters = made.spec.geometry.filters
    found = [
        guarded(torch.full(y.shape, torch.nan), SENTINEL)
        for y in (t.x, t.weight, torch.empty(filters))
    ]
    out = [y if wants else None for y, wants in zip(found, wanted, strict=True)]
    made.run_backward(how, grad, t.weight, t.x, fused, out)
    assert all(intact(y) for y in found)
    return found


def assert_writes(made: Handle, x: Tensor, kernel: Kernel, threads: int, expected: Tensor) -> None:
    """A kernel writes the same bits into a buffer on a cache line and into one beside it."""
    aligned = torch.full(expected.shape, math.nan)
    assert aligned.data_ptr() % 64 == 0
    for out in (aligned, guarded(aligned, SENTINEL)):
        made.run(prepared(made, x, kernel, threads), x, None, out)
        assert torch.equal(out, expected)
    assert intact(out)


def chain_of(layer: ColumnConv2d) -> ChainHandle | None:
    """The chain that begins with a layer, if one was made."""
    return layer._chain


def has_pairs() -> bool:
    """Whether this machine multiplies pairs of bfloat16."""
    return bool(library().spp_has_pairs())


@contextmanager
def pairs_by(name: str) -> Iterator[None]:
    """Have the handles that are made meanwhile multiply pairs of bfloat16 by an instruction set."""
    library().spp_set_pairs(name.encode())
    try:
        yield
    finally:
        library().spp_set_pairs(b"")


def set_instruction_set(name: str) -> bool:
    """Have the kernels use an instruction set; whether this machine has it."""
    try:
        library().spp_set_isa(name.encode())
    except NotImplementedError:
        return False
    return True
