"""Which blocks a kernel computes its tiles in: tried when it first meets a size."""

from __future__ import annotations

import functools
from typing import Any

from spp_lightning.compaction.kernels.gpu.language import interpreted, triton

__all__ = ["blocks", "size_class", "tuned"]

Blocks = tuple[dict[str, int], int]  # a kernel's block sizes by name, and its warps


def tuned(key: list[str], *choices: Blocks, exact: tuple[Blocks, ...] = ()) -> Any:
    """Tune a kernel, per ``key``, over choices of blocks; not in the interpreter.

    In exact float32 tensor cores have no part, and other choices, ``exact``, are tried.
    """
    if triton is None:
        return lambda kernel: kernel
    if interpreted():
        # Blocks so small that small tensors, too, take several of them.
        small = {"BLOCK_F": 16, "BLOCK_P": 64, "BLOCK_K": 16}
        return triton.autotune([triton.Config({name: small[name] for name in choices[0][0]})], key)
    configs = [triton.Config(sizes, num_warps=warps) for sizes, warps in (*choices, *exact)]

    def choose(configs: list[Any], arguments: Any, **options: Any) -> list[Any]:
        is_exact = exact and options["PRECISION"] == "ieee"
        return configs[len(choices) :] if is_exact else configs[: len(choices)]

    return triton.autotune(
        configs,
        key,
        prune_configs_by={"early_config_prune": choose},
        do_bench=functools.partial(triton.testing.do_bench, warmup=5, rep=20),
    )


def blocks(filters: int, pixels: int, kept: int, warps: int) -> Blocks:
    """The blocks of a matrix product of filters, pixels and kept columns."""
    return {"BLOCK_F": filters, "BLOCK_P": pixels, "BLOCK_K": kept}, warps


def size_class(n: int) -> int:
    """Sizes are tuned by powers of 2, or every new batch size would be tuned anew.

    >>> [size_class(n) for n in (0, 1, 2, 3, 4, 5, 8, 9)]
    [0, 0, 1, 2, 2, 3, 3, 4]
    """
    return (n - 1).bit_length() if n else 0
