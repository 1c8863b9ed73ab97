"""The C interface: what doesn't fit is refused before a kernel runs, and errors say why."""

import ctypes

import pytest
import torch

from spp_lightning import native
from spp_lightning.compaction.epilogue import RELU
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.kernels.cpu import library
from spp_lightning.compaction.kernels.cpu.chain import ChainHandle, Linear
from spp_lightning.compaction.kernels.cpu.config import Kernel, KernelConfig
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.spec import ConvSpec

pytestmark = pytest.mark.skipif(native.library() is None, reason="built without the kernels")

GEOMETRY = Geometry(2, 3, (3, 3), padding=(1, 1))
COLUMNS = torch.arange(18, dtype=torch.int32)
X = torch.randn(2, 2, 5, 6)


def made() -> Handle:
    return Handle(torch.randn(3, 18), COLUMNS, torch.randn(3), ConvSpec(GEOMETRY, RELU))


@pytest.mark.parametrize("kernel", [k for k in Kernel if k != Kernel.PAIRS], ids=str)
def test_tensors_of_other_sizes_are_refused(kernel):
    handle = made()
    how = handle.prepare(X.shape, X.dtype, KernelConfig(kernel, 1))
    out = torch.empty(how.out_shape)
    cases = {
        "`input` must have 120 numbers, got 60.": (X[:1], None, out),
        "`residual` must have 180 numbers, got 1.": (X, torch.zeros(1), out),
        "`output` must have 180 numbers, got 90.": (X, None, out[:1]),
    }
    for message, tensors in cases.items():
        with pytest.raises(ValueError) as raised:
            handle.run(how, *tensors)
        assert str(raised.value) == message


def test_gradients_of_other_sizes_are_refused():
    handle, weight, grad = made(), torch.randn(3, 18), torch.randn(2, 3, 5, 6)
    how = handle.prepare(X.shape, X.dtype, KernelConfig(Kernel.PIXELS, 1))
    outs = (torch.empty_like(X), torch.empty_like(weight), torch.empty(3))
    right = {"weight": weight, "x": X, "grad": grad}
    names = {"weight": "weight", "x": "input", "grad": "grad"}
    for name, tensor in right.items():
        tensors = right | {name: tensor[:1]}
        with pytest.raises(ValueError, match=f"`{names[name]}` must have {tensor.numel()}"):
            handle.run_backward(how, tensors["grad"], tensors["weight"], tensors["x"], True, outs)
    for i, name in enumerate(("grad_input", "grad_weight", "grad_bias")):
        short = [y[:1] if n == i else y for n, y in enumerate(outs)]
        with pytest.raises(ValueError, match=f"`{name}` must have"):
            handle.run_backward(how, grad, weight, X, True, short)


def test_a_linear_layer_that_was_given_a_shorter_bias_is_refused():
    linear = Linear(torch.randn(4, 90), torch.randn(4))
    chain = ChainHandle([made()], linear)
    prepared = chain.prepare(tuple(X.shape), 1)
    linear._native.bias_count = 1
    with pytest.raises(ValueError, match=r"`bias` must have 4 numbers, got 1\."):
        chain.at_once(prepared, X, None)
    with pytest.raises(ValueError, match=r"`bias` must have 4 numbers, got 1\."):
        linear(torch.randn(2, 3, 5, 6))


def test_configs_that_a_plan_has_no_kernel_for_are_refused():
    other = Handle(
        torch.randn(3, 18), COLUMNS, None, ConvSpec(GEOMETRY._replace(stride=(2, 2)), RELU)
    )
    how = other.prepare(X.shape, X.dtype, KernelConfig(Kernel.WINOGRAD_4, 1))
    with pytest.raises(ValueError, match="Winograd's kernels compute 3×3 layers"):
        other.run(how, X, None, torch.empty(how.out_shape))
    how = other.prepare(X.shape, X.dtype, KernelConfig(Kernel.PIXELS, 1))
    how.native.conv_height = 5
    with pytest.raises(ValueError, match="The convolution makes 3 of 5 pixels along axis 0, not 5"):
        other.run(how, X, None, torch.empty(how.out_shape))


def test_an_unknown_instruction_set_is_unsupported():
    with pytest.raises(NotImplementedError, match="has no instruction set `none`"):
        library.library().spp_set_isa(b"none")


def test_a_library_of_other_sources_is_refused():
    class Other:
        def __getattr__(self, name):
            return getattr(native.library(), name)

        @staticmethod
        def spp_struct_size(index):
            return 8

    with pytest.raises(RuntimeError, match="built of other sources"):
        library._declare(Other())
    assert ctypes.sizeof(library.NativeConfig) == native.library().spp_struct_size(2)
