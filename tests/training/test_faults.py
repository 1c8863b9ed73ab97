"""Bad checkpoints, and things around a run that break: nothing half-done is left behind."""

import errno
import os
import pickle
import signal

import pytest
import torch
from conftest import TARGETS, TinyModule, assert_plain, columns, make_trainer, same, tiny_data
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from spp_lightning import SPPCallback

SETTINGS = {"A": 0.25, "interval": 2}  # at the target after about 30 steps
pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")


def tiny_module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyModule()


def one_batch():
    return tiny_data(images=16)  # Lightning itself can't go on in the middle of an epoch.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to: its weights, and its checkpoint of step 12."""
    folder, module = tmp_path_factory.mktemp("whole"), tiny_module()
    files = ModelCheckpoint(folder, "{step}", every_n_train_steps=12, save_top_k=-1)
    callbacks = [SPPCallback(**SETTINGS), files]
    trainer = make_trainer(*callbacks, max_steps=48, enable_checkpointing=True)
    trainer.fit(module, one_batch())
    assert columns(module) == TARGETS
    return module.state_dict(), folder / "step=12.ckpt"


# --- bad state ---


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_structure(path):
    path.write_bytes(path.read_bytes().replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_w2"))


def flip_probability(path):
    p = torch.load(path)["callbacks"]["SPPCallback"]["pruner"]["probability"]["conv2"]
    content = bytearray(path.read_bytes())
    start = content.index(p.numpy().tobytes())
    number = int(((p > 0) & (p < 1)).nonzero()[0])
    content[start + 8 * number + 7] ^= 0x40  # a bit of the exponent
    path.write_bytes(content)


DROP = object()


def change(**changes):
    """Change entries of the pruner's state, or the callback's own of that name."""

    def damage(path):
        file = torch.load(path)
        ours = file["callbacks"]["SPPCallback"]
        for name, value in changes.items():
            state = ours if name in ours else ours["pruner"]
            state[name] = value(state[name]) if callable(value) else value
            if value is DROP:
                del state[name]
        torch.save(file, path)

    return damage


def other_network(path):
    file = torch.load(path)
    file["state_dict"]["conv2.weight"] = torch.zeros(16, 8, 3, 3)
    torch.save(file, path)


def other_layers(probability):
    return {"features": probability["conv1"], "conv2": probability["conv2"]}


def with_nan(probability):
    return probability | {"conv2": probability["conv2"] * float("nan")}


def without_tensors(probability):
    return {name: values.tolist() for name, values in probability.items()}


BAD = {  # what single numbers make a state bad, test_pruner.py shows
    "truncated": (truncate, (OSError, RuntimeError), None),
    "flipped_structure": (flip_structure, pickle.UnpicklingError, "Unsupported"),
    "flipped_probability": (flip_probability, ValueError, r"'conv2' must be in \[0, 1\]"),
    "other_network": (other_network, RuntimeError, "size mismatch for conv2.weight"),
    "other_layers": (change(probability=other_layers), ValueError, "holds features"),
    "nan": (change(probability=with_nan), ValueError, r"must be in \[0, 1\], .* nan"),
    "version": (change(version=2), ValueError, "version 1, got version 2"),
    "not_a_dict": (change(pruner=7), ValueError, "version 1, got version 7"),
    "not_tensors": (change(probability=without_tensors), ValueError, "must be tensors"),
    "no_pruner": (change(pruner=DROP), ValueError, "lacks pruner"),
    "no_step": (change(step=DROP), ValueError, "lacks step"),
    "step": (change(step="twelve"), ValueError, "step must be a whole number, got 'twelve'"),
}


@pytest.mark.parametrize(("damage", "error", "message"), BAD.values(), ids=BAD)
def test_bad_checkpoint(tmp_path, whole, damage, error, message):
    """An error before the first step; network and file stay what Lightning found or loaded."""
    path = tmp_path / "bad.ckpt"
    path.write_bytes(whole[1].read_bytes())
    damage(path)
    content, module = path.read_bytes(), tiny_module()
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    module.training_step = lambda *_: pytest.fail("a step was taken")
    options = {"ckpt_path": path, "weights_only": True}
    with pytest.raises(error, match=message):
        make_trainer(SPPCallback(**SETTINGS)).fit(module, one_batch(), **options)
    assert_plain(module)
    # Lightning loads the weights before the callbacks' states: if it came so far, all that fit.
    if error is ValueError or damage is other_network:
        loaded = torch.load(path)["state_dict"]
        expected |= {n: v for n, v in loaded.items() if v.shape == expected[n].shape}
    assert same(module.state_dict(), expected)
    assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]


def test_refused_state_leaves_the_loaded_weights(tmp_path, whole):
    """A callback that has pruned other columns of the network doesn't zero them in the file's."""
    path = tmp_path / "bad.ckpt"
    path.write_bytes(whole[1].read_bytes())
    change(version=2)(path)
    module, callback = tiny_module(), SPPCallback(**SETTINGS)
    module.conv2.weight.data = module.conv2.weight.data.flip(1)
    make_trainer(callback, max_steps=48).fit(module, one_batch())
    with pytest.raises(ValueError, match="got version 2"):
        make_trainer(callback).fit(module, one_batch(), ckpt_path=path)
    assert_plain(module)
    assert same(module.state_dict(), torch.load(path)["state_dict"])


# --- faults around a run ---


class At(Callback):
    """Does something at the start of a step's batch."""

    def __init__(self, do, step=7):
        self.do, self.step = do, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.do(pl_module)


class Mortal(TensorDataset):
    """Data of which a worker dies once a file is there."""

    def __getitem__(self, index):
        if self.flag.exists():
            os._exit(1)
        return super().__getitem__(index)


def full_disk(monkeypatch, folder):
    def write(opener, content):
        opener.f.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    fill = At(lambda _: monkeypatch.setattr(LocalFileOpener, "write", write, raising=False))
    return {"callbacks": [fill]}, OSError, "No space left"


def broken_logger(monkeypatch, folder):
    class Broken(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if step >= 7:
                raise ConnectionError("the server is away")

    return {"logger": Broken(folder / "logs"), "log_every_n_steps": 1}, ConnectionError, "is away"


def dead_worker(monkeypatch, folder):
    data = Mortal(*one_batch().dataset.tensors)
    data.flag = folder / "flag"
    loader = DataLoader(data, 16, num_workers=1, persistent_workers=True)
    kill = At(lambda _: data.flag.touch(), 6)
    return {"callbacks": [kill], "loader": loader}, RuntimeError, "worker"


def nan_loss(monkeypatch, folder):
    def poison(module):
        module.training_step = lambda *a: TinyModule.training_step(module, *a) * float("nan")

    return {"callbacks": [At(poison)]}, ValueError, r"'conv1' must be finite.*NaN.*at step 8"


def ctrl_c(monkeypatch, folder):
    def hit(module):
        raise KeyboardInterrupt

    return {"callbacks": [At(hit)]}, SystemExit, "1"


FAULTS = [full_disk, broken_logger, dead_worker, nan_loss, ctrl_c]


@pytest.mark.filterwarnings("ignore:.*use of fork")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the worker
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_leaves_a_plain_network_and_a_good_checkpoint(tmp_path, whole, monkeypatch, fault):
    folder, handler, hit = tmp_path / "files", signal.getsignal(signal.SIGINT), fault is ctrl_c
    files = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=2, save_last=True, save_on_exception=hit
    )
    with monkeypatch.context() as patch:
        options, error, message = fault(patch, tmp_path)
        loader = options.pop("loader", one_batch())
        module, callback = tiny_module(), SPPCallback(**SETTINGS)
        callbacks = [callback, *options.pop("callbacks", []), files]
        trainer = make_trainer(*callbacks, max_steps=48, enable_checkpointing=True, **options)
        with pytest.raises(error, match=message):
            trainer.fit(module, loader)
    signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C after the first
    assert_plain(module)
    if fault is not nan_loss:
        assert columns(module) == [*callback.pruner.num_pruned.values()] != TARGETS
    names = {"last.ckpt", "step=6.ckpt", *(["step=7.ckpt"] if hit else [])}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.iterdir():
        resumed, options = tiny_module(), {"ckpt_path": path, "weights_only": True}
        make_trainer(SPPCallback(**SETTINGS), max_steps=48).fit(resumed, one_batch(), **options)
        assert same(resumed.state_dict(), whole[0])
    if fault is not nan_loss:  # the network that is still in memory can go on as well
        make_trainer(callback, max_steps=48).fit(module, one_batch())
        assert columns(module) == TARGETS
