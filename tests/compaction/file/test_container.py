"""Compact networks in files: round trips, and every way a file can be wrong."""

import copy
import errno
import hashlib
import io
import json
import operator
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torchvision
from networks import pruned
from torch import fx, nn
from torch.nn import functional as F

from spp_lightning import ConvNet
from spp_lightning.compaction.epilogue import Clamp, PlaneOp
from spp_lightning.compaction.file.container import load_compact, save_compact
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
    assert isinstance(again, fx.GraphModule)
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
            return self.third(self.second(self.first(x))) + self.second.bias

    net = fx.symbolic_trace(Shared())
    net.third = net.first
    next(node for node in net.graph.nodes if node.name == "first_1").target = "third"
    net.recompile()
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
    net = fx.GraphModule(nn.Module(), graph)
    save_compact(net, tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp")
    assert again.code == net.code
    x = picture((2, 3, 4, 4))
    found, expected = again(x), net(x)
    assert found.keys() == expected.keys() and found["y"][1][1] is True
    for ours, theirs in zip(flat(found)[:2], flat(expected)[:2], strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def test_special_numbers_and_layouts_are_kept(tmp_path):
    net = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    numbers = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    net.get_submodule("1").running_mean.copy_(numbers)
    net.to(memory_format=torch.channels_last)
    save_compact(net, tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp")
    found = again.get_submodule("1").running_mean
    assert torch.equal(found.view(torch.int32), numbers.view(torch.int32))
    assert again.get_submodule("0").weight.is_contiguous(memory_format=torch.channels_last)


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
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


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
        (Odd(2, 2), r"call_module 0 \(_0\): it must be .* torch.nn .*test_container.Odd"),
        (with_hook(), "has forward hooks"),
        (changed(), "differs in name"),
        (nn.LSTM(2, 2), "LSTM can't be made anew"),
        (nn.LazyLinear(2), "must be a ColumnConv2d or a layer of torch.nn"),
        (nn.MultiheadAttention(2, 1), "holds no other|has the tensors"),
    ],
    ids=["own class", "hook", "changed", "recurrent", "lazy", "with children"],
)
def test_layers_that_cannot_be_saved(layer, message, tmp_path):
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return True

    net = nn.Sequential(layer)
    graph = fx.GraphModule(net, Tracer().trace(net))
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
        save_compact(fx.GraphModule(nn.Module(), graph), tmp_path / "net.spp")
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


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.98, 0.9999])
def test_truncated(share, content, tmp_path):
    (tmp_path / "net.spp").write_bytes(content[: int(share * len(content))])
    assert "is cut short" in refusal(tmp_path / "net.spp")


def test_flipped_bits_never_pass(content, tmp_path):
    path = tmp_path / "net.spp"
    path.write_bytes(content)
    expected = load_compact(path)
    generator = torch.Generator().manual_seed(0)
    refusals = 0
    for place in torch.randint(len(content), (60,), generator=generator).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert_same(load_compact(path), expected)  # a byte that only fills a gap
        except ValueError:
            refusals += 1
    assert refusals > 50


def checkpoint():
    return {"state_dict": {"conv1.weight": torch.ones(2)}, "epoch": 1, "global_step": 2}


class Evil:
    def __reduce__(self):
        return os.system, ("echo evil",)


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        *((torch.ones(3), "another file of torch"), ([1, 2], "another file of torch")),
        ({"conv1.weight": torch.ones(2)}, "another file of torch"),
        (checkpoint(), "another file of torch"),
        (nn.Linear(2, 2), "it holds a torch.nn.modules.linear.Linear, which isn't read"),
        (Evil(), "it holds a posix.system, which isn't read"),
    ],
    ids=["tensor", "list", "state dict", "checkpoint", "pickled network", "pickled command"],
)
def test_foreign_files_of_torch(foreign, message, tmp_path, capfd):
    torch.save(foreign, tmp_path / "net.spp")
    assert message in refusal(tmp_path / "net.spp")
    assert "evil" not in capfd.readouterr().out


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
    said = refusal(tmp_path / "net.spp")
    assert said.startswith("must be a file that `save_compact` wrote; it is none of torch's")


def rewritten(content, path, change=None, **parts):
    """A file with another structure, and the checksum that belongs to it."""
    whole = torch.load(io.BytesIO(content))
    structure = json.loads(whole["structure"])
    if change is not None:
        change(structure)
    text = json.dumps(structure)
    numbers = whole["payload"].numpy().tobytes()
    checksum = hashlib.sha256(text.encode() + b"\0" + numbers).hexdigest()
    torch.save({**whole, "structure": text, "checksum": checksum, **parts}, path)


def test_rewriting_alone_is_fine(content, tmp_path):
    (tmp_path / "as it was.spp").write_bytes(content)
    rewritten(content, tmp_path / "net.spp")
    assert_same(load_compact(tmp_path / "net.spp"), load_compact(tmp_path / "as it was.spp"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"version": 2}, "is of version 2 of the format; this spp_lightning reads version 1."),
        ({"format": "other"}, "must be a file that `save_compact` wrote"),
        ({"payload": None}, "parts of it are missing"),
        ({"checksum": "0"}, "its checksum is wrong"),
    ],
    ids=["version", "format", "missing", "checksum"],
)
def test_wrong_parts(parts, message, content, tmp_path):
    rewritten(content, tmp_path / "net.spp", **parts)
    assert message in refusal(tmp_path / "net.spp")


def node(op, target, *args, **kwargs):
    """A change that puts a node in front of the output."""

    def change(structure):
        row = [op, "added", target, list(args), kwargs]
        structure["nodes"].insert(-1, row)

    return change


def geometry(index, value):
    """A change of a number of the first layer's geometry."""

    def change(structure):
        structure["modules"][0]["arguments"]["geometry"]["tuple"][index] = value

    return change


def entry(index, **values):
    """A change of what the file says of a tensor."""
    return lambda structure: structure["tensors"]["entries"][index].update(values)


def swap(old, new):
    """A change of any text in the structure."""

    def change(structure):
        text = json.dumps(structure).replace(old, new)
        structure.clear()
        structure.update(json.loads(text))

    return change


X = {"node": "x"}
INJECTION = "x'); import os; os.system('echo evil') #"


@pytest.mark.parametrize(
    "change",
    [
        node("call_function", "os.system", "echo evil"),
        node("call_function", "torch.load", "file"),
        node("call_function", "torch.save", X, "file"),
        node("call_function", "torch.ops.load_library", "file"),
        node("call_function", "torch.hub.load", "file"),
        node("call_function", "torch.from_file", "file"),
        node("call_function", "torch._C._cuda_init"),
        node("call_function", "operator.methodcaller", "numpy"),
        node("call_function", "operator.attrgetter", "__class__"),
        node("call_function", "operator.add.__class__", X),
        node("call_function", "builtins.eval", "1"),
        node("call_function", "builtins.getattr", X, "__class__"),
        node("call_function", "builtins.getattr", X, X),
        node("call_function", "torch.nn.functional.warnings", X),
        node("call_method", "__reduce_ex__", X, 2),
        node("call_method", "numpy", X),
        node("call_method", "apply_", X, X),
        node("call_method", "format", "{}"),
        node("call_method", "add", 1, 2),
        node("call_method", "add()", X),
        node("call_module", "conv9", X),
        node("call_module", INJECTION, X),
        node("call_module", "__class__.x", X),
        node("call_module", "forward", X),
        node("get_attr", "conv1.weight"),
        node("placeholder", "*args"),
        node("placeholder", "y=print('evil')"),
        node("run", "x"),
        node("output", "output", X),
        node("call_function", "torch.relu", {"node": "later"}),
        node("call_function", "torch.relu", {"lambda": "x"}),
        node("call_function", "torch.relu", {"device": "nonsense"}),
        node("call_function", "torch.relu", {"dtype": "load"}),
        node("call_function", "torch.relu", **{"x=print()": X}),
        lambda structure: structure["nodes"][1].__setitem__(1, "x"),
        lambda structure: structure["nodes"][1].__setitem__(1, "a b"),
        lambda structure: structure["nodes"].clear(),
        lambda structure: structure["nodes"].append([1]),
        lambda structure: structure.pop("modules"),
        lambda structure: structure["targets"].update(conv1=99),
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
        entry(0, stride=[2**40, 1]),
        entry(0, stride=[-18, 1]),
        entry(0, dtype="float16"),
        entry(0, dtype="object"),
        entry(2, shape=[18, 1], stride=[1, 1]),
        lambda structure: structure["tensors"]["planes"]["float32"].__setitem__(0, 10),
        lambda structure: structure["tensors"]["planes"]["float32"].pop(),
        # The first layer's 18 columns as those of another kernel: some don't exist there.
        swap('{"tuple": [3, 32, {"tuple": [5, 5]}', '{"tuple": [3, 32, {"tuple": [3, 3]}'),
    ],
)
def test_structures_that_are_wrong_or_mean_harm(change, content, tmp_path, capfd):
    rewritten(content, tmp_path / "net.spp", change)
    assert refusal(tmp_path / "net.spp").startswith("holds no network that can be loaded: ")
    assert "evil" not in capfd.readouterr().out


@pytest.mark.parametrize("kernel", [(2, 2), (3, 5)])
def test_a_norm_is_square_and_odd(kernel, tmp_path):
    op = PlaneOp("local_response_norm", kernel, alpha=0.1)
    with pytest.raises(ValueError, match="`kernel_size` of a norm must be square and odd"):
        ColumnConv2d.of(nn.Conv2d(3, 4, 3), Clamp(), (op,))
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    net = fx.GraphModule({"layer": ColumnConv2d.of(nn.Conv2d(3, 4, 3))}, graph)
    net.layer.post = (op,)
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
    layer = ColumnConv2d.of(conv, Clamp(-1.5), post)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("layer", (x,)))
    save_compact(fx.GraphModule({"layer": layer}, graph), tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp").layer
    assert (again.geometry, again.clamp, again.post) == (layer.geometry, layer.clamp, layer.post)
    assert again.bias is None and repr(again) == repr(layer)
