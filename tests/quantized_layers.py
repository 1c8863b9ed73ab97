"""Int8 layers of every kind, with random numbers."""

import math

import numpy as np
import torch

from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.int8_spec import Int8Spec, TensorScale
from spp_lightning.compaction.layers.quantized import QuantizedConv2d

INPUT, RESIDUAL = TensorScale(0.037, 113), TensorScale(0.21, 40)
SPECS = {
    "1x1": Int8Spec(Geometry(5, 7, (1, 1)), INPUT, TensorScale(0.4, 90)),
    "stride": Int8Spec(
        Geometry(4, 6, (3, 3), (2, 2), (1, 1)), INPUT, TensorScale(0.11), None, (0.0, math.inf)
    ),
    "groups": Int8Spec(
        Geometry(6, 4, (3, 2), (1, 1), (2, 0), (2, 1), 2), INPUT, TensorScale(0.3, 128), RESIDUAL
    ),
    "float": Int8Spec(Geometry(3, 5, (3, 3), padding=(1, 1)), INPUT, None, RESIDUAL, (0.0, 6.0)),
    "saturated": Int8Spec(Geometry(8, 3, (1, 1)), TensorScale(9.0, 0), TensorScale(1e-3, 3)),
}


def drawn(spec, seed=0):
    """A layer of a spec, an input and a residual or none."""
    rng = np.random.default_rng(seed)
    g = spec.geometry
    columns = np.sort(rng.choice(g.num_columns, max(g.num_columns // 2, 1), replace=False))
    weight = rng.integers(-127, 128, (g.filters // g.groups, len(columns)))
    scales = rng.uniform(0.001, 0.02, g.filters).astype(np.float32)
    bias = rng.normal(size=g.filters).astype(np.float32)
    layer = QuantizedConv2d(
        spec,
        torch.from_numpy(weight.astype(np.int8)),
        torch.from_numpy(columns.astype(np.int32)),
        torch.from_numpy(scales),
        torch.from_numpy(bias),
    )
    x = rng.integers(0, 256, (2, g.channels, 7, 6), dtype=np.uint8)
    shape = (2, g.filters, *g.out_size(7, 6))
    residual = rng.integers(0, 256, shape, dtype=np.uint8) if spec.residual else None
    return layer, torch.from_numpy(x), None if residual is None else torch.from_numpy(residual)
