"""Where Winograd's minimal filtering is faster than computing the kept columns one by one."""

from __future__ import annotations

import math

from spp_lightning.compaction.geometry import Geometry

__all__ = ["is_faster"]

_SIDE = 4  # outputs of a tile, per side
_PRODUCTS = 36  # per tile, channel and filter
_CHUNK = 16  # channels and filters are computed in chunks
# In products, as measured on AVX-512; narrower vectors take longer for all of it.
_WEIGHTS = 8  # that the weights of a product take to come from memory, each time
_TILES = 56  # that they are used for before they are read again, at least
_TRANSFORMS = 420  # of the inputs or outputs of a tile
_MARGIN = 0.8  # of the time of the other kernels, since these are more exact


def is_faster(geometry: Geometry, num_columns: int, size: tuple[int, int]) -> bool:
    """Whether a layer is computed by Winograd's minimal filtering, its pruned columns being zeros.

    It takes a quarter of the products, whatever is pruned, but is rounded otherwise. That must not
    depend on how long something took once, nor on batch size or threads: it is decided by a model
    of the costs, and a layer always gives the same output for the same picture.

    Args:
        geometry: The convolution.
        num_columns: How many columns are kept.
        size: Height and width of its output.

    >>> layer = Geometry(64, 64, (3, 3), padding=(1, 1))
    >>> [is_faster(layer, kept, (56, 56)) for kept in (576, 288, 144)]
    [True, True, False]
    """
    g = geometry
    if g.kernel_size != (3, 3) or (g.stride, g.dilation, g.groups) != ((1, 1), (1, 1), 1):
        return False
    tiles = math.ceil(size[0] / _SIDE) * math.ceil(size[1] / _SIDE)
    channels, filters = (math.ceil(n / _CHUNK) * _CHUNK for n in (g.channels, g.filters))
    products = tiles + _WEIGHTS * math.ceil(tiles / _TILES)
    cost = _PRODUCTS * g.channels * filters * products + _TRANSFORMS * tiles * (channels + filters)
    return cost < _MARGIN * math.prod(size) * num_columns * g.filters
