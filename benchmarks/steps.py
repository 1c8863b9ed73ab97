"""Steps per second of the appendix's training: Lightning, with and without SPP, and a bare loop.

    python benchmarks/steps.py --device cpu --save
    python benchmarks/steps.py --device cuda --compile --save

Trains the ConvNet on pictures that stay on the device, in turns: a hand-written loop of the same
network, which is the limit; a Trainer; a Trainer with SPPCallback, pruning. What is reported is the
median over the rounds, and the median of the ratios to the loop in the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from reproduction.training import context
from torch.nn.functional import cross_entropy

from spp_lightning import CIFAR10DataModule, ConvNet, SPPCallback

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GOAL = 0.7  # of the limit, through Lightning
WARM_UP = 20  # steps of a turn that aren't timed


class Clock(Callback):
    """Times the steps of a fit after the first ones."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_batch_start(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, *_: object
    ) -> None:
        if trainer.global_step == WARM_UP:
            self.seconds = -now(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.seconds += now(pl_module.device)


def now(device: torch.device) -> float:
    """Seconds, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def network(compiled: bool) -> ConvNet:
    """The network to train."""
    net = ConvNet()
    if compiled:
        net.compile(mode="reduce-overhead")
    return net


def loop(data: CIFAR10DataModule, device: torch.device, steps: int, compiled: bool) -> float:
    """Seconds of some steps in a loop written by hand."""
    net = network(compiled).to(device).train()
    optimizer = net.configure_optimizers()["optimizer"]
    records, _ = data.load()
    images = torch.from_numpy(records["image"]).to(device)
    labels = torch.from_numpy(records["label"].astype("int64")).to(device)
    mean = images[:1000].float().mean(0)
    order = torch.randperm(len(labels)).to(device)
    start = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = now(device)
        chosen = order[(step * 100) % 50_000 :][:100]
        loss = cross_entropy(net(images[chosen].float() - mean), labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return now(device) - start


def fit(
    data: CIFAR10DataModule, device: torch.device, steps: int, compiled: bool, *callbacks: Callback
) -> float:
    """Seconds of some steps in a Trainer."""
    clock = Clock()
    trainer = Trainer(
        accelerator=device.type,
        devices=1,
        max_steps=WARM_UP + steps,
        max_epochs=-1,
        callbacks=[*callbacks, clock],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network(compiled), data)
    return clock.seconds


def main() -> None:
    """Measure, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=200, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    data = CIFAR10DataModule(ROOT / "data" / "cifar10", resident=True)
    shared = (data, device, arguments.steps, arguments.compile)
    contenders: dict[str, Callable[[], float]] = {
        "hand-written loop": lambda: loop(*shared),
        "Trainer": lambda: fit(*shared),
        "Trainer with SPPCallback": lambda: fit(*shared, SPPCallback(speedup=4)),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, run in contenders.items():
            rates[name].append(arguments.steps / run())
    limit = rates["hand-written loop"]
    shares = {
        name: statistics.median(a / b for a, b in zip(values, limit, strict=True))
        for name, values in rates.items()
    }
    result = {
        "steps_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "share_of_the_limit": shares,
        "goal": GOAL,
        "compiled": arguments.compile,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        **context(ROOT / "data" / "cifar10"),
    }
    for name, share in shares.items():
        print(f"{name}: {result['steps_per_second'][name]:.1f} steps/s, {100 * share:.0f} %")
    if arguments.save:
        name = f"steps_{arguments.device}{'_compiled' if arguments.compile else ''}.json"
        (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
