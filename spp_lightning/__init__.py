"""Structured Probabilistic Pruning for PyTorch Lightning."""

from spp_lightning.callback import SPPCallback
from spp_lightning.compaction import (
    ColumnConv2d,
    compact,
    load_compact,
    save_compact,
    to_dense,
)
from spp_lightning.convnet import ConvNet
from spp_lightning.data import CIFAR10DataModule, DigitsDataModule
from spp_lightning.launch_env import launcher_options
from spp_lightning.macs import count_macs
from spp_lightning.pruner import SPPPruner

__all__ = [
    "CIFAR10DataModule",
    "ColumnConv2d",
    "ConvNet",
    "DigitsDataModule",
    "SPPCallback",
    "SPPPruner",
    "compact",
    "count_macs",
    "launcher_options",
    "load_compact",
    "save_compact",
    "to_dense",
]
