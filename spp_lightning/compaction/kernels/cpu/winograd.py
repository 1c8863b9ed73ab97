"""The rule that says which layers Winograd's minimal filtering computes."""

from __future__ import annotations

import math

from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.kernels.cpu.config import CHUNK

__all__ = ["tile_side"]

# Times, in products, as measured with AVX-512; narrower vectors take longer for all of them.
_WEIGHTS = 8  # reading a product's weights from memory
_TILES = 56  # least number of tiles between two readings of the weights
_TRANSFORMS = {4: 420, 2: 120}  # transforming a tile's inputs or outputs, by outputs per side
_MARGIN = 0.8  # of the time of the other kernels
_MARGIN_OF_LARGE_TILES = 0.9  # of the time of 2×2 tiles, which are more exact


def tile_side(geometry: Geometry, num_columns: int, size: tuple[int, int]) -> int | None:
    """Outputs per side of the tiles by which Winograd's minimal filtering computes a layer.

    Pruned columns count as zeros: whatever is pruned, 4×4 tiles take a quarter of the products and
    2×2 tiles four ninths. Both round otherwise than the other kernels. The rule therefore reads
    neither a clock nor the batch size nor the number of threads: a layer always gives the same
    output for the same image.

    Args:
        geometry: The convolution.
        num_columns: Kept columns.
        size: Height and width of the output.

    Returns:
        4 or 2; None if another kernel computes the layer.

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
    """The time with tiles of ``side`` × ``side`` outputs, in products."""
    tiles = math.prod(math.ceil(n / side) for n in size)
    channels, filters = (
        math.ceil(n / CHUNK) * CHUNK for n in (geometry.channels, geometry.filters)
    )
    places = (side + geometry.kernel_size[0] - 1) ** 2  # products per tile, channel and filter
    products = tiles + _WEIGHTS * math.ceil(tiles / _TILES)
    return places * channels * filters * products + _TRANSFORMS[side] * tiles * (channels + filters)
