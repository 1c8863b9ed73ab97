"""The kernels' activation functions against exact ones, number by number."""

import pytest
import torch
from facade import EXACT, Kernel, output
from torch import nn

from spp_lightning import native
from spp_lightning.compaction.epilogue import ACTIVATIONS, Clamp, Epilogue
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.spec import ConvSpec

pytestmark = pytest.mark.skipif(native.library() is None, reason="built without the kernels")

FUNCTIONS = [name for name in ACTIVATIONS if name != "none"]
HALF_ULP = 2**-24  # of numbers from 1 to 2: how far rounding alone moves them


def identity(activation: str) -> Handle:
    """A layer that passes its input on to the activation."""
    weight, columns = torch.ones(1, 1), torch.zeros(1, dtype=torch.int32)
    spec = ConvSpec(Geometry(1, 1, (1, 1)), Epilogue(activation=activation))
    made = Handle(weight, columns, None, spec)
    made.tensors = weight, columns  # a handle holds its tensors weakly
    return made


def numbers() -> torch.Tensor:
    """Every size from 1e-8 to 1e30, dense where the functions bend, in rows of an odd length."""
    spread = torch.logspace(-8, 30, 2000)
    near = torch.cat([torch.linspace(-12, 12, 60_001), torch.linspace(-100, 100, 20_001)])
    every = torch.cat([spread, -spread, near, torch.zeros(1)])
    return every[: len(every) // 9 * 9].view(1, 1, -1, 9)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_errors_are_four_roundings_at_most(activation, isa):
    x = numbers()
    exact = Epilogue(activation=activation)(x.double())
    first, *others = (output(identity(activation), x, None, kernel) for kernel in EXACT)
    assert all(torch.equal(first, other) for other in others)
    # Where the function is nearly 0, an error of the input's size is what float32 allows.
    size = torch.maximum(exact.abs(), x.double().abs().clamp(max=1))
    assert float(((first - exact).abs() / (HALF_ULP * size + 1e-37)).max()) < 4


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_a_nan_stays_one(activation, isa):
    x = torch.full((1, 1, 2, 9), torch.nan)
    assert all(output(identity(activation), x, None, kernel).isnan().all() for kernel in EXACT)


@pytest.mark.parametrize("kernel", [Kernel.PIXELS, Kernel.CHANNELS, Kernel.WINOGRAD_4])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_the_activation_follows_the_residual(activation, kernel):
    torch.manual_seed(0)
    conv, epilogue = nn.Conv2d(20, 24, 3, padding=1), Epilogue(activation=activation)
    layer = ColumnConv2d.of(conv, epilogue)
    made = Handle(layer.weight, layer.columns, layer.bias, layer.spec)
    x, residual = torch.randn(2, 20, 9, 11), torch.randn(2, 24, 9, 11)
    with torch.no_grad():
        for added in (None, residual):
            expected = epilogue(conv(x), added)
            assert torch.allclose(output(made, x, added, kernel), expected, atol=2e-5)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_gradients(activation):
    torch.manual_seed(0)
    conv, epilogue = nn.Conv2d(3, 5, 3), Epilogue(activation=activation)
    layer, x = ColumnConv2d.of(conv, epilogue), torch.randn(2, 3, 6, 6, requires_grad=True)
    grad = torch.randn(2, 5, 4, 4)
    found = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)
    expected = torch.autograd.grad(epilogue(conv(x)), (x, conv.weight, conv.bias), grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.flatten(), theirs.flatten(), atol=1e-5)


def test_gradients_through_the_operator():
    # As torch.compile sees the layer: all of it in one call.
    torch.manual_seed(0)
    epilogue = Epilogue(activation="silu")
    layer, x = ColumnConv2d.of(nn.Conv2d(3, 5, 3), epilogue), torch.randn(2, 3, 6, 6)
    conv, x = layer.to_dense(), x.requires_grad_()
    tensors = (layer.weight, layer.columns, layer.bias, None)
    y = torch.ops.spp_lightning.column_conv2d(x, *tensors, *layer.spec.pack())
    (found,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(epilogue(conv(x)).sum(), x)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_clamp_beside_an_activation_is_refused():
    with pytest.raises(ValueError, match=r"`activation` \(='silu'\) must be 'none'"):
        Epilogue(Clamp(0.0), activation="silu").check()
    with pytest.raises(ValueError, match="`activation` must be one of none, sigmoid"):
        Epilogue(activation="swish").check()
