"""What a pruning run shows: scalars for any Lightning logger, more for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from spp_lightning.pruner import SPPPruner

__all__ = ["log_layout", "log_update", "pruning_scalars"]


def pruning_scalars(pruner: SPPPruner, dense_macs: Mapping[str, int]) -> dict[str, float]:
    """The state of a pruning run in numbers.

    Args:
        pruner: The pruner.
        dense_macs: MACs per input of the unpruned layers, by name, as far as they are known.

    Returns:
        ``sparsity/total`` and ``sparsity/LAYER``, shares of the groups; ``recovered/LAYER``, how
        many groups' p fell in the last update; and, if the MACs of all layers are known,
        ``macs/remaining`` per input and ``macs/speedup``, both of the pruned layers.
    """
    scalars = {"sparsity/total": pruner.total_sparsity}
    scalars |= {f"sparsity/{name}": share for name, share in pruner.sparsity.items()}
    scalars |= {f"recovered/{name}": float(n) for name, n in pruner.num_recovered.items()}
    if dense_macs.keys() >= pruner.sparsity.keys():
        dense = sum(dense_macs[name] for name in pruner.sparsity)
        remaining = sum(dense_macs[name] * (1 - share) for name, share in pruner.sparsity.items())
        scalars |= {"macs/remaining": remaining, "macs/speedup": dense / remaining}
    return scalars


def log_layout(loggers: Iterable[Logger]) -> None:
    """Add a chart with the sparsity of all layers together to TensorBoard's custom scalars."""
    layout = {"SPP": {"sparsity of all layers": ["Multiline", [r"sparsity/.+"]]}}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(layout)


def log_update(
    loggers: Iterable[Logger], pruner: SPPPruner, dense_macs: Mapping[str, int], step: int
) -> None:
    """Log the state of a pruning run: scalars everywhere, histograms of p to TensorBoard.

    Args:
        loggers: The Trainer's loggers.
        pruner: The pruner.
        dense_macs: MACs per input of the unpruned layers, by name, as far as they are known.
        step: The optimizer step to log at.
    """
    scalars = pruning_scalars(pruner, dense_macs)
    for logger in loggers:
        logger.log_metrics(scalars, step)
        if isinstance(logger, TensorBoardLogger):
            for name, probability in pruner.probability.items():
                logger.experiment.add_histogram(f"probability/{name}", probability, step)
