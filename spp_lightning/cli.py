"""The ``spp-lightning`` command: from a checkpoint to a compact network's file."""

from __future__ import annotations

import copy
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import click
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from spp_lightning.compaction.file.container import load_compact, save_compact, why
from spp_lightning.compaction.graph.to_dense import to_dense
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.macs import count_macs
from spp_lightning.compaction.pipeline import compact
from spp_lightning.compaction.timing import difference, measure
from spp_lightning.method.selection import is_convolution

__all__ = ["main"]

_BATCHES = (1, 64)
_TOLERANCE = 1e-4  # of the largest output
_TOLD = 600  # characters of what torch says about a checkpoint of another network
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


@main.command("compact")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    *("-o", "--output", "output"),
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the compact network is written to.",
)
@click.option(
    "--model",
    "model_name",
    default="spp_lightning:ConvNet",
    show_default=True,
    metavar="MODULE:CLASS",
    help="The network's class, or a function that makes it. Modules in the current folder count.",
)
@click.option(
    "--input-shape",
    callback=_shape,
    metavar="C,H,W",
    help="Shape of one input.  [default: that of the network's example_input_array]",
)
@click.option(
    "--bench",
    is_flag=True,
    help="Time the network and the compact one, for batches of 1 and 64, on the CPU.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with.")
def compact_command(
    checkpoint: Path,
    output: Path,
    model_name: str,
    input_shape: tuple[int, ...] | None,
    bench: bool,
    threads: int | None,
) -> None:
    """Make the pruned network in CHECKPOINT compact, and write it to a small file.

    CHECKPOINT is Lightning's, or a plain state dict. The file is read in Python by
    spp_lightning.load_compact(FILE), without the network's class.

    Fails if the compact network computes something else (by more than 0.0001 of the largest output)
    or, with --bench, if it is slower (by more than 5 %).
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model = _load(checkpoint, model_name).eval()
    shape = input_shape or _default_shape(model)
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    try:
        save_compact(compact(model, example), output)
        fast = load_compact(output)  # what is measured is what others will load
        problems = _report(model, fast, example, output)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if bench:
        problems += _bench(model, fast, shape)
    if problems:
        raise click.ClickException(" ".join(problems))


def _load(checkpoint: Path, model_name: str) -> nn.Module:
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


def _find(model_name: str) -> Any:
    module_name, _, name = model_name.partition(":")
    sys.path.insert(0, os.getcwd())  # as for `python -m`
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise click.BadParameter(
            f"must be MODULE:CLASS such as spp_lightning:ConvNet, but {model_name!r} can't be"
            f" imported: {error}.",
            param_hint="--model",
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise click.BadParameter(
            f"must be a class or a function, got {model_name!r}, {type(found)}.",
            param_hint="--model",
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


def _report(model: nn.Module, fast: nn.Module, example: Tensor, output: Path) -> list[str]:
    """Print what became smaller, and return what is wrong."""
    layers = [x for x in fast.modules() if isinstance(x, ColumnConv2d)]
    if not layers:
        click.echo("No convolution is compact: is this a pruned network's checkpoint?", err=True)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    before, after = len(buffer.getbuffer()), output.stat().st_size
    dense_macs = _conv_macs(_without_zeros(model), example)
    macs = _conv_macs(to_dense(fast), example)
    # Pixels may reach from 0 to 1 or to 255; with too small ones the biases would be all there is.
    error = max(difference(model, fast, scale * example) for scale in (1, 64))
    click.echo(
        f"{output}: {len(layers)} compact convolutions\n"
        f"bytes       state dict {before:,}, compact {after:,} ({after / before:.1%})\n"
        f"conv MACs   dense {dense_macs:,}, compact {macs:,} ({dense_macs / max(macs, 1):.2f}×"
        " fewer)\n"
        f"difference  {error:.1e} of the largest output"
    )
    if not error <= _TOLERANCE:  # NaN, too
        return [
            f"The compact network differs: by {error:.1e} of the largest output, where"
            f" {_TOLERANCE:.0e} would be rounding."
        ]
    return []


def _bench(model: nn.Module, fast: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Print times, and return what is slow."""
    click.echo(
        f"milliseconds per batch (median; {torch.get_num_threads()} threads; dense is the faster of"
        " NCHW and channels-last)"
    )
    slow = []
    for batch in _BATCHES:
        times = measure(model, fast, shape, batch)
        click.echo(
            f"batch {batch:<5} dense {times.dense_ms:.3f}, compact {times.compact_ms:.3f}"
            f" ({times.speedup:.2f}× as fast)"
        )
        if times.compact_ms > _NOISE * times.dense_ms:
            slow.append(f"The compact network is slower than the dense one for a batch of {batch}.")
    return slow


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
