"""Layers and what stands between them in a row: one call gives what they give one by one."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision
from cases import SENTINEL, guarded, intact
from networks import pruned
from stretches import equal, one_by_one, ready
from torch import nn
from torch.nn import functional as F

from spp_lightning import compact
from spp_lightning.compaction import ColumnConv2d, load_compact, save_compact
from spp_lightning.compaction.epilogue import Clamp
from spp_lightning.compaction.graph.stretches import run_stretch
from spp_lightning.compaction.kernels.cpu import call_list, cost
from spp_lightning.compaction.kernels.cpu.between import Norm
from spp_lightning.compaction.kernels.cpu.call_list import CallKind, CallListMaker
from spp_lightning.compaction.kernels.cpu.library import is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="built without the kernels")


class Residual(nn.Module):
    """A convolution reads what two others made, its result is read twice, once by a classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        y = torch.relu(self.first(x))
        z = torch.relu(self.second(y))
        z = torch.relu(self.third(z) + y)
        return self.head(self.pool(z).flatten(1)), z


class Classifier(nn.Module):
    """A gate, and a chain with a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 16, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(20, 8, 1), nn.Conv2d(8, 20, 1)
        self.head = nn.Linear(16 * 36, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x * torch.sigmoid(self.expand(torch.relu(self.reduce(self.pool(x)))))
        return self.head(self.last(x).flatten(1))


class Concatenated(nn.Module):
    """Concatenations: in each other, of what is read twice, normed, and added; and pools."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.second, self.third = nn.Conv2d(20, 7, 3, padding=1), nn.Conv2d(47, 20, 1)
        self.last, self.norm = nn.Conv2d(20, 20, 3, padding=1), nn.BatchNorm2d(47)
        self.norm.running_mean.normal_()

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = F.max_pool2d(torch.cat([x, self.first(x)], 1), 3, 2, 1)
        x = torch.cat([torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1), self.second(x)], 1)
        x = self.third(torch.relu(self.norm(x)))
        return torch.cat([x, x], 1) + torch.cat([self.last(x), x], 1)


NETWORKS = {
    # Without the classifier, for which torch's results depend on where the features lie.
    "mobilenet_v3_small": lambda: nn.Sequential(
        torchvision.models.mobilenet_v3_small().features, nn.AdaptiveAvgPool2d(1)
    ),
    "residual": Residual,
    "concatenated": Concatenated,
}


@pytest.fixture(scope="module", params=NETWORKS)
def made(request):
    torch.manual_seed(0)
    net = pruned(NETWORKS[request.param](), 0.5).requires_grad_(False)
    return compact(net, torch.randn(1, 3, 64, 64))


@pytest.fixture
def fast(made):
    return copy.deepcopy(made)


def close(first, second):
    pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    for a, b in pairs:
        torch.testing.assert_close(a.float(), b, rtol=1e-4, atol=1e-5)


def calls_of_layers(fast, x, monkeypatch):
    """How often compact layers are called from Python."""
    count = 0
    takes = ColumnConv2d._takes_directly

    def counted(layer, x):
        nonlocal count
        count += 1
        return takes(layer, x)

    with monkeypatch.context() as patch:
        patch.setattr(ColumnConv2d, "_takes_directly", counted)
        fast(x)
    return count


@pytest.mark.parametrize("most_at_once", [0, 2**20], ids=["many blocks", "one block"])
def test_one_call_gives_the_same_bits(fast, most_at_once, monkeypatch, tmp_path):
    monkeypatch.setattr(call_list, "_MOST_AT_ONCE", most_at_once)
    assert run_stretch in {call.run for call in fast._program.instructions}
    save_compact(fast, tmp_path / "net.spp")
    loaded, before = load_compact(tmp_path / "net.spp"), torch.get_num_threads()
    memory = []

    def empty(*sizes, dtype=torch.float32):
        memory.append(guarded(torch.full(sizes, math.nan, dtype=dtype), SENTINEL))
        return memory[-1]

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for shape in ((1, 3, 64, 64), (5, 3, 64, 64), (2, 3, 49, 70)):
            x = torch.randn(shape)
            expected = one_by_one(fast, x)
            assert calls_of_layers(ready(fast, x), x, monkeypatch) == 0
            with monkeypatch.context() as patch:
                patch.setattr(call_list.torch, "empty", empty)
                assert equal(fast(x), expected)
            assert equal(ready(loaded, x)(x), expected)
    torch.set_num_threads(before)
    assert memory and all(intact(y) for y in memory)


@pytest.mark.parametrize("at_once", [True, False])
def test_chains_with_a_linear_layer(at_once, monkeypatch):
    torch.manual_seed(0)
    net, x = pruned(Classifier(), 0.5).requires_grad_(False), torch.randn(2, 3, 8, 8)
    fast = compact(net, x)
    assert len(fast._program.instructions) == 1
    if not at_once:
        choose = cost.choose_chain
        monkeypatch.setattr(cost, "choose_chain", lambda *a: choose(*a)._replace(threads=0))
    assert equal(ready(fast, x)(x), one_by_one(fast, x))
    close(fast(x), net(x))
    assert calls_of_layers(fast, x, monkeypatch) == 0


def test_what_changes_is_seen(fast):
    x = torch.randn(2, 3, 64, 64)
    layers = [layer for layer in fast.modules() if isinstance(layer, ColumnConv2d)]
    name = next(n for n, layer in fast.named_modules() if layer is layers[1])
    parent, _, last = name.rpartition(".")
    other = copy.deepcopy(layers[1])
    other.weight.data.mul_(-1)
    for change in (
        lambda: layers[0].weight.mul_(1.5),
        lambda: setattr(layers[-1], "bias", nn.Parameter(torch.ones_like(layers[-1].bias), False)),
        lambda: setattr(layers[-1].bias, "data", torch.full_like(layers[-1].bias, 0.5)),
        lambda: setattr(fast.get_submodule(parent), last, other),
        lambda: setattr(layers[0], "forward", lambda x, *_: ColumnConv2d.forward(layers[0], x) + 1),
    ):
        before = ready(fast, x)(x)
        with torch.no_grad():
            change()
        found = fast(x)
        assert not equal(found, before)
        for _ in range(3):
            assert equal(fast(x), found)


def test_hooks_gradients_and_types(fast, monkeypatch):
    x = torch.randn(2, 3, 64, 64)
    expected, seen = ready(fast, x)(x), []
    layer = next(x for x in fast.modules() if isinstance(x, ColumnConv2d))
    hook = layer.register_forward_hook(lambda *_: seen.append(1))
    close(fast(x), expected)
    hook.remove()
    watched = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(2))
    try:
        close(fast(x), expected)
    finally:
        watched.remove()
    assert seen[:2] == [1, 2]
    assert calls_of_layers(ready(fast, x), x, monkeypatch) == 0
    layer.weight.requires_grad_(True)
    found = fast(x)
    (found[0] if isinstance(found, tuple) else found).sum().backward()
    assert layer.weight.grad.any()
    layer.weight.requires_grad_(False)
    close(copy.deepcopy(fast).double()(x.double()), expected)
    strided = x.transpose(2, 3)
    close(fast(strided), one_by_one(fast, strided.contiguous()))


def test_errors_are_those_of_the_layers(fast):
    x = torch.randn(1, 3, 64, 64)
    ready(fast, x)
    for wrong in (torch.randn(1, 4, 64, 64), x.long(), x[..., :0]):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            one_by_one(fast, wrong)
        with pytest.raises(type(expected.value)) as found:
            fast(wrong)
        assert str(found.value) == str(expected.value)


def test_several_threads_of_python(fast):
    inputs = [torch.randn(1, 3, 64, 64) for _ in range(4)]
    expected = [one_by_one(fast, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(equal, pool.map(fast, inputs), expected))


def test_tuned_layers_are_prepared_anew(fast):
    x = torch.randn(1, 3, 64, 64)
    expected = ready(fast, x)(x)
    target = next(c.target for c in fast._program.instructions if c.run is run_stretch)
    before = target.stretch.num_prepared
    layer = next(y for y in fast.modules() if isinstance(y, ColumnConv2d))
    assert layer.tune(torch.randn(1, *([layer.geometry.channels, 64, 64])))
    assert equal(fast(x), expected) and target.stretch.num_prepared == before + 1


def test_tensors_outside_of_their_memory_are_refused():
    maker = CallListMaker({"x": (2, 3, 4, 4)}, "out")
    maker.add(CallKind.MEANS, "x", "out", (2, 3), batch=6, size=(4, 4))
    calls = maker.made()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(calls([x]), x.mean((2, 3)))
    with pytest.raises(ValueError, match="must lie in their memories"):
        calls([x[:1]])
    with pytest.raises(ValueError, match="one of the memories"):
        calls([])


def test_a_flattening_whose_input_is_named():
    torch.manual_seed(0)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16 * 36, 10)

        def forward(self, x):
            return self.head(torch.flatten(input=torch.sigmoid(self.stem(x)) * 2, start_dim=1))

    net, x = pruned(Named(), 0.5).requires_grad_(False), torch.randn(2, 3, 8, 8)
    fast = compact(net, x)
    assert equal(ready(fast, x)(x), one_by_one(fast, x))
    close(fast(x), net(x))


class Context(nn.Module):
    """What follows from means is added to an image, whose shape is another one."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.pool, self.context = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = self.last(torch.relu(self.stem(x)))
        return self.last(torch.relu(x + torch.relu(self.context(self.pool(x)))))


def test_sums_of_other_shapes_stand_between_stretches():
    torch.manual_seed(0)
    net, x = pruned(Context(), 0.5).requires_grad_(False), torch.randn(2, 3, 16, 16)
    fast = compact(net, x)
    assert equal(ready(fast, x)(x), one_by_one(fast, x))
    close(fast(x), net(x))
    assert "run_sum" in {call.run.__name__ for call in fast._program.instructions}
    assert "run_stretch" in {call.run.__name__ for call in fast._program.instructions}


def test_concatenations_need_no_memory_of_their_parts(monkeypatch):
    maker = CallListMaker({"x": (1, 3, 4, 4)}, "out")
    maker.add(CallKind.ADD, "x", "a", (1, 3, 4, 4), residual="x")
    maker.add_of_parts(CallKind.CONCAT, ["a", "x", "a"], "b")
    maker.add_of_parts(CallKind.CONCAT, ["x", "b"], "out")
    x, calls, sizes, empty = torch.randn(1, 3, 4, 4), maker.made(), [], torch.empty
    monkeypatch.setattr(
        call_list.torch, "empty", lambda *size, dtype: sizes.append(size) or empty(*size)
    )
    assert torch.equal(calls([x]), torch.cat([x, x + x, x, x + x], 1))
    assert sizes == [(1, 12, 4, 4)]


def test_norms_compute_the_channels_that_are_read(monkeypatch):
    x, y = torch.randn(2, 2, 3, 5), torch.randn(2, 3, 3, 5)
    mean, variance = torch.randn(5), torch.rand(5) + 0.5
    norm = Norm((mean, variance, None, None), 1e-5, Clamp(0.0, 6.0))
    read = torch.tensor([True, False, False, True, True])
    maker = CallListMaker({"x": x.shape, "y": y.shape}, "out")
    address = read.data_ptr()
    maker.add_of_parts(CallKind.NORM, ["x", "y"], "out", what=norm.address, with_=address)
    monkeypatch.setattr(call_list.torch, "empty", lambda *size, dtype: torch.full(size, math.nan))
    found = maker.made()([x, y])
    expected = F.batch_norm(torch.cat([x, y], 1), mean, variance).clamp(0, 6)
    torch.testing.assert_close(found[:, read], expected[:, read])
    assert found[:, ~read].isnan().all()
