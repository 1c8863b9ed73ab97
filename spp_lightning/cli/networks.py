"""Networks that a command is given: by class, or by class and checkpoint."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from spp_lightning.compaction.file.container import why

__all__ = ["default_shape", "find", "load", "made", "saved"]

_TOLD = 600  # characters of what torch says about a checkpoint of another network


def made(model_name: str) -> nn.Module:
    """The network that ``MODULE:CLASS`` makes.

    Raises:
        click.ClickException: If it can't be made without arguments, or is no network.
    """
    make = find(model_name, "MODEL")
    try:
        model = make()
    except TypeError as error:
        raise click.ClickException(
            f"{model_name} can't be made without arguments: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise click.ClickException(f"{model_name} must make an nn.Module, got {type(model)}.")
    return model


def saved(file: Path, what: str) -> Any:
    """What ``torch.save`` has written to a file.

    Args:
        file: The file.
        what: What it is to hold, for the error.

    Raises:
        click.ClickException: If it can't be read, or holds more than tensors and plain values.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different one for every way a file can be bad
        raise click.ClickException(
            f"{file} can't be read as {what}, a file that torch.save has written: {why(error)}"
        ) from error


def load(checkpoint: Path, model_name: str) -> nn.Module:
    """The network that ``MODULE:CLASS`` makes, with the weights of a checkpoint.

    Args:
        checkpoint: A checkpoint of Lightning, or a state dict.
        model_name: ``MODULE:CLASS``.

    Raises:
        click.ClickException: If the file can't be read, or holds another network.
    """
    from lightning.pytorch import LightningModule  # slow to import, and `inspect` needs none

    make, content = find(model_name), saved(checkpoint, "a checkpoint")
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


def find(model_name: str, hint: str = "--model") -> Any:
    """The class or function that ``MODULE:CLASS`` names.

    Args:
        model_name: ``MODULE:CLASS``; modules in the current folder count.
        hint: The parameter, for the error.

    Raises:
        click.BadParameter: If it can't be imported or called.
    """
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


def default_shape(model: nn.Module) -> tuple[int, ...]:
    """The shape of one input, by the network's ``example_input_array``.

    Raises:
        click.UsageError: If it has none.
    """
    example = getattr(model, "example_input_array", None)
    if not isinstance(example, Tensor) or example.dim() != 4:
        raise click.UsageError(
            f"{type(model).__name__} doesn't say by an example_input_array what its inputs are;"
            " give --input-shape C,H,W."
        )
    return tuple(example.shape[1:])
