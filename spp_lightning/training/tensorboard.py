"""Logs a pruning run: scalars to every Lightning logger, histograms and a chart to TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from spp_lightning.method.pruner import SPPPruner

__all__ = ["log_layout", "log_update", "pruning_scalars"]


def pruning_scalars(pruner: SPPPruner) -> dict[str, float]:
    """Compute the scalars that are logged at every update.

    Args:
        pruner: The pruner.

    Returns:
        ``sparsity/total`` and ``sparsity/LAYER``: shares of the groups pruned.
        ``recovered/LAYER``: number of groups whose p fell in the last update.
        ``macs/remaining``, per input, and ``macs/speedup``, both over the pruned layers: only once
        the MACs of all layers are known.
    """
    scalars = {"sparsity/total": pruner.total_sparsity}
    scalars |= {f"sparsity/{name}": share for name, share in pruner.sparsity.items()}
    scalars |= {f"recovered/{name}": float(n) for name, n in pruner.num_recovered.items()}
    macs = pruner.macs
    if macs.keys() >= pruner.layers.keys():
        dense = sum(before for before, _ in macs.values())
        remaining = sum(now for _, now in macs.values())
        scalars |= {"macs/remaining": float(remaining), "macs/speedup": dense / remaining}
    return scalars


def log_layout(loggers: Iterable[Logger]) -> None:
    """Add one chart with the sparsity of every layer to TensorBoard's custom scalars."""
    layout = {"SPP": {"sparsity of all layers": ["Multiline", [r"sparsity/.+"]]}}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(layout)


def log_update(loggers: Iterable[Logger], pruner: SPPPruner, step: int) -> None:
    """Log scalars to every logger, and histograms of p to TensorBoard.

    Args:
        loggers: The Trainer's loggers.
        pruner: The pruner.
        step: The optimizer step to log at.
    """
    scalars = pruning_scalars(pruner)
    for logger in loggers:
        logger.log_metrics(scalars, step)
        if isinstance(logger, TensorBoardLogger):
            for name, probability in pruner.probability.items():
                logger.experiment.add_histogram(f"probability/{name}", probability, step)
