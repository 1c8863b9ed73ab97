"""Coupled channels: a channel goes from all layers that write, normalise and read it, at once."""

import copy
import math
import sys
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from spp_lightning import SPPPruner, compact, count_macs, kept_columns, to_dense
from spp_lightning.method.coupled.channels import PrunedChannels
from spp_lightning.method.coupled.example import example_of
from spp_lightning.method.coupled.removal import without_channels
from spp_lightning.method.coupled.sets import channel_sets
from spp_lightning.method.masks import computation_of

pytest.importorskip("torch_pruning", reason="Torch-Pruning is not installed")


@pytest.fixture(autouse=True)
def _same_networks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def coupled(net, shape=(1, 3, 16, 16), **settings):
    return SPPPruner(net, granularity="coupled-channel", input_shape=shape, **settings)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=0.01)


def train(net, pruner, optimizer, steps):
    for step in steps:
        pruner.step(step, optimizer)
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class Everything(nn.Module):
    """A residual, a concatenation, a depthwise convolution, a gate, and flattening."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(8)
        self.side = nn.Conv2d(3, 4, 3, padding=1)
        self.expand = nn.Conv2d(12, 10, 1)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.squeeze = nn.Conv2d(10, 4, 1)
        self.excite = nn.Conv2d(4, 10, 1)
        self.project = nn.Conv2d(10, 6, 3, stride=4)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x):
        y = F.relu(self.norm(self.stem(x)))
        y = y + self.inner_norm(self.inner(y))
        y = torch.cat([F.relu(y), torch.tanh(self.side(x))], 1)
        y = F.hardswish(self.depthwise(self.expand(y)))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        y = self.project(y * gate.sigmoid())
        return self.head(y.flatten(1))


EVERYTHING = {  # by hand: the set's groups, and the part of each layer
    "stem": (
        8,
        [
            *(("stem", "out"), ("norm", "out"), ("inner", "in"), ("inner", "out")),
            *(("inner_norm", "out"), ("expand", "in")),
        ],
    ),
    "side": (4, [("side", "out"), ("expand", "in")]),
    "expand": (
        10,
        [
            *(("expand", "out"), ("depthwise", "out"), ("squeeze", "in")),
            *(("excite", "out"), ("project", "in")),
        ],
    ),
    "squeeze": (4, [("squeeze", "out"), ("excite", "in")]),
    "project": (6, [("project", "out"), ("head", "in")]),
}


def test_sets_by_hand():
    net = Everything()
    sets, left_out = channel_sets(net, example_of(net, (1, 3, 16, 16)))
    found = {x.name: (x.count, [(y.name, y.side) for y in x.members]) for x in sets}
    assert found == EVERYTHING
    assert left_out == {"head": "coupled to an output of the network"}
    side, project = sets[1], sets[-1]
    assert side.members[1].channels.tolist() == [[8], [9], [10], [11]]  # behind the stem's 8
    assert project.members[1].channels[2].tolist() == list(range(32, 48))  # 16 pixels a channel


NETWORKS = {
    "Everything": (Everything, 16),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 32),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 32),
    "regnet": (lambda: torchvision.models.regnet_y_400mf(num_classes=10), 32),  # groups, gates
    "densenet121": (lambda: torchvision.models.densenet121(num_classes=10), 32),
}


def weights_used(net, x):
    """MACs by the shapes of a network's weights, whatever their values are."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.ones_(module.weight)
    return sum(count_macs(net, x).values())


@pytest.mark.parametrize("name", NETWORKS)
def test_leaves_an_ordinary_smaller_network(name):
    make, size = NETWORKS[name]
    net = make()
    x = torch.rand(1, 3, size, size)
    keys, dense = list(net.state_dict()), sum(count_macs(net, x).values())
    pruner = coupled(net, x.shape, prune_ratio=0.5, A=0.5)
    while not pruner.finished:
        pruner.update()
    assert all(2 * pruner.num_pruned[k] == n for k, n in pruner.num_groups.items())
    macs = pruner.macs
    pruner.fold()
    net.eval()
    assert list(net.state_dict()) == keys
    expected = net(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = to_dense(compact(net, x))
    torch.testing.assert_close(small(x).detach(), expected, rtol=1e-4, atol=1e-5)
    assert sum(before for before, _ in macs.values()) == dense
    assert sum(after for _, after in macs.values()) == weights_used(small, x)
    assert sum(count_macs(net, x).values()) == weights_used(small, x)
    layers = {k: v for k, v in small.named_modules() if isinstance(v, (nn.Conv2d, nn.Linear))}
    assert layers
    for name, layer in layers.items():
        before = net.get_submodule(name)
        assert type(layer) is type(before)
        assert layer.weight.shape[0] in (before.weight.shape[0] // 2, 10, 5)
        nonzero = layer.weight.detach() != 0
        assert bool(
            nonzero.flatten(1).any(1).all() and nonzero.transpose(0, 1).flatten(1).any(1).all()
        )


def test_resnet18_has_a_quarter_of_its_macs_at_half_its_channels():
    net = torchvision.models.resnet18()
    pruner = coupled(net, (1, 3, 224, 224), prune_ratio=0.5)
    dense, pruned = 1_814_073_344, 483_149_824  # 3.75 times fewer; channels of single layers: 2.05
    assert sum(before for before, _ in pruner.macs.values()) == dense
    counts = {name: n // 2 for name, n in pruner.num_groups.items()}
    assert counts == pruner.num_target
    assert pruner._macs.total(counts) == pruned


HEADS = {  # what a linear layer of a 4×4 image's channels reads, and the features per channel
    "flatten": (lambda x: torch.flatten(x, 1), 16),
    "method": (lambda x: F.relu(x.flatten(1)), 16),
    "size": (lambda x: x.view(x.size(0), -1), 16),
    "shape": (lambda x: x.reshape(x.shape[0], -1), 16),
    "mean": (lambda x: x.mean([2, 3]), 1),
    "kept dims": (lambda x: x.mean((2, 3), keepdim=True).flatten(1), 1),
    "whole slice": (lambda x: x[:, :8].mean((-1, -2)), 1),
    "gate": (lambda x: (x * x.mean((2, 3), keepdim=True)).flatten(1), 16),
}


@pytest.mark.parametrize("head", HEADS)
def test_channels_before_a_head_are_removed(head):
    function, width = HEADS[head]

    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.head = nn.Linear(8 * width, 5)

        def forward(self, x):
            return self.head(function(self.conv(x)))

    net, x = Headed().eval(), torch.rand(2, 3, 6, 6)
    pruner = coupled(net, x.shape, prune_ratio=0.75, A=0.5)
    while not pruner.finished:
        pruner.update()
    pruner.fold()
    small = to_dense(compact(net, x))
    assert small.conv.weight.shape == (2, 3, 3, 3) and small.head.weight.shape == (5, 2 * width)
    torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_written_out_number_of_features_is_no_flattening_of_fewer():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.head = nn.Linear(128, 5)

        def forward(self, x):
            return self.head(self.conv(x).view(-1, 128))

    net, x = Written().eval(), torch.rand(1, 3, 6, 6)
    with pytest.raises(ValueError, match=r"conv \(without its channels the network fails"):
        coupled(net, x.shape)
    with torch.no_grad():
        net.head.weight[:, 32:] = 0
    dense = to_dense(compact(net, x))
    assert dense.conv.out_channels == 8
    torch.testing.assert_close(dense(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_masked_channel_is_as_if_it_were_removed(training):
    """Behind batch norms, biases, gates and ReLUs, with the averages of the batch, too."""
    net = Everything().train(training)
    x = torch.randn(4, 3, 16, 16)
    pruner = coupled(net, prune_ratio=0.5)
    state = pruner.state_dict()
    for p in state["probability"].values():
        p[::2] = 0.999999
    pruner.load_state_dict(state)
    pruner.sample(0)
    masks = {name: mask.clone() for name, mask in pruner.mask.items()}
    assert all(mask.tolist() == [i % 2 == 1 for i in range(len(mask))] for mask in masks.values())
    found = net(x) if training else net.eval()(x)
    pruner.fold()
    units = [x for x in pruner._units if isinstance(x, PrunedChannels)]
    smaller = without_channels(net, units, masks).train(training)
    assert [smaller.stem.out_channels, smaller.depthwise.groups, smaller.head.in_features] == [
        *(4, 5, 48)
    ]
    torch.testing.assert_close(found, smaller(x), rtol=1e-4, atol=1e-5)


def test_pruned_channels_are_zero_and_stay_zero():
    net = Everything()
    optimizer = sgd(net)
    pruner = coupled(net, prune_ratio=0.6, A=0.5, interval=1)
    train(net, pruner, optimizer, range(40))
    assert pruner.finished
    gone = {name: mask.logical_not() for name, mask in pruner.mask.items()}
    counts = {"stem": 5, "side": 3, "expand": 6, "squeeze": 3, "project": 4}  # ceil(0.6 · channels)
    assert {name: int(x.sum()) for name, x in gone.items()} == counts
    outputs = {}
    for name in ("stem", "norm", "inner", "inner_norm", "side", "expand", "depthwise", "project"):
        layer = net.get_submodule(name)
        layer.register_forward_hook(lambda *a, name=name: outputs.update({name: a[2].detach()}))
    written = {"norm": "stem", "inner": "stem", "inner_norm": "stem", "depthwise": "expand"}
    for training in (True, False):
        net.train(training)(torch.randn(2, 3, 16, 16))
        for name, y in outputs.items():
            channels = gone[written.get(name, name)]
            assert not y[:, channels].any() and y[:, ~channels].flatten(2).any(2).all(), name
    assert optimizer.state[net.norm.bias]["momentum_buffer"][gone["stem"]].count_nonzero() == 0
    assert not net.inner_norm.weight[gone["stem"]].any() and not net.stem.bias[gone["stem"]].any()
    assert not net.head.weight.unflatten(1, (6, 16))[:, gone["project"]].any()


def test_resumes_bit_for_bit():
    def run(steps, saved=None):
        torch.manual_seed(0)
        net = Everything()
        optimizer = sgd(net)
        pruner = coupled(net, prune_ratio=0.5, A=0.3, interval=3)
        if saved is not None:
            weights, momentum, state = saved
            net.load_state_dict(weights)
            optimizer.load_state_dict(momentum)
            pruner.load_state_dict(state)
        train(net, pruner, optimizer, steps)
        return net, optimizer, pruner

    net, _, whole = run(range(60))
    middle, momentum, half = run(range(10))
    assert not half.finished and sum(half.num_pruned.values()) > 0
    saved = copy.deepcopy((middle.state_dict(), momentum.state_dict(), half.state_dict()))
    resumed, _, other = run(range(10, 60), saved)
    assert whole.finished and other.finished
    first, second = net.state_dict(), resumed.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(whole.probability[x], other.probability[x]) for x in whole.probability)


@pytest.mark.parametrize("masking", ["sample", "scale"])
def test_evaluation_uses_the_expected_mask(masking):
    net = Everything().eval()
    pruner = coupled(net, masking=masking)
    state = pruner.state_dict()
    state["probability"]["side"].fill_(0.25)
    pruner.load_state_dict(state)
    expected = copy.deepcopy(net)  # a plain copy
    expected.expand.weight.data[:, 8:] *= 0.75
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(net(x), expected(x))


def test_importance_is_the_norm_of_all_weights_of_a_channel():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 2))
    [unit] = coupled(net, (1, 3, 4, 4))._units
    for criterion, order in (("l1", 1), ("l2", 2)):
        expected = [
            torch.cat([net[0].weight[i].flatten(), net[3].weight[:, 4 * i : 4 * i + 4].flatten()])
            for i in range(8)
        ]
        norms = torch.stack([weights.norm(order) for weights in expected])
        torch.testing.assert_close(unit.importance(criterion), norms.detach())


@pytest.mark.parametrize("speedup", [1.5, 3.0, 4.0])
def test_speedup_is_that_of_the_network(speedup):
    net = Everything()
    pruner = coupled(net, speedup=speedup)
    dense = sum(before for before, _ in pruner.macs.values())
    macs, counts = pruner._macs, pruner.num_target
    assert dense == sum(count_macs(net, torch.rand(1, 3, 16, 16)).values())
    assert macs.total(counts) <= dense / speedup
    for name, count in counts.items():  # no group more could be kept
        assert count == 0 or macs.total({**counts, name: count - 1}) > dense / speedup
    while not pruner.finished:
        pruner.update()
    assert sum(after for _, after in pruner.macs.values()) == macs.total(counts)


def test_patterns_match_the_layers_that_write():
    net = Everything()
    pruner = coupled(net, prune_ratio={"inner": 0.25, "[es]*": 0.5})
    assert pruner.num_target == {"stem": 2, "side": 2, "expand": 5, "squeeze": 2}
    assert pruner.skipped == {
        "project": "no ratio",
        "head": "coupled to an output of the network",
    }
    pruner.fold()
    assert coupled(net, layers=["side", "inn*"]).num_groups == {"stem": 8, "side": 4}
    with pytest.raises(ValueError, match=r"'head' matches head \(coupled to an output of the netw"):
        coupled(net, layers=["head"])


def test_trains_on_kept_columns():
    torch.manual_seed(0)
    results = []
    for kernels in ("dense", "compact"):
        net = copy.deepcopy(results[0][1]) if results else Everything()
        start = copy.deepcopy(net)
        pruner = coupled(net, prune_ratio=0.5, A=0.3, interval=2)
        pruner.compute_with(kept_columns(kernels))
        found = [computation_of(net.get_submodule(x)) for x in ("inner", "expand", "head")]
        assert all((x is not None) == (kernels == "compact") for x in found)
        train(net, pruner, sgd(net), range(20))
        pruner.fold()
        results.append((net.state_dict(), start))
    for name, expected in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], expected, rtol=1e-3, atol=1e-5)


class Net(nn.Module):
    """Two convolutions with something of a test's between them."""

    def __init__(self, between, layer=None):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.layer = layer
        self.last = nn.Conv2d(8, 4, 3)
        self.between = between

    def forward(self, x):
        return self.last(self.between(self, self.first(x), x))


REFUSED = {
    "layer norm": (lambda net, y, x: net.layer(y), nn.LayerNorm([8, 16, 16]), r"'layer' \(LayerN"),
    "group norm": (lambda net, y, x: net.layer(y), nn.GroupNorm(2, 8), r"'layer' \(GroupNorm\)"),
    "groups of one": (
        lambda net, y, x: net.layer(y)[:, ::2],
        nn.Conv2d(8, 16, 3, groups=8),
        "first \\(coupled to the grouped convolution 'layer'\\)",
    ),
    "parameter": (
        lambda net, y, x: y * net.layer.weight.view(1, -1, 1, 1),
        nn.ParameterDict({"weight": torch.ones(8)}),
        "the parameter 'layer.weight'",
    ),
    "called twice": (
        lambda net, y, x: net.layer(net.layer(y)),
        nn.Conv2d(8, 8, 1),
        "'layer', which is called several times",
    ),
    "input": (lambda net, y, x: y + F.pad(x, (0, 0, 0, 0, 0, 5)), None, "the network fails"),
    "softmax": (lambda net, y, x: y.softmax(1), None, "computes something else"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_removed_is_left_out(what):
    between, layer, message = REFUSED[what]
    net = Net(between, layer)
    with pytest.raises(ValueError, match=f"There are no coupled channels to prune.*{message}"):
        coupled(net)


def test_only_the_set_that_cannot_be_removed_is_left_out():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Net(lambda net, y, x: y.softmax(1)), nn.Conv2d(4, 2, 1))
    net[1].first = nn.Conv2d(8, 8, 3)
    pruner = coupled(net)
    assert list(pruner.num_groups) == ["0", "1.last"]
    assert pruner.skipped["1.first"] == "without its channels the network computes something else"


def test_clear_errors(monkeypatch):
    net = Everything()
    with pytest.raises(ValueError, match=r"`input_shape` must be given for granularity=.coupled"):
        SPPPruner(net, granularity="coupled-channel")
    with pytest.raises(
        ValueError, match=r"`speedup` \(=300\) must leave .* at least 19,170 of its 2"
    ):
        coupled(net, speedup=300)
    with pytest.raises(ValueError, match=r"`input_shape` \(=\(1, 5, 9, 9\)\) must be .* it fails"):
        coupled(net, (1, 5, 9, 9))
    shuffle = torchvision.models.shufflenet_v2_x0_5()
    with pytest.raises(ValueError, match=r"`granularity` must be another.* can't follow its chan"):
        coupled(shuffle, (1, 3, 32, 32))
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r'not installed.*pip install "spp-lightning\[coupled\]"'):
        coupled(net)


def test_a_state_is_of_its_settings():
    state = coupled(Everything(), speedup=3).state_dict()
    assert state["settings"]["speedup"] == 3 and state["settings"]["prune_ratio"] is None
    with pytest.raises(
        ValueError, match=r"prune_ratio was None and is 0.5; speedup was 3.0 and is"
    ):
        coupled(Everything(), prune_ratio=0.5).load_state_dict(state)


def test_counts_are_those_of_the_method():
    pruner = coupled(Everything(), prune_ratio=0.7)
    for name, count in pruner.num_groups.items():
        assert pruner.num_target[name] == min(math.ceil(0.7 * count), count - 1)
