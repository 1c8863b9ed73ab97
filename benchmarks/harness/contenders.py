"""Ways to a faster ResNet-20: SPP, and what a user could take in its place."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from reproduction.kept import KeptColumns
from reproduction.simpler import ColumnMasks

from harness.classifiers import ResNet20, data_for
from spp_lightning import DistillationCallback, SPPCallback, SPPPruner

__all__ = ["BASELINE", "CONTENDERS", "Contender", "Lengths", "train"]

IMAGE = torch.zeros(1, 3, 32, 32)
LR = 0.05  # of the steps after the baseline's, whose own begins with 0.1
GROWING = 1 / 3  # share of the steps in which a penalty grows, before channels are removed
PENALTIES = 20  # how often it grows


@dataclass(frozen=True)
class Lengths:
    """Optimizer steps: of the baseline, of what follows it, and between two updates of SPP."""

    baseline: int
    more: int
    interval: int


@dataclass(frozen=True)
class Contender:
    """One way to a faster network.

    Args:
        kind: ``"baseline"``, ``"control"`` (the baseline, trained on), ``"SPP"``, ``"narrow"``
            (fewer channels, from scratch), ``"gradual L1 columns"`` or ``"one-shot L1 columns"``,
            or one of Torch-Pruning's: ``"TP L1"``, ``"TP group norm"`` (channels removed at once)
            and ``"TP growing"`` (after a growing penalty).
        speedup: Factor by which the MACs are to fall.
        name: What it is called; by default the two above.
        options: Of SPPCallback.
        distilled: Whether the baseline teaches while pruning and retraining.
        weight_decay: Of all parameters, while pruning and retraining.
    """

    kind: str
    speedup: float = 1.0
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    distilled: bool = False
    weight_decay: float = 1e-4

    def __str__(self) -> str:
        name = self.name or self.kind
        return name if self.speedup == 1 else f"{name} {self.speedup:g}×"


BASELINE = Contender("baseline")
SPEEDUPS = (3, 2, 4)  # the most informative one first
RECIPE = Contender(
    "SPP", name="SPP, scaled and distilled", options={"masking": "scale"}, distilled=True
)
CONTENDERS = [  # by worth
    BASELINE,
    *(
        replace(one, speedup=speedup)
        for speedup in SPEEDUPS
        for one in (RECIPE, Contender("TP group norm"))
    ),
    Contender("TP group norm", 3, "TP group norm, distilled", distilled=True),
    *(Contender("gradual L1 columns", speedup) for speedup in SPEEDUPS),
    *(Contender(kind, 3) for kind in ("SPP", "TP L1", "narrow", "TP growing")),
    *(Contender("SPP", speedup) for speedup in (2, 4)),
    *(Contender("one-shot L1 columns", speedup) for speedup in SPEEDUPS),
    *(Contender(kind, speedup) for kind in ("narrow", "TP growing", "TP L1") for speedup in (2, 4)),
    replace(RECIPE, speedup=6),
    Contender("SPP", 6),
    Contender("control"),
]


class GrowingPenalty(Callback):
    """Torch-Pruning's growing regularisation, on the gradients."""

    def __init__(self, pruner: Any, steps: int) -> None:
        self.pruner, self.interval = pruner, max(1, steps // PENALTIES)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Add the penalty's gradients; it grows every few steps."""
        if trainer.global_step % self.interval == 0:
            self.pruner.update_reg()
        self.pruner.regularize(pl_module)


def fit(net: ResNet20, data: Any, folder: Path, name: str, *callbacks: Callback) -> None:
    """Train for ``net.steps`` steps, from the last checkpoint if there is one."""
    saving = ModelCheckpoint(folder, name, every_n_train_steps=200, enable_version_counter=False)
    last = folder / f"{name}.ckpt"
    trainer = Trainer(
        accelerator="cpu",
        max_steps=net.steps,
        max_epochs=-1,
        callbacks=[*callbacks, saving],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    net.train()  # Torch-Pruning leaves networks in evaluation mode
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer.fit(net, data, ckpt_path=last if last.is_file() else None, weights_only=False)
    if trainer.global_step < net.steps:  # by a Ctrl-C, which Lightning takes as an end
        raise KeyboardInterrupt
    if not all(bool(parameter.isfinite().all()) for parameter in net.parameters()):
        raise ValueError(f"`net` must stay finite in training, but {folder} holds NaN or infinity.")
    last.unlink(missing_ok=True)


def channel_pruner(net: ResNet20, contender: Contender) -> Any:
    """Torch-Pruning's pruner: as many channels of every layer as leave the MACs."""
    pruners = {
        "TP L1": (torch_pruning.pruner.BasePruner, 1),
        "TP group norm": (torch_pruning.pruner.GroupNormPruner, 2),
        "TP growing": (torch_pruning.pruner.GrowingRegPruner, 2),
    }
    pruner, p = pruners[contender.kind]
    return pruner(
        net,
        IMAGE,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=p),
        pruning_ratio=1 - contender.speedup**-0.5,
        ignored_layers=[net.head],
    )


def train(
    contender: Contender, seed: int, lengths: Lengths, runs: Path, data_folder: Path
) -> LightningModule:
    """The trained network; read from its folder if an earlier call has left it there.

    Args:
        contender: What to train.
        seed: Of the initial weights, the order of the images and the masks.
        lengths: How long to train.
        runs: Folder of all runs.
        data_folder: Folder that holds CIFAR-10.
    """
    folder = runs / f"{contender} seed={seed}"
    final = folder / "final.pt"
    if not final.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        data = data_for("resnet20", data_folder)
        if contender.kind in ("baseline", "narrow"):
            net = from_scratch(contender, seed, lengths, folder, data)
        else:
            dense = train(BASELINE, seed, lengths, runs, data_folder)
            net = from_baseline(contender, dense, seed, lengths, folder, data)
        save(net.eval().to(memory_format=torch.contiguous_format), final)  # type: ignore[call-overload]
    trained: LightningModule = torch.load(final, weights_only=False)
    return trained


def from_scratch(
    contender: Contender, seed: int, lengths: Lengths, folder: Path, data: Any
) -> ResNet20:
    """The baseline, or a narrow network that trains for as long as baseline and pruning."""
    seed_everything(seed, verbose=False)
    steps = lengths.baseline + (lengths.more if contender.kind == "narrow" else 0)
    net = ResNet20(steps=steps, width=contender.speedup**-0.5, projects=True)
    fit(net, data, folder, "last")
    return net


def from_baseline(
    contender: Contender,
    dense: LightningModule,
    seed: int,
    lengths: Lengths,
    folder: Path,
    data: Any,
) -> ResNet20:
    """The baseline made faster, or trained on as it is."""
    seed_everything(seed, verbose=False)
    net = ResNet20(LR, lengths.more, projects=True, weight_decay=contender.weight_decay)
    net.load_state_dict(copy.deepcopy(dense.state_dict()))
    callbacks: list[Callback] = []
    if contender.kind == "SPP":
        options: dict[str, Any] = {"interval": lengths.interval, "seed": seed} | contender.options
        callbacks = [SPPCallback(speedup=contender.speedup, **options)]
    elif contender.kind.endswith("columns"):
        spp = SPPPruner(copy.deepcopy(net), speedup=contender.speedup)
        is_gradual = contender.kind.startswith("gradual")
        masks = ColumnMasks(
            contender.speedup, spp.expected_updates if is_gradual else 1, lengths.interval
        )
        callbacks = [masks, KeptColumns(masks)]
    elif contender.kind == "TP growing":
        net = penalized(contender, net, folder, data)
    elif contender.kind.startswith("TP"):
        channel_pruner(net, contender).step()
    if contender.distilled:
        callbacks.append(DistillationCallback(copy.deepcopy(dense)))
    fit(net, data, folder, "last", *callbacks)
    for callback in callbacks:
        if isinstance(callback, SPPCallback):
            assert callback.pruner is not None and callback.pruner.finished, folder
    return net


def penalized(contender: Contender, net: ResNet20, folder: Path, data: Any) -> ResNet20:
    """The network behind its growing penalty, with the steps that are left."""
    pruned = folder / "pruned.pt"
    steps = net.steps
    if not pruned.is_file():
        pruner = channel_pruner(net, contender)
        net.steps = round(GROWING * steps)
        fit(net, data, folder, "growing", GrowingPenalty(pruner, net.steps))
        pruner.step()
        save(net, pruned)
    found: ResNet20 = torch.load(pruned, weights_only=False)
    found.steps = steps - round(GROWING * steps)
    return found


def save(net: LightningModule, path: Path) -> None:
    """Write a network, with the shapes that pruning gave it; whole or not at all."""
    torch.save(net, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
