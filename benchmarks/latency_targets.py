"""Whether networks end within 3 % of the latency that they were asked for.

    python benchmarks/latency_targets.py --threads 1 --save

Asks for a half and a third of the latency of torchvision's networks, with random weights and one
224×224 image. ``plan`` solves the ratios, SPP prunes the network to them (without training: its
columns go by the norms of the random weights), ``compact`` makes the result fast, and its latency
is measured anew, in turns with the unpruned network. A row holds what was reached, or the error
that says what can be.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
import torchvision
from harness.arguments import each_thread_count, make_parser, quiet
from harness.context import context
from harness.results import Results, Row, markdown_table
from torch import nn

from spp_lightning import SPPPruner
from spp_lightning.planning.latency import Bench
from spp_lightning.planning.solve import Planner
from spp_lightning.planning.target import TargetSettings

NETWORKS = ("resnet18", "mobilenet_v3_large", "efficientnet_b0", "densenet121")
SPEEDUPS = (2.0, 3.0)


def pruned(net: nn.Module, ratios: dict[str, float]) -> nn.Module:
    """A copy that SPP has pruned to the ratios, without training."""
    net = copy.deepcopy(net)
    pruner = SPPPruner(net, prune_ratio=ratios, interval=1, A=1.0)
    step = 0
    while not pruner.finished:
        pruner.step(step)
        step += 1
    pruner.fold()
    return net


def row_of(name: str, planner: Planner, net: nn.Module, speedup: float, rounds: int) -> Row:
    """One target of a network: asked, expected, reached."""
    target = TargetSettings(speedup=speedup, of="latency").target
    row: Row = {"name": f"{name} / {speedup:g}", "threads": torch.get_num_threads()}
    row["context"] = context("torchvision", weights="random, seed 0", image="1×3×224×224")
    begin = time.perf_counter()
    try:
        plan = planner.solve(target)
    except ValueError as error:
        return row | {"error": str(error)}
    finally:
        row["seconds"] = time.perf_counter() - begin
    compacted = planner.bench.compacted(pruned(net, plan.ratios))
    measured = []
    for _ in range(rounds):
        bench = Bench(net, planner.inputs)
        measured.append(bench.dense_ms / bench.ms(compacted))
    assert plan.dense_ms is not None and plan.ms is not None
    reached = statistics.median(measured)
    return row | {
        "dense_ms": plan.dense_ms,
        "expected": plan.dense_ms / plan.ms,
        "reached": reached,
        "deviation": speedup / reached - 1,
        "spread": [min(measured), max(measured)],
        "macs_speedup": plan.dense_macs / plan.macs,
    }


def report(rows: list[Row]) -> str:
    """The Markdown of the rows."""
    cells = []
    for row in rows:
        first = [row["name"], row["threads"]]
        if "error" in row:
            cells.append([*first, "", "", "", "", row["error"]])
            continue
        first += [f"{row['dense_ms']:.2f}", f"{row['expected']:.3f}"]
        reached = f"{row['reached']:.3f} ({row['spread'][0]:.3f} to {row['spread'][1]:.3f})"
        cells.append([*first, reached, f"{row['macs_speedup']:.2f}", f"{row['deviation']:+.1%}"])
    head = ["network / asked", "threads", "dense ms", "expected", "reached", "fewer MACs"]
    text = "How many times as fast as the unpruned compact network; deviation of the latency.\n\n"
    return text + markdown_table([*head, "deviation"], cells)


def main() -> None:
    """Measure every network and speedup."""
    parser = make_parser(__doc__, rounds=5, quick_rounds=2, threads=[1])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS)
    options = parser.parse_args()
    quiet()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    results = Results("latency_targets", report)
    for _ in each_thread_count(options):
        for name in options.only:
            torch.manual_seed(0)
            make: Any = getattr(torchvision.models, name)
            net = make().eval()
            planner = Planner(net, (x,), TargetSettings())
            for speedup in SPEEDUPS:
                row = row_of(name, planner, net, speedup, options.rounds)
                print(report([row]).splitlines()[-1], flush=True)
                if options.save:
                    results.add(row)


if __name__ == "__main__":
    main()
