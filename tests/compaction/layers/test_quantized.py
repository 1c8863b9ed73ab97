"""Int8 layers: their arithmetic against NumPy, and what they refuse."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from quantized_layers import INPUT, SPECS, drawn
from torch.nn import functional as F

from spp_lightning.compaction.epilogue import PlaneOp
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.int8_spec import Int8Spec, TensorScale
from spp_lightning.compaction.layers import unwatched
from spp_lightning.compaction.layers.int8_pool import max_pool_uint8
from spp_lightning.compaction.layers.quantized import Quantize, QuantizedConv2d, QuantizedLinear


def reference(layer, x, residual):
    """The layer's output, number by number, in the order that is documented."""
    spec, g = layer.spec, layer.geometry
    x = x.numpy().astype(np.int64) - spec.input.zero_point
    height, width = g.out_size(*x.shape[2:])
    rows, per_group = g.filters // g.groups, g.num_columns // g.groups
    out = np.empty((len(x), g.filters, height, width), np.float32)
    for b, f, i, j in np.ndindex(out.shape):
        total = 0
        for k, column in enumerate(layer.columns.tolist()):
            if column // per_group != f // rows:
                continue
            c, tap = divmod(column, g.taps)
            a = i * g.stride[0] - g.padding[0] + tap // g.kernel_size[1] * g.dilation[0]
            e = j * g.stride[1] - g.padding[1] + tap % g.kernel_size[1] * g.dilation[1]
            if 0 <= a < x.shape[2] and 0 <= e < x.shape[3]:
                total += int(layer.weight[f % rows, k]) * int(x[b, c, a, e])
        multiplier = np.float32(spec.input.scale) * layer.weight_scale[f].numpy()
        y = np.float32(np.float32(total) * multiplier) + layer.bias[f].numpy()
        if residual is not None:
            steps = np.float32(int(residual[b, f, i, j]) - spec.residual.zero_point)
            y = y + steps * np.float32(spec.residual.scale)
        out[b, f, i, j] = min(max(y, np.float32(spec.clamp[0])), np.float32(spec.clamp[1]))
    if spec.output is None:
        return out
    inverse = np.float32(1) / np.float32(spec.output.scale)
    q = np.rint(out * inverse) + np.float32(spec.output.zero_point)
    return np.clip(q, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("has_kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("name", SPECS)
def test_layers_compute_what_is_documented(name, has_kernels, monkeypatch):
    monkeypatch.setattr(unwatched, "is_available", lambda: has_kernels)
    layer, x, residual = drawn(SPECS[name])
    found, expected = layer(x, residual).numpy(), reference(layer, x, residual)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    if name == "saturated":
        assert {found.min(), found.max()} == {0, 255}
    single = layer(x[0], None if residual is None else residual[0])
    np.testing.assert_array_equal(single.numpy(), expected[0])


def test_layers_compile_and_take_any_layout():
    layer, x, residual = drawn(SPECS["groups"])
    expected = layer(x, residual)
    strided = x.to(memory_format=torch.channels_last)
    assert torch.equal(layer(strided, residual), expected)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, residual), expected)


def test_layers_in_inference_mode():
    with torch.inference_mode():
        layer, x, residual = drawn(SPECS["groups"])
        expected = layer(x, residual)
        layer.bias.add_(1.0)
        assert not torch.equal(layer(x, residual), expected)


def test_linear_layers_are_pointwise():
    conv, x, _ = drawn(SPECS["1x1"])
    linear = QuantizedLinear(conv.spec, conv.weight, conv.columns, conv.weight_scale, conv.bias)
    rows = x.permute(0, 2, 3, 1)
    assert torch.equal(linear(rows), conv(x).permute(0, 2, 3, 1))
    assert linear(rows[0, 0, 0]).shape == (7,)
    with pytest.raises(ValueError, match=r"`x` must be of shape \(…, 5\)"):
        linear(x)


@pytest.mark.parametrize("has_kernels", [True, False], ids=["kernels", "torch"])
def test_rounding_to_uint8(has_kernels, monkeypatch):
    monkeypatch.setattr(unwatched, "is_available", lambda: has_kernels)
    to_uint8 = Quantize(TensorScale(0.5, 10))
    x = torch.tensor([0.25, 0.75, -0.25, -5.1, 1e30, -math.inf, math.nan])
    assert to_uint8(x).tolist() == [10, 12, 10, 0, 255, 0, 0]
    to_uint8.scale.fill_(0.037)
    x = torch.randn(3, 70_001) * 5
    steps = np.rint(x.numpy() * (np.float32(1) / np.float32(0.037))) + np.float32(10)
    np.testing.assert_array_equal(to_uint8(x).numpy(), steps.clip(0, 255).astype(np.uint8))


POOLS = [
    *(((2, 2), (2, 2), (0, 0), False), ((3, 3), (2, 2), (1, 1), False)),
    *(((3, 3), (1, 1), (1, 1), False), ((3, 2), (2, 3), (1, 0), True)),
    *(((5, 1), (3, 1), (2, 0), True), ((1, 9), (1, 4), (0, 4), True)),
    ((6, 3), (2, 2), (0, 0), True),  # higher than some of the planes
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("size", [(9, 9), (8, 33), (5, 70)], ids=str)
def test_max_pools_of_uint8(pool, size):
    x = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0))
    kernel, stride, padding, ceil_mode = pool
    expected = F.max_pool2d(x.float(), kernel, stride, padding, ceil_mode=ceil_mode)
    found = max_pool_uint8(x.byte(), *pool)
    assert found.dtype == torch.uint8 and torch.equal(found.float(), expected)
    last = x.byte().contiguous(memory_format=torch.channels_last)
    assert torch.equal(max_pool_uint8(last, *pool), found)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(max_pool_uint8(x.byte(), *pool), found)
    finally:
        torch.set_num_threads(threads)


POST = {
    "maximum, norm": (
        PlaneOp("max_pool", (3, 3), (2, 2), (0, 0), True),
        PlaneOp("local_response_norm", (3, 3), alpha=5e-2),
    ),
    "padding counts": (PlaneOp("avg_pool", (3, 3), (2, 2), (1, 1), True),),
    "padding does not": (PlaneOp("avg_pool", (5, 2), (3, 3), (2, 1), True, False),),
    "a window larger than the planes": (PlaneOp("avg_pool", (18, 15), (2, 2), (0, 0), True),),
    "larger planes": (
        PlaneOp("avg_pool", (2, 2), (1, 1), (1, 1)),
        PlaneOp("max_pool", (2, 4), (1, 1), (1, 2)),
    ),
}


@pytest.mark.parametrize("name", POST)
def test_pools_and_norms_before_rounding(name, monkeypatch):
    x = torch.randn(2, 3, 17, 14, generator=torch.Generator().manual_seed(0)) * 3
    layer = Quantize(TensorScale(0.03, 90), POST[name])
    found = layer(x)
    monkeypatch.setattr(unwatched, "is_available", lambda: False)
    assert torch.equal(layer(x), found)
    y = x.double()
    for op in POST[name]:
        y = op(y)
    steps = (y / 0.03 + 90).clamp(0, 255)
    assert (found.double() - steps).abs().max() < 0.501
    if name == "maximum, norm":
        with pytest.raises((ValueError, RuntimeError)):
            layer(x[:, :, :1, :1])


def test_max_pools_that_do_not_fit_are_refused():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    for pool in (((5, 5), (1, 1), (0, 0), False), ((2, 2), (1, 1), (2, 2), False)):
        with pytest.raises((ValueError, RuntimeError)):
            max_pool_uint8(x, *pool)
    with pytest.raises((ValueError, RuntimeError)):
        max_pool_uint8(x, (2**32 + 2, 2), (1, 1), (0, 0), False)


def test_copies_and_states_keep_all_numbers():
    layer, x, residual = drawn(SPECS["groups"])
    expected = layer(x, residual)
    buffer = io.BytesIO()
    pickle.dump(layer, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(layer), pickle.load(buffer)):
        assert torch.equal(again(x, residual), expected)
    other, _, _ = drawn(SPECS["groups"], seed=1)
    other.output_scale.fill_(7.0)
    assert not torch.equal(other(x, residual), expected)
    other.load_state_dict({**layer.state_dict(), "columns": layer.columns})
    assert torch.equal(other(x, residual), expected)
    assert other.spec == layer.spec


BROKEN = {
    "`weight` must be int8 of shape .*float32": {"weight": torch.zeros(7, 2)},
    r"`weight` must be in \[-127, 127\]": {"weight": torch.full((7, 2), -128, dtype=torch.int8)},
    "`columns` must be ascending": {"columns": torch.tensor([3, 1], dtype=torch.int32)},
    "`weight_scale` must be float32 of shape": {"weight_scale": torch.ones(7).double()},
    "`weight_scale` must be finite": {"weight_scale": torch.full((7,), math.nan)},
    "`weight_scale` must be at least 1e-30": {"weight_scale": torch.zeros(7)},
    "its product with the input's scale": {"weight_scale": torch.full((7,), 1e38)},
    "`bias` must be float32": {"bias": torch.zeros(6)},
    "scale of `input`": {"spec": Int8Spec(Geometry(5, 7, (1, 1)), TensorScale(math.inf))},
    "zero point of `output`": {
        "spec": Int8Spec(Geometry(5, 7, (1, 1)), INPUT, TensorScale(1.0, 256))
    },
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_does_not_fit_is_refused(message):
    given = {
        "spec": SPECS["1x1"],
        "weight": torch.ones(7, 2, dtype=torch.int8),
        "columns": torch.tensor([1, 3], dtype=torch.int32),
        "weight_scale": torch.ones(7),
        "bias": None,
    }
    QuantizedConv2d(**given)
    with pytest.raises(ValueError, match=message):
        QuantizedConv2d(**{**given, **BROKEN[message]})


def test_inputs_that_do_not_fit_are_refused():
    layer, x, residual = drawn(SPECS["groups"])
    for given, message in (
        ((x.float(), residual), "`x` must be uint8"),
        ((x[:, :5], residual), r"`x` must be .*of shape \(B, 6, H, W\)"),
        ((x, None), "`residual` must be"),
        ((x, residual[:, :, 1:]), "`residual` must be .*of shape"),
        ((x, residual.float()), "`residual` must be uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*given)
    layer, x, _ = drawn(SPECS["1x1"])
    with pytest.raises(ValueError, match="`residual` must be"):
        layer(x, x)
