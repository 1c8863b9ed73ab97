"""What follows from a network's own tensors alone is computed once."""

import pytest
import torch
from networks import pruned
from torch import nn

from spp_lightning import compact
from spp_lightning.compaction import load_compact, save_compact
from spp_lightning.compaction.graph import constants


class Biased(nn.Module):
    """A bias gathered from a table by relative position, as in LeViT and Swin."""

    def __init__(self, positions):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.table = nn.Parameter(torch.randn(5, 8))
        self.register_buffer("index", torch.randint(5, (positions,)))

    def forward(self, x):
        bias = self.table[self.index].transpose(0, 1).sigmoid()
        return self.conv(x).flatten(2) + bias


def steps_of_tables(fast):
    return [step.target for step in fast.compact_steps if step.kind == "tensor"]


@pytest.mark.parametrize("fold", [True, False])
def test_biases_by_relative_position_are_kept(fold, tmp_path):
    torch.manual_seed(0)
    net, x = pruned(Biased(36), 0.5).requires_grad_(False), torch.randn(2, 3, 6, 6)
    expected = net(x)
    fast = compact(net, x, fold=fold)
    assert steps_of_tables(fast) == (["table_value"] if fold else ["table", "index"])
    torch.testing.assert_close(fast(x), expected)
    save_compact(fast, tmp_path / "net.spp")
    assert torch.equal(load_compact(tmp_path / "net.spp")(x), fast(x))


def test_large_tensors_are_computed_every_time(monkeypatch):
    monkeypatch.setattr(constants, "_MOST_NUMBERS", 8 * 36 - 1)
    net = pruned(Biased(36), 0.5).requires_grad_(False)
    fast = compact(net, torch.randn(1, 3, 6, 6))
    assert steps_of_tables(fast) == ["table", "index"]
