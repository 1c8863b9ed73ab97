"""What a user could take in the place of SPP: ResNet-20 on CIFAR-10, accuracy over latency.

    python benchmarks/alternatives.py --save
    python benchmarks/alternatives.py --seeds 0 1 --save

Trains ResNet-20, then makes it faster in several ways, all with as many further steps: SPP,
channels removed by Torch-Pruning, fewer channels from scratch. Int8 costs no training. All
networks are timed in turns in one process, each in every engine; the fastest engine counts. A
stopped run goes on from its last checkpoint in ``runs/alternatives``. What is trained is kept.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from allocation import accuracy
from harness.arguments import make_parser, quiet
from harness.classifiers import data_for
from harness.contenders import BASELINE, CONTENDERS, Contender, Lengths, train
from harness.context import RESULTS, ROOT, context, data_of
from harness.dense import onnx_bytes, onnx_session_call, openvino_call
from harness.results import Results, Row, markdown_table
from harness.rounds import Call, in_turns, keep_freed_memory, quantiles
from int8_accuracy import calibration
from int8_networks import dense_int8
from torch import Tensor, nn

from spp_lightning import compact, count_macs, quantize_compact

DATA = ROOT / "data" / "cifar10"
BATCHES = (1, 64)
LENGTHS = Lengths(baseline=3128, more=1173, interval=5)  # 8 and 3 epochs
QUICK = Lengths(baseline=8, more=100, interval=1)


@dataclass(frozen=True)
class Candidate:
    """A network that is ready to be timed.

    Args:
        name: The contender's.
        accuracy: Share of the test images that it classifies right.
        macs: Its multiply-accumulates, of one image.
        engines: What makes a call of a batch, by the engine's name.
    """

    name: str
    accuracy: float
    macs: int
    engines: dict[str, Callable[[Tensor], Call]]


class OneByOne(nn.Module):
    """An ONNX file for single images, as a module for batches."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, ``(B, 10)``."""
        scores = [self.session.run(None, {"x": image.numpy()})[0] for image in x.split(1)]
        return torch.cat([torch.from_numpy(score) for score in scores])


def compact_call(net: nn.Module, x: Tensor) -> Call:
    """The network in this package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers without pruned columns may stay dense
        return partial(compact(net, x), x)


def in_float32(name: str, net: nn.Module, data: Any) -> Candidate:
    """A trained network in float32."""
    engines: dict[str, Callable[[Tensor], Call]] = {
        "compact": lambda x: compact_call(net, x),
        "onnxruntime": lambda x: onnx_session_call(onnx_bytes(net, x), x, 1),
        "OpenVINO": lambda x: openvino_call(onnx_bytes(net, x), x, 1),
    }
    return Candidate(name, accuracy(net, data), macs_of(net), engines)


def dense_in_int8(net: nn.Module, images: Tensor, data: Any) -> Candidate:
    """The unpruned network, quantised by onnxruntime."""

    def model(batch: int) -> bytes:
        return dense_int8(net, images, batch)

    engines: dict[str, Callable[[Tensor], Call]] = {
        "onnxruntime": lambda x: onnx_session_call(model(len(x)), x, 1),
        "OpenVINO": lambda x: openvino_call(model(len(x)), x, 1),
    }
    return Candidate("baseline, int8", accuracy(OneByOne(model(1)), data), macs_of(net), engines)


def pruned_in_int8(name: str, net: nn.Module, images: Tensor, data: Any) -> Candidate:
    """A pruned network, quantised by this package."""
    quantized = quantize_compact(compact(net, images[:1]), [images])
    engines: dict[str, Callable[[Tensor], Call]] = {"compact": lambda x: partial(quantized, x)}
    return Candidate(f"{name}, int8", accuracy(quantized, data), macs_of(net), engines)


def macs_of(net: nn.Module) -> int:
    """Multiply-accumulates of one image, of columns that aren't 0."""
    return sum(count_macs(net, torch.zeros(1, 3, 32, 32)).values())


def candidates(
    contenders: list[Contender], seed: int, lengths: Lengths, runs: Path
) -> Iterator[Candidate]:
    """Every contender, trained if need be; and in int8 the unpruned one and those pruned by SPP."""
    data = data_for("resnet20", DATA)
    images = calibration(data)[0]
    for contender in contenders:
        begin = time.perf_counter()
        net = train(contender, seed, lengths, runs, DATA)
        found = in_float32(str(contender), net, data)
        seconds = time.perf_counter() - begin
        print(f"{contender}, seed {seed}: {found.accuracy:.2%}, {seconds:.0f} s", flush=True)
        yield found
        if contender == BASELINE:
            yield dense_in_int8(net, images, data)
        elif contender.kind == "SPP":
            yield pruned_in_int8(str(contender), net, images, data)


@torch.no_grad()
def latencies(found: list[Candidate], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds by batch, candidate and engine: CPU time of one thread."""
    ms: dict[str, dict[str, dict[str, float]]] = {}
    for batch in BATCHES:
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        calls: dict[str, Call] = {}
        for one in found:
            calls |= {f"{one.name} | {engine}": make(x) for engine, make in one.engines.items()}
        times = in_turns(calls, rounds, time.process_time)
        ms[str(batch)] = {one.name: {} for one in found}
        for key, values in times.items():
            name, engine = key.split(" | ")
            ms[str(batch)][name][engine] = quantiles(values)["p50"]
    return ms


def report(rows: list[Row]) -> str:
    """The rows as Markdown: the mean accuracy of the seeds, the latencies of the first."""
    of_name: dict[str, list[Row]] = {}
    for row in rows:
        of_name.setdefault(row["contender"], []).append(row)
    dense = of_name["baseline"][0]
    head = ["network", "fewer MACs", "accuracy", "seeds"]
    head += [f"ms, batch {batch} (engine)" for batch in BATCHES]
    cells = []
    for name, found in of_name.items():
        first = found[0]
        mean = sum(row["accuracy"] for row in found) / len(found)
        cells.append([name, f"{dense['macs'] / first['macs']:.2f}", f"{mean:.2%}", len(found)])
        for batch in BATCHES:
            engine, ms = min(first["ms"][str(batch)].items(), key=lambda pair: pair[1])
            cells[-1].append(f"{ms:.3g} ({engine})")
    return markdown_table(head, cells)


def draw(rows: list[Row], path: Path) -> None:
    """Accuracy, the mean of the seeds, over latency at batch 1: a line per kind of network."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, MultipleLocator

    accuracies: dict[str, list[float]] = {}
    for row in rows:
        accuracies.setdefault(row["contender"], []).append(100 * row["accuracy"])
    kinds: dict[str, list[tuple[float, float, str]]] = {}
    for row in {row["contender"]: row for row in reversed(rows)}.values():  # the first seed's
        speedup = "" if row["speedup"] == 1 else f"{row['speedup']:g}×"
        kind = row["contender"].replace(f" {speedup}", "") if speedup else row["contender"]
        found = accuracies[row["contender"]]
        point = (min(row["ms"]["1"].values()), sum(found) / len(found), speedup)
        kinds.setdefault(kind, []).append(point)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for kind, points in sorted(kinds.items()):
        ms, percent, speedups = zip(*sorted(points), strict=True)
        axes.plot(ms, percent, "*" if kind.startswith("baseline") else "o-", label=kind)
        for x, y, text in zip(ms, percent, speedups, strict=True):
            axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="milliseconds for an image, one thread", ylabel="test accuracy, %")
    axes.xaxis.set_major_locator(MultipleLocator(0.1))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%.1f"))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train what isn't trained yet, measure, report."""
    parser = make_parser(__doc__, rounds=9, threads=[1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--most", type=int, default=len(CONTENDERS), help="contenders, by worth")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    keep_freed_memory()
    lengths = QUICK if options.quick else LENGTHS
    runs = ROOT / "runs" / ("alternatives-quick" if options.quick else "alternatives")
    contenders = CONTENDERS[: options.most]
    rows: list[Row] = []
    for seed in options.seeds:
        found = list(candidates(contenders, seed, lengths, runs))
        ms = latencies(found, options.rounds)
        speedups = {str(contender): contender.speedup for contender in contenders}
        about = context(
            *("lightning", "torch-pruning", "onnxruntime", "openvino"),
            data=data_of(DATA),
            steps=f"{lengths.baseline} and {lengths.more}",
            threads=1,
        )
        rows += [
            {
                "name": f"{one.name}, seed {seed}",
                "contender": one.name,
                "speedup": speedups[one.name.removesuffix(", int8")],
                "seed": seed,
                "accuracy": one.accuracy,
                "macs": one.macs,
                "ms": {batch: by_name[one.name] for batch, by_name in ms.items()},
                "context": about,
            }
            for one in found
        ]
    print(report(rows))
    if options.save:
        results = Results("alternatives", report)
        results.add(*rows)
        draw(results.rows(), RESULTS / "alternatives.png")


if __name__ == "__main__":
    main()
