"""Prune the CIFAR-10 ConvNet 4x by the committed configs, beside a control that isn't pruned.

    python benchmarks/cifar10.py                    # a quarter of the schedule: two CPU cores
    python benchmarks/cifar10.py --schedule full    # the method's own schedule: a GPU

Trains the baseline, then from its weights the control (trained on, not pruned) and the pruned
network, and writes ``benchmarks/results/cifar10_SCHEDULE.json``, ``.md`` and ``.png``. A run that
was stopped goes on where it was; finished ones are kept (in ``runs/``). ``--report`` only writes
the results of finished runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import matplotlib
import torch
import yaml
from harness.context import RESULTS, ROOT, context, data_of
from harness.results import Results, Row, markdown_table
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spp_lightning import CIFAR10DataModule, ConvNet, count_macs

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DATA = ROOT / "data" / "cifar10"
LAYERS = ("conv1", "conv2", "conv3")
Curve = tuple[list[int], list[float]]


class Run:
    """One committed config and the folder its run writes to."""

    def __init__(self, schedule: str, name: str) -> None:
        folder = ROOT / "examples" / "configs" / ("short" if schedule == "short" else "")
        self.config = folder / f"{name}.yaml"
        self.settings = yaml.safe_load(self.config.read_text())
        logger = self.settings["trainer"]["logger"]["init_args"]
        self.folder = ROOT / logger["save_dir"] / logger["name"]
        self.checkpoint = self.folder / "checkpoints" / "last.ckpt"

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.settings["trainer"]["max_steps"])

    @property
    def steps(self) -> int:
        """Optimizer steps done and saved."""
        if not self.checkpoint.is_file():
            return 0
        return int(
            torch.load(self.checkpoint, map_location="cpu", weights_only=True)["global_step"]
        )

    def train(self) -> None:
        """Train to the end, from the last checkpoint if there is one."""
        done = self.steps
        if done >= self.max_steps:
            print(f"{self.config.name}: finished before")
            return
        print(f"{self.config.name}: from step {done} to {self.max_steps}", flush=True)
        script = ROOT / "examples" / "cifar10_convnet.py"
        command = [sys.executable, str(script), "fit", "--config", str(self.config)]
        if done:
            command += ["--ckpt_path", str(self.checkpoint)]
        subprocess.run([*command, "--trainer.enable_progress_bar=false"], check=True, cwd=ROOT)

    def network(self) -> ConvNet:
        """The trained network."""
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        net = ConvNet()
        net.load_state_dict(state)
        return net

    def curve(self, tag: str) -> Curve:
        """Steps and values of a logged scalar, from all parts of the run."""
        events = EventAccumulator(str(self.folder))
        events.Reload()
        points = {event.step: event.value for event in events.Scalars(tag)}
        return sorted(points), [points[step] for step in sorted(points)]


def accuracy(net: ConvNet) -> float:
    """Accuracy on the 10,000 test images, in percent."""
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    data = CIFAR10DataModule(DATA, batch_size=500)
    return 100 * float(trainer.test(net, data, verbose=False)[0]["test_acc"])


def measure(schedule: str, runs: dict[str, Run]) -> Row:
    """The figures of the finished runs."""
    nets = {name: run.network() for name, run in runs.items()}
    pruned = nets["spp_4x"]
    steps, shares = runs["spp_4x"].curve("sparsity/total")
    example = pruned.example_input_array
    dense, left = count_macs(nets["control"], example), count_macs(pruned, example)
    columns = {}
    for name in LAYERS:
        weight = pruned.get_parameter(f"{name}.weight").detach().flatten(1)
        columns[name] = [int((weight == 0).all(0).sum()), weight.shape[1]]
    options = runs["spp_4x"].settings["trainer"]["callbacks"]["init_args"]
    interval = options.get("interval", 180)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = {} if device == "cuda" else {"threads": torch.get_num_threads()}
    return {
        "name": f"SPP 4x, schedule {schedule}",
        "steps": {name: run.max_steps for name, run in runs.items()},
        "accuracy_percent": {name: round(accuracy(net), 2) for name, net in nets.items()},
        "interval": interval,
        "updates": len(steps),
        "pruning_iterations": len(steps) * interval,
        "final_sparsity": shares[-1],
        "columns_pruned": columns,
        "conv_macs": {
            "dense": sum(dense[name] for name in LAYERS),
            "pruned": sum(left[name] for name in LAYERS),
        },
        "context": context(
            *("torchvision", "lightning"),
            device=device,
            **threads,
            data=f"{data_of(DATA)}, all 50,000 training and 10,000 test images",
            seed=0,
            runs="1 each",
        ),
    }


def draw(runs: dict[str, Run], path: Path) -> None:
    """Draw layer sparsity and accuracy over the iterations."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for name in LAYERS:
        steps, shares = runs["spp_4x"].curve(f"sparsity/{name}")
        steps, shares = [*steps, runs["spp_4x"].max_steps], [*shares, shares[-1]]
        top.plot(steps, [100 * share for share in shares], label=name, drawstyle="steps-post")
    top.set(ylabel="columns pruned (%)", title="SPP at 4x: layer sparsity and accuracy")
    for name, label in (("control", "control, not pruned"), ("spp_4x", "SPP, 4x fewer MACs")):
        steps, shares = runs[name].curve("val_acc")
        bottom.plot(steps, [100 * share for share in shares], label=label)
    bottom.set(xlabel="iteration", ylabel="test accuracy (%)")
    for axes in (top, bottom):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def report(rows: list[Row]) -> str:
    """The figures as Markdown."""
    (row,) = rows
    accuracies = {name: f"{value:.2f} %" for name, value in row["accuracy_percent"].items()}
    steps = {name: f"{count:,}" for name, count in row["steps"].items()}
    dense, pruned = (f"{row['conv_macs'][which]:,}" for which in ("dense", "pruned"))
    table = [
        ["baseline", steps["baseline"], accuracies["baseline"], dense],
        [
            *("control: baseline trained on", f"+ {steps['control']}"),
            *(accuracies["control"], dense),
        ],
        ["SPP 4x from the baseline", f"+ {steps['spp_4x']}", accuracies["spp_4x"], pruned],
    ]
    columns = ", ".join(f"{n} {a} of {b}" for n, (a, b) in row["columns_pruned"].items())
    return (
        markdown_table(
            ["network", "iterations", "test accuracy", "MACs of the convolutions"], table
        )
        + f"\n\nTarget reached after {row['updates']} updates of p, t = {row['interval']}:"
        f" {row['pruning_iterations']:,} iterations. Columns pruned: {columns}."
    )


def main() -> None:
    """Run what isn't finished and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--schedule", choices=("short", "full"), default="short")
    parser.add_argument("--report", action="store_true", help="only write the results")
    arguments = parser.parse_args()
    runs = {name: Run(arguments.schedule, name) for name in ("baseline", "control", "spp_4x")}
    for run in runs.values():
        if not arguments.report:
            run.train()
        elif run.steps < run.max_steps:
            parser.error(f"{run.config.name} has done {run.steps} of {run.max_steps} steps.")
    row = measure(arguments.schedule, runs)
    Results(f"cifar10_{arguments.schedule}", report).replace([row])
    draw(runs, RESULTS / f"cifar10_{arguments.schedule}.png")
    print(report([row]))


if __name__ == "__main__":
    main()
