"""Gates, norms and global pools: one call computes what several modules do."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torchvision
from cases import SENTINEL, guarded, intact
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import pruned
from torch import fx, nn
from torch.nn import functional as F

from spp_lightning import compact
from spp_lightning.compaction import (
    ColumnConv2d,
    compact_report,
    load_compact,
    save_compact,
    to_dense,
)
from spp_lightning.compaction.epilogue import ACTIVATIONS, Clamp, Epilogue
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.stretches import run_stretch
from spp_lightning.compaction.kernels.cpu import between
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.layers.between import channel_gate, channel_means, concat_norm

pytestmark = pytest.mark.skipif(not is_available(), reason="built without the kernels")

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))  # batch, height, width


def inside(monkeypatch):
    """Let results lie in guarded memory full of NaN; returns the list of them."""
    made = []

    def empty(*sizes, dtype=torch.float32):
        made.append(guarded(torch.full(sizes, math.nan, dtype=dtype), SENTINEL))
        return made[-1]

    shim = SimpleNamespace(
        **{name: getattr(torch, name) for name in ("float32", "get_num_threads")}
    )
    shim.empty, shim.empty_like = empty, lambda x: empty(*x.shape)
    monkeypatch.setattr(between, "torch", shim)
    return made


def layer(channels, filters, activation, share, generator):
    conv = nn.Conv2d(channels, filters, 1)
    with torch.no_grad():
        conv.weight.mul_((torch.rand(channels, generator=generator) < share)[None, :, None, None])
    limits = Clamp(0.0) if activation == "none" else Clamp()
    return ColumnConv2d.of(conv, Epilogue(limits, activation=activation)).requires_grad_(False)


def in_several_calls(x):
    pytest.fail("in several calls")


def with_threads(call):
    """What a call returns with one, two and three threads: the same bits."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(call())
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    return found[0]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    SHAPES,
    st.sampled_from([1, 3, 16, 17, 70]),
    st.integers(1, 20),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def check_gate(shape, channels, squeezed, activation, share):
    batch, height, width = shape
    generator = torch.Generator().manual_seed(batch * height * width)
    reduce = layer(channels, squeezed, "none", share, generator)
    expand = layer(squeezed, channels, activation, share, generator)
    x = guarded(torch.randn(batch, channels, height, width, generator=generator), math.nan)
    exact, (first, second) = x.double(), (copy.deepcopy(y).double() for y in (reduce, expand))
    expected = exact * second(first(exact.mean((2, 3), keepdim=True)))
    found = with_threads(lambda: channel_gate(x, in_several_calls, reduce, expand))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    alone = channel_gate(x[-1:].clone(), in_several_calls, reduce, expand)
    assert torch.equal(alone, found[-1:])


def test_gates(monkeypatch, isa):
    made = inside(monkeypatch)
    check_gate()
    assert made and all(intact(y) for y in made)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    SHAPES,
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([Clamp(0.0), Clamp(0.0, 6.0)]),
)
def check_norm(shape, channels, affine, clamp):
    batch, height, width = shape
    generator = torch.Generator().manual_seed(batch * height * width)
    norm = nn.BatchNorm2d(sum(channels), affine=affine).eval().requires_grad_(False)
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(0.1, 3, generator=generator)
    if affine:
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    parts = [
        guarded(torch.randn(batch, n, height, width, generator=generator), math.nan)
        for n in channels
    ]
    exact = copy.deepcopy(norm).double()(torch.cat([x.double() for x in parts], 1))
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = concat_norm(parts, norm, lambda x: pytest.fail("in several calls"), clamp)
        torch.testing.assert_close(found.double(), exact.clamp(*clamp), rtol=1e-5, atol=1e-5)
    torch.set_num_threads(before)


def test_norms(monkeypatch, isa):
    made = inside(monkeypatch)
    check_norm()
    assert made and all(intact(y) for y in made)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 15), st.integers(1, 15), st.booleans())
def check_means(batch, channels, height, width, keep):
    generator = torch.Generator().manual_seed(height * width)
    x = guarded(torch.randn(batch, channels, height, width, generator=generator), math.nan)
    found = with_threads(lambda: channel_means(x, in_several_calls, keep))
    expected = x.double().mean((2, 3), keepdim=keep)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(channel_means(x[-1:].clone(), in_several_calls, keep), found[-1:])


def test_means(monkeypatch, isa):
    made = inside(monkeypatch)
    check_means()
    assert made and all(intact(y) for y in made)


class Gated(nn.Module):
    """A gate behind a convolution, and dense blocks: norm and ReLU before each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.gate = nn.Hardsigmoid()
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (24, 36))
        self.relu = nn.ReLU()
        self.convs = nn.ModuleList(nn.Conv2d(n, 12, 3, padding=1) for n in (24, 36))

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = self.gate(self.expand(F.relu(self.reduce(self.pool(x))))) * x
        parts = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            parts.append(conv(self.relu(norm(whole))))
        return torch.cat(parts, 1).mean((2, 3))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = pruned(Gated(), 0.5)
    for norm in net.norms:
        norm.running_mean.normal_()
        norm.weight.data.normal_()
    return net.requires_grad_(False)


def calls(fast):
    """The calls of a network's modules, which a stretch joins."""
    return [
        call.run.__name__
        for outer in fast._program.instructions
        for call in (outer.target.instructions if outer.run is run_stretch else (outer,))
    ]


def test_a_network_takes_one_call_for_each(net, tmp_path):
    x = torch.randn(2, 3, 16, 16)
    fast = compact(net, x)
    assert calls(fast).count("run_gate") == 1 and calls(fast).count("run_norm") == 2
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    save_compact(fast, tmp_path / "net.spp")
    loaded = load_compact(tmp_path / "net.spp")
    assert calls(loaded) == calls(fast) and torch.equal(loaded(x), fast(x))
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))
    assert "reduce" in {row.name for row in compact_report(fast, x).layers}


def test_new_weights_are_seen(net):
    x = torch.randn(2, 3, 16, 16)
    fast = compact(net, x)
    norm, reduce, expand = (fast.get_submodule(y) for y in ("norms.0", "reduce", "expand"))
    fast(x)
    for change in (
        lambda: norm.running_mean.add_(1),
        lambda: norm.weight.data.mul_(-1),
        lambda: setattr(norm, "bias", nn.Parameter(torch.ones_like(norm.bias), False)),
        lambda: setattr(norm, "eps", 1.0),
        lambda: reduce.bias.data.add_(3),
        lambda: setattr(expand.bias, "data", torch.full_like(expand.bias, 0.5)),
    ):
        before = fast(x)
        change()
        found = fast(x)
        assert not torch.equal(found, before)
        assert torch.equal(found, copy.deepcopy(fast)(x))  # which remembers nothing


def test_hooks_see_the_modules(net):
    x = torch.randn(2, 3, 16, 16)
    fast, seen = compact(net, x), []
    expected = fast(x)
    for name in ("pool", "expand", "norms.1", "relu"):
        hook = fast.get_submodule(name).register_forward_hook(
            lambda *_, name=name: seen.append(name)
        )
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        hook.remove()
    assert seen == ["pool", "expand", "norms.1", "relu", "relu"]


def test_gradients_types_and_compilers(net):
    x = torch.randn(2, 3, 16, 16)
    fast = compact(net.requires_grad_(True), x)
    dense = to_dense(fast)
    fast(x).square().sum().backward()
    dense(x).square().sum().backward()
    for name in ("norms.1.weight", "reduce.bias", "expand.bias"):
        ours, theirs = fast.get_parameter(name), dense.get_parameter(name)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        expected = net(x)
        compiled = torch.compile(fast, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
        exported = torch.export.export(fast, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
        found = fast.double()(x.double())
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


class Squeezed(nn.Module):
    """A gate as timm writes it, and a classifier behind a mean."""

    def __init__(self, also_returns_means=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.fc1, self.fc2 = nn.Conv2d(64, 512, 1), nn.Conv2d(512, 64, 1)
        self.act, self.gate = nn.SiLU(), nn.Sigmoid()
        self.head = nn.Linear(64, 10)
        self.also_returns_means = also_returns_means

    def forward(self, x):
        x = F.relu(self.stem(x))
        means = x.mean((2, 3), keepdim=True)
        x = x * self.gate(self.fc2(self.act(self.fc1(means))))
        y = self.head(x.mean((2, 3)))
        return (y, means) if self.also_returns_means else y


@pytest.mark.parametrize("ratio", [0, 0.75])
def test_gates_of_unpruned_layers(ratio, tmp_path):
    torch.manual_seed(0)
    net, x = pruned(Squeezed(), ratio).requires_grad_(False), torch.randn(2, 3, 16, 16)
    fast = compact(net, x)
    assert calls(fast)[1:] == ["run_gate", "run_means", "run_head"]
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    save_compact(fast, tmp_path / "net.spp")
    loaded = load_compact(tmp_path / "net.spp")
    assert calls(loaded) == calls(fast) and torch.equal(loaded(x), fast(x))
    report = compact_report(loaded, x)
    assert report.chains == (("fc1", "fc2"),)
    assert [row.name for row in report.layers if row.kernel == "gate"] == ["fc1", "fc2"]


def test_a_pool_that_others_read_is_no_part_of_a_gate():
    net, x = pruned(Squeezed(also_returns_means=True)), torch.randn(2, 3, 16, 16)
    fast = compact(net.requires_grad_(False), x)
    assert "run_gate" not in calls(fast) and calls(fast).count("run_means") == 2
    for ours, theirs in zip(fast(x), net(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_mobilenet_has_nine_gates_and_a_pool():
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v3_small(num_classes=10).eval().requires_grad_(False)
    x = torch.randn(1, 3, 224, 224)
    fast = compact(net, x)
    made = calls(fast)
    assert made.count("run_gate") == 9 and made.count("run_means") == 1 and len(made) <= 35
    pools = [name for name, layer in fast.named_modules() if type(layer) is nn.AdaptiveAvgPool2d]
    assert len(pools) == 10  # the modules are there, for hooks and gradients
    torch.testing.assert_close(fast(x), net(x), rtol=1e-3, atol=1e-4)


def test_pools_of_other_shapes_and_types():
    class Pools(nn.Module):
        def forward(self, x):
            return x.mean((-2, -1)), F.adaptive_avg_pool2d(x, (1, 1)), torch.mean(x, (2, 3), True)

    x = torch.randn(2, 4, 5, 6)
    fast = CompactNetwork.of(fx.symbolic_trace(Pools()))
    assert calls(fast)[:3] == ["run_means"] * 3
    for y in (x, x.double(), x.bfloat16(), x.transpose(2, 3), x.requires_grad_(), x[:0]):
        for ours, theirs in zip(fast(y), Pools()(y), strict=True):
            torch.testing.assert_close(ours, theirs)
            assert ours.shape == theirs.shape and ours.requires_grad == theirs.requires_grad
    with pytest.raises(IndexError):
        fast(x[0])  # as torch


class LinearGate(nn.Module):
    """A gate as it is written most often: linear layers, and views before and behind them."""

    def __init__(self, way):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 8, 3)
        self.fc = nn.Sequential(
            *(nn.Linear(24, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 24), nn.Sigmoid())
        )
        self.way = way

    def forward(self, x):
        x = F.relu(self.stem(x))
        b, c, _, _ = x.size()
        if self.way == "views":
            y = self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
            x = x * y.expand_as(x)
        elif self.way == "means":
            x = self.fc(x.mean((2, 3))).unsqueeze(-1).unsqueeze(-1) * x
        else:  # the means of rows, which are no gate
            x = x * self.fc(x.mean(3).transpose(1, 2)).transpose(1, 2).unsqueeze(3)
        return self.last(x)


@pytest.mark.parametrize("way", ["views", "means", "rows"])
def test_gates_of_linear_layers(way, tmp_path):
    torch.manual_seed(0)
    net, x = pruned(LinearGate(way), 0.5).requires_grad_(False), torch.randn(2, 3, 16, 16)
    net.fc[0].weight[:, ::3] = 0
    fast = compact(net, x)
    assert calls(fast).count("run_gate") == (way != "rows")
    for images in (x, torch.randn(3, 3, 9, 20)):
        torch.testing.assert_close(fast(images), net(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(to_dense(fast)(images), net(images), rtol=1e-4, atol=1e-5)
    save_compact(fast, tmp_path / "net.spp")
    assert torch.equal(load_compact(tmp_path / "net.spp")(x), fast(x))
