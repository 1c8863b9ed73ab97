"""How much faster column-pruned layers and networks run on this CPU, against the theory.

    python benchmarks/speed.py --threads 1 2 --save
    python benchmarks/speed.py --only networks --threads 2

The theoretical speedup of a layer is its dense MACs over its MACs without the pruned columns; the
share is the measured speedup over that. "Dense" is the fastest way to run the unpruned layer or
network that was found on the machine: eager PyTorch in NCHW and channels-last, oneDNN with packed
weights, ``torch.compile`` with frozen weights, and onnxruntime. All contenders take turns in one
process; the times are medians over the turns. Columns are drawn at random, and every output is
compared with float64. Each row names the kernels that ran.

Parts: ``layers`` (3×3 of VGG and ResNet, batch 1 and 8), ``pointwise`` (1×1), ``networks``,
``training`` (a step of the compact ConvNet against one of the dense one), ``bfloat16`` (some layers
and networks against the fastest dense way in bfloat16, without onnxruntime), ``int8`` (layers with
normally distributed weights against onnxruntime's and OpenVINO's dense int8, and against float32 on
the same columns; their error is the share of outputs that aren't exact). ``--save`` writes
``benchmarks/results/speed_ISA.json`` and ``.md``, where ISA is the kernels' instruction set.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from harness.arguments import each_thread_count, make_parser, quiet
from harness.context import RESULTS, context
from harness.dense import dense_calls
from harness.int8 import Int8Layer, dense_int8_calls
from harness.results import Results, Row, markdown_table
from harness.rounds import Call, in_turns, keep_freed_memory, now, quantiles
from harness.workloads import (
    LAYERS,
    NETWORKS,
    POINTWISE,
    RATIOS,
    layer,
    network,
    prune_randomly,
)
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning import ConvNet, compact, compact_report
from spp_lightning.compaction import ColumnConv2d, instruction_set

GOALS: dict[str, dict[float, float]] = {  # share of the theoretical speedup, per prune ratio
    "layers": {0.5: 0.90, 0.75: 0.90, 0.9: 0.85},
    "pointwise": {0.5: 0.88, 0.75: 0.88, 0.9: 0.78},
    "ConvNet, batch 64": {0.5: 1.00, 0.75: 0.90, 0.9: 0.75},
    "ConvNet, batch 1": {0.5: 0.95, 0.75: 0.85, 0.9: 0.65},
    "ResNet-50, batch 1": {0.5: 0.88, 0.75: 0.75, 0.9: 0.60},
    "VGG-16 convolutions, batch 1": {0.5: 0.90, 0.75: 0.82, 0.9: 0.65},
}
PARTS = ("layers", "pointwise", "networks", "training", "bfloat16", "int8")
HALF, BYTES = "bfloat16, ", "int8, "  # how the names of their rows start
INT8_LAYERS = (*LAYERS[3:], (512, 512, 3, 7), *POINTWISE, (2048, 512, 1, 7), (512, 2048, 1, 7))
INSTRUCTION_SETS = ("avx512", "avx2", "base", "none")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and save if asked to. Ends with 1 if an output is wrong."""
    parser = make_parser(__doc__, rounds=9, threads=[1, 2])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="of the layers")
    parser.add_argument("--report", action="store_true", help="only write the Markdown anew")
    options = parser.parse_args(argv)
    if options.report:
        for name in INSTRUCTION_SETS:
            if (RESULTS / f"speed_{name}.json").is_file():
                Results(f"speed_{name}", report).write_report()
        return 0
    quiet()
    results = Results(f"speed_{instruction_set()}", report)
    others = ("torchvision", "onnxruntime", *(["openvino"] if find_spec("openvino") else []))
    about = context(*others) | {
        "instruction set": instruction_set(),
        "rounds": options.rounds,
        "freed memory": "kept" if keep_freed_memory() else "not kept",
    }
    right = True
    for threads in each_thread_count(options):
        for row in measure(options.only, options.batch, options.rounds, threads):
            row["context"] = about
            print(f"| {' | '.join(cells(row))} |", flush=True)
            right &= row["error"] < (0.02 if row["name"].startswith(HALF) else 1e-5)
            if options.save:
                results.add(row)
    return 0 if right else 1


def measure(
    parts: list[str], batches: list[int], rounds: int, threads: int
) -> Iterator[dict[str, Any]]:
    """The rows of one number of threads."""
    for part, shapes in (("layers", LAYERS), ("pointwise", POINTWISE)):
        if part in parts:
            for batch in batches:
                for shape in shapes:
                    name, conv, x = layer(shape, batch)
                    yield row_of(name, GOALS[part], conv, x, _column_layer, rounds, threads)
    if "networks" in parts:
        for name in GOALS:
            if name in NETWORKS:
                yield row_of(name, GOALS[name], *network(name), compact, rounds, threads)
    if "training" in parts:
        yield training_row(rounds, threads)
    if "bfloat16" in parts:
        for shape in (*LAYERS[3:], POINTWISE[0]):
            name, conv, x = layer(shape, batch=8)
            conv, x = conv.bfloat16(), x.bfloat16()
            yield row_of(HALF + name, {}, conv, x, _column_layer, rounds, threads)
        for name in GOALS:
            if name in NETWORKS:
                net, x = network(name)
                net, x = net.bfloat16(), x.bfloat16()
                yield row_of(HALF + name, {}, net, x, compact, rounds, threads)
    if "int8" in parts:
        for batch in batches:
            for shape in INT8_LAYERS:
                name, conv, x = layer(shape, batch)
                # Trained weights are more like these than like PyTorch's uniform ones.
                nn.init.normal_(conv.weight, std=0.05, generator=torch.Generator().manual_seed(0))
                yield int8_row(BYTES + name, conv, x.clamp(min=0), rounds, threads)


def row_of(
    name: str,
    goals: dict[float, float],
    net: nn.Module,
    x: Tensor,
    make: Callable[[nn.Module, Tensor], nn.Module],
    rounds: int,
    threads: int,
) -> Row:
    """Dense variants and compact networks of all ratios, timed in turns."""
    net.eval().requires_grad_(False)
    calls: dict[str, Call] = dict(dense_calls(net, x, threads))
    error, kernels = 0.0, {}
    for ratio in RATIOS:
        pruned = prune_randomly(net, ratio)
        fast = make(pruned, x).eval().requires_grad_(False)
        kernels[str(ratio)] = kernels_of(fast, x)
        error = max(error, relative_error(fast, pruned, x))
        calls[f"compact {ratio}"] = partial(fast, x)
    with torch.no_grad():
        times = in_turns(calls, rounds)
    row = {"name": name, "threads": threads, **speedups(times, goals)}
    return row | {"kernels": kernels, "error": error}


def int8_row(name: str, conv: nn.Conv2d, x: Tensor, rounds: int, threads: int) -> Row:
    """A layer in int8: dense in other libraries, and of fewer columns; also those in float32."""
    conv.requires_grad_(False)
    layers = {}
    for ratio in RATIOS:
        pruned = prune_randomly(conv, ratio)
        assert isinstance(pruned, nn.Conv2d)
        layers[ratio] = Int8Layer(pruned, x)
    calls = dict(dense_int8_calls(layers[0.0], threads))
    calls |= {f"compact {ratio}": made.call() for ratio, made in layers.items()}
    calls |= {f"float32 {ratio}": made.float_call() for ratio, made in layers.items()}
    clock = time.process_time if threads == 1 else now  # whatever else the machine does
    times = in_turns(calls, rounds, clock=clock)
    floats = {key: values for key, values in times.items() if key.startswith("float32 ")}
    others = {key: values for key, values in times.items() if key not in floats}
    over = {
        str(r): statistics.median(floats[f"float32 {r}"]) / statistics.median(times[f"compact {r}"])
        for r in RATIOS
    }
    row = {"name": name, "threads": threads, **speedups(others, {}), "over float32": over}
    dense = {key: calls[key] for key in ("onnxruntime int8", "OpenVINO int8") if key in calls}
    row["steps off"] = {key: layers[0.0].steps_off(call) for key, call in dense.items()}
    row["milliseconds"] |= {key: quantiles(values) for key, values in floats.items()}
    return row | {"error": max(made.wrong() for made in layers.values())}


def kernels_of(fast: nn.Module, x: Tensor) -> str:
    """The kernels that run in a compact network, and how many layers each computes."""
    found = compact_report(fast, x)
    counts = Counter(layer.kernel for layer in found.layers)
    chains = [f"chains ×{len(found.chains)}"] if found.chains else []
    return ", ".join([*(f"{kernel} ×{count}" for kernel, count in counts.items()), *chains])


def speedups(times: dict[str, list[float]], goals: dict[float, float]) -> dict[str, Any]:
    """Times, and the speedups of the compact networks over the fastest dense way."""
    medians = {key: statistics.median(values) for key, values in times.items()}
    fastest = min((key for key in times if not key.startswith("compact")), key=medians.__getitem__)
    ratios = [ratio for ratio in RATIOS if f"compact {ratio}" in times]
    return {
        "milliseconds": {key: quantiles(values) for key, values in times.items()},
        "dense": fastest,
        "speedup": {str(r): medians[fastest] / medians[f"compact {r}"] for r in ratios},
        "theory": {str(ratio): 1 / (1 - ratio) for ratio in ratios},
        "goals": {str(ratio): goal for ratio, goal in goals.items()},
    }


def _column_layer(net: nn.Module, x: Tensor) -> nn.Module:
    assert isinstance(net, nn.Conv2d)
    return ColumnConv2d.of(net)


def relative_error(fast: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    """Largest difference to float64, over the largest output."""
    with torch.no_grad():
        expected = pruned.double()(x.double())
        found = fast(x)
    return float((found - expected).abs().max() / expected.abs().max())


def training_row(rounds: int, threads: int) -> Row:
    """A step of SGD of the ConvNet, batch 100: dense against compact at 4×."""
    torch.manual_seed(0)
    x, labels = 50 * torch.randn(100, 3, 32, 32), torch.randint(10, (100,))
    pruned = prune_randomly(ConvNet(), 0.75)
    nets: dict[str, nn.Module] = {"compact 0.75": compact(pruned, x).train()}
    for last in (False, True):
        net = ConvNet(channels_last=last)
        net.load_state_dict(pruned.state_dict())
        nets["channels-last" if last else "NCHW"] = net
        compiled: Any = torch.compile(net)
        nets["compiled, channels-last" if last else "compiled"] = compiled

    def step(net: nn.Module) -> Call:
        optimizer = torch.optim.SGD(net.parameters(), 1e-4, 0.9, weight_decay=0.004)

        def call() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), labels)
            loss.backward()
            optimizer.step()
            return loss

        return call

    steps = {key: step(net) for key, net in nets.items()}
    first = {key: float(call()) for key, call in steps.items()}
    error = abs(first["compact 0.75"] / first["NCHW"] - 1)
    return {
        "name": "ConvNet, batch 100, a training step",
        "threads": threads,
        **speedups(in_turns(steps, rounds), {0.75: 0.5}),
        "error": error,
    }


def cells(row: Row) -> list[str]:
    """A row of the table."""
    found = []
    for ratio in RATIOS:
        speedup = row["speedup"].get(str(ratio))
        if speedup is None:
            found.append("")
            continue
        cell = f"{speedup:.2f}×"
        if ratio:
            share, goal = speedup / row["theory"][str(ratio)], row["goals"].get(str(ratio), 0)
            cell += f" = {share:.0%}" + ("" if share >= goal else f" (goal {goal:.0%})")
        found.append(cell)
    dense = f"{row['milliseconds'][row['dense']]['p50']:.3f} ms ({row['dense']})"
    return [row["name"], str(row["threads"]), dense, *found, f"{row['error']:.0e}"]


def summary(rows: list[Row]) -> Iterator[list[str]]:
    """Medians and ranges of the layers' speedups, by kernel and number of threads."""
    for kernel in ("3×3", "1×1"):
        for threads in sorted({row["threads"] for row in rows}):
            chosen = [x for x in rows if x["name"].startswith(kernel) and x["threads"] == threads]
            if not chosen:
                continue
            found = []
            for ratio in RATIOS[1:]:
                values = [row["speedup"][str(ratio)] for row in chosen]
                low, high = min(values), max(values)
                found.append(f"{statistics.median(values):.2f}× ({low:.2f} … {high:.2f})")
            yield [f"{kernel}, {len(chosen)} shapes", str(threads), *found]


def report(rows: list[Row]) -> str:
    """The rows as Markdown."""
    rows = sorted(rows, key=lambda row: (row["threads"], row["name"]))
    head = ["layer or network", "threads", "dense", "R = 0", "0.5", "0.75", "0.9", "error"]
    text = [
        "# Speed of column-pruned convolutions on a CPU",
        "",
        "Measured speedup against the fastest dense way, and its share of the theoretical one (2×,",
        "4×, 10×); a goal is named where it was missed. The error is relative to float64. At R = 0",
        "layers are computed as all columns kept; `compact` would leave them dense where that is",
        "faster. Columns and weights are random, float32 unless a row says otherwise; medians.",
        "Layers first, as medians and ranges:",
        "",
        markdown_table(["layers", "threads", "0.5", "0.75", "0.9"], summary(rows)),
        "",
        markdown_table(head, map(cells, rows)),
    ]
    in_bytes = [row for row in rows if "over float32" in row]
    if in_bytes:
        head = ["int8 over our float32", "threads", *(f"R = {ratio:g}" for ratio in RATIOS)]
        head.append("steps that dense int8 is off, share of outputs off by more than one")
        table = []
        for row in in_bytes:
            off = [f"{key} {most}, {share:.0%}" for key, (most, share) in row["steps off"].items()]
            over = (f"{x:.2f}×" for x in row["over float32"].values())
            table.append([row["name"], row["threads"], *over, "; ".join(off)])
        text += ["", "Int8 over float32, both on kept columns; and how far dense int8 is off,"]
        text += ["where libraries let sums of int16 saturate. Ours are exact. Of one thread, all"]
        text += ["int8 rows are CPU time."]
        text += ["", markdown_table(head, table)]
    recorded = [row for row in rows if "kernels" in row]
    if recorded:
        head = ["kernels that ran, by layers", "threads", *(f"R = {ratio:g}" for ratio in RATIOS)]
        table = [[row["name"], row["threads"], *row["kernels"].values()] for row in recorded]
        text += ["", markdown_table(head, table)]
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
