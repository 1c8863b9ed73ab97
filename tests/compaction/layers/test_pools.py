"""Pools behind no convolution: against torch, and where torch computes them."""

import math
from types import SimpleNamespace

import pytest
import torch
from cases import SENTINEL, guarded, intact
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from spp_lightning import compact
from spp_lightning.compaction import load_compact, save_compact
from spp_lightning.compaction.epilogue import PlaneOp
from spp_lightning.compaction.kernels.cpu import pools
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.layers.pools import pool_planes
from spp_lightning.compaction.layers.stretch import Stretch

pytestmark = pytest.mark.skipif(not is_available(), reason="built without the kernels")

PAIRS = st.tuples(st.integers(1, 5), st.integers(1, 5))
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 40))


def inside(monkeypatch):
    """Let results lie in guarded memory full of NaN; returns the list of them."""
    made = []

    def empty(*sizes):
        made.append(guarded(torch.full(sizes, math.nan), SENTINEL))
        return made[-1]

    monkeypatch.setattr(
        pools, "torch", SimpleNamespace(empty=empty, get_num_threads=torch.get_num_threads)
    )
    return made


@settings(deadline=None, max_examples=400, derandomize=True)
@given(
    st.sampled_from(["max_pool", "avg_pool"]),
    *(PAIRS, PAIRS, st.booleans(), st.booleans(), st.booleans(), SIZES),
)
def check_pool(kind, kernel, stride, pads, ceil_mode, counts_padding, size):
    padding = tuple(k // 2 for k in kernel) if pads else (0, 0)
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    op = PlaneOp(kind, kernel, stride, padding, ceil_mode, counts_padding)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(sum(size)))
    x[0, 0, 0, 0], x[1, 2, -1, -1] = math.nan, -math.inf
    expected = op(x)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found = pool_planes(guarded(x, math.nan), op, nn.Identity())
        exact = {"rtol": 0, "atol": 0} if kind == "max_pool" else {}
        torch.testing.assert_close(found, expected, equal_nan=True, **exact)
    torch.set_num_threads(before)


def test_pools(monkeypatch, isa):
    made = inside(monkeypatch)
    check_pool()
    assert made and all(intact(y) for y in made)


def test_what_the_kernels_refuse():
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="`x` is too small"):
        pools.pool(x, PlaneOp("max_pool", (5, 5), (1, 1)))
    with pytest.raises(ValueError, match="padding at most half a window"):
        pools.pool(x, PlaneOp("max_pool", (2, 2), (1, 1), (2, 2)))
    with pytest.raises(ValueError, match="must be a pool"):
        pools.pool(x, PlaneOp("local_response_norm", (3, 3)))


class Pools(nn.Module):
    """Pools as modules and as functions, none of them behind a convolution alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.most = nn.MaxPool2d(3, 1, 1, ceil_mode=True)
        self.mean = nn.AvgPool2d(2, count_include_pad=False)
        self.places = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x):
        x = self.conv(x)
        x = torch.cat([x, self.most(x)], 1)
        return self.mean(x), F.max_pool2d(x, 3, stride=2), F.avg_pool2d(x, 3, 1), self.places(x)


@torch.no_grad()
def test_networks_pool_by_the_kernels(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net, x = Pools().eval(), torch.randn(2, 3, 12, 11)
    fast = compact(net, x)
    save_compact(fast, tmp_path / "pools.pt")
    pooled = []
    monkeypatch.setattr(
        pools, "pool", lambda x, op, run=pools.pool: pooled.append(op) or run(x, op)
    )
    expected = net(x)
    for each in (fast, load_compact(tmp_path / "pools.pt")):
        torch.testing.assert_close(each(x), expected, rtol=1e-5, atol=1e-6)
        pooled.clear()
        with monkeypatch.context() as one_by_one:
            one_by_one.setattr(Stretch, "run", lambda *_: None)
            found = each(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert [op.kind for op in pooled] == ["max_pool", "avg_pool", "max_pool", "avg_pool"]
        assert pooled[0] == PlaneOp("max_pool", (3, 3), (1, 1), (1, 1), ceil_mode=True)
        assert pooled[1][1:6] == ((2, 2), (2, 2), (0, 0), False, False)


def test_torch_pools_what_the_kernels_cannot(monkeypatch):
    monkeypatch.setattr(pools, "pool", lambda *_: pytest.fail("by the kernels"))
    op, module = PlaneOp("max_pool", (2, 2), (2, 2)), nn.MaxPool2d(2)
    x = torch.randn(1, 3, 6, 6)
    strided = x.contiguous(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    for each in (strided, x.double(), x[:0], x[0], leaf):
        assert torch.equal(pool_planes(each, op, module), module(each))
    pool_planes(leaf, op, module).sum().backward()
    assert leaf.grad is not None and leaf.grad.sum() == 27
    hooked = nn.MaxPool2d(2)
    hooked.register_forward_hook(lambda *_: torch.zeros(1))
    assert pool_planes(x, op, hooked).shape == (1,)
