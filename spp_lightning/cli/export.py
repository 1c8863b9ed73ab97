"""``spp-lightning export``: an ONNX model from a compact file."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from spp_lightning.cli.options import as_json_option, input_shape_option
from spp_lightning.compaction.file.container import load_compact

__all__ = ["export_command"]


@click.command("export")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    *("--onnx", "output"),
    required=True,
    metavar="OUT",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the ONNX model.",
)
@input_shape_option(required=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images.")
@as_json_option
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
