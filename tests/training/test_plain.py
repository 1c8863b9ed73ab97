"""The network is a plain one at any moment, for everyone who looks at it or takes it along."""

import copy
import gc
import io
import pickle
from collections import Counter

import pytest
import torch
from conftest import TARGETS, TinyModule, assert_plain, columns, make_trainer, same, tiny_data
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import nn

from spp_lightning import SPPCallback

FAST = {"A": 0.5, "interval": 1}  # at its target within about ten steps


class Tuned(TinyModule):
    """Has what the tuners look for."""

    def __init__(self):
        super().__init__()
        self.lr = 0.05
        self.batch_size = 16

    def train_dataloader(self):
        return tiny_data(batch_size=self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Complete(TinyModule):
    """Can be validated, tested and used."""

    def validation_step(self, batch, batch_idx):
        self.log("loss", super().training_step(batch, batch_idx), batch_size=16)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def start(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def from_file(module):
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def from_state_dict(module):
    twin = Complete()
    twin.load_state_dict(module.state_dict(), strict=True)
    return twin


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch_save": from_file,
    "state_dict": from_state_dict,
}
HOOKS = [
    *("on_train_start", "on_train_batch_start", "on_after_backward", "on_before_optimizer_step"),
    *("on_before_zero_grad", "on_train_batch_end", "on_validation_batch_end", "on_train_epoch_end"),
    "on_train_end",
]


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_from_any_hook(make_copy):
    """Another callback, before or after ours, takes a copy along: it is whole and plain."""
    module, seen = start(Complete), []

    class Copy(Callback):
        pass

    def take(self, trainer, pl_module, *_):
        twin = make_copy(pl_module)
        assert_plain(twin)
        assert same(dict(pl_module.named_parameters()), dict(twin.named_parameters()))
        seen.append(columns(twin) == [*callback.pruner.num_pruned.values()])

    for hook in HOOKS:
        setattr(Copy, hook, take)
    callback = SPPCallback(**FAST)
    with torch.random.fork_rng():
        make_trainer(Copy(), callback, Copy(), max_steps=12, val_check_interval=2).fit(
            module, tiny_data(), tiny_data(images=16)
        )
    assert all(seen) and len(seen) > 12 * len(HOOKS)
    assert columns(module) == TARGETS


def test_evaluating_after_and_between_fits():
    module, plain, callback = start(Complete), Complete(), SPPCallback(**FAST)

    def evaluate(module, trainer):
        losses = [
            run(module, tiny_data(), verbose=False)[0]["loss"]
            for run in (trainer.validate, trainer.test)
        ]
        return losses, trainer.predict(module, tiny_data())

    def check():
        before = weights(module)
        plain.load_state_dict(before)
        losses, predictions = evaluate(module, make_trainer(callback))
        plain_losses, plain_predictions = evaluate(plain, make_trainer())
        assert losses == plain_losses and all(map(torch.equal, predictions, plain_predictions))
        assert same(weights(module), before)
        assert_plain(module)

    check()
    with pytest.warns(UserWarning, match="SPP"):
        make_trainer(callback, max_steps=4).fit(module, tiny_data(), tiny_data())
    assert 0 < columns(module)[1] < TARGETS[1]
    check()
    make_trainer(callback).fit(module, tiny_data(), tiny_data())
    check()
    assert columns(module) == TARGETS


class First(Callback):
    """Notes what the first batch of the fit finds."""

    seen = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.seen is None:
            pruning = next(c for c in trainer.callbacks if isinstance(c, SPPCallback))
            state = pruning.pruner.state_dict()
            counters = (trainer.global_step, state["step"], state["num_updates"])
            self.seen = (counters, weights(pl_module))


@pytest.mark.parametrize("again", [False, True], ids=["first_fit", "second_fit"])
@pytest.mark.parametrize("way", ["before_SPP", "after_SPP", "Tuner"])
@pytest.mark.parametrize("find", ["lr_find", "scale_batch_size"])
def test_tuning_comes_before_step_0(tmp_path, find, way, again):
    """A tuner tries the network out before the fit, and takes everything back."""
    module, callback, first = start(Tuned), SPPCallback(**FAST), First()
    if again:
        with pytest.warns(UserWarning, match="SPP"):
            make_trainer(callback, max_steps=4).fit(module)
    before = weights(module)
    if find == "lr_find":
        finder = LearningRateFinder(num_training_steps=12, early_stop_threshold=None)
        options = {"num_training": 12, "early_stop_threshold": None}
    else:
        finder = BatchSizeFinder(max_trials=2, init_val=4)
        options = {"max_trials": 2, "init_val": 4}
    callbacks = {"before_SPP": [finder, callback], "after_SPP": [callback, finder]}
    callbacks = [*callbacks.get(way, [callback]), first]
    trainer = make_trainer(*callbacks, default_root_dir=tmp_path)
    if way == "Tuner":
        getattr(Tuner(trainer), find)(module, **options)
        assert same(weights(module), before)
        assert_plain(module)
    trainer.fit(module)
    counters, found = first.seen
    assert counters == ((0, 4, 5) if again else (0, 0, 1))
    if again:  # the update at its start prunes more
        before = {name: value * (found[name] != 0) for name, value in before.items()}
    assert same(found, before)
    assert columns(module) == TARGETS
    assert_plain(module)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_flat_over_fits():
    def fit():
        make_trainer(SPPCallback(**FAST), max_steps=12).fit(TinyModule(), tiny_data())
        gc.collect()
        things = Counter(map(type, gc.get_objects()))
        kinds = (torch.Tensor, nn.Module, Callback, type)
        return [sum(n for t, n in things.items() if issubclass(t, kind)) for kind in kinds]

    with torch.random.fork_rng():
        fit()
        counts = [fit() for _ in range(5)]
    assert counts == [counts[0]] * 5


SAVING = {
    "on_train_epoch_end": {"save_on_train_epoch_end": True, "every_n_epochs": 1},
    "every_n_train_steps": {"every_n_train_steps": 3},
    "weights_only": {"every_n_train_steps": 3, "save_weights_only": True},
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("options", SAVING.values(), ids=SAVING)
def test_files_of_model_checkpoint(tmp_path, options):
    module, callback = start(TinyModule), SPPCallback(A=0.25, interval=1)
    live = {}

    class Note(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            p = {n: p.clone() for n, p in callback.pruner.probability.items()}
            live[trainer.global_step] = (weights(pl_module), p)

    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **options)
    trainer = make_trainer(callback, Note(), saving, max_steps=36, enable_checkpointing=True)
    trainer.fit(module, tiny_data())
    files = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem.split("=")[1]))
    every = options.get("every_n_train_steps", 4)
    assert [path.name for path in files] == [f"step={n}.ckpt" for n in range(every, 37, every)]
    counts = []
    for path in files:
        file = torch.load(path, weights_only=True)
        assert ("callbacks" in file) == ("save_weights_only" not in options)
        plain = TinyModule()
        plain.load_state_dict(file["state_dict"], strict=True)
        kept, probability = live[file["global_step"]]
        assert same(file["state_dict"], kept)  # live columns are whole, whatever the masks
        counts.append(columns(plain))
        assert counts[-1] == [int((p == 1).sum()) for p in probability.values()]
    assert any([0, 0] != count != TARGETS for count in counts) and counts[-1] == TARGETS
