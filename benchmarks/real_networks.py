"""Networks that the callback pruned, through compact, file, a fresh process, and back to dense.

    python benchmarks/real_networks.py --save

Trains and prunes a ConvNet and a ResNet-18 on CIFAR-10 for some minutes (their accuracy is no
matter here), and compares the predicted classes of all test images: the pruned network's, those
of its compact file loaded by a process that doesn't know its class, and those of the file turned
back into a dense network. Exits with 1 if any differ. ``--checkpoint`` takes a ConvNet that was
pruned before, such as that of ``benchmarks/cifar10.py``.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from harness.context import ROOT, context, data_of
from harness.results import Results, Row, markdown_table
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning import (
    CIFAR10DataModule,
    ConvNet,
    SPPCallback,
    compact,
    count_macs,
    load_compact,
    save_compact,
    to_dense,
)

DATA = ROOT / "data" / "cifar10"
Normalize = Literal["mean_image", "mean_std"]


class ResNet18(LightningModule):
    """torchvision's ResNet-18 for ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, ``(B, 10)``."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:  # noqa: D102
        return torch.optim.SGD(self.parameters(), 0.02, 0.9, weight_decay=5e-4)


def pruned(net: LightningModule, normalize: Normalize, steps: int) -> LightningModule:
    """A network trained from scratch while it is pruned 4×, and then on."""
    data = CIFAR10DataModule(DATA, normalize=normalize)
    pruning = SPPCallback(prune_ratio=0.75, interval=2, A=0.1)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_epochs": -1}
    options |= {"enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=steps, callbacks=[pruning], **options)
    trainer.fit(net, data)
    assert pruning.pruner is not None
    assert pruning.pruner.finished, "too few steps"
    return net.eval()


def predictions(net: nn.Module, data: CIFAR10DataModule) -> Tensor:
    """Predicted class of every test image, ``(10000,)``."""
    data.setup("test")
    found = []
    with torch.no_grad():
        for batch in data.test_dataloader():
            images, _ = data.on_after_batch_transfer(batch, 0)
            found.append(net(images).argmax(1))
    return torch.cat(found)


def labels(data: CIFAR10DataModule) -> Tensor:
    """The true classes, ``(10000,)``."""
    return torch.cat([batch[1] for batch in data.test_dataloader()])


def round_trip(name: str, net: nn.Module, normalize: Normalize) -> Row:
    """One row: how many predictions differ, and how large network and file are."""
    data = CIFAR10DataModule(DATA, batch_size=500, normalize=normalize)
    data.prepare_data()
    example = torch.zeros(1, 3, 32, 32)
    expected = predictions(net, data)
    with tempfile.TemporaryDirectory() as folder:
        file, dense, out = (Path(folder, x) for x in ("net.spp", "net.pt", "classes.pt"))
        save_compact(compact(net, example), file)
        torch.save(net.state_dict(), dense)
        command = [sys.executable, __file__, "--predict", str(file), str(out), normalize]
        subprocess.run(command, check=True)
        fresh = torch.load(out, weights_only=True)
        loaded = load_compact(file)
        back = predictions(to_dense(loaded), data)
        sizes = dense.stat().st_size, file.stat().st_size
    before = count_macs(_unpruned(net), example)
    return {
        "name": name,
        "macs": [sum(before.values()), sum(count_macs(loaded, example).values())],
        "bytes": sizes,
        "accuracy_percent": 100 * float((expected == labels(data)).float().mean()),
        "pictures": len(expected),
        "different_from_file": int((fresh != expected).sum()),
        "different_back_to_dense": int((back != expected).sum()),
    }


def _unpruned(net: nn.Module) -> nn.Module:
    full = copy.deepcopy(net)
    with torch.no_grad():
        for layer in full.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.fill_(1)
    return full


def report(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = ["network", "test accuracy", "MACs", "file, bytes"]
    table = []
    for row in rows:
        macs, sizes = row["macs"], row["bytes"]
        different = f"{row['different_from_file']}, {row['different_back_to_dense']}"
        table.append(
            [
                row["name"],
                f"{row['accuracy_percent']:.2f} %",
                f"{macs[0]:,} → {macs[1]:,} ({macs[0] / macs[1]:.2f}×)",
                f"{sizes[0]:,} → {sizes[1]:,} ({sizes[1] / sizes[0]:.1%})",
                f"{different} of {row['pictures']:,}",
            ]
        )
    return markdown_table([*head, "other predictions: file, back to dense"], table)


def main() -> int:
    """Measure both networks, print, and save if asked to; 1 if a prediction differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a pruned ConvNet's")
    parser.add_argument("--convnet-steps", type=int, default=1500, help="of training the ConvNet")
    parser.add_argument("--resnet-steps", type=int, default=120, help="of training the ResNet-18")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--predict", nargs=3, metavar=("FILE", "OUT", "NORMALIZE"))
    options = parser.parse_args()
    if options.predict:
        file, out, normalize = options.predict
        data = CIFAR10DataModule(DATA, batch_size=500, normalize=normalize)
        torch.save(predictions(load_compact(file), data), out)
        return 0
    seed_everything(0, verbose=False)
    if options.checkpoint is not None:
        convnet: LightningModule = ConvNet(weights=options.checkpoint).eval()
    else:
        convnet = pruned(ConvNet(), "mean_image", options.convnet_steps)
    resnet = ResNet18()
    pruned(resnet, "mean_std", options.resnet_steps)
    rows = [
        round_trip("ConvNet, 4×", convnet, "mean_image"),
        round_trip("ResNet-18, 4×", resnet.net, "mean_std"),
    ]
    threads = torch.get_num_threads()
    about = context("torchvision", "lightning", data=data_of(DATA), seed=0, threads=threads)
    rows = [row | {"context": about} for row in rows]
    print(report(rows))
    if options.save:
        Results("real_networks", report).replace(rows)
    return int(any(x["different_from_file"] or x["different_back_to_dense"] for x in rows))


if __name__ == "__main__":
    sys.exit(main())
