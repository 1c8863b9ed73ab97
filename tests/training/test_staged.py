"""Pruning in stages, for as long as a metric holds."""

import logging

import pytest
import torch
from conftest import TinyModule, columns, make_trainer, same, tiny_data
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from spp_lightning import StagedSPPCallback

COLUMNS = {0: [0, 0], 1: [9, 24], 2: [14, 36], 3: [18, 48]}  # pruned at 1, 1.5, 2 and 3 times
FAST = {"interval": 1, "A": 1.0, "stages": (1.5, 2, 3)}


class Judged(TinyModule):
    """A module whose validation metric falls with the share of pruned columns."""

    def val_dataloader(self):
        return DataLoader(torch.zeros(2, 3, 8, 8), 2)

    def validation_step(self, batch, batch_idx):
        self.log("kept", 1 - sum(columns(self)) / 99)


def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Judged()


class Noted(Callback):
    """Notes stage, pruned columns and the metrics of the callback after every validation."""

    def __init__(self, pruning):
        self.pruning, self.seen = pruning, []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            own = ("pruned_kept", "held_stage")
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k in own}
            self.seen.append((self.pruning.stage, sum(columns(pl_module)), metrics))


def run(max_drop, *callbacks, max_steps=60, ckpt_path=None, **settings):
    pruning = StagedSPPCallback(monitor="kept", max_drop=max_drop, **(FAST | settings))
    noted = Noted(pruning)
    # One batch a pass: Lightning itself can't go on in the middle of one.
    trainer = make_trainer(
        *(pruning, noted, *callbacks), max_steps=max_steps, enable_checkpointing=bool(callbacks)
    )
    net = module()
    trainer.fit(net, tiny_data(images=16), ckpt_path=ckpt_path)
    return net, pruning, noted.seen


@pytest.mark.parametrize(
    ("max_drop", "stage"), [(0.3, 0), (0.4, 1), (0.55, 2), (0.7, 3)], ids="0123"
)
def test_ends_on_the_last_stage_that_held(max_drop, stage, caplog):
    with caplog.at_level(logging.INFO):
        net, pruning, seen = run(max_drop, patience=2)
    assert pruning.stage == stage
    assert columns(net) == COLUMNS[stage]
    assert pruning.baseline == 1
    values = [1 - sum(COLUMNS[i]) / 99 for i in range(1, min(stage + 1, 3) + 1)]
    assert list(pruning.values.values()) == pytest.approx(values)
    if stage < 3:  # of the two validations of the stage that fails, the second one goes back
        failing = [pruned for at, pruned, _ in seen if at == stage + 1]
        assert failing.count(sum(COLUMNS[stage + 1])) == 1
    assert caplog.text.count("has failed") == (stage < 3)
    table = caplog.text.split("SPP ends with stage")[1]
    assert [line.split()[-1] for line in table.splitlines()[2 : 3 + len(values)]] == (
        ["yes"] * (stage + 1) + ["no"] * (stage < 3)
    )


def test_metrics_are_there_for_finished_stages_only():
    _, _, seen = run(0.55)
    for stage, pruned, metrics in seen:
        finished = [i for i, count in COLUMNS.items() if i and sum(count) == pruned]
        if "pruned_kept" in metrics:
            assert metrics["pruned_kept"] == pytest.approx(1 - pruned / 99)
            assert finished
        if "held_stage" in metrics:
            assert metrics["held_stage"] == finished[0] == stage - 1
    assert [m["held_stage"] for _, _, m in seen if "held_stage" in m] == [1, 2]
    assert seen[0][2] == {}


def test_best_checkpoint_is_the_last_stage_that_held(tmp_path):
    saving = ModelCheckpoint(tmp_path / "held", monitor="held_stage", mode="max")
    pruned = ModelCheckpoint(tmp_path / "pruned", monitor="pruned_kept", mode="max", save_top_k=-1)
    stopping = EarlyStopping("pruned_kept", mode="max", patience=50, strict=False)
    net, _, _ = run(0.55, saving, pruned, stopping)
    best = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    assert same(best, net.state_dict())
    counts = []
    for file in (tmp_path / "pruned").iterdir():
        saved = module()
        saved.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
        counts.append(columns(saved))
    assert counts and all(count in list(COLUMNS.values())[1:] for count in counts)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_run_resumed_in_any_stage_ends_the_same(tmp_path):
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"A": 0.25, "interval": 2, "max_steps": 200}
    net, pruning, seen = run(0.55, every, **settings)
    assert pruning.stage == 2
    stages = [stage for stage, _, _ in seen]
    for stage in (1, 2, 3):
        step = stages.index(stage) + 3  # a validation after each step
        again, resumed, _ = run(0.55, ckpt_path=tmp_path / f"step={step}.ckpt", **settings)
        assert resumed.stage == 2
        assert resumed.values == pruning.values
        assert same(again.state_dict(), net.state_dict())
    with pytest.raises(ValueError, match=r"max_drop was 0\.55 and is 0\.6"):
        run(0.6, ckpt_path=tmp_path / "step=3.ckpt", **settings)


def test_a_fit_that_stops_early_goes_back_to_what_held():
    with pytest.warns(UserWarning, match=r"network is as it was when stage 1 held"):
        net, pruning, seen = run(0.7, max_steps=12, A=0.25)
    assert seen[-1][0] == 2
    assert pruning.stage == 1
    assert columns(net) == COLUMNS[1]


def test_a_given_baseline_prunes_at_once():
    _, pruning, seen = run(0.5, baseline=0.9)
    assert pruning.stage == 2  # 0.67 and 0.49 are within 0.5 of 0.9, 0.33 isn't
    assert seen[0][0] == 1 and seen[0][1] > 0  # pruned by the first step


def test_a_monitor_that_is_not_logged_is_named_before_the_first_step():
    pruning = StagedSPPCallback(monitor="val_acc", max_drop=0.5, **FAST)
    net = module()
    trainer = make_trainer(pruning)
    with pytest.raises(ValueError, match=r"got 'val_acc'; metrics logged: kept"):
        trainer.fit(net, tiny_data())
    assert trainer.global_step == 0


def test_a_fit_without_validation_is_refused(tiny):
    pruning = StagedSPPCallback(monitor="kept", max_drop=0.5, **FAST)
    with pytest.raises(ValueError, match=r"`monitor` \(='kept'\) must be logged in validation"):
        make_trainer(pruning).fit(tiny, tiny_data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"monitor": ""}, "`monitor` must be the name of a metric, got ''"),
        ({"max_drop": -1}, "`max_drop` must be a finite number of at least 0, got -1"),
        ({"stages": (3, 2)}, "`stages` must be a list of ascending speedups above 1"),
        ({"stages": ()}, "`stages` must be a list"),
        ({"mode": "up"}, '`mode` must be one of "max", "min"'),
        ({"patience": 0}, "`patience` must be a whole number of at least 1"),
        ({"speedup": 4}, "`speedup` must not be given beside `stages`.* got 4"),
        ({"baseline": float("nan")}, "`baseline` must be a finite number, got nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_argument_fails_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        StagedSPPCallback(**({"monitor": "val_acc", "max_drop": 0.5} | settings))
