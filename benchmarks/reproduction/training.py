"""One run: a configuration, a seed and a schedule, trained to the end and measured.

    python -m reproduction.training RUNS DATA SCHEDULE PRECISION SEED eager|compiled < row.json

Trains in a folder of its own in ``RUNS``, going on from its last checkpoint, prints
``{"step": …}`` as it goes, and in the end the finished line. ``appendix.py`` runs it, one process
per run.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from reproduction.kept import KeptColumns
from reproduction.rates import ClassifierDecay, LastBatches, PhaseRates
from reproduction.rows import BASELINE, Configuration
from reproduction.schedules import PRECISIONS, SCHEDULES, Precision, Schedule
from reproduction.simpler import ColumnMasks, FilterMasks, MagnitudeMasks, Masks, convolutions
from reproduction.variants import Importance, Penalize, StraightThrough
from spp_lightning import (
    CIFAR10DataModule,
    ConvNet,
    DistillationCallback,
    SPPCallback,
    SPPPruner,
    compact,
    count_macs,
)
from spp_lightning.data.arrays import Records

__all__ = ["SAY_EVERY", "Run", "context", "penalty_ceiling"]

SAVE_EVERY = 500  # steps
SAY_EVERY = 20  # steps
ROOT = Path(__file__).resolve().parents[2]


class Run:
    """One run, in its folder.

    Args:
        runs: Folder of all runs of the appendix.
        data: Folder that holds CIFAR-10.
        schedule: How long to train.
        configuration: What to do.
        seed: Of the initial weights, the order of the images and the masks.
        precision: What to train in.
    """

    def __init__(
        self,
        runs: Path,
        data: Path,
        schedule: Schedule,
        configuration: Configuration,
        seed: int,
        precision: Precision = "32-true",
    ) -> None:
        self.runs = runs
        self.data = data
        self.schedule = schedule
        self.configuration = configuration
        self.seed = seed
        self.precision = precision

    @property
    def folder(self) -> Path:
        """Where its checkpoints lie."""
        series = f"{self.schedule.name} {self.precision}"
        return self.runs / series / f"{self.configuration.name} seed={self.seed}"

    @property
    def baseline(self) -> Run:
        """The run whose weights this one starts from."""
        return Run(self.runs, self.data, self.schedule, BASELINE, self.seed, self.precision)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        scratch = self.configuration == BASELINE
        return self.schedule.baseline_steps if scratch else self.schedule.steps

    @property
    def final(self) -> Path:
        """The checkpoint at its end; there is none before."""
        return self.folder / "final.ckpt"

    def network(self) -> ConvNet:
        """The trained network of a finished run."""
        return ConvNet(weights=self.final).eval()

    def train(self, compiled: bool = False) -> None:
        """Train to the end, from the last checkpoint if there is one.

        Args:
            compiled: Train with ``torch.compile``, on a GPU in CUDA graphs.
        """
        seed_everything(self.seed, verbose=False)
        net = self._module()
        kept = not compiled and self._on_kept_columns
        if compiled:
            net.compile(mode="reduce-overhead")
        last = self.folder / "last.ckpt"
        saving = ModelCheckpoint(
            self.folder,
            filename="last",
            every_n_train_steps=SAVE_EVERY,
            enable_version_counter=False,
        )
        trainer = Trainer(
            max_steps=self.steps,
            max_epochs=-1,
            precision=self.precision,
            devices=1,
            callbacks=[*self._callbacks(net, kept), Record(kept), saving],
            logger=False,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = CIFAR10DataModule(self.data, seed=self.seed, resident=True)
        trainer.fit(net, data, ckpt_path=last if last.is_file() else None, weights_only=True)
        if trainer.global_step < self.steps:  # by a Ctrl-C, which Lightning takes as an end
            raise KeyboardInterrupt
        trainer.save_checkpoint(self.folder / "final.tmp")
        os.replace(self.folder / "final.tmp", self.final)
        last.unlink(missing_ok=True)

    def line(self, depends_on: dict[str, Any]) -> dict[str, Any]:
        """The finished run in numbers, with what they depend on."""
        checkpoint = torch.load(self.final, map_location="cpu", weights_only=True)
        record = checkpoint["callbacks"]["Record"]
        pruning = checkpoint["callbacks"].get("SPPCallback", {}).get("pruner", {})
        net = self.network()
        weights = {name: layer.weight.detach() for name, layer in convolutions(net).items()}
        dense = count_macs(ConvNet(), net.example_input_array)
        left = count_macs(net, net.example_input_array)
        if self.configuration.method == "magnitude":  # whose zeros are in no column
            left = {
                name: round(dense[name] * float((weight != 0).float().mean()))
                for name, weight in weights.items()
            }
        interval = self.schedule.interval(self.configuration.interval)
        return {
            "configuration": self.configuration.as_dict(),
            "schedule": self.schedule.name,
            "seed": self.seed,
            "accuracy": self.accuracy(),
            "train_accuracy": self._measure("train"),
            "baseline_accuracy": self.baseline.accuracy(),
            "updates": pruning.get("num_updates"),
            "pruning_iterations": pruning.get("num_updates", 0) * interval if pruning else None,
            "sparsity": {
                name: float((w.flatten(1) == 0).all(0).float().mean())
                for name, w in weights.items()
            },
            "conv_macs": sum(left[name] for name in weights),
            "conv_macs_dense": sum(dense[name] for name in weights),
            "curve": record["curve"],
            "steps": self.steps,
            "precision": self.precision,
            "kept_columns": record["kept_columns"],
            "seconds": round(record["seconds"], 1),
            **depends_on,
            "device": "; ".join(record["devices"]),
        }

    def _module(self) -> ConvNet:
        milestones = self.schedule.milestones(self.steps)
        row = self.configuration
        if row == BASELINE:
            return ConvNet(milestones=milestones)
        return ConvNet(
            lr=row.lr * ConvNet().hparams["lr"],
            milestones=milestones,
            weights=self.baseline.final,
            weight_decay=row.weight_decay,
        )

    def _callbacks(self, net: ConvNet, kept_columns: bool) -> list[Callback]:
        """What prunes, and what is changed in the training, in the order in which it acts."""
        row = self.configuration
        pruning = self._pruning(net, kept_columns)
        callbacks = [*pruning]
        if row.distillation:
            teacher: nn.Module = self.baseline.network()
            if kept_columns:  # a dense one takes longer
                teacher = compact(teacher, torch.zeros(100, 3, 32, 32))
            callbacks.append(DistillationCallback(teacher, row.distillation))
        over = partial(all_over, pruning)
        if (row.pruning_lr, row.retraining_lr) != (1, 1):
            until = self.schedule.milestones(self.steps)[0]
            callbacks.insert(0, PhaseRates(row.pruning_lr, row.retraining_lr, over, until))
        if row.classifier_decay is not None:
            callbacks.append(ClassifierDecay(row.classifier_decay))
        if row.last_batch > 1:
            callbacks.append(LastBatches(row.last_batch, self.schedule.milestones(self.steps)[0]))
        if kept_columns:
            callbacks += [KeptColumns(each) for each in pruning if isinstance(each, ColumnMasks)]
        return callbacks

    @property
    def _on_kept_columns(self) -> bool:
        """Whether kept columns alone are computed, where that is faster."""
        by_column = self.configuration.method in ("spp", "one-shot columns", "gradual columns")
        return by_column and self.precision == "32-true" and not torch.cuda.is_available()

    def _pruning(self, net: ConvNet, kept_columns: bool) -> list[Callback]:
        row = self.configuration
        if row.method in ("baseline", "control"):
            return []
        if row.method == "filters":
            places = {"conv1": 32 * 32, "conv2": 16 * 16, "conv3": 8 * 8}
            return [FilterMasks(row.speedup, tuple(places.values()))]
        if row.method == "one-shot columns":
            return [ColumnMasks(row.speedup)]
        interval = self.schedule.interval(row.interval)
        if row.method != "spp":  # the gradual methods get the iterations that SPP takes
            kind = ColumnMasks if row.method == "gradual columns" else MagnitudeMasks
            updates = SPPPruner(copy.deepcopy(net), speedup=row.speedup).expected_updates
            return [kind(row.speedup, updates, interval)]
        spp = SPPCallback(
            prune_ratio=dict(row.ratios) if row.ratios else 1 - 1 / row.speedup,
            criterion="l1" if row.criterion == "taylor" else row.criterion,
            use_rank=row.use_rank,
            interval=interval,
            A=row.A,
            u=row.u,
            crossing=row.crossing,
            recovery=row.recovery,
            masking="sample" if row.masking == "penalize" else row.masking,
            seed=self.seed,
            kernels="auto" if kept_columns else "dense",
        )
        callbacks: list[Callback] = [spp]
        taylor = row.criterion == "taylor"
        if taylor or row.score_decay or not row.dead_filters:
            callbacks.insert(0, Importance(spp, row.score_decay, row.dead_filters, taylor))
        if row.straight_through:
            callbacks.append(StraightThrough(spp))
        if row.masking == "penalize":
            steps = interval * SPPPruner(copy.deepcopy(net), speedup=row.speedup).expected_updates
            callbacks.append(Penalize(spp, penalty_ceiling(net, steps)))
        return callbacks

    def accuracy(self) -> float:
        """Accuracy of the finished run on the test images, in percent; measured once."""
        known = self.folder / "accuracy.json"
        if not known.is_file() or known.stat().st_mtime < self.final.stat().st_mtime:
            known.write_text(json.dumps(self._measure("test")))
        return float(json.loads(known.read_text()))

    def _measure(self, part: Literal["train", "test"]) -> float:
        """Accuracy in percent, on the test images or on every fifth of the training images."""
        trainer = Trainer(
            devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        kind = CIFAR10DataModule if part == "test" else TrainingImages
        data = kind(self.data, batch_size=200)
        found = trainer.test(self.network(), data, verbose=False)
        return round(100 * float(found[0]["test_acc"]), 2)


class TrainingImages(CIFAR10DataModule):
    """CIFAR-10 with every fifth of the training images in the place of the test images."""

    def load(self) -> tuple[Records, Records]:
        train, _ = super().load()
        return train, train[::5]


def penalty_ceiling(net: ConvNet, steps: int) -> float:
    """The weight decay of a group whose p is 1.

    A group whose p grows steadily to 1, and whose weights get no gradient else, ends at exp(-5) of
    its size.

    Args:
        net: The network, with the learning rate and momentum that it trains at.
        steps: Optimizer steps in which p grows from 0 to 1.
    """
    rate = net.hparams["lr"] / (1 - net.hparams["momentum"])
    return float(2 * 5 / (rate * steps))


def all_over(pruning: Sequence[Callback]) -> bool:
    """Whether pruning callbacks have fixed their masks."""
    for callback in pruning:
        if isinstance(callback, SPPCallback):
            return callback.pruner is not None and callback.pruner.finished
        if isinstance(callback, Masks):
            return callback.done == callback.updates
    return True


class Record(Callback):
    """Keeps, over resumes, the layers' sparsity at every update, the seconds and the devices.

    Args:
        kept_columns: Whether steps are computed on kept columns alone, where that is faster.
    """

    def __init__(self, kept_columns: bool) -> None:
        self.kept_columns = kept_columns
        self.curve: list[list[float]] = []  # step, then the share of columns out by layer
        self.seconds = 0.0
        self.devices: list[str] = []
        self._updates = 0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()
        self.devices = sorted({*self.devices, device_name()})
        self._note(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._note(trainer)
        if trainer.global_step % SAY_EVERY == 0:
            print(json.dumps({"step": trainer.global_step}), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count_seconds()

    def _note(self, trainer: Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            if isinstance(callback, SPPCallback) and callback.pruner is not None:
                pruner = callback.pruner
                if pruner.num_updates > self._updates:
                    self._updates = pruner.num_updates
                    shares = [round(share, 5) for share in pruner.sparsity.values()]
                    self.curve.append([trainer.global_step, *shares])

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def state_dict(self) -> dict[str, Any]:
        self._count_seconds()
        return {
            "curve": self.curve,
            "seconds": self.seconds,
            "updates": self._updates,
            "devices": self.devices,
            "kept_columns": self.kept_columns,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve, self.seconds = state_dict["curve"], state_dict["seconds"]
        self._updates = state_dict["updates"]
        self.devices = state_dict["devices"]


def is_jpeg(data: Path) -> bool:
    """Whether a folder holds CIFAR-10 as JPEG files."""
    return any((data / "train").glob("*/*.jpg"))


def device_name() -> str:
    """What trains here."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def context(data: Path) -> dict[str, Any]:
    """What a run's figures depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "data": "CIFAR-10 (JPEG q75)" if is_jpeg(data) else "CIFAR-10",
        "device": device_name(),
        "threads": None if torch.cuda.is_available() else torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "lightning": lightning.__version__,
        },
        "commit": commit,
        "date": date.today().isoformat(),
    }


def main() -> None:
    """Train what the arguments and the standard input say, and print the line."""
    runs, data, schedule, precision, seed, mode = sys.argv[1:]
    assert precision in PRECISIONS
    row = Configuration.from_dict(json.load(sys.stdin))
    run = Run(Path(runs), Path(data), SCHEDULES[schedule], row, int(seed), precision)
    depends_on = context(run.data)  # now: the code that is loaded may be another one's at the end
    if not run.final.is_file():
        run.train(mode == "compiled")
    print(json.dumps({"line": run.line(depends_on)}), flush=True)


if __name__ == "__main__":
    main()
