"""Masked layers on kept columns: what the dense product of weight and mask computes, and leaves."""

import copy
import pickle

import pytest
import torch
from cases import NORM, geometries, kept
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spp_lightning import ConvNet, SPPPruner, kept_columns
from spp_lightning.compaction.epilogue import Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.kernels.cpu import registry
from spp_lightning.compaction.kernels.cpu.training_cost import linear_pays, pays
from spp_lightning.compaction.layers.kept import with_epilogue
from spp_lightning.compaction.spec import ConvSpec
from spp_lightning.method.groups import WeightGroups, weight_of
from spp_lightning.method.masks import mask_layer, unmask_layer

KEPT = "_ConvolutionBackward"


def masked(layer, mask, kernels="compact", granularity="column"):
    """The layer with a mask that acts in both modes."""
    groups = WeightGroups.of(layer, granularity)
    mask_layer(layer, groups, mask, mask, kept_columns(kernels)(layer, groups))
    return layer


def on_kept_columns(y):
    """Whether the kernels computed an output, which may have got another format since."""
    function = y.grad_fn
    if type(function).__name__ == "ToCopyBackward0":
        function = function.next_functions[0][0]
    return type(function).__name__ == KEPT


@st.composite
def layers(draw):
    g = draw(geometries())
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 9))
        for k, p, d in zip(g.kernel_size, g.padding, g.dilation, strict=True)
    ]
    columns = draw(kept(g))
    return g, (draw(st.integers(1, 3)), g.channels, *size), columns, draw(st.booleans())


@given(layers(), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_outputs_and_gradients_are_those_of_the_dense_product(layer, bias, last, seed):
    """Of odd layers, against float64; the gradient of a dropped column is exactly 0."""
    g, shape, columns, with_input = layer
    torch.manual_seed(seed)
    mask = torch.zeros(g.num_columns, dtype=torch.bool)
    mask[list(columns)] = True
    conv = nn.Conv2d(
        *(g.channels, g.filters, g.kernel_size, g.stride, g.padding, g.dilation, g.groups, bias)
    )
    if last:
        conv.to(memory_format=torch.channels_last)
    exact = masked(copy.deepcopy(conv).double(), mask, "dense")
    ours = masked(conv, mask)
    x = torch.randn(shape)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    ours_x, exact_x = x.requires_grad_(with_input), x.detach().double().requires_grad_(with_input)
    y, expected = ours(ours_x), exact(exact_x)
    assert on_kept_columns(y) == bool(columns)
    grad = torch.randn(y.shape)
    y.backward(grad)
    expected.backward(grad.double())
    pairs = [(y, expected), (weight_of(ours).grad, weight_of(exact).grad)]
    pairs += [(ours_x.grad, exact_x.grad)] if with_input else []
    pairs += [(ours.bias.grad, exact.bias.grad)] if bias else []
    for found, right in pairs:
        scale = max(1.0, float(right.detach().abs().max()))
        torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-5 * scale)
    dropped = WeightGroups.of(nn.Conv2d(g.channels, g.filters, g.kernel_size, groups=g.groups))
    gradient = weight_of(ours).grad
    assert not columns or gradient.stride() == weight_of(ours).stride()
    left = gradient.clone()
    dropped.zero(~mask, left)
    assert not left.any()


# Images of which no two greatest numbers under the pool are nearer than rounding errors.
@pytest.mark.parametrize("size", [(7, 12), (9, 8)], ids=str)
@pytest.mark.parametrize("channels", [False, True], ids=["columns", "channels"])
def test_an_epilogue_is_computed_with_the_layer(size, channels):
    torch.manual_seed(0)
    pool = PlaneOp("max_pool", (3, 3), (2, 2), ceil_mode=True)
    epilogue = Epilogue(Clamp(0.0), (pool, NORM))
    granularity, count = ("channel", 4) if channels else ("column", 36)
    conv, mask = nn.Conv2d(4, 6, 3, padding=1), torch.rand(count) < 0.5
    mask[1] = True
    exact = masked(copy.deepcopy(conv).double(), mask, "dense", granularity)
    ours = masked(conv, mask, granularity=granularity)
    x = torch.randn(2, 4, *size)
    y = with_epilogue(ours, x, epilogue, epilogue)
    expected = with_epilogue(exact, x.double(), epilogue, epilogue)
    assert on_kept_columns(y) and not on_kept_columns(expected)
    grad = torch.randn(y.shape)
    y.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    found, right = weight_of(ours).grad, weight_of(exact).grad
    torch.testing.assert_close(
        found.double(), right, rtol=0, atol=2e-5 * float(right.detach().abs().max())
    )


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


DENSE = {  # layers, inputs and granularities that stay dense
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9), "column"),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3), (2, 3, 5, 5, 5), "column"),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), None, "column"),
    "uneven": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same"), None, "column"),
    "subclass": (lambda: Scaled(3, 4, 3), None, "column"),
    "filters": (lambda: nn.Conv2d(3, 4, 3), None, "filter"),
    "double": (lambda: nn.Conv2d(3, 4, 3).double(), None, "column"),
    "half": (lambda: nn.Conv2d(3, 4, 3).half(), None, "column"),
    "one image": (lambda: nn.Conv2d(3, 4, 3), (3, 9, 9), "column"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", DENSE)
def test_what_the_kernels_do_not_have_is_computed_densely(name):
    make, shape, granularity = DENSE[name]
    layer = make()
    count = WeightGroups.of(layer, granularity).count
    mask = torch.arange(count) % 3 > 0
    x = torch.randn(shape or (2, 3, 9, 9), dtype=layer.weight.dtype)
    expected = masked(copy.deepcopy(layer), mask, "dense", granularity)(x)
    y = masked(layer, mask, granularity=granularity)(x)
    assert not on_kept_columns(y) and torch.equal(y, expected)


def conv_and_input():
    torch.manual_seed(0)
    layer = masked(nn.Conv2d(3, 4, 3), torch.arange(27) % 3 > 0)
    return layer, torch.randn(2, 3, 7, 7)


def test_gradients_of_gradients_are_the_dense_ones():
    layer, x = conv_and_input()
    x.requires_grad_()
    epilogue = Epilogue(Clamp(0.0), (PlaneOp("avg_pool", (2, 2), (2, 2)),))

    def penalty(layer):
        y = with_epilogue(layer, x, epilogue, epilogue)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [*layer.parameters(), x])

    found = penalty(layer)
    unmask_layer(layer)
    expected = penalty(masked(layer, torch.arange(27) % 3 > 0, "dense"))
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-3)


def test_transforms_and_counters_see_the_dense_layer():
    layer, x = conv_and_input()
    mapped = torch.func.vmap(lambda image: layer(image[None])[0])(x)
    torch.testing.assert_close(mapped, layer(x))
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 4 * 27 * 25
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(tangent + layer.bias.view(-1, 1, 1), layer(x))


def test_autocast_returns_its_dtype():
    layer, x = conv_and_input()
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert weight_of(layer).grad.dtype == torch.float32


def test_parameters_of_bfloat16():
    layer, x = conv_and_input()
    exact = masked(copy.deepcopy(layer).bfloat16().double(), torch.arange(27) % 3 > 0, "dense")
    layer.bfloat16()
    x = x.bfloat16().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y = layer(x)
    assert on_kept_columns(y) and y.dtype == torch.bfloat16
    y.sum().backward()
    exact(exact_x).sum().backward()
    pairs = ((x, exact_x), (weight_of(layer), weight_of(exact)), (layer.bias, exact.bias))
    for ours, right in pairs:
        assert ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.grad.double(), right.grad, rtol=1e-2, atol=1e-2)


def test_channels_last_stays():
    layer, x = conv_and_input()
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, expected)


def test_a_changed_mask_and_a_changed_weight_count():
    layer, x = conv_and_input()
    mask = vars(layer)["_spp_sampled"]
    for change in (lambda: mask.logical_not_(), lambda: weight_of(layer).data.mul_(2)):
        change()
        expected = F.conv2d(x, layer.weight, layer.bias)
        y = layer(x)
        assert on_kept_columns(y)
        torch.testing.assert_close(y, expected)
    mask.zero_()
    assert not on_kept_columns(layer(x))


def test_evaluation_is_dense_until_the_masks_are_fixed():
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    pruner = SPPPruner(net, speedup=4, interval=1)
    pruner.compute_with(kept_columns("compact"))
    x = torch.randn(2, 3, 9, 9)
    pruner.step(0)
    pruner.step(1)
    assert on_kept_columns(net(x)) and not on_kept_columns(net.eval()(x))
    while not pruner.finished:
        pruner.update()
    pruner.sample(2)
    with torch.inference_mode():
        evaluated = net(x)
    assert on_kept_columns(net(x)) and on_kept_columns(net.train()(x))
    assert torch.equal(evaluated, net(x))


def test_copies_are_plain_and_nothing_stays():
    layer, x = conv_and_input()
    before = registry.num_weights()
    layer(x).sum().backward()
    assert registry.num_weights() == before
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is nn.Conv2d and not any(name.startswith("_spp") for name in vars(twin))
    unmask_layer(layer)
    assert vars(layer).keys() == vars(nn.Conv2d(3, 4, 3)).keys()


def test_hooks_see_the_layer_and_not_its_epilogue():
    net, seen = ConvNet(), []
    pruner = SPPPruner(net, speedup=4)
    pruner.compute_with(kept_columns("compact"))
    x = torch.randn(2, 3, 32, 32)
    expected = net(x)
    handle = net.conv1.register_forward_hook(lambda _, __, y: seen.append(tuple(y.shape)))
    torch.testing.assert_close(net(x), expected)
    handle.remove()
    assert seen == [(2, 32, 32, 32)]
    assert [dense for dense, _ in pruner.macs.values()] == [2_457_600, 6_553_600, 3_276_800]


def test_the_cost_model_knows_when_it_pays():
    conv2 = ConvSpec(Geometry(32, 32, (5, 5), padding=(2, 2)))
    shape = (100, 32, 16, 16)
    assert pays(conv2, 200, shape)
    assert not pays(conv2, 800, shape)
    tiny = ConvSpec(Geometry(3, 8, (3, 3), padding=(1, 1)))
    assert not pays(tiny, 6, (16, 3, 8, 8))


def test_bad_kernels():
    with pytest.raises(ValueError, match="`kernels` must be one of"):
        kept_columns("sparse")


def test_a_compiled_network_is_dense_and_compiled_once():
    net = ConvNet(channels_last=False)
    pruner = SPPPruner(net, speedup=4, interval=1)
    pruner.compute_with(kept_columns("compact"))
    x, graphs = torch.randn(2, 3, 32, 32), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net.forward, backend=backend, fullgraph=True)
    for step in range(3):
        pruner.step(step)
        torch.testing.assert_close(compiled(x), net(x))
        compiled(x).sum().backward()
    assert len(graphs) == 1
    names = {str(node.target) for node in graphs[0].graph.nodes}
    assert any("conv2d" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [(5,), (2, 3)], ids=["2-d", "3-d"])
def test_linear_layers_read_kept_features(tokens, dtype):
    torch.manual_seed(0)
    mask = torch.arange(12) % 3 > 0
    ours = masked(nn.Linear(12, 7).to(dtype), mask)
    exact = masked(copy.deepcopy(ours).double(), mask, "dense")
    x = torch.randn(*tokens, 12, dtype=dtype, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    y, expected = ours(x), exact(exact_x)
    assert y.dtype == dtype
    y.square().sum().backward()
    expected.square().sum().backward()
    pairs = [(x, exact_x), (weight_of(ours), weight_of(exact)), (ours.bias, exact.bias)]
    digits = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=digits, atol=digits)
    for one, right in pairs:
        scale = float(right.grad.abs().max())
        torch.testing.assert_close(one.grad.double(), right.grad, rtol=0, atol=digits * scale)
    assert not weight_of(ours).grad[:, ~mask].any() and not x.grad[..., ~mask].any()


def test_linear_layers_multiply_no_more_than_they_keep():
    layer = masked(nn.Linear(12, 7), torch.arange(12) % 3 > 0)
    sizes = []
    layer_linear = F.linear

    def linear(x, weight, bias):
        sizes.append(tuple(weight.shape))
        return layer_linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", linear)
        layer(torch.randn(3, 12))
        with FlopCounterMode(display=False):
            layer(torch.randn(3, 12))
    assert sizes == [(7, 8), (7, 12)]
    assert linear_pays((768, 192), 48, 12608) and not linear_pays((768, 192), 180, 12608)
    assert not linear_pays((4, 8), 2, 16)
