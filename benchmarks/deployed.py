"""Time of compact networks in onnxruntime, against the same networks in PyTorch.

    python benchmarks/deployed.py --threads 1 2 --save
    python benchmarks/deployed.py --precision int8 --threads 1 2 --save

Prunes ConvNet and ResNets randomly to 4 times fewer columns, compacts them, quantises them where
int8 is asked for, exports them by ``export_onnx``, and times both in turns in one process.
onnxruntime computes its own operators in one thread, since few are left, and this package's in as
many as PyTorch uses.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import onnxruntime
import torch
from harness.arguments import each_thread_count, make_parser, quiet
from harness.context import context
from harness.results import Results, Row, markdown_table
from harness.rounds import Call, keep_freed_memory, orders, quantiles, ratio, turn_ms
from harness.workloads import network, prune_randomly
from torch import Tensor, nn

from spp_lightning import compact, export_onnx, onnx_library, quantize_compact

NETWORKS = ("ConvNet", "ResNet-18", "ResNet-50")
PRECISIONS = ("float32", "int8")
BATCHES = (1, 8)
RATIO = 4.0
GOAL = 0.9  # of PyTorch's speed
SECONDS = 6.0  # of a row, by default


def session_call(path: Path, x: Tensor, threads: int) -> Call:
    """A call of a model in onnxruntime, with some threads for this package's operators."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("spp_lightning.threads", str(threads))
    options.register_custom_ops_library(str(onnx_library()))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"input": x.numpy()}
    return partial(session.run, None, feed)


def torch_call(net: nn.Module, x: Tensor) -> Call:
    """A call of a network in PyTorch."""

    def call() -> Tensor:
        with torch.inference_mode():
            y: Tensor = net(x)
            return y

    return call


def in_single_calls(calls: dict[str, Call], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a call, per contender and round; a turn is one call behind an untimed one.

    There are ``rounds`` rounds, or more in ``seconds``. Other programs interrupt few calls that are
    short. In longer turns, and with pauses between them, two threads that wait for each other were
    interrupted in most turns, and the ratios changed from run to run.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < rounds or time.perf_counter() - start < seconds:
        for order in orders(list(calls), len(calls)):
            for name in order:
                times[name].append(turn_ms(calls[name], 1))
    return times


def measure(
    name: str, precision: str, batch: int, threads: int, rounds: int, seconds: float
) -> Row:
    """Times of a network in both, and whether the outputs are the same."""
    net, image = network(f"{name}, batch 1")
    net.eval()
    x = image.repeat(batch, 1, 1, 1)
    fast = compact(prune_randomly(net, 1 - 1 / RATIO), x)
    if precision == "int8":
        fast = quantize_compact(fast, [x])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.onnx")
        export_onnx(fast, path, x)
        calls = {"PyTorch": torch_call(fast, x), "onnxruntime": session_call(path, x, threads)}
    expected, found = calls["PyTorch"](), torch.from_numpy(calls["onnxruntime"]()[0])
    times = in_single_calls(calls, rounds, seconds)
    kind = "" if precision == "float32" else f" {precision}"
    return {
        "name": f"{name}{kind}, batch {batch}",
        "threads": threads,
        "ms": {key: quantiles(values) for key, values in times.items()},
        "speed": ratio(times["PyTorch"], times["onnxruntime"]),
        "difference": float((found - expected).abs().max() / expected.abs().max()),
        "goal": GOAL,
        "rounds": len(times["PyTorch"]),
    }


def report(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = ["network", "threads", "rounds", "PyTorch, ms", "onnxruntime, ms", "speed", "difference"]
    table = [
        [
            *(row["name"], row["threads"], row["rounds"]),
            *(f"{row['ms'][key]['p50']:.3f}" for key in ("PyTorch", "onnxruntime")),
            f"**{row['speed'][1]:.2f}** ({row['speed'][0]:.2f}–{row['speed'][2]:.2f})",
            f"{row['difference']:.0e}",
        ]
        for row in rows
    ]
    return (
        "Compact networks with 4 times fewer columns, random ones, float32 where no other precision"
        " is said, exported by `export_onnx` and run in onnxruntime, beside the same networks in"
        " PyTorch. Medians of single calls in turns. Speed: PyTorch's time over onnxruntime's"
        f" within a round, median and quartiles; the goal is {GOAL}. Difference: of the outputs,"
        " over the largest output. Load: processes that wanted the cores when the measurement"
        " began. Where two threads take longer than one, they waited for cores that other programs"
        " had, and the ratio says little about the kernels.\n\n" + markdown_table(head, table)
    )


def main() -> None:
    """Measure, print, and save if asked to."""
    parser = make_parser(__doc__, rounds=12)
    parser.add_argument("--only", choices=NETWORKS, nargs="+", default=NETWORKS)
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=PRECISIONS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a row, at least")
    options = parser.parse_args()
    quiet()
    keep_freed_memory()
    about = context("onnxruntime", "onnx", "torchvision", seed=0, load=round(os.getloadavg()[0]))
    results = Results("onnx_avx2", report)
    batches = BATCHES[:1] if options.quick else BATCHES
    for threads in each_thread_count(options):
        for name, precision, batch in product(options.only, options.precision, batches):
            row = measure(name, precision, batch, threads, options.rounds, options.seconds)
            row |= {"context": about}
            print(report([row]).splitlines()[-1], flush=True)
            if options.save:
                results.add(row)


if __name__ == "__main__":
    main()
