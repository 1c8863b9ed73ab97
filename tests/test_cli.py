"""The commands: `compact`, from a checkpoint to a measured file; `inspect`; `export`; `plan`."""

import json
import sys
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from conftest import TinyModule, make_trainer, tiny_data
from networks import pruned
from torch import nn

from spp_lightning import ConvNet
from spp_lightning.cli import compact as compact_module
from spp_lightning.cli import main
from spp_lightning.compaction.file.container import load_compact, save_compact
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.kernels.cpu import library
from spp_lightning.compaction.pipeline import compact
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


def run(*words, command="compact"):
    return CliRunner().invoke(main, [command, *words])


@pytest.mark.skipif(not library.is_available(), reason="needs the CPU kernels")
def test_bench_of_a_pruned_convnet(checkpoint):
    result = run("net.pt", "-o", "net.spp", "--bench", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert "conv MACs   dense 12,288,000, compact 3," in result.output
    assert "net.spp: 3 compact convolutions" in result.output
    assert "batch 1 " in result.output and "batch 64 " in result.output
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load_compact("net.spp")(x), checkpoint(x), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not library.is_available(), reason="needs the CPU kernels")
def test_int8(checkpoint):
    x = torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(x, "inputs.pt")
    words = ["net.pt", "-o", "net.spp", "--int8", "--calibrate", "inputs.pt", "--threads", "1"]
    result = run(*words, "--keep", "conv1", "--bench")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    told = {line[0]: line[1] for line in lines if line[0] in ("conv1", "conv2", "conv3", "ip1")}
    assert told == {"conv1": "float32", "conv2": "int8", "conv3": "int8", "ip1": "float32"}
    assert sum("compact" in line and line[0] == "batch" for line in lines) == 2
    assert sum("int8" in line and line[0] == "batch" for line in lines) == 2
    difference = load_compact("net.spp")(x) - checkpoint(x)
    assert 0 < difference.norm() < 0.05 * checkpoint(x).norm()

    shown = run("net.spp", "--json", command="inspect")
    contents = json.loads(shown.output)
    layers = {row["name"]: (row["kind"], row["precision"]) for row in contents["layers"]}
    assert layers["conv1"] == ("ColumnConv2d", "float32")
    assert layers["conv2"] == ("QuantizedConv2d", "int8")
    assert contents["dtypes"] == ["float32", "int8"]
    assert "QuantizedConv2d  int8" in run("net.spp", command="inspect").output

    Path("folder").mkdir()
    torch.save(x[:50], "folder/0.pt")
    torch.save(x[50:], "folder/1.pt")
    words[5] = "folder"
    as_json = json.loads(run(*words, "--json").output)
    assert [row["precision"] for row in as_json["int8"]["layers"]] == ["int8"] * 3 + ["float32"]


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


INT8 = ["net.pt", "-o", "net.spp", "--int8", "--calibrate"]


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
        (["net.pt", "-o", "net.spp", "--int8"], 2, "--int8 and --calibrate belong together"),
        (["net.pt", "-o", "net.spp", "--keep", "ip1"], 2, "give --int8"),
        ([*INT8, "wrong"], 1, "`batches[0]` (=(2,), torch.float32) must be an input of `net`"),
        (
            [*INT8, "text.pt"],
            1,
            "text.pt can't be read as inputs of --calibrate, a file that torch.save",
        ),
        ([*INT8, "net.pt"], 1, "net.pt must hold a tensor of inputs, got OrderedDict"),
        ([*INT8, "empty"], 1, "must hold files *.pt, but holds none"),
        ([*INT8, "folder", "--keep", "none*"], 1, "`keep` (=['none*']) must name layers"),
    ],
)
def test_errors(words, code, message, checkpoint, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    for name in ("folder", "empty", "wrong"):
        (tmp_path / name).mkdir()
    torch.save(torch.zeros(1, 3, 32, 32), tmp_path / "folder" / "inputs.pt")
    torch.save(torch.ones(2), tmp_path / "wrong" / "inputs.pt")
    before = sorted(tmp_path.iterdir())
    result = run(*words)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert sorted(tmp_path.iterdir()) == before


def test_fails_if_slower_or_different(checkpoint, monkeypatch):
    monkeypatch.setattr(compact_module, "difference", lambda *_: float("nan"))
    monkeypatch.setattr(
        compact_module, "measure", lambda *args: Times(args[-1], 1.0, args[-1] / 60)
    )
    result = run("net.pt", "-o", "net.spp", "--bench")
    assert result.exit_code == 1
    assert "differs: by nan" in result.output
    assert "slower than the dense one for a batch of 64" in result.output
    assert "for a batch of 1." not in result.output


def test_says_that_nothing_is_pruned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(TinyModule().state_dict(), "net.pt")
    traced = torch.fx.symbolic_trace(TinyModule())
    monkeypatch.setattr(compact_module, "compact", lambda *_: CompactNetwork.of(traced))
    result = run("net.pt", "-o", "n.spp", "--model", "conftest:TinyModule", "--input-shape=3,8,8")
    assert "is this a pruned network's checkpoint?" in result.output


def test_json_of_compact(checkpoint, monkeypatch):
    monkeypatch.setattr(compact_module, "measure", lambda *args: Times(args[-1], 3.0, 2.0))
    result = run("net.pt", "-o", "net.spp", "--json", "--bench", "--threads", "1")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["file"] == "net.spp"
    assert report["compact_convolutions"] == 3
    assert report["dense_conv_macs"] == 12_288_000
    assert report["bytes"] == Path("net.spp").stat().st_size
    assert report["difference"] <= 1e-4
    assert report["bench"]["threads"] == 1
    assert report["bench"]["batches"] == [
        {"batch": batch, "dense_ms": 3.0, "compact_ms": 2.0, "speedup": 1.5} for batch in (1, 64)
    ]


@pytest.fixture
def compact_file(tmp_path, monkeypatch):
    """A file of a network whose second convolution keeps 18 of its 36 columns."""
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2)
    )
    with torch.no_grad():
        net[2].weight[:, :, :, 1:] = 0
        net[2].weight[:, :2, :, 1] = 1
    save_compact(compact(net, torch.zeros(1, 3, 5, 5)), "net.spp")


@pytest.mark.skipif(not library.is_available(), reason="layers stay dense without the kernels")
def test_inspect_tells_layers_columns_and_macs(compact_file):
    result = run("net.spp", "--json", "--input-shape", "3,5,5", command="inspect")
    assert result.exit_code == 0, result.output
    contents = json.loads(result.stdout)
    assert contents["bytes"] == Path("net.spp").stat().st_size
    assert contents["dtypes"] == ["float32"]
    assert contents["input_shape"] == [3, 5, 5]
    layers = {layer["name"]: layer for layer in contents["layers"]}
    assert list(layers) == ["0", "2", "4"]
    assert layers["2"] == {
        "name": "2",
        "kind": "ColumnConv2d",
        "precision": "float32",
        "size": [8, 4, 3, 3],
        "columns": 36,
        "kept_columns": 18,
        "macs": 8 * 18,
    }
    assert layers["4"]["size"] == [2, 8] and layers["4"]["macs"] == 16
    assert contents["macs"] == 4 * 27 * 9 + 8 * 18 + 16

    told = run("net.spp", "--input-shape", "3,5,5", command="inspect").output
    assert "18 of 36 (50.0%)" in told and "8×4×3×3" in told and "1,132" in told
    assert "MACs" not in run("net.spp", command="inspect").output


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nothing.spp"], 2, "'nothing.spp' does not exist"),
        (["text.spp"], 1, "must be a file that `save_compact` wrote"),
        (["net.spp", "--input-shape", "4,5,5"], 1, "must be an input of the network"),
        (["net.spp", "--input-shape", "5"], 2, "must be three counts"),
    ],
)
def test_errors_of_inspect(words, code, message, compact_file, tmp_path):
    (tmp_path / "text.spp").write_text("no network")
    result = run(*words, command="inspect")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())


@pytest.mark.skipif(not library.is_available(), reason="needs the CPU kernels")
def test_export_writes_a_model_and_names_the_library(compact_file):
    words = ("net.spp", "--onnx", "net.onnx", "--input-shape")
    result = run(*words, "3,5,5", command="export")
    assert result.exit_code == 0, result.output
    size, operators = result.output.splitlines()
    written = Path("net.onnx").stat().st_size
    assert size == f"net.onnx: {written:,} bytes"
    told = json.loads(run(*words, "3,5,5", "--json", command="export").stdout)
    assert told["bytes"] == written and f"operators: {told['operators']}" == operators
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(operators.removeprefix("operators: "))
    session = onnxruntime.InferenceSession("net.onnx", options)
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    (found,) = session.run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), load_compact("net.spp")(x))

    refused = run(*words, "3,2,2", command="export")
    assert refused.exit_code == 1 and "must be at least as large as the kernel" in refused.output
    refused = run("net.onnx", *words[1:], "3,5,5", command="export")
    assert refused.exit_code == 1 and "a file that `save_compact` wrote" in refused.output


@pytest.mark.skipif(not library.is_available(), reason="needs the CPU kernels")
def test_int8_from_the_checkpoint_to_onnxruntime(checkpoint):
    torch.save(torch.randn(8, 3, 32, 32), "inputs.pt")
    words = ("net.pt", "-o", "net.spp", "--int8", "--calibrate", "inputs.pt", "--keep", "conv1")
    assert run(*words).exit_code == 0
    result = run("net.spp", "--onnx", "net.onnx", "--input-shape", "3,32,32", command="export")
    assert result.exit_code == 0, result.output
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(result.output.splitlines()[1].removeprefix("operators: "))
    session = onnxruntime.InferenceSession("net.onnx", options)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (found,) = session.run(None, {"input": x.numpy()})
    expected = load_compact("net.spp")(x)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


def test_inspect_refuses_a_damaged_file_with_the_loaders_message(compact_file):
    content = bytearray(Path("net.spp").read_bytes())
    content[len(content) // 2] ^= 1
    Path("net.spp").write_bytes(content)
    with pytest.raises(ValueError) as refused:
        load_compact("net.spp")
    result = run("net.spp", command="inspect")
    assert result.exit_code == 1
    assert result.output.strip() == f"Error: {refused.value}"


def network():
    """A depthwise convolution between two that can be pruned, for 3×16×16 images."""
    conv = partial(nn.Conv2d, padding=1)
    depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    return nn.Sequential(
        conv(3, 16, 3), depthwise, conv(16, 8, 3), nn.Flatten(), nn.Linear(2048, 4)
    )


def test_plan_as_json():
    words = ["test_cli:network", "--input-shape", "3,16,16", "--threads", "1", "--json"]
    result = run(*words, "--speedup", "2.5", command="plan")
    assert result.exit_code == 0, result.output
    assert "Measuring the network with 50% of every layer pruned.\n" in result.stderr
    told = json.loads(result.stdout)
    plan = told["plan"]
    prunable = [16 * 16 * 27 * 16, 16 * 16 * 144 * 8]
    dense = sum(prunable) + 16 * 16 * 9 * 16 + 2048 * 4
    assert [layer["macs"] for layer in plan["layers"]] == prunable
    assert plan["dense_macs"] == dense
    assert dense / 2.5 - 16 * 16 * 16 < plan["macs"] <= dense / 2.5
    assert plan["left_out"] == {"1": "depthwise"}
    assert plan["measured_on"] == "cpu with 1 thread for a batch of 1×3×16×16"
    assert all(layer["ms"] > 0 and len(layer["sensitivity"]) == 5 for layer in plan["layers"])
    speedups = {row["speedup"]: row for row in told["speedups"]}
    assert speedups[1.0]["macs"] == dense
    assert dense / 3 - 16 * 16 * 16 < speedups[3.0]["macs"] <= dense / 3
    assert all(row["ms"] > 0 for row in told["speedups"])


def test_plan_with_data_shows_what_the_loss_says(tiny):
    words = ["conftest:TinyModule", "--input-shape", "3,8,8", "--data", "conftest:tiny_data"]
    result = run(*words, "--macs", "20000", "--layers", "conv*", command="plan")
    assert result.exit_code == 0, result.output
    assert "target: the network's MACs: 20,000\nlayer" in result.output
    assert "conv2  8×8×3×3" in result.output
    assert "speedup of the MACs" in result.output


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["test_cli:nothing"], 2, "can't be imported"),
        (["test_cli:network"], 2, "give --input-shape C,H,W"),
        (["test_cli:network", "--input-shape", "5,16,16"], 1, "must be an input of the network"),
        (["conftest:tiny_data"], 1, "must make an nn.Module"),
        (["--speedup", "90"], 1, "`speedup` (=90) of the network's MACs must be from 1 to"),
        (["--speedup", "2", "--macs", "9"], 1, "Only one of"),
        (["--device", "cuda:9"], 1, "must be a device of this machine"),
        (["--data", "conftest:TinyModule"], 1, "must make a LightningDataModule or batches"),
        (["--data", "conftest:tiny_data"], 1, "must make batches that the network has a loss for"),
    ],
)
def test_errors_of_plan(words, code, message):
    if words[0].startswith("--"):
        words = ["test_cli:network", "--input-shape", "3,16,16", *words]
    result = run(*words, command="plan")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())


def test_help_names_everything():
    shown = CliRunner().invoke(main, ["--help"]).output
    assert "compact" in shown and "inspect" in shown
    shown = CliRunner().invoke(main, ["compact", "--help"]).output
    assert all(x in shown for x in ("CHECKPOINT", "--model", "--input-shape", "--bench", "FILE"))
