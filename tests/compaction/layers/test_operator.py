"""The column-pruned convolution in torch's company: autograd, compile, export, autocast, modes."""

import copy
import gc
import io
import pickle
import time
import warnings
import weakref

import pytest
import torch
from conftest import look_for_library
from facade import EXACT
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spp_lightning import native
from spp_lightning.compaction.epilogue import LRN_ALPHA, RELU, Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.kernels.cpu import library
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.kernels.cpu.registry import num_weights
from spp_lightning.compaction.kernels.cpu.tables import MOST_SHAPES
from spp_lightning.compaction.layers import column_conv
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.operator import column_conv2d
from spp_lightning.compaction.spec import ConvSpec

POOL = PlaneOp("max_pool", (2, 2), (2, 2))
RELU_POOL = Epilogue(Clamp(0.0), (POOL,))
INT = torch.int32
BUILT = native.library() is not None
needs_kernels = pytest.mark.skipif(not BUILT, reason="built without the kernels")
pytestmark = pytest.mark.filterwarnings("ignore:The CPU kernels")


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def pruned(channels=3, filters=8, **options) -> nn.Conv2d:
    """A convolution of which every third column is left, the same ones in all filters."""
    conv = nn.Conv2d(channels, filters, 3, **({"padding": 1} | options))
    with torch.no_grad():
        kept = torch.arange(conv.weight[0].numel()).view_as(conv.weight[0]) % 3 == 0
        conv.weight.mul_(kept)
    return conv


def network(*, compact: bool) -> nn.Module:
    """Two pruned convolutions, a pool and a linear layer, the same ones every time."""
    torch.manual_seed(1)
    convs = [pruned(), pruned(8, 6, stride=2)]
    if compact:
        convs = [ColumnConv2d.of(convs[0], RELU_POOL), ColumnConv2d.of(convs[1], RELU)]
        return nn.Sequential(*convs, nn.Flatten(), nn.Linear(6 * 2 * 2, 4))
    between = [nn.ReLU(), nn.MaxPool2d(2)], [nn.ReLU()]
    return nn.Sequential(
        *(convs[0], *between[0], convs[1], *between[1]), nn.Flatten(), nn.Linear(6 * 2 * 2, 4)
    )


GEOMETRY = Geometry(4, 6, (3, 2), (2, 1), (1, 1), (1, 2), 2)
POOLS = (PlaneOp("avg_pool", (2, 2), (1, 1)), PlaneOp("max_pool", (2, 2), (2, 2)))


def arguments(
    dtype=torch.float32, grad=False, epilogue=None, residual=False, has_bias=True, **changes
):
    """What the operator takes, for a small convolution of two groups."""
    x = torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=grad)
    out = (2, 6, *GEOMETRY.out_size(5, 6))
    made = {
        "x": x,
        "weight": torch.randn(3, 5, dtype=dtype, requires_grad=grad),
        "columns": torch.tensor([0, 3, 7, 12, 23], dtype=INT),
        "bias": torch.randn(6, dtype=dtype, requires_grad=grad) if has_bias else None,
        "residual": torch.randn(out, dtype=dtype, requires_grad=grad) if residual else None,
    }
    return (*(made | changes).values(), *ConvSpec(GEOMETRY, epilogue or Epilogue()).pack())


def fused_arguments(dtype=torch.float32, grad=False, residual=True, has_bias=True):
    return arguments(dtype, grad, Epilogue(Clamp(0.0), POOLS), residual, has_bias)


CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_torchs_own_checks_of_an_operator(dtype):
    tolerance = {"atol": 0.1, "rtol": 0.1} if dtype == torch.bfloat16 else {}
    for grad in (False, True):
        for given in (arguments, fused_arguments):
            for bias in (True, False):
                inputs = given(dtype, grad, has_bias=bias, residual=bias)
                torch.library.opcheck(column_conv2d, inputs, test_utils=CHECKS, **tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_in_float64(bias):
    x, weight, columns, b, _, *description = arguments(torch.float64, True)
    inputs = (x, weight, b) if bias else (x, weight)
    assert torch.autograd.gradcheck(
        lambda x, w, b=None: column_conv2d(x, w, columns, b, None, *description), inputs
    )


def test_gradients_of_what_is_fused_in_float64():
    ops = (
        PlaneOp("local_response_norm", alpha=LRN_ALPHA),
        PlaneOp("max_pool", (3, 2), (2, 1), (1, 1), True),
        PlaneOp("avg_pool", (2, 3), (1, 2), (1, 1), True, False),
    )
    for post in ((), ops, ops[::-1]):
        x, weight, columns, bias, residual, *_ = fused_arguments(torch.float64)
        weight = 30 * weight  # where the norm matters
        inputs = [y.requires_grad_() for y in (x, weight, bias, residual)]
        description = ConvSpec(GEOMETRY, Epilogue(Clamp(-60.0, 150.0), post)).pack()
        assert torch.autograd.gradcheck(
            lambda x, w, b, r, c=columns, d=description: column_conv2d(x, w, c, b, r, *d), inputs
        )


def planes(x, op):
    """An operation on planes behind a convolution that changes nothing."""
    description = ConvSpec(Geometry(1, 1, (1, 1)), Epilogue(post=(op,))).pack()
    weight, columns = torch.ones(1, 1, dtype=x.dtype), torch.zeros(1, dtype=torch.int32)
    y = column_conv2d(x.flatten(0, 1)[:, None], weight, columns, None, None, *description)
    return y.view(len(x), -1, *y.shape[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_norm_has_the_size_and_the_alpha_that_it_says(dtype):
    op = PlaneOp("local_response_norm", (5, 5), alpha=0.3)
    x = torch.randn(2, 3, 7, 9, dtype=dtype)
    sums = F.unfold(x.double().square(), 5, padding=2).unflatten(1, (3, 25)).sum(2)
    expected = x * (1 + 0.3 / 25 * sums.view(x.shape)) ** -0.75
    for y in (op(x), planes(x, op)):
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    # Its gradient in torch's forms, and in the kernels.
    double = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: planes(x, op), double)
    x.requires_grad_()
    for y in (x, double):
        planes(y, op).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), double.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["x", "weight", "bias"])
def test_a_gradient_of_one_argument_only(part):
    place = ("x", "weight", "bias").index(part)
    inputs = [arguments()[i] for i in (0, 1, 3)]
    inputs[place].requires_grad_()
    _, _, columns, _, _, *description = arguments()

    def grad(dtype):
        x, w, b = (y.to(dtype) for y in inputs)
        return torch.autograd.grad(
            column_conv2d(x, w, columns, b, None, *description).square().sum(), inputs[place]
        )[0]

    torch.testing.assert_close(grad(torch.float32), grad(torch.float64), rtol=1e-4, atol=1e-4)


def test_a_layer_trains_like_the_dense_one_under_a_mask():
    dense, compact = network(compact=False), network(compact=True)
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, 0.9) for net in (dense, compact)]
    masks = [(conv, conv.weight.detach() != 0) for conv in dense if isinstance(conv, nn.Conv2d)]
    for _ in range(8):
        x, y = torch.randn(5, 3, 8, 8), torch.randint(4, (5,))
        losses = []
        for net, optimizer in zip((dense, compact), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            if net is dense:
                for conv, mask in masks:
                    conv.weight.grad.mul_(mask)
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        with torch.no_grad():  # the handle is that of the last step's weights
            torch.testing.assert_close(compact(x), dense(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compact[0].to_dense().weight, dense[0].weight, rtol=1e-4, atol=1e-6)


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COUNT = "aot_eager"  # what is compiled is the test's matter, how inductor does it isn't


def test_one_graph_compiled_once_for_inference(fresh):
    net = network(compact=True).eval()
    counter = CompileCounterWithBackend(COUNT)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(2, 3, 8, 8)
            assert torch.equal(compiled(x), net(x))
    assert counter.frame_count == 1


def test_one_graph_compiled_once_for_training(fresh):
    net = network(compact=True)
    counter = CompileCounterWithBackend(COUNT)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8)
        both = []
        for model in (net, compiled):
            optimizer.zero_grad()
            y = model(x)
            y.square().sum().backward()
            both.append([y.detach(), *(p.grad.clone() for p in net.parameters())])
        for eager, other in zip(*both, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-6)
        optimizer.step()  # the compiled network sees the new weights
    assert counter.frame_count == 1


def test_inductor_compiles_it(fresh):
    net = ColumnConv2d.of(pruned(), RELU_POOL).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x))


def test_an_exported_program_runs():
    net = network(compact=True).eval()
    x = torch.randn(2, 3, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
        for size in (2, 5):
            x = torch.randn(size, 3, 8, 8)
            assert torch.equal(program.module()(x), net(x))
    names = {str(node.target) for node in program.graph.nodes}
    assert "spp_lightning.column_conv2d.default" in names
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, file)
        file.seek(0)
        with torch.no_grad():
            assert torch.equal(torch.export.load(file).module()(x), net(x))


TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_floating_point_type(dtype):
    conv = pruned().double()
    compact = ColumnConv2d.of(conv, RELU_POOL)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = F.max_pool2d(conv(x).relu(), 2)
    compact.to(dtype)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = compact(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCES[dtype])
    y.sum().backward()
    assert compact.weight.grad.dtype == dtype


@pytest.fixture
def packed(monkeypatch):
    """The handles that are made while the test runs."""
    made, init = [], Handle.__init__
    monkeypatch.setattr(
        Handle,
        "__init__",
        lambda self, *args, **kw: (made.append(self), init(self, *args, **kw))[1],
    )
    return made


@needs_kernels
def test_half_precision_layers_are_packed_once(packed):
    compact = ColumnConv2d.of(pruned()).bfloat16()
    with torch.no_grad():
        for _ in range(3):
            compact(torch.randn(1, 3, 8, 8, dtype=torch.bfloat16))
    assert len(packed) == 1


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool], ids=str)
def test_numbers_that_are_no_floats_are_refused(dtype):
    compact = ColumnConv2d.of(pruned())
    with torch.no_grad(), pytest.raises(ValueError, match=f"`x` must hold floating.*{dtype}"):
        compact(torch.zeros(2, 3, 64, 64, dtype=dtype))


def test_a_layer_that_changes_its_type():
    x = torch.randn(2, 3, 8, 8).bfloat16()
    compact = ColumnConv2d.of(pruned()).bfloat16()
    with torch.no_grad():
        half = compact(x)
        compact.float()  # the parameters stay the same objects
        torch.testing.assert_close(compact(x.float()), half.float(), rtol=0.01, atol=0.01)
        assert torch.equal(compact.bfloat16()(x), half)


def test_images_that_are_too_small_for_a_pool():
    compact = ColumnConv2d.of(
        pruned(), Epilogue(Clamp(0.0), (PlaneOp("max_pool", (3, 3), (2, 2)),))
    )
    for grad in (False, True):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(ValueError, match=r"too small: planes of 2 × 2 are left for a max_pool"),
        ):
            compact(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision_with_a_residual_of_another_type(dtype):
    x, weight, columns, bias, residual, *rest = fused_arguments(torch.float64)
    half = [y.to(dtype).requires_grad_() for y in (x, weight, bias)]
    inputs = [half[0], half[1], columns, half[2], residual.float().requires_grad_(), *rest]
    out = column_conv2d(*inputs)
    assert out.dtype == dtype
    grad = torch.randn(out.shape)
    out.backward(grad.to(dtype))
    exact = [y.detach().double().requires_grad_() for y in (*half, inputs[4])]
    expected = column_conv2d(exact[0], exact[1], columns, exact[2], exact[3], *rest)
    expected.backward(grad.to(dtype).double())
    for y, wide in zip((*half, inputs[4]), exact, strict=True):
        assert y.grad.dtype == y.dtype
        size = wide.grad.abs().max()
        assert float((y.grad.double() - wide.grad).abs().max() / size) < 0.01


def test_forward_derivatives():
    for epilogue in (RELU, RELU_POOL):
        compact = ColumnConv2d.of(pruned(), epilogue)
        x, tangent = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        y, found = torch.func.jvp(compact, (x,), (tangent,))
        torch.testing.assert_close(y, compact(x), rtol=1e-5, atol=1e-5)
        double = copy.deepcopy(compact).double()
        a, b = (double(x.double() + sign * 1e-6 * tangent.double()) for sign in (1, -1))
        torch.testing.assert_close(found.double(), (a - b) / 2e-6, rtol=1e-3, atol=1e-3)


def test_autocast():
    conv = pruned()
    compact = ColumnConv2d.of(conv, RELU)
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for inputs in (x, x.bfloat16()):
            with torch.no_grad():
                torch.testing.assert_close(
                    compact(inputs).float(), conv(x).relu().float(), rtol=0.02, atol=0.03
                )
            y = compact(inputs)
            y.float().square().sum().backward()
    assert compact.weight.grad.dtype == torch.float32
    assert compact.weight.grad.isfinite().all()


def test_a_single_image():
    compact = ColumnConv2d.of(pruned(), RELU)
    x, residual = torch.randn(3, 8, 8), torch.randn(8, 8, 8)
    with torch.no_grad():
        assert torch.equal(compact(x), compact(x[None])[0])
        assert torch.equal(compact(x, residual), compact(x[None], residual[None])[0])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.repeat(1, 1, 1, 2)[..., : x.shape[-1]],
        lambda x: x[:1].expand_as(x),
        lambda x: torch._neg_view(-x),
    ],
    ids=["channels last", "transposed", "window", "expanded", "negated"],
)
def test_any_layout_in_memory(change, grad):
    conv = pruned()
    compact = ColumnConv2d.of(conv)
    x, residual = change(torch.randn(2, 3, 8, 8)), change(torch.randn(2, 8, 8, 8))
    with torch.set_grad_enabled(grad):
        y, expected = compact(x, residual), conv(x) + residual
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous()


def test_without_gradients():
    conv = pruned()
    compact = ColumnConv2d.of(conv)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = compact(x)
    torch.testing.assert_close(expected, conv(x).detach(), rtol=1e-5, atol=1e-5)
    assert not expected.requires_grad
    with torch.inference_mode():
        assert torch.equal(compact(x), expected)
        # Weights without a version counter may change unseen.
        inside = ColumnConv2d.of(conv)
        assert torch.equal(inside(x), expected)
        inside.weight.mul_(2)
        inside.bias.mul_(2)
        torch.testing.assert_close(inside(x), 2 * expected)
    assert compact(x).requires_grad
    assert compact.requires_grad_(False)(x.requires_grad_()).requires_grad


def test_copies():
    conv = pruned()
    compact = ColumnConv2d.of(conv, RELU_POOL)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = compact(x)
        other = copy.deepcopy(compact)
        assert torch.equal(other(x), expected)
        other.weight.mul_(0)
        assert torch.equal(compact(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(compact))(x), expected)
        file = io.BytesIO()
        torch.save(compact.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), expected)
    assert list(compact.state_dict()) == ["weight", "bias", "columns"]


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "bias in place": lambda layer: layer.bias.add_(1),
    "copy": lambda layer: layer.weight.copy_(torch.randn_like(layer.weight)),
    "state dict": lambda layer: layer.load_state_dict(
        {name: x if name == "columns" else x + 1 for name, x in layer.state_dict().items()}
    ),
    "columns": lambda layer: layer.columns.add_(1),
    "assigned state dict": lambda layer: layer.load_state_dict(
        {name: x if name == "columns" else x + 1 for name, x in layer.state_dict().items()},
        assign=True,
    ),
    "new parameter": lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias + 1)),
    "vector to parameters": lambda layer: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in layer.parameters())), layer.parameters()
    ),
    "through half precision": lambda layer: layer.half().float(),
    "optimizer": lambda layer: (
        layer.weight.__setattr__("grad", torch.ones_like(layer.weight)),
        torch.optim.Adam(layer.parameters(), 0.1).step(),
    ),
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_weights_are_seen(change):
    layer = ColumnConv2d.of(pruned())
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
            change(layer)
            torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-5, atol=1e-5)
            if change is CHANGES["columns"]:
                layer.columns.sub_(1)
            if change is CHANGES["weight norm"]:
                break


@needs_kernels
def test_a_handle_goes_with_its_layer(packed):
    gc.collect()  # what other tests left
    before = num_weights()
    layer = ColumnConv2d.of(pruned())
    with torch.no_grad():
        layer(torch.randn(1, 3, 8, 8))
    layer(torch.randn(1, 3, 8, 8)).sum().backward()
    assert len(packed) == 1 and num_weights() == before + 1  # forward and backward
    handle = weakref.ref(packed.pop())
    del layer
    gc.collect()
    assert num_weights() == before and handle() is None


@needs_kernels
def test_a_handle_isnt_taken_for_that_of_another_tensor(packed):
    x, own_weight, columns, _, _, *description = arguments()
    gc.collect()  # what other tests left
    before = num_weights()
    for i in range(20):
        # Like as not at the place of the last ones.
        bias, weight = torch.full((6,), float(i)), own_weight + i
        expected = column_conv2d(
            x.double(), weight.double(), columns, bias.double(), None, *description
        )
        y = column_conv2d(x, weight, columns, bias, None, *description)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
        del bias, weight
    assert len(packed) == 20
    packed.clear()
    gc.collect()
    assert num_weights() == before


@needs_kernels
def test_nothing_grows_with_the_number_of_input_shapes(packed, monkeypatch):
    """1,000 image sizes: no clock is read, and no more is kept than for 32."""
    monkeypatch.setattr(time, "perf_counter", None)
    layer = ColumnConv2d.of(pruned(), RELU_POOL)
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        for height in range(8, 48):
            for width in range(8, 33):
                layer(x[..., :height, :width].contiguous())
    assert len(packed) == 1 and packed[0].num_prepared == MOST_SHAPES


@needs_kernels
def test_an_optimizers_step_packs_the_weights_once(packed):
    layer = ColumnConv2d.of(pruned())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(4):
        layer(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
    assert len(packed) == 4


@needs_kernels
def test_tuned_configs_outlive_a_change_of_the_weights():
    layer, x = ColumnConv2d.of(pruned()).requires_grad_(False), torch.randn(2, 3, 8, 8)
    expected = layer(x)
    measured = layer.tune(x)
    assert {config.kernel for config in measured} == {*EXACT}
    best = min(measured, key=measured.get)
    for _ in range(2):
        assert torch.equal(layer(x), expected)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        expected = 2 * expected
        assert layer.config_for(x) == best
    assert layer.tune(x.double()) == {}


def macs_of(layer, x, backward):
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("epilogue", [Epilogue(), RELU_POOL], ids=["alone", "fused"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
def test_flops_are_counted_as_of_a_dense_layer(epilogue, backward):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    x = torch.randn(2, 4, 9, 11, requires_grad=True)
    macs = 2 * 5 * 6 * 6 * 4 * 9 * (1 + 2 * backward)
    layer = ColumnConv2d.of(conv, epilogue)
    assert macs_of(conv, x, backward) == macs_of(layer, x, backward) == macs
    with torch.no_grad():
        conv.weight[:, 1:] = 0  # 9 of 36 columns are left
    assert macs_of(ColumnConv2d.of(conv, epilogue), x, backward) == macs // 4


class Watch(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Noted(torch.Tensor):
    """A tensor subclass that notes which functions it was given to."""

    seen = ()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen = (*cls.seen, str(func))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture
def layer():
    return ColumnConv2d.of(pruned(), RELU).requires_grad_(False)


def test_whoever_watches_torch_sees_the_operator(layer):
    x = torch.randn(2, 3, 8, 8)
    expected = layer(x)
    with Watch() as watch:
        assert torch.equal(layer(x), expected)
    assert any("column_conv2d" in name for name in watch.seen)
    Noted.seen = ()
    assert torch.equal(layer(x.as_subclass(Noted)).as_subclass(torch.Tensor), expected)
    assert any("column_conv2d" in name for name in Noted.seen)
    Noted.seen = ()
    residual = torch.zeros(2, 8, 8, 8).as_subclass(Noted)
    assert torch.equal(layer(x, residual).as_subclass(torch.Tensor), expected)
    assert any("column_conv2d" in name for name in Noted.seen)
    with FlopCounterMode(display=False):
        assert torch.equal(layer(x), expected)


def test_fake_tensors(layer):
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        y = layer(torch.empty(2, 3, 8, 8))
        assert isinstance(layer(mode.from_tensor(torch.ones(2, 3, 8, 8))), type(y))
    assert isinstance(y, torch._subclasses.FakeTensor)
    assert y.shape == (2, 8, 8, 8)
    meta = copy.deepcopy(layer).to("meta")(torch.empty(2, 3, 8, 8, device="meta"))
    assert meta.shape == (2, 8, 8, 8) and meta.is_meta


def test_make_fx_records_the_operator(layer):
    x = torch.randn(2, 3, 8, 8)
    graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    assert "column_conv2d" in graph.code
    assert torch.equal(graph(x + 1), layer(x + 1))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)
def test_a_trace_isnt_of_one_input(layer):
    x = torch.randn(2, 3, 8, 8)
    traced = torch.jit.trace(layer, (x,))
    assert torch.equal(traced(x + 1), layer(x + 1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(layer):
    x = torch.randn(3, 2, 3, 8, 8)
    y = torch.func.vmap(layer)(x)
    torch.testing.assert_close(y, torch.stack([layer(each) for each in x]))


def test_the_dispatcher_is_avoided_where_nobody_needs_it(layer, monkeypatch):
    calls, forward = [], Handle.forward
    monkeypatch.setattr(
        Handle, "forward", lambda self, *args: (calls.append(1), forward(self, *args))[1]
    )
    monkeypatch.setattr(column_conv, "column_conv2d", lambda x, *_: x.new_zeros(2, 8, 8, 8))

    def at_once(x, residual=None):
        calls.clear()
        layer(x, residual)
        return bool(calls)

    x = torch.randn(2, 3, 8, 8)
    assert at_once(x) == library.is_available()
    grown = x.clone().requires_grad_()
    assert not at_once(grown)
    assert not at_once(x, torch.zeros(2, 8, 8, 8, requires_grad=True))
    with torch.no_grad():
        assert at_once(grown) == library.is_available()
    with torch.autocast("cpu"):
        assert not at_once(x)
    for other in (x[:, :, ::2], x.mT, torch._neg_view(x)):
        assert not at_once(other)
    assert not at_once(x, torch.zeros(2, 8, 8, 8).mT)
    layer.bias.requires_grad_()
    assert not at_once(x)


@needs_kernels
def test_without_the_kernels_all_is_the_same_but_for_a_warning(without_library, monkeypatch):
    x = torch.randn(2, 3, 8, 8)
    net = network(compact=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            y = net(x)
            with torch.no_grad():
                torch.testing.assert_close(net(x), y)
        y.square().sum().backward()
    (warning,) = caught
    assert "C++ compiler" in str(warning.message) and "install -e" in str(warning.message)
    assert library.instruction_set() == "none"
    slow = [p.grad.clone() for p in net.parameters()]

    monkeypatch.undo()
    look_for_library()
    assert library.is_available()
    net.zero_grad()
    fast = net(x)
    fast.square().sum().backward()
    torch.testing.assert_close(fast, y, rtol=1e-5, atol=1e-6)
    for p, expected in zip(net.parameters(), slow, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)


def columns(*numbers, dtype=INT):
    return torch.tensor(numbers, dtype=dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        columns(0, 3, 2, 12, 23),
        columns(0, 3, 3, 12, 23),
        columns(-1, 3, 7, 12, 23),
        columns(0, 3, 7, 12, 24),
        columns(0, 3, 7, 12, 23, dtype=torch.int64),
        columns(0, 3, 7, 12, 23)[None],
    ],
    ids=["unsorted", "twice", "negative", "too great", "int64", "2-d"],
)
def test_wrong_columns(wrong):
    with pytest.raises(ValueError, match="`columns` must be"):
        ColumnConv2d(GEOMETRY, torch.zeros(3, wrong.numel()), wrong)
    with pytest.raises(ValueError, match="`columns` must be"):
        column_conv2d(*arguments(columns=wrong, weight=torch.zeros(3, wrong.shape[0])))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(2, 3, 5, 6)),
        ("x", torch.zeros(4, 5, 6)),
        ("weight", torch.zeros(2, 5)),
        ("weight", torch.zeros(3, 4)),
        ("weight", torch.zeros(6, 4, 3, 2)),
        ("bias", torch.zeros(5)),
        ("bias", torch.zeros(6, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wrong_shapes(name, value, dtype):
    with pytest.raises(ValueError, match=rf"`{name}` must be"):
        column_conv2d(*arguments(dtype, **{name: value.to(dtype)}))


def test_wrong_arguments_of_a_layer():
    geometry = Geometry(3, 8, (3, 3))
    with pytest.raises(ValueError, match=r"`geometry` must be a Geometry, got 3; .*of\(conv\)"):
        ColumnConv2d(3, 8, 3)
    with pytest.raises(ValueError, match=r"`weight` must be a tensor, got \[1\]"):
        ColumnConv2d(geometry, [1], columns(1))
    with pytest.raises(ValueError, match="`columns` must be a tensor, got 3"):
        ColumnConv2d(geometry, torch.zeros(8, 1), 3)
    with pytest.raises(ValueError, match="`weight` must be"):
        ColumnConv2d(geometry, torch.zeros(8, 2), columns(1, 2, 3))
    with pytest.raises(ValueError, match="`bias` must be"):
        ColumnConv2d(geometry, torch.zeros(8, 2), columns(1, 2), torch.zeros(7))
    with pytest.raises(ValueError, match="`padding_mode` must be 'zeros'"):
        ColumnConv2d.of(nn.Conv2d(3, 8, 3, padding_mode="reflect"))
    layer = ColumnConv2d.of(pruned(padding=0))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with pytest.raises(ValueError, match="must be at least as large as the kernel"):
                layer(torch.zeros(1, 3, 2, 8))
            with pytest.raises(ValueError, match="`x` must be"):
                layer(torch.zeros(1, 4, 8, 8))
    with torch.no_grad():
        for shape in [(1,), (1, 8, 6, 5), (8, 6, 6), (2, 8, 6, 6)]:
            with pytest.raises(ValueError, match="`residual` must be"):
                layer(torch.zeros(1, 3, 8, 8), torch.zeros(shape))


@pytest.mark.parametrize("wrong", [nn.ConvTranspose2d(3, 8, 3), nn.LazyConv2d(8, 3), None])
def test_layers_that_are_no_convolutions(wrong):
    with pytest.raises(ValueError, match=r"`conv` must be an nn\.Conv2d with weights"):
        ColumnConv2d.of(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epilogue": "relu"},
        {"clamp": (1,)},
        {"clamp": "relu"},
        {"clamp": None},
        {"post": ("max_pool",)},
        {"post": POOL},
        {"bias": "b"},
        {"bias": torch.zeros(8, dtype=torch.float64)},
        {"weight": torch.zeros(8, 2, dtype=torch.int64)},
    ],
    ids=str,
)
def test_wrong_types_of_a_layer(wrong):
    given = {"weight": torch.zeros(8, 2), "columns": columns(1, 2)} | wrong
    (name,) = wrong
    if name in ("clamp", "post"):
        given["epilogue"] = Epilogue(**{name: given.pop(name)})
    with pytest.raises(ValueError, match=f"`{name}`.* must be"):
        ColumnConv2d(Geometry(3, 8, (3, 3)), **given)


@pytest.mark.parametrize(
    "wrong", [None, "x", torch.zeros(1, 3, 8, 8, dtype=torch.float64)], ids=type
)
@pytest.mark.parametrize("grad", [False, True])
def test_wrong_inputs_of_a_layer(wrong, grad):
    layer, x = ColumnConv2d.of(pruned()), torch.zeros(1, 3, 8, 8)
    with torch.set_grad_enabled(grad):
        with pytest.raises(ValueError, match="`x` must be"):
            layer(wrong)
        with pytest.raises(ValueError, match="`x` must be on the layer's device, cpu, got meta"):
            layer(x.to("meta"))
        if wrong is not None:
            with pytest.raises(ValueError, match="`residual` must be"):
                layer(x, wrong)
        with torch.autocast("cpu"):
            y = layer(x.double() + 1)
        torch.testing.assert_close(y, layer(x + 1).to(y.dtype))


def test_empty_batches_and_layers():
    conv = pruned()
    with torch.no_grad():
        empty = nn.Conv2d(3, 8, 3, padding=1)
        empty.weight.zero_()
    for source in (conv, empty):
        for batch in (0, 2):
            x = torch.randn(batch, 3, 8, 8, requires_grad=True)
            layer = ColumnConv2d.of(source, RELU_POOL)
            y = layer(x)
            torch.testing.assert_close(y, F.max_pool2d(source(x).relu(), 2), rtol=1e-5, atol=1e-5)
            y.sum().backward()
            assert x.grad.shape == x.shape and layer.weight.grad.shape == layer.weight.shape
            with torch.no_grad():
                torch.testing.assert_close(layer(x), y)
