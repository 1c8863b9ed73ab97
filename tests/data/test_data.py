"""The data modules: pixels, labels, cache, batches, normalisation, errors. No data, no network."""

import hashlib
import os
import pickle
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from images import CLASSES, make_tree, random_pixels
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR10

from spp_lightning.data import CIFAR10DataModule, DigitsDataModule, cache, reading
from spp_lightning.data.arrays import stratified_split, to_records
from spp_lightning.data.pixels import augment, crop_and_flip


@pytest.fixture
def tree(tmp_path):
    make_tree(tmp_path)
    return tmp_path


def ready(folder, **arguments):
    data = CIFAR10DataModule(folder, **{"batch_size": 10, "download": False, **arguments})
    data.prepare_data()
    data.setup()
    return data


def all_of(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def forbid(monkeypatch):
    def decode(path):
        raise AssertionError(f"decoded {path}")

    monkeypatch.setattr(reading, "decode", decode)


# Reading


def test_tree_gives_exact_pixels_and_alphabetical_labels(tmp_path):
    pixels = make_tree(tmp_path)
    data = ready(tmp_path)
    images, labels = all_of(data.test_dataloader())
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert np.array_equal(images, pixels["test"])
    assert labels.tolist() == [i // 2 for i in range(20)]
    assert data.class_names == CLASSES
    assert (data.num_classes, data.input_shape) == (10, (3, 32, 32))
    train, _ = data.load()
    assert np.array_equal(train["image"], pixels["train"])
    assert train["label"].tolist() == [i // 6 for i in range(60)]


def make_batches(root, monkeypatch):
    """Write torchvision's layout, 2 images per batch, with checksums to match."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    pixels = random_pixels(12)
    entries = [
        {"data": pixels[2 * i : 2 * i + 2].reshape(2, 3072), "labels": [i, 9 - i]} for i in range(6)
    ]
    train = [write(f"data_batch_{i + 1}", entry) for i, entry in enumerate(entries[:5])]
    meta = write("batches.meta", {"label_names": list(CLASSES)})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", entries[5])])
    meta = {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return pixels


def test_torchvision_batches(tmp_path, monkeypatch):
    pixels = make_batches(tmp_path, monkeypatch)
    train, test = ready(tmp_path).load()
    assert np.array_equal(train["image"], pixels[:10])
    assert train["label"].tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert np.array_equal(test["image"], pixels[10:])
    assert test["label"].tolist() == [5, 4]


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_truncated_batch_is_named(tmp_path, monkeypatch, name):
    make_batches(tmp_path, monkeypatch)
    path = tmp_path / CIFAR10.base_folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name} is cut off or damaged.*download=True"):
        ready(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"missing: {name}"):
        ready(tmp_path)


def test_download_repairs_broken_batches(tmp_path, monkeypatch):
    make_batches(tmp_path, monkeypatch)
    path = tmp_path / CIFAR10.base_folder / "data_batch_1"
    whole = path.read_bytes()
    path.write_bytes(b"")
    monkeypatch.setattr(CIFAR10, "download", lambda self: path.write_bytes(whole))
    assert len(ready(tmp_path, download=True, batch_size=2).load()[0]) == 10


# Cache


def test_second_run_decodes_nothing(tree, monkeypatch):
    first = ready(tree).load()
    forbid(monkeypatch)
    second = ready(tree).load()
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_setup_alone_takes_the_cache_of_another_process(tree, monkeypatch):
    CIFAR10DataModule(tree, download=False).prepare_data()
    forbid(monkeypatch)
    data = CIFAR10DataModule(tree, batch_size=10, download=False)
    data.setup("fit")
    assert len(data.train_dataloader()) == 6


def test_changed_images_replace_the_cache(tree):
    ready(tree)
    pixels = make_tree(tree, seed=1)
    train, test = ready(tree).load()
    assert np.array_equal(train["image"], pixels["train"])
    assert np.array_equal(test["image"], pixels["test"])
    assert len(list((tree / "spp-cache").iterdir())) == 2  # the stale files are gone


def damage(kind):
    def cut(path):
        path.write_bytes(path.read_bytes()[:-100])

    return {
        "truncated": cut,
        "empty": lambda path: path.write_bytes(b""),
        "no array": lambda path: path.write_bytes(b"something else"),
        "other dtype": lambda path: np.save(path, np.zeros(60)),
        "other shape": lambda path: np.save(path, np.load(path).reshape(2, -1)),
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "empty", "no array", "other dtype", "other shape"])
def test_broken_cache_is_remade(tmp_path, kind):
    pixels = make_tree(tmp_path)
    ready(tmp_path)
    (path,) = (tmp_path / "spp-cache").glob("train-*")
    whole = path.read_bytes()
    damage(kind)(path)
    assert np.array_equal(ready(tmp_path).load()[0]["image"], pixels["train"])
    assert path.read_bytes() == whole


def test_a_kill_while_writing_leaves_no_cache(tree, monkeypatch):
    def half(file, records):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", half)
        with pytest.raises(KeyboardInterrupt):
            ready(tree)
    assert list((tree / "spp-cache").iterdir()) == []


def test_old_temporary_files_are_removed_and_young_ones_kept(tmp_path):
    old, young = tmp_path / "train-0.npy1.tmp", tmp_path / "train-0.npy2.tmp"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    cache.save(tmp_path / "train-0.npy", to_records(random_pixels(1), [0]))
    assert not old.exists() and young.exists()


def test_folder_that_cannot_be_written_warns_once_and_works(tree, monkeypatch):
    (tree / "spp-cache").touch()  # a file where the folder would be: root can't write it either
    with pytest.warns(UserWarning, match="spp-cache can't be written") as warned:
        data = ready(tree)
    assert len(warned) == 1
    forbid(monkeypatch)
    data.setup("test")
    assert len(all_of(data.test_dataloader())[0]) == 20


# Batches


def test_epochs_differ_and_a_seed_repeats(tree):
    loader = ready(tree, seed=3, batch_size=8).train_dataloader()
    torch.manual_seed(0)
    epochs = [all_of(loader)[0] for _ in range(2)]
    torch.manual_seed(1)  # the global generator has no say
    again = ready(tree, seed=3, batch_size=8).train_dataloader()
    assert len(loader) == 7 and len(epochs[0]) == 56  # 60 images, the last 4 dropped
    assert not torch.equal(*epochs)
    assert all(torch.equal(epoch, all_of(again)[0]) for epoch in epochs)
    other = all_of(ready(tree, seed=4, batch_size=8).train_dataloader())[0]
    assert not any(torch.equal(epoch, other) for epoch in epochs)


def on_rank(folder, rank, **arguments):
    data = ready(folder, **arguments)
    data.trainer = SimpleNamespace(
        world_size=2,
        global_rank=rank,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data.train_dataloader()


def test_ranks_share_an_epoch_without_overlap(tree):
    parts = [all_of(on_rank(tree, rank))[0] for rank in range(2)]
    assert [len(part) for part in parts] == [30, 30]
    assert len(torch.cat(parts).flatten(1).unique(dim=0)) == 60


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_goes_on_from_its_state(tree, num_workers):
    loader = ready(tree, num_workers=num_workers).train_dataloader()
    assert loader.state_dict() == {"epoch": 0, "batches": 0, "shift": 0}
    batches, states = [], []
    for _ in range(2):
        for images, _ in loader:
            batches.append(images)
            states.append(loader.state_dict())  # what workers hold ready doesn't count
    assert states[:7] == [{"epoch": i // 6, "batches": i % 6, "shift": 0} for i in range(1, 8)]
    for done in (3, 6, 8):  # in an epoch, at its end, in another
        resumed = ready(tree, num_workers=num_workers).train_dataloader()
        resumed.load_state_dict(states[done - 1])
        assert resumed.state_dict() == states[done - 1]
        left = [images for _ in range(done // 6, 2) for images, _ in resumed]
        assert torch.equal(torch.cat(left), torch.cat(batches[done:]))
        assert len(resumed) == 6


def test_resident_images_come_in_the_same_batches(tree):
    loaders = [
        ready(tree, val_size=12, resident=resident).train_dataloader() for resident in (False, True)
    ]
    for _ in range(2):
        epochs = [all_of(loader) for loader in loaders]
        assert torch.equal(epochs[0][0], epochs[1][0]) and torch.equal(epochs[0][1], epochs[1][1])
    resumed = ready(tree, val_size=12, resident=True).train_dataloader()
    resumed.load_state_dict({"epoch": 1, "batches": 3, "shift": 0})
    assert torch.equal(all_of(resumed)[0], epochs[0][0][30:])
    assert resumed.state_dict() == {"epoch": 2, "batches": 0, "shift": 0}


def test_every_rank_goes_on_from_the_state_of_one(tree):
    for rank in range(2):
        loader = on_rank(tree, 0)
        next(iter(loader))
        whole = [images for images, _ in on_rank(tree, rank)]
        resumed = on_rank(tree, rank)
        resumed.load_state_dict(loader.state_dict())
        assert torch.equal(all_of(resumed)[0], torch.cat(whole[1:]))


def test_worker_processes_give_the_same_batches(tree):
    in_workers = all_of(ready(tree, num_workers=1).train_dataloader())
    here = all_of(ready(tree).train_dataloader())
    assert torch.equal(in_workers[0], here[0]) and torch.equal(in_workers[1], here[1])


@pytest.mark.parametrize(("val_size", "count"), [(12, 12), (0.2, 12), (0.01, 1), (0, 0)])
def test_validation_split(tree, val_size, count):
    data = ready(tree, val_size=val_size, batch_size=1)
    train, _ = all_of(data.train_dataloader())
    val, labels = all_of(data.val_dataloader())
    assert len(train) == 60 - count
    if count == 0:
        assert torch.equal(val, all_of(data.test_dataloader())[0])
    else:
        assert len(val) == count
        assert len(torch.cat([train, val]).flatten(1).unique(dim=0)) == 60
        assert max(labels.bincount()) <= -(-count // 10)
    assert torch.equal(val, all_of(ready(tree, val_size=val_size).val_dataloader())[0])


def test_split_depends_on_the_seed():
    labels = torch.arange(100) % 10
    splits = [stratified_split(labels, 25, seed)[1] for seed in (0, 0, 1)]
    assert torch.equal(splits[0], splits[1]) and not torch.equal(splits[0], splits[2])
    assert sorted(labels[splits[0]].bincount().tolist()) == [2] * 5 + [3] * 5


# Pixels


@pytest.mark.parametrize("normalize", ["mean_image", "mean_std"])
def test_normalisation_matches_numpy(tree, normalize):
    data = ready(tree, normalize=normalize, val_size=10, batch_size=50)
    images, labels = next(iter(data.train_dataloader()))
    x = images.numpy().astype(np.float64)  # all 50 images that are left for training
    if normalize == "mean_image":
        expected = x - x.mean(0)
    else:
        expected = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    got, got_labels = data.on_after_batch_transfer((images, labels), 0)
    assert got.dtype == torch.float32 and got_labels is labels
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_other_batches_pass_untouched(tree):
    data = ready(tree)
    normalised = (torch.zeros(2, 3, 32, 32), torch.zeros(2))
    for batch in (normalised, torch.zeros(2, dtype=torch.uint8), {"x": 1}, "text"):
        assert data.on_after_batch_transfer(batch, 0) is batch


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_and_flip_match_loops(padding):
    images = torch.from_numpy(random_pixels(20))
    rng = np.random.default_rng(0)
    top, left = rng.integers(0, 2 * padding + 1, (2, 20))
    flip = rng.random(20) < 0.5
    got = crop_and_flip(images, *map(torch.from_numpy, (top, left, flip)), padding)
    for i in range(20):
        padded = np.zeros((3, 32 + 2 * padding, 32 + 2 * padding), np.uint8)
        padded[:, padding : padding + 32, padding : padding + 32] = images[i]
        expected = padded[:, top[i] : top[i] + 32, left[i] : left[i] + 32]
        assert np.array_equal(got[i], expected[:, :, ::-1] if flip[i] else expected)


def test_augmentation_draws_every_shift_and_half_the_flips():
    images = torch.zeros(4000, 1, 3, 3, dtype=torch.uint8)
    images[:, 0, 1, 1] = 1  # the centre, which a crop moves
    moved = augment(images, False, 1, torch.Generator().manual_seed(0))
    share = moved.double().mean((0, 1))  # 9 positions, p = 1/9 each: sd 0.005
    assert ((share - 1 / 9).abs() < 0.025).all()
    images = torch.zeros(4000, 1, 1, 2, dtype=torch.uint8)
    images[..., 1] = 1
    flipped = augment(images, True, 0, torch.Generator().manual_seed(0))[..., 0].double().mean()
    assert abs(flipped - 0.5) < 0.04  # sd 0.008


# With Lightning


class Recorder(LightningModule):
    """Keeps the batches it's given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.train_batches, self.val_batches = [], []

    def training_step(self, batch, _):
        self.train_batches.append(batch[0])
        return self.layer(batch[0].mean().reshape(1)).sum()

    def validation_step(self, batch, _):
        self.val_batches.append(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(folder, epochs, ckpt_path=None, batch_size=30, num_workers=0, resident=False, **arguments):
    model = Recorder()
    data = CIFAR10DataModule(
        folder,
        batch_size=batch_size,
        download=False,
        flip=True,
        crop_padding=4,
        num_workers=num_workers,
        resident=resident,
    )
    defaults = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**(defaults | arguments))
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, trainer


def test_trainer_augments_in_training_only_and_resumes_where_it_was(tree, tmp_path_factory):
    whole, trainer = fit(tree, epochs=3)
    data = trainer.datamodule
    plain = data.on_after_batch_transfer((data._test.images, data._test.labels), 0)[0]
    for first in range(len(whole.val_batches)):
        assert torch.equal(whole.val_batches[first], plain)
    assert len({float(batch.sum()) for batch in whole.train_batches}) == 6

    _, trainer = fit(tree, epochs=1)
    path = tmp_path_factory.mktemp("checkpoint") / "one.ckpt"
    trainer.save_checkpoint(path)
    resumed, _ = fit(tree, epochs=3, ckpt_path=path)
    assert len(resumed.train_batches) == 4
    for ours, theirs in zip(resumed.train_batches, whole.train_batches[2:], strict=True):
        assert torch.equal(ours, theirs)  # order, crops and flips


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "arguments",
    [
        {"epochs": 2},
        {"epochs": -1, "max_steps": 7},
        {"epochs": 2, "limit_train_batches": 3},
        {"epochs": 2, "limit_val_batches": 0},
        {"epochs": 2, "limit_val_batches": 0, "num_workers": 1},
        {"epochs": 2, "resident": True},
    ],
    ids=["epochs", "steps", "limited", "no validation", "worker", "resident"],
)
def test_trainer_resumes_from_every_step_of_an_epoch(tree, tmp_path, arguments, accumulate):
    """A resumed run gets the batches, crops and flips that were left, from any checkpoint."""
    options = {"batch_size": 12, "accumulate_grad_batches": accumulate, **arguments}
    steps = ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path / "ends", "{step}", every_n_epochs=1, save_top_k=-1)
    whole, trainer = fit(tree, callbacks=[steps, ends], enable_checkpointing=True, **options)
    per_epoch = trainer.num_training_batches
    steps_per_epoch = -(-per_epoch // accumulate)
    assert len(list((tmp_path / "steps").iterdir())) == trainer.global_step > steps_per_epoch
    assert list((tmp_path / "ends").iterdir())
    for path in (*(tmp_path / "steps").iterdir(), *(tmp_path / "ends").iterdir()):
        epochs, rest = divmod(int(path.stem.removeprefix("step=")), steps_per_epoch)
        left = whole.train_batches[epochs * per_epoch + rest * accumulate :]
        resumed, _ = fit(tree, ckpt_path=path, **options)
        assert len(resumed.train_batches) == len(left), path
        assert all(map(torch.equal, resumed.train_batches, left)), path


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_trainer_resumes_a_resumed_run(tree, tmp_path):
    """With `max_steps`, resuming from the end of an epoch, Lightning counts that epoch twice."""
    options = {"epochs": -1, "batch_size": 12}
    end = ModelCheckpoint(tmp_path, "end", every_n_epochs=1)
    saving = {"enable_checkpointing": True, **options}
    fit(tree, max_steps=5, callbacks=[end], **saving)
    steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    path = tmp_path / "end.ckpt"
    second, _ = fit(tree, max_steps=16, callbacks=[steps], ckpt_path=path, **saving)
    whole, _ = fit(tree, max_steps=16, **options)
    assert all(map(torch.equal, second.train_batches, whole.train_batches[5:]))
    for step in range(6, 16):
        third, _ = fit(tree, max_steps=16, ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        left = whole.train_batches[step:]
        assert len(third.train_batches) == len(left), step
        assert all(map(torch.equal, third.train_batches, left)), step


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_still_works(tree):
    model, trainer = fit(tree, epochs=2, batch_size=12, overfit_batches=2)
    assert len(model.train_batches) == 4
    assert trainer.train_dataloader.state_dict() == {"epoch": 0, "batches": 0, "shift": 0}


def test_batches_take_the_trainers_precision(tree):
    model, _ = fit(tree, epochs=1, precision="64-true")
    assert model.train_batches[0].dtype == torch.float64


# Digits


def test_digits():
    data = DigitsDataModule(batch_size=100)
    data.setup()
    test, labels = all_of(data.test_dataloader())
    assert test.shape == (359, 3, 32, 32) and test.dtype == torch.uint8
    assert len(data.train_dataloader()) == 14  # 1,438 images
    assert test.min() == 0 and test.max() == 255
    assert set(labels.bincount().tolist()) <= {35, 36, 37}
    other = DigitsDataModule(seed=1, test_size=0.2)
    other.setup()
    assert torch.equal(all_of(other.test_dataloader())[0], test)  # the same test images
    images, _ = data.on_after_batch_transfer((data._train.images, labels), 0)
    assert abs(images.mean()) < 1e-3


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        DigitsDataModule().setup()


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0."),
        ({"batch_size": 2.0}, "`batch_size` must be an integer of at least 1, got 2.0."),
        ({"crop_padding": -1}, "`crop_padding` must be an integer of at least 0, got -1."),
        ({"normalize": "none"}, '`normalize` must be "mean_image" or "mean_std", got \'none\'.'),
        ({"val_size": -1}, "`val_size` must be a number of at least 0, got -1."),
        ({"val_size": float("nan")}, "`val_size` must be a number of at least 0, got nan."),
        ({"val_size": 1.0}, "`val_size` must be in [0, 1) as a share (float), got 1.0."),
        ({"seed": -1}, "`seed` must be an integer of at least 0, got -1."),
        ({"num_workers": -1}, "`num_workers` must be an integer of at least 0, got -1."),
        ({"resident": 1}, "`resident` must be True or False, got 1."),
        (
            {"resident": True, "num_workers": 2},
            "`num_workers` must be 0 if `resident` is True, as there is nothing to load then,"
            " got 2.",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_argument(arguments, message):
    with pytest.raises(ValueError) as error:
        CIFAR10DataModule(**arguments)
    assert str(error.value) == message


def test_sizes_that_exceed_the_images(tree):
    with pytest.raises(ValueError, match=r"`val_size` must be in \[0, 60\), got 60\."):
        ready(tree, val_size=60)
    with pytest.raises(ValueError, match=r"`batch_size` must be in \[1, 60\].*, got 61\."):
        ready(tree, batch_size=61).train_dataloader()
    with pytest.raises(ValueError, match=r"`test_size` must be in \[0.001, 1\), got 1\."):
        DigitsDataModule(test_size=1)


def test_loader_before_setup():
    with pytest.raises(RuntimeError, match=r"Call `prepare_data\(\)` and `setup\(\)` first"):
        CIFAR10DataModule().train_dataloader()


def test_missing_and_empty_and_other_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere \(no such folder\).*DigitsDataModule"):
        ready(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"\(empty\).*cifar-10-batches-py.*train/<class>"):
        ready(tmp_path)
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(FileNotFoundError, match=r"\(found: MNIST\)"):
        ready(tmp_path)


def test_no_network(tmp_path, monkeypatch):
    def download(self):
        Path(self.root).mkdir(parents=True, exist_ok=True)  # as torchvision's does first
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", download)
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path}.*DigitsDataModule.*failed: .*no route to host"
    ):
        ready(tmp_path, download=True)
    with pytest.raises(FileNotFoundError, match=r"data/cifar10 \(no such folder\)"):
        ready(tmp_path / "data" / "cifar10", download=True)
    assert list(tmp_path.iterdir()) == []


def test_broken_trees(tree):
    # A tree is never "repaired" by a download, so `download=True` gives the same errors.
    (tree / "train" / "dog").rename(tree / "train" / "wolf")
    with pytest.raises(ValueError, match=r"test must hold the same.*\['dog', 'wolf'\]"):
        ready(tree, download=True)
    (tree / "train" / "wolf").rename(tree / "dog")
    with pytest.raises(ValueError, match="train must hold 10 class folders, found 9:"):
        ready(tree, download=True)
    (tree / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"dog must hold .png or .jpg images, found none"):
        ready(tree, download=True)
    (tree / "test").rename(tree / "elsewhere")
    with pytest.raises(ValueError, match="both folders `train` and `test`, found only `train`"):
        ready(tree, download=True)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("left", [0, 20, 600])
def test_undecodable_image_is_named_and_nothing_cached(tree, suffix, left):
    path = tree / "train" / "ship" / f"broken{suffix}"
    Image.fromarray(random_pixels(1)[0].transpose(1, 2, 0)).save(path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"{path.name} can't be decoded"):
        ready(tree)
    assert not (tree / "spp-cache").exists()


def test_image_of_wrong_size_is_named(tree):
    Image.new("RGB", (33, 32)).save(tree / "test" / "cat" / "wide.png")
    with pytest.raises(ValueError, match=r"wide.png must be 32x32 pixels, got 33x32"):
        ready(tree)


def test_grey_images_and_other_files_are_fine(tree):
    Image.new("L", (32, 32), 7).save(tree / "test" / "airplane" / "0.JPEG")
    (tree / "test" / "airplane" / "notes.txt").touch()
    (tree / "test" / ".hidden").mkdir()
    images, _ = all_of(ready(tree).test_dataloader())
    assert len(images) == 21 and (images[0] == 7).all()
