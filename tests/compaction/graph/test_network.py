"""CompactNetwork: whatever one does with a network of torch works, and computes the same."""

import copy
import gc
import pickle
import warnings
import weakref
from collections import Counter

import pytest
import torch
import torchvision
from networks import pruned
from torch import nn
from torch.nn import functional as F

from spp_lightning import ConvNet, compact
from spp_lightning.compaction import ColumnConv2d
from spp_lightning.compaction.graph.lift import make_layers
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.program import compile_steps
from spp_lightning.compaction.graph.steps import Step, Value, text_of
from spp_lightning.compaction.graph.trace import trace


class Branches(nn.Module):
    """Two inputs, one with a default; containers, slices, methods, an own tensor, a dict."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("shift", torch.rand(1))

    def forward(self, x, factor=2.0):
        y = self.stem(x)
        z = torch.cat([self.left(y), self.right(y) * factor], dim=1)
        first, second = z.chunk(2, 1)
        z = self.drop(self.norm(torch.sigmoid(first) * second) * self.scale + self.shift)
        return {"maps": z[..., 1:], "parts": (z.mean((2, 3)), y.flatten(1).shape[0])}


NETWORKS = {
    "ConvNet": (ConvNet, (2, 3, 32, 32)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (1, 3, 64, 64)),
    "branches": (Branches, (2, 3, 8, 8)),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    """A network, a compact one, and an input."""
    make, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    net, x = pruned(make()), torch.randn(shape)
    return net, compact(net, x), x


def same(found, expected, exact=False):
    pairs = zip(
        torch.utils._pytree.tree_leaves(found),
        torch.utils._pytree.tree_leaves(expected),
        strict=True,
    )
    for ours, theirs in pairs:
        if exact:
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_what_people_do_with_networks(case):
    net, fast, x = case
    assert isinstance(fast, CompactNetwork)
    with torch.no_grad():
        expected = fast(x)
        same(expected, net(x))
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast.to("cpu")):
            same(again(x), expected, exact=True)
            assert repr(again) == repr(fast)
        other = copy.deepcopy(fast)
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict(fast.state_dict())
        same(other(x), expected, exact=True)
        same(copy.deepcopy(fast).double()(x.double()), net.double()(x.double()))
        net.float()
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.utils._pytree.tree_leaves(fast(x))[0]
        assert found.isfinite().all()
        same(nn.Sequential(fast)(x), expected, exact=True)


def test_compiled_and_exported(case):
    net, fast, x = case
    with torch.no_grad():
        same(torch.compile(fast, fullgraph=True, backend="eager")(x), net(x))
        torch._dynamo.reset()
        exported = torch.export.export(fast, (x,))
        same(exported.module()(x), net(x))
        if isinstance(net(x), torch.Tensor):
            same(torch.jit.trace(fast, x)(x), net(x))
    # The program calls the compact layers' operator; nothing was traced into dense convolutions.
    called = Counter(str(node.target).split(".")[0] for node in exported.graph.nodes)
    layers = sum(isinstance(module, ColumnConv2d) for module in fast.modules())
    assert layers and called["spp_lightning"] == layers


def test_training_goes_through_all_layers(case):
    _, fast, x = case
    assert not any(module.training for module in fast.modules())
    fast.train()
    assert all(module.training for module in fast.modules())
    leaves = [y for y in torch.utils._pytree.tree_leaves(fast(x)) if isinstance(y, torch.Tensor)]
    sum(y.square().sum() for y in leaves).backward()
    assert all(parameter.grad is not None for parameter in fast.parameters())


def test_hooks_see_layers_and_the_network():
    torch.manual_seed(0)
    fast, seen = compact(pruned(Branches()), torch.randn(2, 3, 8, 8)), []
    x = torch.randn(2, 3, 8, 8)
    handles = [
        fast.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
        for name in ("stem.0", "left", "right")
    ]
    handles.append(fast.register_forward_pre_hook(lambda *_: seen.append("begin")))
    fast(x)
    assert sorted(seen) == ["begin", "left", "right", "stem.0"] and seen[0] == "begin"
    for handle in handles:
        handle.remove()


def test_inputs_by_name_and_defaults():
    torch.manual_seed(0)
    net, x = pruned(Branches()), torch.randn(2, 3, 8, 8)
    fast = compact(net, x)
    for args, kwargs in (((x,), {}), ((x, 3.0), {}), ((x,), {"factor": 3.0}), ((), {"x": x})):
        same(fast(*args, **kwargs), net(*args, **kwargs))
    with pytest.raises(TypeError, match="The network's input 'x' is missing"):
        fast(factor=1.0)
    with pytest.raises(TypeError, match="takes 2 inputs, got 3"):
        fast(x, x, x)
    for kwargs in ({"x": x}, {"y": x}):
        with pytest.raises(TypeError, match="The network has no other input"):
            fast(x, **kwargs)


def test_layers_can_be_replaced_and_are_shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x)))

    torch.manual_seed(0)
    net, x = pruned(Twice()), torch.randn(1, 3, 8, 8)
    fast = compact(net, x)
    same(fast(x), net(x))
    fast.conv = nn.Identity()
    assert torch.equal(fast(x), F.relu(x))


def test_values_are_freed_when_nobody_reads_them_any_more():
    alive = []

    def note(x):
        y = x + 1
        alive.append(sum(place() is not None for place in places))
        places.append(weakref.ref(y))
        return y

    places = []
    steps = [Step("input", "x", "x")]
    steps += [Step("function", f"y{i}", note, (Value(i),)) for i in range(6)]
    steps += [Step("output", "output", "output", (Value(6),))]
    net = CompactNetwork(steps, {})
    gc.disable()
    try:
        net(torch.zeros(1))
    finally:
        gc.enable()
    assert max(alive) == 1  # what a step reads


def test_containers_are_new_in_every_call():
    steps = (
        Step("input", "x", "x"),
        Step("function", "y", torch.cat, ([Value(0), Value(0)],), {"dim": 0}),
        Step("output", "output", "output", ({"y": [Value(1), ()], "size": torch.Size([2])},)),
    )
    net = CompactNetwork(steps, {})
    first, second = net(torch.ones(1)), net(torch.ones(1))
    assert first == {"y": [first["y"][0], ()], "size": torch.Size([2])}
    assert first is not second and first["y"] is not second["y"]
    assert torch.equal(first["y"][0], torch.ones(2))
    assert text_of(steps).splitlines()[1] == "y = cat([x, x], dim=0)"


@pytest.mark.parametrize("name", ["forward", "training", "compact_steps", "a.train", "conv.weight"])
def test_names_hide_nothing(name):
    steps = [Step("input", "x", "x"), Step("layer", "y", name, (Value(0),))]
    steps.append(Step("output", "output", "output", (Value(1),)))
    with pytest.raises(ValueError, match=f"the name '{name}' isn't free"):
        CompactNetwork(steps, {"conv": nn.Conv2d(1, 1, 1), name: nn.ReLU()})


def test_a_child_with_the_name_of_an_attribute_is_no_obstacle():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.joined_layers = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.joined_layers(x)

    net, x = pruned(Net()), torch.randn(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="can't be traced .*'joined_layers' isn't free"):
        fast = compact(net, x)
    same(fast(x), net(x))


def test_a_compact_network_stays_as_it_is():
    x = torch.randn(1, 3, 32, 32)
    fast = compact(pruned(ConvNet()), x)
    with pytest.warns(UserWarning, match="it is compact already"):
        same(compact(fast, x)(x), fast(x), exact=True)


def test_a_compact_network_in_a_larger_one():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    inner = compact(pruned(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())), x)
    net = nn.Sequential(inner, nn.Conv2d(8, 4, 3)).eval()
    fast = compact(net, x)
    same(fast(x), net(x))
    assert isinstance(fast.get_submodule("0.0"), ColumnConv2d)


def test_methods_of_other_objects_are_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.conv(x).unbind(0).count(None), self.conv(x)

    x = torch.randn(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="it calls the method count of a tuple"):
        compact(pruned(Net()), x)
    steps = [Step("input", "x", "x"), Step("method", "y", "upper", (Value(0),))]
    net = CompactNetwork([*steps, Step("output", "output", "output", (Value(1),))], {})
    with pytest.raises(TypeError, match="calls methods of tensors only, not 'upper'"):
        net("text")


class NormAct(nn.BatchNorm2d):
    """A norm and an activation in one module, as timm has them."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4D input")
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )
        return self.act(y)


def test_norms_that_are_functions_are_folded():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8), nn.Conv2d(8, 8, 3), NormAct(8))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, NormAct):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    net, x = pruned(net), torch.randn(2, 3, 16, 16)
    fast = compact(net, x)
    same(fast(x), net(x))
    assert [type(module) for module in fast.children()] == [ColumnConv2d, ColumnConv2d]
    assert [step.kind for step in fast.compact_steps] == ["input", "layer", "layer", "output"]
    kept = compact(net, x, fold=False)
    same(kept(x), net(x))
    assert type(kept.get_submodule("1.norm")) is nn.BatchNorm2d
    assert torch.equal(kept.get_submodule("1.norm").running_mean, net[1].running_mean)


def test_a_norm_that_uses_the_batch_stays_a_function():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return F.batch_norm(x, None, None, self.norm.weight, self.norm.bias, True)

    graph = trace(Net().eval(), (torch.randn(2, 3, 4, 4),))
    make_layers(graph)
    assert [node.target for node in graph.graph.nodes].count(F.batch_norm) == 1


class Standardized(nn.Conv2d):
    """Weight standardisation as in timm's ScaledStdConv2d, written with functions."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * 0.5).view(-1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def test_a_computed_weight_becomes_that_of_a_plain_layer():
    torch.manual_seed(0)
    old = nn.utils.spectral_norm(nn.Conv2d(8, 8, 3))
    new = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    net = nn.Sequential(Standardized(3, 8, 3, padding=1, stride=2), nn.ReLU(), old, new).eval()
    new.parametrizations.weight.original1.data[:, 2:] = 0
    x = torch.randn(1, 3, 32, 32)
    fast = compact(net, x)
    assert type(fast.get_submodule("3")) is ColumnConv2d
    assert len(fast.get_submodule("3").columns) == 18
    assert {step.kind for step in fast.compact_steps} == {"input", "layer", "output"}
    assert [step.target for step in fast.compact_steps[1:-1]] == ["0.conv", "2", "3"]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_weight_that_depends_on_the_input_stays_a_function():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernels = nn.Parameter(torch.randn(2, 4, 3, 1, 1))

        def forward(self, x):
            return F.conv2d(x, (self.kernels * x.mean()).sum(0))

    graph = trace(Net().eval(), (torch.randn(1, 3, 4, 4),))
    make_layers(graph)
    assert [node.target for node in graph.graph.nodes].count(F.conv2d) == 1


def test_joined_or_not_a_network_computes_the_same():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    fast = compact(pruned(ConvNet()), x)
    apart = copy.deepcopy(fast)
    apart._program = compile_steps(apart.compact_steps)
    assert len(apart._program.instructions) == 5 and len(fast._program.instructions) == 1
    with torch.no_grad(), warnings.catch_warnings():
        torch.testing.assert_close(apart(x), fast(x), rtol=1e-5, atol=1e-5)
