"""Validation accuracy while SPP prunes: what a Trainer sees, beside that of whole weights.

    OMP_NUM_THREADS=1 python benchmarks/validation_curve.py

Trains the CIFAR-10 ConvNet for a short while, then prunes it 4x and trains it on. Every few steps
the Trainer validates, which computes with the expected mask: weights times 1 - p. The same images
then go through a copy with whole weights, of which only the pruned columns are 0. Writes
``benchmarks/results/validation_curve.json``, ``.md`` and ``.png``; 7 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import subprocess
import warnings
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import lightning
import matplotlib
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from spp_lightning import CIFAR10DataModule, ConvNet, SPPCallback

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "validation_curve"
BATCH_SIZE = 100
VALIDATION_IMAGES = 2000  # set aside of the training images, 200 of each class
EVERY = 20  # steps between two validations
SPEEDUP = 4


@dataclass(frozen=True)
class Point:
    """One validation, accuracies in percent."""

    step: int
    expected: float  # of weights times 1 - p, as the Trainer logs it
    whole: float  # of whole weights
    sparsity: float  # share of the columns pruned
    finished: bool


class Compare(Callback):
    """Notes the Trainer's validation accuracy and that of a copy with whole weights."""

    def __init__(self, pruning: SPPCallback) -> None:
        self.pruning = pruning
        self.points: list[Point] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        pruner = self.pruning.pruner
        if trainer.sanity_checking or pruner is None:
            return
        plain = ConvNet().eval()
        plain.load_state_dict(pl_module.state_dict())  # no mask is part of it
        expected = 100 * float(trainer.callback_metrics["val_acc"])
        whole = self.accuracy(plain, trainer.datamodule)  # type: ignore[attr-defined]
        step, share = trainer.global_step, pruner.total_sparsity
        self.points.append(Point(step, expected, whole, share, pruner.finished))
        print(
            f"step {step}: {expected:.2f} %, whole {whole:.2f} %, sparsity {share:.3f}", flush=True
        )

    @staticmethod
    def accuracy(net: ConvNet, data: CIFAR10DataModule) -> float:
        """Accuracy on the images that the Trainer validates with, in percent."""
        right = count = 0
        for batch in data.val_dataloader():
            images, labels = data.on_after_batch_transfer(batch, 0)
            right += int((net(images).argmax(1) == labels).sum())
            count += len(labels)
        return 100 * right / count


def fit(net: ConvNet, steps: int, *callbacks: Callback) -> None:
    """Train a network."""
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=list(callbacks),
        check_val_every_n_epoch=None,
        val_check_interval=EVERY if callbacks else None,
        limit_val_batches=1.0 if callbacks else 0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, images())


def measure(baseline_steps: int, steps: int, interval: int) -> dict[str, Any]:
    """Train, prune and compare."""
    torch.manual_seed(0)
    net = ConvNet(milestones=(baseline_steps * 4 // 5,))
    fit(net, baseline_steps)
    pruned = ConvNet(milestones=(steps * 4 // 5,))
    pruned.load_state_dict(net.state_dict())
    compare = Compare(SPPCallback(speedup=SPEEDUP, interval=interval))
    fit(pruned, steps, compare.pruning, compare)
    data = images()
    data.setup()
    pruner = compare.pruning.pruner
    assert pruner is not None and pruner.finished, "give more steps or a smaller interval"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    jpeg = any((ROOT / "data" / "cifar10" / "train").glob("*/*.jpg"))
    return {
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python"
        f" benchmarks/validation_curve.py --baseline-steps {baseline_steps} --steps {steps}"
        f" --interval {interval}",
        "data": "CIFAR-10 (JPEG q75)" if jpeg else "CIFAR-10",
        "validation_images": VALIDATION_IMAGES,
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
        "seed": 0,
        "runs": 1,
        "date": date.today().isoformat(),
        "commit": commit,
        "baseline_steps": baseline_steps,
        "steps": steps,
        "interval": interval,
        "updates": pruner.num_updates,
        "num_pruned": pruner.num_pruned,
        "baseline": Compare.accuracy(net.eval(), data),
        "points": [asdict(point) for point in compare.points],
    }


def images() -> CIFAR10DataModule:
    """CIFAR-10, with validation images of every class."""
    folder = str(ROOT / "data" / "cifar10")
    return CIFAR10DataModule(folder, batch_size=BATCH_SIZE, val_size=VALIDATION_IMAGES)


def table(result: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    points = [Point(**point) for point in result["points"]]
    pruning, last = [p for p in points if not p.finished], points[-1]
    rows = []
    for name in ("expected", "whole"):
        lowest = min(pruning, key=lambda p: getattr(p, name))
        value = getattr(lowest, name)
        rows.append(
            f"{value:.2f} % (step {lowest.step}) | {getattr(last, name) - value:.2f} points"
            f" | {getattr(last, name):.2f} %"
        )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"""\
| validation with | lowest while pruning | below the last | last, retrained |
| --- | --- | --- | --- |
| expected mask: weights times 1 - p | {rows[0]} |
| whole weights | {rows[1]} |

ConvNet, {result["baseline_steps"]:,} steps of training: {result["baseline"]:.2f} %. Then SPP at \
{SPEEDUP}x with an update every {result["interval"]} steps: {result["updates"]} updates, \
{len(pruning) * EVERY} to {(len(pruning) + 1) * EVERY} steps, then retraining up to step \
{result["steps"]}.

{result["data"]}, {result["validation_images"]:,} images set aside for validation; \
{result["device"]}; {versions}; seed {result["seed"]}, {result["runs"]} run; {result["date"]}, \
commit {result["commit"]}; `{result["command"]}`.
"""


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw both curves and the sparsity."""
    points = [Point(**point) for point in result["points"]]
    steps = [point.step for point in points]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, [p.expected for p in points], label="expected mask: weights times 1 - p")
    axes.plot(steps, [p.whole for p in points], label="whole weights")
    axes.plot(steps, [100 * p.sparsity for p in points], ":", color="grey", label="columns pruned")
    end = next(point.step for point in points if point.finished)
    axes.axvline(end, color="grey", linewidth=0.8)
    axes.annotate(" retraining", (end, 2), color="grey")
    axes.axhline(result["baseline"], color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="step", ylabel="validation accuracy (%)", ylim=(0, 80))
    axes.set_title(f"Validation while SPP prunes the CIFAR-10 ConvNet {SPEEDUP}x")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--baseline-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=600, help="of pruning and retraining")
    parser.add_argument("--interval", type=int, default=5, help="steps between two updates of p")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    result = measure(arguments.baseline_steps, arguments.steps, arguments.interval)
    RESULTS.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(table(result))
    draw(result, RESULTS.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
