"""Time of whole networks in int8: pruned ones here, unpruned ones in other libraries.

    python benchmarks/int8_networks.py --threads 1 --save
    python benchmarks/int8_networks.py --batch 8 --only ResNet-18 --save

Networks with random weights are quantised on random images: by onnxruntime's static quantisation
(per filter, QDQ) for onnxruntime and OpenVINO, and by ``quantize_compact`` with random columns
pruned. Depthwise convolutions keep all columns, and stay float32 here. All contenders of a network
take turns in one process. With one thread the times are of the CPU, since other programs on the
machine disturb those less.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torchvision
from harness.arguments import each_thread_count, make_parser, quiet
from harness.context import context
from harness.dense import onnx_bytes, onnx_session_call, openvino_call
from harness.results import Results, Row, markdown_table
from harness.rounds import Call, in_turns, keep_freed_memory, now, quantiles, ratio
from harness.workloads import IMAGENET, NETWORKS, RATIOS, prune_randomly
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from spp_lightning import compact, quantize_compact

MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: NETWORKS[f"{name}, batch 1"][0]
        for name in ("ResNet-18", "ResNet-50", "VGG-16 convolutions")
    },
    "MobileNetV3-large": torchvision.models.mobilenet_v3_large,
}
DENSE = ("onnxruntime int8", "OpenVINO int8")
GOAL = 2.5  # times as fast as the fastest dense int8, at 4 times fewer columns
IMAGES = 4  # to calibrate with, or a batch


class Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Images in batches of one size."""

    def __init__(self, images: Tensor, batch: int) -> None:
        self.left = iter(images.split(batch))

    def get_next(self) -> dict[str, object] | None:
        """The next batch as an input of the model."""
        images = next(self.left, None)
        return None if images is None else {"x": images.numpy()}


def dense_int8(net: nn.Module, images: Tensor, batch: int = 1) -> bytes:
    """The network as an ONNX file that onnxruntime's quantiser made int8.

    Args:
        net: The network.
        images: What it is calibrated on, ``(a multiple of batch, C, H, W)``.
        batch: Images that the model takes at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, ready, made = (Path(folder, f"{name}.onnx") for name in ("float", "ready", "int8"))
        given.write_bytes(onnx_bytes(net, images[:batch]))
        quant_pre_process(given, ready, skip_symbolic_shape=True)
        batches = Images(images, batch)
        quantize_static(ready, made, batches, QuantFormat.QDQ, per_channel=True)
        return made.read_bytes()


def pruned_calls(
    net: nn.Module, images: Tensor, batch: int, ratios: tuple[float, ...]
) -> Iterator[tuple[str, Call]]:
    """Compact networks in float32 and in int8, by the share of pruned columns."""
    for share in ratios:
        fast = compact(prune_randomly(net, share), images[:batch])
        quantized = quantize_compact(fast, [images])
        yield f"float32 {share:g}", partial(fast, images[:batch])
        yield f"int8 {share:g}", partial(quantized, images[:batch])


@torch.no_grad()
def measure(name: str, batch: int, threads: int, rounds: int, ratios: tuple[float, ...]) -> Row:
    """All contenders of a network."""
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(max(IMAGES, batch), *IMAGENET, generator=generator)
    model = dense_int8(net, images, batch)
    ways = {"onnxruntime int8": onnx_session_call, "OpenVINO int8": openvino_call}
    calls = {key: way(model, images[:batch], threads) for key, way in ways.items()}
    calls |= dict(pruned_calls(net, images, batch, ratios))
    times = in_turns(calls, rounds, time.process_time if threads == 1 else now)
    ms = {key: quantiles(values) for key, values in times.items()}
    best = min(DENSE, key=lambda key: ms[key]["p50"])
    return {
        "name": f"{name}, batch {batch}",
        "threads": threads,
        "ms": ms,
        "dense": best,
        "speedup": {key: ratio(times[best], times[key]) for key in times if key not in DENSE},
        "ratios": list(ratios),
        "goal": GOAL,
        "rounds": rounds,
    }


def report(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = ["network", "threads", *(f"{key}, ms" for key in DENSE), "ours in"]
    head += [f"R = {share:g}" for share in RATIOS]
    cells = []
    for row in rows:
        for precision in ("int8", "float32"):
            first = [row["name"], row["threads"]]
            first += [f"{row['ms'][key]['p50']:.2f}" for key in DENSE]
            speedups = [row["speedup"].get(f"{precision} {share:g}") for share in RATIOS]
            cells.append(
                [*first, precision, *("" if x is None else f"{x[1]:.2f}×" for x in speedups)]
            )
    return (
        "Whole networks, random weights. Dense int8 is onnxruntime's static quantisation, per"
        " filter; our networks keep 1, 1/2, 1/4 and 1/10 of their columns, all of depthwise layers,"
        " which stay float32. Speedups are over the faster of the two, medians of the rounds'"
        f" ratios; the goal for int8 is {GOAL}× at R = 0.75. Of one thread, times are of the"
        " CPU.\n\n" + markdown_table(head, cells)
    )


def main() -> None:
    """Measure, print, and save if asked to."""
    parser = make_parser(__doc__, rounds=9, threads=[1])
    parser.add_argument("--only", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    options = parser.parse_args()
    quiet()
    keep_freed_memory()
    ratios = (0.75,) if options.quick else RATIOS
    about = context("onnxruntime", "openvino", "torchvision", seed=0)
    results = Results("int8_networks", report)
    for threads in each_thread_count(options):
        for name, batch in product(options.only, options.batch):
            row = measure(name, batch, threads, options.rounds, ratios) | {"context": about}
            print("\n".join(report([row]).splitlines()[-2:]), flush=True)
            if options.save:
                results.add(row)


if __name__ == "__main__":
    main()
