"""Where Winograd's minimal filtering is faster than computing the kept columns one by one."""

from __future__ import annotations

import math

from spp_lightning.compaction.geometry import Geometry

__all__ = []

_CHUNK = 16  # channels and filters are computed in chunks
# In products, as measured on AVX-512; narrower vectors take longer for all of it.
_WEIGHTS = 8  # that the weights of a product take to come from memory, each time
_TILES = 56  # that they are used for before they are read again, at least
_TRANSFORMS = {4: 420, 2: 120}  # of the inputs or outputs of a tile
_MARGIN = 0.8  # of the time of the other kernels
_MARGIN_OF_LARGE_TILES = 0.9  # of that of tiles of 2×2, which are more exact


def tile_side(geometry: Geometry, num_columns: int, size: tuple[int, int]) -> int | None:
    """Outputs per side of the tiles by which Winograd's minimal filtering computes a layer, if so.

    Tiles of 4×4 take a quarter of the products and those of 2×2 four ninths, whatever is pruned:
    pruned columns are zeros. Both round otherwise than the other kernels. That must not depend on
    how long something took once, nor on batch size or threads: it is decided by a model of the
    costs, and a layer always gives the same output for the same picture.

    Args:
        geometry: The convolution.
        num_columns: How many columns are kept.
        size: Height and width of its output.

    >>> layer = Geometry(64, 64, (3, 3), padding=(1, 1))
    >>> [tile_side(layer, kept, (56, 56)) for kept in (576, 288, 144)]
    [4, 4, None]
    >>> tile_side(Geometry(512, 512, (3, 3), padding=(1, 1)), 4608, (7, 7))
    2
    """
    g = geometry
    if g.kernel_size != (3, 3) or (g.stride, g.dilation, g.groups) != ((1, 1), (1, 1), 1):
        return None
    large, small = (_cost(g, side, size) for side in (4, 2))
    side, cost = (4, large) if large < _MARGIN_OF_LARGE_TILES * small else (2, small)
    direct = num_columns * g.filters * (math.prod(size) + _WEIGHTS)
    return side if cost < _MARGIN * direct else None


def _cost(geometry: Geometry, side: int, size: tuple[int, int]) -> int:
    """The time with tiles of so many outputs per side, in products."""
    tiles = math.prod(math.ceil(n / side) for n in size)
    channels, filters = (
        math.ceil(n / _CHUNK) * _CHUNK for n in (geometry.channels, geometry.filters)
    )
    places = (side + geometry.kernel_size[0] - 1) ** 2  # products of a tile, channel and filter
    products = tiles + _WEIGHTS * math.ceil(tiles / _TILES)
    return places * channels * filters * products + _TRANSFORMS[side] * tiles * (channels + filters)
