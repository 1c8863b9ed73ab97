"""Pruned networks made fast: only the kept columns are stored and computed."""

from spp_lightning.compaction.cpu import instruction_set
from spp_lightning.compaction.dense import to_dense
from spp_lightning.compaction.files import load_compact, save_compact
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.layer import ColumnConv2d
from spp_lightning.compaction.ops import column_conv2d
from spp_lightning.compaction.transform import compact

__all__ = [
    "ColumnConv2d",
    "Geometry",
    "column_conv2d",
    "compact",
    "instruction_set",
    "load_compact",
    "save_compact",
    "to_dense",
]
