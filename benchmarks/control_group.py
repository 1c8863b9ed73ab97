"""The same script with Lightning's own ModelPruning and with SPPCallback: what holds, what doesn't.

    python benchmarks/control_group.py

Trains the ConvNet on scikit-learn's digits without a callback, with ``ModelPruning`` (L1 norms of
input channels, with and without ``make_pruning_permanent``) and with ``SPPCallback``, and checks
what one expects of a callback in a longer project: resuming, checkpoints, ranks, copies, errors,
``torch.compile``. Every cell is an experiment with its number. CPU only, a minute or two.
``--save`` writes ``benchmarks/results/control_group.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness.arguments import quiet
from harness.context import context
from harness.results import Results, Row, markdown_table
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor

from spp_lightning import ConvNet, DigitsDataModule, SPPCallback, launcher_options

LAYERS = ("conv1", "conv2", "conv3")
DATA: dict[str, Any] = {"batch_size": 25, "test_size": 0.9}  # 8 batches an epoch
EPOCHS, CRASH = 5, 3  # epochs of a run, and after which of them it is resumed
# SPP prunes for about 30 steps, so it is resumed in the middle; ModelPruning is done by then.
PRUNING: dict[str, Any] = {"prune_ratio": 0.75, "A": 0.25, "interval": 2}
HALVINGS = 2  # half of what is left, after each of the first epochs: 75 % in all

PLAIN, PERMANENT, KEPT, SPP = CONTENDERS = (
    "no callback",
    "ModelPruning",
    "ModelPruning, make_pruning_permanent=False",
    "SPPCallback",
)


@dataclass(frozen=True)
class Cell:
    """What one contender did in one experiment."""

    holds: bool | None  # None where the experiment doesn't apply
    text: str


Experiment = Callable[[str, Path], Cell]


# --- the script ---


class Net(ConvNet):
    """The ConvNet, without what would trip others up for reasons of its own."""

    def __init__(self) -> None:
        # PyTorch's random_unstructured can't prune weights in channels-last order.
        super().__init__(channels_last=False)
        # A torchmetrics module equals everything (its == is a metric): ModelPruning would find
        # any module in the network.
        del self.val_acc, self.test_acc

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss, not logged: ``fullgraph=True`` would refuse that."""
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of ``parameters()``: an attribute ``weight`` is no parameter where hooks compute it."""
        return torch.optim.SGD(self.parameters(), 0.001, momentum=0.9, weight_decay=0.004)


def start_net() -> Net:
    """The network, the same every time."""
    torch.manual_seed(0)
    return Net()


def pruning_of(contender: str, net: Net, fn: str = "ln_structured") -> list[Callback]:
    """The callbacks that prune for a contender."""
    if contender == PLAIN:
        return []
    if contender == SPP:
        return [SPPCallback(**PRUNING)]
    structured: dict[str, Any] = {"pruning_dim": 1, "pruning_norm": 1}
    pruning = ModelPruning(
        fn,
        [(net.get_submodule(name), "weight") for name in LAYERS],
        use_global_unstructured=False,
        amount=0.5,
        apply_pruning=lambda epoch: epoch < HALVINGS,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=contender == PERMANENT,
        **(structured if fn.endswith("_structured") else {}),
    )
    return [pruning]


def fit(
    net: Net,
    callbacks: list[Callback],
    epochs: int = EPOCHS,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    """Train, and return the Trainer."""
    saving = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(
        max_epochs=epochs,
        limit_val_batches=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=saving,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"accelerator": "cpu"} | options),
    )
    trainer.fit(net, DigitsDataModule(**DATA), ckpt_path=ckpt_path)
    return trainer


def weights(state: dict[str, Tensor]) -> Tensor:
    """What the convolutions compute with, by a state dict, in one flat tensor."""
    flat = []
    for name in LAYERS:
        weight = state.get(f"{name}.weight")
        if weight is None:
            weight = state[f"{name}.weight_orig"] * state[f"{name}.weight_mask"]
        flat.append(weight.flatten())
    return torch.cat(flat).detach().clone()


def momentum(net: Net, trainer: Trainer) -> Tensor:
    """The optimizer's momentum of the convolutions' weights, in one flat tensor."""
    state = trainer.optimizers[0].state
    return torch.cat(
        [state[held(net, name)]["momentum_buffer"].flatten() for name in LAYERS]
    ).clone()


def held(net: Net, name: str) -> torch.nn.Parameter:
    """The parameter that the optimizer holds for a layer's weight."""
    parameters = net.get_submodule(name)._parameters
    parameter = parameters.get("weight", parameters.get("weight_orig"))
    assert parameter is not None
    return parameter


def strange_keys(state: dict[str, Tensor]) -> int:
    """How many keys the plain network lacks, or has and finds missing."""
    return len(state.keys() ^ Net().state_dict().keys())


def percent(share: float | Tensor) -> str:
    """A share in words; only none is 0 and only all is 100."""
    share = float(share)
    if 0 < share < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if 0.999 < share < 1 else f"{100 * share:.1f} %"


def first_words(error: Exception) -> str:
    """An exception in one short line of a table."""
    words = " ".join(str(error).split()).replace("|", "\\|")
    return f"{type(error).__name__}: {words[:60]}…"


# --- the experiments ---


class Resumed:
    """A run that is saved on its way, and the same resumed from there by fresh objects."""

    runs: dict[str, Resumed] = {}  # noqa: RUF012  # three experiments look at the same runs

    def __init__(self, contender: str, folder: Path) -> None:
        net = start_net()
        name = str(CONTENDERS.index(contender))
        saving = ModelCheckpoint(folder / name, "{epoch}", save_top_k=-1)
        trainer = fit(net, [*pruning_of(contender, net), saving])
        self.end = torch.cat([weights(net.state_dict()), momentum(net, trainer)])
        self.file = folder / name / f"epoch={CRASH - 1}.ckpt"
        self.saved: dict[str, Tensor] = torch.load(self.file, weights_only=True)["state_dict"]
        self.error: Exception | None = None
        net = start_net()
        try:
            trainer = fit(net, pruning_of(contender, net), ckpt_path=self.file)
        except RuntimeError as error:
            self.error = error
        else:
            self.resumed_weights = weights(net.state_dict())
            self.resumed_end = torch.cat([self.resumed_weights, momentum(net, trainer)])

    @classmethod
    def of(cls, contender: str, folder: Path) -> Resumed:
        """The contender's runs."""
        if contender not in cls.runs:
            cls.runs[contender] = cls(contender, folder)
        return cls.runs[contender]


def resume_keeps_zeros(contender: str, folder: Path) -> Cell:
    """Resumed, pruned weights stay 0."""
    if contender == PLAIN:
        return Cell(None, "–")
    run = Resumed.of(contender, folder)
    zero = weights(run.saved) == 0
    before = f"{percent(zero.float().mean())} zeros saved"
    if run.error is not None:
        return Cell(False, f"{before}; resuming raises {first_words(run.error)}")
    stayed = (run.resumed_weights[zero] == 0).float().mean()
    after = (run.resumed_weights == 0).float().mean()
    text = f"{before}; {percent(stayed)} of them 0 at the end; {percent(after)} zeros then"
    return Cell(bool(stayed == 1), text)


def resume_is_exact(contender: str, folder: Path) -> Cell:
    """Resumed, weights and momentum end as in the run that never stopped, bit for bit."""
    run = Resumed.of(contender, folder)
    if run.error is not None:
        return Cell(False, f"resuming raises {first_words(run.error)}")
    differ = (run.end != run.resumed_end).float().mean()
    return Cell(bool(differ == 0), f"{percent(differ)} of the numbers differ")


def checkpoint_is_plain(contender: str, folder: Path) -> Cell:
    """A checkpoint of the middle loads into the plain network, ``strict=True``."""
    saved = Resumed.of(contender, folder).saved
    strange = strange_keys(saved)
    try:
        Net().load_state_dict(saved, strict=True)
    except RuntimeError as error:
        return Cell(False, f"{strange} keys missing or unknown: {first_words(error)}")
    return Cell(True, f"{strange} keys missing or unknown")


RANK_RUNS = (
    *((PERMANENT, fn) for fn in ("ln_structured", "random_structured", "random_unstructured")),
    (SPP, ""),
)


class TakeZeros(Callback):
    """Keeps what is masked at the end of training, before anything is made permanent."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        masks = [getattr(pl_module.get_submodule(name), "weight") == 0 for name in LAYERS]  # noqa: B009
        self.masked = torch.cat([mask.flatten() for mask in masks])


def train_as_rank(folder: Path) -> None:
    """What each of two processes does: every run, from a seed of its own; notes the masks."""
    rank = int(os.environ["LOCAL_RANK"])
    found = {}
    for contender, fn in RANK_RUNS:
        net, take = start_net(), TakeZeros()
        callbacks = [*pruning_of(contender, net, fn), take]
        torch.manual_seed(1000 + rank)
        fit(net, callbacks, EPOCHS - 1, **launcher_options())
        found[fn or contender] = take.masked
    torch.save(found, folder / f"rank{rank}.pt")


def ranks_agree(contender: str, folder: Path) -> Cell:
    """Two DDP processes with seeds of their own mask the same weights."""
    if contender in (PLAIN, KEPT):
        return Cell(None, "–" if contender == PLAIN else "as beside")
    if not (folder / "rank1.pt").is_file():
        options = ["--accelerator=cpu", "--devices=2", "--strategy=ddp", "--main-port=29583"]
        script = [__file__, "--ranks", str(folder)]
        command = [
            sys.executable,
            "-m",
            "spp_lightning.training.launcher",
            "run",
            *options,
            *script,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
    ours, theirs = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    names = [fn or SPP for who, fn in RANK_RUNS if who == contender]
    differ = {name: (ours[name] != theirs[name]).float().mean() for name in names}
    words = [f"{name} {percent(share)}" for name, share in differ.items()]
    if contender == SPP:
        words = [percent(differ[SPP])]
    return Cell(all(share == 0 for share in differ.values()), f"{', '.join(words)} differ")


class Moments(Callback):
    """Looks at the network in every hook of the training, as another callback might."""

    def __init__(self) -> None:
        self.seen = self.strange = self.no_copy = self.no_pickle = 0

    def look(self, pl_module: LightningModule) -> None:
        """Count what is not as in the plain network."""
        self.seen += 1
        self.strange += strange_keys(pl_module.state_dict()) > 0
        for copied, counter in ((copy.deepcopy, "no_copy"), (repickled, "no_pickle")):
            try:
                whole = strange_keys(copied(pl_module).state_dict()) == 0
            except Exception:  # whatever it is, there is no copy
                whole = False
            setattr(self, counter, getattr(self, counter) + (not whole))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        self.look(pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.look(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        self.look(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.look(pl_module)


def repickled(module: LightningModule) -> Any:
    """A copy by way of pickle."""
    return pickle.loads(pickle.dumps(module))


def plain_at_every_moment(contender: str, folder: Path) -> Cell:
    """In every hook keys are plain, and so are a deepcopy and a pickle."""
    net, moments = start_net(), Moments()
    fit(net, [*pruning_of(contender, net), moments])
    found = {
        "keys not plain": moments.strange,
        "deepcopy fails": moments.no_copy,
        "pickle fails": moments.no_pickle,
    }
    counts = ", ".join(f"{what} {count}" for what, count in found.items())
    return Cell(not any(found.values()), f"of {moments.seen} moments: {counts}")


class Later(Callback):
    """Keeps, at the last batch, what the optimizer holds of the masked weights."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:  # noqa: D102
        if trainer.is_last_batch:
            masked = torch.cat([getattr(pl_module, n).weight.flatten() == 0 for n in LAYERS])
            values = torch.cat([held(pl_module, name).flatten() for name in LAYERS])
            self.masked = int(masked.sum())
            self.weights = (values[masked] != 0).float().mean()
            self.momentum = (momentum(pl_module, trainer)[masked] != 0).float().mean()


def optimizer_is_clean(contender: str, folder: Path) -> Cell:
    """An epoch after the last pruning, the optimizer holds only zeros of the pruned weights."""
    if contender == PLAIN:
        return Cell(None, "–")
    net, later = start_net(), Later()
    fit(net, [*pruning_of(contender, net), later])
    text = f"≠ 0: {percent(later.weights)} of the parameter, {percent(later.momentum)} of momentum"
    return Cell(bool(later.weights == later.momentum == 0), text)


def zeros_outlive_the_callback(contender: str, folder: Path) -> Cell:
    """Trained on for an epoch without the callback, pruned weights stay 0."""
    if contender == PLAIN:
        return Cell(None, "–")
    net = start_net()
    fit(net, pruning_of(contender, net))
    zero = weights(net.state_dict()) == 0
    fit(net, [], 1)
    stayed = (weights(net.state_dict())[zero] == 0).float().mean()
    return Cell(bool(stayed == 1), f"{percent(stayed)} of the zeros stay 0")


class LeastZeros(Callback):
    """Keeps the smallest share of a set of weights that is 0 after a step."""

    def __init__(self, zero: Tensor) -> None:
        self.zero, self.share = zero, 1.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: D102
        share = (weights(pl_module.state_dict())[self.zero] == 0).float().mean()
        self.share = min(self.share, float(share))


def second_fit(contender: str, folder: Path) -> Cell:
    """The callback serves in a second fit of the network: what is pruned stays so."""
    if contender == PLAIN:
        return Cell(None, "–")
    net = start_net()
    callbacks = pruning_of(contender, net)
    fit(net, callbacks)
    least = LeastZeros(weights(net.state_dict()) == 0)
    fit(net, [*callbacks, least], 2)
    return Cell(least.share == 1, f"{percent(least.share)} of the zeros stay 0 all along")


def other_network(contender: str, folder: Path) -> Cell:
    """The callback serves in a fit of another network."""
    if contender == PLAIN:
        return Cell(None, "–")
    net, other = start_net(), start_net()
    callbacks = pruning_of(contender, net)
    fit(net, callbacks)
    try:
        fit(other, callbacks)
    except Exception as error:
        return Cell(False, f"raises {first_words(error)}")
    share = (weights(other.state_dict()) == 0).float().mean()
    return Cell(bool(share > 0.5), f"{percent(share)} zeros at its end")


class Fault(Callback):
    """Raises in the last epoch."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        if trainer.current_epoch == EPOCHS - 1:
            raise ZeroDivisionError("a fault in the training")


def whole_after_a_fault(contender: str, folder: Path) -> Cell:
    """After an exception in the training the network is plain."""
    net = start_net()
    with suppress(ZeroDivisionError):
        fit(net, [*pruning_of(contender, net), Fault()])
    strange = strange_keys(net.state_dict())
    hooks = sum(len(layer._forward_pre_hooks) for layer in net.modules())
    types = sum(type(net.get_submodule(name)) is not torch.nn.Conv2d for name in LAYERS)
    text = f"{strange} keys missing or unknown, {hooks} hooks, {types} strange layers"
    return Cell(not (strange or hooks or types), text)


def compiles_once(contender: str, folder: Path) -> Cell:
    """``torch.compile(fullgraph=True)`` compiles the training step once."""
    torch._dynamo.reset()
    net = start_net()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    # An epoch's last batch is smaller: dropped, because another shape compiles again by itself.
    compiled: Any = torch.compile(net, backend=backend, fullgraph=True)
    try:
        fit(compiled, pruning_of(contender, net), limit_train_batches=7)
    except Exception as error:
        return Cell(False, f"compilations: {graphs}, then {first_words(error)}")
    return Cell(graphs == 1, f"compilations in {7 * EPOCHS} steps: {graphs}")


EXPERIMENTS: dict[str, Experiment] = {
    "resumed, what was pruned stays pruned": resume_keeps_zeros,
    "resumed, the run ends bit for bit like the one that never stopped": resume_is_exact,
    "a checkpoint of the middle loads into the plain network": checkpoint_is_plain,
    "two DDP ranks, each with a seed of its own, mask the same": ranks_agree,
    "what is pruned stays so in a second fit with the same callback": second_fit,
    "the callback serves for another network": other_network,
    "keys and copies are plain at every moment": plain_at_every_moment,
    "an epoch later the optimizer holds only zeros of what is pruned": optimizer_is_clean,
    "zeros outlive an epoch of training without the callback": zeros_outlive_the_callback,
    "an exception in the training leaves a plain network": whole_after_a_fault,
    "`torch.compile(fullgraph=True)` compiles once": compiles_once,
}


# --- the table ---


def report(rows: list[Row]) -> str:
    """The experiments as a Markdown table."""
    marks = {True: "**yes**: ", False: "**no**: ", None: ""}
    table = [
        [row["name"], *(marks[cell["holds"]] + cell["text"] for cell in row["cells"].values())]
        for row in rows
    ]
    return markdown_table(["", *CONTENDERS], table)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    parser.add_argument("--ranks", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.ranks is not None:
        train_as_rank(options.ranks)
        return
    about = context("lightning", threads=torch.get_num_threads())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, experiment in EXPERIMENTS.items():
            cells = {who: asdict(experiment(who, Path(folder))) for who in CONTENDERS}
            rows.append({"name": name, "cells": cells, "context": about})
            print(f"{name}: {', '.join(cell['text'] for cell in cells.values())}", flush=True)
    print(report(rows))
    if options.save:
        Results("control_group", report).replace(rows)


if __name__ == "__main__":
    main()
