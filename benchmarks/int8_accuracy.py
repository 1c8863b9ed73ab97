"""What int8 costs in accuracy: pruned and unpruned networks on CIFAR-10.

    python benchmarks/int8_accuracy.py --save

Trains a network for a short while, then prunes it 4× by SPP, in so many more steps. Both, the
unpruned and the pruned one, are made compact and quantised after 512 training images.
"""

from __future__ import annotations

import copy
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from allocation import accuracy, trainer_of
from harness.arguments import make_parser, quiet
from harness.classifiers import CLASSIFIERS, data_for
from harness.context import ROOT, context, data_of
from harness.results import Results, Row, markdown_table
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn

from spp_lightning import SPPCallback, compact, count_macs, quantize_compact, quantize_report
from spp_lightning.compaction.quantize.ranges import METHODS

DATA = ROOT / "data" / "cifar10"
RATIO = 0.75
IMAGES = 512  # for the ranges
STEPS = {"convnet": 1500, "resnet20": 700}  # unpruned, and as many with SPP


def trained(name: str, seed: int, steps: int, folder: Path | None) -> dict[str, LightningModule]:
    """A network, unpruned and pruned; read from a folder where an earlier run has left it."""
    nets = {which: CLASSIFIERS[name](steps) for which in ("unpruned", "pruned 4×")}
    files = {which: (folder or Path()) / f"{name}-{seed}-{steps}-{which[0]}.pt" for which in nets}
    if folder is not None and all(file.is_file() for file in files.values()):
        for which, net in nets.items():
            net.load_state_dict(torch.load(files[which], weights_only=True))
        return nets
    dense, pruned = nets.values()
    seed_everything(seed, verbose=False)
    trainer_of(steps).fit(dense, data_for(name, DATA))
    pruned.load_state_dict(copy.deepcopy(dense.state_dict()))
    pruning = SPPCallback(prune_ratio=RATIO, interval=max(steps // 200, 1), seed=seed)
    trainer_of(steps, pruning).fit(pruned, data_for(name, DATA))
    assert pruning.pruner is not None and pruning.pruner.finished
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for which, net in nets.items():
            torch.save(net.state_dict(), files[which])
    return nets


def calibration(data: Any) -> list[Tensor]:
    """Training images, in batches."""
    data.setup("fit")
    found: list[Tensor] = []
    for batch in data.train_dataloader():
        found.append(data.on_after_batch_transfer(batch, 0)[0])
        if sum(map(len, found)) >= IMAGES:
            break
    return [torch.cat(found)[:IMAGES]]


def report(rows: list[Row]) -> str:
    """The Markdown of the rows."""
    head = ["network", "columns", "fewer MACs", "float32"]
    head += [f"int8, {method}" for method in METHODS]
    head += ["points lost (mse)", "error of the output (mse)"]
    cells = [
        [
            *(row["network"], row["which"], f"{row['macs_speedup']:.2f}", f"{row['float32']:.2%}"),
            *(f"{row['int8'][method]:.2%}" for method in METHODS),
            f"{100 * (row['float32'] - row['int8']['mse']):.2f}",
            f"{row['error']:.3f}",
        ]
        for row in rows
    ]
    return markdown_table(head, cells)


def measured(net: nn.Module, data: Any) -> dict[str, Any]:
    """Accuracy in float32 and in int8, for each way to choose the scales."""
    images = calibration(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the unpruned network stays dense
        fast = compact(net.eval(), images[0][:1])
    found: dict[str, Any] = {"float32": accuracy(fast, data), "int8": {}}
    for method in METHODS:
        quantized = quantize_compact(fast, images, method=method)
        found["int8"][method] = accuracy(quantized, data)
        if method == "mse":
            found["error"] = quantize_report(fast, quantized, images).error
    return found


def main() -> None:
    """Train, prune, quantise, compare."""
    parser = make_parser(__doc__, rounds=2, quick_rounds=2, threads=[1])
    parser.add_argument("--networks", nargs="+", choices=CLASSIFIERS, default=list(CLASSIFIERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="unpruned, and as many with SPP")
    parser.add_argument("--weights", type=Path, help="folder for trained networks, read if there")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads[0])
    results = Results("int8_accuracy", report)
    for name in options.networks:
        steps = options.steps or (100 if options.quick else STEPS[name])
        begin = time.perf_counter()
        nets = trained(name, options.seed, steps, options.weights)
        seconds = time.perf_counter() - begin
        dense_macs = None
        for which, net in nets.items():
            macs = sum(count_macs(net.eval(), torch.zeros(1, 3, 32, 32)).values())
            dense_macs = dense_macs or macs
            row: Row = {
                "name": f"{name} {which} seed {options.seed}",
                "context": context(
                    "lightning",
                    data=data_of(DATA),
                    steps=f"{steps} unpruned, {steps} with SPP",
                    seed=options.seed,
                    threads=options.threads[0],
                ),
                "network": name,
                "which": which,
                "macs_speedup": dense_macs / macs,
                **measured(net, data_for(name, DATA)),
                "training_seconds": seconds,
            }
            print(report([row]).splitlines()[-1], flush=True)
            if options.save:
                results.add(row)


if __name__ == "__main__":
    main()
