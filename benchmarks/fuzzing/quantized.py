"""Random networks in int8: close to float32, the same by kernels and by torch, and from files."""

from __future__ import annotations

import pickle
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fuzzing.case import Failure, any_kernel
from fuzzing.graphs import GraphCase, draw, network, smaller
from spp_lightning.compaction.file.container import load_compact, save_compact
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.layers import int8_pool
from spp_lightning.compaction.layers import quantized as int8_layers
from spp_lightning.compaction.pipeline import compact
from spp_lightning.compaction.quantize.pipeline import quantize_compact
from spp_lightning.compaction.quantize.report import quantize_report

__all__ = ["check", "draw", "smaller"]

_MOST_ERROR = 1.0  # relative, of a layer: sums of a few random numbers may cancel out


def check(case: GraphCase) -> str:
    """Quantise a compact network, and compare it with the float one and with its copies.

    Returns:
        What came of it.

    Raises:
        Failure: If a layer's error is large, a copy computes something else, or quantising fails.
        ValueError: If there is no such network.
    """
    net = network(case)
    generator = torch.Generator().manual_seed(case.seed + 1)
    batches = [torch.randn(case.shape, generator=generator) for _ in range(2)]
    with any_kernel(case.seed):
        try:
            fast = compact(net, batches[0].clone())
        except Exception as error:
            raise ValueError(f"no such network: {error}") from error
        if not isinstance(fast, CompactNetwork) or fast.opaque_layers:
            return "no compact network"
        try:
            quantized = quantize_compact(fast, batches)
            report = quantize_report(fast, quantized, batches)
        except Exception as error:
            if "has no layer that can become int8" in str(error) or "finite" in str(error):
                return "nothing to quantise"
            raise Failure(f"quantising failed: {type(error).__name__}: {error}") from error
        worst = max(report.layers, key=lambda row: row.error)
        if worst.error > _MOST_ERROR:
            raise Failure(f"{worst.name} has an error of {worst.error:.2f}")
        _check_copies(quantized, batches)
    return "quantised"


def _check_copies(quantized: CompactNetwork, batches: list[Tensor]) -> None:
    expected = [_outputs(quantized, x) for x in batches]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.spp"
        try:
            save_compact(quantized, path)
            loaded = load_compact(path)
        except Exception as error:
            raise Failure(f"saving or loading failed: {type(error).__name__}: {error}") from error
    pickled = pickle.loads(pickle.dumps(quantized))
    for name, copied in (("loaded", loaded), ("pickled", pickled)):
        if repr(copied) != repr(quantized) or not _same(copied, batches, expected):
            raise Failure(f"the {name} network is another one")
    with ExitStack() as patches:
        for module in (int8_layers, int8_pool):  # not float pools, which torch rounds otherwise
            patches.enter_context(mock.patch.object(module, "is_unwatched", return_value=False))
        if not _same(quantized, batches, expected):
            raise Failure("torch computes something else than the kernels")


def _outputs(net: CompactNetwork, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(net(x.clone()))


def _same(net: CompactNetwork, batches: list[Tensor], expected: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(first, second)
        for x, outputs in zip(batches, expected, strict=True)
        for first, second in zip(_outputs(net, x), outputs, strict=True)
    )
