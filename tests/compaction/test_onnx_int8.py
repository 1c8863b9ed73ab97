"""Int8 networks in a stock onnxruntime: the same bits as in PyTorch."""

import math

import numpy as np
import onnx
import pytest
import torch
import torchvision
from networks import pruned
from onnx import numpy_helper
from onnx_sessions import difference, images, nodes_of, run, session_of
from quantized_layers import SPECS, drawn
from torch import nn
from torch.nn import functional as F

from spp_lightning import ConvNet, compact, export_onnx, native, quantize_compact
from spp_lightning.compaction.epilogue import PlaneOp
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.int8_spec import Int8Spec, TensorScale
from spp_lightning.compaction.layers.int8_pool import max_pool_uint8
from spp_lightning.compaction.layers.quantized import Quantize, QuantizedConv2d, QuantizedLinear

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels were not built")


class Branches(nn.Module):
    """A residual addition, a max pool and a concatenation of uint8, grouped and dilated layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=2)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.wide = nn.Conv2d(16, 8, 1)
        self.last = nn.Conv2d(24, 5, (3, 2), stride=2)

    def forward(self, x):
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        return self.last(torch.cat([x, F.relu6(self.wide(x))], 1))


class Vectors(nn.Module):
    """Linear layers, one of which reads what a convolution wrote."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2)
        self.first, self.second = nn.Linear(16 * 49, 300), nn.Linear(300, 256)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        return self.second(torch.relu(self.first(x)))


def residual_network():
    return torchvision.models.resnet18(num_classes=10)


NETWORKS = {  # what makes it, the image, layers that stay float, the last int8 layer
    "branches": (Branches, (3, 17, 14), [], "last"),
    "branches, float parts": (Branches, (3, 17, 14), ["stem", "second"], "last"),
    "vectors": (Vectors, (3, 15, 15), [], "second"),
    "ConvNet": (ConvNet, (3, 32, 32), [], "conv3"),
    "resnet18": (residual_network, (3, 64, 64), [], "layer4.1.conv2"),
    "resnet18, float parts": (
        *(residual_network, (3, 64, 64)),
        *(["conv1", "layer2.*"], "layer4.1.conv2"),
    ),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Int8 networks by name, and their models, which tell what the last int8 layer makes, too."""
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def get(name):
        if name not in made:
            make, shape, keep, last = NETWORKS[name]
            torch.manual_seed(0)
            x = images(4, *shape)
            quantized = quantize_compact(compact(pruned(make()), x[:1]), [x], keep)
            path = folder / f"{name}.onnx"
            export_onnx(quantized, path, x[:1])
            model = onnx.load(path)
            onnx.checker.check_model(model)
            (node,) = (node for node in model.graph.node if node.name == last)
            if node.output[0] != "output":
                float32 = onnx.TensorProto.FLOAT
                value = onnx.helper.make_tensor_value_info(node.output[0], float32, None)
                model.graph.output.append(value)
                onnx.save(model, path)
            made[name] = quantized, path
        return made[name]

    return get


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_for_every_batch(name, threads, exported):
    quantized, path = exported(name)
    inner = []
    layer = quantized.get_submodule(NETWORKS[name][-1])
    hook = layer.register_forward_hook(lambda _, __, y: inner.append(y))
    for batch in (0, 1, 3, 8):
        x = images(batch, *NETWORKS[name][1], seed=2)
        with torch.inference_mode():
            expected = quantized(x)
        found = run(path, x, threads=threads)
        assert torch.equal(found[-1], inner.pop()) and not inner
        if len(found) > 1 and batch:  # behind it float32 by onnxruntime's own operators
            assert difference(found[0], expected) < 1e-5
    hook.remove()


def test_tensors_between_layers_are_uint8(exported):
    quantized, path = exported("branches")
    model = onnx.load(path)
    assert [(node.op_type, node.name) for node in model.graph.node] == [
        ("Int8Quantize", "/quantize_x/Int8Quantize"),
        ("Int8Convolution", "stem"),
        ("Int8MaxPool", "/Int8MaxPool"),
        ("Int8Convolution", "first"),
        ("Int8Convolution", "second"),
        ("Int8Convolution", "wide"),
        ("Concat", "/Concat"),
        ("Int8ConvolutionToFloat", "last"),
    ]
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    state = quantized.state_dict()
    for name in ("stem.weight", "stem.columns", "stem.weight_scale", "stem.bias"):
        assert np.array_equal(held[name], state[name].numpy())
    assert held["stem.weight"].dtype == np.int8
    kinds = [node.op_type for node in nodes_of(exported("branches, float parts")[1])]
    assert kinds.count("ColumnChain") == 2 and kinds.count("Int8Convolution") == 1


class Layers(nn.Module):
    """An int8 layer, and what rounds its inputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.rounded = Quantize(layer.spec.input)
        self.residual = None if layer.spec.residual is None else Quantize(layer.spec.residual)

    def forward(self, x, *residual):
        return self.layer(self.rounded(x), *(self.residual(y) for y in residual))


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_layer(name, tmp_path):
    layer, x, residual = drawn(SPECS[name])
    net = Layers(layer).eval()
    x = images(*x.shape)
    inputs = (x,) if residual is None else (x, 9 * images(*residual.shape, seed=3))
    export_onnx(net, tmp_path / "net.onnx", inputs)
    (found,) = run(tmp_path / "net.onnx", *inputs)
    assert torch.equal(found, net(*inputs)) and found.dtype == net(*inputs).dtype
    assert layer.forward.__func__ is QuantizedConv2d.forward  # the network was left as it was


def test_a_linear_layer_of_any_rank(tmp_path):
    spec = Int8Spec(Geometry(6, 4, (1, 1)), TensorScale(0.02, 128), None, None, (0.0, math.inf))
    layer, *_ = drawn(spec)
    tensors = layer.weight, layer.columns, layer.weight_scale
    net = Layers(QuantizedLinear(spec, *tensors)).eval()
    for shape in ((3, 6), (2, 5, 6), (2, 1, 3, 6)):
        x = images(*shape)
        export_onnx(net, tmp_path / "net.onnx", x)
        (found,) = run(tmp_path / "net.onnx", x)
        assert torch.equal(found, net(x)) and found.shape == (*shape[:-1], 4)


POSTS = {
    "none": (),
    "average": (PlaneOp("avg_pool", (3, 2), (2, 1), (1, 1), count_include_pad=False),),
    "norm, largest": (
        PlaneOp("local_response_norm", (3, 3), alpha=0.01),
        PlaneOp("max_pool", (3, 3), (2, 2), (1, 1), ceil_mode=True),
    ),
}


@pytest.mark.parametrize("name", POSTS)
def test_rounding_behind_pools_and_norms(name, tmp_path):
    net = Quantize(TensorScale(0.013, 77), POSTS[name]).eval()
    x = images(2, 3, 10, 9)
    x[0, 0, 0, :3] = torch.tensor([math.inf, -math.inf, 1e30])
    export_onnx(net, tmp_path / "net.onnx", x[:1])
    assert torch.equal(run(tmp_path / "net.onnx", x)[0], net(x))


HOSTILE = {  # node, attribute: what it becomes, and what is said of it
    "geometry is cut off": ("first", "geometry", lambda v: v[:-1], "`geometry` must hold 11"),
    "no groups": ("first", "geometry", lambda v: [*v[:10], 0], "at least one group"),
    "groups don't divide": ("first", "geometry", lambda v: [*v[:10], 5], "must be of shape"),
    "a negative stride": ("first", "geometry", lambda v: [*v[:4], -1, *v[5:]], "numbers from 0"),
    "no stride": ("first", "geometry", lambda v: [*v[:4], 0, *v[5:]], "must be positive"),
    "a large kernel": ("last", "geometry", lambda v: [*v[:2], 2**24, *v[3:]], "fit the kernel"),
    "no scales": ("first", "scales", lambda v: [], "`scales` must hold 3 numbers"),
    "a scale of 0": ("first", "scales", lambda v: [*v[:2], 0.0], "must hold positive numbers"),
    "a scale of infinity": ("first", "scales", lambda v: [*v[:2], math.inf], "finite and positive"),
    "a scale that is no number": ("first", "scales", lambda v: [math.nan, *v[1:]], "finite"),
    "a residual too much": ("first", "scales", lambda v: [v[0], 1.0, v[2]], "if and only if"),
    "a residual too few": ("second", "scales", lambda v: [v[0], 0.0, v[2]], "if and only if"),
    "a zero point of 256": ("first", "zero_points", lambda v: [256, 0, 0], "from 0 to 255"),
    "limits out of order": ("first", "clamp", lambda v: [1.0, 0.0], "two limits in order"),
    "no limits": ("first", "clamp", lambda v: [], "`clamp` must hold 2"),
    "a scale too few": ("quantize", "scales", lambda v: [], "`scales` must hold 1"),
    "a scale below 0": ("quantize", "scales", lambda v: [-1.0], "must hold positive numbers"),
    "an operation is cut off": ("quantize", "post", lambda v: [1], "`post` must hold 0"),
    "no pool": ("MaxPool", "post", lambda v: [0, 2, *v[2:]], "no such pool of uint8"),
    "an average of uint8": ("MaxPool", "post", lambda v: [0, 1, *v[2:]], "no such pool of uint8"),
    "a window of nothing": ("MaxPool", "post", lambda v: [*v[:2], 0, *v[3:]], "must be positive"),
    "a vast window": ("MaxPool", "post", lambda v: [0, 0, 2**24, 2**24, *v[4:]], "as a window"),
    "an unknown operation": ("MaxPool", "post", lambda v: [0, 9, *v[2:]], "no epilogue operation"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_wrong_attributes_are_refused(case, exported, tmp_path):
    _, path = exported("branches")
    place, name, change, message = HOSTILE[case]
    model = onnx.load(path)
    (node,) = (node for node in model.graph.node if place in node.name)
    (attribute,) = (a for a in node.attribute if a.name == name)
    changed = change(list(onnx.helper.get_attribute_value(attribute)))
    kind = attribute.type
    node.attribute.remove(attribute)
    node.attribute.append(onnx.helper.make_attribute(name, changed, attr_type=kind))
    onnx.save(model, tmp_path / "hostile.onnx")
    with pytest.raises(Exception, match=message):
        run(tmp_path / "hostile.onnx", images(1, 3, 17, 14))


def test_wrong_tensors_are_refused(exported, tmp_path):
    _, path = exported("branches")
    wrong = {
        "stem.weight": (np.zeros((16, 5), np.int8), "The weight must be of shape"),
        "first.weight": (np.zeros((8, 18), np.uint8), "The weight must be of int8"),
        "stem.columns": (np.arange(7, dtype=np.int32)[::-1].copy(), "must be ascending"),
        "stem.weight_scale": (np.full(16, np.nan, np.float32), "`multiplier` must be finite"),
        "wide.bias": (np.zeros(9, np.float32), "`bias` must have 4 numbers"),
        "last.weight_scale": (np.zeros(5, np.int32), "scales must be of float32"),
    }
    for name, (values, message) in wrong.items():
        model = onnx.load(path)
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        onnx.save(model, tmp_path / "wrong.onnx")
        with pytest.raises(Exception, match=message):
            session_of(tmp_path / "wrong.onnx")
    model = onnx.load(path)
    (node,) = (node for node in model.graph.node if node.name == "second")
    node.input[5] = next(x.output[0] for x in model.graph.node if x.name == "stem")
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(Exception, match=r"The residual must be of shape \(1, 16, 9, 8\)"):
        run(tmp_path / "wrong.onnx", images(1, 3, 17, 14))


class Derived(QuantizedConv2d):
    """Computes something else."""


class Pooled(nn.Module):
    """A max pool of float numbers by the function for uint8."""

    def forward(self, x):
        return max_pool_uint8(x, (2, 2), (2, 2), (0, 0), False)


def test_what_cannot_be_exported_is_refused_by_name(tmp_path):
    path, x = tmp_path / "net.onnx", images(2, 6, 7, 6)
    layer, *_ = drawn(SPECS["groups"])
    residual = images(2, 4, *layer.geometry.out_size(7, 6))

    def refused(net, inputs, message):
        with pytest.raises(ValueError, match=message):
            export_onnx(net, path, inputs)
        assert not path.exists()

    net = Layers(layer).eval()
    refused(net, x, "The residual of `layer` must be given")
    refused(net, (x, residual[:, :1]), r"`layer` must add a residual of shape \(2, 4,")
    refused(net, (x[:, :3], residual), r"`layer` must read uint8 of shape \(B, 6, H, W\)")
    refused(net, (x[0], residual[0]), r"`layer` must read uint8 of shape \(B, 6, H, W\)")
    refused(nn.Sequential(layer), x, r"`0` must read uint8 of shape .*got torch.float32")
    refused(
        nn.Sequential(Quantize(TensorScale(1.0)), Quantize(TensorScale(1.0))),
        *(x, "`1` must read float32, got torch.uint8"),
    )
    tensors = layer.weight, layer.columns, layer.weight_scale, layer.bias
    refused(nn.Sequential(Derived(layer.spec, *tensors)), x, "`0` is of a derived class, Derived")
    refused(nn.Sequential(layer.to("meta")), x, "`0` is torch.int8 on meta")
