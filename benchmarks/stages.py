"""How far a network can be pruned without losing more accuracy than allowed.

    python benchmarks/stages.py --network resnet20 --max-drop 0.01 --save

Trains a network on CIFAR-10 for a short while, then lets ``StagedSPPCallback`` prune it in stages
for as long as the validation accuracy loses at most ``--max-drop``. The fit is stopped on the way,
in the middle of a stage, and resumed from its checkpoint. A row holds the table of the stages, and
the accuracy and the columns of the network that the fit ends with.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from harness.arguments import make_parser, quiet
from harness.classifiers import CLASSIFIERS, data_for
from harness.context import ROOT, context, data_of
from harness.results import Results, Row, markdown_table
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from spp_lightning import StagedSPPCallback

DATA = ROOT / "data" / "cifar10"


class Stopped(Callback):
    """Stops a fit at a stage, once the stage has pruned something and saved it."""

    def __init__(self, pruning: StagedSPPCallback, stage: int) -> None:
        self.pruning, self.stage, self.begun = pruning, stage, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the second pass of the stage."""
        self.begun += self.pruning.stage == self.stage
        trainer.should_stop = trainer.should_stop or self.begun == 2


def fit(
    net: LightningModule, data: Any, epochs: int, *callbacks: Any, resume: Path | None = None
) -> None:
    """Fit with validation at the end of every pass."""
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_epochs": epochs}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": bool(callbacks)}
    Trainer(callbacks=list(callbacks), **options).fit(net, data, ckpt_path=resume)


def report(rows: list[Row]) -> str:
    """The Markdown of the rows."""
    head = ["network", "stage", "target", "MACs", "val_acc", "at most lost", "ended with"]
    cells = [
        [
            *(row["network"], stage["stage"], stage["target"], f"{stage['macs']:,}"),
            "-" if stage["value"] is None else f"{stage['value']:.2%}",
            f"{row['max_drop']:.2%}",
            "this one" if stage["stage"] == row["ended_with"] else "",
        ]
        for row in rows
        for stage in row["stages"]
    ]
    return markdown_table(head, cells)


def main() -> None:
    """Train, prune in stages with a stop on the way, report."""
    parser = make_parser(__doc__, rounds=2, quick_rounds=2, threads=[1])
    parser.add_argument("--network", choices=CLASSIFIERS, default="resnet20")
    parser.add_argument("--max-drop", type=float, default=0.01, help="a share of the images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000, help="of the unpruned network")
    parser.add_argument("--epochs", type=int, default=60, help="most passes with SPP")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads[0])
    seed_everything(options.seed, verbose=False)
    name, epochs = options.network, 6 if options.quick else options.epochs
    net, data = CLASSIFIERS[name](options.steps), data_for(name, DATA)
    passes = 1 if options.quick else -(-options.steps * data.batch_size // 50_000)
    fit(net, data, passes)
    weights = net.state_dict()

    def staged() -> StagedSPPCallback:
        return StagedSPPCallback(
            monitor="val_acc", max_drop=options.max_drop, of="network", interval=5, patience=3
        )

    with tempfile.TemporaryDirectory() as folder:
        net, pruning = CLASSIFIERS[name](options.steps), staged()
        net.load_state_dict(weights)
        last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True)
        fit(net, data_for(name, DATA), epochs, pruning, Stopped(pruning, 1), last)
        again, pruning = CLASSIFIERS[name](options.steps), staged()
        best = ModelCheckpoint(f"{folder}/best", monitor="held_stage", mode="max")
        fit(again, data_for(name, DATA), epochs, pruning, best, resume=Path(folder, "last.ckpt"))
    plans = [("unpruned", pruning.plans[0].dense_macs, pruning.baseline)] + [
        (plan.target, plan.macs, pruning.values.get(i)) for i, plan in enumerate(pruning.plans, 1)
    ]
    stages = [
        {"stage": i, "target": target, "macs": macs, "value": value}
        for i, (target, macs, value) in enumerate(plans)
    ]
    row: Row = {
        "name": f"{name} seed {options.seed}",
        "context": context("lightning", data=data_of(DATA), threads=options.threads[0]),
        "network": name,
        "max_drop": options.max_drop,
        "ended_with": pruning.stage,
        "stages": stages,
    }
    print(report([row]))
    if options.save:
        Results("stages", report).add(row)


if __name__ == "__main__":
    main()
