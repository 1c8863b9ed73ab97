"""The ``spp-lightning`` command: plans, compact files from checkpoints, what is in such files."""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from spp_lightning.compaction.file.container import load_compact, save_compact, why
from spp_lightning.compaction.graph.to_dense import to_dense
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.quantized import QuantizedConv2d, QuantizedLinear
from spp_lightning.compaction.macs import count_macs
from spp_lightning.compaction.pipeline import compact
from spp_lightning.compaction.quantize.pipeline import quantize_compact
from spp_lightning.compaction.quantize.report import LayerPrecision, QuantizeReport, quantize_report
from spp_lightning.compaction.timing import difference, measure
from spp_lightning.method.selection import is_convolution
from spp_lightning.planning.overview import overview
from spp_lightning.planning.solve import Planner
from spp_lightning.planning.target import TargetSettings

__all__ = ["main"]

_BATCHES = (1, 64)
_TOLERANCE = 1e-4  # of the largest output
_TOLD = 600  # characters of what torch says about a checkpoint of another network
_CALIBRATION_BATCH = 64
_LEAST_IMAGES = 8  # on which a loss is computed
_NOISE = 1.05  # how much longer the compact network may take before it counts as slower


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="spp-lightning")
def main() -> None:
    """Tools for networks that were pruned with spp_lightning."""


def _shape(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(x.strip().isdecimal() and int(x) > 0 for x in parts):
        raise click.BadParameter(f"must be three counts such as 3,32,32, got {text!r}.")
    return tuple(int(x) for x in parts)


_input_shape = click.option(
    "--input-shape",
    callback=_shape,
    metavar="C,H,W",
    help="Shape of one input, such as 3,32,32.",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@main.command("compact")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    *("-o", "--output", "output"),
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the compact network.",
)
@click.option(
    "--model",
    "model_name",
    default="spp_lightning:ConvNet",
    show_default=True,
    metavar="MODULE:CLASS",
    help="The network's class, or a function that makes it. Modules in the current folder count.",
)
@_input_shape
@click.option("--int8", is_flag=True, help="Write the compact network in int8; see --calibrate.")
@click.option(
    "--calibrate",
    type=click.Path(exists=True, path_type=Path),
    help="For --int8: inputs prepared as for training, a tensor (B, C, H, W) in a file that"
    " torch.save wrote, or a folder of such files (*.pt).",
)
@click.option("--keep", multiple=True, metavar="PATTERN", help="Layers not in int8; repeatable.")
@click.option(
    "--bench",
    is_flag=True,
    help="Time the network and the compact one on the CPU, for batches of 1 and 64.",
)
@click.option("--threads", type=click.IntRange(1), help="Number of threads to compute with.")
@_as_json
def compact_command(
    checkpoint: Path,
    output: Path,
    model_name: str,
    input_shape: tuple[int, ...] | None,
    int8: bool,
    calibrate: Path | None,
    keep: tuple[str, ...],
    bench: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Make the pruned network in CHECKPOINT compact, and write it to a small file.

    CHECKPOINT is a checkpoint of Lightning or a plain state dict. Python reads the file with
    spp_lightning.load_compact(FILE), without the network's class. Without --input-shape the
    network's example_input_array tells the shape of its inputs.

    With --int8 the file holds the compact network in int8, and a table tells the error of each
    layer on the inputs of --calibrate.

    Exits with 1 if the compact network computes something else (a difference of more than 0.0001 of
    the largest output, in float32), or with --bench if it is slower (by more than 5 %).
    """
    if int8 != (calibrate is not None):
        raise click.UsageError("--int8 and --calibrate belong together.")
    if keep and not int8:
        raise click.UsageError("--keep says which layers are not in int8; give --int8.")
    if threads is not None:
        torch.set_num_threads(threads)
    model = _load(checkpoint, model_name).eval()
    shape = input_shape or _default_shape(model)
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    try:
        fast, quantized, batches = compact(model, example), None, []
        if calibrate is not None:  # before anything is written, since it may fail
            batches = _calibration(calibrate)
            quantized = quantize_compact(fast, batches, keep)
        save_compact(fast, output)
        fast = load_compact(output)  # what is measured is what others will load
        report = _compare(model, fast, example, output)
        if quantized is not None:
            save_compact(quantized, output)
            report["int8"] = _int8_report(fast, quantized, batches, output)
            quantized = load_compact(output)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if not report["compact_convolutions"]:
        click.echo("No convolution is compact: is this a pruned network's checkpoint?", err=True)
    if not as_json:
        click.echo(_told(report))
        if quantized is not None:
            click.echo(_told_int8(report["int8"]))
    if bench:
        report["bench"] = _bench(model, fast, shape)
        if quantized is not None:
            report["int8"]["bench"] = _bench(model, quantized, shape)
        if not as_json:
            click.echo(_told_times(report["bench"]))
            if quantized is not None:
                click.echo(_told_times(report["int8"]["bench"], "int8"))
    if as_json:
        click.echo(json.dumps(report, indent=2))
    problems = _problems(report)
    if problems:
        raise click.ClickException(" ".join(problems))


@main.command("inspect")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_input_shape
@_as_json
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


@main.command("export")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    *("--onnx", "output"),
    required=True,
    metavar="OUT",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the ONNX model.",
)
@click.option(
    "--input-shape",
    callback=_shape,
    required=True,
    metavar="C,H,W",
    help="Shape of one input, such as 3,32,32.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images.")
@_as_json
def export_command(
    file: Path, output: Path, input_shape: tuple[int, ...], batch: int, as_json: bool
) -> None:
    """Write the compact network in FILE as an ONNX model for onnxruntime.

    Its compact layers are operators of this package: onnxruntime loads the library whose path is
    printed. The model takes batches of any size; --batch says which one is to be fast, too.
    """
    from spp_lightning.export.library import onnx_library  # onnx is needed by no other command
    from spp_lightning.export.onnx import export_onnx

    try:
        export_onnx(load_compact(file), output, torch.zeros(batch, *input_shape))
        library = onnx_library()
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except RuntimeError as error:  # of the exporter, or of a layer that takes no such input
        raise click.ClickException(f"{file} can't be exported: {error}") from error
    size = output.stat().st_size
    written = {"file": str(output), "bytes": size, "operators": str(library)}
    told = f"{output}: {size:,} bytes\noperators: {library}"
    click.echo(json.dumps(written, indent=2) if as_json else told)


@main.command("plan")
@click.argument("model_name", metavar="MODEL")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of the network: a checkpoint of Lightning or a state dict. Default: new ones.",
)
@_input_shape
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images.")
@click.option("--speedup", type=float, help="Target: a factor; see --of. Default: 2.")
@click.option(
    "--of",
    type=click.Choice(["layers", "network", "latency"]),
    default="network",
    show_default=True,
    help="Of what --speedup is a factor: MACs of every layer, of the network, or its latency.",
)
@click.option("--macs", type=float, help="Target: MACs of the network for one image.")
@click.option("--latency-ms", type=float, help="Target: milliseconds of the network for the batch.")
@click.option("--layers", multiple=True, metavar="PATTERN", help="Layers to prune; repeatable.")
@click.option(
    "--data",
    metavar="MODULE:NAME",
    help="What makes a LightningDataModule or a loader of images and labels, for the loss.",
)
@click.option("--threads", type=click.IntRange(1), help="Number of threads to compute with.")
@click.option("--device", help="Device to measure on, such as cpu or cuda.")
@_as_json
def plan_command(
    model_name: str,
    checkpoint: Path | None,
    input_shape: tuple[int, ...] | None,
    batch: int,
    speedup: float | None,
    of: str,
    macs: float | None,
    latency_ms: float | None,
    layers: tuple[str, ...],
    data: str | None,
    threads: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Tell what pruning would bring MODEL, without training it.

    MODEL is MODULE:CLASS such as torchvision.models:resnet18, the network's class or a function
    that makes it. A table tells of each layer its MACs, its time, what pruning it costs, and the
    ratio that reaches the target; a second one the latency for several speedups. With --data the
    cost is the rise of the loss without the layer's least important columns, else an estimate by
    the weights.

    Exits with 1 if the target can't be reached; the error says what can.
    """
    model = _made(model_name) if checkpoint is None else _load(checkpoint, model_name)
    shape = input_shape or _default_shape(model)
    example = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    if speedup is None and macs is None and latency_ms is None:
        speedup = 2.0
    try:
        settings = TargetSettings(
            speedup=speedup,
            of=of if speedup is not None else "layers",  # type: ignore[arg-type]
            macs=macs,
            latency_ms=latency_ms,
            layers=list(layers) or None,
            threads=threads,
            device=device,
        )
        planner = Planner(model, (example,), settings)
        if data is not None:
            planner.loss = _loss(model, data, planner)
        with _progress():
            found = overview(planner, settings.target)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({"model": model_name, **found.as_dict()}, indent=2) if as_json else found)


@contextmanager
def _progress() -> Iterator[None]:
    """What is being measured, on the standard error."""
    log, handler = logging.getLogger("spp_lightning.planning"), logging.StreamHandler(sys.stderr)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _made(model_name: str) -> nn.Module:
    make = _find(model_name, "MODEL")
    try:
        model = make()
    except TypeError as error:
        raise click.ClickException(
            f"{model_name} can't be made without arguments: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise click.ClickException(f"{model_name} must make an nn.Module, got {type(model)}.")
    return model


def _loss(model: nn.Module, data: str, planner: Planner) -> Callable[[nn.Module], float]:
    """The loss on the first two batches: of a module's training_step, else the cross-entropy."""
    from lightning.pytorch import LightningDataModule, LightningModule

    from spp_lightning.training.losses import MOST_MACS, label_loss, step_loss

    made = loader = _find(data, "--data")()
    if isinstance(made, LightningDataModule):
        made.prepare_data()
        made.setup("fit")
        loader = made.train_dataloader()
    try:
        batches = list(itertools.islice(loader, 2))
    except TypeError as error:
        raise click.ClickException(
            f"--data (={data}) must make a LightningDataModule or batches, got {type(loader)}."
        ) from error
    if isinstance(made, LightningDataModule):  # what a Trainer would do to a batch
        batches = [made.on_before_batch_transfer(batch, 0) for batch in batches]
        batches = [made.on_after_batch_transfer(batch, 0) for batch in batches]
    images = int(MOST_MACS["cpu"] / planner.loss_macs)
    make = step_loss if isinstance(model, LightningModule) else label_loss
    loss = make(batches, max(images, _LEAST_IMAGES))
    try:
        loss(copy.deepcopy(model).eval())
    except Exception as error:  # whatever a network raises for batches that don't fit
        raise click.ClickException(
            f"--data (={data}) must make batches that the network has a loss for, but it fails:"
            f" {error}"
        ) from error
    return loss


def _load(checkpoint: Path, model_name: str) -> nn.Module:
    from lightning.pytorch import LightningModule  # slow to import, and `inspect` needs none

    make = _find(model_name)
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different one for every way a file can be bad
        raise click.ClickException(
            f"{checkpoint} can't be read as a checkpoint, a file that torch.save has written:"
            f" {why(error)}"
        ) from error
    if not isinstance(content, dict):
        raise click.ClickException(
            f"{checkpoint} must hold a checkpoint or a state dict, got {type(content).__name__}."
        )
    try:
        if (
            isinstance(make, type)
            and issubclass(make, LightningModule)
            and "pytorch-lightning_version" in content
        ):
            return make.load_from_checkpoint(checkpoint, map_location="cpu")
        model = make()
    except TypeError as error:
        raise click.ClickException(
            f"{model_name} can't be made without arguments that {checkpoint} doesn't hold: {error}"
        ) from error
    except RuntimeError as error:  # says which keys are missing, unknown or of another shape
        raise _other_network(checkpoint, model_name, error) from error
    if not isinstance(model, nn.Module):
        raise click.ClickException(f"{model_name} must make an nn.Module, got {type(model)}.")
    try:
        model.load_state_dict(content.get("state_dict", content))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _other_network(checkpoint, model_name, error) from error
    return model


def _other_network(checkpoint: Path, model_name: str, error: Exception) -> click.ClickException:
    told = str(error)
    if len(told) > _TOLD:
        told = f"{told[:_TOLD]} …"
    return click.ClickException(
        f"{checkpoint} doesn't hold {model_name}; give its class by --model MODULE:CLASS. {told}"
    )


def _find(model_name: str, hint: str = "--model") -> Any:
    module_name, _, name = model_name.partition(":")
    sys.path.insert(0, os.getcwd())  # as for `python -m`
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise click.BadParameter(
            f"must be MODULE:CLASS such as spp_lightning:ConvNet, but {model_name!r} can't be"
            f" imported: {error}.",
            param_hint=hint,
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise click.BadParameter(
            f"must be a class or a function, got {model_name!r}, {type(found)}.",
            param_hint=hint,
        )
    return found


def _default_shape(model: nn.Module) -> tuple[int, ...]:
    example = getattr(model, "example_input_array", None)
    if not isinstance(example, Tensor) or example.dim() != 4:
        raise click.UsageError(
            f"{type(model).__name__} doesn't say by an example_input_array what its inputs are;"
            " give --input-shape C,H,W."
        )
    return tuple(example.shape[1:])


def _compare(model: nn.Module, fast: nn.Module, example: Tensor, output: Path) -> dict[str, Any]:
    """What became smaller, and how much the outputs differ."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return {
        "file": str(output),
        "compact_convolutions": sum(isinstance(x, ColumnConv2d) for x in fast.modules()),
        "state_dict_bytes": len(buffer.getbuffer()),
        "bytes": output.stat().st_size,
        "dense_conv_macs": _conv_macs(_without_zeros(model), example),
        "conv_macs": _conv_macs(to_dense(fast), example),
        # Pixels may reach from 0 to 1 or to 255; with too small ones the biases would be all there
        # is.
        "difference": max(difference(model, fast, scale * example) for scale in (1, 64)),
    }


def _told(report: dict[str, Any]) -> str:
    before, after = report["state_dict_bytes"], report["bytes"]
    dense, macs = report["dense_conv_macs"], report["conv_macs"]
    return (
        f"{report['file']}: {report['compact_convolutions']} compact convolutions\n"
        f"bytes       state dict {before:,}, compact {after:,} ({after / before:.1%})\n"
        f"conv MACs   dense {dense:,}, compact {macs:,} ({dense / max(macs, 1):.2f}× fewer)\n"
        f"difference  {report['difference']:.1e} of the largest output"
    )


def _bench(model: nn.Module, fast: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    times = [measure(model, fast, shape, batch) for batch in _BATCHES]
    return {
        "threads": torch.get_num_threads(),
        "batches": [{**x._asdict(), "speedup": x.speedup} for x in times],
    }


def _int8_report(
    fast: nn.Module, quantized: nn.Module, batches: list[Tensor], output: Path
) -> dict[str, Any]:
    told = quantize_report(fast, quantized, batches)
    return {
        "bytes": output.stat().st_size,
        "error": told.error,
        "snr_db": told.snr_db,
        "layers": [row._asdict() for row in told.layers],
    }


def _calibration(path: Path) -> list[Tensor]:
    """The inputs of a file or a folder, in batches."""
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files:
        raise click.ClickException(f"--calibrate (={path}) must hold files *.pt, but holds none.")
    batches: list[Tensor] = []
    for file in files:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a different one for every way a file can be bad
            raise click.ClickException(
                f"--calibrate: {file} can't be read as a file that torch.save has written:"
                f" {why(error)}"
            ) from error
        if not isinstance(content, Tensor):
            raise click.ClickException(
                f"--calibrate: {file} must hold a tensor of inputs, got {type(content).__name__}."
            )
        batches += content.split(_CALIBRATION_BATCH)
    return batches


def _told_int8(int8: dict[str, Any]) -> str:
    layers = tuple(LayerPrecision(**row) for row in int8["layers"])
    table = QuantizeReport(layers, int8["error"], int8["snr_db"])
    return f"int8        {int8['bytes']:,} bytes\n{table}"


def _told_times(bench: dict[str, Any], which: str = "compact") -> str:
    lines = [
        f"milliseconds per batch (median; {bench['threads']} threads; dense is the faster of NCHW"
        " and channels-last)"
    ]
    for x in bench["batches"]:
        lines.append(
            f"batch {x['batch']:<5} dense {x['dense_ms']:.3f}, {which} {x['compact_ms']:.3f}"
            f" ({x['speedup']:.2f}× as fast)"
        )
    return "\n".join(lines)


def _problems(report: dict[str, Any]) -> list[str]:
    problems = []
    if not report["difference"] <= _TOLERANCE:  # NaN, too
        problems.append(
            f"The compact network differs: by {report['difference']:.1e} of the largest output,"
            f" where {_TOLERANCE:.0e} would be rounding."
        )
    for x in report.get("bench", {}).get("batches", []):
        if x["compact_ms"] > _NOISE * x["dense_ms"]:
            problems.append(
                f"The compact network is slower than the dense one for a batch of {x['batch']}."
            )
    return problems


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


def _conv_macs(model: nn.Module, example: Tensor) -> int:
    macs = count_macs(model, example)
    return sum(macs[name] for name in macs if is_convolution(model.get_submodule(name)))


def _without_zeros(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.modules():
            if is_convolution(layer):
                layer.get_parameter("weight").fill_(1)
    return model


if __name__ == "__main__":
    main()
