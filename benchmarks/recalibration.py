"""Whether batch norm statistics are worth re-estimating after pruning: ResNet-20 on CIFAR-10.

    python benchmarks/recalibration.py --save

Takes the networks that ``alternatives.py`` has trained, estimates the statistics anew over ten
batches of training images by ``torch.optim.swa_utils.update_bn``, and counts the test images that
are classified right before and after.
"""

from __future__ import annotations

import itertools

import torch
from allocation import accuracy
from alternatives import DATA, LENGTHS
from harness.arguments import make_parser, quiet
from harness.classifiers import data_for
from harness.contenders import CONTENDERS, train
from harness.context import ROOT, context, data_of
from harness.results import Results, Row, markdown_table
from lightning.pytorch import seed_everything
from torch.optim.swa_utils import update_bn

RUNS = ROOT / "runs" / "alternatives"
BATCHES = 10  # of 128 images


def report(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = ["network", "accuracy", f"after {BATCHES} batches", "points gained"]
    cells = [
        (row["name"], f"{before:.2%}", f"{after:.2%}", f"{100 * (after - before):+.2f}")
        for row in rows
        for before, after in [row["accuracies"]]
    ]
    return markdown_table(head, cells)


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
        before = accuracy(net, data)
        seed_everything(options.seed, verbose=False)
        data.setup("fit")
        batches = itertools.islice(data.train_dataloader(), BATCHES)
        update_bn((data.on_after_batch_transfer(batch, 0) for batch in batches), net)
        depends_on = context("lightning", data=data_of(DATA), seed=options.seed)
        accuracies = [before, accuracy(net, data)]
        rows.append({"name": str(contender), "accuracies": accuracies, "context": depends_on})
    print(report(rows))
    if options.save:
        Results("recalibration", report).replace(rows)


if __name__ == "__main__":
    main()
