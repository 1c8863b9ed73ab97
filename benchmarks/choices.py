"""How much time the cost model's choices lose against the fastest kernel, layer by layer.

    python benchmarks/choices.py --save

Every convolution of some networks runs with each kernel that computes it, at several shares of kept
columns, and as a dense layer. The model's choice is compared with what was fastest: how often they
agree, how much longer all choices take than all fastest ones, and the layer that loses most of its
network's time. One thread, CPU time of that thread, the least of some calls in turns: other
programs on the machine disturb that least.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torchvision
from harness.arguments import Options, make_parser
from harness.context import context
from harness.results import Results, markdown_table
from harness.workloads import prune_randomly
from torch import Tensor, nn

from spp_lightning import ConvNet
from spp_lightning.compaction import ColumnConv2d
from spp_lightning.compaction.graph.replace import decide
from spp_lightning.compaction.kernels.cpu.config import WINOGRAD, Kernel, KernelConfig
from spp_lightning.compaction.kernels.cpu.handle import Handle

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ConvNet, batch 1": (ConvNet, (1, 3, 32, 32)),
    "ConvNet, batch 64": (ConvNet, (64, 3, 32, 32)),
    "ResNet-18": (torchvision.models.resnet18, (1, 3, 224, 224)),
    "ResNet-50": (torchvision.models.resnet50, (1, 3, 224, 224)),
    "MobileNetV3": (torchvision.models.mobilenet_v3_large, (1, 3, 224, 224)),
    "DenseNet-121": (torchvision.models.densenet121, (1, 3, 224, 224)),
}
RATIOS = (0.0, 0.5, 0.75, 0.9)
QUICK = 2  # networks
BUDGET = 0.3  # seconds per layer and ratio, after which there are no more rounds than three
HEAD = ("network", "pruned", "layers", "kernel is the fastest", "time lost", "worst layer")
DENSE_HEAD = ("dense or compact is right", "time lost")

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and save if asked to."""
    options: Options = make_parser(__doc__, rounds=15, threads=[1]).parse_args(argv)
    torch.set_num_threads(1)
    rows = list(measure(options))
    print(report(rows))
    if options.save:
        Results("choices", report).replace(rows)


def measure(options: Options) -> Iterator[Row]:
    """A row per network and pruning ratio."""
    for name in list(NETWORKS)[: QUICK if options.quick else None]:
        make, shape = NETWORKS[name]
        net = make().eval().requires_grad_(False)
        for ratio in RATIOS:
            layers = list(layers_of(prune_randomly(net, ratio), torch.randn(shape)))
            known: dict[str, tuple[Row, Row]] = {}
            for conv, x in layers:  # many are alike
                key = f"{conv} {tuple(x.shape)}"
                if key not in known:
                    known[key] = measure_layer(conv, x, options.rounds)
            found = [known[f"{conv} {tuple(x.shape)}"] for conv, x in layers]
            yield {
                "name": f"{name}, {ratio:.0%} pruned",
                "threads": 1,
                "network": name,
                "ratio": ratio,
                "layers": len(found),
                "kernel": summary([kernel for kernel, _ in found]),
                "dense": summary([dense for _, dense in found]),
                "context": context("torch", "torchvision", rounds=options.rounds),
            }


def layers_of(net: nn.Module, x: Tensor) -> Iterator[tuple[nn.Conv2d, Tensor]]:
    """Convolutions that aren't depthwise, and their inputs."""
    seen: list[tuple[nn.Conv2d, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, given, _: seen.append((module, given[0])))
        for module in net.modules()
        if isinstance(module, nn.Conv2d) and not module.groups == module.in_channels > 1
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    yield from seen


def measure_layer(conv: nn.Conv2d, x: Tensor, rounds: int) -> tuple[Row, Row]:
    """The choice of a kernel, and the choice between dense and compact: what they took."""
    layer, x = ColumnConv2d.of(copy.deepcopy(conv)), x.contiguous()
    handle = Handle(layer.weight, layer.columns, layer.bias, layer.spec)
    chosen = handle.config_for(x.shape, x.dtype, 1).kernel
    kernels = [Kernel.PIXELS, Kernel.CHANNELS]
    if chosen in WINOGRAD.values():
        kernels += WINOGRAD.values()
    calls: dict[Any, Callable[[], Any]] = {}
    for kernel in kernels:
        prepared = handle.prepare(x.shape, x.dtype, KernelConfig(kernel, 1))
        out = torch.empty(prepared.out_shape)
        calls[kernel] = partial(handle.run, prepared, x, None, out)
    calls["dense"], calls["compact"] = partial(conv, x), partial(layer, x)
    least = least_us(calls, rounds)
    decision = decide(layer.spec, len(layer.columns), tuple(x.shape), x, False)
    either = {True: least.pop("compact"), False: least.pop("dense")}
    return (
        {"us": least[chosen], "best": min(least.values()), "name": str(conv)},
        {"us": either[decision.is_compact], "best": min(either.values()), "name": str(conv)},
    )


def least_us(calls: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Least CPU time of each call, in microseconds."""
    least = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
        call()
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - start > BUDGET:
            break
        for key, call in calls.items():
            begin = time.thread_time()
            call()
            least[key] = min(least[key], 1e6 * (time.thread_time() - begin))
    return least


def summary(choices: list[Row]) -> Row:
    """How good choices are: agreement, time lost in all, and the one that loses most."""
    best = sum(choice["best"] for choice in choices)
    worst = max(choices, key=lambda choice: choice["us"] - choice["best"])
    near = sum(choice["us"] <= 1.03 * choice["best"] for choice in choices)
    return {
        "agreement": near / len(choices),
        "lost": sum(choice["us"] for choice in choices) / best - 1,
        "worst": worst["us"] / worst["best"] - 1,
        "worst_of_network": (worst["us"] - worst["best"]) / best,
        "worst_name": worst["name"],
    }


def report(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = []
    for row in rows:
        kernel, dense = row["kernel"], row["dense"]
        worst = f"{kernel['worst']:.1%} ({kernel['worst_of_network']:.1%} of the network)"
        lines.append(
            [
                *(row["network"], f"{row['ratio']:.0%}", row["layers"]),
                *(f"{kernel['agreement']:.0%}", f"{kernel['lost']:.1%}", worst),
                *(f"{dense['agreement']:.0%}", f"{dense['lost']:.1%}"),
            ]
        )
    text = (
        "# Choices of the cost model\n\nA choice counts as the fastest if it takes at most 3 % more"
        " time than the fastest kernel. Dense layers are those of eager torch.\n\n"
    )
    return text + markdown_table([*HEAD, *DENSE_HEAD], lines)


if __name__ == "__main__":
    with torch.no_grad():
        main()
