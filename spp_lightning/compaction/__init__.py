"""Pruned networks made fast: only the kept columns are stored and computed."""

from spp_lightning.compaction.epilogue import Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.file.container import load_compact, save_compact
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.graph.to_dense import to_dense
from spp_lightning.compaction.kernels.cpu.library import instruction_set
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.operator import column_conv2d
from spp_lightning.compaction.pipeline import compact
from spp_lightning.compaction.quantize.pipeline import quantize_compact
from spp_lightning.compaction.quantize.report import quantize_report
from spp_lightning.compaction.report import compact_report
from spp_lightning.compaction.spec import ConvSpec

__all__ = [
    "Clamp",
    "ColumnConv2d",
    "ConvSpec",
    "Epilogue",
    "Geometry",
    "PlaneOp",
    "column_conv2d",
    "compact",
    "compact_report",
    "instruction_set",
    "load_compact",
    "quantize_compact",
    "quantize_report",
    "save_compact",
    "to_dense",
]
