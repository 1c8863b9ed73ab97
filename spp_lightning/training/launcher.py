"""The ``lightning run`` command.

``lightning run [OPTIONS] SCRIPT [ARGS]`` starts a script in one process per device. This module
reads the command line; Lightning's launcher behind ``fabric run`` does the work. The script reads
the options with `launcher_options`.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["launcher_options", "main"]

_HELP = """Start SCRIPT under torchrun, in one process per device.

SCRIPT_ARGS go to the script. The launcher takes every option that it knows, wherever it stands.
Options after `--` go to the script: `lightning run train.py -- --devices=2`.

The old form `lightning run model SCRIPT` works as well.

A Trainer gets the options by `Trainer(**spp_lightning.launcher_options())`. A Fabric object reads
them by itself. Two runs at the same time on one machine need different `--main-port`s.
"""

_NO_SDK = """\
lightning: only `lightning run [OPTIONS] SCRIPT [ARGS]` is available here; it starts a training
script in one process per device (`lightning run --help` lists the options). All other subcommands
belong to Lightning's cloud command line; `pip install lightning-sdk` installs them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``lightning`` command: ``run`` here, everything else in ``lightning-sdk``.

    Args:
        argv: The arguments after ``lightning``. Default: those of this process.

    Returns:
        The exit code: 2 if the subcommand belongs to ``lightning-sdk`` and that is not installed.

    Raises:
        SystemExit: After ``run``, with the exit code of the script (128 + n if signal n ended it),
            or 2 if the command line is wrong.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    if args[:1] == ["run"]:
        _run(args[1:])
    sdk = _sdk_command()
    if sdk is None:
        print(_NO_SDK, file=sys.stderr)
        return 2
    sys.argv = ["lightning", *args]
    code: int = sdk() or 0
    return code


def _run(args: list[str]) -> NoReturn:
    try:
        import click
    except ModuleNotFoundError:
        sys.exit("lightning: `lightning run` needs the package click: `pip install click`.")
    from lightning.fabric import cli
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def launch(script: str, script_args: tuple[str, ...], **options: Any) -> None:
        words = [script, *script_args]
        if _is_old_form(words):
            words = words[1:]
        if not words:
            raise click.UsageError("Missing argument 'SCRIPT' after `model`.")
        if not Path(words[0]).exists():
            if words[0].startswith("-"):
                raise click.NoSuchOption(words[0].split("=")[0])
            raise click.UsageError(f"SCRIPT must be an existing file, got {words[0]!r}.")
        try:
            cli.main(Namespace(script=words[0], **options), words[1:])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode
            print(f"lightning: rank {rank} of {words[0]} failed, exit code {code}", file=sys.stderr)
            # A negative code is the signal that ended the process. Shells report it as 128 + n.
            sys.exit(code if code > 0 else 128 - code)

    options = [p for p in cli._main.commands["run"].params if isinstance(p, click.Option)]
    script_args = click.Argument(["script_args"], nargs=-1, type=click.UNPROCESSED)
    command = click.Command(
        "run",
        params=[click.Argument(["script"]), *options, script_args],
        callback=launch,
        help=_HELP,
        context_settings={"ignore_unknown_options": True},
    )
    command.main(args, prog_name="lightning run")


def _is_old_form(words: list[str]) -> bool:
    # A file may be called "model". Then the word is the old form's only in front of a script.
    if words[0] != "model":
        return False
    return not Path("model").is_file() or (len(words) > 1 and Path(words[1]).exists())


def _sdk_command() -> Callable[[], Any] | None:
    try:
        entry_points = metadata.distribution("lightning-sdk").entry_points
    except metadata.PackageNotFoundError:
        return None
    for entry in entry_points:
        # Our own entry point would call this function again, without end.
        ours = entry.value.split(":")[0].split(".")[0] == "spp_lightning"
        if entry.group == "console_scripts" and entry.name == "lightning" and not ours:
            command: Callable[[], Any] = entry.load()
            return command
    return None


def launcher_options() -> dict[str, Any]:
    """Trainer arguments that ``lightning run`` or ``fabric run`` was started with.

    The Trainer does not read them itself. Without them every process would train on its own. Use
    ``Trainer(**launcher_options(), max_epochs=10)``.

    Returns:
        Those of ``accelerator``, ``devices``, ``strategy``, ``num_nodes`` and ``precision`` that
        the launcher set. Empty if the script was started without a launcher.

    Raises:
        ValueError: If an ``LT_*`` environment variable has no valid value.

    >>> os.environ.update(LT_DEVICES="0,1", LT_STRATEGY="ddp")
    >>> launcher_options()
    {'devices': [0, 1], 'strategy': 'ddp'}
    >>> del os.environ["LT_DEVICES"], os.environ["LT_STRATEGY"]
    >>> launcher_options()
    {}
    """
    parsers: dict[str, tuple[Callable[[str], Any], str]] = {
        "accelerator": (_name, "a name"),
        "devices": (
            _devices,
            "a count of at least 1, -1, 'auto' or distinct indices such as '0,1'",
        ),
        "strategy": (_name, "a name"),
        "num_nodes": (_count, "a count of at least 1"),
        "precision": (_name, "a name"),
    }
    options = {}
    for key, (parse, rule) in parsers.items():
        variable = f"LT_{key.upper()}"
        if variable in os.environ:
            value = os.environ[variable]
            try:
                options[key] = parse(value)
            except ValueError:
                raise ValueError(f"`{variable}` must be {rule}, got {value!r}.") from None
    return options


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text.strip()


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError
    return count


def _devices(text: str) -> int | list[int]:
    if text.strip() == "auto":
        # The launcher starts one process for "auto"; the Trainer would take every GPU.
        return 1
    if "," in text:
        # A comma at the end makes a list of one index: "1," is device 1, "1" is one device.
        indices = [int(part) for part in text.strip().removesuffix(",").split(",")]
        if min(indices) < 0 or len(set(indices)) < len(indices):
            raise ValueError
        return indices
    return -1 if text.strip() == "-1" else _count(text)


if __name__ == "__main__":
    sys.exit(main())
