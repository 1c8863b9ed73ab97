"""Int8 layers in a row: one call gives what they give one by one."""

import copy
import math

import pytest
import torch
from cases import SENTINEL, guarded, intact
from networks import pruned
from stretches import equal, one_by_one, ready
from torch import nn
from torch.nn import functional as F

from spp_lightning import compact, quantize_compact
from spp_lightning.compaction import load_compact, save_compact
from spp_lightning.compaction.graph.stretches import run_stretch
from spp_lightning.compaction.kernels.cpu import call_list
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.layers.quantized import Quantize, QuantizedConv2d, QuantizedLinear

pytestmark = pytest.mark.skipif(not is_available(), reason="built without the kernels")


class Mixed(nn.Module):
    """Pools of uint8 and of floats, a shortcut, a depthwise layer of floats, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 13, 3, padding=1), nn.Conv2d(13, 24, 3, padding=1)
        self.second, self.third = (nn.Conv2d(24, 24, 3, padding=1) for _ in range(2))
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.last, self.head = nn.Conv2d(24, 31, 1), nn.Linear(31, 10)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.stem(x)), 3, 2)
        x = F.avg_pool2d(torch.relu(self.first(x)), 2, ceil_mode=True)
        x = torch.relu(self.third(torch.relu(self.second(x))) + x)
        x = torch.relu(self.last(torch.relu(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """A tensor of uint8 leaves one stretch, and enters another one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 9, 1)
        self.last, self.end = nn.Conv2d(25, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        x = torch.relu(self.right(torch.relu(self.left(x := torch.relu(self.stem(x)))))), x
        return self.end(torch.relu(self.last(torch.cat(x, 1))))


class Classifier(nn.Module):
    """Linear layers of int8."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8 * 225, 130), nn.Linear(130, 600)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


@pytest.fixture(params=[Mixed, Shared, Classifier])
def fast(request):
    torch.manual_seed(0)
    net = pruned(request.param(), 0.5).eval().requires_grad_(False)
    batch = torch.randn(4, 3, 32, 32)
    return quantize_compact(compact(net, batch), [batch])


def native_calls(fast, x, monkeypatch):
    """How often modules of int8 are called from Python."""
    seen = []
    with monkeypatch.context() as patch:
        for kind in (Quantize, QuantizedConv2d, QuantizedLinear):
            forward = kind.forward
            patch.setattr(kind, "forward", lambda *a, run=forward: seen.append(a[0]) or run(*a))
        fast(x)
    return len(seen)


def test_one_call_gives_the_same_bits(fast, monkeypatch, tmp_path):
    assert run_stretch in {call.run for call in fast._program.instructions}
    save_compact(fast, tmp_path / "net.spp")
    loaded, before = load_compact(tmp_path / "net.spp"), torch.get_num_threads()
    memory = []

    def empty(*sizes, dtype):
        unset, fill = (255, 171) if dtype is torch.uint8 else (math.nan, SENTINEL)
        memory.append((guarded(torch.full(sizes, unset, dtype=dtype), fill), fill))
        return memory[-1][0]

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for shape in ((1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 27, 38)):
            if hasattr(fast, "hidden") and shape[2] != 32:
                continue  # a linear layer takes images of one size
            x = torch.randn(shape)
            expected = one_by_one(fast, x)
            assert native_calls(ready(fast, x), x, monkeypatch) == 0
            with monkeypatch.context() as patch:
                patch.setattr(call_list.torch, "empty", empty)
                assert equal(fast(x), expected)
            assert equal(ready(loaded, x)(x), expected)
    torch.set_num_threads(before)
    assert memory and all(intact(*each) for each in memory)


def test_what_changes_is_seen(fast):
    x = torch.randn(2, 3, 32, 32)
    layer = next(y for y in fast.modules() if isinstance(y, QuantizedConv2d))
    rounding = next(y for y in fast.modules() if isinstance(y, Quantize))
    for change in (
        lambda: layer.weight.neg_(),
        lambda: layer.weight_scale.mul_(2),
        lambda: setattr(layer, "bias", torch.ones_like(layer.bias)),
        lambda: rounding.scale.mul_(3),
        lambda: setattr(rounding, "zero_point", torch.tensor(9, dtype=torch.uint8)),
        lambda: setattr(layer, "forward", lambda x: QuantizedConv2d.forward(layer, x.flip(2))),
    ):
        before = ready(fast, x)(x)
        change()
        found = fast(x)
        assert not equal(found, before) and equal(found, one_by_one(fast, x))
        for _ in range(3):
            assert equal(fast(x), found)


def test_hooks_and_errors_are_those_of_the_layers(fast):
    x, seen = torch.randn(2, 3, 32, 32), []
    expected = ready(fast, x)(x)
    layer = next(y for y in fast.modules() if isinstance(y, QuantizedConv2d))
    hook = layer.register_forward_hook(lambda *_: seen.append(1))
    assert equal(fast(x), expected) and seen == [1]
    hook.remove()
    ready(fast, x)
    for wrong in (torch.randn(1, 4, 32, 32), torch.randn(1, 3, 32, 1)[..., :0]):
        with pytest.raises((ValueError, RuntimeError)) as known:
            one_by_one(fast, wrong)
        with pytest.raises(type(known.value)) as found:
            fast(wrong)
        assert str(found.value) == str(known.value)
    strided = torch.randn(2, 3, 32, 32).transpose(2, 3)
    assert equal(fast(strided), one_by_one(copy.deepcopy(fast), strided.contiguous()))
