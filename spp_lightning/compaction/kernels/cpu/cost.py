"""The written cost model: which kernel computes a layer, decided without a clock.

Every choice that :func:`~spp_lightning.compact` and the layers make by themselves follows from the
estimates here: on one kind of machine, a network is the same whenever it is made. A kernel's time
is a sum: how often it does something, times what that takes. The counts follow from the layer's
shape and the kernels' loops; the times were fitted to measurements (``_TIMES`` says to which).
``benchmarks/choices.py`` measures how much time the choices lose against the fastest config.

Kernels that round differently are never chosen by an estimate of time that depends on the batch or
on the threads: an image's output is the same bit for bit in any company. Winograd's kernels have a
rule of their own for that reason (:mod:`~spp_lightning.compaction.kernels.cpu.winograd`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from spp_lightning.compaction.epilogue import PlaneOp
from spp_lightning.compaction.kernels.cpu import winograd
from spp_lightning.compaction.kernels.cpu.config import CHUNK, WINOGRAD, Kernel, KernelConfig
from spp_lightning.compaction.kernels.cpu.library import instruction_set
from spp_lightning.compaction.spec import ConvSpec

__all__ = [
    "ChainChoice",
    "Choice",
    "candidates",
    "choose",
    "choose_chain",
    "dense_us",
    "layer_us",
]

_LANES = {"avx512": 16, "avx2": 8, "base": 4, "none": 4}  # float32 numbers of a vector
_MOST_PIXELS = {"avx512": 14, "avx2": 6, "base": 2, "none": 2}  # of a channel-blocked tile
_BLOCK = 4  # filters that the pixel-vectorised kernels compute at once
_VECTORS = 3  # of pixels in one of their tiles
_PANEL = 256  # columns of one of their panels
_L1, _L2 = 24_000, 400_000  # bytes of weights that stay in a core's caches between two tiles

# Numbers of an image between two layers of a chain beyond which it leaves the cache anyway. Chains
# with a depthwise stage were faster up to twice as many.
_MOST_CHAINED, _MOST_DEPTHWISE_CHAINED = 2**20, 2**21


class _Times(NamedTuple):
    """Nanoseconds of the kernels' parts; a vector is as long as the instruction set has them."""

    product: float  # a product of two vectors, and its sum
    call: float  # of the kernels, without any computing
    # Pixel-vectorised.
    pack: float  # a vector of pixels into a panel
    block: float  # beginning and end of a block of filters of a tile
    tile: float
    partial: float  # a vector of sums, stored and read again between two panels
    copy: float  # a vector of a source plane
    # Channel-blocked.
    plane: float  # a plane of the input that a tile reads
    step_l1: float  # a column of a tile, where the weights leave L1
    step_l2: float  # likewise, where they leave L2
    channel_copy: float  # a vector of a source plane
    transpose: float  # a vector of the output
    column: float
    row: float  # a vector of channels of a row of a depthwise layer
    transpose_row: float  # likewise of its input, where that isn't channel-blocked
    # Depthwise, pixel-vectorised.
    stencil: float  # a product, where columns are pruned or no dense stencil is used
    stencil_out: float  # a vector of the output
    stencil_copy: float  # a vector of the input
    stencil_plane: float
    # The epilogue, per vector: strided windows, windows at every pixel, and a residual.
    pool: float
    window: float
    residual: float
    post_plane: float
    channel_pool: float
    channel_window: float
    channel_residual: float


# Fitted to the layers of ResNet-18 and -50, MobileNetV3, DenseNet-121, VGG-16 and ConvNet with 100,
# 50, 25 and 10 % of their columns, 644 in all: CPU time on one core of an AMD EPYC (Zen 3, AVX2),
# best of 5 to 40 calls. For other instruction sets a vector of another length is taken to need the
# same time; that wasn't measured. Those of stencils and `transpose_row` were fitted to 28 depthwise
# layers of MobileNets, EfficientNet-B0 and ConvNeXt there, the third-best of 15 to 25 calls.
_TIMES = _Times(
    product=0.187,
    call=3840,
    pack=1.02,
    block=13.2,
    tile=53.5,
    partial=4.16,
    copy=6.39,
    plane=0.585,
    step_l1=0.369,
    step_l2=0.237,
    channel_copy=3.68,
    transpose=1.67,
    column=3.39,
    row=8.0,
    transpose_row=59.5,
    stencil=0.324,
    stencil_out=1.0,
    stencil_copy=0.926,
    stencil_plane=37.8,
    pool=1.9,
    window=4.9,
    residual=0.6,
    post_plane=40,
    channel_pool=1.7,
    channel_window=4.2,
    channel_residual=2.8,
)

# Activations, per vector of the output; and in torch, per number.
_ACTIVATIONS = {
    "none": 0.0,
    "sigmoid": 5.0,
    "silu": 5.0,
    "hardsigmoid": 1.0,
    "hardswish": 1.0,
    "gelu": 12.0,
    "gelu_tanh": 5.0,
}
_DENSE_ACTIVATIONS = {
    "none": 0.0,
    "sigmoid": 1.0,
    "silu": 1.0,
    "hardsigmoid": 0.2,
    "hardswish": 0.2,
    "gelu": 0.9,
    "gelu_tanh": 3.4,
}

# Winograd's kernels, by the outputs of a tile per side: a product; a product's weight, read from
# memory; and the transforms of a tile's inputs and outputs, per channel and filter.
_WINOGRAD_TIMES = {4: (0.0319, 0.161, 3.81, 10.9), 2: (0.0276, 0.215, 1.34, 0.622)}
_WINOGRAD_TILES = 56  # of a block, for which weights are read once

# Threads.
_FORK = 5000.0  # nanoseconds until all threads work, and until they are done
_BARRIER = 1000.0  # nanoseconds until all threads have reached a point
# Threads share an image of a chain less evenly than that of a layer alone. With fewer images than
# threads, one call must save a tenth: the bottlenecks of ResNet-50 are faster layer by layer then,
# and ConvNet keeps its one call.
_CHAIN_MARGIN = 0.9

# A call of a layer from Python, and of a dense one: nanoseconds without any computing.
_PYTHON_CALL, _DENSE_CALL = 8000.0, 3000.0


class Choice(NamedTuple):
    """A kernel config, and its estimated time.

    Attributes:
        config: Kernel and threads.
        us: Microseconds of a call.
    """

    config: KernelConfig
    us: float


class ChainChoice(NamedTuple):
    """Whether layers in a row are one call.

    Attributes:
        possible: Whether the channel-blocked kernels may compute all of them.
        threads: Of the one call; 0 for one layer at a time.
        us: Microseconds of the one call.
        one_by_one_us: Microseconds of one layer at a time.
    """

    possible: bool
    threads: int
    us: float
    one_by_one_us: float


def choose(
    spec: ConvSpec,
    num_columns: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    threads: int,
    pairs: bool = False,
) -> Choice:
    """The kernel config for a layer and an input shape.

    Args:
        spec: The convolution and its epilogue.
        num_columns: Kept columns.
        shape: Of the input, ``(B, C, H, W)``.
        dtype: Of the input, float32 or bfloat16.
        threads: Threads that may be used.
        pairs: Whether weights and input are bfloat16, and the machine multiplies pairs of them.

    >>> from spp_lightning.compaction.geometry import Geometry
    >>> layer = ConvSpec(Geometry(64, 64, (3, 3), padding=(1, 1)))
    >>> choose(layer, 576, (1, 64, 56, 56), torch.float32, 1).config.kernel.name
    'WINOGRAD_4'
    """
    return _choose(spec, num_columns, shape, dtype, threads, pairs, instruction_set())


def candidates(
    config: KernelConfig, spec: ConvSpec, dtype: torch.dtype, threads: int
) -> list[KernelConfig]:
    """The configs whose outputs are those of a config, bit for bit; the config is one of them.

    Args:
        config: The config.
        spec: The convolution and its epilogue.
        dtype: Of the input.
        threads: Threads that may be used.
    """
    exact: tuple[Kernel, ...] = (Kernel.PIXELS, Kernel.CHANNELS)
    if spec.geometry.is_depthwise and dtype != torch.float32:
        exact = (Kernel.PIXELS,)
    kernels = exact if config.kernel in exact else (config.kernel,)
    return [KernelConfig(kernel, n) for kernel in kernels for n in dict.fromkeys((threads, 1))]


@lru_cache(maxsize=1024)
def _choose(
    spec: ConvSpec,
    num_columns: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    threads: int,
    pairs: bool,
    isa: str,
) -> Choice:
    kernel = Kernel.PAIRS if pairs else Kernel.PIXELS
    if dtype == torch.float32:
        height, width = shape[2:]
        size = spec.geometry.out_size(height, width)
        side = winograd.tile_side(spec.geometry, num_columns, size)
        kernel = kernel if side is None else WINOGRAD[side]
    configs = candidates(KernelConfig(kernel, threads), spec, dtype, threads)
    estimates = [_estimate(spec, num_columns, shape, config, isa) for config in configs]
    best = min(range(len(configs)), key=estimates.__getitem__)
    return Choice(configs[best], estimates[best] / 1e3)


def layer_us(
    spec: ConvSpec,
    num_columns: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    threads: int,
    residual: bool = False,
) -> float:
    """Microseconds of a compact layer, called from Python; the arguments are as below."""
    choice = choose(spec, num_columns, shape, dtype, threads)
    extra = 0.0
    if residual:
        layer = _Layer.of(spec, num_columns, shape, instruction_set())
        channels = choice.config.kernel == Kernel.CHANNELS
        each = _TIMES.channel_residual if channels else _TIMES.residual
        extra = each * layer.batch * layer.out_vectors / choice.config.threads
    return choice.us + (extra + _PYTHON_CALL) / 1e3


def choose_chain(
    layers: Sequence[tuple[ConvSpec, int]], shape: tuple[int, ...], threads: int
) -> ChainChoice:
    """Whether layers in a row are one call, float32.

    Args:
        layers: Their descriptions, and how many columns each keeps.
        shape: Of the first one's input, ``(B, C, H, W)``.
        threads: Threads that may be used.
    """
    one_by_one, most, possible, isa = 0.0, 0, shape[0] > 0, instruction_set()
    first, chained = shape, []
    for i, (spec, num_columns) in enumerate(layers):
        choice = choose(spec, num_columns, shape, torch.float32, threads)
        one_by_one += 1e3 * choice.us + _PYTHON_CALL
        possible &= choice.config.kernel in (Kernel.PIXELS, Kernel.CHANNELS)
        layer = _Layer.of(spec, num_columns, shape, isa)
        chained.append(_channel_blocked(layer, i == 0, i + 1 == len(layers)))
        shape = (shape[0], spec.geometry.filters, *spec.out_size(*shape[2:]))
        if i + 1 < len(layers):
            groups = 1 if spec.geometry.is_depthwise else spec.geometry.groups
            padded = groups * math.ceil(spec.geometry.filters / groups / CHUNK) * CHUNK
            most = max(most, padded * math.prod(shape[2:]))
    depthwise = any(spec.geometry.is_depthwise for spec, _ in layers)
    possible &= most <= (_MOST_DEPTHWISE_CHAINED if depthwise else _MOST_CHAINED)
    times = {
        count: _on_threads(sum(chained), first[0], count, len(layers)) + _PYTHON_CALL + _TIMES.call
        for count in dict.fromkeys((threads, 1))
    }
    count = min(times, key=times.__getitem__)
    margin = _CHAIN_MARGIN if first[0] < threads else 1.0
    pays = possible and times[count] < margin * one_by_one
    return ChainChoice(possible, count if pays else 0, times[count] / 1e3, one_by_one / 1e3)


class _Layer(NamedTuple):
    """The counts that a layer's time follows from, per image."""

    spec: ConvSpec
    columns: int
    batch: int
    height: int  # of the input
    width: int
    out_height: int  # of the convolution
    out_width: int
    sources: float  # planes that kept columns read, by phase of the stride; on average
    lanes: int
    most_pixels: int

    @classmethod
    def of(cls, spec: ConvSpec, num_columns: int, shape: Sequence[int], isa: str) -> _Layer:
        g = spec.geometry
        batch, _, height, width = shape
        # Of random columns: a channel is read unless all of its columns are pruned.
        phases = math.prod(min(s, k) for s, k in zip(g.stride, g.kernel_size, strict=True))
        taps = g.taps / phases
        planes = g.channels * phases
        sources = planes * (1 - (1 - num_columns / g.num_columns) ** taps)
        size = g.out_size(height, width)
        lanes, most = _LANES[isa], _MOST_PIXELS[isa]
        return cls(spec, num_columns, batch, height, width, *size, sources, lanes, most)

    @property
    def pixels(self) -> int:
        return self.out_height * self.out_width

    @property
    def source_vectors(self) -> float:
        g = self.spec.geometry
        padded = (self.height + 2 * g.padding[0]) * (self.width + 2 * g.padding[1])
        return self.sources * padded / math.prod(g.stride) / self.lanes

    @property
    def out_vectors(self) -> float:
        return self.spec.geometry.filters * self.pixels / self.lanes


def _estimate(
    spec: ConvSpec, num_columns: int, shape: tuple[int, ...], config: KernelConfig, isa: str
) -> float:
    """Nanoseconds of a call of the kernels."""
    layer = _Layer.of(spec, num_columns, shape, isa)
    if config.kernel in (Kernel.WINOGRAD_4, Kernel.WINOGRAD_2):
        image = _winograd(layer, 4 if config.kernel == Kernel.WINOGRAD_4 else 2)
        image += _planes_epilogue(layer)
    elif config.kernel == Kernel.CHANNELS:
        image = _channel_blocked(layer, True, True)
    elif spec.geometry.is_depthwise and config.kernel == Kernel.PIXELS:
        image = _stencils(layer) + _planes_epilogue(layer)
    else:
        image = _pixel_vectorised(layer) + _planes_epilogue(layer)
        image *= 0.5 if config.kernel == Kernel.PAIRS else 1.0
    return _on_threads(image, layer.batch, config.threads, 1) + _TIMES.call


def _on_threads(image: float, batch: int, threads: int, layers: int) -> float:
    """Nanoseconds of a batch: most images have a thread each, all threads share the last ones."""
    if threads <= 1:
        return batch * image
    alone, shared = divmod(batch, threads)
    together = image / threads + (1 + layers) * _BARRIER
    return alone * image + shared * together + _FORK


def _pixel_vectorised(layer: _Layer) -> float:
    t, g = _TIMES, layer.spec.geometry
    blocks = g.groups * math.ceil(g.filters / g.groups / _BLOCK)
    per_tile = _VECTORS * layer.lanes
    tiles, rest = math.ceil(layer.pixels / per_tile), layer.pixels % per_tile
    vectors = math.ceil(layer.pixels / layer.lanes)
    # A tile of one vector takes longer than a third: sums wait for each other.
    products = vectors + (0.5 if 0 < rest <= layer.lanes else 0)
    columns = layer.columns / g.groups
    time = t.product * layer.columns * blocks / g.groups * _BLOCK * products
    time += t.pack * layer.columns * vectors + tiles * (t.block * blocks + t.tile * g.groups)
    time += t.partial * blocks * tiles * _BLOCK * _VECTORS * (math.ceil(columns / _PANEL) - 1)
    same_rows = g.stride == (1, 1) and layer.width == layer.out_width
    if not same_rows or layer.sources <= g.taps:
        time += t.copy * layer.source_vectors
    return time


def _channel_blocked(layer: _Layer, is_first: bool, is_last: bool) -> float:
    t, g = _TIMES, layer.spec.geometry
    if g.is_depthwise:
        return _depthwise_blocks(layer, is_first, is_last)
    chunks = math.ceil(g.filters / g.groups / CHUNK)
    tiles, pixels = _tiles_of_row(layer.out_width, layer.most_pixels)
    inside = _rows_inside(layer) * chunks * layer.columns  # steps of a tile, over all rows
    vectors = CHUNK / layer.lanes
    time = t.product * inside * pixels * vectors
    if layer.columns:
        time += t.plane * inside * tiles * layer.sources / layer.columns
    weights = 4 * layer.columns / g.groups * CHUNK  # bytes, of a chunk
    if weights > _L1:
        time += t.step_l1 * inside * tiles
    if weights * chunks * g.groups > _L2:
        time += t.step_l2 * inside * tiles
    if is_first and (g.padding != (0, 0) or g.stride != (1, 1)):
        time += t.channel_copy * layer.source_vectors
    time += t.column * layer.columns
    lanes = chunks * CHUNK * g.groups / layer.lanes  # vectors of a pixel
    return time + _blocks_epilogue(layer, lanes, is_last)


def _stencils(layer: _Layer) -> float:
    """Nanoseconds of a depthwise layer, pixel-vectorised."""
    t, g = _TIMES, layer.spec.geometry
    of_row = math.ceil(layer.out_width / layer.lanes)
    outputs = g.channels * layer.out_height * of_row
    product = t.product if _is_dense_stencil(layer, of_row) else t.stencil
    time = (product * layer.columns / g.channels + t.stencil_out) * outputs
    inputs = g.channels * layer.height * math.ceil(layer.width / layer.lanes)
    return time + t.stencil_copy * inputs + t.stencil_plane * g.channels


def _is_dense_stencil(layer: _Layer, vectors: int) -> bool:
    """Whether all columns are computed at once: ``dense_kernels`` in ``depthwise_kernel.h``."""
    g = layer.spec.geometry
    side, stride = g.kernel_size[0], g.stride[0]
    known = (side, stride) in ((3, 1), (5, 1), (7, 1), (3, 2), (5, 2)) and g.dilation[0] == 1
    return (
        known
        and g.kernel_size == (side, side)
        and layer.columns == g.num_columns
        and (vectors > 1 or side == 3)
    )


def _depthwise_blocks(layer: _Layer, is_first: bool, is_last: bool) -> float:
    """Nanoseconds of a depthwise layer, channel-blocked."""
    t, g = _TIMES, layer.spec.geometry
    lanes = math.ceil(g.channels / CHUNK) * CHUNK / layer.lanes  # vectors of a pixel
    _, pixels = _tiles_of_row(layer.out_width, layer.most_pixels)
    time = t.product * _rows_inside(layer) * g.taps * pixels * lanes
    time += t.row * layer.out_height * lanes
    if is_first:
        time += lanes * layer.height * (t.transpose_row + t.transpose * layer.width)
    return time + _blocks_epilogue(layer, lanes, is_last)


def _blocks_epilogue(layer: _Layer, lanes: float, is_last: bool) -> float:
    """Nanoseconds of the epilogue on channel blocks of ``lanes`` vectors a pixel."""
    time, (height, width) = _activation(layer), (layer.out_height, layer.out_width)
    for op in layer.spec.epilogue.post:
        out = op.out_size(height, width)
        numbers = height * width if _is_strided(op) else math.prod(out)
        each = _TIMES.channel_pool if _is_strided(op) else _TIMES.channel_window
        time += each * lanes * numbers
        height, width = out
    return time + (_TIMES.transpose * lanes * height * width if is_last else 0)


def _activation(layer: _Layer) -> float:
    return _ACTIVATIONS[layer.spec.epilogue.activation] * layer.out_vectors


def _planes_epilogue(layer: _Layer) -> float:
    """Nanoseconds of the epilogue where it takes plane by plane."""
    time, filters = _activation(layer), layer.spec.geometry.filters
    height, width = layer.out_height, layer.out_width
    for op in layer.spec.epilogue.post:
        out = op.out_size(height, width)
        numbers = height * width if _is_strided(op) else math.prod(out)
        each = _TIMES.pool if _is_strided(op) else _TIMES.window
        time += filters * (each * numbers / layer.lanes + _TIMES.post_plane)
        height, width = out
    return time


def _is_strided(op: PlaneOp) -> bool:
    return op.kind != "local_response_norm" and math.prod(op.stride) > 1


def _tiles_of_row(width: int, most: int) -> tuple[int, float]:
    """Tiles of a row of pixels, and their pixels; one alone takes as long as two."""
    tiles = math.ceil(width / most)
    return tiles, max(float(width), 2.0 * tiles)


def _rows_inside(layer: _Layer) -> float:
    """Output rows, each counted by the share of the kernel's rows that lie inside the image."""
    g = layer.spec.geometry
    inside = 0
    for row in range(g.kernel_size[0]):
        shift = row * g.dilation[0] - g.padding[0]  # of the input's row
        first = max(0, -(shift // g.stride[0]) if shift < 0 else 0)
        last = min(layer.out_height, (layer.height - 1 - shift) // g.stride[0] + 1)
        inside += max(0, last - first)
    return inside / g.kernel_size[0]


def _winograd(layer: _Layer, side: int) -> float:
    g = layer.spec.geometry
    product, weight, inputs, outputs = _WINOGRAD_TIMES[side]
    tiles = math.ceil(layer.out_height / side) * math.ceil(layer.out_width / side)
    channels, filters = (math.ceil(n / CHUNK) * CHUNK for n in (g.channels, g.filters))
    places = (side + 2) ** 2 * channels * filters
    blocks = math.ceil(tiles / _WINOGRAD_TILES)
    time = places * (product * tiles + weight * blocks)
    return (time + tiles * (inputs * channels + outputs * filters)) * 8 / layer.lanes


# --- the dense layer, as torch computes it ---

# Nanoseconds, fitted as above. With one thread, a batch below 16 and kernels up to 3×3 without a
# stride, torch multiplies matrices of patches: time per MAC, per number of the patches and of the
# output, and per image. Otherwise it calls oneDNN: time per MAC, per number of the output and of
# the input, per weight, and per call.
_PATCHES = (0.0306, 0.341, 0.0, 25_000.0)
_ONEDNN = (0.0274, 0.385, 0.738, 1.02, 50_000.0)
# A depthwise layer: time per MAC, per number of the input and of the output, and per call.
_DEPTHWISE = (0.035, 0.2, 100_000.0)
# The epilogue: time per number of an addition or a clamp, per number of a pool's window, and per
# number of a norm.
_POINTWISE, _MAX_POOL, _AVG_POOL, _NORM = 0.2, 4.0, 1.2, 14.0


def dense_us(
    spec: ConvSpec,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    threads: int,
    residual: bool = False,
) -> float:
    """Microseconds of the dense layer and its epilogue in torch.

    Args:
        spec: The convolution and its epilogue.
        shape: Of the input, ``(B, C, H, W)``.
        dtype: Of the input.
        threads: Threads that torch uses.
        residual: Whether another tensor is added to the convolution's output.
    """
    g = spec.geometry
    batch, _, height, width = shape
    size = g.out_size(height, width)
    lanes = _LANES[instruction_set()]
    macs = g.macs(shape, math.ceil(g.filters / g.groups / 8) * 8 * g.num_columns)
    outputs = batch * g.filters * math.prod(size)
    with_patches = (
        threads == 1 and batch < 16 and max(g.kernel_size) <= 3 and g.stride == g.dilation == (1, 1)
    )
    if g.is_depthwise:
        mac, number, call = _DEPTHWISE
        time = mac * g.macs(shape, g.num_columns) * 8 / lanes
        time += number * (math.prod(shape) + outputs) + call
    elif with_patches:
        mac, patch, output, call = _PATCHES
        patches = batch * math.prod(size) * g.num_columns if g.taps > 1 else 0
        time = (mac * macs + patch * patches) * 8 / lanes + output * outputs + call * batch
    else:
        mac, output, pixel, weight, call = _ONEDNN
        weights = g.filters * g.num_columns // g.groups
        time = mac * macs * 8 / lanes + output * outputs + pixel * math.prod(shape)
        time = (time + weight * weights) + call
    passes = int(residual) + int(spec.epilogue.clamp != (-math.inf, math.inf))
    activation = spec.epilogue.activation
    calls = 1 + passes + int(activation != "none") + len(spec.epilogue.post)
    time += (passes * _POINTWISE + _DENSE_ACTIVATIONS[activation]) * outputs
    for op in spec.epilogue.post:
        size = op.out_size(*size)
        numbers = batch * g.filters * math.prod(size)
        window = math.prod(op.kernel_size)
        each = {"max_pool": _MAX_POOL * window, "avg_pool": _AVG_POOL * window}.get(op.kind, _NORM)
        time += each * numbers
    if threads > 1:
        time = time / threads + _FORK * calls
    return (time + calls * _DENSE_CALL) / 1e3
