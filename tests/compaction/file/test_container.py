"""Compact networks in files: round trips, and every way a file can be wrong."""

import copy
import errno
import hashlib
import json
import operator
import os
import pickle
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
import torchvision
from networks import pruned
from torch import fx, nn
from torch.nn import functional as F

import spp_lightning
from spp_lightning import ConvNet
from spp_lightning.compaction.epilogue import Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.file.container import load_compact, save_compact
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.to_dense import to_dense
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.pipeline import compact


class Joining(nn.Module):
    """A bit of everything that a graph can hold."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1, dtype=torch.float32)
        self.right = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.PReLU(8))
        self.scale = nn.Parameter(torch.rand(16, 1, 1), requires_grad=False)
        self.register_buffer("shift", torch.rand(16, 1, 1))
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(64, 5), nn.Sigmoid())

    def forward(self, x):
        y = torch.cat([self.left(x), self.right(x)], dim=1) * self.scale + self.shift
        y = F.interpolate(F.hardswish(y.clamp(min=-1)), scale_factor=0.5)
        y = F.adaptive_avg_pool2d(y, (2, 2))[..., :2].to(torch.float32)
        y = y.reshape(x.shape[0], -1)
        return {"scores": self.head(y), "parts": (y.mean(1, keepdim=True), y.chunk(2, 1)[0])}


NETWORKS = {
    "ConvNet": (ConvNet, (2, 3, 32, 32)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (1, 3, 64, 64)),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=10), (1, 3, 64, 64)),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16), (1, 3, 64, 64)),
    "joining": (Joining, (2, 3, 16, 16)),
}


def picture(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def make(name):
    build, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return compact(pruned(build()), picture(shape)), picture(shape)


def tensors(net):
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def flat(output):
    return torch.utils._pytree.tree_leaves(output)


def assert_same(first, second):
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype, name
        assert tensor.stride() == other.stride() and type(tensor) is type(other), name
        assert tensor.requires_grad == other.requires_grad, name


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name, tmp_path):
    net, x = make(name)
    state = torch.random.get_rng_state()
    save_compact(net, tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same(net, again)
    assert isinstance(again, CompactNetwork)
    assert not any(module.training for module in again.modules())
    for ours, theirs in zip(flat(net(x)), flat(again(x)), strict=True):
        assert torch.equal(ours, theirs)
    # What was loaded is as good as what was saved: for a file, and for the dense network.
    save_compact(again, tmp_path / "again.spp")
    assert (tmp_path / "again.spp").read_bytes() == (tmp_path / "net.spp").read_bytes()
    for ours, theirs in zip(flat(to_dense(again)(x)), flat(net(x)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_loaded_network_can_be_compiled_exported_and_trained(tmp_path):
    net, x = make("ConvNet")
    net.conv1.weight.requires_grad_(False)
    save_compact(net.train(), tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp")
    assert not again.training and not again.conv1.weight.requires_grad
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(torch.compile(again, backend="eager")(x), expected)
        torch.testing.assert_close(torch.export.export(again, (x,)).module()(x), expected)
    again(x).square().sum().backward()
    assert again.conv1.weight.grad is None and again.conv2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_and_any_default(dtype, tmp_path):
    net, _ = make("joining")
    net.to(dtype)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            save_compact(net, tmp_path / "net.spp")
            again = load_compact(tmp_path / "net.spp")
    finally:
        torch.set_default_dtype(default)
    assert_same(net, again)
    assert {tensor.device.type for tensor in tensors(again).values()} == {"cpu"}
    assert {x.dtype for x in tensors(again).values()} == {dtype, torch.int32}


def test_layers_and_tensors_in_two_places_stay_one(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.third = self.first

        def forward(self, x):
            return self.third(self.second(self.first(x)))

    graph = fx.symbolic_trace(Shared())
    graph.third = graph.first
    next(node for node in graph.graph.nodes if node.name == "first_1").target = "third"
    net = CompactNetwork.of(graph)
    save_compact(net, tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp")
    assert again.third is again.first and again.second is not again.first
    assert again.second.weight is again.first.weight
    assert torch.equal(again(torch.ones(2, 4)), net(torch.ones(2, 4)))


def test_arguments_of_every_kind(tmp_path):
    graph = fx.Graph()
    x = graph.placeholder("x", default_value=None)
    y = graph.call_method("to", (x, torch.device("cpu"), torch.float64))
    y = graph.call_method("to", (y,), {"memory_format": torch.channels_last})
    y = graph.call_function(torch.clamp, (y, -float("inf")), {"max": 1e-3})
    z = graph.call_method("reshape", (y, torch.Size((2, 3, -1))))
    z = graph.call_function(operator.getitem, (z, (..., slice(None, -1, 2), None)))
    z = graph.call_function(torch.einsum, ("abcd->ac", z))
    graph.output({"y": [y, (z, True)], "x": x})
    net = CompactNetwork.of(fx.GraphModule(nn.Module(), graph))
    save_compact(net, tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp")
    assert again.compact_steps == net.compact_steps
    x = picture((2, 3, 4, 4))
    found, expected = again(x), net(x)
    assert found.keys() == expected.keys() and found["y"][1][1] is True
    for ours, theirs in zip(flat(found)[:2], flat(expected)[:2], strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def test_special_numbers_and_layouts_are_kept(tmp_path):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net = CompactNetwork.of(fx.symbolic_trace(layers))
    numbers = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    net.get_submodule("1").running_mean.copy_(numbers)
    net.to(memory_format=torch.channels_last)
    save_compact(net, tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp")
    found = again.get_submodule("1").running_mean
    assert torch.equal(found.view(torch.int32), numbers.view(torch.int32))
    assert again.get_submodule("0").weight.is_contiguous(memory_format=torch.channels_last)


class Layouts(nn.Module):
    """Tensors that aren't contiguous, and such without numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("expanded", torch.ones(1, 4).expand(3, 4))
        self.register_buffer("strided", torch.arange(24)[::2].view(3, 4))
        self.register_buffer("transposed", torch.arange(12).to(torch.int32).view(4, 3).t())
        self.register_buffer("empty", torch.zeros(3, 0, dtype=torch.int32))
        self.register_buffer("conjugated", torch.ones(3, 4, dtype=torch.complex64).conj())

    def forward(self, x):
        return x * self.expanded * self.strided + self.transposed, self.empty, self.conjugated


def test_tensors_of_any_layout(tmp_path):
    net = CompactNetwork.of(fx.symbolic_trace(Layouts()))
    save_compact(net, tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp")
    for name, tensor in tensors(net).items():
        found = tensors(again)[name]
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype, name
        assert found.untyped_storage().nbytes() == found.numel() * found.element_size(), name
    x = torch.randn(3, 4)
    assert all(torch.equal(a, b) for a, b in zip(net(x), again(x), strict=True))


def test_a_fresh_process_needs_no_class_of_the_network(tmp_path):
    net, x = make("squeezenet")
    save_compact(net, tmp_path / "net.spp")
    torch.save({"x": x, "y": net(x).detach()}, tmp_path / "example.pt")
    program = f"""
import sys, torch
from spp_lightning.compaction.file.container import load_compact
net = load_compact({str(tmp_path / "net.spp")!r})
example = torch.load({str(tmp_path / "example.pt")!r})
assert torch.equal(net(example["x"]), example["y"])
assert "torchvision.models.squeezenet" not in sys.modules or "test_files" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(spp_lightning.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)


def test_convnet_pruned_4x_takes_30_percent_of_the_bytes(tmp_path):
    net = pruned(ConvNet())
    nn.init.normal_(net.ip1.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    weights = {name: x for name, x in net.state_dict().items() if "." in name}
    torch.save(weights, tmp_path / "dense.pt")
    save_compact(compact(net, torch.zeros(1, 3, 32, 32)), tmp_path / "net.spp")
    sizes = [(tmp_path / name).stat().st_size for name in ("net.spp", "dense.pt")]
    assert sizes[0] <= 0.3 * sizes[1], sizes


# What can't be saved


class Odd(nn.Linear):
    pass


def with_hook():
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    return layer


def changed():
    norm = nn.Upsample(scale_factor=2.0)
    norm.name = "Downsample"
    return norm


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Odd(2, 2), r"layer 0 \(_0\): it must be .* torch.nn .*test_container.Odd"),
        (with_hook(), "has forward hooks"),
        (changed(), "differs in name"),
        (nn.LSTM(2, 2), "one of the layers of torch.nn that a file may name, got .*LSTM"),
        (nn.LazyLinear(2), "one of the layers of torch.nn that a file may name, got .*LazyLinear"),
        (nn.MultiheadAttention(2, 1), "a file may name, got .*MultiheadAttention"),
        (nn.ReLU(inplace=True), "ReLU must not be given `inplace`"),
    ],
    ids=["own class", "hook", "changed", "recurrent", "lazy", "with children", "in place"],
)
def test_layers_that_cannot_be_saved(layer, message, tmp_path):
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return True

    net = nn.Sequential(layer)
    graph = CompactNetwork.of(fx.GraphModule(net, Tracer().trace(net)))
    with pytest.raises(ValueError, match=message):
        save_compact(graph, tmp_path / "net.spp")
    assert not list(tmp_path.iterdir())


def test_what_else_cannot_be_saved(tmp_path):
    with pytest.raises(
        ValueError, match=r"`model` must be a network that `compact` made .*ConvNet"
    ):
        save_compact(ConvNet(), tmp_path / "net.spp")
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(os.fspath, (x,)))
    with pytest.raises(ValueError, match="no file may name the function"):
        save_compact(CompactNetwork.of(fx.GraphModule(nn.Module(), graph)), tmp_path / "net.spp")
    net, _ = make("joining")
    with pytest.raises(ValueError, match="is something else"):
        save_compact(net, tmp_path)
    with pytest.raises(FileNotFoundError, match="in a folder that exists"):
        save_compact(net, tmp_path / "nowhere" / "net.spp")


def test_a_failing_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    net, _ = make("joining")
    path = tmp_path / "net.spp"
    save_compact(net, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OSError, match="No space left"):
                save_compact(to_dense(net), path)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["net.spp"]


def test_a_link_stays_a_link(tmp_path):
    net, _ = make("joining")
    (tmp_path / "link.spp").symlink_to("net.spp")
    save_compact(net, tmp_path / "link.spp")
    assert (tmp_path / "link.spp").is_symlink() and (tmp_path / "net.spp").is_file()
    assert_same(load_compact(tmp_path / "link.spp"), net)


# Files that are wrong


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A file's bytes."""
    path = tmp_path_factory.mktemp("net") / "net.spp"
    save_compact(make("ConvNet")[0], path)
    return path.read_bytes()


def refusal(path):
    """What is said of a file that isn't loaded, behind its path."""
    with pytest.raises(ValueError, match=r"^`path` \(=") as caught:
        load_compact(path)
    return str(caught.value).removeprefix(f"`path` (={path}) ")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path` must be a file, but .*net.spp"):
        load_compact(tmp_path / "net.spp")
    for call in (load_compact, lambda path: save_compact(nn.Identity(), path)):
        with pytest.raises(ValueError, match="`path` must be a str or a path, got None"):
            call(None)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.02, 0.5, 0.98, 0.9999])
def test_truncated(share, content, tmp_path):
    (tmp_path / "net.spp").write_bytes(content[: int(share * len(content))])
    said = refusal(tmp_path / "net.spp")
    assert "is cut short" in said or said.startswith("must be a file that `save_compact` wrote")


def test_flipped_bits_never_pass(content, tmp_path):
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(content), (60,), generator=generator).tolist()
    for place in (*range(60), *places):  # the header, and anywhere
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "net.spp").write_bytes(damaged)
        refusal(tmp_path / "net.spp")
    (tmp_path / "net.spp").write_bytes(content + b"\0")
    assert "too long" in refusal(tmp_path / "net.spp")


def checkpoint():
    return {"state_dict": {"conv1.weight": torch.ones(2)}, "epoch": 1, "global_step": 2}


class Evil:
    def __reduce__(self):
        return os.system, ("echo evil",)


@pytest.mark.parametrize(
    "foreign",
    [torch.ones(3), {"conv1.weight": torch.ones(2)}, checkpoint(), nn.Linear(2, 2), Evil()],
    ids=["tensor", "state dict", "checkpoint", "pickled network", "pickled command"],
)
def test_foreign_files_of_torch(foreign, tmp_path, capfd):
    torch.save(foreign, tmp_path / "net.spp")
    assert "it is another file of torch" in refusal(tmp_path / "net.spp")
    assert "evil" not in capfd.readouterr().out


def test_a_file_of_version_1(tmp_path):
    # As it was written before version 2: a dict with these keys, in this order.
    content = {"format": "spp_lightning.compaction", "version": 1, "structure": "{}"}
    content |= {"payload": torch.zeros(3, dtype=torch.uint8), "checksum": "0"}
    torch.save(content, tmp_path / "net.spp")
    said = refusal(tmp_path / "net.spp")
    assert "in version 3 of the format; this one is of version 1. Make it anew" in said


@pytest.mark.parametrize(
    "foreign",
    [
        *(os.urandom(2000), b"PK\x03\x04" + bytes(500), pickle.dumps({"format": "x"})),
        *(b"text\n" * 50, b"", b"GIF89a"),
    ],
    ids=["random", "zip", "pickle", "text", "nothing", "picture"],
)
def test_foreign_files(foreign, tmp_path):
    (tmp_path / "net.spp").write_bytes(foreign)
    assert refusal(tmp_path / "net.spp").startswith("must be a file that `save_compact` wrote")


NUMBERS = struct.Struct("<IQQ")  # behind 8 bytes of magic: the version, and two lengths


def write(path, structure, payload, version=3):
    """A file with the checksum that belongs to it."""
    numbers = NUMBERS.pack(version, len(structure), len(payload))
    checksum = hashlib.sha256(numbers + structure + payload).digest()
    path.write_bytes(b"\x89SPP\r\n\x1a\n" + numbers + checksum + structure + payload)


def parts(content):
    """A file's structure and payload."""
    version, structure, payload = NUMBERS.unpack_from(content, 8)
    assert version == 3 and len(content) == 60 + structure + payload
    return content[60 : 60 + structure], content[60 + structure :]


def rewritten(content, path, change=None, **options):
    """A file with another structure, and the checksum that belongs to it."""
    text, payload = parts(content)
    structure = json.loads(text)
    if change is not None:
        change(structure)
    write(path, json.dumps(structure).encode(), payload, **options)


def test_rewriting_alone_is_fine(content, tmp_path):
    (tmp_path / "as it was.spp").write_bytes(content)
    rewritten(content, tmp_path / "net.spp")
    assert_same(load_compact(tmp_path / "net.spp"), load_compact(tmp_path / "as it was.spp"))


def test_another_version_and_another_checksum(content, tmp_path):
    rewritten(content, tmp_path / "net.spp", version=4)
    assert "is of version 4 of the format; this spp_lightning reads" in refusal(
        tmp_path / "net.spp"
    )
    damaged = content[:-1] + bytes([content[-1] ^ 1])
    (tmp_path / "net.spp").write_bytes(damaged)
    assert "is damaged: its checksum is wrong" in refusal(tmp_path / "net.spp")


def node(kind, target, *args, **kwargs):
    """A change that puts a step in front of the output."""

    def change(structure):
        row = [kind, "added", target, list(args), kwargs]
        structure["steps"].insert(-1, row)

    return change


def geometry(index, value):
    """A change of a number of the first layer's geometry."""

    def change(structure):
        structure["modules"][0]["arguments"]["geometry"]["tuple"][index] = value

    return change


def entry(index, **values):
    """A change of what the file says of a tensor."""
    return lambda structure: structure["packed"]["entries"][index].update(values)


def swap(old, new):
    """A change of any text in the structure."""

    def change(structure):
        text = json.dumps(structure).replace(old, new)
        structure.clear()
        structure.update(json.loads(text))

    return change


X = {"step": 0}
INJECTION = "x'); import os; os.system('echo evil') #"


@pytest.mark.parametrize(
    "change",
    [
        node("function", "os.system", "echo evil"),
        node("function", "torch.load", "file"),
        node("function", "torch.save", X, "file"),
        node("function", "torch.ops.load_library", "file"),
        node("function", "torch.hub.load", "file"),
        node("function", "torch.from_file", "file"),
        node("function", "torch._C._cuda_init"),
        node("function", "operator.methodcaller", "numpy"),
        node("function", "operator.attrgetter", "__class__"),
        node("function", "operator.add.__class__", X),
        node("function", "builtins.eval", "1"),
        node("function", "builtins.getattr", X, "__class__"),
        node("function", "builtins.getattr", X, X),
        node("function", "torch.nn.functional.warnings", X),
        node("method", "__reduce_ex__", X, 2),
        node("method", "numpy", X),
        node("method", "apply_", X, X),
        node("method", "format", "{}"),
        node("method", "add", 1, 2),
        node("method", "add()", X),
        node("layer", "conv9", X),
        node("layer", INJECTION, X),
        node("layer", "__class__.x", X),
        node("layer", "forward", X),
        node("tensor", "conv1.weight"),
        node("input", "*args"),
        node("input", "y=print('evil')"),
        node("run", "x"),
        node("output", "output", X),
        node("function", "torch.relu", {"step": 99}),
        node("function", "torch.relu", {"lambda": "x"}),
        node("function", "torch.relu", {"device": "nonsense"}),
        node("function", "torch.relu", {"dtype": "load"}),
        node("function", "torch.relu", **{"x=print()": X}),
        lambda structure: structure["steps"][1].__setitem__(1, structure["steps"][0][1]),
        lambda structure: structure["steps"][1].__setitem__(1, "a b"),
        lambda structure: structure["steps"].clear(),
        lambda structure: structure["steps"].append([1]),
        lambda structure: structure.pop("modules"),
        lambda structure: structure["layers"].update(conv1=99),
        swap('"Linear"', '"Sequential"'),
        swap('"Linear"', '"Module"'),
        swap('"Linear"', '"functional"'),
        swap('"Linear"', '"os.system"'),
        swap('"in_features": 1024', '"in_features": 1023'),
        swap('"in_features": 1024', '"wrong": 1024'),
        swap('"weight": 9, "bias": 10', '"weight": 9'),
        swap('"weight": 9, "bias": 10', '"weight": 10, "bias": 9'),
        geometry(0, 2),
        geometry(1, 2**40),
        geometry(1, "32"),
        geometry(2, {"tuple": [5, 0]}),
        geometry(3, {"tuple": [0, 1]}),
        geometry(4, {"tuple": [2, -2]}),
        geometry(6, 2),
        swap('"avg_pool"', '"sum_pool"'),
        swap('{"tuple": [2, 2]}, {"tuple": [0, 0]}', '{"tuple": [2, 2]}, {"tuple": [9, 9]}'),
        entry(0, shape=[32, 2**40]),
        entry(0, shape=[33, 18]),
        entry(0, shape=[-32, -18]),
        entry(0, order=[1, 1]),
        entry(0, order=[0]),
        entry(0, dtype="float16"),
        entry(0, dtype="object"),
        entry(2, shape=[18, 1], order=[0, 1]),
        lambda structure: structure["packed"]["planes"]["float32"].__setitem__(0, 10),
        lambda structure: structure["packed"]["planes"]["float32"].pop(),
        # The first layer's 18 columns as those of another kernel: some don't exist there.
        swap('{"tuple": [3, 32, {"tuple": [5, 5]}', '{"tuple": [3, 32, {"tuple": [3, 3]}'),
    ],
)
def test_structures_that_are_wrong_or_mean_harm(change, content, tmp_path, capfd):
    rewritten(content, tmp_path / "net.spp", change)
    assert refusal(tmp_path / "net.spp").startswith("holds no network that can be loaded: ")
    assert "evil" not in capfd.readouterr().out


# Attacks that older versions fell for, or that others might think of


def layer(name, kind, **arguments):
    """A change that calls one more layer of torch.nn, with the input."""

    def change(structure):
        structure["layers"][name] = len(structure["modules"])
        structure["modules"].append({"class": kind, "arguments": arguments, "tensors": {}})
        structure["steps"].insert(-1, ["layer", "added", name, [X], {}])

    return change


@pytest.mark.parametrize(
    "name",
    ["\uff54o_folder", "to_folder", "a.\uff46orward", "a.forward", "conv1.x", "compact_steps"],
)
def test_no_name_reaches_a_method(name, content, tmp_path, monkeypatch):
    """A full-width t once became the t of ``to_folder``, which wrote a package of Python code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()

    def change(structure):
        layer(name, "Identity")(structure)
        structure["steps"][-2][3] = [{"tuple": ["files"]}, "text of a module"]

    rewritten(content, tmp_path / "net.spp", change)
    said = refusal(tmp_path / "net.spp")
    assert f"{name!r} must" in said
    assert not list((tmp_path / "files").iterdir())


@pytest.mark.parametrize("name", ["ip1.bias", "bias"])
def test_no_tensor_of_a_layer_is_replaced_or_read(name, content, tmp_path):
    """The kernels once read a replaced bias of one number as if it were the layer's own."""

    def change(structure):
        linear = structure["modules"][structure["layers"]["ip1"]]
        bias = linear["tensors"]["bias"]
        structure["tensors"][name] = bias
        structure["steps"].insert(-1, ["tensor", "added", name, [], {}])

    rewritten(content, tmp_path / "net.spp", change)
    said = refusal(tmp_path / "net.spp")
    assert "inside of the layer 'ip1', which owns" in said or "that belongs to a layer" in said


def test_a_bias_of_one_number_is_refused(content, tmp_path):
    def change(structure):
        linear = structure["modules"][structure["layers"]["ip1"]]
        shape = structure["packed"]["entries"][linear["tensors"]["bias"]]["shape"]
        other = structure["packed"]["entries"][linear["tensors"]["weight"]]["shape"]
        assert shape == [10] and other == [10, 1024]
        shape[0], other[0], other[1] = 1, 1, 10249  # as many numbers as before

    rewritten(content, tmp_path / "net.spp", change)
    assert "a layer Linear has the tensors" in refusal(tmp_path / "net.spp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (node("function", "torch.nn.functional.relu", X, True), "`inplace`"),
        (node("function", "torch.nn.functional.relu", X, inplace=True), "`inplace`"),
        (node("function", "torch.nn.functional.relu", X, inplace=X), "`inplace`"),
        (node("function", "torch.add", X, X, out=X), "`out`"),
        (node("function", "torch.norm", X, 2, None, False, X), "`out`"),
        (node("function", "torch.nn.functional.normalize", X, 2, 1, 1e-12, X), "`out`"),
        (node("function", "torch.nn.functional.batch_norm", X, X, X, X, X, True), "`training`"),
        (node("function", "torch.nn.functional.instance_norm", X, X, X), "`use_input_stats`"),
        (node("function", "torch.nn.functional.embedding", X, X, None, 1.0), "`max_norm`"),
        (node("function", "torch.relu_", X), "may name the function"),
        (node("function", "torch.empty_like", X), "may name the function"),
        (node("function", "torch.as_strided", X, [1], [1]), "may name the function"),
        (node("function", "operator.setitem", X, 0, X), "may name the function"),
        (node("function", "operator.mul", "a", 2**40), "tensors and numbers, got text"),
        (node("method", "relu_", X), "may name the method"),
        (node("method", "requires_grad_", X), "may name the method"),
        (node("method", "register_hook", X, X), "may name the method"),
        (node("method", "set_", X, X), "may name the method"),
        (node("method", "data_ptr", X), "may name the method"),
        (node("method", "new_empty", X, [9]), "may name the method"),
        (node("method", "view", X, {"dtype": "bool"}), "as another dtype"),
        (node("method", "view", X, {"tuple": [{"dtype": "bool"}]}), "not in a container"),
        (node("method", "to", X, {"device": "privateuseone"}), "isn't an argument"),
        (node("method", "view", X, 2**63), "isn't an argument"),
        (layer("relu", "ReLU", inplace=True), "`inplace`"),
        (layer("norm", "Identity", device="cuda"), "`device`"),
        (layer("deep" + 20 * ".x", "Identity"), "at most 16 parts"),
        (lambda s: s["modules"].extend(2**14 * [s["modules"][-1]]), "at most 16384 layers"),
        (lambda s: s["steps"].extend(2**15 * [s["steps"][0]]), "from 1 to 32768 steps"),
    ],
)
def test_no_step_writes_or_reads_what_it_should_not(change, message, content, tmp_path):
    rewritten(content, tmp_path / "net.spp", change)
    assert message in refusal(tmp_path / "net.spp")


def test_a_dtype_found_by_a_step_is_no_way_around(content, tmp_path):
    def change(structure):
        count = len(structure["steps"]) - 1
        structure["steps"][-1:-1] = [
            ["function", "kind", "builtins.getattr", [X, "dtype"], {}],
            ["method", "read", "view", [X, {"step": count}], {}],
        ]

    rewritten(content, tmp_path / "net.spp", change)
    assert "must not read memory as another dtype" in refusal(tmp_path / "net.spp")


def test_bools_are_0_or_1(tmp_path):
    graph = fx.Graph()
    graph.output(
        graph.call_function(torch.where, (graph.get_attr("mask"), graph.placeholder("x"), 0))
    )
    root = nn.Module()
    root.register_buffer("mask", torch.tensor([True, False]))
    save_compact(CompactNetwork.of(fx.GraphModule(root, graph)), tmp_path / "net.spp")
    structure, _ = parts((tmp_path / "net.spp").read_bytes())
    payload = zlib.compress(bytes([1, 7]))
    data = json.loads(structure)
    data["packed"]["planes"]["bool"] = [len(payload)]
    write(tmp_path / "net.spp", json.dumps(data).encode(), payload)
    assert "a bool must be 0 or 1" in refusal(tmp_path / "net.spp")


# What loading may cost


def test_a_small_file_does_not_become_large(content, tmp_path):
    path = tmp_path / "net.spp"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is too large: .* where `max_bytes` \(=1000\)"):
        load_compact(path, max_bytes=1000)
    size = sum(x.numel() * x.element_size() for x in tensors(load_compact(path)).values())
    assert size > len(content)
    with pytest.raises(ValueError, match=r"more than `max_bytes` \(=\d+\) allows"):
        load_compact(path, max_bytes=size - 1)
    load_compact(path, max_bytes=size)
    for wrong in (0, 1.0, None, True):
        with pytest.raises(ValueError, match="`max_bytes` must be a whole number"):
            load_compact(path, max_bytes=wrong)
    rewritten(content, path, entry(0, shape=[2**14, 2**14]))
    assert "can't be in byte planes of" in refusal(path)


@pytest.mark.parametrize(
    "structure",
    [b"[" * 100_000, b'{"steps":' + b"[" * 100_000, b"1" * 4_000_000, b"{" * 4_194_304, b"\xff"],
    ids=["lists", "lists in a dict", "a number", "dicts", "no text"],
)
def test_hostile_json(structure, tmp_path):
    write(tmp_path / "net.spp", structure, b"")
    begin = time.perf_counter()
    assert refusal(tmp_path / "net.spp").startswith("holds no network that can be loaded")
    assert time.perf_counter() - begin < 5
    write(tmp_path / "net.spp", bytes(2**22 + 1), b"")
    assert "is too large" in refusal(tmp_path / "net.spp")


@pytest.mark.parametrize("kernel", [(2, 2), (3, 5)])
def test_a_norm_is_square_and_odd(kernel, tmp_path):
    op = PlaneOp("local_response_norm", kernel, alpha=0.1)
    with pytest.raises(ValueError, match="`kernel_size` of a norm must be square and odd"):
        ColumnConv2d.of(nn.Conv2d(3, 4, 3), Epilogue(post=(op,)))
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    net = CompactNetwork.of(fx.GraphModule({"layer": ColumnConv2d.of(nn.Conv2d(3, 4, 3))}, graph))
    net.layer.epilogue = Epilogue(post=(op,))
    with pytest.raises(ValueError, match="must be square and odd"):
        save_compact(net, tmp_path / "net.spp")


def test_columns_must_ascend_and_exist(tmp_path):
    net, _ = make("ConvNet")
    for columns in ([5, 4], [0, 75], [-1, 2]):
        damaged = copy.deepcopy(net)
        layer = damaged.conv1
        layer.weight = nn.Parameter(layer.weight[:, :2].detach().clone())
        layer.columns = torch.tensor(columns, dtype=torch.int32)
        with pytest.raises(ValueError, match="`columns` must be ascending and in"):
            save_compact(damaged, tmp_path / "net.spp")


def test_every_part_of_a_layer_is_kept(tmp_path):
    post = (
        PlaneOp("max_pool", (3, 2), (2, 1), (1, 0), ceil_mode=True),
        PlaneOp("avg_pool", (2, 2), (2, 2), count_include_pad=False),
        PlaneOp("local_response_norm", alpha=5e-5),
    )
    conv = pruned(nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), (1, 2), 2, bias=False))
    layer = ColumnConv2d.of(conv, Epilogue(Clamp(-1.5), post))
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("layer", (x,)))
    save_compact(CompactNetwork.of(fx.GraphModule({"layer": layer}, graph)), tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp").layer
    assert again.spec == layer.spec
    assert again.bias is None and repr(again) == repr(layer)
