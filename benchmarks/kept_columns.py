"""Time of a whole SPP run on kept columns over that of a dense run of as many steps, on a CPU.

    python benchmarks/kept_columns.py --threads 1 2 --save

A run of the paper's schedule has 70,000 steps; nobody waits for it here. Steps are timed in turns:
a dense network's without pruning, and those of an SPP run at several points of its pruning and
after it. p follows the rule on weights that don't move. A run's time is extrapolated from that:
the steps of pruning, as many as the rule takes updates, 180 steps apart, at the mean of the points;
the rest at the time of fixed masks. The unpruned network is timed in torch's two memory formats,
and the faster one counts. Updates of p are timed alone and added.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from harness.arguments import each_thread_count, make_parser, quiet
from harness.context import context
from harness.results import Results, Row, markdown_table
from harness.rounds import in_turns, keep_freed_memory, ratio, turn_ms
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spp_lightning import ConvNet, SPPPruner, kept_columns

STEPS, INTERVAL = 70_000, 180  # of a run; between two updates of p
DENSE = ("dense", "dense, channels-last")
FIXED = "masks fixed"


def resnet18() -> nn.Module:
    """ResNet-18 for 32×32 images: the first convolution is 3×3, and nothing shrinks them."""
    net = torchvision.models.resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()  # type: ignore[assignment]
    return net


# Network, batch, and by speedup the share of a dense run's time that an SPP run may take.
Workload = tuple[Callable[[], nn.Module], int, dict[int, float]]
WORKLOADS: dict[str, Workload] = {
    "ConvNet, batch 100": (lambda: ConvNet(channels_last=False), 100, {4: 0.60, 10: 0.45}),
    "ResNet-18, batch 64": (resnet18, 64, {4: 0.70}),
}


def step_of(net: nn.Module, batch: tuple[Tensor, Tensor], pruner: SPPPruner | None) -> Any:
    """A training step of a network, which draws its mask first if it is pruned."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-6, momentum=0.9, weight_decay=1e-4)
    count = iter(range(10**9))

    def step() -> None:
        if pruner is not None:
            pruner.sample(next(count))
        cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dense_steps(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The unpruned network's steps, in both memory formats."""
    steps = {}
    for name, form in zip(DENSE, (torch.contiguous_format, torch.channels_last), strict=True):
        twin = copy.deepcopy(net).to(memory_format=form)  # type: ignore[call-overload]
        if isinstance(twin, ConvNet):
            twin.channels_last = form == torch.channels_last
        steps[name] = step_of(twin, (batch[0].contiguous(memory_format=form), batch[1]), None)
    return steps


def measure(name: str, speedup: int, points: int, rounds: int) -> Row:
    """Step times in turns, and what a whole run takes by them.

    Args:
        name: One of WORKLOADS.
        speedup: The target.
        points: How many points of pruning are timed.
        rounds: How many rounds.
    """
    make, size, targets = WORKLOADS[name]
    torch.manual_seed(0)
    net = make().train()
    batch = torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))
    calls = dense_steps(net, batch)
    updates = SPPPruner(copy.deepcopy(net), speedup=speedup).expected_updates
    kept: dict[str, float] = {}
    for i in range(points + 1):
        twin = copy.deepcopy(net)
        pruner = SPPPruner(twin, speedup=speedup)
        pruner.compute_with(kept_columns())
        done = round(updates * (i + 0.5) / points)  # the middle of a part of the pruning
        while not pruner.finished and (i == points or pruner.num_updates < done):
            pruner.update()
        point = FIXED if i == points else f"{done} of {updates} updates"
        kept[point] = 1 - statistics.mean(pruner.sparsity.values())
        calls[point] = step_of(twin, batch, pruner)
    update_ms = turn_ms(SPPPruner(copy.deepcopy(net), speedup=speedup).update, 5)
    times = in_turns(calls, rounds)
    pruning = [point for point in kept if point != FIXED]
    dense = min((times[format] for format in DENSE), key=statistics.median)
    steps = min(STEPS, updates * INTERVAL)
    mean = [statistics.mean(each) for each in zip(*(times[x] for x in pruning), strict=True)]
    whole = [
        (steps * a + (STEPS - steps) * b + updates * update_ms) / STEPS
        for a, b in zip(mean, times[FIXED], strict=True)
    ]
    shares = {"pruning": ratio(mean, dense), FIXED: ratio(times[FIXED], dense)}
    shares["whole run"] = ratio(whole, dense)
    return {
        "name": f"{name}, {speedup}×",
        "updates": updates,
        "update_ms": update_ms,
        "step_ms": {x: statistics.median(values) for x, values in times.items()},
        "ratio_quartiles": shares,
        "target": targets[speedup],
        "passes": shares["whole run"][1] <= targets[speedup],
        "rounds": rounds,
    }


def report(rows: list[Row]) -> str:
    """All rows as Markdown."""

    def share(quartiles: list[float]) -> str:
        low, middle, high = quartiles
        return f"{middle:.2f} ({low:.2f} … {high:.2f})"

    table, steps = [], []
    for row in rows:
        quartiles, times = row["ratio_quartiles"], row["step_ms"]
        dense = min(times[form] for form in DENSE)
        table.append(
            [
                *(row["name"], row["threads"], f"{dense:.0f} ms", f"{times[FIXED]:.0f} ms"),
                *(share(quartiles[part]) for part in ("pruning", FIXED, "whole run")),
                f"≤ {row['target']:.2f}: {'PASS' if row['passes'] else 'MISS'}",
            ]
        )
        each = ", ".join(f"{point} {ms:.1f} ms" for point, ms in times.items())
        steps.append(
            f"{row['name']}, threads {row['threads']}: {each}; an update {row['update_ms']:.1f} ms."
        )
    head = ["network", "threads", "dense step", "step, masks fixed"]
    head += ["pruning / dense", "masks fixed / dense", "whole run / dense", "target"]
    return "\n\n".join(
        [
            "Time of training on kept columns over dense training, float32: medians over rounds"
            " (quartiles). A whole run of 70,000 steps is extrapolated from step times, with the"
            " updates that the rule takes, 180 steps apart; it was not run.",
            markdown_table(head, table),
            *steps,
        ]
    )


def main() -> None:
    """Measure, print, and save if asked to."""
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--networks", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--points", type=int, default=5, help="of pruning that are timed")
    options = parser.parse_args()
    quiet()
    keep_freed_memory()
    about = context("torchvision", "lightning")
    results = Results("kept_columns", report)
    rows = []
    for threads in each_thread_count(options):
        for name in options.networks:
            for speedup in WORKLOADS[name][2]:
                row = measure(name, speedup, options.points, options.rounds)
                rows.append(row | {"threads": threads, "context": about})
                print(report(rows[-1:]), flush=True)
                if options.save:
                    results.add(rows[-1])
    print(report(rows))


if __name__ == "__main__":
    main()
