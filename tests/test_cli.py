"""The command `spp-lightning compact`, from a checkpoint to a measured file."""

import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import TinyModule, make_trainer, tiny_data
from networks import pruned
from torch import nn

from spp_lightning import ConvNet, cli
from spp_lightning.compaction.file.container import load_compact
from spp_lightning.compaction.kernels.cpu import library
from spp_lightning.compaction.timing import Times


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A pruned ConvNet's state dict, in the current folder."""
    monkeypatch.chdir(tmp_path)
    net = pruned(ConvNet())
    nn.init.normal_(net.ip1.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    torch.save(net.state_dict(), "net.pt")
    return net


def run(*words):
    return CliRunner().invoke(cli.main, ["compact", *words])


@pytest.mark.skipif(not library.is_available(), reason="needs the CPU kernels")
def test_bench_of_a_pruned_convnet(checkpoint):
    result = run("net.pt", "-o", "net.spp", "--bench", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert "conv MACs   dense 12,288,000, compact 3," in result.output
    assert "net.spp: 3 compact convolutions" in result.output
    assert "batch 1 " in result.output and "batch 64 " in result.output
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load_compact("net.spp")(x), checkpoint(x), rtol=1e-3, atol=1e-4)


def test_lightning_checkpoint_of_an_own_class(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(max_steps=1)
    trainer.fit(tiny, tiny_data())
    pruned(tiny)
    trainer.save_checkpoint("net.ckpt")
    result = run("net.ckpt", "-o", "net.spp", "--model", "conftest:TinyModule")
    assert result.exit_code == 2 and "give --input-shape C,H,W" in result.output
    words = ["net.ckpt", "-o", "net.spp", "--input-shape", "3,8,8"]
    result = run(*words, "--model", "conftest:TinyModule")
    assert result.exit_code == 0, result.output
    x = tiny_data().dataset.tensors[0]
    torch.testing.assert_close(load_compact("net.spp")(x), tiny.eval()(x))
    result = run(*words)
    assert result.exit_code == 1 and "doesn't hold spp_lightning:ConvNet" in result.output


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3))\n"
    (tmp_path / "own_net.py").write_text(source)
    torch.save(pruned(nn.Sequential(nn.Conv2d(3, 4, 3))).state_dict(), "net.pt")
    path = list(sys.path)
    result = run("net.pt", "-o", "net.spp", "--model", "own_net:make", "--input-shape", "3,9,9")
    assert result.exit_code == 0, result.output
    assert sys.path == path
    assert load_compact("net.spp")(torch.zeros(1, 3, 9, 9)).shape == (1, 4, 7, 7)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nothing.pt", "-o", "net.spp"], 2, "'nothing.pt' does not exist"),
        (["net.pt"], 2, "Missing option '-o'"),
        (["text.pt", "-o", "net.spp"], 1, "text.pt can't be read as a checkpoint"),
        (["module.pt", "-o", "net.spp"], 1, "it holds a torch.nn.modules.linear.Linear"),
        (["tensor.pt", "-o", "net.spp"], 1, "must hold a checkpoint or a state dict, got Tensor"),
        (["net.pt", "-o", "net.spp", "--model", "ConvNet"], 2, "must be MODULE:CLASS"),
        (["net.pt", "-o", "net.spp", "--model", "no.such:Net"], 2, "No module named 'no'"),
        (["net.pt", "-o", "net.spp", "--model", "spp_lightning:Net"], 2, "no attribute 'Net'"),
        (["net.pt", "-o", "net.spp", "--model", "torch:float32"], 2, "must be a class"),
        (["net.pt", "-o", "net.spp", "--model", "torch.nn:Conv2d"], 1, "without arguments"),
        (["net.pt", "-o", "net.spp", "--model", "builtins:dict"], 1, "must make an nn.Module"),
        (["net.pt", "-o", "net.spp", "--model", "torch.nn:Identity"], 1, "doesn't hold torch.nn"),
        (["net.pt", "-o", "net.spp", "--input-shape", "3,32"], 2, "must be three counts"),
        (["net.pt", "-o", "net.spp", "--input-shape", "4,32,32"], 1, "must be an input of `model`"),
        (["net.pt", "-o", "net.spp", "--threads", "0"], 2, "--threads"),
        (["net.pt", "-o", "nowhere/net.spp"], 1, "in a folder that exists"),
        (["net.pt", "-o", "."], 2, "is a directory"),
    ],
)
def test_errors(words, code, message, checkpoint, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    before = sorted(tmp_path.iterdir())
    result = run(*words)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert sorted(tmp_path.iterdir()) == before


def test_fails_if_slower_or_different(checkpoint, monkeypatch):
    monkeypatch.setattr(cli, "difference", lambda *_: float("nan"))
    monkeypatch.setattr(cli, "measure", lambda *args: Times(args[-1], 1.0, args[-1] / 60))
    result = run("net.pt", "-o", "net.spp", "--bench")
    assert result.exit_code == 1
    assert "differs: by nan" in result.output
    assert "slower than the dense one for a batch of 64" in result.output
    assert "for a batch of 1." not in result.output


def test_says_that_nothing_is_pruned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(TinyModule().state_dict(), "net.pt")
    monkeypatch.setattr(cli, "compact", lambda model, _: torch.fx.symbolic_trace(model))
    result = run("net.pt", "-o", "n.spp", "--model", "conftest:TinyModule", "--input-shape=3,8,8")
    assert "is this a pruned network's checkpoint?" in result.output


def test_help_names_everything():
    shown = CliRunner().invoke(cli.main, ["--help"]).output
    assert "compact" in shown
    shown = CliRunner().invoke(cli.main, ["compact", "--help"]).output
    assert all(x in shown for x in ("CHECKPOINT", "--model", "--input-shape", "--bench", "FILE"))
