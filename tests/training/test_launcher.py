"""Facts about `lightning run`: what reaches the script and the Trainer, which exit code returns."""

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.fabric import cli
from lightning.pytorch import Trainer

from spp_lightning.training import launcher
from spp_lightning.training.launcher import launcher_options

ROOT = Path(__file__).parents[2]

SHOW = """
import json, os, sys
lt = {key: value for key, value in os.environ.items() if key.startswith("LT_")}
shown = {"args": sys.argv[1:], "lt": lt, "world_size": os.environ["WORLD_SIZE"]}
# One write, so that the lines of two processes cannot mix.
sys.stdout.write(json.dumps(shown) + "\\n")
"""

TRAIN = """
import sys
from pathlib import Path
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from spp_lightning.training.launcher import launcher_options

class Note(Callback):
    def on_train_end(self, trainer, module):
        text = f"{trainer.world_size} {trainer.global_step} {type(trainer.strategy).__name__}"
        Path(sys.argv[1], str(trainer.global_rank)).write_text(text)

Trainer(
    **launcher_options(), max_steps=2, limit_val_batches=0, callbacks=[Note()], logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
).fit(BoringModel())
"""


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for key in [key for key in os.environ if key.startswith("LT_")]:
        monkeypatch.delenv(key)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a script in it."""
    (tmp_path / "train.py").write_text(SHOW)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def handed_over(monkeypatch):
    """What Lightning's launcher is called with, instead of starting processes."""
    calls = []
    monkeypatch.setattr(
        cli, "main", lambda args, script_args=None: calls.append((args, script_args))
    )
    return calls


def run(*words):
    """The exit code of `lightning run` in this process."""
    with pytest.raises(SystemExit) as stop:
        launcher.main(["run", *words])
    return stop.value.code


def start(*words, cwd):
    """`lightning run` as a process of its own, on a port that nobody else uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "spp_lightning.training.launcher",
            "run",
            f"--main-port={port}",
            *words,
        ],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- processes ---


@pytest.mark.slow
def test_old_form_in_two_processes(folder):
    done = start(
        *("--accelerator=cpu", "model", "--devices", "2", "train.py"),
        *("--lr", "0.1", "-x", "--", "--devices=3"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    lt = {"LT_CLI_USED": "1", "LT_ACCELERATOR": "cpu", "LT_DEVICES": "2", "LT_NUM_NODES": "1"}
    shown = {"args": ["--lr", "0.1", "-x", "--devices=3"], "lt": lt, "world_size": "2"}
    assert [json.loads(line) for line in done.stdout.splitlines()] == [shown, shown]


def test_exit_code_of_the_script(folder):
    (folder / "fail.py").write_text("raise SystemExit(3)")
    done = start("--accelerator=cpu", "fail.py", cwd=folder)
    assert done.returncode == 3
    assert "lightning: rank 0 of fail.py failed, exit code 3" in done.stderr


@pytest.mark.slow
def test_trainer_on_two_ranks(tmp_path):
    (tmp_path / "fit.py").write_text(TRAIN)
    notes = tmp_path / "notes"
    notes.mkdir()
    options = ["--accelerator=cpu", "--devices=2", "--strategy=ddp"]
    for _ in range(2):  # a process of torch.distributed may abort at its end, now and then
        done = start(*options, "fit.py", str(notes), cwd=tmp_path)
        if "Signal 6 (SIGABRT)" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    seen = {path.name: path.read_text() for path in notes.iterdir()}
    assert seen == {"0": "2 2 DDPStrategy", "1": "2 2 DDPStrategy"}


# --- command line ---

OPTIONS = (
    "--accelerator=cpu --devices 2 --strategy ddp --num-nodes=3 --node-rank=1 "
    "--main-address=10.0.0.1 --main_port=1234 --precision bf16-mixed"
).split()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["train.py"], id="script"),
        pytest.param([*OPTIONS, "train.py", "--lr", "0.1", "-x", "file"], id="options-first"),
        pytest.param(["train.py", "--lr=0.1", *OPTIONS], id="options-last"),
        pytest.param(["train.py", "--", "--devices=3", "--help"], id="double-dash"),
    ],
)
def test_same_as_fabric_run(folder, handed_over, words):
    cli._main.main(["run", *words], standalone_mode=False)
    assert run(*words) == 0
    assert run("model", *words) == 0
    by_fabric, new_form, old_form = handed_over
    assert by_fabric[0].script == "train.py"
    assert new_form == old_form == by_fabric


def test_options_around_model(folder, handed_over):
    assert run("--devices", "2", "model", "--strategy=ddp", "train.py", "--lr", "0.1") == 0
    [(args, script_args)] = handed_over
    assert (args.script, args.devices, args.strategy) == ("train.py", "2", "ddp")
    assert script_args == ["--lr", "0.1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model"], ["model"]),
        (["model", "--lr=1"], ["model", "--lr=1"]),
        (["model", "train.py"], ["train.py"]),
        (["model", "model", "train.py"], ["model", "train.py"]),
        (["./model", "train.py"], ["./model", "train.py"]),
    ],
)
def test_script_called_model(folder, handed_over, words, expected):
    (folder / "model").write_text(SHOW)
    assert run(*words) == 0
    [(args, script_args)] = handed_over
    assert [args.script, *script_args] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing argument 'SCRIPT'"),
        (["model"], "Missing argument 'SCRIPT' after `model`"),
        (["absent.py"], "SCRIPT must be an existing file, got 'absent.py'"),
        (["model", "absent.py"], "SCRIPT must be an existing file, got 'absent.py'"),
        (["--device=2", "train.py"], "--device"),
        (["--precision=7", "train.py"], "--precision"),
    ],
)
def test_wrong_command_line(folder, handed_over, capsys, words, message):
    assert run(*words) == 2
    assert message in capsys.readouterr().err
    assert handed_over == []


def test_help(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert "Usage: lightning run [OPTIONS] SCRIPT" in text
    for option in ("--accelerator", "--devices", "--strategy", "--num-nodes", "--precision"):
        assert option in text


def test_without_click(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "click", None)
    assert "pip install click" in run("train.py")


# --- the other subcommands ---


def declare(monkeypatch, *entry_points):
    def distribution(name):
        assert name == "lightning-sdk"
        return SimpleNamespace(entry_points=entry_points)

    monkeypatch.setattr(launcher.metadata, "distribution", distribution)


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["login", "--user=me"]])
def test_others_go_to_lightning_sdk(tmp_path, monkeypatch, words):
    (tmp_path / "fake_sdk.py").write_text(
        "import sys\nseen = []\ndef cli():\n    seen[:] = sys.argv\n    return 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning", *words])
    declare(
        monkeypatch,
        EntryPoint("lightning", "absent:cli", "other_group"),
        EntryPoint("sandbox", "absent:cli", "console_scripts"),
        EntryPoint("lightning", "fake_sdk:cli", "console_scripts"),
    )
    assert launcher.main() == 5
    assert sys.modules["fake_sdk"].seen == ["lightning", *words]


def test_never_calls_itself(monkeypatch, capsys):
    declare(
        monkeypatch,
        EntryPoint("lightning", "spp_lightning.training.launcher:main", "console_scripts"),
    )
    assert launcher.main(["login"]) == 2
    assert "lightning-sdk" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["login"], ["runs"]])
def test_without_lightning_sdk(monkeypatch, capsys, words):
    def distribution(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(launcher.metadata, "distribution", distribution)
    assert launcher.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "lightning run [OPTIONS] SCRIPT [ARGS]" in err
    assert "pip install lightning-sdk" in err


# --- launcher_options ---


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), ("-1", -1), ("0,1", [0, 1]), ("3,", [3]), (" 1, 0 ", [1, 0]), ("auto", 1)],
)
def test_devices(monkeypatch, text, value):
    monkeypatch.setenv("LT_DEVICES", text)
    assert launcher_options() == {"devices": value}


def test_what_the_launcher_sets_fits_the_trainer(monkeypatch):
    environ = dict(os.environ)
    monkeypatch.setattr(os, "environ", environ)
    cli._set_env_variables(
        Namespace(
            accelerator="cpu", devices="2", strategy="ddp", num_nodes=1, precision="bf16-mixed"
        )
    )
    options = launcher_options()
    assert options == {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": "ddp",
        "num_nodes": 1,
        "precision": "bf16-mixed",
    }
    trainer = Trainer(**options, logger=False, enable_checkpointing=False)
    assert (trainer.world_size, trainer.precision) == (2, "bf16-mixed")


@pytest.mark.parametrize(("text", "precision"), [("32", "32-true"), ("64-true", "64-true")])
def test_precision(monkeypatch, text, precision):
    monkeypatch.setenv("LT_PRECISION", text)
    options = launcher_options()
    assert options == {"precision": text}
    trainer = Trainer(**options, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert trainer.precision == precision


def test_no_launcher():
    assert launcher_options() == {}


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        *[
            ("LT_DEVICES", text)
            for text in ("", "0", "-2", "two", "1.5", ",", "0,,1", "0,0", "0,-1")
        ],
        *[("LT_NUM_NODES", text) for text in ("", "0", "-1", "auto")],
        *[(f"LT_{name}", " ") for name in ("ACCELERATOR", "STRATEGY", "PRECISION")],
    ],
)
def test_malformed(monkeypatch, variable, text):
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"`{variable}` must be a .*, got {text!r}"):
        launcher_options()
