"""Steps per second of the appendix's training: Lightning, with and without SPP, and a bare loop.

    python benchmarks/steps.py --device cpu --save
    python benchmarks/steps.py --device cuda --compile --save

Trains the ConvNet on pictures that stay on the device, in turns: a hand-written loop of the same
network, which is the limit; a Trainer; a Trainer with SPPCallback, pruning. What is reported is the
median over the rounds, and the median of the ratios to the loop in the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from harness.arguments import each_thread_count, make_parser
from harness.context import ROOT, context, data_of
from harness.results import Results, Row, markdown_table
from harness.rounds import now, orders
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import cross_entropy

from spp_lightning import CIFAR10DataModule, ConvNet, SPPCallback

DATA = ROOT / "data" / "cifar10"
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
            self.seconds = -now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.seconds += now()


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
            start = now()
        chosen = order[(step * 100) % 50_000 :][:100]
        loss = cross_entropy(net(images[chosen].float() - mean), labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return now() - start


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


def measure(device: torch.device, steps: int, rounds: int, compiled: bool) -> Row:
    """Steps per second of the three ways to train, in turns."""
    data = CIFAR10DataModule(DATA, resident=True)
    contenders: dict[str, Callable[[], float]] = {
        "hand-written loop": lambda: loop(data, device, steps, compiled),
        "Trainer": lambda: fit(data, device, steps, compiled),
        "Trainer with SPPCallback": lambda: fit(
            data, device, steps, compiled, SPPCallback(speedup=4)
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for order in orders(list(contenders), rounds):
        for name in order:
            rates[name].append(steps / contenders[name]())
    limit = rates["hand-written loop"]
    return {
        "name": "ConvNet, compiled" if compiled else "ConvNet",
        "steps_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "share_of_the_limit": {
            name: statistics.median(a / b for a, b in zip(values, limit, strict=True))
            for name, values in rates.items()
        },
        "goal": GOAL,
        "rounds": rounds,
        "steps": steps,
    }


def report(rows: list[Row]) -> str:
    """The rows as Markdown."""
    names = list(rows[0]["steps_per_second"])
    table = []
    for row in rows:
        rates, shares = row["steps_per_second"], row["share_of_the_limit"]
        found = [f"{rates[name]:.1f} steps/s, {100 * shares[name]:.0f} %" for name in names]
        table.append([row["name"], row.get("threads", "–"), *found])
    return (
        "Steps per second of the appendix's training, and the share of the hand-written loop's:"
        f" medians of {rows[0]['rounds']} rounds of {rows[0]['steps']} steps.\n\n"
        + markdown_table(["network", "threads", *names], table)
    )


def main() -> None:
    """Measure, print, and save if asked to."""
    parser = make_parser(__doc__, rounds=5, quick_rounds=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=200, help="of a turn")
    options = parser.parse_args()
    device = torch.device(options.device)
    about = context("torchvision", "lightning", device=options.device, data=data_of(DATA))
    rows = []
    for threads in each_thread_count(options):
        row = measure(device, options.steps, options.rounds, options.compile)
        rows.append(row | {"threads": threads, "context": about})
        print(report(rows[-1:]), flush=True)
    if options.save:
        Results(f"steps_{options.device}", report).add(*rows)


if __name__ == "__main__":
    main()
