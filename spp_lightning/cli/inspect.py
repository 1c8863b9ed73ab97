"""``spp-lightning inspect``: what is in a compact file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from spp_lightning.cli.options import as_json_option, input_shape_option
from spp_lightning.compaction.file.container import load_compact
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.quantized import QuantizedConv2d, QuantizedLinear
from spp_lightning.compaction.macs import count_macs
from spp_lightning.method.selection import is_convolution

__all__ = ["inspect_command"]


@click.command("inspect")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@input_shape_option()
@as_json_option
def inspect_command(file: Path, input_shape: tuple[int, ...] | None, as_json: bool) -> None:
    """Tell what is in a compact network's FILE: its layers and the columns they keep.

    With --input-shape the MACs of every layer are counted, too. Exits with 1 if FILE isn't a
    compact network's, or takes no such input.
    """
    try:
        network = load_compact(file)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    contents = _contents(file, network, input_shape)
    click.echo(json.dumps(contents, indent=2) if as_json else _told_contents(contents))


def _contents(file: Path, network: nn.Module, shape: tuple[int, ...] | None) -> dict[str, Any]:
    """What is in a file, as plain data."""
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, (ColumnConv2d, QuantizedConv2d, nn.Linear)) or is_convolution(layer)
    }
    macs = _macs_of(network, shape)
    tensors = [*network.parameters(), *network.buffers()]
    parameters: list[Tensor] = [*network.parameters()]
    for layer in network.modules():
        if isinstance(layer, QuantizedConv2d):
            parameters += [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "parameters": sum(x.numel() for x in parameters),
        "dtypes": sorted({_dtype(x) for x in parameters}),
        "tensor_bytes": sum(x.numel() * x.element_size() for x in tensors),
        "input_shape": None if shape is None else list(shape),
        "macs": None if macs is None else sum(macs.values()),
        "layers": [
            {"name": name, **_layer(layer), "macs": None if macs is None else macs.get(name, 0)}
            for name, layer in layers.items()
        ],
    }


def _macs_of(network: nn.Module, shape: tuple[int, ...] | None) -> dict[str, int] | None:
    if shape is None:
        return None
    dtype = next((x.dtype for x in network.parameters() if x.is_floating_point()), torch.float32)
    try:
        return count_macs(network, torch.zeros(1, *shape, dtype=dtype))
    except Exception as error:  # whatever a network raises for an input that doesn't fit
        raise click.ClickException(
            f"--input-shape (={','.join(map(str, shape))}) must be an input of the network, but it"
            f" fails for it: {error}"
        ) from error


def _layer(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, (nn.Linear, QuantizedLinear)):
        size = [layer.out_features, layer.in_features]
        kept = len(layer.columns) if isinstance(layer, QuantizedLinear) else size[1]
        return {
            "kind": type(layer).__name__,
            "precision": _precision(layer),
            "size": size,
            "columns": size[1],
            "kept_columns": kept,
        }
    kernel = [int(x) for x in layer.kernel_size]  # type: ignore[union-attr, arg-type]
    channels, filters = int(layer.in_channels), int(layer.out_channels)  # type: ignore[arg-type]
    columns = channels * math.prod(kernel)
    kept = columns
    if isinstance(layer, (ColumnConv2d, QuantizedConv2d)):
        kept = len(layer.columns)
    return {
        "kind": type(layer).__name__,
        "precision": _precision(layer),
        "size": [filters, channels, *kernel],
        "columns": columns,
        "kept_columns": kept,
    }


def _precision(layer: nn.Module) -> str:
    weight = layer._buffers.get("weight")  # of an int8 layer
    return _dtype(layer.get_parameter("weight") if weight is None else weight)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _told_contents(contents: dict[str, Any]) -> str:
    dtypes = ", ".join(contents["dtypes"]) or "no parameters"
    lines = [
        f"{contents['file']}: {contents['bytes']:,} bytes,"
        f" {contents['parameters']:,} parameters ({dtypes})"
    ]
    rows = [["layer", "kind", "precision", "size", "kept columns", "MACs"]]
    for x in contents["layers"]:
        kept, columns = x["kept_columns"], x["columns"]
        rows.append(
            [
                *(x["name"], x["kind"], x["precision"], "×".join(map(str, x["size"]))),
                f"{kept:,} of {columns:,} ({kept / columns:.1%})",
                "" if x["macs"] is None else f"{x['macs']:,}",
            ]
        )
    if contents["macs"] is None:
        rows = [row[:-1] for row in rows]
    else:
        rows.append(["all", "", "", "", "", f"{contents['macs']:,}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
