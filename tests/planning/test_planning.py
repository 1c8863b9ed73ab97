"""The knapsack against trying everything; costs and ratios against numbers worked out by hand."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from spp_lightning import count_macs, plan
from spp_lightning.planning.allocation import allocate, fit_exactly
from spp_lightning.planning.plan import Plan
from spp_lightning.planning.sensitivity import RATIOS, loss_sensitivity
from spp_lightning.planning.solve import Planner
from spp_lightning.planning.target import Target, TargetSettings
from spp_lightning.planning.trial import trial_network


@pytest.mark.parametrize("seed", range(8))
def test_knapsack_finds_what_trying_everything_finds(seed):
    random = np.random.default_rng(seed)
    costs = [np.sort(random.random(5)) for _ in range(4)]
    sizes = [np.sort(random.random(5))[::-1] for _ in range(4)]
    limit = 2.0
    chosen = allocate(costs, sizes, limit)

    def total(values, choice):
        return sum(value[i] for value, i in zip(values, choice, strict=True))

    def least_cost(limit):
        every = itertools.product(range(5), repeat=4)
        return min(total(costs, choice) for choice in every if total(sizes, choice) <= limit)

    rounding = 4 * limit / 4000  # a bin per layer
    assert total(sizes, chosen) <= limit + rounding
    assert total(costs, chosen) <= least_cost(limit - rounding)


def test_knapsack_says_that_nothing_fits():
    assert allocate([np.zeros(2)], [np.array([3.0, 2.0])], 1.9) is None


@pytest.mark.parametrize("excess", [-5000, -37, 0, 1, 999, 3800])
def test_fit_ends_within_one_group_below_the_limit(excess):
    pruned, most, sizes = [50, 60, 0, 30], [90, 90, 40, 31], [31, 17, 53, 7]
    found = fit_exactly(pruned, most, sizes, excess)
    more = sum((b - a) * size for a, b, size in zip(pruned, found, sizes, strict=True))
    left = excess - more  # above the limit; negative below
    assert left <= 0
    assert all(0 <= n <= top for n, top in zip(found, most, strict=True))
    kept_less = [size for n, size in zip(found, sizes, strict=True) if n]
    assert all(left + size > 0 for size in kept_less) or not any(found)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten())


def test_loss_rises_by_what_a_layer_loses():
    """The loss is the layer's negative L1 norm: it rises by the norms of the columns taken out."""
    model = nn.Sequential(nn.Conv2d(32, 8, 1))
    columns = model[0].weight.detach().abs().sum((0,)).flatten().sort().values
    before = model[0].weight.detach().clone()
    found = loss_sensitivity(model, ["0"], lambda twin: -float(twin[0].weight.abs().sum()))["0"]
    expected = [float(columns[: int(32 * ratio)].sum()) for ratio in RATIOS]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert torch.equal(model[0].weight, before)


def test_ratios_of_a_plan_prune_what_it_says():
    model, x = net(), torch.zeros(2, 3, 12, 12)
    found = plan(model, x, speedup=3, of="network")
    trial = trial_network(model, {layer.name: layer.pruned for layer in found.layers})
    assert sum(count_macs(trial, x[:1]).values()) == found.macs
    assert found.dense_macs / 3 - 16 * 100 < found.macs <= found.dense_macs / 3
    assert Plan.from_dict(found.as_dict()) == found
    text = str(found)
    assert text.splitlines()[1].startswith("0      16×3×3×3")
    assert "costs: by the weights" in text and "MACs     117 k dense" in text


def test_the_layer_whose_loss_does_not_matter_is_pruned_most():
    def loss(twin):  # the second layer's weights alone
        return -float(twin[2].weight.abs().sum())

    found = plan(net(), torch.zeros(1, 3, 12, 12), macs=60_000, loss=loss)
    first, second = found.layers
    assert first.ratio > 0.9 > second.ratio
    assert found.estimate == "loss"


def test_later_stages_prune_at_least_what_earlier_ones_do():
    planner = Planner(net(), (torch.zeros(1, 3, 12, 12),), TargetSettings())
    before = None
    for speedup in (1.5, 2.0, 2.1, 6.0):
        found = planner.solve(Target("macs", "speedup", speedup), latency=False)
        if before is not None:
            pairs = zip(found.layers, before.layers, strict=True)
            assert all(now.pruned >= then.pruned for now, then in pairs)
        assert found.macs <= found.dense_macs / speedup
        planner.go_beyond(found)
        before = found


def test_layers_that_are_not_computed_are_left_out():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.auxiliary = net(), nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.net(x)

    found = plan(Auxiliary(), torch.zeros(1, 3, 12, 12), speedup=2)
    assert [layer.name for layer in found.layers] == ["net.0", "net.2"]
    assert found.left_out == {"auxiliary": "not computed in evaluation mode"}
