"""The ``spp-lightning`` command: plans, compact files from checkpoints, what is in such files."""

from __future__ import annotations

import click

from spp_lightning.cli.compact import compact_command
from spp_lightning.cli.export import export_command
from spp_lightning.cli.inspect import inspect_command
from spp_lightning.cli.plan import plan_command

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="spp-lightning")
def main() -> None:
    """Tools for networks that were pruned with spp_lightning."""


for command in (compact_command, inspect_command, export_command, plan_command):
    main.add_command(command)
