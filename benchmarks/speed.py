"""How much faster column-pruned layers and networks run on this CPU, against the theory.

    python benchmarks/speed.py --threads 1 2 --save
    python benchmarks/speed.py --only networks --threads 2

The theoretical speedup of a layer is its dense MACs over its MACs without the pruned columns; the
share is the measured speedup over that. "Dense" is the fastest way to run the unpruned layer or
network that was found on the machine: eager PyTorch in NCHW and channels-last, oneDNN with weights
packed before, ``torch.compile`` with frozen weights, and onnxruntime. All contenders run in turns
in one process; in each turn a call is made that isn't timed, then some that are; the times are
medians over the turns. Columns are drawn at random, and every output is compared with float64.
Memory that one contender frees stays with the process: otherwise glibc hands large outputs back to
the system call by call, or doesn't, depending on who came before, and whoever gets new pages pays
for them, up to as much time again as for computing.

Parts: ``layers`` (3×3 of VGG and ResNet, batch 1 and 8), ``pointwise`` (1×1), ``networks``,
``training`` (a step of the compact ConvNet against one of the dense one), ``bfloat16`` (some layers
and networks against the fastest dense way in bfloat16, without onnxruntime). ``--save`` adds the
rows to ``benchmarks/results/speed_ISA.json``, where ISA is the kernels' instruction set, replaces
those of the same name, and writes the Markdown beside it.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import io
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning import ConvNet, compact
from spp_lightning.compaction import ColumnConv2d, instruction_set

RESULTS = Path(__file__).resolve().parent / "results"
RATIOS = (0.0, 0.5, 0.75, 0.9)
GOALS: dict[str, dict[float, float]] = {  # share of the theoretical speedup, per prune ratio
    "layers": {0.5: 0.90, 0.75: 0.90, 0.9: 0.85},
    "pointwise": {0.5: 0.88, 0.75: 0.88, 0.9: 0.78},
    "ConvNet, batch 64": {0.5: 1.00, 0.75: 0.90, 0.9: 0.75},
    "ConvNet, batch 1": {0.5: 0.95, 0.75: 0.85, 0.9: 0.65},
    "ResNet-50, batch 1": {0.5: 0.88, 0.75: 0.75, 0.9: 0.60},
    "VGG-16 convolutions, batch 1": {0.5: 0.90, 0.75: 0.82, 0.9: 0.65},
}
# Channels, filters, kernel, picture.
LAYERS = (
    *((64, 64, 3, 112), (256, 256, 3, 28), (512, 512, 3, 14)),
    *((64, 64, 3, 56), (128, 128, 3, 28), (256, 256, 3, 14)),
)
POINTWISE = ((256, 64, 1, 56), (64, 256, 1, 56), (512, 128, 1, 28), (1024, 256, 1, 14))
HALF = "bfloat16, "  # how the names of its rows start
INSTRUCTION_SETS = ("avx512", "avx2", "base", "none")
MIN_SECONDS = 0.02  # of the timed calls of a turn
PAUSE = 0.01  # seconds before a turn, in which the last contender's threads fall asleep

Call = Callable[[], Any]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and save if asked to. Ends with 1 if an output is wrong."""
    parser = argparse.ArgumentParser(description="Measure pruned layers and networks on the CPU.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parts = ("layers", "pointwise", "networks", "training", "bfloat16")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="of the layers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--report", action="store_true", help="only write the Markdown anew")
    options = parser.parse_args(argv)
    if options.report:
        for file in (_file(name) for name in INSTRUCTION_SETS):
            if file.is_file():
                write_report(json.loads(file.read_text()), file)
        return 0
    warnings.filterwarnings("ignore")  # of the exporters and of torch.compile
    kept = keep_freed_memory()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for row in measure(options.only, options.batch, options.rounds, threads):
            row["context"] = context(options.rounds) | {
                "freed memory": "kept" if kept else "as ever"
            }
            rows.append(row)
            print(line(row), flush=True)
            if options.save:
                save(row)
    right = (row["error"] < (0.02 if row["name"].startswith(HALF) else 1e-5) for row in rows)
    return 0 if all(right) else 1


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for what comes next, where it is glibc's."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    most = 2**25  # the largest mmap threshold that there is
    return mallopt is not None and all(
        [mallopt(trim_threshold, 2**30), mallopt(mmap_threshold, most)]
    )


def measure(
    parts: list[str], batches: list[int], rounds: int, threads: int
) -> Iterator[dict[str, Any]]:
    """The rows of one number of threads."""
    for part, shapes in (("layers", LAYERS), ("pointwise", POINTWISE)):
        if part in parts:
            for batch in batches:
                for channels, filters, kernel, size in shapes:
                    name = f"{kernel}×{kernel} {channels}→{filters} @{size}, batch {batch}"
                    net: nn.Module = nn.Conv2d(channels, filters, kernel, padding=kernel // 2)
                    x = torch.randn(batch, channels, size, size)
                    yield row_of(name, GOALS[part], net, x, _column_layer, rounds, threads)
    if "networks" in parts:
        for name, net, x in networks():
            yield row_of(name, GOALS[name], net, x, compact, rounds, threads)
    if "training" in parts:
        yield training_row(rounds, threads)
    if "bfloat16" in parts:
        for channels, filters, kernel, size in (*LAYERS[3:], POINTWISE[0]):
            name = f"{HALF}{kernel}×{kernel} {channels}→{filters} @{size}, batch 8"
            net = nn.Conv2d(channels, filters, kernel, padding=kernel // 2).bfloat16()
            x = torch.randn(8, channels, size, size).bfloat16()
            yield row_of(name, {}, net, x, _column_layer, rounds, threads)
        for name, net, x in networks():
            yield row_of(HALF + name, {}, net.bfloat16(), x.bfloat16(), compact, rounds, threads)


def networks() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The networks, with random weights, and their inputs."""
    torch.manual_seed(0)
    for batch in (64, 1):
        yield f"ConvNet, batch {batch}", ConvNet(), 50 * torch.randn(batch, 3, 32, 32)
    x = torch.randn(1, 3, 224, 224)
    yield "ResNet-50, batch 1", torchvision.models.resnet50(), x
    yield "VGG-16 convolutions, batch 1", torchvision.models.vgg16().features, x


def row_of(
    name: str,
    goals: dict[float, float],
    net: nn.Module,
    x: Tensor,
    make: Callable[[nn.Module, Tensor], nn.Module],
    rounds: int,
    threads: int,
) -> dict[str, Any]:
    """Dense variants and compact networks of all ratios, timed in turns."""
    net.eval().requires_grad_(False)
    calls: dict[str, Call] = dict(dense_calls(net, x, threads))
    error, theory = 0.0, {}
    for ratio in RATIOS:
        pruned, theory[ratio] = prune_randomly(net, ratio)
        fast = make(pruned, x).requires_grad_(False)
        error = max(error, relative_error(fast, pruned, x))
        calls[f"compact {ratio}"] = partial(fast, x)
    with torch.no_grad():
        times = in_turns(calls, rounds)
    dense = {key: value for key, value in times.items() if not key.startswith("compact")}
    fastest = min(dense, key=lambda key: statistics.median(dense[key]))
    speedups = {
        str(ratio): statistics.median(dense[fastest]) / statistics.median(times[f"compact {ratio}"])
        for ratio in RATIOS
    }
    return {
        "name": name,
        "threads": threads,
        "milliseconds": {key: quantiles(value) for key, value in times.items()},
        "dense": fastest,
        "speedup": speedups,
        "theory": {str(ratio): value for ratio, value in theory.items()},
        "goals": {str(ratio): goal for ratio, goal in goals.items()},
        "error": error,
    }


def _column_layer(net: nn.Module, x: Tensor) -> nn.Module:
    assert isinstance(net, nn.Conv2d)
    return ColumnConv2d.of(net)


def prune_randomly(net: nn.Module, ratio: float) -> tuple[nn.Module, float]:
    """A copy with ``ratio`` of every convolution's columns 0, and its theoretical speedup."""
    pruned = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    for layer in pruned.modules():
        if isinstance(layer, nn.Conv2d):
            matrix = layer.weight.data.flatten(1)
            count = matrix.shape[1]
            out = torch.randperm(count, generator=generator)[: round(ratio * count)]
            layer.weight.data.copy_(matrix.index_fill(1, out, 0).view(layer.weight.shape))
    return pruned, 1 / (1 - ratio)


def dense_calls(net: nn.Module, x: Tensor, threads: int) -> Iterator[tuple[str, Call]]:
    """The ways to run the unpruned network."""
    first = copy.deepcopy(net).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if isinstance(first, ConvNet):
        first.channels_last = False
    yield "eager", lambda: first(x)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.contiguous(memory_format=torch.channels_last)
    yield "eager, channels-last", lambda: last(x_last)
    if isinstance(net, nn.Conv2d):
        yield "oneDNN, packed", packed_call(net, x)
    else:  # a compiled convolution is one of oneDNN with packed weights
        for key, module, batch in (("", first, x), (", channels-last", last, x_last)):
            torch._dynamo.reset()
            compiled = torch.compile(module, options={"freezing": True})
            with torch.no_grad():
                compiled(batch)
            yield f"compiled{key}", partial(compiled, batch)
    if x.dtype == torch.float32:
        yield "onnxruntime", onnx_call(first, x, threads)


def packed_call(conv: nn.Conv2d, x: Tensor) -> Call:
    """The layer in oneDNN, with weights in its own layout."""
    shape = ([*conv.padding], [*conv.stride], [*conv.dilation], conv.groups)
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
        conv.weight.detach().to_mkldnn(), *shape, list(x.shape)
    )
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda: run(x, packed, conv.bias, *shape, "none", [], "")


def onnx_call(net: nn.Module, x: Tensor, threads: int) -> Call:
    """The network in onnxruntime, which optimizes it as well."""
    file: Any = io.BytesIO()
    torch.onnx.export(net, (x,), file, dynamo=False, input_names=["x"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would go on spinning on the cores that the next contender needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)


def relative_error(fast: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    """Largest difference to float64, over the largest output."""
    with torch.no_grad():
        expected = pruned.double()(x.double())
        found = fast(x)
    return float((found - expected).abs().max() / expected.abs().max())


def in_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call, one number per contender and round."""
    repeats = {}
    for key, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[key] = max(1, round(MIN_SECONDS / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {key: [] for key in calls}
    order = list(calls)
    for turn in range(rounds):
        for key in order[turn % len(order) :] + order[: turn % len(order)]:
            time.sleep(PAUSE)
            calls[key]()
            start = time.perf_counter()
            for _ in range(repeats[key]):
                calls[key]()
            times[key].append((time.perf_counter() - start) / repeats[key])
    return times


def training_row(rounds: int, threads: int) -> dict[str, Any]:
    """A step of SGD of the ConvNet, batch 100: dense against compact at 4×."""
    torch.manual_seed(0)
    x, labels = 50 * torch.randn(100, 3, 32, 32), torch.randint(10, (100,))
    pruned, theory = prune_randomly(ConvNet(), 0.75)
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
    times = in_turns(steps, rounds)
    dense = {key: value for key, value in times.items() if not key.startswith("compact")}
    fastest = min(dense, key=lambda key: statistics.median(dense[key]))
    speedup = statistics.median(dense[fastest]) / statistics.median(times["compact 0.75"])
    return {
        "name": "ConvNet, batch 100, a training step",
        "threads": threads,
        "milliseconds": {key: quantiles(value) for key, value in times.items()},
        "dense": fastest,
        "speedup": {"0.75": speedup},
        "theory": {"0.75": theory},
        "goals": {"0.75": 0.5},
        "error": error,
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """20 %, 50 % and 80 % of the times, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "p20": round(cuts[0] * 1e3, 4),
        "p50": round(statistics.median(seconds) * 1e3, 4),
        "p80": round(cuts[3] * 1e3, 4),
    }


def context(rounds: int) -> dict[str, Any]:
    """Where and with what the numbers were taken."""
    commit = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    return {
        "processor": _processor(),
        "instruction set": instruction_set(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "rounds": rounds,
        "date": date.today().isoformat(),
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = []
    for ratio in RATIOS:
        speedup = row["speedup"].get(str(ratio))
        if speedup is None:
            cells.append("")
            continue
        cell = f"{speedup:.2f}×"
        if ratio:
            share, goal = speedup / row["theory"][str(ratio)], row["goals"].get(str(ratio), 0)
            cell += f" = {share:.0%}" + ("" if share >= goal else f" (goal {goal:.0%})")
        cells.append(cell)
    dense = row["milliseconds"][row["dense"]]["p50"]
    parts = [row["name"], row["threads"], f"{dense:.3f} ms ({row['dense']})", *cells]
    return f"| {' | '.join(str(part) for part in parts)} | {row['error']:.0e} |"


def save(row: dict[str, Any]) -> None:
    """Add a row to the results of its instruction set, in the place of an older one of its name."""
    file = _file(row["context"]["instruction set"])
    rows = json.loads(file.read_text()) if file.is_file() else []
    same = (row["name"], row["threads"])
    rows = [old for old in rows if (old["name"], old["threads"]) != same] + [row]
    rows.sort(key=lambda x: (x["threads"], x["name"]))
    file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    write_report(rows, file)


def _file(instruction_set: str) -> Path:
    return RESULTS / f"speed_{instruction_set}.json"


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Medians and ranges of the layers' speedups, by kernel and number of threads."""
    yield "| layers | threads | 0.5 | 0.75 | 0.9 |"
    yield "| --- | --- | --- | --- | --- |"
    for kernel in ("3×3", "1×1"):
        for threads in sorted({row["threads"] for row in rows}):
            chosen = [x for x in rows if x["name"].startswith(kernel) and x["threads"] == threads]
            cells = []
            for ratio in RATIOS[1:]:
                values = [row["speedup"][str(ratio)] for row in chosen]
                if values:
                    low, high = min(values), max(values)
                    cells.append(f"{statistics.median(values):.2f}× ({low:.2f} … {high:.2f})")
            if cells:
                yield f"| {kernel}, {len(chosen)} shapes | {threads} | {' | '.join(cells)} |"


def write_report(rows: list[dict[str, Any]], file: Path) -> None:
    """Write the Markdown beside a file of rows."""
    head = "| layer or network | threads | dense | R = 0 | 0.5 | 0.75 | 0.9 | error |"
    text = [
        "# Speed of column-pruned convolutions on a CPU",
        "",
        "Measured speedup against the fastest dense way, and its share of the theoretical one (2×,",
        "4×, 10×); a goal is named where it was missed. The error is relative to float64. At R = 0",
        "layers are computed as all columns kept; `compact` would leave them dense where that is",
        "faster. Layers first, as medians and ranges:",
        "",
        *summary(rows),
        "",
        head,
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(line(x) for x in rows),
        "",
        "`python benchmarks/speed.py --save`; random columns, random weights; float32 where a row",
        "doesn't say otherwise; medians.",
        *context_lines(rows),
    ]
    file.with_suffix(".md").write_text("\n".join(text) + "\n")


def context_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What rows were measured with; where that differs, most rows' first, then which others'."""
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        text = ", ".join(f"{key} {value}" for key, value in row["context"].items())
        rows_of.setdefault(text, []).append(row)
    for i, text in enumerate(sorted(rows_of, key=lambda x: -len(rows_of[x]))):
        if i == 0:
            yield f"{text}."
            continue
        for threads in sorted({row["threads"] for row in rows_of[text]}):
            names = [row["name"] for row in rows_of[text] if row["threads"] == threads]
            yield f"\n{'; '.join(names)} (threads: {threads}): {text}."


if __name__ == "__main__":
    sys.exit(main())
