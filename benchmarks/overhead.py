"""What SPP adds to the time of a training step, beside what other pruning tools add.

    python benchmarks/overhead.py --device cpu --threads 2
    python benchmarks/overhead.py --device cuda --compile --rounds 31

One process trains copies of a network in turns: plain, with SPP in the middle of pruning, with
Lightning's ``ModelPruning`` and with masks of ``torch.nn.utils.prune`` (L1 norms of input channels
of every convolution). A round is one turn of each, in an order that rotates; what is reported is
the median over the rounds of the ratio to the plain network in the same round, with its quartiles.
SPP's updates of p, every 180 steps, are timed alone and added. Measures also what Lightning's
Trainer adds, an update of a million columns in 100 layers, and on a GPU how often the host waits.

``--save`` adds the rows to ``benchmarks/results/overhead_DEVICE.json`` and ``.md``: a long
measurement can be done model by model.
"""

from __future__ import annotations

import copy
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from harness.arguments import each_thread_count, make_parser, quiet
from harness.context import context
from harness.results import Results, Row, markdown_table
from harness.rounds import now, orders, ratio, turn_ms
from harness.workloads import NETWORKS
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from spp_lightning import ConvNet, SPPCallback, SPPPruner

INTERVAL = 180  # steps between two updates, the paper's
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ConvNet": (ConvNet, (100, 3, 32, 32)),
    "ResNet-18": (NETWORKS["ResNet-18, batch 1"][0], (64, 3, 64, 64)),
    "ResNet-50": (NETWORKS["ResNet-50, batch 1"][0], (64, 3, 64, 64)),
}
# Most that SPP may add to a step, updates included, by device.
TARGETS = {
    "cpu": {"ConvNet": 0.03, "ResNet-18": 0.01, "ResNet-50": 0.01},
    "cuda": {"ConvNet": 0.05, "ResNet-18": 0.02, "ResNet-50": 0.02},
}
UPDATE_MS, STATE_BYTES = 50, 12  # targets for 10^6 columns: on a CPU with 2 threads; per column

Batch = tuple[Tensor, Tensor]


def sgd(net: nn.Module) -> torch.optim.SGD:
    """The optimizer of all contenders."""
    return torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4)


def convolutions(net: nn.Module) -> list[nn.Module]:
    """The layers that every contender prunes."""
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]


def batch_of(model: str, device: str) -> Batch:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    shape = MODELS[model][1]
    images = torch.randn(shape, generator=generator)
    labels = torch.randint(0, 10, shape[:1], generator=generator)
    return images.to(device), labels.to(device)


# --- the contenders ---


class Contender:
    """A network in training; a subclass prunes it."""

    def __init__(self, net: nn.Module, compiled: bool) -> None:
        self.net, self.optimizer = net, sgd(net)
        self.begin()
        self.forward: Any = torch.compile(net, fullgraph=True) if compiled else net

    def begin(self) -> None:
        """Prune, before the first step."""

    def prepare(self) -> None:
        """Do what has to be done before every step."""

    def step(self, batch: Batch) -> None:
        """Take an optimizer step."""
        self.prepare()
        cross_entropy(self.forward(batch[0]), batch[1]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class SPP(Contender):
    """SPP in the middle of pruning."""

    def begin(self) -> None:  # noqa: D102
        self.pruner = SPPPruner(self.net, prune_ratio=0.75, interval=INTERVAL)
        for _ in range(self.pruner.expected_updates // 2):
            self.pruner.update(self.optimizer)
        self.steps = 0

    def prepare(self) -> None:  # noqa: D102
        self.steps += 1
        # Never a step at which an update is due: updates are timed alone.
        self.pruner.step(1 + self.steps % (INTERVAL - 1), self.optimizer)


class ModelPruningAlone(Contender):
    """Lightning's ModelPruning after it has pruned twice, as at the ends of two epochs."""

    def begin(self) -> None:  # noqa: D102
        layers = [(layer, "weight") for layer in convolutions(self.net)]
        pruning = ModelPruning(
            "ln_structured",
            layers,
            use_global_unstructured=False,
            amount=0.3,
            use_lottery_ticket_hypothesis=False,
            pruning_dim=1,
            pruning_norm=1,
        )
        for _ in range(2):
            pruning.apply_pruning(0.3)


class TorchPrune(Contender):
    """Masks of torch.nn.utils.prune."""

    def begin(self) -> None:  # noqa: D102
        for layer in convolutions(self.net):
            prune.ln_structured(layer, "weight", amount=0.5, n=1, dim=1)


CONTENDERS: dict[str, type[Contender]] = {
    "plain": Contender,
    "plain again": Contender,  # a ratio of 1 by rights: what it is shows the noise
    "SPP": SPP,
    "ModelPruning": ModelPruningAlone,
    "torch.nn.utils.prune": TorchPrune,
}


# --- the measurements ---


def measure_steps(model: str, device: str, compiled: bool, rounds: int, steps: int) -> Row:
    """Step times of the contenders in turns.

    Args:
        model: One of MODELS.
        device: Where to train.
        compiled: Whether the networks are compiled.
        rounds: How many rounds count; one more comes before.
        steps: Steps of a contender in its turn; the first isn't timed if there are several, for
            it finds the caches as the contender before has left them.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = MODELS[model][0]().to(device).train()
    batch = batch_of(model, device)
    contenders = {name: kind(copy.deepcopy(net), compiled) for name, kind in CONTENDERS.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():  # compiles, and makes the optimizer's state
        for _ in range(2):
            contender.step(batch)
    untimed = int(steps > 1)
    for order in orders(list(contenders), rounds):
        for name in order:
            step = partial(contenders[name].step, batch)
            times[name].append(turn_ms(step, steps - untimed, untimed))
    spp = contenders["SPP"]
    assert isinstance(spp, SPP)
    update_ms = measure_updates(spp.pruner, spp.optimizer)
    plain_ms = statistics.median(times["plain"])
    ratios = {name: ratio(values, times["plain"]) for name, values in times.items()}
    share = update_ms / INTERVAL / plain_ms
    overhead = ratios["SPP"][1] - 1 + share
    target = TARGETS[device][model]
    peers = [ratios[name][1] - 1 for name in ("ModelPruning", "torch.nn.utils.prune")]
    return {
        "step_ms": {name: statistics.median(values) for name, values in times.items()},
        "ratio_quartiles": ratios,
        "update_ms": update_ms,
        "update_share": share,
        "spp_overhead": overhead,
        "target": target,
        "passes": {"target": overhead <= target, "below both peers": overhead < min(peers)},
        "rounds": rounds,
        "steps_per_turn": steps,
    }


def measure_updates(pruner: SPPPruner, optimizer: torch.optim.Optimizer, count: int = 9) -> float:
    """Milliseconds of an update of p, with all that it zeroes; the median of several."""
    update = partial(pruner.update, optimizer)
    return statistics.median(turn_ms(update, 1, untimed=0) for _ in range(count))


def state_bytes(pruner: SPPPruner) -> int:
    """Bytes of all tensors that a pruner keeps."""
    tensors = [value for value in vars(pruner).values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def measure_million(device: str) -> Row:
    """An update of a million columns in 100 layers, in the middle of pruning."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(1112, 4, 3) for _ in range(100))).to(device)
    optimizer = sgd(net)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    pruner = SPPPruner(net, prune_ratio=0.75, interval=INTERVAL)
    columns = sum(pruner.num_groups.values())
    for _ in range(pruner.expected_updates // 2):
        pruner.update(optimizer)
    update_ms = measure_updates(pruner, optimizer)
    steps = iter(range(1, 101))
    step_ms = turn_ms(lambda: pruner.step(next(steps)), 100, untimed=0)
    per_column = state_bytes(pruner) / columns
    return {
        "columns": columns,
        "update_ms": update_ms,
        "step_ms": step_ms,
        "state_bytes_per_column": per_column,
        "passes": {
            f"update ≤ {UPDATE_MS} ms": update_ms <= UPDATE_MS,
            f"state ≤ {STATE_BYTES} bytes": per_column <= STATE_BYTES,
        },
    }


class Batches:
    """The same batch again and again; notes how long a step took that asked for the next."""

    def __init__(self, batch: Batch, steps: int, untimed: int = 3) -> None:
        self.batch, self.steps, self.untimed = batch, steps, untimed
        self.step_ms = float("nan")

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        start = 0.0
        for step in range(self.steps):
            if step == self.untimed:
                start = now()
            if step == self.steps - 1:
                self.step_ms = 1000 * (now() - start) / (step - self.untimed)
            yield self.batch


class Trained(LightningModule):
    """A network as a LightningModule that does nothing but train."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: D102
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return sgd(self)


def measure_trainer(model: str, device: str, rounds: int, steps: int) -> Row:
    """Step times in a bare loop, in a Trainer with everything off, and with SPPCallback in it."""
    torch.manual_seed(0)
    net = MODELS[model][0]().to(device).train()
    batch = batch_of(model, device)

    def bare() -> float:
        batches, contender = Batches(batch, steps), Contender(copy.deepcopy(net), compiled=False)
        for one in batches:
            contender.step(one)
        return batches.step_ms

    def trainer(*callbacks: SPPCallback) -> float:
        batches = Batches(batch, steps)
        options = {"barebones": True, "accelerator": device, "devices": 1}
        trainer = Trainer(max_epochs=1, callbacks=list(callbacks), **options)  # type: ignore[arg-type]
        trainer.fit(Trained(copy.deepcopy(net)), batches)
        return batches.step_ms

    runs: dict[str, Callable[[], float]] = {
        "bare loop": bare,
        "Trainer": trainer,
        "Trainer with SPPCallback": lambda: trainer(SPPCallback(interval=INTERVAL)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    runs["Trainer"]()  # imports what is only imported in a fit
    for order in orders(list(runs), rounds):
        for name in order:
            times[name].append(runs[name]())
    return {
        "step_ms": {name: statistics.median(values) for name, values in times.items()},
        "trainer_ratio_quartiles": ratio(times["Trainer"], times["bare loop"]),
        "callback_ratio_quartiles": ratio(times["Trainer with SPPCallback"], times["Trainer"]),
        "rounds": rounds,
        "steps_per_turn": steps,
    }


def count_waits(steps: int = 500) -> Row:
    """How often the host waits for the GPU in updates, and in the steps between two of them."""
    net = ConvNet().cuda().train()
    contender = Contender(net, compiled=False)
    pruner = SPPPruner(net, interval=steps + 1)
    batch = batch_of("ConvNet", "cuda")
    waits = []
    for step in range(2 * (steps + 1)):
        due = step % (steps + 1) == 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if due else "error")
            try:
                pruner.step(step, contender.optimizer)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if due:
            waits.append(sum("called a synchronizing" in str(w.message) for w in caught))
        contender.step(batch)
    return {
        "steps_without_a_wait": 2 * steps,
        "waits_per_update": waits,
        # None at all would mean that waits aren't noticed.
        "passes": {"1 wait per update": waits == [1, 1]},
    }


# --- the report ---


def verdicts(row: Row) -> str:
    """Whether a row meets its targets, in words."""
    return ", ".join(f"{'PASS' if ok else 'MISS'} {what}" for what, ok in row["passes"].items())


def percent(quarts: list[float]) -> str:
    """Quartiles of a ratio as what it adds."""
    low, middle, high = (100 * (value - 1) for value in quarts)
    return f"{middle:+.1f} % ({low:+.1f} … {high:+.1f})"


def report(rows: list[Row]) -> str:
    """All rows as Markdown."""
    head = [
        *("network", "threads", "plain step", "plain again", "SPP's step", "ModelPruning's"),
        *("torch.nn.utils.prune's", "update of p", "its share", "SPP in all", "target"),
    ]
    table, others = [], []
    for row in rows:
        if "spp_overhead" in row:
            ratios = row["ratio_quartiles"]
            table.append(
                [
                    row["name"],
                    row.get("threads", "–"),
                    f"{row['step_ms']['plain']:.1f} ms",
                    *(percent(ratios[who]) for who in list(CONTENDERS)[1:]),
                    f"{row['update_ms']:.1f} ms",
                    f"{100 * row['update_share']:.2f} %",
                    f"{100 * row['spp_overhead']:+.1f} %",
                    f"≤ {100 * row['target']:.0f} %: {verdicts(row)}",
                ]
            )
        elif "callback_ratio_quartiles" in row:
            step_ms = ", ".join(f"{who} {ms:.2f} ms" for who, ms in row["step_ms"].items())
            others.append(
                f"{row['name']}: {step_ms} per step; the Trainer adds"
                f" {percent(row['trainer_ratio_quartiles'])}, SPPCallback to that"
                f" {percent(row['callback_ratio_quartiles'])}."
            )
        elif "columns" in row:
            others.append(
                f"{row['name']}: an update of {row['columns']:,} columns takes"
                f" {row['update_ms']:.1f} ms, a step between updates {row['step_ms']:.1f} ms; state"
                f" {row['state_bytes_per_column']:.0f} bytes per column: {verdicts(row)}."
            )
        elif "waits_per_update" in row:
            others.append(
                f"{row['name']}: {row['steps_without_a_wait']} steps without a wait of the host,"
                f" {row['waits_per_update']} waits in updates: {verdicts(row)}."
            )
    title = "Medians over rounds of the ratio to the plain step (quartiles)."
    return "\n\n".join([title, markdown_table(head, table), *others])


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__, rounds=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--compile", action="store_true", help="compiled networks as well")
    parser.add_argument("--only-steps", action="store_true", help="leave out the other parts")
    options = parser.parse_args()
    quiet()
    device, cuda = options.device, options.device == "cuda"
    about = context("torchvision", "lightning", device=device)
    results = Results(f"overhead_{device}", report)
    rows = []

    def add(name: str, row: Row) -> None:
        threads = {} if cuda else {"threads": torch.get_num_threads()}
        rows.append({"name": name, **threads, **row, "context": about})
        print(json.dumps(rows[-1]), flush=True)
        if options.save:
            results.add(rows[-1])

    for _ in each_thread_count(options):
        for model in options.models:
            for compiled in (False, True)[: 1 + options.compile]:
                steps = 11 if cuda else 4 if model == "ConvNet" else 1
                row = measure_steps(model, device, compiled, options.rounds, steps)
                add(f"{model}, {'compiled' if compiled else 'eager'}", row)
        if not options.only_steps:
            add(
                "ConvNet in a Trainer", measure_trainer("ConvNet", device, options.rounds, steps=15)
            )
            add("100 layers", measure_million(device))
            if cuda:
                add("ConvNet, waiting", count_waits())
    print(report(rows))


if __name__ == "__main__":
    main()
