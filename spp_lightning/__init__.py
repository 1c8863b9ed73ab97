"""Structured Probabilistic Pruning for PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spp_lightning.compaction.file.container import load_compact, save_compact
    from spp_lightning.compaction.graph.to_dense import to_dense
    from spp_lightning.compaction.layers.column_conv import ColumnConv2d
    from spp_lightning.compaction.layers.kept import kept_columns
    from spp_lightning.compaction.macs import count_macs
    from spp_lightning.compaction.pipeline import compact
    from spp_lightning.compaction.quantize.pipeline import quantize_compact
    from spp_lightning.compaction.quantize.report import quantize_report
    from spp_lightning.compaction.report import compact_report
    from spp_lightning.data.cifar10 import CIFAR10DataModule
    from spp_lightning.data.digits import DigitsDataModule
    from spp_lightning.export.library import onnx_library
    from spp_lightning.export.onnx import export_onnx
    from spp_lightning.method.computed import materialize_weights
    from spp_lightning.method.pruner import SPPPruner
    from spp_lightning.models.convnet import ConvNet
    from spp_lightning.planning.solve import plan
    from spp_lightning.training.callback import SPPCallback
    from spp_lightning.training.distillation import DistillationCallback, distillation_loss
    from spp_lightning.training.launcher import launcher_options
    from spp_lightning.training.staged import StagedSPPCallback

__all__ = [
    "CIFAR10DataModule",
    "ColumnConv2d",
    "ConvNet",
    "DigitsDataModule",
    "DistillationCallback",
    "SPPCallback",
    "SPPPruner",
    "StagedSPPCallback",
    "compact",
    "compact_report",
    "count_macs",
    "distillation_loss",
    "export_onnx",
    "kept_columns",
    "launcher_options",
    "load_compact",
    "materialize_weights",
    "onnx_library",
    "plan",
    "quantize_compact",
    "quantize_report",
    "save_compact",
    "to_dense",
]

# Each name is loaded when it is first used: running a compact network needs no Lightning.
_HOMES = {
    "CIFAR10DataModule": "data.cifar10",
    "ColumnConv2d": "compaction.layers.column_conv",
    "ConvNet": "models.convnet",
    "DigitsDataModule": "data.digits",
    "DistillationCallback": "training.distillation",
    "SPPCallback": "training.callback",
    "SPPPruner": "method.pruner",
    "StagedSPPCallback": "training.staged",
    "compact": "compaction.pipeline",
    "compact_report": "compaction.report",
    "count_macs": "compaction.macs",
    "distillation_loss": "training.distillation",
    "export_onnx": "export.onnx",
    "kept_columns": "compaction.layers.kept",
    "launcher_options": "training.launcher",
    "load_compact": "compaction.file.container",
    "materialize_weights": "method.computed",
    "onnx_library": "export.library",
    "plan": "planning.solve",
    "quantize_compact": "compaction.quantize.pipeline",
    "quantize_report": "compaction.quantize.report",
    "save_compact": "compaction.file.container",
    "to_dense": "compaction.graph.to_dense",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
