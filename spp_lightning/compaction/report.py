"""What compact() chose for each layer of a network, and why."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spp_lightning.compaction.geometry import Geometry, kept_columns
from spp_lightning.compaction.graph.linear import decide_linear
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.replace import IN_GATE, decide, decision_of
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.column_linear import ColumnLinear
from spp_lightning.compaction.layers.quantized import QuantizedConv2d
from spp_lightning.compaction.spec import ConvSpec
from spp_lightning.method.evaluation import in_evaluation

__all__ = ["CompactReport", "LayerReport", "compact_report"]


class LayerReport(NamedTuple):
    """What was chosen for a convolution, or for a linear layer with pruned columns.

    Attributes:
        name: Of the layer.
        kept: Kept columns.
        columns: All columns.
        kernel: Name of the kernel that runs; ``"dense"`` for a layer that torch computes.
        threads: Threads that the kernel uses.
        us: Microseconds of the layer and its epilogue for the input; None where there is no
            estimate.
        dense_us: Microseconds of the dense layer and its epilogue, likewise.
        reason: ``"cost model"``, ``"measured"``, or a rule in words.
    """

    name: str
    kept: int
    columns: int
    kernel: str
    threads: int
    us: float | None
    dense_us: float | None
    reason: str


class CompactReport(NamedTuple):
    """What was chosen for a network; as text, a table.

    Attributes:
        layers: One row per convolution, and linear layer that was pruned, that the input passes, in
            the order of the forward pass.
        chains: Names of the layers that one call of the kernels computes, for each such call.
        parts: Names of the modules that are compact networks, where the whole network isn't one.
        opaque: Names of the modules that are called as they are, since torch.fx can't trace them.
    """

    layers: tuple[LayerReport, ...]
    chains: tuple[tuple[str, ...], ...]
    parts: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = ("layer", "columns", "kernel", "threads", "µs", "dense µs", "why")
        rows = [
            (
                *(row.name, f"{row.kept} of {row.columns}", row.kernel, str(row.threads)),
                *("-" if us is None else f"{us:.1f}" for us in (row.us, row.dense_us)),
                row.reason,
            )
            for row in self.layers
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(width) if i in (3, 4, 5) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows)
        ]
        calls = [f"One call: {', '.join(names)}." for names in self.chains]
        parts = [f"Compact parts: {', '.join(self.parts)}."] if self.parts else []
        if self.opaque:
            parts.append(f"Called as they are: {', '.join(self.opaque)}.")
        return "\n".join([*lines, *calls, *parts])


def compact_report(network: nn.Module, example_input: Any) -> CompactReport:
    """What runs in a compact network, layer by layer, for an input.

    The report follows from the network and the cost model, so there is one for networks from files,
    too, and for other inputs than the one that the network was made with. Times are estimates of
    the cost model, or what ``compact(..., tune=True)`` measured.

    Args:
        network: What :func:`compact` or :func:`load_compact` returned. It is run in evaluation mode
            and left as it was.
        example_input: What ``compact`` takes as one: a batch of inputs, or a list or dict of
            tensors, or a tuple of the positional arguments.

    Raises:
        ValueError: If ``network`` isn't a network with convolutions or compact layers.

    >>> from spp_lightning import compact
    >>> net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
    >>> with torch.no_grad():
    ...     _ = net[2].weight[:, :, 1:].zero_()
    >>> x = torch.zeros(1, 16, 32, 32)
    >>> report = compact_report(compact(net, x), x)
    >>> [(row.name, row.kept, row.columns) for row in report.layers]
    [('0', 144, 144), ('2', 96, 288)]
    """
    if not isinstance(network, nn.Module):
        raise ValueError(f"`network` must be an nn.Module, got {type(network).__name__}.")
    layers: dict[nn.Module, str] = {
        module: name
        for name, module in network.named_modules()
        if isinstance(module, (ColumnConv2d, ColumnLinear, QuantizedConv2d, nn.Conv2d))
        or (isinstance(module, nn.Linear) and decision_of(module))
    }
    if not layers:
        raise ValueError("`network` must have convolutions; this one has none.")
    seen = _inputs_of(network, layers, example_input)
    parts, opaque, gates = [], [], list[tuple[str, ...]]()
    for name, module in network.named_modules():
        if isinstance(module, CompactNetwork):
            parts += [name] if name else []
            opaque += [f"{name}.{inner}".lstrip(".") for inner in module.opaque_layers]
            for gate in module.gated_layers:
                if all(_runs_in_gate(*seen.get(module.get_submodule(inner), ())) for inner in gate):
                    gates.append(tuple(f"{name}.{inner}".lstrip(".") for inner in gate))
    gated = {name for gate in gates for name in gate}
    rows = tuple(
        _row_in_gate(row) if row.name in gated else row
        for row in (_row(layers[module], module, *inputs) for module, inputs in seen.items())
    )
    chains = (*_chains(layers, seen), *gates)
    return CompactReport(rows, chains, tuple(parts), tuple(opaque))


_Inputs = dict[nn.Module, tuple[Tensor, bool]]  # the first argument, and whether there is another


def _inputs_of(network: nn.Module, layers: dict[nn.Module, str], example: Any) -> _Inputs:
    seen: _Inputs = {}

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        seen.setdefault(module, (given[0], len(given) > 1 and given[1] is not None))

    arguments = example if isinstance(example, tuple) else (example,)
    with in_evaluation(network), ExitStack() as hooks:
        for _ in range(2):  # the first call packs the weights, the second makes chains
            network(*arguments)
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note))
        network(*arguments)
    return seen


def _row(name: str, module: nn.Module, x: Tensor, residual: bool) -> LayerReport:
    threads = torch.get_num_threads()
    decided = decision_of(module)
    if isinstance(module, ColumnLinear):
        if decided is None or not decided.measured:
            decided = decide_linear(module, x.numel() // module.in_features)
        times = decided.compact_us, decided.dense_us
        kept, every = len(module.columns), module.in_features
        return LayerReport(name, kept, every, "gather, GEMM", threads, *times, decided.reason)
    if isinstance(module, nn.Linear):
        assert decided is not None, "else there is no row"
        kept, every = int(module.weight.detach().any(0).sum()), module.in_features
        us = decided.dense_us
        return LayerReport(name, kept, every, "dense", threads, us, us, decided.reason)
    if isinstance(module, QuantizedConv2d):
        kernel = f"int8 {module.instruction_set if x.is_cpu else 'torch'}"
        kept, every = len(module.columns), module.geometry.num_columns
        return LayerReport(name, kept, every, kernel, threads, None, None, "quantised")
    shape = tuple(x.shape) if x.dim() == 4 else (1, *x.shape)
    if isinstance(module, ColumnConv2d):
        kept, every = len(module.columns), module.geometry.num_columns
        if decided is None or not decided.measured:
            decided = decide(module.spec, kept, shape, x, residual)
        config = module.config_for(x)
        kernel = "Triton" if x.is_cuda else "dense convolution of torch"
        if config is not None:
            kernel, threads = str(config.kernel), config.threads
        return LayerReport(
            name, kept, every, kernel, threads, decided.compact_us, decided.dense_us, decided.reason
        )
    assert isinstance(module, nn.Conv2d)
    kept = every = module.in_channels * module.weight[0, 0].numel()
    try:
        geometry = Geometry.of(module)
    except ValueError:
        decided = None
    else:
        kept = len(kept_columns(module.weight.detach(), geometry)[1])
        decided = decided or decide(ConvSpec(geometry), kept, shape, x, residual)
    us = None if decided is None else decided.dense_us
    reason = "its padding isn't zeros" if decided is None else decided.reason
    if module.groups == module.in_channels > 1:
        reason = "depthwise"
    elif decided is not None and decided.is_compact:
        reason = "several calls share it"
    return LayerReport(name, kept, every, "dense", threads, us, us, reason)


def _runs_in_gate(x: Tensor | None = None, residual: bool = False) -> bool:
    return x is not None and x.is_cpu and x.dtype == torch.float32 and is_available()


def _row_in_gate(row: LayerReport) -> LayerReport:
    return row._replace(kernel="gate", us=None, reason=IN_GATE)


def _chains(layers: dict[nn.Module, str], seen: _Inputs) -> list[tuple[str, ...]]:
    handles = {
        module._handle: name for module, name in layers.items() if isinstance(module, ColumnConv2d)
    }
    chains = []
    for module, (x, _) in seen.items():
        chain = module._chain if isinstance(module, ColumnConv2d) else None
        if chain is not None and chain.threads_for(tuple(x.shape), torch.get_num_threads()):
            chains.append(tuple(handles[handle] for handle in chain.handles))
    return chains
