"""How fast the Triton kernels compute column-pruned convolutions, beside cuDNN's dense ones.

    python benchmarks/speed_gpu.py --save
    python benchmarks/speed_gpu.py --backward --layers "256@28"

Every contender runs a few times over inputs in turns, captured in a CUDA graph, so that the time to
launch kernels doesn't count. The graphs are replayed in turns; reported are medians over the
rounds. Dense is the faster of cuDNN in NCHW and in channels-last (``cudnn.benchmark`` on), pruned
likewise; the share is that of the speedup 1 / (1 - R) which the removed MACs would give. Outputs
are compared with float64 first. Columns are drawn at random.

``--save`` writes ``benchmarks/results/speed_gpu.json`` and ``.md``, or ``speed_gpu_backward``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness.arguments import make_parser
from harness.context import context
from harness.results import Results, Row, markdown_table
from harness.rounds import orders
from harness.workloads import LAYERS as SHAPES
from harness.workloads import RATIOS
from torch import Tensor
from torch.nn import functional as F

from spp_lightning.compaction.kernels import gpu as kernels

LAYERS = {f"{c}@{size}": (c, size) for c, _, _, size in SHAPES}  # 3×3, VGG-16's and ResNets'
DTYPES = {"float16": torch.float16, "tf32": torch.float32}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
INPUTS = 4  # different ones in turn
GEOMETRY = ((3, 3), (1, 1), (1, 1), (1, 1), 1)  # kernel size, stride, padding, dilation, groups

Contender = Callable[[int], Any]  # computes input i


def pruned(x: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Kept columns in the order that fits x, their weights, and the dense weight."""
    channels = x.shape[1]
    total = channels * 9
    kept = torch.randperm(total, device=x.device)[: total - round(ratio * total)]
    columns = kept.sort().values.int()
    if not x.is_contiguous():
        columns = columns[kernels.channels_last_order(columns, (3, 3), 1, channels)]
    weight = torch.randn(channels, len(columns), device=x.device, dtype=x.dtype) / total**0.5
    dense = x.new_zeros(channels, total)
    dense[:, columns.long()] = weight
    return columns, weight, dense.unflatten(1, (channels, 3, 3))


def contenders(
    channels: int, size: int, batch: int, dtype: torch.dtype, backward: bool
) -> dict[str, Contender]:
    """Functions to time by name, checked: "dense NCHW", "0.75 NHWC" and so on."""
    functions: dict[str, Contender] = {}
    for layout, form in LAYOUTS.items():

        def draw(form: torch.memory_format = form) -> list[Tensor]:
            shape = (batch, channels, size, size)
            values = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(INPUTS)]
            return [value.contiguous(memory_format=form) for value in values]

        xs, gs = draw(), draw()
        for ratio in RATIOS:
            columns, weight, dense = pruned(xs[0], ratio)
            table = kernels.column_table(columns, xs[0], (3, 3), (1, 1))
            full = dense.contiguous(memory_format=form)

            def cudnn(i: int, xs: list[Tensor] = xs, gs: Any = gs, full: Tensor = full) -> Any:
                if not backward:
                    return F.conv2d(xs[i], full, padding=1)
                return torch.ops.aten.convolution_backward(
                    *(gs[i], xs[i], full, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1),
                    (True, True, False),
                )[:2]

            def ours(
                i: int,
                xs: list[Tensor] = xs,
                gs: list[Tensor] = gs,
                columns: Tensor = columns,
                weight: Tensor = weight,
                table: Tensor = table,
            ) -> Any:
                if not backward:
                    return kernels.column_conv2d(
                        xs[i], weight, columns, None, *GEOMETRY, table=table
                    )
                return (
                    kernels.column_conv2d_backward_input(
                        gs[i], weight, columns, tuple(xs[i].shape), *GEOMETRY
                    ),
                    kernels.column_conv2d_backward_weight(
                        gs[i], xs[i], columns, *GEOMETRY, table=table
                    ),
                )

            if not ratio:
                functions[f"dense {layout}"] = cudnn
            check(ours(0), xs[0], gs[0], dense, columns, backward)
            functions[f"{ratio:g} {layout}"] = ours
    return functions


def check(result: Any, x: Tensor, g: Tensor, dense: Tensor, columns: Tensor, back: bool) -> None:
    """Compare with float64, and refuse to time what is wrong."""
    x, g, dense = (t.double().contiguous() for t in (x, g, dense))
    if back:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            *(g, x, dense, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1), (True, True, False)
        )
        pairs = [(result[0], dx), (result[1], dw.flatten(1)[:, columns.long()])]
    else:
        pairs = [(result, F.conv2d(x, dense, padding=1))]
    for got, expected in pairs:
        error = ((got.double() - expected).norm() / expected.norm()).item()
        if not error < 2e-3:
            raise AssertionError(f"A relative error of {error:.2g} against float64.")


def captured(function: Contender) -> torch.cuda.CUDAGraph:
    """A graph that runs a function on all inputs."""
    for i in range(INPUTS):  # tunes
        function(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(INPUTS):
            function(i)
    return graph


def medians(functions: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Milliseconds of a call, by function."""
    graphs = {name: captured(function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for order in orders(list(graphs), rounds):
        for name in order:
            graph = graphs[name]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # so that all start alike, with warm caches and clocks
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / INPUTS)
    return {name: statistics.median(values) for name, values in times.items()}


def report(rows: list[Row]) -> str:
    """A table: dense, then time, speedup and share of what the MACs promise."""
    table = []
    for row in rows:
        times = row["ms"]
        dense = min(times[f"dense {layout}"] for layout in LAYOUTS)
        cells = []
        for ratio in RATIOS:
            layout = min(LAYOUTS, key=lambda layout: times[f"{ratio:g} {layout}"])
            ms = times[f"{ratio:g} {layout}"]
            cells.append(f"{ms:.3f} ms {layout}, {dense / ms:.2f}×, {dense / ms * (1 - ratio):.0%}")
        both = " / ".join(f"{times[f'dense {layout}']:.3f}" for layout in LAYOUTS)
        table.append([row["name"], both, *cells])
    head = ["layer, dtype", "cuDNN NCHW / NHWC, ms", *(f"R = {ratio:g}" for ratio in RATIOS)]
    return markdown_table(head, table)


def main() -> None:
    """Measure what the command line names."""
    parser = make_parser(__doc__, rounds=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--backward", action="store_true", help="both gradients, not the output")
    options = parser.parse_args()
    if not (torch.cuda.is_available() and kernels.is_available()):
        sys.exit("This needs a GPU and Triton.")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions do by default
    torch.manual_seed(0)
    about = context("triton", device="cuda") | {
        "cuDNN": torch.backends.cudnn.version(),
        "rounds": options.rounds,
    }
    rows = []
    for layer in options.layers:
        for dtype in options.dtypes:
            name = f"{layer}, {dtype}, batch {options.batch}"
            functions = contenders(*LAYERS[layer], options.batch, DTYPES[dtype], options.backward)
            rows.append({"name": name, "ms": medians(functions, options.rounds), "context": about})
            print(report(rows[-1:]), flush=True)
    if options.save:
        Results(f"speed_gpu{'_backward' if options.backward else ''}", report).add(*rows)


if __name__ == "__main__":
    main()
