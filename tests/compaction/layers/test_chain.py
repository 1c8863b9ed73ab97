"""Layers that are one call of the kernels: bit for bit what one after the other gives."""

import copy
import gc
import io
import math
import pickle
import threading
import weakref

import pytest
import torch
from cases import NORM, SENTINEL, Case, cases, guarded, intact, pools, tensors
from facade import chain_of, handle
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from spp_lightning import ConvNet, compact
from spp_lightning.compaction import ColumnConv2d, load_compact, save_compact, to_dense
from spp_lightning.compaction.epilogue import Clamp, PlaneOp
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.program import compile_steps
from spp_lightning.compaction.kernels.cpu import library
from spp_lightning.compaction.kernels.cpu.chain import ChainHandle, Linear, may_follow
from spp_lightning.compaction.layers.chain import column_chain, tune_chain

native = pytest.mark.skipif(not library.is_available(), reason="built without the kernels")

POOL = PlaneOp("max_pool", (3, 3), (2, 2), ceil_mode=True)


# --- the kernels ---


@st.composite
def rows_of_cases(draw):
    """Two or three layers, of which each reads the output of the one before it."""
    row = [draw(cases())._replace(residual=False)]
    for _ in range(draw(st.integers(1, 2))):
        before = row[-1]
        case = draw(cases())
        g, size = case.geometry, before.geometry.out_size(*before.size)
        for op in before.post:
            size = op.out_size(*size)
        # As many channels as there are filters, and room for the kernel.
        groups = math.gcd(g.groups, before.geometry.filters)
        reach = [1 + d * (k - 1) for d, k in zip(g.dilation, g.kernel_size, strict=True)]
        padding = tuple(
            max(p, (r - n + 1) // 2) for p, r, n in zip(g.padding, reach, size, strict=True)
        )
        g = Geometry(
            before.geometry.filters,
            g.filters // g.groups * groups,
            g.kernel_size,
            (g.stride[0], 1),
            padding,
            g.dilation,
            groups,
        )
        stride = (g.stride[0], draw(st.integers(1, 3)))
        depthwise = g._replace(filters=g.channels, groups=g.channels, stride=stride)
        wanted = depthwise.is_depthwise and draw(st.integers(0, 2)) == 0
        if wanted and may_follow(before.geometry, depthwise):
            g = depthwise
        assume(may_follow(before.geometry, g))
        columns = tuple(range(draw(st.integers(0, 2)), g.num_columns, draw(st.integers(1, 4))))
        post, out = [], g.out_size(*size)
        for _ in range(draw(st.integers(0, 2))):
            post.append(draw(pools(out)))
            out = post[-1].out_size(*out)
        post = tuple(post)
        row.append(
            case._replace(
                geometry=g,
                size=size,
                batch=before.batch,
                columns=columns,
                post=post,
                residual=False,
            )
        )
    row[-1] = row[-1]._replace(residual=draw(st.booleans()))
    return row


def check(row: list[Case]) -> None:
    every = [tensors(case) for case in row]
    chain = ChainHandle([handle(case, t) for case, t in zip(row, every, strict=True)])
    x, residual = every[0].x, every[-1].residual
    expected = chain.one_by_one(x, residual)
    for threads in (1, 2, 3, 5):
        prepared = chain.prepare(x.shape, threads)
        out = guarded(torch.full(expected.shape, math.nan), SENTINEL)
        if out.numel():
            chain.at_once(prepared, x, residual, out)
        assert torch.equal(out, expected), f"{threads} threads"
        assert intact(out)


@native
@settings(deadline=None, max_examples=150, derandomize=True)
@given(rows_of_cases())
def test_at_once_is_one_after_the_other(row):
    check(row)


def layers_of(*geometries: Geometry, size=(12, 11), post=(), residual=False) -> list[Case]:
    row = []
    for g in geometries:
        row.append(Case(g, size, 3, tuple(range(0, g.num_columns, 3)), clamp=Clamp(0.0), post=post))
        size = g.out_size(*size)
        for op in post:
            size = op.out_size(*size)
    row[-1] = row[-1]._replace(residual=residual)
    return row


@native
@pytest.mark.parametrize(
    "row",
    {
        "as the paper's": layers_of(
            *(Geometry(c, n, (5, 5), padding=(2, 2)) for c, n in ((3, 32), (32, 32), (32, 64))),
            size=(32, 32),
            post=(POOL, NORM),
        ),
        "a bottleneck": layers_of(
            Geometry(40, 20, (1, 1)),
            Geometry(20, 20, (3, 3), padding=(1, 1)),
            Geometry(20, 40, (1, 1)),
            residual=True,
        ),
        "groups of 20 filters": layers_of(
            Geometry(4, 40, (3, 3), (2, 2), (1, 1), groups=2),
            Geometry(40, 60, (3, 3), (2, 1), (3, 3), (2, 2), groups=2),
        ),
        "more than every thread copies for itself": layers_of(
            Geometry(5, 20, (3, 3), padding=(1, 1)),
            Geometry(20, 8, (3, 3), padding=(1, 1)),
            size=(170, 160),
        ),
        "a norm first": layers_of(Geometry(3, 5, (3, 3)), Geometry(5, 33, (1, 3)), post=(NORM,)),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_every_instruction_set(row, isa):
    check(row[1])


# --- networks ---


def pruned(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for conv in [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]:
        kept = torch.rand(conv.weight[0].numel(), generator=generator) < 0.4
        conv.weight.data *= kept.view(conv.weight[0].shape)
    return net.eval().requires_grad_(False)


class Block(nn.Module):
    """Three convolutions and an addition, as of a residual network."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.last(F.relu(self.middle(F.relu(self.first(x))))))


@pytest.fixture
def net():
    """The compact ConvNet without its linear layer, whose sums torch rounds as it likes."""
    torch.manual_seed(0)
    dense = ConvNet()
    dense.ip1 = nn.Identity()
    return compact(pruned(dense), torch.randn(2, 3, 32, 32))


@pytest.fixture
def classifier():
    """The compact ConvNet."""
    torch.manual_seed(0)
    dense = ConvNet()
    nn.init.normal_(dense.conv1.weight)
    nn.init.normal_(dense.ip1.bias)
    return compact(pruned(dense), torch.randn(2, 3, 32, 32))


def one_by_one(network):
    """The same network, every layer of which is called by itself."""
    apart = copy.deepcopy(network)
    apart._program = compile_steps(apart.compact_steps, ())
    return apart


def test_layers_that_follow_each_other_are_joined(net):
    assert net.joined_layers == [["conv1", "conv2", "conv3"]]
    block = compact(pruned(nn.Sequential(Block(), Block())), torch.randn(1, 8, 9, 9))
    # The first block's output is read twice: by a layer, and by the second block's addition.
    assert block.joined_layers == [[f"{i}.first", f"{i}.middle", f"{i}.last"] for i in "01"]
    x = torch.randn(3, 8, 9, 9)
    assert torch.equal(block(x), one_by_one(block)(x))


class Apart(nn.Module):
    """Layers that can't be one call, for one reason each."""

    def __init__(self):
        super().__init__()
        self.twice, self.strided = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, 2)
        self.read, self.too = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.shift, self.end = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = torch.sigmoid(self.twice(torch.sigmoid(self.twice(x))))
        y = self.read(x)
        y = self.strided(y) + 1 + self.too(y).mean()
        return self.end(F.relu(self.shift(y) + y[..., 1:-1, 1:-1]))


def test_others_are_not():
    fast = compact(pruned(Apart()), torch.randn(1, 4, 20, 20))
    # `shift` adds a residual, and so may only be the last one.
    assert fast.joined_layers == []


@native
def test_one_call_or_several_is_decided_by_the_cost_model(net):
    """The small network is one call; of large images each layer is called alone."""
    small, large = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 512, 512)
    for x, is_chained in ((small, True), (large, False)):
        for _ in range(2):  # the first call packs the weights
            assert torch.equal(net(x), one_by_one(net)(x))
        threads = torch.get_num_threads()
        assert bool(chain_of(net.conv1).threads_for(tuple(x.shape), threads)) == is_chained


@native
def test_tuned_chains_compute_the_same(net):
    x = torch.randn(2, 3, 32, 32)
    layers = (net.conv1, net.conv2, net.conv3)
    expected = net(x)
    measured = tune_chain(x, None, *layers)
    assert 0 in measured and len(measured) > 1 and min(measured.values()) > 0
    assert torch.equal(net(x), expected)
    with torch.no_grad():
        net.conv2.weight.mul_(2)
    for _ in range(2):
        net(x)
    assert [*chain_of(net.conv1).tuned] == [(*x.shape, torch.get_num_threads())]


def test_new_weights_are_seen(net):
    x = torch.randn(2, 3, 32, 32)
    net(x)
    for layer in (net.conv1, net.conv3):
        with torch.no_grad():
            layer.weight.mul_(2)
        assert torch.equal(net(x), one_by_one(net)(x))
    net.conv2.weight = nn.Parameter(net.conv2.weight * 2, requires_grad=False)
    assert torch.equal(net(x), one_by_one(net)(x))


@native
def test_weights_that_change_at_every_call_make_no_chain(net):
    x = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        net(x)
    chain = chain_of(net.conv1)
    with torch.no_grad():
        net.conv2.weight.mul_(2)
    expected = one_by_one(net)(x)
    net(x)
    assert chain_of(net.conv1) is chain
    assert torch.equal(net(x), expected)
    assert chain_of(net.conv1) is not chain


def test_layers_in_the_place_of_others(net):
    class Zero(ColumnConv2d):
        def forward(self, x, residual=None):
            return 0 * super().forward(x, residual)

    x = torch.randn(2, 3, 32, 32)
    expected = net(x)
    net.conv2.forward = lambda x: 0 * type(net.conv2).forward(net.conv2, x)
    zero = net(x)
    assert not torch.equal(zero, expected)
    del net.conv2.forward
    assert torch.equal(net(x), expected)
    own = net.conv2
    net.conv2 = Zero(own.geometry, own.weight, own.columns, own.bias, own.epilogue)
    net.requires_grad_(False)
    assert torch.equal(net(x), zero)
    net.conv2 = own
    for name in ("conv1", "conv2", "conv3"):  # dense, without what follows
        layer = net.get_submodule(name)
        setattr(net, name, to_dense(layer))
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-4)
        setattr(net, name, layer)
    assert torch.equal(net(x), expected)


def test_channels_that_dont_fit_are_an_error():
    layers = [ColumnConv2d.of(nn.Conv2d(3, 8, 1)), ColumnConv2d.of(nn.Conv2d(40, 4, 1))]
    for layer in layers:
        layer.requires_grad_(False)
    for _ in range(3):
        with pytest.raises(ValueError, match="40"):
            column_chain(torch.randn(1, 3, 8, 8), None, *layers)


def test_an_input_is_read_before_it_is_written_to():
    layers = {f"conv{i}": ColumnConv2d.of(nn.Conv2d(3, 3, 1)) for i in "ab"}
    root = nn.ModuleDict({**layers, "relu": nn.ReLU(inplace=True)}).requires_grad_(False)
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.mul, (x, 1.0))
    first = graph.call_module("conva", (y,))
    written = graph.call_module("relu", (y,))
    graph.output(graph.call_module("convb", (first, written)))
    traced = fx.GraphModule(root, graph).eval()
    net = CompactNetwork.of(traced)
    x = torch.randn(2, 3, 5, 5)
    assert net.joined_layers == []
    for _ in range(3):
        assert torch.equal(net(x), traced(x))


def test_hooks_see_every_layer(net):
    x, seen = torch.randn(2, 3, 32, 32), []
    expected = net(x)
    handle = net.conv2.register_forward_hook(lambda *args: seen.append(args[2].shape))
    assert torch.equal(net(x), expected)
    assert seen == [(2, 32, 8, 8)]
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args[0]))
    assert torch.equal(net(x), expected)
    handle.remove()
    assert [net.conv1, net.conv2, net.conv3] == [x for x in seen if isinstance(x, ColumnConv2d)]
    assert torch.equal(net(x), expected) and len(seen) == 5


def test_gradients_and_other_types_go_layer_by_layer(net):
    x = torch.randn(2, 3, 32, 32)
    apart = one_by_one(net)
    for graph in (net, apart):
        graph.conv2.weight.requires_grad_(True)
        graph(x).square().sum().backward()
    assert torch.equal(net.conv2.weight.grad, apart.conv2.weight.grad)
    given = x.clone().requires_grad_()
    net.requires_grad_(False)(given).sum().backward()
    assert given.grad.abs().sum() > 0
    assert torch.equal(net(x[0][None].expand(2, -1, -1, -1)), apart(x[0].repeat(2, 1, 1, 1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(x), apart(x))
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(net.to(dtype)(x.to(dtype)), apart.to(dtype)(x.to(dtype)))


def test_a_parametrized_layer(net):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    x = torch.randn(2, 3, 32, 32)
    net(x)
    parametrize.register_parametrization(net.conv2, "weight", Twice())
    y = net(x)
    parametrize.remove_parametrizations(net.conv2, "weight")
    assert torch.equal(net(x), y)


def test_copies_files_and_dense_networks(net, tmp_path):
    x = torch.randn(2, 3, 32, 32)
    expected = net(x)
    names = [*net.state_dict()]
    save_compact(net, tmp_path / "net.spp")
    loaded = load_compact(tmp_path / "net.spp")
    for other in (copy.deepcopy(net), loaded):
        assert torch.equal(other(x), expected)
        assert [*other.state_dict()] == names
    assert loaded.joined_layers == net.joined_layers == [["conv1", "conv2", "conv3"]]
    dense = to_dense(net)
    assert not any(isinstance(layer, ColumnConv2d) for layer in dense.modules())
    torch.testing.assert_close(dense(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(net(x), expected)


# --- with a linear layer ---


def test_a_linear_layer_is_joined_too(classifier, tmp_path):
    assert classifier.joined_layers == [["conv1", "conv2", "conv3", "ip1"]]
    save_compact(classifier, tmp_path / "net")
    loaded, dense = load_compact(tmp_path / "net"), to_dense(classifier)
    assert loaded.joined_layers == classifier.joined_layers and type(dense.ip1) is nn.Linear
    for batch in (0, 1, 3):
        x = torch.randn(batch, 3, 32, 32)
        y = classifier(x)
        assert y.shape == (batch, 10)
        assert torch.equal(loaded(x), y)
        for same in (one_by_one(classifier), dense):
            torch.testing.assert_close(same(x), y, rtol=1e-5, atol=1e-4)


@native
@pytest.mark.parametrize("features", [(1, 1), (7, 3), (16, 4), (40, 5), (51, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_sums(features, bias, isa):
    """Alone, at once and shared by threads: the same bits, near those of float64."""
    linear = nn.Linear(*features, bias=bias).requires_grad_(False)
    case = Case(Geometry(2, features[0], (3, 3)), (3, 3), 1, tuple(range(18)))
    own = handle(case, tensors(case))
    chain = ChainHandle([own], Linear(linear.weight, linear.bias))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 2, 3, 3)
        expected = chain.one_by_one(x, None)
        exact = F.linear(own.forward(x).flatten(1).double(), linear.weight.double(), None)
        exact += 0 if linear.bias is None else linear.bias
        torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-5)
        for threads in (1, 2, 3):
            assert torch.equal(chain.at_once(chain.prepare(x.shape, threads), x, None), expected)


def other_bias(fc, put):
    bias = fc.bias.detach() + 1
    del fc.bias
    put(bias)


@pytest.mark.parametrize(
    "change",
    {
        "in place": lambda fc: fc.weight.mul_(2),
        "bias in place": lambda fc: fc.bias.add_(1),
        "data": lambda fc: setattr(fc.weight, "data", fc.weight * 2),
        "weight": lambda fc: setattr(fc, "weight", nn.Parameter(fc.weight * 2)),
        "fewer": lambda fc: [setattr(p, "data", p.data[:5]) for p in (fc.weight, fc.bias)],
        "buffer": lambda fc: other_bias(fc, lambda bias: fc.register_buffer("bias", bias)),
        "attribute": lambda fc: other_bias(fc, lambda bias: setattr(fc, "bias", bias)),
        "bias": lambda fc: setattr(fc, "bias", None),
        "forward": lambda fc: setattr(fc, "forward", lambda x: x[:, :10]),
        "hook": lambda fc: fc.register_forward_hook(lambda module, x, y: y + 1),
        "parametrized": lambda fc: parametrize.register_parametrization(
            fc, "weight", nn.Softplus()
        ),
        "double": lambda fc: fc.register_forward_pre_hook(lambda module, x: (2 * x[0],)),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_changes_of_the_linear_layer_are_seen(classifier, change):
    x = torch.randn(3, 3, 32, 32)
    before = classifier(x)
    with torch.no_grad():
        change[1](classifier.ip1)
        for _ in range(2):
            after = classifier(x)
            torch.testing.assert_close(after, one_by_one(classifier)(x), rtol=1e-5, atol=1e-4)
    assert after.shape != before.shape or not torch.allclose(after, before, rtol=1e-3)


def test_another_layer_in_the_place_of_the_linear_one(classifier):
    x = torch.randn(3, 3, 32, 32)
    expected = classifier(x)
    classifier.ip1 = nn.Sequential(classifier.ip1, nn.Tanh())
    torch.testing.assert_close(classifier(x), expected.tanh(), rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_sparse_linear_layer(classifier):
    x = torch.randn(3, 3, 32, 32)
    expected, linear = classifier(x), classifier.ip1
    linear.weight = nn.Parameter(linear.weight.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(classifier(x), expected, rtol=1e-5, atol=1e-4)


def test_a_transposed_linear_layer():
    x = torch.randn(2, 3, 4, 4)
    fast = compact(pruned(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 16))), x)
    linear = fast.get_submodule("2")
    for _ in range(2):
        fast(x)
    features = fast.get_submodule("0")(x).flatten(1)
    linear.weight.data = linear.weight.data.t()
    torch.testing.assert_close(fast(x), F.linear(features, linear.weight, linear.bias))


def test_features_are_checked(classifier):
    x = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        classifier(x)
    for features in (6000, 960):
        classifier.ip1 = nn.Linear(features, 10).requires_grad_(False)
        for _ in range(2):
            with pytest.raises((ValueError, RuntimeError), match=str(features)):
                classifier(x)


def test_every_call_gives_the_same_bits(classifier):
    fresh, x = copy.deepcopy(classifier), torch.randn(3, 3, 32, 32)
    for change in (lambda: None, lambda: fresh.conv2.weight.mul_(2)):
        with torch.no_grad():
            change()
        first = fresh(x)
        assert all(torch.equal(fresh(x), first) for _ in range(3))


def test_inference_tensors(classifier):
    x = torch.randn(3, 3, 32, 32)
    for _ in range(3):
        classifier(x)
    with torch.inference_mode():
        state = {name: 2 * value for name, value in classifier.state_dict().items()}
        state |= {name: value for name, value in classifier.state_dict().items() if "col" in name}
        classifier.load_state_dict(state, assign=True)
        expected = one_by_one(classifier)(x)
        for _ in range(3):
            torch.testing.assert_close(classifier(x), expected, rtol=1e-5, atol=1e-4)


def test_a_network_is_freed_when_nobody_holds_it(net):
    layers = [net.conv1, net.conv2, net.conv3]
    for _ in range(3):
        net(torch.randn(1, 3, 32, 32))
    places = [weakref.ref(layer) for layer in layers]
    for name in ("conv1", "conv2", "conv3"):
        setattr(net, name, nn.Identity())
    gc.collect()  # the graph that the network was made of has cycles
    gc.disable()
    try:
        del layers
        assert [place() for place in places] == [None] * 3
    finally:
        gc.enable()


def test_a_later_layer_with_a_stride_along_the_rows(net):
    x = torch.randn(2, 3, 32, 32)
    net(x)
    strided = nn.Conv2d(32, 64, 3, stride=2).requires_grad_(False)
    net.conv3 = ColumnConv2d.of(strided)
    for _ in range(3):
        assert torch.equal(net(x), one_by_one(net)(x))


def test_a_linear_layer_can_be_trained_alone(classifier):
    classifier.ip1.requires_grad_(True)
    x = torch.randn(3, 3, 32, 32)
    classifier(x).sum().backward()
    grad, classifier.ip1.weight.grad = classifier.ip1.weight.grad, None
    assert torch.equal(classifier.ip1.bias.grad, torch.full((10,), 3.0))
    features = one_by_one(classifier)
    features.ip1 = nn.Identity()
    torch.testing.assert_close(grad, features(x).sum(0).expand(10, -1))


def test_features_that_dont_fit_are_named(classifier):
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match="1024"):
            classifier(torch.randn(1, 3, 40, 32))


def test_a_bias_of_another_shape_is_refused(classifier):
    """The kernels once read beyond a bias that was too short."""
    x = torch.randn(2, 3, 32, 32)
    for shorter in (nn.Parameter(torch.zeros(1), False), None):
        with torch.no_grad():
            classifier(x)
            if shorter is None:
                classifier.ip1.bias.data = classifier.ip1.bias.data[:1]
            else:
                whole, classifier.ip1.bias = classifier.ip1.bias, shorter
            with pytest.raises(ValueError, match=r"`bias` must be of shape \(10,\)"):
                classifier(x)
            classifier.ip1.bias = whole


class Flat(nn.Module):
    """Ways to flatten: the first three are what is joined."""

    def __init__(self, flatten, out_features=5):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, out_features)
        self.flatten = flatten

    def forward(self, x):
        return self.linear(self.flatten(F.relu(self.conv(x))))


@pytest.mark.parametrize(
    ("flatten", "is_joined"),
    [
        (nn.Flatten(), True),
        (lambda x: x.flatten(1), True),
        (lambda x: torch.flatten(x, start_dim=1, end_dim=-1), True),
        (lambda x: x.reshape(-1, 144), False),
        (lambda x: x.flatten(2).flatten(1), False),
    ],
)
def test_only_what_flattens_images_is_joined(flatten, is_joined):
    x = torch.randn(2, 3, 8, 8)
    fast = compact(net := pruned(Flat(flatten)), x)
    assert fast.joined_layers == ([["conv", "linear"]] if is_joined else [])
    torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_large_linear_layer_is_left_to_torch():
    fast = compact(pruned(Flat(nn.Flatten(), 1000)), torch.randn(2, 3, 8, 8))
    assert fast.joined_layers == []


def test_a_pickled_network_computes_the_same():
    x = torch.randn(2, 8, 9, 9)
    block = compact(pruned(Block()), x)
    assert block.joined_layers
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), block(x))


def test_compilers_see_the_operators(net):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        program = torch.export.export(net, (x,))
        names = [str(node.target) for node in program.graph.nodes]
        assert names.count("spp_lightning.column_conv2d.default") == 3
        assert torch.equal(program.module()(x), net(x))
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(net, x), file)
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), net(x))
    assert file.tell()


def test_wrong_inputs_are_named(net):
    with pytest.raises(ValueError, match="`x` must be"):
        net(torch.randn(2, 4, 32, 32))
    block = compact(pruned(Block()), torch.randn(1, 8, 9, 9))
    layers = (block.first, block.middle, block.last)
    x = torch.randn(1, 8, 9, 9)
    for _ in range(2):  # when it is prepared, and after that
        with pytest.raises(ValueError, match="`residual` must be of shape"):
            column_chain(x, torch.randn(1, 8, 9, 8), *layers)
        column_chain(x, x, *layers)


@native
def test_several_python_threads_run_one_network(net):
    batches = [torch.randn(n, 3, 32, 32) for n in (1, 2, 5, 1)]
    expected, wrong = [net(x) for x in batches], []

    def run(x, y):
        for _ in range(50):
            if not torch.equal(net(x), y):
                wrong.append(len(x))

    workers = [
        threading.Thread(target=run, args=pair) for pair in zip(batches, expected, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
