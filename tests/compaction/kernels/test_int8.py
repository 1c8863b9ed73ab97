"""The int8 kernels against exact integers: every instruction set makes the same bits."""

import math
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from spp_lightning import native
from spp_lightning.compaction.geometry import Geometry, dense_weight
from spp_lightning.compaction.int8_spec import Int8Spec, TensorScale
from spp_lightning.compaction.kernels.cpu import int8
from spp_lightning.compaction.kernels.cpu.library import library

pytestmark = pytest.mark.skipif(native.library() is None, reason="built without the kernels")

SETS = (
    "base",
    "avx2",
    "avx_vnni",
    "avx512_vnni",
    "amx",
    "avx_vnni_emulated",
    "avx512_vnni_emulated",
    "amx_emulated",
)
UNLIMITED = (-math.inf, math.inf)


@pytest.fixture(params=SETS)
def isa(request):
    """Each int8 kernel that this machine runs; those with VPDPBUSD or AMX run emulated anywhere."""
    try:
        library().spp_int8_set_isa(request.param.encode())
    except NotImplementedError:
        pytest.skip(f"no {request.param} here")
    yield request.param
    library().spp_int8_set_isa(b"")


def reference(spec, weight, columns, weight_scale, bias, x, residual):
    """Sums in float64, which holds them exactly; then one rounding to float32 per operation."""

    def float32(number):
        return torch.tensor(number, dtype=torch.float32)

    g = spec.geometry
    wide = dense_weight(weight, columns, g).double()
    shifted = x.double() - spec.input.zero_point  # so that padding with zeros is right
    acc = F.conv2d(shifted, wide, None, g.stride, g.padding, g.dilation, g.groups)
    v = acc.float() * (float32(spec.input.scale) * weight_scale).view(1, -1, 1, 1)
    if bias is not None:
        v = v + bias.view(1, -1, 1, 1)
    if residual is not None:
        v = v + (residual.float() - spec.residual.zero_point) * float32(spec.residual.scale)
    v = v.clamp(*spec.clamp)
    if spec.output is None:
        return v
    t = v * (1 / float32(spec.output.scale))
    return (t.double().round() + spec.output.zero_point).clamp(0, 255).to(torch.uint8)


def drawn_geometry(r):
    groups = r.choice([1, 1, 1, 2, 3])
    channels, filters = r.choice([1, 2, 3, 8, 16, 40]), r.choice([1, 2, 5, 6, 7, 8, 16, 33])
    kernel = r.choice([(1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (1, 3), (7, 7)])
    same = (kernel[0] // 2, kernel[1] // 2)
    return Geometry(
        channels * groups,
        filters * groups,
        kernel,
        r.choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 1)]),
        r.choice([(0, 0), same, (r.randrange(4), r.randrange(4))]),
        r.choice([(1, 1), (1, 1), (2, 1)]),
        groups,
    )


def drawn_layer(r):
    """A random layer: the description, the tensors of its handle, an input and a residual."""
    g, generator = drawn_geometry(r), torch.Generator().manual_seed(r.randrange(2**32))

    def integers(low, high, dtype, *shape):
        drawn = torch.randint(low, high + 1, shape, generator=generator)
        if saturated:
            drawn = torch.where(drawn > (low + high) // 2 - shift, high, low)
        return drawn.to(dtype)

    saturated, shift = r.random() < 0.3, r.choice([0, 0, 100, -100])
    count = r.choice([0, 1, g.num_columns, r.randint(0, g.num_columns)])
    columns = torch.tensor(sorted(r.sample(range(g.num_columns), count)), dtype=torch.int32)
    reach = [d * (k - 1) + 1 for d, k in zip(g.dilation, g.kernel_size, strict=True)]
    least = [max(1, n - 2 * p) for n, p in zip(reach, g.padding, strict=True)]
    size = [n + r.choice([0, 1, r.randrange(30)]) for n in least]
    batch = r.choice([0, 1, 1, 2, 3])

    def scale(*choices):
        return TensorScale(r.choice(choices), r.choice([0, 255, r.randrange(256)]))

    spec = Int8Spec(
        g,
        scale(0.01, 0.1),
        scale(0.01, 1.0, 10.0) if r.random() < 0.7 else None,
        scale(0.3) if r.random() < 0.5 else None,
        r.choice([UNLIMITED, (0, math.inf), (0, 6.0)]),
    )
    out = (batch, g.filters, *g.out_size(*size))
    residual = integers(0, 255, torch.uint8, *out) if spec.residual is not None else None
    x = integers(0, 255, torch.uint8, batch, g.channels, *size)
    tensors = (
        integers(-128, 127, torch.int8, g.filters // g.groups, count),
        columns,
        torch.rand(g.filters, generator=generator) * 0.01 + 1e-4,
        torch.randn(g.filters, generator=generator) if r.random() < 0.7 else None,
    )
    return spec, tensors, x, residual


@pytest.mark.parametrize("seed", range(4))
def test_random_layers_are_exact(isa, seed):
    r, before = random.Random(seed), torch.get_num_threads()
    try:
        for number in range(40):
            spec, tensors, x, residual = drawn_layer(r)
            torch.set_num_threads(r.choice([1, 2]))
            handle = int8.Int8Handle(*tensors, spec)
            assert handle.instruction_set == isa
            found = handle.run(x, residual)
            expected = reference(spec, *tensors, x, residual)
            assert torch.equal(found, expected), (number, spec, x.shape)
            assert found.dtype == expected.dtype
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pixels", [1, 2, 3, 4, 5, 17, 33, 35])
def test_few_pixels_behind_whole_vectors(isa, pixels):
    generator = torch.Generator().manual_seed(pixels)
    count, filters = 1601, 31  # more than two panels, and no whole number of tiles
    geometry, columns = Geometry(count, filters, (1, 1)), torch.arange(count, dtype=torch.int32)
    spec = Int8Spec(geometry, TensorScale(0.1, 99), TensorScale(40.0, 3), TensorScale(0.3, 200))
    weight = torch.randint(-127, 128, (filters, count), generator=generator).to(torch.int8)
    tensors = (weight, columns, torch.rand(filters, generator=generator), None)
    x = torch.randint(0, 256, (1, count, 1, pixels), generator=generator).to(torch.uint8)
    residual = torch.randint(0, 256, (1, filters, 1, pixels), generator=generator).to(torch.uint8)
    handle = int8.Int8Handle(*tensors, spec)
    assert handle.instruction_set == isa
    assert torch.equal(handle.run(x, residual), reference(spec, *tensors, x, residual))


@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("pixel", [0, 255])
def test_the_largest_sums_do_not_overflow(isa, weight, pixel):
    channels = 65535  # the most columns
    spec = Int8Spec(Geometry(channels, 1, (1, 1)), TensorScale(1.0, 255 - pixel))
    columns = torch.arange(channels, dtype=torch.int32)
    weights = torch.full((1, channels), weight, dtype=torch.int8)
    made = int8.Int8Handle(weights, columns, torch.ones(1), None, spec)
    x = torch.full((1, channels, 2, 5), pixel, dtype=torch.uint8)
    exact = channels * weight * (2 * pixel - 255)
    assert made.run(x).double().eq(torch.tensor(exact, dtype=torch.float32).double()).all()


def test_halves_are_rounded_to_the_even_number(isa):
    # Sums of 0 to 9 in steps of half a unit of the output.
    spec = Int8Spec(Geometry(1, 1, (1, 1)), TensorScale(0.5), TensorScale(1.0, 3))
    one = torch.ones(1, 1, dtype=torch.int8)
    columns = torch.zeros(1, dtype=torch.int32)
    made = int8.Int8Handle(one, columns, torch.ones(1), None, spec)
    x = torch.arange(10, dtype=torch.uint8).view(1, 1, 2, 5)
    assert made.run(x).flatten().tolist() == [3, 3, 4, 5, 5, 5, 6, 7, 7, 7]


def test_padding_is_the_real_number_zero(isa):
    # All pixels are the zero point: whatever the window holds of the padding, the output is 0.
    g = Geometry(2, 3, (3, 3), padding=(2, 1))
    spec = Int8Spec(g, TensorScale(0.5, 77))
    columns = torch.arange(18, dtype=torch.int32)
    weight = torch.arange(-27, 27, dtype=torch.int8).view(3, 18)
    made = int8.Int8Handle(weight, columns, torch.ones(3), None, spec)
    assert not made.run(torch.full((1, 2, 5, 6), 77, dtype=torch.uint8)).any()


GEOMETRY = Geometry(2, 3, (3, 3), padding=(1, 1))
SPEC = Int8Spec(GEOMETRY, TensorScale(0.1, 3), TensorScale(0.2), TensorScale(0.3))
COLUMNS = torch.arange(18, dtype=torch.int32)
WEIGHT = torch.ones(3, 18, dtype=torch.int8)
X = torch.zeros(2, 2, 5, 6, dtype=torch.uint8)
RESIDUAL = torch.zeros(2, 3, 5, 6, dtype=torch.uint8)


def made(spec=SPEC, **changed):
    tensors = {"weight": WEIGHT, "columns": COLUMNS, "weight_scale": torch.ones(3), "bias": None}
    return int8.Int8Handle(**(tensors | changed), spec=spec)


@pytest.mark.parametrize(
    ("x", "residual", "message"),
    [
        (X[0], RESIDUAL, r"`x` must be of shape \(B, 2, H, W\)"),
        (X[:, :1], RESIDUAL, r"`x` must be of shape \(B, 2, H, W\)"),
        (X.float(), RESIDUAL, "`x` must be uint8 and contiguous"),
        (X.mT, RESIDUAL.mT, "`x` must be uint8 and contiguous"),
        (X, None, "`residual` must be a tensor"),
        (X, RESIDUAL[:1], "`residual` must be of shape"),
        (X, RESIDUAL.to(torch.int8), "`residual` must be uint8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(x, residual, message):
    with pytest.raises(ValueError, match=message):
        made().run(x, residual)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": WEIGHT.int()}, "`weight` must be torch.int8"),
        ({"weight": WEIGHT[:, :4]}, r"`weight` must be of shape \(3, 18\)"),
        ({"columns": COLUMNS + 1}, "`columns` must be ascending"),
        ({"weight_scale": torch.ones(2)}, "`weight_scale` must be of shape"),
        ({"weight_scale": torch.full((3,), math.inf)}, "`multiplier` must be finite"),
        ({"bias": torch.full((3,), math.nan)}, "`bias` must be finite"),
        ({"spec": SPEC._replace(input=TensorScale(0.1, 256))}, "The zero point of `input`"),
        ({"spec": SPEC._replace(output=TensorScale(0.0))}, "The scale of `output`"),
        ({"spec": SPEC._replace(clamp=(1.0, 0.0))}, "`clamp` must be two limits in order"),
    ],
)
def test_layers_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        made(**changed)


def test_too_many_columns_are_refused():
    spec = Int8Spec(Geometry(65536, 1, (1, 1)), TensorScale(1.0))
    columns = torch.arange(65536, dtype=torch.int32)
    weight = torch.zeros(1, 65536, dtype=torch.int8)
    with pytest.raises(ValueError, match="at most 65535 columns"):
        int8.Int8Handle(weight, columns, torch.ones(1), None, spec)


def test_the_library_checks_sizes_by_itself():
    handle = made()
    handle.run(X, RESIDUAL)
    address = handle.prepared_for(X.shape, 1).address
    right = {"input": X, "residual": RESIDUAL, "output": torch.zeros_like(RESIDUAL)}
    for name, tensor in right.items():
        given = right | {name: tensor[:1]}
        numbers = [n for t in given.values() for n in (t.data_ptr(), t.numel())]
        with pytest.raises(ValueError, match=f"`{name}` must have {tensor.numel()} numbers"):
            library().spp_int8_forward(handle.address, address, *numbers)


def test_at_most_32_input_shapes_stay_prepared():
    handle = made(SPEC._replace(residual=None))
    for width in range(1, 41):
        handle.run(torch.zeros(1, 2, 3, width, dtype=torch.uint8))
    assert handle.num_prepared == 32


@pytest.mark.parametrize("quantised", [True, False], ids=["uint8", "float32"])
def test_small_images_that_are_computed_as_one_are_those_alone(isa, quantised):
    geometry, size = Geometry(12, 7, (1, 1)), (1, 3)
    output = TensorScale(0.2, 9) if quantised else None
    spec = Int8Spec(geometry, TensorScale(0.1, 3), output, TensorScale(0.3, 200))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (7, 12), generator=generator).to(torch.int8)
    columns = torch.arange(12, dtype=torch.int32)
    handle = int8.Int8Handle(weight, columns, torch.rand(7, generator=generator), None, spec)
    x = torch.randint(0, 256, (9, 12, *size), generator=generator).to(torch.uint8)
    residual = torch.randint(0, 256, (9, 7, *size), generator=generator).to(torch.uint8)
    alone = [handle.run(x[i : i + 1], residual[i : i + 1]) for i in range(9)]
    assert torch.equal(handle.run(x, residual), torch.cat(alone))


def test_sums_of_int16_do_not_saturate(isa):
    # All weights and pixels of one sign are the worst: no order of the columns helps.
    for weight in (-128, 127):
        spec = Int8Spec(Geometry(23, 2, (1, 1)), TensorScale(1.0))
        weights = torch.full((2, 23), weight, dtype=torch.int8)
        columns = torch.arange(23, dtype=torch.int32)
        handle = int8.Int8Handle(weights, columns, torch.ones(2), None, spec)
        x = torch.full((1, 23, 5, 7), 255, dtype=torch.uint8)
        assert (handle.run(x) == 23 * 255 * weight).all()


@pytest.mark.parametrize("filters", [16, 17, 33, 80])
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 768, 1100])
@pytest.mark.parametrize("pixels", [1, 16, 17, 33])
def test_tiles_of_amx_at_their_edges(filters, columns, pixels):
    # A tile has 16 filters, 64 columns or 16 pixels; a panel 1024 columns, a block 64 filters.
    generator = torch.Generator().manual_seed(0)
    spec = Int8Spec(Geometry(columns, filters, (1, 1)), TensorScale(0.01, 7), TensorScale(2.0, 90))
    weight = torch.randint(-128, 128, (filters, columns), generator=generator).to(torch.int8)
    scale = torch.rand(filters, generator=generator)
    tensors = weight, torch.arange(columns, dtype=torch.int32), scale, None
    x = torch.randint(0, 256, (1, columns, 1, pixels), generator=generator).to(torch.uint8)
    found = []
    try:
        for name in ("amx_emulated", "base"):
            library().spp_int8_set_isa(name.encode())
            found.append(int8.Int8Handle(*tensors, spec).run(x))
    finally:
        library().spp_int8_set_isa(b"")
    assert torch.equal(*found)
    assert torch.equal(found[0], reference(spec, *tensors, x, None))


def test_small_layers_take_no_amx():
    def pays(filters, columns):
        int8, bfloat16 = (-(-columns // 4), 0.5), (-(-columns // 2), 1.0)  # steps, and cycles
        found = [bool(library().spp_tiles_pay(filters, *steps)) for steps in (int8, bfloat16)]
        assert found[0] == found[1]
        return found[0]

    assert pays(64, 576)
    assert pays(64, 27)  # a first layer
    assert pays(16, 64)
    assert not pays(1, 9)  # a depthwise layer's group
    assert not pays(16, 1)  # hardly a column
    assert not pays(1, 1000)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or shutil.which("objdump") is None,
    reason="no AMX, or nothing that reads machine code",
)
def test_amx_is_compiled_everywhere():
    built = Path(native.__file__).with_name("kernels.so")
    command = ["objdump", "-d", "--no-show-raw-insn", str(built)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in (
        "ldtilecfg",
        "tileloadd",
        "tdpbsud",
        "tdpbf16ps",
        "tilestored",
        "tilerelease",
    ):
        assert instruction in code
