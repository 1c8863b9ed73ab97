"""One run: a configuration, a seed and a schedule, trained to the end and measured.

    python -m reproduction.training FOLDER DATA SCHEDULE SEED eager|compiled < configuration.json

Trains in ``FOLDER``, going on from its last checkpoint, prints ``{"step": …}`` as it goes, and in
the end the finished line. ``appendix.py`` runs it, one process per run.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from reproduction.rows import BASELINE, Configuration
from reproduction.schedules import SCHEDULES, Schedule
from reproduction.simpler import ColumnMasks, FilterMasks, MagnitudeMasks, convolutions
from spp_lightning import CIFAR10DataModule, ConvNet, SPPCallback, SPPPruner, count_macs

__all__ = ["SAY_EVERY", "Run", "context"]

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
        seed: Of the initial weights, the order of the pictures and the masks.
    """

    def __init__(
        self, runs: Path, data: Path, schedule: Schedule, configuration: Configuration, seed: int
    ) -> None:
        self.runs = runs
        self.data = data
        self.schedule = schedule
        self.configuration = configuration
        self.seed = seed

    @property
    def folder(self) -> Path:
        """Where its checkpoints lie."""
        return self.runs / self.schedule.name / f"{self.configuration.name} seed={self.seed}"

    @property
    def baseline(self) -> Run:
        """The run whose weights this one starts from."""
        return Run(self.runs, self.data, self.schedule, BASELINE, self.seed)

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
            precision=self.schedule.precision,  # type: ignore[arg-type]  # a name of Lightning's
            devices=1,
            callbacks=[*self._pruning(net), Record(), saving],
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
            "accuracy": self._accuracy(net),
            "baseline_accuracy": self._accuracy(self.baseline.network()),
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
            "precision": self.schedule.precision,
            "seconds": round(record["seconds"], 1),
            **depends_on,
        }

    def _module(self) -> ConvNet:
        milestones = self.schedule.milestones(self.steps)
        if self.configuration == BASELINE:
            return ConvNet(milestones=milestones)
        weights = self.baseline.final
        if share := self.configuration.distillation:
            return ConvNet(
                milestones=milestones, weights=weights, teacher=weights, distillation=share
            )
        return ConvNet(milestones=milestones, weights=weights)

    def _pruning(self, net: ConvNet) -> list[Callback]:
        row = self.configuration
        if row.method in ("baseline", "control"):
            return []
        if row.method == "filters":
            places = {"conv1": 32 * 32, "conv2": 16 * 16, "conv3": 8 * 8}
            return [FilterMasks(row.speedup, tuple(places.values()))]
        if row.method == "one-shot columns":
            return [ColumnMasks(row.speedup)]
        spp = SPPCallback(
            prune_ratio=dict(row.ratios) if row.ratios else 1 - 1 / row.speedup,
            criterion=row.criterion,
            use_rank=row.use_rank,
            interval=self.schedule.interval(row.interval),
            A=row.A,
            u=row.u,
            crossing=row.crossing,
            recovery=row.recovery,
            masking=row.masking,
            seed=self.seed,
        )
        if row.method == "spp":
            return [spp] if row.pruning_lr == 1 else [PruningRate(row.pruning_lr, spp), spp]
        # The gradual methods get the iterations that SPP takes.
        kind = ColumnMasks if row.method == "gradual columns" else MagnitudeMasks
        updates = SPPPruner(copy.deepcopy(net), speedup=row.speedup).expected_updates
        return [kind(row.speedup, updates, self.schedule.interval(row.interval))]

    def _accuracy(self, net: ConvNet) -> float:
        """Accuracy on the 10,000 test pictures, in percent."""
        trainer = Trainer(
            devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        data = CIFAR10DataModule(self.data, batch_size=500)
        return round(100 * float(trainer.test(net, data, verbose=False)[0]["test_acc"]), 2)


class Record(Callback):
    """Keeps, over resumes, the layers' sparsity at every update and the seconds of training."""

    def __init__(self) -> None:
        self.curve: list[list[float]] = []  # step, then the share of columns out by layer
        self.seconds = 0.0
        self._updates = 0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()
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
        return {"curve": self.curve, "seconds": self.seconds, "updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve, self.seconds = state_dict["curve"], state_dict["seconds"]
        self._updates = state_dict["updates"]


class PruningRate(Callback):
    """Multiplies the learning rate by a factor as long as SPP prunes. Stands before SPP."""

    def __init__(self, factor: float, pruning: SPPCallback) -> None:
        self.factor = factor
        self.pruning = pruning
        self.acting = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pruner = self.pruning.pruner
        acts = pruner is not None and not pruner.finished
        if acts != self.acting:
            self.acting = acts
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= self.factor if acts else 1 / self.factor

    def state_dict(self) -> dict[str, Any]:
        return {"acting": self.acting}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.acting = state_dict["acting"]


def is_jpeg(data: Path) -> bool:
    """Whether a folder holds CIFAR-10 as JPEG files."""
    return any((data / "train").glob("*/*.jpg"))


def context(data: Path) -> dict[str, Any]:
    """What a run's figures depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "data": "CIFAR-10 (JPEG q75)" if is_jpeg(data) else "CIFAR-10",
        "device": gpu or f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": None if gpu else torch.get_num_threads(),
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
    runs, data, schedule, seed, mode = sys.argv[1:]
    configuration = Configuration.from_dict(json.load(sys.stdin))
    run = Run(Path(runs), Path(data), SCHEDULES[schedule], configuration, int(seed))
    depends_on = context(run.data)  # now: the code that is loaded may be another one's at the end
    if not run.final.is_file():
        run.train(mode == "compiled")
    print(json.dumps({"line": run.line(depends_on)}), flush=True)


if __name__ == "__main__":
    main()
