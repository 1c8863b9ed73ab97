"""Whether batch norm statistics are worth re-estimating after pruning: ResNet-20 on CIFAR-10.

    python benchmarks/recalibration.py --save

Takes the networks that ``alternatives.py`` has trained and estimates the statistics anew over ten
batches of training images by ``torch.optim.swa_utils.update_bn``: of images that are cropped and
flipped as in training, and of whole ones. Counts the test images that are classified right.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from allocation import accuracy
from alternatives import DATA, LENGTHS
from harness.arguments import make_parser, quiet
from harness.classifiers import data_for
from harness.contenders import CONTENDERS, train
from harness.context import ROOT, context, data_of
from harness.results import Results, Row, markdown_table
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from spp_lightning.data.pixels import augment

RUNS = ROOT / "runs" / "alternatives"
BATCHES = 10  # of 128 images


def report(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = ["network", "accuracy", "statistics of images as in training", "of whole images"]
    cells = []
    for row in rows:
        before = row["accuracies"]["before"]
        after = [row["accuracies"][which] for which in ("as in training", "whole")]
        gains = [f"{each:.2%} ({100 * (each - before):+.2f} points)" for each in after]
        cells.append((row["name"], f"{before:.2%}", *gains))
    return markdown_table(head, cells)


def recalibrated(net: nn.Module, data: Any, cropped: bool, seed: int) -> nn.Module:
    """A copy with statistics of some training images."""
    generator = torch.Generator().manual_seed(seed)

    def images() -> Any:
        data.setup("fit")
        for batch, labels in itertools.islice(data.train_dataloader(), BATCHES):
            drawn: Tensor = augment(batch, True, 4, generator) if cropped else batch
            yield data.on_after_batch_transfer((drawn, labels), 0)

    again = copy.deepcopy(net)
    update_bn(images(), again)
    return again


def main() -> None:
    """Measure every network that is there."""
    parser = make_parser(__doc__, rounds=2, quick_rounds=2, threads=[1])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads[0])
    data = data_for("resnet20", DATA)
    rows: list[Row] = []
    for contender in CONTENDERS:
        if not (RUNS / f"{contender} seed={options.seed}" / "final.pt").is_file():
            continue
        net = train(contender, options.seed, LENGTHS, RUNS, DATA)
        accuracies = {"before": accuracy(net, data)}
        for which in ("as in training", "whole"):
            again = recalibrated(net, data, which == "as in training", options.seed)
            accuracies[which] = accuracy(again, data)
        depends_on = context("lightning", data=data_of(DATA), seed=options.seed)
        rows.append({"name": str(contender), "accuracies": accuracies, "context": depends_on})
    print(report(rows))
    if options.save:
        Results("recalibration", report).replace(rows)


if __name__ == "__main__":
    main()
