"""Small things that several tests share."""

import math

import facade
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from spp_lightning import native
from spp_lightning.compaction.kernels.cpu import library
from spp_lightning.method import ordering

TARGETS = [21, 54]  # to prune of TinyModule's 27 and 72 columns at 4x


class TinyModule(LightningModule):
    """Two convolutions and a linear layer on 3×8×8 images of 4 classes."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.head(x.mean((2, 3)))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        return torch.optim.AdamW(self.parameters(), 1e-3)


def tiny_data(images: int = 64, batch_size: int = 16) -> DataLoader:
    """Random images, the same every time, in the same order every epoch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, 8, 8, generator=generator)
    y = torch.randint(0, 4, (images,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size)


def zero_columns(layer: nn.Module) -> int:
    """Columns of a layer's weight that are exactly 0, counted filter by filter."""
    weight, groups = layer.weight.detach(), getattr(layer, "groups", 1)
    per_group = len(weight) // groups
    return sum(
        int((weight[g * per_group : (g + 1) * per_group].flatten(1) == 0).all(0).sum())
        for g in range(groups)
    )


def make_trainer(*callbacks, max_steps=30, **options):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
    }
    return Trainer(callbacks=list(callbacks), max_steps=max_steps, **(defaults | options))


def target(num_groups, ratio=0.75):
    return min(math.ceil(ratio * num_groups), num_groups - 1)


def assert_plain(module):
    assert [type(module.conv1), type(module.conv2)] == [nn.Conv2d, nn.Conv2d]
    fresh = vars(nn.Conv2d(3, 8, 3, padding=1)).keys()
    assert vars(module.conv1).keys() == vars(module.conv2).keys() == fresh


def columns(module):
    return [zero_columns(module.conv1), zero_columns(module.conv2)]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


@pytest.fixture
def tiny() -> TinyModule:
    """A tiny network, the same every time, without touching the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyModule()


@pytest.fixture(params=["base", "avx2", "avx512"])
def isa(request):
    """Each instruction set that this machine has."""
    best = library.instruction_set()
    if not facade.set_instruction_set(request.param):
        pytest.skip(f"no {request.param} here")
    yield request.param
    facade.set_instruction_set(best)


def look_for_library():
    """Look anew for the C++ library, where a test has hidden or shown it."""
    for cached in (native.library, ordering._library, library.library):
        cached.cache_clear()


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    """As if no compiler had been found when the package was installed."""
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "kernels.so")
    look_for_library()
    yield
    monkeypatch.undo()
    look_for_library()
