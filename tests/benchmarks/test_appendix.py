"""The appendix's runs, lines and report."""

import json
import math
from dataclasses import replace

import pytest
import report as report_file
import torch
from images import make_tree
from lightning.pytorch import Callback
from reproduction import baselines, lines, paper, training
from reproduction.results import Results, layer_spread
from reproduction.rows import ALL_TABLES, BASELINE, CONTROL, DEFAULT, PLAIN_L1, Configuration
from reproduction.schedules import SCHEDULES, Schedule
from reproduction.simpler import ColumnMasks, FilterMasks, MagnitudeMasks, filters_to_keep
from reproduction.tables import report
from reproduction.training import Run

from spp_lightning import ConvNet, count_macs

TINY = Schedule("short", 4, 24, 30, ())
STEEP = replace(DEFAULT, A=0.5, interval=60)
LEADS = replace(
    STEEP,
    weight_decay=0.002,
    classifier_decay=0.25,
    straight_through=True,
    score_decay=0.9,
    dead_filters=False,
    retraining_lr=2.0,
    last_batch=2,
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs of a few steps on a few images."""
    data = tmp_path / "data"
    make_tree(data)
    module = training.CIFAR10DataModule
    monkeypatch.setattr(
        training, "CIFAR10DataModule", lambda *a, **k: module(*a, **{"batch_size": 20, **k})
    )
    monkeypatch.setattr(training, "SAVE_EVERY", 2)

    def make(row, folder="runs", seed=0):
        return Run(tmp_path / folder, data, TINY, row, seed)

    return make


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore")  # what Lightning says to short fits
@pytest.mark.parametrize(
    "row",
    [
        STEEP,
        replace(STEEP, pruning_lr=0.5, distillation=0.5),
        Configuration("gradual columns", weight_decay=0.001),
        LEADS,
        replace(STEEP, masking="penalize"),
    ],
    ids=["spp", "rate and distillation", "gradual", "leads", "penalties"],
)
def test_a_run_that_stops_goes_on_where_it_was(run, row, monkeypatch):
    whole, stopped = run(row, "whole"), run(row, "stopped")
    for one in (whole, stopped):
        one.baseline.train()
    whole.train()

    class Crash(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 11:
                raise RuntimeError("out of power")

    pruning = Run._callbacks
    monkeypatch.setattr(Run, "_callbacks", lambda *given: [*pruning(*given), Crash()])
    with pytest.raises(RuntimeError, match="out of power"):
        stopped.train()
    assert not stopped.final.is_file()
    monkeypatch.setattr(Run, "_callbacks", pruning)
    stopped.train()
    assert same(whole.network().state_dict(), stopped.network().state_dict())
    ours, theirs = whole.line({}), stopped.line({})
    for line in (ours, theirs):
        assert line.pop("seconds") > 0
    assert ours == theirs
    checkpoint = torch.load(whole.final, weights_only=True)
    (optimizer,) = checkpoint["optimizer_states"]
    decays = [group["weight_decay"] for group in optimizer["param_groups"]]
    own = row.weight_decay
    assert decays == [own, own, row.classifier_decay or 250 * own, 0]
    assert ours["precision"] == "32-true" and 0 <= ours["train_accuracy"] <= 100
    if row.method == "spp":
        assert ours["curve"][-1] == [2 * (ours["updates"] - 1), 0.76, 0.75, 0.75]
        assert ours["pruning_iterations"] == 2 * ours["updates"]
        assert ours["conv_macs"] == 32 * 18 * 1024 + 32 * 200 * 256 + 64 * 200 * 64


@pytest.mark.filterwarnings("ignore")
def test_a_kept_baseline_is_put_where_its_run_would_leave_it(run, tmp_path):
    trained, other = run(BASELINE), run(BASELINE, "elsewhere")
    assert not baselines.restore(other, tmp_path / "kept")
    trained.train()
    path = baselines.keep(trained, tmp_path / "kept")
    assert path.name == "short_32-true_seed0.ckpt" and path.stat().st_size < 4e5
    assert baselines.restore(other, tmp_path / "kept")
    assert same(trained.network().state_dict(), other.network().state_dict())
    ours, theirs = trained.line({}), other.line({})
    assert ours == theirs and ours["seconds"] > 0
    other.final.write_bytes(b"newer")
    assert baselines.restore(other, tmp_path / "kept")
    assert other.final.read_bytes() == b"newer"


def test_runs_of_another_precision_are_others(run):
    one = run(STEEP)
    other = Run(one.runs, one.data, TINY, STEEP, 0, "bf16-mixed")
    assert one.folder != other.folder
    assert one.baseline.final != other.baseline.final


def test_filters_for_a_speedup():
    shapes, places = [(32, 3, 5, 5), (32, 32, 5, 5), (64, 32, 5, 5)], (1024, 256, 64)
    for speedup in (2, 4, 10):
        a, b, c = filters_to_keep(shapes, places, speedup)
        macs = 25 * (a * 3 * 1024 + b * a * 256 + c * b * 64)
        assert 0.93 * 12_288_000 <= speedup * macs <= 12_288_000
        assert max(a / 32, b / 32, c / 64) - min(a / 32, b / 32, c / 64) <= 1 / 32


@pytest.mark.parametrize("speedup", [2, 4, 10])
def test_simpler_methods_leave_the_share_of_macs(speedup):
    net = ConvNet()
    dense = sum(list(count_macs(net, net.example_input_array).values())[:3])
    for method in (ColumnMasks(speedup), FilterMasks(speedup, (1024, 256, 64))):
        pruned = ConvNet()
        for name, mask in method.choose(pruned, 1.0).items():
            pruned.get_parameter(name).data.mul_(mask)
        left = sum(list(count_macs(pruned, net.example_input_array).values())[:3])
        assert 0.93 <= left * speedup / dense <= 1
    for name, mask in MagnitudeMasks(speedup).choose(net, 1.0).items():
        weight = net.get_parameter(name).detach()
        assert int(mask.sum()) == math.floor(weight.numel() / speedup)
        assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_gradual_masks_follow_the_cubic_schedule():
    net = ConvNet()
    halfway = ColumnMasks(4).choose(net, 1 - (1 - 0.5) ** 3)["conv2.weight"]
    assert int((~halfway).sum()) == math.ceil(0.875 * 600)
    norms = net.conv2.weight.detach().abs().sum(0)
    assert norms[halfway].min() >= norms[~halfway].max()


def test_lines_survive_a_crash_while_one_is_written(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')
    assert lines.read(path) == [{"a": 1}]
    lines.append(path, {"c": 3})
    assert lines.read(path) == [{"a": 1}, {"c": 3}]
    path.write_text("nonsense\n" + json.dumps({"d": 4}) + "\n")
    with pytest.raises(ValueError, match="line 1, must be JSON"):
        lines.read(path)


def test_every_configuration_has_its_own_folder_and_comes_back_from_json():
    rows = {row for table in ALL_TABLES.values() for row in table} | {BASELINE, CONTROL}
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert Configuration.from_dict(json.loads(json.dumps(row.as_dict()))) == row
        for schedule in SCHEDULES.values():
            assert schedule.interval(row.interval) * schedule.divisor == row.interval
    assert set(paper.TABLE2) == {row.interval for row in ALL_TABLES["table2"]}


def test_reports_never_mix_precisions(tmp_path, monkeypatch):
    monkeypatch.setattr(report_file, "RESULTS", tmp_path)
    path = report_file.lines_path("full")
    lines.append(path, line(BASELINE, 80.0, train_accuracy=92.25))
    lines.append(path, line(DEFAULT, 77.5, train_accuracy=86.75))
    assert [x.name for x in report_file.write("full")] == ["appendix_full.md"]
    lines.append(path, line(BASELINE, 70.0, precision="bf16-mixed"))
    lines.append(path, line(replace(DEFAULT, weight_decay=0.001), 78.0, train_accuracy=88.0))
    one, other = report_file.write("full")
    text = one.read_text()
    assert "precision 32-true." in text
    assert "| SPP, 4× | 77.50 |  | 2.50 | 86.75 | 1 |" in text
    assert "| SPP, 4×, weight decay 0.001 | 78.00 | +0.50 | 2.00 | 88.00 | 1 |" in text
    assert "At 4×, from plain SPP: raise the accuracy by: weight decay 0.001 (+0.50)." in text
    assert "At 10×, from plain SPP: no lead measured." in text
    assert other.name == "appendix_full_bf16-mixed.md"
    assert "| baseline | 70.0 | 81.5 |" in other.read_text() and "77.5" not in other.read_text()


def line(row, accuracy, seed=0, **more):
    return {
        "configuration": row.as_dict(),
        "seed": seed,
        "accuracy": accuracy,
        "updates": 75,
        "curve": [[0, 0.0, 0.0, 0.0], [6, 0.5, 0.25, 0.75], [12, 0.75, 0.75, 0.75]],
        "sparsity": {"conv1": 0.76, "conv2": 0.9, "conv3": 0.9},
        "conv_macs": 1,
        "conv_macs_dense": 4,
        "seconds": 1.0,
        "data": "CIFAR-10",
        "device": "one",
        "precision": "32-true",
        "versions": {"torch": "2"},
        "date": "today",
        "commit": "abc",
        **more,
    }


def test_report_sets_our_numbers_beside_the_papers():
    results = Results(
        [
            *(line(BASELINE, accuracy, seed) for seed, accuracy in enumerate((80.0, 82.0))),
            *(line(DEFAULT, accuracy, seed) for seed, accuracy in enumerate((79.0, 82.0))),
            line(CONTROL, 83.0),
            line(replace(DEFAULT, A=0.01), 50.0, sparsity={"conv1": 0.76, "conv2": 0.74}),
            line(replace(DEFAULT, A=0.1), 79.5, baseline_accuracy=81.0, updates=39),
            line(replace(DEFAULT, speedup=2), 80.0, baseline_accuracy=81.0),
            line(replace(DEFAULT, speedup=10), 60.0),
            line(replace(DEFAULT, speedup=10, masking="scale"), 61.5),
            line(PLAIN_L1, 70.0, curve=[[0, 0.0, 0.0, 0.0], [5, 0.75, 0.75, 0.75]]),
        ]
    )
    text = report(SCHEDULES["full"], results, [])
    assert "| baseline | 81.0 ± 1.4 | 81.5 |" in text
    assert "| L1, 4× | 80.5 ± 2.1 | 81.2 | 0.5 ± 0.7 | 0.3 | 4.0 |" in text
    assert "| t = 180 | 75 | 13,500 | 13,300 | +1.5 % | 80.5 ± 2.1 | 81.2 |" in text
    assert "| A = 0.1 | 39 | 7,020 | 7,000 | +0.3 % | 79.5 | 81.2 |" in text
    assert (
        "| A = 0.01 (target not reached) | 75 | 13,500 | 66,000 | -79.5 % | 50.0 | 81.2 |" in text
    )
    assert "2 of 2 cells within 6 %. Accuracies from 79.50 to 80.50 %." in text
    assert "| A = 0.075 |  |  | 9,000 |  | not measured | 81.3 |" in text
    # Against the baseline that it started from, not the one that has a line.
    assert "| L1, 2× | 80.0 | 81.7 | 1.0 | -0.2 | 3.0 |" in text
    # Halfway the three layers are apart by a standard deviation of 20.4 points, for half the time.
    assert "| ranks | 10.1 ± 0.0 | 50.0 ± 0.0 | 80.5 ± 2.1 | 81.2 |" in text
    assert "| plain L1 | 0.0 | 0.0 | 70.0 | 80.7 |" in text
    assert "| A = 0.05, u = 0.25 | 75 | 13,500 | 13,000 | +3.8 % | 80.5 ± 2.1 | 81.2 |" in text
    assert "| the method's own | 60.0 | 20.0 |  |" in text
    assert "| scaled by 1 - p, not sampled | 61.5 | 18.5 | +1.5 |" in text
    assert layer_spread([[0, 0.0, 0.0], [1, 0.75, 0.75]]) == (0.0, 0.0)
    assert "Nothing measured yet" in report(SCHEDULES["full"], Results([]), [])
