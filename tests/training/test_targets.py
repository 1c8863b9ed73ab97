"""Targets of the whole network: what a fit does with them."""

import json
import logging

import pytest
import torch
from conftest import TinyModule, columns, make_trainer, same, tiny_data
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset

from spp_lightning import SPPCallback, count_macs
from spp_lightning.planning import solve

X = torch.zeros(1, 3, 8, 8)
DENSE = 8 * 8 * (27 * 8 + 72 * 8) + 8 * 4  # MACs of the tiny network for one image
COLUMN = 8 * 8 * 8  # MACs of a column, in both layers
FAST = {"interval": 1, "A": 1.0}


def fit(module, max_steps=30, ckpt_path=None, images=64, **settings):
    callback = SPPCallback(**(FAST | settings))
    trainer = make_trainer(callback, max_steps=max_steps)
    trainer.fit(module, tiny_data(images), ckpt_path=ckpt_path)
    return callback, trainer


@pytest.mark.parametrize("target", [{"macs": 20_000}, {"speedup": 2.5, "of": "network"}])
def test_macs_end_within_one_column(tiny, target):
    callback, _ = fit(tiny, **target)
    limit = target.get("macs", DENSE / 2.5)
    left = sum(count_macs(tiny, X).values())
    assert callback.plan.dense_macs == DENSE
    assert callback.plan.macs == left
    assert limit - COLUMN < left <= limit
    assert sum(columns(tiny)) == (DENSE - left) // COLUMN
    assert callback.plan.estimate == "loss"


def test_latency_is_solved_and_said_at_both_ends(tiny, caplog):
    with caplog.at_level(logging.INFO):
        callback, _ = fit(tiny, speedup=1.2, of="latency", input_shape=(8, 3, 8, 8), threads=1)
    plan = callback.plan
    assert abs(plan.ms / (plan.dense_ms / 1.2) - 1) <= 0.03
    assert plan.measured_on == "cpu with 1 thread for a batch of 8×3×8×8"
    assert caplog.text.count("latency  ") == 2 and caplog.text.count("MACs     ") == 2
    assert "SPP ends with:" in caplog.text


def test_solving_leaves_the_batches_as_they_are(tiny):
    """Also where the loader draws its order from a generator of its own."""

    class Batches(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append(batch[0])

    seen = []
    for target in ({"speedup": 2}, {"speedup": 2, "of": "network"}):
        images = tiny_data().dataset.tensors
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(TensorDataset(*images), 16, shuffle=True, generator=generator)
        batches = Batches()
        with pytest.warns(UserWarning, match="SPP"):
            make_trainer(SPPCallback(**target), batches, max_steps=4).fit(tiny, loader)
        seen.append(torch.stack(batches.seen))
    assert torch.equal(*seen)


def test_resumed_run_keeps_the_ratios_and_solves_nothing(tmp_path, tiny, monkeypatch):
    # One batch a pass: Lightning itself can't go on in the middle of one.
    settings = {"speedup": 2, "of": "network", "interval": 2, "A": 0.25, "images": 16}
    callback, _ = fit(tiny, 40, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        again = TinyModule()
    with pytest.warns(UserWarning, match="SPP"):
        _, trainer = fit(again, 8, **settings)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    monkeypatch.setattr(solve.Planner, "solve", lambda *_: pytest.fail("solved once more"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = TinyModule()
    resumed, _ = fit(other, 40, tmp_path / "middle.ckpt", **settings)
    assert resumed.plan.ratios == callback.plan.ratios
    assert same(other.state_dict(), tiny.state_dict())
    with pytest.raises(ValueError, match=r"was \"the network's MACs / 2\" and is \"the network"):
        fit(other, 40, tmp_path / "middle.ckpt", **(settings | {"speedup": 3}))


class Ratios(Callback):
    """Notes the targets of this rank in a file."""

    def __init__(self, pruning, folder):
        self.pruning, self.folder = pruning, folder

    def on_train_start(self, trainer, pl_module):
        file = self.folder / f"{trainer.global_rank}.json"
        file.write_text(json.dumps([self.pruning.plan.ratios, self.pruning.pruner.num_target]))


@pytest.mark.filterwarnings("ignore:.*before SPP reached")
def test_ranks_agree_on_what_rank_0_has_solved(tmp_path, tiny):
    pruning = SPPCallback(speedup=2, of="network", interval=1)
    noting = Ratios(pruning, tmp_path)
    options = {"strategy": "ddp_spawn", "devices": 2, "max_steps": 1}
    make_trainer(pruning, noting, **options).fit(tiny, tiny_data())
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first[0]) == 2 and 0 < sum(first[1].values()) < 99


class WithoutLoss(TinyModule):
    """A module whose training_step needs its Trainer."""

    def training_step(self, batch, batch_idx):
        assert self.trainer.training
        return super().training_step(batch, batch_idx)


def test_without_a_loss_weights_tell_what_layers_cost(caplog):
    with caplog.at_level(logging.INFO):
        callback, _ = fit(WithoutLoss(), speedup=2, of="network")
    assert callback.plan.estimate == "weights"
    assert "estimates by the weights what layers cost" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"speedup": 40, "of": "network"},
            r"`speedup` \(=40\) of the network's MACs must be from 1 to 32.35: ",
        ),
        ({"macs": 100}, r"`macs` \(=100\) must be from 1,568 to 50,720: "),
        ({"latency_ms": 1e-6}, r"`latency_ms` \(=1e-06\) must be from .* pruned on cpu with"),
        ({"latency_ms": 1, "device": "cuda:7"}, r"`device` \(='cuda:7'\) must be a device of this"),
        ({"macs": 2e4, "input_shape": (1, 5, 8, 8)}, r"\(1, 5, 8, 8\).* must be an input of the"),
    ],
    ids=["speedup", "macs", "latency", "device", "input"],
)
def test_what_cannot_be_reached_is_said_before_the_first_step(tiny, settings, message):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(tiny, **settings)
    assert same(tiny.state_dict(), before)


class OfDicts(TinyModule):
    """A module whose batches are dicts."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def test_no_example_input_is_said_before_the_first_step():
    images = [{"x": x, "y": y} for x, y in zip(*tiny_data().dataset.tensors, strict=True)]
    callback = SPPCallback(speedup=2, of="network")
    with pytest.raises(ValueError, match=r"`input_shape` must be given.*first training.* a dict"):
        make_trainer(callback).fit(OfDicts(), DataLoader(images, 16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macs": 0}, "`macs` must be a finite number above 0, got 0"),
        ({"latency_ms": "8"}, "`latency_ms` must be a finite number above 0, got '8'"),
        ({"macs": 1, "speedup": 2}, "Only one of .*got speedup=2 and macs=1"),
        ({"macs": 1, "of": "network"}, '`of` must be "layers" unless `speedup` is given'),
        ({"of": "net"}, '`of` must be one of "layers", "network", "latency", got \'net\''),
        ({"input_shape": 3}, r"`input_shape` must be a shape such as \(1, 3, 224, 224\), got 3"),
        ({"device": "gpux"}, "`device` must be a device such as .* got 'gpux'"),
        ({"threads": 0}, "`threads` must be a whole number of at least 1, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_target_fails_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        SPPCallback(**settings)
