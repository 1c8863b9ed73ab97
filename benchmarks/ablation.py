"""What each CPU kernel is worth: how many times longer a network's layers take without it.

    python benchmarks/ablation.py
    python benchmarks/ablation.py --only VGG-16 --rounds 9 --save

Takes the convolutions of a network that compact networks compute by kernels of their own, at a
batch of 1, with columns drawn at random and a ReLU behind them. Each layer is computed by every
kernel that can, with all threads and with one. Its time with all kernels is that of the fastest;
without a kernel, that of the fastest of the others. A network's time is the sum over its layers. A
kernel that isn't worth 5 % in any row needs another reason to be there.

Times are the fastest of some rounds in which the kernels take turns. ``--save`` adds the rows to
``benchmarks/results/ablation_ISA.json``, where ISA is the instruction set, and writes the Markdown
beside it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torchvision
from harness.context import context
from harness.results import Results, markdown_table
from torch import Tensor, nn

from spp_lightning import ConvNet
from spp_lightning.compaction.epilogue import RELU
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.kernels.cpu.config import Kernel, KernelConfig
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.kernels.cpu.library import instruction_set
from spp_lightning.compaction.spec import ConvSpec

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the side of an image
    "ConvNet": (ConvNet, 32),
    "ResNet-18": (torchvision.models.resnet18, 224),
    "ResNet-50": (torchvision.models.resnet50, 224),
    "VGG-16": (torchvision.models.vgg16, 224),
    "DenseNet-121": (torchvision.models.densenet121, 224),
    "MobileNetV3-large": (torchvision.models.mobilenet_v3_large, 224),
}
FEWER = (1, 2, 4, 10)  # times fewer columns
WINOGRAD = (Kernel.WINOGRAD_4, Kernel.WINOGRAD_2)
WITHOUT: dict[str, tuple[Kernel, ...]] = {
    "pixel-vectorised": (Kernel.PIXELS,),
    "channel-blocked": (Kernel.CHANNELS,),
    "Winograd 4×4": (Kernel.WINOGRAD_4,),
    "Winograd 2×2": (Kernel.WINOGRAD_2,),
    "both Winograd": WINOGRAD,
}
SECONDS = 0.001  # of a turn, at least

Layer = tuple[Geometry, tuple[int, int]]  # and the size of its input


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    for name in options.only:
        make, size = NETWORKS[name]
        layers = layers_of(make().eval(), torch.zeros(1, 3, size, size))
        for threads in options.threads:
            torch.set_num_threads(threads)
            for fewer in FEWER:
                row = row_of(name, layers, fewer, threads, options.rounds)
                print(" | ".join(cells(row)), flush=True)
                if options.save:
                    about = context("torchvision", rounds=options.rounds)
                    Results(f"ablation_{instruction_set()}", report).add(row | {"context": about})


def layers_of(net: nn.Module, x: Tensor) -> Counter[Layer]:
    """The convolutions that have kernels of their own, and how often they run."""
    found: Counter[Layer] = Counter()

    def note(conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        pairs = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        shape = Geometry(conv.in_channels, conv.out_channels, *pairs, groups=conv.groups)  # type: ignore[arg-type]
        found[shape, tuple(inputs[0].shape[2:])] += 1  # type: ignore[index]

    for module in net.modules():
        # Depthwise convolutions stay dense.
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.register_forward_pre_hook(note)  # type: ignore[arg-type]
    with torch.no_grad():
        net(x)
    return found


def row_of(
    name: str, layers: Counter[Layer], fewer: int, threads: int, rounds: int
) -> dict[str, Any]:
    """A network's milliseconds, and by what they grow without a kernel."""
    times = {layer: milliseconds(layer, fewer, threads, rounds) for layer in layers}

    def total(without: tuple[Kernel, ...]) -> float:
        return sum(
            count * min(ms for kernel, ms in times[layer].items() if kernel not in without)
            for layer, count in layers.items()
        )

    everything = total(())
    return {
        "name": f"{name}, {fewer}×",
        "threads": threads,
        "milliseconds": everything,
        "without": {key: total(kernels) / everything for key, kernels in WITHOUT.items()},
    }


@cache
def milliseconds(layer: Layer, fewer: int, threads: int, rounds: int) -> dict[Kernel, float]:
    """A layer's time by kernel, with all threads or one, whichever is faster."""
    geometry, size = layer
    torch.manual_seed(0)
    kept = max(1, geometry.num_columns // fewer)
    columns = torch.randperm(geometry.num_columns)[:kept].sort().values.int()
    weight = torch.randn(geometry.filters, kept) / kept**0.5
    handle = Handle(weight, columns, torch.randn(geometry.filters), ConvSpec(geometry, RELU))
    x = torch.randn(1, geometry.channels, *size)
    calls = []
    for kernel in kernels_of(geometry):
        for count in {threads, 1}:
            prepared = handle.prepare(x.shape, x.dtype, KernelConfig(kernel, count))
            out = torch.empty(prepared.out_shape)
            calls.append((kernel, partial(handle.run, prepared, x, None, out)))
    repeats = [max(1, round(SECONDS / seconds(call, 1))) for _, call in calls]
    best: dict[Kernel, float] = {}
    for _ in range(rounds):
        for (kernel, call), count in zip(calls, repeats, strict=True):
            best[kernel] = min(best.get(kernel, float("inf")), 1000 * seconds(call, count))
    return best


def kernels_of(geometry: Geometry) -> list[Kernel]:
    """The kernels that can compute a layer in float32."""
    is_plain = (geometry.stride, geometry.dilation, geometry.groups) == ((1, 1), (1, 1), 1)
    winograd = WINOGRAD if is_plain and geometry.kernel_size == (3, 3) else ()
    return [Kernel.PIXELS, Kernel.CHANNELS, *winograd]


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of a call: the mean of some, after one that isn't timed."""
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    shares = (f"{row['without'][key]:.2f}" for key in WITHOUT)
    return [row["name"], str(row["threads"]), f"{row['milliseconds']:.2f}", *shares]


def report(rows: list[dict[str, Any]]) -> str:
    """The Markdown of saved rows."""
    head = ["network, columns fewer", "threads", "ms", *(f"without {key}" for key in WITHOUT)]
    return "\n".join(
        [
            "# What each CPU kernel is worth",
            "",
            "Milliseconds of a network's convolutions at batch 1, each by its fastest kernel; then",
            "how many times as long they take without a kernel: 1.16 is 16 % longer, 1.00 means",
            "that it is not needed. Columns are drawn at random; depthwise convolutions are left",
            "out.",
            "",
            markdown_table(head, map(cells, rows)),
        ]
    )


if __name__ == "__main__":
    main()
