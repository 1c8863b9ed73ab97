"""Runs a network in evaluation mode for a moment, as inspections of it do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["in_evaluation"]


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, without gradients; afterwards it is as it was.

    >>> net = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
    >>> with in_evaluation(net):
    ...     net.training, net(torch.ones(1, 2)).requires_grad
    (False, False)
    >>> [module.training for module in net.modules()]
    [True, True, False]
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
