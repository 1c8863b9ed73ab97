"""Each lead to the drop in accuracy does what its row says, by hand-computed numbers."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from reproduction.kept import KeptColumns
from reproduction.rates import LastBatches, PhaseRates
from reproduction.rows import ALL_TABLES, BASELINE, CAUSES, CONTROL, DEFAULT, by_worth
from reproduction.simpler import ColumnMasks
from reproduction.training import penalty_ceiling
from reproduction.variants import Importance, Penalize, StraightThrough

from spp_lightning import ConvNet, SPPCallback, SPPPruner


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = ConvNet()
    with torch.no_grad():
        net.conv1.weight.mul_(200)  # else all that follows is 0
    return net


@pytest.fixture
def images():
    return 60 * torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pruning(net, **options):
    """A callback whose pruner is at work on a network in training mode."""
    callback = SPPCallback(**options)
    callback.pruner = SPPPruner(net, **options)
    net.train()
    return callback


def gradients(net, images):
    net.zero_grad()
    net(images).square().mean().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("lost", [False, True], ids=["no column lost", "a column lost"])
def test_masks_in_the_forward_pass_only(net, images, lost):
    callback = pruning(net, speedup=4, A=1.0 if lost else 0.5, interval=1)
    pruner = callback.pruner
    pruner.step(0)
    assert (pruner.num_pruned["conv2"] > 0) == lost
    weight = {name: layer._parameters["weight"].detach() for name, layer in pruner.layers.items()}
    mask = {name: pruner.mask[name].view(1, *w.shape[1:]).clone() for name, w in weight.items()}
    assert 0 < int(mask["conv2"].sum()) < 800
    variant = StraightThrough(callback)
    variant.on_train_start(None, net)

    x = images[:, :1].expand(-1, 32, -1, -1)[:, :, :8, :8].clone().requires_grad_()
    y = net.conv2(x)
    assert torch.equal(y, F.conv2d(x, weight["conv2"] * mask["conv2"], net.conv2.bias, padding=2))
    grad = torch.randn(y.shape)
    y.backward(grad)
    whole = F.conv_transpose2d(grad, weight["conv2"], padding=2)
    torch.testing.assert_close(x.grad, whole, rtol=1e-4, atol=1e-4)
    by_weight = torch.nn.grad.conv2d_weight(x.detach(), weight["conv2"].shape, grad, padding=2)
    expected = by_weight * mask["conv2"] if lost else by_weight
    found = net.conv2._parameters["weight"].grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
    variant.on_train_end(None, net)
    assert "forward" not in vars(net.conv2)


def test_importance_as_a_running_sum_without_filters_that_nothing_reads(net):
    callback = pruning(net, speedup=4, interval=1)
    variant = Importance(callback, decay=0.5, dead_filters=False)
    variant.on_train_start(None, net)
    first = net.conv1._parameters["weight"].detach().clone()
    groups = callback.pruner._masked[0].groups
    torch.testing.assert_close(groups.importance(first), first.abs().sum(0).flatten())
    # conv2 reads channels 0 to 29 only from now on.
    callback.pruner.probability["conv2"].view(32, 25)[30:] = 1
    variant.on_train_batch_end(None, net)
    expected = 2 * first[:30].abs().sum(0) + 0.5 * first.abs().sum(0)
    torch.testing.assert_close(groups.importance(2 * first), expected.flatten())
    # Of conv3's filters all are read.
    last = net.conv3._parameters["weight"].detach()
    found = callback.pruner._masked[2].groups.importance(last)
    torch.testing.assert_close(found, last.abs().sum(0).flatten())
    saved = variant.state_dict()
    again = Importance(callback, decay=0.5, dead_filters=False)
    again.load_state_dict(saved)
    again.on_train_start(None, net)
    expected = 3 * first[:30].abs().sum(0) + 0.5 * saved["conv1"]["sum"].view(3, 5, 5)
    found = callback.pruner._masked[0].groups.importance(3 * first)
    torch.testing.assert_close(found, expected.flatten())


def test_importance_by_taylor_expansion(net, images):
    callback = pruning(net, speedup=4, interval=1)
    variant = Importance(callback, decay=0.0, dead_filters=True, taylor=True)
    variant.on_train_start(None, net)
    groups, weight = callback.pruner._masked[1].groups, net.conv2._parameters["weight"]
    norm = weight.detach().abs().sum(0).flatten()
    torch.testing.assert_close(groups.importance(weight), norm)  # before the first step
    changes = []
    for batch in (images, images.flip(0) * 2):
        net.zero_grad()
        grad = gradients(net.train(), batch)["conv2.weight"]
        # What the loss changes by, to first order, if a column's weights become 0.
        changes.append(torch.einsum("nchw,nchw->chw", weight.detach(), grad).abs().flatten())
        variant.on_train_batch_end(None, net)
    expected = 0.95 * changes[0] + 0.05 * changes[1]
    torch.testing.assert_close(groups.importance(weight), expected)
    again = Importance(callback, decay=0.0, dead_filters=True, taylor=True)
    again.load_state_dict(variant.state_dict())
    again.on_train_start(None, net)
    found = callback.pruner._masked[1].groups.importance(weight)
    assert torch.equal(found, groups.importance(weight))


def test_penalties_in_the_place_of_masks(net, images):
    plain = gradients(net.train(), images)["conv2.weight"].clone()
    callback = pruning(net, speedup=4, A=0.5, interval=1)
    callback.pruner.step(0)
    variant = Penalize(callback, ceiling=3.0)
    variant.on_train_start(None, net)
    assert all(bool(mask.all()) for mask in callback.pruner.mask.values())
    found = gradients(net, images)["conv2.weight"]
    torch.testing.assert_close(found, plain)  # nothing is masked
    variant.on_before_optimizer_step(None, net, None)
    weight = net.conv2._parameters["weight"].detach()
    p = callback.pruner.probability["conv2"].float().view(1, 32, 5, 5)
    assert float(p.max()) == 0.5
    torch.testing.assert_close(found, plain + 3 * p * weight)
    # At p = 1 a column is pruned.
    while not callback.pruner.num_pruned["conv2"]:
        callback.pruner.step(callback.pruner.num_updates)
        variant.on_train_batch_end(None, net)
    assert int((~callback.pruner.mask["conv2"]).sum()) == callback.pruner.num_pruned["conv2"]
    # exp(-5) is left of a weight whose p, and with it the decay, grows steadily.
    rate, steps, left = 0.001 / (1 - 0.9), 450, 1.0
    for step in range(steps):
        left *= 1 - rate * penalty_ceiling(net, steps) * step / steps
    assert left == pytest.approx(2.718281828**-5, rel=0.1)


class Clock:
    """A Trainer of which nothing but the steps and the optimizers is looked at."""

    def __init__(self, *optimizers):
        self.optimizers = list(optimizers)
        self.global_step = 0
        self.accumulate_grad_batches = 1


def test_learning_rates_and_batches_by_phase(net):
    optimizer = net.configure_optimizers()["optimizer"]
    before = [group["lr"] for group in optimizer.param_groups]
    assert before == [0.001, 0.002, 0.001, 0.002]
    clock = Clock(optimizer)
    rates = PhaseRates(0.05, 2.0, lambda: clock.global_step >= 3, until=6)
    batches = LastBatches(8, start=6)
    found, sizes = [], []
    for clock.global_step in range(8):
        if clock.global_step == 6:  # what a scheduler does at the milestone
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
        for callback in (rates, batches):
            callback.on_train_batch_start(clock, net)
        found.append([group["lr"] for group in optimizer.param_groups])
        sizes.append(clock.accumulate_grad_batches)
    factors = [0.05, 0.05, 0.05, 2, 2, 2, 0.1, 0.1]
    assert found == [pytest.approx([lr * f for lr in before]) for f in factors]
    assert sizes == [1] * 6 + [8] * 2


def test_steps_on_kept_columns_are_those_of_zeroed_weights(net, images):
    masks = ColumnMasks(4, updates=2)
    clock, kept = Clock(net.configure_optimizers()["optimizer"]), KeptColumns(masks, "compact")
    for clock.global_step in range(2):  # the masks grow once
        masks.on_train_batch_end(clock, net)
        zeroed = {name: grad.clone() for name, grad in gradients(net, images).items()}
        kept.on_train_batch_start(clock, net)
        found = gradients(net, images)
        for name, grad in zeroed.items():
            mask = masks.masks.get(name, torch.tensor(1))
            tolerance = 1e-5 * grad.abs().max()
            torch.testing.assert_close(found[name], grad * mask, rtol=1e-3, atol=tolerance)
        assert not found["conv2.weight"][:, ~masks.masks["conv2.weight"]].any()
        kept.on_train_end(clock, net)
        assert type(net.conv2) is torch.nn.Conv2d
    assert masks.masks["conv2.weight"].sum() == 200


def test_rows_come_in_the_order_of_their_worth():
    rows = by_worth(list(ALL_TABLES))
    names = [row.name for row in rows[:7]]
    assert names == [
        *("baseline", "spp 4x", "spp 10x masking=scale distillation=0.7 weight_decay=0.0005"),
        "gradual-columns 10x weight_decay=0.0005",
        "spp 4x masking=scale distillation=0.7 weight_decay=0.0005",
        *("gradual-columns 4x weight_decay=0.0005", "spp 10x"),
    ]
    assert len(set(rows)) == len(rows)
    assert set(rows) == {
        BASELINE,
        CONTROL,
        *(row for table in ALL_TABLES.values() for row in table),
    }
    assert by_worth(["figure1"]) == [BASELINE, DEFAULT, CONTROL, replace(DEFAULT, use_rank=False)]
    assert len(set(CAUSES.values())) == len(CAUSES)
