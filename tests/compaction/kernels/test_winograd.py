"""Winograd's minimal filtering: the kernels against float64, and where they are used."""

import math

import pytest
import torch
from cases import NORM, SIZES, Case, kept, pair, pools, tensors
from facade import EXACT, WINOGRAD, Kernel, assert_writes, handle, output
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning import compact
from spp_lightning.compaction import ColumnConv2d
from spp_lightning.compaction.epilogue import RELU, Clamp, PlaneOp
from spp_lightning.compaction.geometry import Geometry, dense_weight
from spp_lightning.compaction.kernels.cpu import library, winograd
from spp_lightning.compaction.kernels.cpu.chain import ChainHandle
from spp_lightning.compaction.kernels.cpu.handle import Handle

pytestmark = pytest.mark.skipif(not library.is_available(), reason="built without the kernels")

LARGE = Geometry(64, 64, (3, 3), padding=(1, 1))
SIDES = {4: 1e-5, 2: 2e-6}  # outputs of a tile, per side, and the error they may have


def check(case: Case) -> None:
    t, g = tensors(case), case.geometry
    full = dense_weight(t.weight.double(), t.columns, g)
    bias = None if t.bias is None else t.bias.double()
    y = F.conv2d(t.x.double(), full, bias, padding=g.padding)
    if t.residual is not None:
        y = y + t.residual
    scale = max(1e-3, float(y.abs().max())) if y.numel() else 1.0  # by which sums are rounded
    y = y.clamp(*case.clamp)
    for op in case.post:
        y = op(y)
    made = handle(case, t)
    for side, error in SIDES.items():
        kernel = WINOGRAD[side]
        first, *others = (output(made, t.x, t.residual, kernel, n) for n in (1, 2, 3, 5))
        assert first.shape == y.shape and not first.isnan().any()
        assert float((first - y).abs().max() if y.numel() else 0) < error * scale
        assert all(torch.equal(first, other) for other in others)


@st.composite
def cases(draw):
    few = st.integers(1, 9) | st.sampled_from([16, 17, 33, 70])
    geometry = Geometry(draw(few), draw(few), (3, 3), padding=draw(pair(0, 4)))
    low = [max(1, 3 - 2 * padding) for padding in geometry.padding]
    extra = st.integers(0, 12) | st.sampled_from([15, 29, 47])
    size = tuple(n + draw(extra) for n in low)
    ops, out = [], geometry.out_size(*size)
    for _ in range(draw(st.integers(0, 2))):
        ops.append(draw(pools(out)))
        out = ops[-1].out_size(*out)
    columns = draw(st.just(tuple(range(geometry.num_columns))) | kept(geometry))
    clamp = draw(st.sampled_from([Clamp(), Clamp(0.0), Clamp(-0.5, 0.75)]))
    flags = draw(st.booleans()), draw(st.booleans())
    batch, seed = draw(st.sampled_from([0, 1, 2, 5])), draw(st.integers(0, 1000))
    return Case(geometry, size, batch, columns, *flags, clamp, tuple(ops), seed)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(cases())
def test_outputs_are_a_dense_convolutions_whatever_the_threads(case):
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(LARGE._replace(filters=80), (30, 23), 3, tuple(range(0, 576, 2)), residual=True),
        Case(LARGE, (64, 48), 1, tuple(range(576)), clamp=Clamp(0.0)),  # several blocks
        Case(Geometry(20, 7, (3, 3)), (3, 70), 2, tuple(range(9, 180)), post=(NORM,)),
        Case(
            Geometry(5, 36, (3, 3), padding=(2, 0)),
            (9, 17),
            2,
            tuple(range(45)),
            clamp=Clamp(0.0, 2.0),
            post=(PlaneOp("max_pool", (3, 3), (2, 2), ceil_mode=True),),
        ),
    ],
    ids=["residual", "blocks", "one row of tiles", "pool"],
)
def test_every_instruction_set(case, isa):
    check(case)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_large_outputs_are_those_of_single_images(size, isa):
    """AVX-512 writes them by non-temporal stores where addresses are aligned; not one image."""
    case = Case(LARGE._replace(channels=5), size, 5, tuple(range(45)))
    t = tensors(case)
    made = handle(case, t, RELU)
    for kernel in WINOGRAD.values():
        expected = torch.cat([output(made, x[None].contiguous(), None, kernel) for x in t.x])
        assert expected.nbytes > 4 * 2**20 > expected[0].nbytes
        for threads in (1, 2, 3):
            assert_writes(made, t.x, kernel, threads, expected)


@pytest.mark.parametrize(
    ("side", "rows", "cols"), [(4, slice(0, 8), slice(4, 12)), (2, slice(2, 6), slice(6, 10))]
)
def test_what_is_no_number_reaches_its_tiles_at_most(side, rows, cols):
    case = Case(LARGE._replace(channels=4, filters=9), (12, 20), 2, tuple(range(36)), bias=False)
    t = tensors(case)
    made = handle(case, t)
    clean = output(made, t.x, None, WINOGRAD[side])
    t.x[1, 2, 3, 8] = math.nan
    out = output(made, t.x, None, WINOGRAD[side])
    reached = torch.zeros(2, 9, 12, 20, dtype=torch.bool)
    reached[1, :, rows, cols] = True  # the tiles that read it
    assert out[1, :, 2:5, 7:10].isnan().all()
    assert torch.equal(out[~reached], clean[~reached])


# --- where they are used ---


def kernel_of(made: Handle, x: Tensor) -> Kernel:
    return made.config_for(x.shape, x.dtype, torch.get_num_threads()).kernel


def made_of(geometry: Geometry, share: float) -> Handle:
    case = Case(geometry, (56, 56), 1, tuple(range(round(share * geometry.num_columns))))
    return handle(case, tensors(case))


@pytest.mark.parametrize(
    ("change", "share", "size", "side"),
    [
        ({}, 1.0, 56, 4),
        ({}, 0.5, 56, 4),
        ({}, 0.25, 56, None),
        ({"channels": 512, "filters": 512}, 1.0, 7, 2),
        ({"channels": 512, "filters": 512}, 0.75, 7, None),
        ({}, 1.0, 4, None),
        ({"channels": 3}, 1.0, 56, None),
        ({"stride": (1, 2)}, 1.0, 56, None),
        ({"dilation": (2, 1)}, 1.0, 56, None),
        ({"groups": 2}, 1.0, 56, None),
        ({"kernel_size": (3, 5)}, 1.0, 56, None),
    ],
)
def test_it_is_used_where_it_is_faster(change, share, size, side):
    geometry = LARGE._replace(**change)
    kernel = kernel_of(made_of(geometry, share), torch.empty(1, geometry.channels, size, size))
    if side is None:
        assert kernel in EXACT
    else:
        assert kernel == WINOGRAD[side]


def test_only_for_float32():
    made = made_of(LARGE, 1.0)
    assert kernel_of(made, torch.randn(1, 64, 56, 56).bfloat16()) in EXACT


def test_the_choice_depends_on_no_batch():
    """An image's output is the same bit for bit, alone or in a batch."""
    made, x = made_of(LARGE, 1.0), torch.randn(3, 64, 28, 28)
    assert torch.equal(made.forward(x), torch.cat([made.forward(one[None]) for one in x]))


def test_tuning_leaves_them_alone():
    """They round otherwise: a clock must not choose between them and other kernels."""
    for share, kernels in ((1.0, {Kernel.WINOGRAD_4}), (0.2, {*EXACT})):
        made, x = made_of(LARGE, share), torch.randn(1, 64, 28, 28)
        before = made.forward(x)
        assert {config.kernel for config in made.tune(x)} == kernels
        assert torch.equal(made.forward(x), before)


def test_a_chain_leaves_them_to_their_own_kernels():
    chain = ChainHandle([made_of(LARGE, share) for share in (0.2, 1.0)])
    threads = torch.get_num_threads()
    for size, ways in ((4, {0, 1, threads}), (56, {0})):  # 0: one layer at a time
        x = torch.randn(1, 64, size, size)
        assert chain.choice(tuple(x.shape), threads).possible == (len(ways) > 1)
        assert torch.equal(chain.forward(x), chain.one_by_one(x, None))
        assert chain.tune(x).keys() == ways
        assert torch.equal(chain.forward(x), chain.one_by_one(x, None))


def test_an_unpruned_network_gets_faster_layers():
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.randn(2, 32, 32, 32)
    layer = next(m for m in compact(net, x).modules() if isinstance(m, ColumnConv2d))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), net(x), rtol=1e-4, atol=1e-5)
    assert winograd.tile_side(layer.geometry, len(layer.columns), (32, 32)) == 4


@pytest.mark.parametrize(("size", "side"), [(24, 4), (14, 2)])
def test_training_differentiates_what_it_computes(size, side):
    layer = ColumnConv2d.of(nn.Conv2d(32, 48, 3, padding=1), RELU)
    conv = nn.Conv2d(32, 48, 3, padding=1).double()
    conv.load_state_dict({"weight": layer.weight.view(48, 32, 3, 3), "bias": layer.bias})
    x = torch.randn(2, 32, size, size)
    assert winograd.tile_side(layer.geometry, len(layer.columns), (size, size)) == side
    for step in range(2):  # the weights of the second one are new
        for net, inputs in ((layer, x), (conv, x.double())):
            net.zero_grad()
            (net(inputs).relu() ** 2).mean().backward()
        expected = conv.weight.grad.flatten(1)
        error = (layer.weight.grad - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, step
        with torch.no_grad():
            for net in (layer, conv):
                net.weight.mul_(1.5)
