"""Prune under everything people train with, and check what the package promises in each case.

    OMP_NUM_THREADS=1 python benchmarks/training_matrix.py

Every row trains a network of two convolutions on noise, and looks at it before and after every
batch. Then the run is resumed from two of its checkpoints, one of the pruning phase and one of the
retraining phase, and its end is compared with that of the uninterrupted run. Where it differs, the
same is tried without SPP. The last rows train in two processes, and resume three times, each time
from a checkpoint of the resumed run. Writes ``benchmarks/results/training_matrix.json`` and
``.md``; exits with 1 if a promise is broken. ``--only PATTERN`` runs some of the rows and writes
nothing.
"""

# ruff: noqa: D102, D103

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from harness.arguments import quiet
from harness.context import ROOT, context
from harness.results import Results, Row, markdown_table
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from spp_lightning import DigitsDataModule, SPPCallback

TARGETS = {"conv1": 21, "conv2": 54}  # of 27 and 72 columns, at 4x
STEPS, SAVE_EVERY = 48, 12
RESUMED_FROM = (12, 36)  # steps: while pruning and while retraining
LEGS = (8, 24, 40)  # steps at which the runs of two processes are resumed, one after the other
PRUNING: dict[str, Any] = {"A": 0.25, "interval": 2}  # at the target after about 30 steps


# --- networks and data ---


class Net(LightningModule):
    """Two convolutions and a linear layer: 3 channels to 4 classes."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.optimizer = optimizer or (lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=1e-3))
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)
        self.batch_size = 16

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


class Manual(Net):
    """Steps two optimizers by hand, as a GAN does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()  # type: ignore[attr-defined]  # two were made
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.SGD(self.conv1.parameters(), 0.05, 0.9, weight_decay=1e-3),
            torch.optim.Adam([*self.conv2.parameters(), *self.head.parameters()], 1e-3),
        )


class OneByHand(Net):
    """Steps one optimizer by hand, after two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class Frozen(Net):
    """Trains its last layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1.requires_grad_(False)
        self.conv2.requires_grad_(False)


class Sized(Net):
    """Makes its own loader, for the tuner."""

    def train_dataloader(self) -> Any:
        return loader(64, self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(64, self.batch_size)


class Unfreeze(BaseFinetuning):
    """Trains the first layer from epoch 6 on only."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.conv1)

    def finetune_function(
        self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer
    ) -> None:
        if epoch == 6:
            self.unfreeze_and_add_param_group(pl_module.conv1, optimizer)


class UnfreezeByHand(Callback):
    """Trains the first layer from step 10 on only; the optimizer holds it from the start."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.conv1.requires_grad_(trainer.global_step >= 10)


class Load(Callback):
    """Loads other weights in the middle of a fit."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.random.fork_rng():
                torch.manual_seed(2)
                pl_module.load_state_dict(Net().state_dict())


def noise(images: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, 8, 8, generator=generator)
    return TensorDataset(x, torch.randint(0, 4, (images,), generator=generator))


def loader(images: int = 16, batch_size: int = 16, **options: Any) -> DataLoader[Any]:
    return DataLoader(noise(images), batch_size, **options)


class Stream(IterableDataset[Any]):
    """Batches without a known number."""

    def __init__(self, images: int = 16) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Any]:
        return iter(loader(self.images))


def stream(images: int = 16) -> DataLoader[Any]:
    return DataLoader(Stream(images), batch_size=None)


def stateful(**options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(noise(80), 16, **options)


# --- the rows ---


@dataclass(frozen=True)
class Case:
    """One way to train, and what is promised of it."""

    name: str
    net: Callable[[], LightningModule] = Net
    callbacks: Callable[[], list[Callback]] = list
    options: dict[str, Any] = field(default_factory=dict)  # of the Trainer
    data: Callable[[], Any] = loader
    validation: bool = False
    steps: int = STEPS  # as the Trainer counts them
    exact: bool = True  # whether the run is long enough to reach the target
    saves: bool = True
    per_batch: int = 1  # steps that the Trainer counts in a batch
    ranks: int = 1
    note: str = ""


def optimizer_cases() -> Iterator[Case]:
    optim = torch.optim
    kinds: dict[str, tuple[Any, dict[str, Any], bool]] = {  # whether there is a fused one for CPUs
        "SGD": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, True),
        "SGD, Nesterov": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}, True),
        "Adam": (optim.Adam, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}, True),
        "AdamW": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}, True),
        "RMSprop": (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}, False),
        "Adagrad": (optim.Adagrad, {"lr": 0.05, "weight_decay": 0.01}, True),
        "NAdam": (optim.NAdam, {"lr": 0.01, "weight_decay": 0.01}, False),
    }
    for name, (kind, settings, has_fused) in kinds.items():
        ways: dict[str, dict[str, bool]] = {
            "for-loop": {"foreach": False},
            "foreach": {"foreach": True},
        }
        if has_fused:
            ways["fused"] = {"fused": True}
        for way, flags in ways.items():
            make = _optimizer(kind, settings | flags)
            yield Case(f"{name}, {way}", net=_net(make))
    yield Case("Adafactor", net=_net(_optimizer(optim.Adafactor, {"lr": 0.01})))
    yield Case(
        "LBFGS",
        net=lambda: Net(_optimizer(optim.LBFGS, {"lr": 0.1, "max_iter": 4, "history_size": 5})),
        note="its history is forgotten at every update of p",
    )


def _net(optimizer: Callable[[Any], torch.optim.Optimizer]) -> Callable[[], Net]:
    return lambda: Net(optimizer)


def _optimizer(kind: Any, settings: dict[str, Any]) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: kind(parameters, **settings)


CASES = [
    *optimizer_cases(),
    Case("clipping by norm", options={"gradient_clip_val": 0.01}),
    Case(
        "clipping by value",
        options={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    Case(
        "4 batches accumulated",
        options={"accumulate_grad_batches": 4},
        data=lambda: loader(64),
    ),
    Case("bf16-mixed", options={"precision": "bf16-mixed"}),
    Case("bf16-true", options={"precision": "bf16-true"}),
    Case("EMA", callbacks=lambda: [EMAWeightAveraging(decay=0.9)], validation=True),
    Case("average of all steps", callbacks=lambda: [WeightAveraging()], validation=True),
    Case(
        "SWA",
        callbacks=lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=24)],
        options={"max_epochs": STEPS},
        steps=-1,
        note="Lightning resumes bit for bit from before the averaging only",
    ),
    Case("manual optimisation, every second batch", net=OneByHand, data=lambda: loader(32)),
    Case("two optimizers, by hand", net=Manual, steps=2 * STEPS, per_batch=2),
    Case("frozen layers", net=Frozen),
    Case("a layer unfrozen later, by hand", callbacks=lambda: [UnfreezeByHand()]),
    Case(
        "a layer unfrozen later, by BaseFinetuning",
        callbacks=lambda: [Unfreeze()],
        note="Lightning doesn't unfreeze the layer again after a resume",
    ),
    Case(
        "load_state_dict while pruning",
        callbacks=lambda: [Load(21)],
        note="the pruned columns of the loaded weights are 0 from the next update of p on; until"
        " then their mask is",
    ),
    Case(
        "load_state_dict while retraining",
        callbacks=lambda: [Load(40)],
        note="the pruned columns of the loaded weights are 0 from the end of the fit on; until then"
        " their mask is",
    ),
    Case(
        "BatchSizeFinder",
        net=Sized,
        callbacks=lambda: [BatchSizeFinder(max_trials=2, init_val=4)],
        data=lambda: None,
    ),
    Case("barebones", options={"barebones": True}, saves=False),
    Case("fast_dev_run=True", options={"fast_dev_run": True}, exact=False, saves=False),
    Case("fast_dev_run=48", options={"fast_dev_run": STEPS}, saves=False, data=lambda: loader(768)),
    Case("IterableDataset", data=stream),
    Case(
        "IterableDataset, max_epochs",
        data=lambda: stream(64),
        options={"max_epochs": 12},
        steps=-1,
    ),
    Case(
        "DataLoader, resumed in the middle of an epoch",
        data=lambda: loader(80),
        note="Lightning starts the epoch's batches over",
    ),
    Case(
        "DataLoader, shuffled",
        data=lambda: loader(64, shuffle=True),
        note="the order after a resume is another one",
    ),
    Case("StatefulDataLoader", data=stateful),
    Case(
        "StatefulDataLoader, shuffled",
        data=lambda: stateful(shuffle=True),
    ),
    Case("this package's data modules", data=lambda: DigitsDataModule(batch_size=64)),
    Case(
        "two processes, DataLoader",
        data=lambda: loader(64),
        ranks=2,
        note="Lightning shuffles by the number of the epoch, and from the second resume on, from"
        " checkpoints of the end of an epoch, that number lags behind",
    ),
    Case(
        "two processes, this package's data modules",
        data=lambda: DigitsDataModule(batch_size=64),
        ranks=2,
    ),
]


# --- one row ---


@dataclass
class Result:
    """What was found."""

    name: str
    pruned: dict[str, int]  # columns that are exactly 0 after the fit
    steps: int
    updates: int
    revived: int  # columns at p = 1 that held or used a weight other than 0, over all batches
    plain: bool  # classes, attributes and keys after the fit are those before it
    resumed: str  # "bit for bit", "differs", "differs, as without SPP" or "not tried"
    broken: list[str]  # promises
    note: str = ""


class Watch(Callback):
    """Looks for life in pruned columns before and after every batch."""

    def __init__(self, pruning: SPPCallback, own: bool) -> None:
        self.pruning, self.own = pruning, own
        self.revived = 0
        self.pruned: dict[str, Tensor] = {}

    def look(self, pl_module: LightningModule) -> None:
        pruner = self.pruning.pruner
        assert pruner is not None
        for name, p in pruner.probability.items():
            layer: Any = pl_module.get_submodule(name)
            pruned = p == 1
            before = self.pruned.get(name, pruned)
            # The weight that the layer computes with; and, where nobody writes to it, the
            # parameter itself.
            weights = [layer.weight, *([layer._parameters["weight"]] if self.own else [])]
            alive = torch.stack([w.detach().flatten(1).any(0) for w in weights]).any(0)
            self.revived += int((alive & pruned).sum()) + int((before & ~pruned).sum())
            self.pruned[name] = pruned

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.look(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.look(pl_module)


def looks(module: nn.Module) -> list[Any]:
    """Classes, attributes and keys of a network."""
    parts = [(name, type(m), sorted(vars(m))) for name, m in module.named_modules() if name]
    return [parts, [*module.state_dict()]]


def zero_columns(layer: nn.Module) -> int:
    weight = layer._parameters["weight"]
    assert weight is not None
    return int((weight.detach().flatten(1) == 0).all(0).sum())


def fit(
    case: Case, folder: Path, checkpoint: Path | None = None, prune: bool = True
) -> tuple[Result, dict[str, Any]]:
    """Train a case to its end.

    Args:
        case: What to train.
        folder: Where checkpoints go.
        checkpoint: Where to go on from; ``None`` for the start.
        prune: Whether to prune; without, only the state is of interest.

    Returns:
        What was found, and the state at the end.
    """
    torch.manual_seed(0 if checkpoint is None else 1)
    module = case.net()
    before = looks(module)
    pruning = SPPCallback(**PRUNING)
    watch = Watch(pruning, own=not case.name.startswith("load_state_dict"))
    callbacks: list[Callback] = [watch, pruning] if prune else []
    callbacks += case.callbacks()
    if case.saves:
        every = 8 if case.ranks > 1 else SAVE_EVERY * case.per_batch
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)
        callbacks.append(saving)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": case.ranks,
        "strategy": "auto" if case.ranks == 1 else "ddp",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": case.saves,
        "max_steps": case.steps,
        "max_epochs": -1,
        "limit_val_batches": 1.0 if case.validation else 0,
    }
    if case.options.get("barebones"):
        options = {name: options[name] for name in ("accelerator", "max_steps", "max_epochs")}
    trainer = Trainer(callbacks=callbacks, **(options | case.options))
    data: Any = case.data()
    if isinstance(data, DigitsDataModule):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    else:
        validation = loader() if case.validation else None
        trainer.fit(module, data, validation, ckpt_path=checkpoint)
    end = {
        "weights": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "step": trainer.global_step,
        "pruning": None,
    }
    result = Result(case.name, {}, 0, 0, watch.revived, looks(module) == before, "not tried", [])
    if prune:
        pruner = pruning.pruner
        assert pruner is not None
        masks = {name: mask.clone() for name, mask in pruner.mask.items()}
        end["pruning"] = [pruning.state_dict(), masks]
        result.pruned = {name: zero_columns(module.get_submodule(name)) for name in TARGETS}
        result.steps, result.updates = pruning.state_dict()["step"], pruner.num_updates
    return result, copy.deepcopy(end)


def same(ours: Any, theirs: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return bool(ours == theirs)


def resume(case: Case, folder: Path, prune: bool = True) -> tuple[Result, list[Result], bool]:
    """Train a case, and again from its checkpoints.

    Returns:
        What was found in the uninterrupted run and in the resumed ones, and whether all of them
        end bit for bit alike.
    """
    result, whole = fit(case, folder / "whole", prune=prune)
    if not case.saves:
        return result, [], True
    again, exact = [], True
    if case.ranks == 1:
        for step in RESUMED_FROM:
            checkpoint = folder / "whole" / f"step={step * case.per_batch}.ckpt"
            found, end = fit(case, folder / f"from{step}", checkpoint, prune)
            again.append(found)
            exact &= same(whole, end)
    else:
        last = folder / "whole"
        for step in LEGS:
            found, end = fit(case, folder / f"from{step}", last / f"step={step}.ckpt", prune)
            again.append(found)
            last = folder / f"from{step}"
        exact = same(whole, end)
    return result, again, exact


def check(case: Case, folder: Path) -> Result:
    """Run a case, resume it, and say what is broken."""
    result, again, exact = resume(case, folder / "pruned")
    result.note = case.note
    if case.saves:
        result.resumed = "bit for bit" if exact else "differs"
    if not exact and not resume(case, folder / "control", prune=False)[2]:
        result.resumed = "differs, as without SPP"
    if result.resumed == "differs":
        result.broken.append("the resumed run differs")
    for found in again:
        result.revived += found.revived
        result.plain &= found.plain
    if case.exact and any(found.pruned != TARGETS for found in (result, *again)):
        result.broken.append(f"pruned {[found.pruned for found in (result, *again)]}")
    if result.revived:
        result.broken.append("pruned columns were revived")
    if not result.plain:
        result.broken.append("the network isn't plain")
    return result


def in_processes(case: Case, folder: Path) -> Result:
    """Run a case in as many processes as it takes; return what the first one found."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={case.ranks}"]
    command += ["--master-port=29571", __file__, "--only", case.name, "--rank-in", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return Result(**json.loads((folder / "rank0.json").read_text()))


# --- the table ---


def cells(row: Row) -> list[Any]:
    """A row of the table."""
    pruned = ", ".join(f"{n} of {TARGETS[name]}" for name, n in row["pruned"].items())
    remarks = [*(f"**{promise}**" for promise in row["broken"]), row["note"]]
    return [
        *(row["name"], row["steps"], row["updates"], pruned, row["revived"]),
        *("yes" if row["plain"] else "no", row["resumed"], "; ".join(filter(None, remarks))),
    ]


def report(rows: list[Row]) -> str:
    """The rows as Markdown."""
    kept = sum(not row["broken"] for row in rows)
    head = [
        *("trained with", "steps", "updates of p", "columns pruned", "revived", "plain", "resumed"),
        "",
    ]
    return (
        f"{kept} of {len(rows)} ways to train keep every promise: the exact number of columns"
        " pruned, none revived before or after any batch, a plain network after the fit, and a"
        " resumed run that ends bit for bit like the uninterrupted one wherever it does so without"
        f" SPP.\n\n{markdown_table(head, map(cells, rows))}\n\n"
        f"SPP at 4x with {', '.join(f'`{k}={v}`' for k, v in PRUNING.items())}; one run and two"
        " resumed ones a row (three in two processes)."
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="names of the rows to run, as a pattern")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    chosen = [case for case in CASES if fnmatchcase(case.name, arguments.only or "*")]
    if arguments.rank_in is not None:
        result = check(chosen[0], arguments.rank_in)
        path = arguments.rank_in / f"rank{os.environ['RANK']}.json"
        path.write_text(json.dumps(asdict(result)))
        return 0
    data = "noise, 3x8x8; digits in the last row of one process"
    about = context("lightning", threads=torch.get_num_threads(), data=data)
    rows = []
    for case in chosen:
        if case.name.startswith("Stateful") and find_spec("torchdata") is None:
            print(f"{case.name}: not tried, as torchdata isn't installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            run = check if case.ranks == 1 else in_processes
            rows.append({**asdict(run(case, Path(folder))), "context": about})
        print(f"| {' | '.join(map(str, cells(rows[-1])))} |", flush=True)
    kept = sum(not row["broken"] for row in rows)
    print(f"\n{kept} of {len(rows)} rows keep every promise.")
    if arguments.only is None:
        Results("training_matrix", report).replace(rows)
    return int(kept < len(rows))


if __name__ == "__main__":
    sys.exit(main())
