"""Train a ConvNet on digits, prune it 4x, retrain it, make it compact, print what that did.

    python examples/quickstart.py

Needs no data and no network, and takes one to three minutes on two CPU cores. ``lightning
run`` and ``fabric run`` start it on the devices they are given.
"""

import sys
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from spp_lightning import (
    ConvNet,
    DigitsDataModule,
    SPPCallback,
    SPPPruner,
    compact,
    count_macs,
    launcher_options,
)

TRAIN_STEPS = 420
PRUNE_AND_RETRAIN_STEPS = 560


def make_trainer(max_steps: int, **options: Any) -> Trainer:
    """A Trainer for so many steps, on the devices that the launcher was given."""
    return Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        check_val_every_n_epoch=5,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
        **{"accelerator": "auto", **launcher_options(), **options},
    )


def milliseconds(*nets: nn.Module, batch: int = 64, rounds: int = 15) -> list[float]:
    """Median times that networks take for a batch on the CPU, measured in turns."""
    x = torch.randn(batch, 3, 32, 32)
    times: list[list[float]] = [[] for _ in nets]
    with torch.inference_mode():
        for _ in range(rounds):
            for net, own in zip(nets, times, strict=True):
                net(x)
                start = perf_counter()
                net(x)
                own.append(1e3 * (perf_counter() - start))
    return [median(own) for own in times]


def print_table(
    accuracy: dict[str, float],
    macs: dict[str, dict[str, int]],
    times: list[float],
    pruner: SPPPruner,
) -> None:
    """Print accuracy, MACs, sparsity and time of the dense and of the pruned network."""
    dense, pruned = macs["dense"], macs["pruned"]
    print(f"\n{'':12}{'dense':>12}{'pruned':>12}   columns pruned")
    for name, count in dense.items():
        columns = ""
        if name in pruner.num_pruned:
            out, there = pruner.num_pruned[name], pruner.num_groups[name]
            columns = f"   {out} of {there} ({pruner.sparsity[name]:.1%})"
        print(f"{name + ' MACs':12}{count:>12,}{pruned[name]:>12,}{columns}")
    total, left = sum(dense.values()), sum(pruned.values())
    print(f"{'all MACs':12}{total:>12,}{left:>12,}   {total / left:.2f}x fewer")
    print(f"{'accuracy':12}{accuracy['dense']:>12.2%}{accuracy['pruned']:>12.2%}")
    speedup = f"{times[0] / times[1]:.2f}x faster: compact, on the CPU, batches of 64"
    print(f"{'ms a batch':12}{times[0]:>12.2f}{times[1]:>12.2f}   {speedup}")


def main() -> None:
    """Train, prune, retrain, compare."""
    seed_everything(0, verbose=False)
    data = DigitsDataModule(batch_size=64)
    net = ConvNet(milestones=[340, 400])
    accuracy, macs = {}, {}

    rank_zero_info(f"1. Training a ConvNet on digits for {TRAIN_STEPS} steps.")
    trainer = make_trainer(TRAIN_STEPS, logger=False)
    trainer.fit(net, data)
    accuracy["dense"] = trainer.test(net, data, verbose=False)[0]["test_acc"]
    macs["dense"] = count_macs(net, net.example_input_array)

    rank_zero_info(f"2. Pruning it 4x and retraining it, {PRUNE_AND_RETRAIN_STEPS} steps in all.")
    logger = TensorBoardLogger("runs", name="quickstart")
    pruning = SPPCallback(speedup=4, interval=4)  # 4 steps suit a run this short; 180 is normal
    trainer = make_trainer(PRUNE_AND_RETRAIN_STEPS, logger=logger, callbacks=[pruning])
    trainer.fit(net, data)
    accuracy["pruned"] = trainer.test(net, data, verbose=False)[0]["test_acc"]
    macs["pruned"] = count_macs(net, net.example_input_array)

    if trainer.is_global_zero and pruning.pruner is not None:
        net.cpu().eval()
        fast = compact(net, torch.zeros(64, 3, 32, 32))  # stores and computes kept columns only
        print_table(accuracy, macs, milliseconds(net, fast), pruning.pruner)
        print(f"\nThe curves: tensorboard --logdir {logger.log_dir}")


if __name__ == "__main__":
    main()
