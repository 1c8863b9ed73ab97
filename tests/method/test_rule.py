"""The update rule: exact facts, the paper's counts, and an independent reference."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spp_lightning import SPPPruner
from spp_lightning.method import rule
from spp_lightning.method.groups import WeightGroups
from spp_lightning.method.rule import (
    count_updates,
    delta,
    spaced_ranks,
    target_count,
    update_probability,
    zero_crossing,
)

# The same cases every time, on any machine, and no database of them beside the tests.
examples = settings(max_examples=80, deadline=None, database=None, derandomize=True)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- the change of p ---


@pytest.mark.parametrize(
    ("zero_rank", "A", "u"),
    [(700.0, 0.05, 0.25), (7.25, 1.0, 0.05), (0.6, 0.01, 0.9)],
    ids=["default", "steep", "flat"],
)
class TestDelta:
    def test_exact_values(self, zero_rank, A, u):
        q = -math.log(u) / ((math.log(2) - math.log(u)) / zero_rank)
        ranks = tensor(0.0, q * (1 - 1e-12), q * (1 + 1e-12), zero_rank, 2 * q)
        expected = tensor(A, u * A, u * A, 0.0, (2 * u - 1) * A)
        assert delta(ranks, zero_rank, A, u)[0] == A
        assert torch.allclose(delta(ranks, zero_rank, A, u), expected, rtol=0, atol=1e-10 * A)

    def test_strictly_decreasing_and_symmetric(self, zero_rank, A, u):
        q = -math.log(u) / ((math.log(2) - math.log(u)) / zero_rank)
        distance = torch.linspace(0, q, 101, dtype=torch.float64)
        left, right = (delta(q + side * distance, zero_rank, A, u) for side in (-1, 1))
        assert (right.diff() < 0).all() and (left.diff() > 0).all()
        assert torch.allclose(left + right, tensor(2 * u * A), rtol=0, atol=1e-12 * A)

    def test_equals_reference(self, zero_rank, A, u):
        ranks = torch.linspace(0, 2 * zero_rank, 50, dtype=torch.float64)
        expected = [reference.delta(r, zero_rank, A, u) for r in ranks.tolist()]
        assert torch.allclose(delta(ranks, zero_rank, A, u), tensor(*expected), rtol=1e-12)


@pytest.mark.parametrize(
    ("importance", "zero_rank", "expected"),
    [
        ([1, 2, 4, 9], 2.5, [0, 2.5 / 8, 2.5 * 3 / 8, 2.5]),
        ([1, 2, 4, 9], 2.0, [0, 2 / 3, 2, 2 * 8 / 3]),
        ([1, 2, 4], 20.0, [0, 20 / 3, 20]),
        ([5, 5, 5], 2.0, [0, 0, 0]),
        ([5, 5, 5, 6], 2.0, [0, 0, 0, math.inf]),
    ],
    ids=["between_ranks", "whole_rank", "beyond_last", "all_equal", "equal_up_to_K"],
)
def test_spaced_ranks(importance, zero_rank, expected):
    assert spaced_ranks(tensor(*importance), zero_rank).tolist() == pytest.approx(expected)


# --- the count ---


@pytest.mark.parametrize(
    ("num_groups", "prune_ratio", "expected"),
    [
        (800, 0.75, 600),
        (75, 0.75, 57),
        (100, 0.55, 55),  # 55.00000000000001 in floating point
        (100, 0.07, 7),  # 7.000000000000001
        (10, 0.701, 8),
        (27, 1 - 1 / 3, 18),
        (49, 1 - 1 / 49, 48),
        (10, 0.0, 0),
        (4, 0.99, 3),
        (1, 0.99, 0),
    ],
)
def test_target_count(num_groups, prune_ratio, expected):
    assert target_count(num_groups, prune_ratio) == expected
    assert reference.target(prune_ratio, num_groups) == expected


# Columns: A, u, updates by the rule, updates read off the paper's tables.
TABLE = [
    (0.01, 0.25, 366, 367),
    (0.025, 0.25, 148, 144),
    (0.05, 0.25, 75, 74),
    (0.075, 0.25, 50, 50),
    (0.1, 0.25, 38, 39),
    (0.05, 0.05, 128, 133),
    (0.05, 0.125, 96, 94),
    (0.05, 0.375, 64, 61),
    (0.05, 0.5, 58, 55),
]


@pytest.mark.parametrize(("A", "u", "by_rule", "in_paper"), TABLE)
def test_count_updates(A, u, by_rule, in_paper):
    assert count_updates(800, 0.75, A, u) == by_rule
    assert abs(by_rule - in_paper) <= max(0.06 * in_paper, 1)


@pytest.mark.parametrize(("crossing", "K"), [(0.25, 650), (0.5, 700), (1.0, 800)], ids=str)
def test_crossing(crossing, K):
    assert zero_crossing(800, 0.75, 0, crossing) == K
    assert zero_crossing(800, 0.75, 300, crossing) == K - 300
    p = torch.full((800,), 0.5, dtype=torch.float64)
    new = update_probability(p, torch.arange(800.0), 0.75, 0, crossing=crossing)
    expected = [0.5 + reference.delta(r, K, 0.05, 0.25) for r in range(800)]
    assert new.tolist() == pytest.approx(expected, abs=1e-14)
    layer = reference.Layer(800, 0.75, at=crossing)
    while not layer.finished:
        layer.update(list(range(800)))
    assert count_updates(800, 0.75, crossing=crossing) == layer.updates


def test_without_recovery_p_never_falls():
    p = torch.full((800,), 0.5, dtype=torch.float64)
    free = update_probability(p, torch.arange(800.0), 0.75, 0)
    kept = update_probability(p, torch.arange(800.0), 0.75, 0, recovery=False)
    assert torch.equal(kept[:700], free[:700]) and (free[701:] < 0.5).all()
    assert (kept[701:] == 0.5).all()


# --- one update ---


@pytest.mark.parametrize(
    ("importance", "pruned"),
    [([3, 1, 2, 0.5, 9], [1, 3]), ([5, 5, 5, 5, 5], [0, 1])],
    ids=["lowest_rank", "tie_by_position"],
)
def test_too_many_reach_one(importance, pruned):
    p = tensor(0.99, 0.99, 0.99, 0.99, 0.0)
    new = update_probability(p, tensor(*importance), 0.4, num_pruned=0, A=0.5)
    assert new.tolist() == [1.0 if group in pruned else 0.0 for group in range(5)]
    assert p.tolist() == [0.99, 0.99, 0.99, 0.99, 0.0]


def test_pruned_groups_take_no_rank():
    # Alive are three of six groups: K = 5/6 · 6 − 3 = 2, so the last of them is at the crossing.
    p = tensor(1.0, 0.5, 1.0, 0.5, 1.0, 0.5)
    new = update_probability(p, tensor(9, 3, 0, 2, 5, 7), 2 / 3, num_pruned=3, A=0.1)
    between = 0.5 + reference.delta(1, 2, 0.1, 0.25)
    assert new.tolist() == pytest.approx([1, between, 1, 0.6, 1, 0.5], abs=1e-15)


def test_other_shape_is_an_error():
    with pytest.raises(ValueError, match=r"`probability` and `importance` .* \(3,\) and \(4,\)"):
        update_probability(torch.zeros(3), torch.zeros(4), 0.5, 0)


ratios = st.floats(0, 0.999)
sizes = st.floats(0.05, 1)
flatness = st.floats(0.02, 0.98)
scores = st.one_of(st.floats(0, 100), st.integers(0, 3).map(float))


@examples
@given(st.lists(scores, min_size=1, max_size=60), ratios, sizes, flatness, st.booleans())
def test_terminates_with_the_exact_count(importance, ratio, A, u, use_rank):
    target = reference.target(ratio, len(importance))
    p, num_pruned, num_updates = torch.zeros(len(importance), dtype=torch.float64), 0, 0
    while num_pruned < target:
        old, p = p, update_probability(p, tensor(*importance), ratio, num_pruned, A, u, use_rank)
        num_pruned, num_updates = int((p == 1).sum()), num_updates + 1
        assert ((p >= 0) & (p <= 1)).all() and (p[old == 1] == 1).all()
        # The least important group alive gains A every time, so this is as long as it can take.
        assert num_updates <= target * (math.ceil(1 / A) + 1)
    assert num_pruned == target
    assert target == 0 or set(p.tolist()) == {0.0, 1.0}
    # With importance that never changes the least important groups go, the first of equal ones.
    least = sorted(range(len(importance)), key=lambda group: (importance[group], group))
    assert sorted(least[:target]) == (p == 1).nonzero().flatten().tolist()


@examples
@given(
    st.integers(2, 40), ratios, sizes, flatness, st.booleans(), st.randoms(use_true_random=False)
)
def test_any_importance_keeps_probabilities_lawful(groups, ratio, A, u, use_rank, random):
    target = reference.target(ratio, groups)
    p = torch.zeros(groups, dtype=torch.float64)
    for _ in range(30):
        num_pruned = int((p == 1).sum())
        if num_pruned == target:
            break
        importance = tensor(*(random.choice([0, 1, random.random()]) for _ in range(groups)))
        old, p = p, update_probability(p, importance, ratio, num_pruned, A, u, use_rank)
        assert ((p >= 0) & (p <= 1)).all() and (p[old == 1] == 1).all()
        assert (p == 1).sum() <= target


# --- importance ---


@pytest.mark.parametrize("norm", [1, 2], ids=["l1", "l2"])
@pytest.mark.parametrize("granularity", ["column", "channel", "filter"])
@pytest.mark.parametrize(
    ("shape", "conv_groups"),
    [
        ((6, 4, 2, 3), 1),
        ((6, 2, 2, 3), 2),
        ((8, 1, 3, 3), 4),
        ((5, 1, 1, 1), 1),
        ((4, 3, 3), 2),
        ((3, 2, 2, 2, 2), 1),
    ],
    ids=["conv2d", "grouped", "depthwise", "single_weight_filters", "conv1d", "conv3d"],
)
def test_importance_equals_reference(shape, conv_groups, granularity, norm):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    groups = WeightGroups(shape, conv_groups, granularity)
    expected = reference.importance(weight.numpy(), conv_groups, granularity, norm)
    assert groups.count == len(expected)
    assert groups.importance(weight, f"l{norm}").tolist() == pytest.approx(expected, rel=1e-12)


# --- the engine, update by update ---


def frozen_conv(seed=0):
    conv = nn.Conv2d(32, 32, 5, dtype=torch.float64)
    weight = torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(seed))
    conv.weight.data.copy_(weight)
    return nn.Sequential(conv)


@pytest.mark.parametrize("norm", [1, 2], ids=["l1", "l2"])
@pytest.mark.parametrize("by", ["rank", "norm"])
def test_engine_equals_reference(by, norm):
    net = frozen_conv()
    pruner = SPPPruner(
        net, prune_ratio=0.75, criterion=f"l{norm}", use_rank=by == "rank", interval=1
    )
    importance = reference.importance(net.state_dict()["0.weight"].numpy(), norm=norm)
    layer = reference.Layer(800, 0.75, by=by)
    for step in range(1000):
        if layer.finished:
            break
        before = list(layer.p)
        assert pruner.step(step)
        layer.update(importance)
        p = pruner.probability["0"].numpy()
        change = np.subtract(layer.p, before)
        np.testing.assert_allclose(p, layer.p, rtol=0, atol=1e-12)
        assert set(np.flatnonzero(p == 1)) == layer.pruned
        # A group right at the crossing may seem to fall, by rounding.
        fell = [0, 0] if layer.finished else [(change < -1e-12).sum(), (change < 1e-12).sum()]
        assert fell[0] <= pruner.num_recovered["0"] <= fell[1]
    assert layer.finished and pruner.finished
    assert pruner.num_updates == layer.updates
    assert pruner.num_pruned == {"0": 600}


@pytest.mark.parametrize(("A", "u", "by_rule"), [row[:3] for row in TABLE])
def test_engine_takes_the_counted_updates(A, u, by_rule):
    pruner = SPPPruner(frozen_conv(), speedup=4, interval=1, A=A, u=u)
    assert pruner.expected_updates == by_rule
    for _ in range(by_rule):
        assert not pruner.finished
        pruner.update()
    assert pruner.finished


def test_zero_crossing_counts_from_the_groups_alive():
    assert zero_crossing(800, 0.75, 0) == reference.crossing(0.75, 800, 0) == 700
    assert zero_crossing(800, 0.75, 599) == reference.crossing(0.75, 800, 599) == 101


@pytest.mark.parametrize("by", ["rank", "norm"])
def test_training_equals_reference(by):
    """Masks, gradients, momentum, weight decay and zeroing, step by step, on moving weights."""
    generator = torch.Generator().manual_seed(1)
    shape = (4, 2, 2, 3)
    conv = nn.Conv2d(2, 4, (2, 3), bias=False, dtype=torch.float64)
    conv.weight.data.copy_(torch.randn(shape, generator=generator))
    goal = torch.randn(shape, generator=generator, dtype=torch.float64)
    layer = reference.Layer(12, 0.6, a=0.3, by=by)
    expected = reference.Training(
        conv.weight.detach().numpy().copy(), goal.numpy(), layer, 3, 0.1, 0.9, 0.05
    )
    # On images with a single 1 the convolution returns its weights.
    images = torch.eye(12, dtype=torch.float64).view(12, 2, 2, 3)
    optimizer = torch.optim.SGD(conv.parameters(), 0.1, momentum=0.9, weight_decay=0.05)
    net = nn.Sequential(conv)
    pruner = SPPPruner(net, prune_ratio=0.6, interval=3, A=0.3, use_rank=by == "rank")
    parameter = next(net.parameters())
    finished_at = None
    for step in range(90):
        pruner.step(step, optimizer)
        expected.update_if_due()
        np.testing.assert_allclose(pruner.probability["0"], layer.p, rtol=0, atol=1e-12)
        output = net(images).view(12, 4).T.reshape(shape)
        (0.5 * (output - goal).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.train_step(pruner.mask["0"].tolist())
        np.testing.assert_allclose(parameter.detach(), expected.weight, rtol=0, atol=1e-12)
        buffer = optimizer.state[parameter]["momentum_buffer"]
        np.testing.assert_allclose(buffer, expected.buffer, rtol=0, atol=1e-12)
        if pruner.finished and finished_at is None:
            finished_at = step
    assert layer.finished and len(layer.pruned) == 8
    assert 9 <= finished_at < 80  # there were masks to sample before, and training after


@pytest.mark.parametrize("u", [0.05, 0.25, 0.9])
@pytest.mark.parametrize("zero_rank", [0.5, 7.0, 700.25])
@pytest.mark.parametrize("num_ranks", [1, 5, 801])
def test_changes_of_whole_ranks_are_those_of_any_rank_bit_for_bit(num_ranks, zero_rank, u):
    p = torch.zeros(num_ranks, dtype=torch.float64)
    ranks = torch.arange(num_ranks, dtype=torch.float64)
    found = rule._delta_of_ranks(num_ranks, zero_rank, 0.05, u, p)
    assert torch.equal(found, delta(ranks, zero_rank, 0.05, u))
