"""One checkout's side of ``versus.py``: builds a row's call and times it when it is asked to.

    PYTHONPATH=CHECKOUT python benchmarks/versus_worker.py

Reads requests from standard input and answers on standard output, a line of JSON each. Uses public
names of ``spp_lightning`` alone, because the checkout may be an older one.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness.rounds import keep_freed_memory, now, repeats_of, turn_ms
from harness.workloads import LAYERS, POINTWISE, layer, network, prune_randomly
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import spp_lightning
from spp_lightning import ColumnConv2d, ConvNet, SPPCallback, SPPPruner, compact

BATCHES = {"ConvNet": (16, 3, 32, 32), "ResNet-18": (4, 3, 64, 64)}  # of training
INTERVAL = 180  # steps between two updates, the paper's
FIT_STEPS, WARM_UP = 20, 4  # of a turn in a Trainer
TURN = 0.01  # seconds of a turn, at least
LONG = 50  # milliseconds of a call, from which on caches needn't be warmed for it

Turn = Callable[[int], float]  # milliseconds of a call, of so many


class Row:
    """What a row times: the turns of a call, how many calls a turn has, and what it computes."""

    def __init__(self, turn: Turn, repeats: int, output: Tensor) -> None:
        self.turn = turn
        self.repeats = repeats
        self.output = output

    @classmethod
    def of(cls, call: Callable[[], Any], output: Tensor) -> Row:
        """A row that times calls."""
        untimed = int(turn_ms(call, 1) < LONG)
        return cls(lambda repeats: turn_ms(call, repeats, untimed), repeats_of(call, TURN), output)


def layer_row(number: int, batch: int, ratio: float) -> Row:
    """A compact layer."""
    _, conv, x = layer((*LAYERS, *POINTWISE)[number], batch)
    return inference(ColumnConv2d.of(prune_randomly(conv, ratio)), x)  # type: ignore[arg-type]


def network_row(name: str, ratio: float) -> Row:
    """A compact network."""
    net, x = network(name)
    pruned = prune_randomly(net, ratio).eval().requires_grad_(False)
    return inference(compact(pruned, x), x)


def inference(fast: nn.Module, x: Tensor) -> Row:
    """Calls of a network without gradients."""
    fast.eval().requires_grad_(False)
    return Row.of(lambda: fast(x), fast(x))


def in_training(name: str) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    """A network, its optimizer, and a batch of images and labels."""
    if name == "ConvNet":
        torch.manual_seed(0)
        net: nn.Module = ConvNet()
    else:
        net = network(f"{name}, batch 1")[0]
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4)
    shape = BATCHES[name]
    return net.train(), optimizer, torch.randn(shape), torch.randint(10, shape[:1])


def step_row(name: str) -> Row:
    """A training step with SPP in the middle of pruning, between two updates."""
    net, optimizer, images, labels = in_training(name)
    draw_masks = between_updates(halfway(net, optimizer), optimizer)

    def step() -> Tensor:
        draw_masks()
        loss = cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Row.of(step, step())


def pruner_row(name: str) -> Row:
    """What SPP adds to a step between two updates: drawing and applying the masks."""
    net, optimizer, *_ = in_training(name)
    pruner = halfway(net, optimizer)
    return Row.of(between_updates(pruner, optimizer), probabilities(pruner))


def update_row(name: str) -> Row:
    """An update of the pruning probabilities, the same ones in every turn."""
    net, optimizer, *_ = in_training(name)
    pruner = halfway(net, optimizer)
    state = copy.deepcopy(pruner.state_dict())

    def turn(repeats: int) -> float:
        pruner.load_state_dict(copy.deepcopy(state))
        return turn_ms(lambda: pruner.update(optimizer), repeats)

    return Row(turn, 5, probabilities(pruner))


def halfway(net: nn.Module, optimizer: torch.optim.Optimizer) -> SPPPruner:
    """A pruner in the middle of pruning."""
    pruner = SPPPruner(net, prune_ratio=0.75, interval=INTERVAL)
    for _ in range(pruner.expected_updates // 2):
        pruner.update(optimizer)
    return pruner


def between_updates(pruner: SPPPruner, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """The pruner's step, at which an update is never due."""
    steps = itertools.cycle(range(1, INTERVAL))
    return lambda: pruner.step(next(steps), optimizer)


def probabilities(pruner: SPPPruner) -> Tensor:
    """All pruning probabilities, one after the other."""
    return torch.cat([p.flatten().float() for p in pruner.probability.values()])


class Batches:
    """The same batch again and again; notes how long a step took."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.batch = batch
        self.step_ms = 0.0

    def __len__(self) -> int:
        return FIT_STEPS + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0.0
        for step in range(FIT_STEPS + 1):
            if step == WARM_UP:
                start = now()
            if step == FIT_STEPS:
                self.step_ms = 1000 * (now() - start) / (FIT_STEPS - WARM_UP)
            yield self.batch


class Trained(LightningModule):
    """A network as a LightningModule that does nothing but train."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return self.optimizer


def fit_row(name: str) -> Row:
    """A step of Lightning's Trainer with SPPCallback."""

    def turn(repeats: int = 1) -> float:
        net, optimizer, images, labels = in_training(name)
        batches = Batches((images, labels))
        trainer = Trainer(  # type: ignore[misc]
            barebones=True,
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            callbacks=[SPPCallback(prune_ratio=0.75, interval=INTERVAL)],
        )
        trainer.fit(Trained(net, optimizer), batches)
        return batches.step_ms

    turn()  # imports what is only imported in a fit
    return Row(turn, 1, torch.zeros(1))


ROWS: dict[str, Callable[..., Row]] = {
    "layer": layer_row,
    "network": network_row,
    "step": step_row,
    "pruner": pruner_row,
    "update": update_row,
    "fit": fit_row,
}


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print must not come between the answers
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keep_freed_memory()

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    answer(package=str(Path(spp_lightning.__file__).parent))
    row, trains = None, False
    for line in sys.stdin:
        request = json.loads(line)
        if "turn" in request:
            assert row is not None
            with torch.set_grad_enabled(trains):
                answer(ms=row.turn(request["turn"]))
            continue
        row = None  # frees the memory of the last one first
        torch.set_num_threads(request["threads"])
        trains = request["kind"] not in ("layer", "network")
        with torch.set_grad_enabled(trains):
            row = ROWS[request["kind"]](*request["arguments"])
        sample = row.output.detach().flatten()[:: max(1, row.output.numel() // 64)]
        answer(repeats=row.repeats, sample=sample.tolist())


if __name__ == "__main__":
    main()
