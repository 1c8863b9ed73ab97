"""Data modules for the examples: CIFAR-10, and scikit-learn's digits, which need no download."""

from spp_lightning.data.cifar10 import CIFAR10DataModule
from spp_lightning.data.digits import DigitsDataModule

__all__ = ["CIFAR10DataModule", "DigitsDataModule"]
