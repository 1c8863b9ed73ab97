"""Quantised networks in files: equal bits after loading, and hostile tensors refused."""

import hashlib
import json
import math
import struct

import pytest
import torch
import torchvision
from networks import pruned
from torch import nn

from spp_lightning import (
    ConvNet,
    compact,
    count_macs,
    load_compact,
    quantize_compact,
    quantize_report,
    save_compact,
    to_dense,
)
from spp_lightning.compaction.file.tensors import TensorStore, unpack
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.layers.quantized import QuantizedConv2d, QuantizedLinear
from spp_lightning.compaction.report import compact_report

NUMBERS = struct.Struct("<IQQ")


def with_linear():
    conv, linear = nn.Conv2d(3, 16, 3, padding=1, groups=1), nn.Linear(4096, 64)
    linear.weight.data[:, 1:4000:2] = 0
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear, nn.ReLU())


NETWORKS = {
    "ConvNet": (ConvNet, 32),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 40),
    "linear": (with_linear, 16),
}


def make(name):
    build, size = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = pruned(build()), torch.randn(2, 3, size, size)
    fast = compact(net, x)
    return fast, quantize_compact(fast, [x]), x


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name, tmp_path):
    fast, net, x = make(name)
    save_compact(net, tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp")
    assert isinstance(again, CompactNetwork)
    ours, theirs = net.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]) and tensor.dtype == theirs[key].dtype, key
    assert torch.equal(again(x), net(x))
    save_compact(again, tmp_path / "again.spp")
    assert (tmp_path / "again.spp").read_bytes() == (tmp_path / "net.spp").read_bytes()
    # The weights take a byte each, where float32 takes four.
    save_compact(fast, tmp_path / "float.spp")
    sizes = [(tmp_path / file).stat().st_size for file in ("net.spp", "float.spp")]
    assert sizes[0] < 0.6 * sizes[1]
    report = quantize_report(fast, again, [x])
    assert report.error == quantize_report(fast, net, [x]).error


def test_other_tools_know_quantised_networks(tmp_path):
    fast, net, x = make("linear")
    layers = [type(net.get_submodule(name)) for name in ("0", "3")]
    assert layers == [QuantizedConv2d, QuantizedLinear]
    assert count_macs(net, x[:1]) == count_macs(fast, x[:1])
    rows = {row.name: row for row in compact_report(net, x).layers}
    assert {name: row.kernel.split()[0] for name, row in rows.items()} == {"0": "int8", "3": "int8"}
    assert (rows["3"].kept, rows["3"].columns) == (2096, 4096)
    with pytest.raises(ValueError, match="`model` must not be quantised"):
        to_dense(net)
    with pytest.raises(ValueError, match="`net` must be a float network"):
        quantize_compact(net, [x])


def forged(content, path, change):
    """A file that belongs to other tensors; ``change`` gets those of the first int8 layer."""
    _, length, _ = NUMBERS.unpack_from(content, 8)
    structure, payload = json.loads(content[60 : 60 + length]), content[60 + length :]
    tensors = unpack(structure["packed"], payload, 2**30)
    layer = next(x for x in structure["modules"] if x["class"] == "QuantizedConv2d")
    own = {name: tensors[index] for name, index in layer["tensors"].items()}
    change(own, layer["arguments"])
    for name, index in layer["tensors"].items():
        tensors[index] = own[name]
    store = TensorStore()
    assert [store.add(tensor) for tensor in tensors] == list(range(len(tensors)))
    structure["packed"], payload = store.pack()
    text = json.dumps(structure).encode()
    numbers = NUMBERS.pack(3, len(text), len(payload))
    checksum = hashlib.sha256(numbers + text + payload).digest()
    path.write_bytes(content[:8] + numbers + checksum + text + payload)


def replace(name, value):
    return lambda own, _: own.update({name: value(own[name])})


HOSTILE = {
    "weight of another shape": (replace("weight", lambda x: x[:, 1:]), "`weight` must be int8"),
    "float weight": (replace("weight", lambda x: x.float()), "`weight` must be int8"),
    "weight of -128": (replace("weight", lambda x: x - x - 128), r"must be in \[-127, 127\]"),
    "columns beyond": (replace("columns", lambda x: x + 1000), "`columns` must be ascending"),
    "too few scales": (replace("weight_scale", lambda x: x[1:]), "`weight_scale` must be float32"),
    "scales of float64": (replace("weight_scale", torch.Tensor.double), "must be float32"),
    "scale of 0": (replace("input_scale", torch.zeros_like), "scale of `input`"),
    "scale of NaN": (replace("input_scale", lambda x: x * math.nan), "scale of `input`"),
    "large scale": (replace("input_scale", lambda x: x * 0 + 1e38), "scale of `input`"),
    "many scales": (replace("input_scale", lambda x: x.expand(3).clone()), "of no dimension"),
    "wide zero point": (
        replace("input_zero_point", torch.Tensor.int),
        "a scale must be torch.uint8",
    ),
    "infinite bias": (replace("bias", lambda x: x + math.inf), "`bias` must be finite"),
    "trained weight": (replace("weight_scale", nn.Parameter), "has the tensors"),
    "another geometry": (
        lambda _, arguments: arguments["geometry"]["tuple"].__setitem__(1, 31),
        "must be",
    ),
    "clamp in the wrong order": (
        lambda _, arguments: arguments.update(clamp={"tuple": [1.0, 0.0]}),
        "`clamp` must be",
    ),
}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "net.spp"
    save_compact(make("ConvNet")[1], path)
    return path.read_bytes()


def test_forging_alone_is_fine(content, tmp_path):
    forged(content, tmp_path / "net.spp", lambda *_: None)
    assert isinstance(load_compact(tmp_path / "net.spp"), CompactNetwork)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tensors_are_refused(name, content, tmp_path):
    change, message = HOSTILE[name]
    forged(content, tmp_path / "net.spp", change)
    with pytest.raises(ValueError, match=f"holds no network that can be loaded.*{message}"):
        load_compact(tmp_path / "net.spp")


def test_steps_that_feed_a_layer_other_numbers_fail(content, tmp_path):
    _, length, _ = NUMBERS.unpack_from(content, 8)
    structure = json.loads(content[60 : 60 + length])
    for row in structure["steps"]:
        if row[2].startswith("quantize"):
            row[0], row[2], row[3] = "function", "torch.relu", row[3]
    used = {row[2] for row in structure["steps"] if row[0] == "layer"}
    structure["layers"] = {key: x for key, x in structure["layers"].items() if key in used}
    text, payload = json.dumps(structure).encode(), content[60 + length :]
    numbers = NUMBERS.pack(3, len(text), len(payload))
    checksum = hashlib.sha256(numbers + text + payload).digest()
    (tmp_path / "net.spp").write_bytes(content[:8] + numbers + checksum + text + payload)
    net = load_compact(tmp_path / "net.spp")
    with pytest.raises(ValueError, match="`x` must be uint8"):
        net(torch.zeros(1, 3, 32, 32))
