"""Whether solved ratios keep more accuracy than uniform ones at the same latency.

    python benchmarks/allocation.py --networks convnet --save

Trains a network on CIFAR-10 for a short while, then prunes it twice, with as many steps: by the
ratios that ``plan`` solves for a latency, with the loss on two training batches, and by one ratio
for all layers that is as fast. Both latencies are measured in turns with the unpruned network.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from harness.arguments import make_parser, quiet
from harness.classifiers import CLASSIFIERS, data_for
from harness.context import ROOT, context, data_of
from harness.results import Results, Row, markdown_table
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn

from spp_lightning import SPPCallback
from spp_lightning.planning.plan import Plan
from spp_lightning.planning.sensitivity import MOST
from spp_lightning.planning.solve import Planner
from spp_lightning.planning.target import Target, TargetSettings
from spp_lightning.training.losses import step_loss

DATA = ROOT / "data" / "cifar10"


def trainer_of(steps: int, *callbacks: Any) -> Trainer:
    """A Trainer that only trains."""
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_epochs": -1}
    options |= {"enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "limit_val_batches": 0}
    return Trainer(max_steps=steps, callbacks=list(callbacks), **options)


def accuracy(net: nn.Module, data: Any) -> float:
    """Share of the test images that a network classifies right."""
    data.setup("validate")
    right = total = 0
    net.eval()
    with torch.no_grad():
        for batch in data.val_dataloader():
            images, labels = data.on_after_batch_transfer(batch, 0)
            right += int((net(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / total


def planner_of(net: LightningModule, data: Any, threads: int) -> Planner:
    """The network, measured for one image."""
    data.setup("fit")
    batches = [data.on_after_batch_transfer(x, 0) for x, _ in zip(data.train_dataloader(), "12")]  # noqa: B905
    x = torch.zeros(1, 3, 32, 32)
    planner = Planner(net, (x,), TargetSettings(threads=threads), step_loss(batches, 256))
    planner.measure()
    return planner


def uniform_plan(planner: Planner, ms: float) -> Plan:
    """One ratio for all layers whose latency is nearest to ``ms``."""
    low, high, tried = 0.0, MOST, []
    for _ in range(8):
        middle = (low + high) / 2
        plan = planner.solve(Target("layers", "speedup", 1 / (1 - middle)))
        assert plan.ms is not None
        tried.append((abs(plan.ms / ms - 1), plan))
        if tried[-1][0] < 0.01:
            break
        low, high = (middle, high) if plan.ms > ms else (low, middle)
    return min(tried, key=lambda x: x[0])[1]


def report(rows: list[Row]) -> str:
    """The Markdown of the rows."""
    head = ["network, seed", "ratios", "baseline", "accuracy", "times as fast", "fewer MACs", "R"]
    cells = [
        [
            *(f"{row['network']}, {row['seed']}", row["which"]),
            *(f"{row['baseline']:.2%}", f"{row['accuracy']:.2%}"),
            *(f"{row['latency_speedup']:.2f}", f"{row['macs_speedup']:.2f}"),
            ", ".join(f"{ratio:.2f}" for ratio in row["ratios"].values()),
        ]
        for row in rows
    ]
    return markdown_table(head, cells)


def main() -> None:
    """Train, prune twice, compare."""
    parser = make_parser(__doc__, rounds=2, quick_rounds=2, threads=[1])
    parser.add_argument("--networks", nargs="+", choices=CLASSIFIERS, default=list(CLASSIFIERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--speedup", type=float, default=3.0, help="of the latency")
    parser.add_argument("--steps", type=int, default=2000, help="of the unpruned network")
    parser.add_argument("--pruning-steps", type=int, default=1500)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads[0])
    steps, more = (40, 160) if options.quick else (options.steps, options.pruning_steps)
    results = Results("allocation", report)
    for name in options.networks:
        for seed in options.seeds:
            seed_everything(seed, verbose=False)
            data = data_for(name, DATA)
            dense = CLASSIFIERS[name](steps)
            trainer_of(steps).fit(dense, data)
            before = accuracy(dense, data)
            planner = planner_of(dense, data, options.threads[0])
            solved = planner.solve(Target("latency", "speedup", options.speedup))
            assert solved.ms is not None
            for which, plan in ("solved", solved), ("uniform", uniform_plan(planner, solved.ms)):
                begin = time.perf_counter()
                seed_everything(seed, verbose=False)
                net = CLASSIFIERS[name](more)
                net.load_state_dict(copy.deepcopy(dense.state_dict()))
                pruning = SPPCallback(
                    prune_ratio=plan.ratios, interval=max(more // 200, 1), seed=seed
                )
                trainer_of(more, pruning).fit(net, data_for(name, DATA))
                assert pruning.pruner is not None and pruning.pruner.finished
                ms = planner.bench.ms(planner.bench.compacted(net.eval()))
                row: Row = {
                    "name": f"{name} {which} seed {seed}",
                    "context": context(
                        "lightning",
                        data=data_of(DATA),
                        steps=f"{steps} unpruned, {more} with SPP",
                        threads=options.threads[0],
                    ),
                    "network": name,
                    "seed": seed,
                    "which": which,
                    "baseline": before,
                    "accuracy": accuracy(net, data),
                    "latency_speedup": planner.bench.dense_ms / ms,
                    "macs_speedup": plan.dense_macs / plan.macs,
                    "ratios": plan.ratios,
                    "seconds": time.perf_counter() - begin,
                }
                print(report([row]).splitlines()[-1], flush=True)
                if options.save:
                    results.add(row)


if __name__ == "__main__":
    main()
