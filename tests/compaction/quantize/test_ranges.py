"""Ranges of values, and the scales that follow from them."""

import pytest
import torch

from spp_lightning.compaction.layers.int8_reference import dequantize, quantize
from spp_lightning.compaction.quantize.ranges import METHODS, Range


def found_for(*tensors):
    found = Range()
    for x in tensors:
        found.widen(x)
    for x in tensors:
        found.count(x)
    return found


def squared_error(x, to):
    scale, zero_point = torch.tensor(to.scale), torch.tensor(to.zero_point, dtype=torch.uint8)
    return float((dequantize(quantize(x, scale, zero_point), scale, zero_point) - x).square().sum())


@pytest.mark.parametrize("low", [0.0, -3.0])
def test_the_least_squared_error_is_found(low):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1_000_000, generator=generator).clamp(min=low)
    x[0] = 20.0
    scales = {method: found_for(x[:20_000], x[20_000:]).scale(method) for method in METHODS}
    errors = {method: squared_error(x, to) for method, to in scales.items()}
    assert scales["max"].scale == pytest.approx((20 - low) / 255)
    assert scales["max"].zero_point == round(-low / scales["max"].scale)
    assert errors["mse"] < 0.8 * errors["max"]
    # As good as any upper limit, up to the coarseness of the search.
    tried = [found_for(x.clamp(max=high)).scale("max") for high in torch.linspace(4, 20, 33)]
    assert errors["mse"] < 1.05 * min(squared_error(x, to) for to in tried)


def test_percentiles_leave_out_the_farthest():
    x = torch.linspace(0, 1, 100_001)
    x[-3:] = 50.0
    to = found_for(x).scale("percentile")
    assert 1.0 <= 255 * to.scale < 1.0 + 2 * 50 / 2048 and to.zero_point == 0


def test_zero_is_always_exact():
    for x in (torch.linspace(-7, -3, 9), torch.linspace(2, 5, 9), torch.zeros(4)):
        for method in METHODS:
            to = found_for(x).scale(method)
            assert 0 <= to.zero_point <= 255 and to.scale > 0
    assert found_for(torch.linspace(-7, -3, 9)).scale("max").zero_point == 255
