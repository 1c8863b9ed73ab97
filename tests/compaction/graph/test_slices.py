"""Slices that leave all channels are removed; those that may leave fewer for other images stay."""

import operator

import pytest
import torch
from networks import pruned
from torch import nn

from spp_lightning import compact


class Sliced(nn.Module):
    def __init__(self, index, transposed=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1)
        self.norm, self.index, self.transposed = nn.BatchNorm2d(8), index, transposed

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        y = torch.cat([x, self.second(x)], 1)
        return (y.transpose(1, 2) if self.transposed else y)[self.index] * 2


WHOLE = slice(None)


@pytest.mark.parametrize(
    ("index", "transposed", "stays"),
    [
        ((WHOLE, slice(None, 20), WHOLE, WHOLE), False, False),
        ((WHOLE, slice(None, 99)), False, False),
        ((WHOLE, slice(None, 19)), False, True),
        ((WHOLE, WHOLE, slice(None, 14)), False, True),
        (slice(None, 2), False, True),
        ((WHOLE, slice(None, 14)), True, True),
    ],
    ids=["all", "beyond all", "fewer", "rows", "images", "rows as channels"],
)
def test_slices_of_all_channels_are_removed(index, transposed, stays):
    torch.manual_seed(0)
    net = pruned(Sliced(index, transposed), 0.5).requires_grad_(False)
    fast = compact(net, torch.randn(2, 3, 16, 16))
    assert stays == any(step.target is operator.getitem for step in fast.compact_steps)
    x = torch.randn(3, 3, 20, 20)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
