"""Kill training runs at random points, resume them, and compare with the run that never stopped.

    python benchmarks/kill_resume.py --kills 20 --twice 5 --seed 0

Trains the ConvNet on scikit-learn's digits, pruning and then retraining, first without a stop.
Then, for every kill, one fresh process trains until it sends itself SIGKILL, and another resumes
from the last checkpoint; in the runs of ``--twice`` that one is killed too. At the end weights,
pruning probabilities, masks, optimizer state, learning rates, counters and the logged sparsity
must be equal, bit for bit. Exits with 1 if anything differs. CPU only, one thread per process.
``--save`` writes ``benchmarks/results/kill_resume.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from fsspec.implementations.local import LocalFileOpener  # type: ignore[import-untyped]
from harness.arguments import quiet
from harness.context import context
from harness.results import Results, Row, markdown_table
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from spp_lightning import ConvNet, DigitsDataModule, SPPCallback

MAX_STEPS = 64  # optimizer steps; pruning ends after about 46, the rest is retraining
ACCUMULATE = 2
SAVE_EVERY = 2  # optimizer steps
PRUNING: dict[str, Any] = {"A": 0.25, "interval": 3, "kernels": "compact"}
# 39 batches an epoch: an odd number, so an epoch's last step is of one micro-batch.
DATA: dict[str, Any] = {"batch_size": 9, "test_size": 0.8}
EPOCH_BATCHES, EPOCH_STEPS = 39, 20


def batches_of(steps: int) -> int:
    """Micro-batches that the first steps of a run take."""
    epochs, more = divmod(steps, EPOCH_STEPS)
    return epochs * EPOCH_BATCHES + more * ACCUMULATE


MICRO_BATCHES = batches_of(MAX_STEPS)  # 125, of the whole run

PLACES = {
    "start": "before a forward pass",
    "gradients": "between backward and the optimizer's step, or the next micro-batch",
    "step": "just before the optimizer's step",
    "end": "after a micro-batch, before a checkpoint",
    "write": "half of a checkpoint's bytes written",
    "rename": "a checkpoint written, not yet at its place",
    "saved": "a checkpoint at its place, the next of the two not begun",
}


@dataclass(frozen=True)
class KillPoint:
    """Where a run is killed: the first time it gets to the place, from a micro-batch on."""

    micro_batch: int  # from 1
    place: str  # one of PLACES


@dataclass(frozen=True)
class Kill:
    """Where a run was when it was killed."""

    micro_batch: int  # under way, from 1
    step: int  # optimizer steps taken
    place: str
    phase: str
    resumed_from: int  # optimizer step of the last checkpoint; 0 if there was none


@dataclass(frozen=True)
class Outcome:
    """What came of one run and its kills."""

    kills: list[Kill]
    differences: list[str]


def draw_points(count: int, seed: int) -> list[KillPoint]:
    """Draw where to kill: one point in every slice of the run, places in a random order."""
    chance = random.Random(seed)
    places: list[str] = []
    while len(places) < count:
        places += chance.sample(list(PLACES), len(PLACES))
    # From the last save on there may be no place of each kind any more.
    last = MICRO_BATCHES - ACCUMULATE * SAVE_EVERY
    bounds = [1 + i * last // max(count, 1) for i in range(count + 1)]
    return [
        KillPoint(chance.randrange(bounds[i], max(bounds[i] + 1, bounds[i + 1])), places[i])
        for i in range(count)
    ]


def draw_pairs(count: int, seed: int) -> list[list[KillPoint]]:
    """Draw where to kill runs twice: first in the first half, then in the second."""
    points = draw_points(2 * count, seed)
    return [[points[i], points[count + i]] for i in range(count)]


# --- the process that trains ---


class Killer(Callback):
    """Sends SIGKILL to its own process at a point of the run."""

    def __init__(self, point: KillPoint, note: Path, pruning: SPPCallback) -> None:
        self.point, self.note, self.pruning = point, note, pruning
        self.micro_batch, self.step = 0, 0

    def due(self, place: str) -> bool:
        """Whether the run has come to its end, being at a place."""
        return place == self.point.place and self.micro_batch >= self.point.micro_batch

    def die(self) -> NoReturn:
        """Note down where the run is, and kill it."""
        assert self.pruning.pruner is not None
        phase = "retraining" if self.pruning.pruner.finished else "pruning"
        where = {"micro_batch": self.micro_batch, "step": self.step, "phase": phase}
        self.note.write_text(json.dumps(where))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed")

    def at(self, place: str) -> None:
        """Be at a place."""
        if self.due(place):
            self.die()

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        self.micro_batch = batches_of(trainer.global_step)  # checkpoints are of whole steps

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        self.micro_batch += 1
        self.step = trainer.global_step
        self.at("start")

    def on_after_backward(self, *_: Any) -> None:  # noqa: D102
        self.at("gradients")

    def on_before_optimizer_step(self, *_: Any) -> None:  # noqa: D102
        self.at("step")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        self.step = trainer.global_step
        self.at("end")


class KillingIO(TorchCheckpointIO):
    """Saves checkpoints as Lightning does, and is killed at it."""

    def __init__(self, killer: Killer) -> None:
        super().__init__()
        self.killer = killer

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        with self._deadly():
            super().save_checkpoint(*args, **kwargs)
        self.killer.at("saved")

    @contextmanager
    def _deadly(self) -> Iterator[None]:
        def write(file: Any, data: bytes) -> NoReturn:
            file.f.write(data[: len(data) // 2])
            file.f.flush()
            self.killer.die()

        def move(*_: Any) -> NoReturn:
            self.killer.die()

        if self.killer.due("write"):
            with patch.object(LocalFileOpener, "write", write):
                yield
        elif self.killer.due("rename"):
            with patch.object(shutil, "move", move):
                yield
        else:
            yield


def train(folder: Path, part: str, point: KillPoint | None = None) -> None:
    """Train to the end, or to a kill, from the last checkpoint if there is one.

    Args:
        folder: The run's folder: checkpoints, logs, and ``end.pt`` when it has ended.
        part: Name of this part of the run, for its logs.
        point: Where to be killed; ``None`` for the end.
    """
    quiet()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = ConvNet(momentum=0.9, milestones=(50,))
    pruning = SPPCallback(**PRUNING)
    saving = ModelCheckpoint(folder, every_n_train_steps=SAVE_EVERY, save_last=True)
    callbacks: list[Callback] = [pruning, saving]
    plugins: list[Any] = []
    if point is not None:
        killer = Killer(point, folder / "killed.json", pruning)
        callbacks.append(killer)
        plugins.append(KillingIO(killer))
    trainer = Trainer(
        max_steps=MAX_STEPS,
        max_epochs=-1,
        accumulate_grad_batches=ACCUMULATE,
        limit_val_batches=0,
        accelerator="cpu",
        logger=CSVLogger(folder, "logs", part, flush_logs_every_n_steps=1),
        callbacks=callbacks,
        plugins=plugins,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    data = DigitsDataModule(**DATA)
    trainer.fit(net, data, ckpt_path=str(last) if last.is_file() else None)
    pruner = pruning.pruner
    assert pruner is not None
    end = {
        "weights": net.state_dict(),
        "p": dict(pruner.probability),
        "masks": dict(pruner.mask),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "counters": {
            "global_step": trainer.global_step,
            "step": pruning.state_dict()["step"],
            "num_updates": pruner.num_updates,
            "num_pruned": pruner.num_pruned,
            "finished": pruner.finished,
            "batches": data.state_dict(),
        },
    }
    torch.save(end, folder / "end.pt")


# --- the process that compares ---


def logged(folder: Path) -> dict[int, dict[str, str]]:
    """Rows of the logged sparsity by step, from all parts of a run, the later part's last."""
    curve: dict[int, dict[str, str]] = {}
    for part in sorted((folder / "logs").iterdir()):  # killed1, killed2, whole
        path = part / "metrics.csv"
        if path.is_file():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    if row.get("sparsity/total"):
                        names = [name for name in row if name.startswith("sparsity/")]
                        curve[int(row["step"])] = {name: row[name] for name in names}
    return curve


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Names of the entries in which two nested states differ; tensors by ``torch.equal``."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [f"{name} (other keys)"]
        return [d for k in ours for d in differences(ours[k], theirs[k], f"{name}.{k}".strip("."))]
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    else:
        same = type(ours) is type(theirs) and ours == theirs
    return [] if same else [name]


def process(start: str, folder: Path, part: str, point: KillPoint | None = None) -> int:
    """Train in a fresh process; return its exit code."""
    folder.mkdir(exist_ok=True)
    child = multiprocessing.get_context(start).Process(target=train, args=(folder, part, point))  # type: ignore[attr-defined]  # each context has one
    child.start()
    child.join()
    return int(child.exitcode)


def end_of(folder: Path) -> dict[str, Any]:
    """State at the end of a run, its logged sparsity included."""
    state: dict[str, Any] = torch.load(folder / "end.pt", weights_only=True)
    return {**state, "logged": logged(folder)}


def kill_and_resume(
    start: str, folder: Path, points: Sequence[KillPoint], whole: dict[str, Any]
) -> Outcome:
    """Kill a run at one point after the other, resuming it, and compare its end with the whole's.

    Raises:
        RuntimeError: If the run wasn't killed at a point, or the last one resumed failed.
    """
    kills = []
    last = folder / "last.ckpt"
    for number, point in enumerate(points, 1):
        code = process(start, folder, f"killed{number}", point)
        if code != -signal.SIGKILL:
            raise RuntimeError(f"The run must be killed at {point}, but exited with {code}.")
        step = torch.load(last, weights_only=True)["global_step"] if last.is_file() else 0
        where = json.loads((folder / "killed.json").read_text())
        kills.append(Kill(place=point.place, resumed_from=step, **where))
    code = process(start, folder, "whole")
    if code != 0:
        raise RuntimeError(f"The run killed at {points} must resume, but exited with {code}.")
    return Outcome(kills, differences(whole, end_of(folder)))


def run_kills(
    points: Sequence[Sequence[KillPoint]], folder: Path, start: str = "spawn", jobs: int = 2
) -> Iterator[Outcome]:
    """Kill and resume runs.

    Args:
        points: Where to kill, one after the other, by run.
        folder: Where the runs write; on one file system with the folder for temporary files,
            between which Lightning moves checkpoints.
        start: How processes start: ``"spawn"``, a new interpreter each, or ``"forkserver"``, each
            forked from one that has imported this package and done nothing else.
        jobs: Runs at a time.

    Returns:
        The outcomes, in the order of the runs.

    Raises:
        RuntimeError: If a run ends otherwise than it should.
    """
    if start == "forkserver":
        multiprocessing.set_forkserver_preload(["spp_lightning", "sklearn.datasets"])
    if process(start, folder / "whole", "whole") != 0:
        raise RuntimeError("The uninterrupted run failed.")
    whole = end_of(folder / "whole")
    if not whole["counters"]["finished"] or len(whole["logged"]) < 10:
        raise RuntimeError(f"The uninterrupted run must prune to its end: {whole['counters']}.")
    with ThreadPoolExecutor(jobs) as pool:
        runs = [
            pool.submit(kill_and_resume, start, folder / f"run{i}", its_points, whole)
            for i, its_points in enumerate(points)
        ]
        for run in runs:
            yield run.result()


def row_of(number: int, outcome: Outcome) -> Row:
    """One run as a row of results."""
    return {"name": f"run {number}", **asdict(outcome)}


def report(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    table = []
    for row in rows:
        kills = [
            (k["micro_batch"], k["step"], k["phase"], PLACES[k["place"]], k["resumed_from"])
            for k in row["kills"]
        ]
        cells = ["; then ".join(map(str, column)) for column in zip(*kills, strict=True)]
        table.append([row["name"], *cells, ", ".join(row["differences"]) or "none"])
    exact = sum(not row["differences"] for row in rows)
    head = [
        *("run", "micro-batch", "step", "phase", "killed", "resumed from step", "differences"),
    ]
    return (
        f"{exact} of {len(rows)} killed and resumed runs equal the uninterrupted one bit for"
        f" bit.\n\n{markdown_table(head, table)}"
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Kill and resume training runs, and compare.")
    parser.add_argument("--kills", type=int, default=20, help="how many runs to kill once")
    parser.add_argument("--twice", type=int, default=5, help="how many runs to kill twice")
    parser.add_argument("--seed", type=int, default=0, help="decides where")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    options = parser.parse_args()
    points = [[point] for point in draw_points(options.kills, options.seed)]
    points += draw_pairs(options.twice, options.seed)
    seeds = f"{options.seed} of the kills, 0 of network, masks and data"
    about = context("lightning", threads=1, processes=options.jobs, seeds=seeds)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in run_kills(points, Path(folder), jobs=options.jobs):
            rows.append(row_of(len(rows) + 1, outcome) | {"context": about})
            print(json.dumps(asdict(outcome)), flush=True)
    print(report(rows))
    if options.save:
        Results("kill_resume", report).replace(rows)
    return int(any(row["differences"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
