"""Depthwise layers: the pixel-vectorised kernel against float64 and the channel-blocked kernel."""

import pytest
import torch
from cases import Case, guarded, least, pair, tensors
from facade import EXACT, Kernel, handle, output
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from spp_lightning import native
from spp_lightning.compaction.epilogue import ACTIVATIONS, Clamp, PlaneOp
from spp_lightning.compaction.geometry import Geometry, dense_weight
from spp_lightning.compaction.kernels.cpu.cost import choose, choose_chain
from spp_lightning.compaction.spec import ConvSpec

pytestmark = pytest.mark.skipif(native.library() is None, reason="built without the kernels")


def depthwise(channels, side, stride=1, padding=None):
    """A square kernel, with the padding that keeps an image's size unless another one is given."""
    around = side // 2 if padding is None else padding
    return Geometry(
        channels, channels, (side, side), (stride, stride), (around, around), groups=channels
    )


def every(geometry):
    return tuple(range(geometry.num_columns))


@st.composite
def cases(draw):
    channels = draw(st.sampled_from([2, 3, 17, 40]))
    square = st.sampled_from([3, 3, 5, 7]).map(lambda side: (side, side))
    strides = st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 2), (1, 2), (2, 1), (3, 3)])
    geometry = Geometry(
        channels,
        channels,
        draw(square | pair(1, 4)),
        draw(strides),
        draw(pair(0, 4)),
        draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 2), (1, 3)])),
        channels,
    )
    extra = st.integers(0, 9) | st.integers(10, 60)
    size = tuple(least(geometry, axis) + draw(extra) for axis in (0, 1))
    columns = list(every(geometry))
    if draw(st.booleans()):  # channels that keep all columns, some, or none
        cut = draw(st.sets(st.sampled_from(columns))) | set(columns[: draw(st.integers(0, 20))])
        columns = [k for k in columns if k not in cut]
    activation = draw(st.sampled_from(["none", "none", *ACTIVATIONS]))
    clamp = draw(st.sampled_from([Clamp(), Clamp(0.0), Clamp(-0.5, 0.75)]))
    return Case(
        geometry,
        size,
        draw(st.sampled_from([1, 2, 3])),
        tuple(columns),
        draw(st.booleans()),
        draw(st.booleans()),
        clamp if activation == "none" else Clamp(),
        seed=draw(st.integers(0, 1000)),
        activation=activation,
    )


def check(case):
    t, g = tensors(case), case.geometry
    weight = dense_weight(t.weight.double(), t.columns, g)
    bias = None if t.bias is None else t.bias.double()
    y = F.conv2d(t.x.double(), weight, bias, g.stride, g.padding, g.dilation, g.groups)
    expected = case.epilogue(y if t.residual is None else y + t.residual.double())
    made = handle(case, t)
    first = output(made, t.x, t.residual, Kernel.PIXELS)
    assert float((first - expected).abs().max()) < 1e-5 * max(float(expected.abs().max()), 1.0)
    for kernel in EXACT:
        for threads in (1, 2, 3):
            assert torch.equal(output(made, t.x, t.residual, kernel, threads), first)
    for i, alone in enumerate(first):  # whatever lies behind an image, and how it is aligned
        x, residual = (
            None if y is None else guarded(y[i : i + 1], torch.nan) for y in (t.x, t.residual)
        )
        assert torch.equal(output(made, x, residual, Kernel.PIXELS)[0], alone)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(cases())
def test_outputs_are_a_dense_convolutions_whatever_kernel_threads_and_batch(case):
    check(case)


WIDE, SMALL = depthwise(3, 3), depthwise(40, 5, 2)
CASES = {
    "planes in strips": Case(WIDE, (70, 75), 2, every(WIDE), clamp=Clamp(0.0)),
    "planes in strips, some columns": Case(WIDE, (75, 70), 1, every(WIDE)[::2], residual=True),
    "several planes at once": Case(SMALL, (14, 14), 3, every(SMALL), activation="hardswish"),
    "fewer channels than threads": Case(depthwise(2, 7), (23, 19), 1, every(depthwise(2, 7))),
    "one pixel": Case(depthwise(17, 3, 2), (1, 1), 2, every(depthwise(17, 3, 2)), residual=True),
    "one row": Case(depthwise(5, 5), (1, 50), 2, every(depthwise(5, 5)), activation="silu"),
    "one column": Case(depthwise(5, 3), (67, 1), 2, every(depthwise(5, 3))),
    "a stride of 2 without padding": Case(depthwise(4, 3, 2, 0), (33, 34), 1, tuple(range(36))),
    "padding wider than a vector": Case(depthwise(3, 3, 1, 21), (4, 5), 1, tuple(range(27))),
    "a stride too wide for scratch": Case(depthwise(3, 3, 200, 150), (310, 20), 1, (0, 4, 13, 26)),
    "a pool": Case(WIDE, (9, 40), 1, every(WIDE), post=(PlaneOp("max_pool", (2, 2), (2, 2)),)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_instruction_set(case, isa):
    check(case)


def test_a_nan_goes_where_torch_takes_it(isa):
    case = Case(WIDE, (20, 21), 2, every(WIDE))
    t = tensors(case)
    for pixel in [(0, 0, 0, 0), (1, 2, 19, 20), (0, 1, 7, 16), (1, 0, 12, 0)]:
        t.x[pixel] = torch.nan
    weight = dense_weight(t.weight, t.columns, WIDE)
    expected = F.conv2d(t.x, weight, t.bias, padding=1, groups=3).isnan()
    assert torch.equal(output(handle(case, t), t.x, None, Kernel.PIXELS).isnan(), expected)


def test_blocks_of_mobile_networks_may_be_one_call():
    """Between two stages of this one lie 384·56·56 numbers, each channel once."""
    expand, project = Geometry(24, 384, (1, 1)), Geometry(384, 24, (1, 1))
    layers = [
        (ConvSpec(g), g.num_columns)
        for g in (expand, depthwise(384, 3), depthwise(384, 3), project)
    ]
    assert choose_chain(layers, (1, 24, 56, 56), 1).possible
    assert not choose_chain(layers, (1, 24, 112, 112), 1).possible


def test_a_depthwise_layer_alone_is_pixel_vectorised():
    for side, stride, channels, size in ((3, 1, 72, 56), (5, 2, 672, 14), (3, 2, 64, 112)):
        g = depthwise(channels, side, stride)
        shape = (1, channels, size, size)
        for kept in (g.num_columns, g.num_columns // 4):
            choice = choose(ConvSpec(g), kept, shape, torch.float32, 1)
            assert choice.config.kernel == Kernel.PIXELS
