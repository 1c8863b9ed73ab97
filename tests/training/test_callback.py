"""SPPCallback in a Lightning Trainer."""

import inspect
import logging
import math
import pickle
from typing import get_type_hints

import pytest
import torch
import torchvision
from conftest import TinyModule, make_trainer, target, tiny_data, zero_columns
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from spp_lightning import ConvNet, DigitsDataModule, SPPCallback, SPPPruner
from spp_lightning.method.settings import SPPSettings
from spp_lightning.training.settings import TrainingSettings

FAST = {"A": 0.5, "interval": 1}  # at its target within about ten steps


# --- the result of a fit ---


class Classifier(LightningModule):
    """Any torchvision network, trained on one batch of noise."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-4, momentum=0.9)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "vgg11_bn", "mobilenet_v3_small", "densenet121"]
)
def test_exact_count_on_torchvision_networks(name):
    network = torchvision.models.get_model(name, weights=None)
    if name == "vgg11_bn":
        network.classifier = nn.Linear(512 * 7 * 7, 10)  # its own takes 0.5 GB
    module = Classifier(network)
    keys = list(module.state_dict())
    loader = tiny_data(images=8, batch_size=2)
    loader.dataset.tensors = (torch.randn(8, 3, 32, 32), loader.dataset.tensors[1])
    callback = SPPCallback(**FAST)
    make_trainer(callback, max_steps=20).fit(module, loader)

    convolutions = {n: m for n, m in module.named_modules() if isinstance(m, nn.Conv2d)}
    depthwise = {n for n, m in convolutions.items() if m.groups > 1}
    assert len(depthwise) == (11 if name == "mobilenet_v3_small" else 0)
    counted = {n: zero_columns(m) for n, m in convolutions.items()}
    expected = {
        n: 0 if n in depthwise else target(m.in_channels * math.prod(m.kernel_size))
        for n, m in convolutions.items()
    }
    assert counted == expected
    assert list(module.state_dict()) == keys
    assert {type(m) for m in convolutions.values()} == {nn.Conv2d}


def test_convnet_on_digits_ends_exact_and_plain():
    net = ConvNet()
    callback = SPPCallback(speedup=4, **FAST)
    make_trainer(callback, max_steps=16).fit(net, DigitsDataModule(batch_size=16))
    assert [zero_columns(layer) for layer in (net.conv1, net.conv2, net.conv3)] == [57, 600, 600]
    assert callback.pruner.finished
    for layer in (net.conv1, net.conv2, net.conv3):
        assert type(layer) is nn.Conv2d
        assert not [name for name in vars(layer) if "spp" in name]
        assert not layer._forward_hooks
    ConvNet().load_state_dict(net.state_dict())


def test_another_fit_goes_on_and_revives_nothing(tiny):
    callback = SPPCallback(**FAST)
    make_trainer(callback).fit(tiny, tiny_data())
    pruned = tiny.conv2.weight.detach().flatten(1) == 0
    weight = tiny.conv2.weight.detach().clone()
    make_trainer(callback).fit(tiny, tiny_data())
    assert torch.equal(tiny.conv2.weight.flatten(1) == 0, pruned)
    assert not torch.equal(tiny.conv2.weight, weight)

    with torch.random.fork_rng():
        other = TinyModule()
    make_trainer(callback).fit(other, tiny_data())
    assert callback.pruner.model is other
    assert zero_columns(other.conv1) == target(27)


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("first", [True, False], ids=["before SPP", "after SPP"])
@pytest.mark.parametrize(
    "averaging",
    [
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
    ],
    ids=["EMA", "SWA"],
)
def test_averaged_weights_are_pruned_too(tiny, averaging, first):
    callbacks = [SPPCallback(A=0.25, interval=1), averaging()]
    callbacks = callbacks[::-1] if first else callbacks
    make_trainer(*callbacks, max_steps=-1, max_epochs=10).fit(tiny, tiny_data())
    assert zero_columns(tiny.conv1) == target(27)
    assert zero_columns(tiny.conv2) == target(72)


@pytest.mark.parametrize("averaged", [False, True], ids=["weights", "EMA"])
def test_validation_sees_the_expected_mask(tiny, averaged):
    """Weights, or their running average where a callback validates that, times 1 − p."""
    seen = []
    tiny.validation_step = lambda batch, batch_idx: None

    class Watch(SPPCallback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
            p, masked = self.pruner.probability["conv2"], pl_module.conv2.weight
            factor = (1 - p).float().view(1, 8, 3, 3)
            assert torch.equal(masked, pl_module.conv2._parameters["weight"] * factor)
            between = int(((p > 0) & (p < 1)).sum())
            seen.append((zero_columns(pl_module.conv2), self.pruner.num_pruned["conv2"], between))

    callbacks = [Watch(interval=1), *([EMAWeightAveraging(decay=0.9)] if averaged else [])]
    trainer = make_trainer(*callbacks, max_steps=80, num_sanity_val_steps=1)
    trainer.fit(tiny, tiny_data(), tiny_data())
    assert all(zero == pruned for zero, pruned, _ in seen)
    assert seen[0] == (0, 0, 0) and seen[-1] == (54, 54, 0)
    assert 0 < seen[len(seen) // 2][1] < 54 and seen[len(seen) // 2][2] > 0


# --- steps ---


class WatchMasks(Callback):
    """Notes the mask of conv2 at every micro-batch, with the step it belongs to."""

    def __init__(self, pruning):
        self.pruning, self.masks = pruning, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.masks.append((trainer.global_step, self.pruning.pruner.mask["conv2"].clone()))


def test_accumulated_batches_are_one_step():
    """Batch 16 and 4 × 4 accumulated draw the same masks and prune the same columns."""
    runs = []
    for batch_size, accumulate in ((16, 1), (4, 4)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = TinyModule()
        callback = SPPCallback(interval=2, A=0.25)
        watch = WatchMasks(callback)
        trainer = make_trainer(callback, watch, accumulate_grad_batches=accumulate)
        trainer.fit(module, tiny_data(batch_size=batch_size))
        runs.append((module, callback, dict(watch.masks), len(watch.masks)))
    (one, first, masks, _), (four, second, micro, num_micro) = runs
    assert first.pruner.num_updates == second.pruner.num_updates
    assert num_micro == 120
    assert masks.keys() == micro.keys() == set(range(30))
    assert all(torch.equal(masks[i], micro[i]) for i in masks)
    torch.testing.assert_close(one.conv2.weight, four.conv2.weight)
    assert torch.equal(one.conv2.weight == 0, four.conv2.weight == 0)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [7, 13], ids=["while pruning", "while retraining"])
def test_resume_is_bitwise_exact(tmp_path, optimizer, stop):
    """A run that saved at a step and died equals, resumed, the run that never stopped."""

    def run(ckpt_path=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = TinyModule(optimizer)
        callback = SPPCallback(A=0.5, interval=1)
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1)
        trainer = make_trainer(callback, saving, max_steps=24, enable_checkpointing=True)
        # One batch a pass: Lightning itself can't go on in the middle of one.
        trainer.fit(module, tiny_data(images=16), ckpt_path=ckpt_path)
        return module, callback.pruner, trainer.optimizers[0].state_dict()

    whole, pruner, state = run()
    assert (stop < 10) == bool(pruner.num_updates > stop)
    middle = tmp_path / f"step={stop}.ckpt"
    saved = torch.load(middle, weights_only=True)["callbacks"]["SPPCallback"]["pruner"]
    assert saved["num_updates"] == min(stop + 1, pruner.num_updates)
    resumed, resumed_pruner, resumed_state = run(middle)

    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name in pruner.probability:
        assert torch.equal(pruner.probability[name], resumed_pruner.probability[name])
        assert torch.equal(pruner.mask[name], resumed_pruner.mask[name])
    assert resumed_pruner.num_updates == pruner.num_updates
    for index, entries in state["state"].items():
        for name, value in entries.items():
            other = resumed_state["state"][index][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), name


class SavedSteps(Callback):
    """Notes the step of every checkpoint."""

    def __init__(self):
        self.steps = []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.steps.append(trainer.global_step)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_run_does_not_save_in_the_middle_of_a_step(tmp_path):
    """Its first checkpoint would lack the gradients that are being accumulated."""

    def saved_steps(ckpt_path=None):
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [SPPCallback(**FAST), watch := SavedSteps(), saving]
        trainer = make_trainer(
            *callbacks, max_steps=12, accumulate_grad_batches=4, enable_checkpointing=True
        )
        trainer.fit(TinyModule(), tiny_data(), ckpt_path=ckpt_path)
        return watch.steps

    assert saved_steps() == [2, 4, 6, 8, 10, 12]
    assert saved_steps(tmp_path / "step=4.ckpt") == [6, 8, 10, 12]


def test_state_loaded_before_a_fit_counts(tiny):
    first = SPPCallback(**FAST)
    with pytest.warns(UserWarning, match="SPP"):
        make_trainer(first, max_steps=5).fit(tiny, tiny_data())
    second = SPPCallback(**FAST)
    second.load_state_dict(first.state_dict())
    make_trainer(second).fit(tiny, tiny_data())
    assert second.pruner.state_dict()["step"] == 35
    assert second.pruner.finished


def test_checkpoint_in_the_middle_is_plain(tmp_path, tiny):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = make_trainer(SPPCallback(A=0.5, interval=1), saving, enable_checkpointing=True)
    trainer.fit(tiny, tiny_data())
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    plain = TinyModule()
    plain.load_state_dict(checkpoint["state_dict"])
    p = checkpoint["callbacks"]["SPPCallback"]["pruner"]["probability"]["conv2"]
    pruned = (plain.conv2.weight.flatten(1) == 0).all(0)
    assert torch.equal(pruned, p == 1)  # live columns are whole, whatever the mask of the step
    assert 0 < int(pruned.sum()) < target(72)


def test_compiled_network_compiles_once(tiny):
    """Sampling, updates, the switch to retraining: nothing of it compiles the step again."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(tiny, backend=backend, fullgraph=True)
    callback = SPPCallback(**FAST)
    make_trainer(callback).fit(compiled, tiny_data())
    assert callback.pruner.finished
    assert zero_columns(tiny.conv2) == target(72)
    assert len(graphs) == 1


# --- what it says ---


def test_it_says_what_it_prunes_and_how_long_it_takes(tiny, caplog):
    callback = SPPCallback(interval=2)
    with caplog.at_level(logging.INFO), pytest.warns(match="SPP") as caught:
        make_trainer(callback, max_steps=20).fit(tiny, tiny_data())
    table = "SPP prunes columns:\nlayer  groups  pruned  ratio\nconv1      27      21  77.8%\n"
    assert f"{table}conv2      72      54  75.0%\n" in caplog.text
    assert callback.pruner.expected_updates == 71
    messages = [str(warning.message) for warning in caught]
    assert any("about 140 more steps" in m and "stops after 20" in m for m in messages)
    ended = next(m for m in messages if "before SPP reached its target" in m)
    done = callback.pruner.num_pruned
    assert f"conv1 {done['conv1']} of 21; conv2 {done['conv2']} of 54" in ended
    assert "after 20 steps and 11 updates" in ended
    assert type(tiny.conv1) is nn.Conv2d


def test_sparsity_reaches_progress_bar_and_loggers(tmp_path, tiny):
    board = TensorBoardLogger(tmp_path, name="", version="board")
    table = CSVLogger(tmp_path, name="", version="table")
    trainer = make_trainer(
        SPPCallback(A=0.1, interval=4), max_steps=200, logger=[board, table], log_every_n_steps=4
    )
    trainer.fit(tiny, tiny_data())
    share = (21 + 54) / (27 + 72)
    assert trainer.progress_bar_metrics["sparsity"] == pytest.approx(share)
    assert float(trainer.callback_metrics["sparsity"]) == pytest.approx(share)

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    curve = [(e.step, e.value) for e in events.Scalars("sparsity/conv2")]
    assert curve[-1][1] == pytest.approx(0.75)
    assert [step for step, _ in curve] == list(range(0, 4 * len(curve), 4))
    assert [value for _, value in curve] == sorted(value for _, value in curve)
    remaining = events.Scalars("macs/remaining")[-1].value
    assert remaining == 64 * (8 * 6 + 8 * 18)
    assert events.Scalars("macs/speedup")[-1].value == pytest.approx(64 * 8 * 99 / remaining)
    assert {"probability/conv1", "probability/conv2"} <= set(events.Tags()["histograms"])
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    fell = [events.Scalars(f"recovered/{name}") for name in ("conv1", "conv2")]
    assert max(event.value for curve in fell for event in curve) > 0
    header = (tmp_path / "table" / "metrics.csv").read_text().splitlines()[0]
    assert "sparsity/conv1" in header
    assert "macs/remaining" in header


def test_nothing_to_prune_is_said(tiny, caplog):
    with caplog.at_level(logging.INFO):
        make_trainer(SPPCallback(prune_ratio=0.0), max_steps=2).fit(tiny, tiny_data())
    assert "nothing left to prune" in caplog.text
    assert zero_columns(tiny.conv1) == 0


# --- when things go wrong ---


def test_exception_in_a_step_leaves_a_plain_network(tiny):
    class Broken(RuntimeError):
        pass

    def step(batch, batch_idx):
        if callback.pruner.num_updates > 5:
            raise Broken
        return TinyModule.training_step(tiny, batch, batch_idx)

    callback = SPPCallback(**FAST)
    tiny.training_step = step
    with pytest.raises(Broken):
        make_trainer(callback).fit(tiny, tiny_data())
    assert type(tiny.conv1) is nn.Conv2d
    assert zero_columns(tiny.conv2) == callback.pruner.num_pruned["conv2"] > 0
    del tiny.training_step
    make_trainer(callback).fit(tiny, tiny_data())
    assert zero_columns(tiny.conv2) == target(72)


def test_nan_weight_names_layer_and_step_and_keeps_the_state(tiny):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                self.before = callback.pruner.state_dict()
                with torch.no_grad():
                    pl_module.conv2._parameters["weight"][0, 0, 0, 0] = float("nan")

        def on_train_batch_end(self, *_):
            pass

    callback, poison = SPPCallback(A=0.25, interval=1), Poison()
    with pytest.raises(ValueError, match=r"layer 'conv1'.*NaN.*at step 6.*after update 6"):
        make_trainer(callback, poison).fit(tiny, tiny_data())
    after = callback.pruner.state_dict()
    for name, p in poison.before["probability"].items():
        assert torch.equal(p, after["probability"][name])
    assert after["num_updates"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune_ratio": 0.5, "speedup": 2}, "must not both be given"),
        ({"prune_ratio": 1.0}, r"`prune_ratio` must be in \[0, 1\), got 1.0"),
        ({"prune_ratio": {"conv1": -0.1}}, r"`prune_ratio\['conv1'\]` must be in .* got -0.1"),
        ({"speedup": 0.5}, "`speedup` must be a finite number of at least 1, got 0.5"),
        ({"A": 0.0}, r"`A` must be in \(0, 1\], got 0.0"),
        ({"u": 1.0}, r"`u` must be in \(0, 1\), got 1.0"),
        ({"interval": 0}, "`interval` must be a whole number of at least 1, got 0"),
        ({"granularity": "row"}, "`granularity` must be one of \"column\", .* got 'row'"),
        ({"kernels": "sparse"}, "`kernels` must be one of \"auto\", .* got 'sparse'"),
        ({"layers": "conv*"}, "`layers` must be a list of at least one layer pattern"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_argument_fails_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        SPPCallback(**arguments)


def test_settings_are_plain_arguments_with_their_documentation():
    """As ``help``, editors and the command line see them."""
    for cls, settings, own, count in (
        (SPPCallback, TrainingSettings, [], 21),
        (SPPPruner, SPPSettings, ["model"], 15),
    ):
        fields, types = inspect.signature(settings).parameters, get_type_hints(settings)
        parameters = inspect.signature(cls).parameters
        assert list(parameters) == [*own, *fields]
        assert len(fields) == count
        for name, field in fields.items():
            assert parameters[name] == field.replace(annotation=types[name])
        assert all(f"\n    {name}: " in cls.__init__.__doc__ for name in fields)
    callback = pickle.loads(pickle.dumps(SPPCallback(0.5, layers=["conv1"])))
    assert callback.settings == TrainingSettings(prune_ratio=0.5, layers=["conv1"])
    with pytest.raises(TypeError, match="intervall"):
        SPPCallback(intervall=90)


def test_pattern_without_a_layer_lists_what_is_there(tiny):
    callback = SPPCallback(layers=["features.*"])
    with pytest.raises(ValueError, match=r"'features\.\*' matches none.*conv1, conv2"):
        make_trainer(callback).fit(tiny, tiny_data())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"interval": 3}, "interval was 2 and is 3"),
        ({"prune_ratio": 0.5}, "prune_ratio was 0.75 and is 0.5"),
        ({"layers": ["conv2"]}, r"layers was None and is \['conv2'\]"),
    ],
    ids=["interval", "ratio", "layers"],
)
def test_checkpoint_of_another_run_is_refused(tmp_path, tiny, changed, message):
    trainer = make_trainer(SPPCallback(interval=2), max_steps=2)
    with pytest.warns(UserWarning, match="SPP"):
        trainer.fit(tiny, tiny_data())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        make_trainer(SPPCallback(**({"interval": 2} | changed))).fit(
            tiny, tiny_data(), ckpt_path=tmp_path / "other.ckpt"
        )
    assert type(tiny.conv1) is nn.Conv2d
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_sharding_strategy_is_refused(tiny, monkeypatch):
    trainer = make_trainer(callback := SPPCallback())
    monkeypatch.setattr(type(trainer), "strategy", FSDPStrategy.__new__(FSDPStrategy))
    with pytest.raises(ValueError, match=r"`strategy` must keep whole weights.*FSDPStrategy"):
        callback.setup(trainer, tiny, "fit")
