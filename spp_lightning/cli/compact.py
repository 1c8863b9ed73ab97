"""``spp-lightning compact``: a small, measured file from a checkpoint."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from spp_lightning.cli.networks import default_shape, load, saved
from spp_lightning.cli.options import as_json_option, input_shape_option
from spp_lightning.compaction.file.container import load_compact, save_compact
from spp_lightning.compaction.graph.to_dense import to_dense
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.macs import count_macs
from spp_lightning.compaction.pipeline import compact
from spp_lightning.compaction.quantize.pipeline import quantize_compact
from spp_lightning.compaction.quantize.report import LayerPrecision, QuantizeReport, quantize_report
from spp_lightning.compaction.timing import difference, measure
from spp_lightning.method.selection import is_convolution

__all__ = ["compact_command"]

_BATCHES = (1, 64)
_TOLERANCE = 1e-4  # of the largest output
_CALIBRATION_BATCH = 64
_NOISE = 1.05  # how much longer the compact network may take before it counts as slower


@click.command("compact")
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
@input_shape_option()
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
@as_json_option
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
    model = load(checkpoint, model_name).eval()
    shape = input_shape or default_shape(model)
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
        content = saved(file, "inputs of --calibrate")
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
