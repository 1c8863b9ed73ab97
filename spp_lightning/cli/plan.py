"""``spp-lightning plan``: what pruning would bring, without training."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from torch import nn

from spp_lightning.cli.networks import default_shape, find, load, made
from spp_lightning.cli.options import as_json_option, input_shape_option
from spp_lightning.planning.overview import overview
from spp_lightning.planning.solve import Planner
from spp_lightning.planning.target import TargetSettings

__all__ = ["plan_command"]

_LEAST_IMAGES = 8  # on which a loss is computed


@click.command("plan")
@click.argument("model_name", metavar="MODEL")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of the network: a checkpoint of Lightning or a state dict. Default: new ones.",
)
@input_shape_option()
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images.")
@click.option("--speedup", type=float, help="Target: a factor; see --of. Default: 2.")
@click.option(
    "--of",
    type=click.Choice(["layers", "network", "latency"]),
    default="network",
    show_default=True,
    help="Of what --speedup is a factor: MACs of every layer, of the network, or its latency.",
)
@click.option("--macs", type=float, help="Target: MACs of the network for one image.")
@click.option("--latency-ms", type=float, help="Target: milliseconds of the network for the batch.")
@click.option("--layers", multiple=True, metavar="PATTERN", help="Layers to prune; repeatable.")
@click.option(
    "--data",
    metavar="MODULE:NAME",
    help="What makes a LightningDataModule or a loader of images and labels, for the loss.",
)
@click.option("--threads", type=click.IntRange(1), help="Number of threads to compute with.")
@click.option("--device", help="Device to measure on, such as cpu or cuda.")
@as_json_option
def plan_command(
    model_name: str,
    checkpoint: Path | None,
    input_shape: tuple[int, ...] | None,
    batch: int,
    speedup: float | None,
    of: str,
    macs: float | None,
    latency_ms: float | None,
    layers: tuple[str, ...],
    data: str | None,
    threads: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Tell what pruning would bring MODEL, without training it.

    MODEL is MODULE:CLASS such as torchvision.models:resnet18, the network's class or a function
    that makes it. A table tells of each layer its MACs, its time, what pruning it costs, and the
    ratio that reaches the target; a second one the latency for several speedups. With --data the
    cost is the rise of the loss without the layer's least important columns, else an estimate by
    the weights.

    Exits with 1 if the target can't be reached; the error says what can.
    """
    model = made(model_name) if checkpoint is None else load(checkpoint, model_name)
    shape = input_shape or default_shape(model)
    example = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    if speedup is None and macs is None and latency_ms is None:
        speedup = 2.0
    try:
        settings = TargetSettings(
            speedup=speedup,
            of=of if speedup is not None else "layers",  # type: ignore[arg-type]
            macs=macs,
            latency_ms=latency_ms,
            layers=list(layers) or None,
            threads=threads,
            device=device,
        )
        planner = Planner(model, (example,), settings)
        if data is not None:
            planner.loss = _loss(model, data, planner)
        with _progress():
            found = overview(planner, settings.target)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({"model": model_name, **found.as_dict()}, indent=2) if as_json else found)


@contextmanager
def _progress() -> Iterator[None]:
    """What is being measured, on the standard error."""
    log, handler = logging.getLogger("spp_lightning.planning"), logging.StreamHandler(sys.stderr)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _loss(model: nn.Module, data: str, planner: Planner) -> Callable[[nn.Module], float]:
    """The loss on the first two batches: of a module's training_step, else the cross-entropy."""
    from lightning.pytorch import LightningDataModule, LightningModule

    from spp_lightning.training.losses import MOST_MACS, label_loss, step_loss

    made = loader = find(data, "--data")()
    if isinstance(made, LightningDataModule):
        made.prepare_data()
        made.setup("fit")
        loader = made.train_dataloader()
    try:
        batches = list(itertools.islice(loader, 2))
    except TypeError as error:
        raise click.ClickException(
            f"--data (={data}) must make a LightningDataModule or batches, got {type(loader)}."
        ) from error
    if isinstance(made, LightningDataModule):  # what a Trainer would do to a batch
        batches = [made.on_before_batch_transfer(batch, 0) for batch in batches]
        batches = [made.on_after_batch_transfer(batch, 0) for batch in batches]
    images = int(MOST_MACS["cpu"] / planner.loss_macs)
    make = step_loss if isinstance(model, LightningModule) else label_loss
    loss = make(batches, max(images, _LEAST_IMAGES))
    try:
        loss(copy.deepcopy(model).eval())
    except Exception as error:  # whatever a network raises for batches that don't fit
        raise click.ClickException(
            f"--data (={data}) must make batches that the network has a loss for, but it fails:"
            f" {error}"
        ) from error
    return loss
