"""Ordering and choosing in C++ against the same in torch, bit for bit."""

import math
import warnings

import pytest
import torch
from conftest import look_for_library
from torch import nn

from spp_lightning import SPPPruner, native
from spp_lightning.method import ordering
from spp_lightning.method.rule import update_probability

needs_library = pytest.mark.skipif(native.library() is None, reason="built without the library")

FLOATS = [torch.float32, torch.float64]
INF, NAN = math.inf, math.nan


def random(*size, seed=0):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_torch(function, *arguments):
    """What a function of ``moves`` computes where there is no library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "_library", lambda: None)
        return function(*arguments)


def same_bits(x, y):
    return x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.fixture
def calls(monkeypatch):
    """Names of the library's functions as they are called."""
    library, seen = ordering._library(), []

    class Noted:
        def __getattr__(self, name):
            seen.append(name)
            return getattr(library, name)

    monkeypatch.setattr(ordering, "_library", Noted)
    return seen


# --- order ---


def special(dtype):
    least = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, INF, -INF, NAN, -NAN, 1.0, -1.0, least, -least, least / 8, least / 4]
    values += [math.nextafter(1, 0), torch.finfo(dtype).max, 1 + torch.finfo(dtype).eps]
    return torch.tensor(3 * values + values[::-1], dtype=dtype)


IMPORTANCE = {
    "none": lambda dtype: torch.zeros(0, dtype=dtype),
    "one": lambda dtype: torch.ones(1, dtype=dtype),
    "zeros": lambda dtype: torch.tensor([0.0, -0.0, 0.0, -0.0, -0.0], dtype=dtype),
    "special": special,
    "subnormal": lambda dtype: (random(101) * 50).to(dtype).floor() * torch.finfo(dtype).tiny / 64,
    "equal": lambda dtype: torch.full((1001,), 0.3, dtype=dtype),
    "ties": lambda dtype: (random(5000) * 40).floor().to(dtype),
    "any_bits": lambda dtype: torch.randint(
        -(2**62), 2**62, (4097,), generator=torch.Generator().manual_seed(1)
    ).view(dtype),
    "all_sizes": lambda dtype: (random(9999) * 200 - 100).exp().to(dtype),
    "layer": lambda dtype: random(4, 100_000).to(dtype).sum(0),
    "ascending": lambda dtype: torch.arange(3000, dtype=dtype),
    "descending": lambda dtype: -torch.arange(3000, dtype=dtype),
}


@needs_library
@pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float64"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", IMPORTANCE)
def test_order_equals_a_stable_argsort(kind, share, dtype, calls):
    importance = IMPORTANCE[kind](dtype)
    p = random(len(importance), seed=2)
    p = p.masked_fill(random(len(importance), seed=3) < share, 1.0)
    alive, pruned = (p < 1).nonzero().flatten(), (p >= 1).nonzero().flatten()
    expected = torch.cat([alive[importance[alive].sort(stable=True).indices], pruned])
    order = ordering.ascending_order(importance, p)
    assert calls == ["spp_ascending_order"]
    assert order.dtype == torch.int64 and torch.equal(order, expected)


@needs_library
def test_order_of_what_does_not_lie_in_a_row(calls):
    importance, p = random(3, 50).T[:, 1], random(100, seed=1)[::2]
    order = ordering.ascending_order(importance, p)
    assert len(calls) == 1 and torch.equal(order, importance.argsort(stable=True))


# --- choice ---


@needs_library
@pytest.mark.parametrize("needed", [1, 40, 333, 10_000])
@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0, INF])
def test_move_equals_torch(needed, scale, calls):
    p = random(1001)
    p[::7] = 1.0
    p[3::7] = 0.0
    order = random(1001, seed=1).masked_fill(p >= 1, 2.0).argsort()[: int((p < 1).sum())]
    change = (random(len(order), seed=2) - 0.4) * scale
    change[5] = NAN
    before = p.clone()
    new = ordering.move(p, order, change, needed)
    assert calls == ["spp_move"] and same_bits(p, before)
    assert same_bits(new, in_torch(ordering.move, p, order, change, needed))


@needs_library
def test_only_plain_float64_goes_to_the_library(calls):
    p, importance = random(9), random(9, seed=1)
    change, order = torch.full_like(p, 0.2), torch.arange(9)
    for other in (p.float(), nn.Parameter(p), p.clone().requires_grad_(), p.to("meta")):
        values = importance.to(other.device)
        ordering.ascending_order(values, other)
        ordering.move(other, order.to(other.device), change.to(other), 3)
    ordering.ascending_order(importance.half(), p)
    ordering.move(p, order, change.float(), 3)
    assert calls == []


# --- both ---


@needs_library
@pytest.mark.parametrize("use_rank", [True, False], ids=["rank", "norm"])
@pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float64"])
def test_updates_equal_torch_to_the_end(dtype, use_rank, calls):
    def updates(p):
        while (num_pruned := int((p >= 1).sum())) < 45:
            noise = random(60, seed=len(all_p)).mul(8).floor()
            importance = (noise + torch.arange(60) / 8).to(dtype)
            p = update_probability(p, importance, 0.75, num_pruned, 0.2, 0.25, use_rank)
            all_p.append(p)
        return torch.stack(all_p)

    all_p = []
    in_cpp = updates(torch.zeros(60, dtype=torch.float64))
    assert len(calls) == 2 * len(in_cpp) > 20
    all_p = []
    assert same_bits(in_cpp, in_torch(updates, torch.zeros(60, dtype=torch.float64)))


def prune(steps=300):
    net = nn.Sequential(nn.Conv2d(3, 6, 5), nn.Conv2d(6, 4, 3, groups=2))
    for i, parameter in enumerate(net.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=i) - 0.5)
    weight = net[0].weight
    pruner = SPPPruner(net, interval=1, A=0.1)
    told = []
    for step in range(steps):
        weight.data.add_(random(*weight.shape, seed=step) - 0.5)  # ranks move
        pruner.step(step)
        told.append((pruner.num_pruned, pruner.num_recovered))
        if pruner.finished:
            break
    return pruner, told


@needs_library
def test_pruning_without_the_library_is_the_same_and_does_not_warn(request):
    def state(pruner):
        return {name: p.clone() for name, p in pruner.probability.items()}

    pruner, told = prune()
    request.getfixturevalue("without_library")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other, other_told = prune()
        assert ordering._library() is None
    assert pruner.finished and any(sum(recovered.values()) for _, recovered in told)
    assert told == other_told
    expected = state(other)
    assert all(same_bits(p, expected[name]) for name, p in state(pruner).items())


@needs_library
def test_the_library_is_found_again(without_library, monkeypatch):
    assert native.library() is None and ordering._library() is None
    monkeypatch.undo()
    look_for_library()
    assert ordering._library() is not None


@needs_library
def test_a_file_of_another_machine_is_no_library(without_library, tmp_path):
    (tmp_path / "kernels.so").write_bytes(b"not of this machine")
    look_for_library()
    assert native.library() is None
