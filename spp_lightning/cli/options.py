"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["as_json_option", "input_shape_option"]

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def input_shape_option(
    required: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--input-shape C,H,W``, which a command gets as three counts."""
    return click.option(
        "--input-shape",
        callback=_shape,
        required=required,
        metavar="C,H,W",
        help="Shape of one input, such as 3,32,32.",
    )


def _shape(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(x.strip().isdecimal() and int(x) > 0 for x in parts):
        raise click.BadParameter(f"must be three counts such as 3,32,32, got {text!r}.")
    return tuple(int(x) for x in parts)
