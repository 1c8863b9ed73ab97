"""Compact networks as ordinary ones, in torch and in onnxruntime."""

import copy
import io
import warnings

import onnxruntime
import pytest
import torch
import torchvision
from networks import pruned
from torch import fx, nn

from spp_lightning import ConvNet
from spp_lightning.compaction.epilogue import RELU, Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.to_dense import to_dense
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.pipeline import compact


def difference(found, expected):
    found, expected = torch.as_tensor(found).detach(), expected.detach()
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def run_onnx(net, x):
    """A network's output for ``x``, computed by onnxruntime."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter without a further package is deprecated, and says so in several ways.
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), buffer, input_names=["x"], dynamo=False)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


NETWORKS = {
    "ConvNet": (lambda: ConvNet(), (2, 3, 32, 32)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (1, 3, 64, 64)),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=10), (1, 3, 64, 64)),
    "mobilenet": (lambda: torchvision.models.mobilenet_v2(num_classes=10), (1, 3, 64, 64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_computes_the_same_in_torch_and_onnxruntime(name):
    make, shape = NETWORKS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    net = pruned(make())
    fast = compact(net, x)
    layers = [module for module in fast.modules() if isinstance(module, ColumnConv2d)]
    assert layers
    dense = to_dense(fast)
    assert [module for module in fast.modules() if isinstance(module, ColumnConv2d)] == layers
    assert not any(isinstance(module, ColumnConv2d) for module in dense.modules())
    assert all(
        type(dense.get_submodule(name)) is nn.Conv2d
        for name, module in fast.named_modules()
        if isinstance(module, ColumnConv2d)
    )
    expected = net(x)
    assert difference(dense(x), expected) < 1e-4
    assert difference(run_onnx(dense, x), expected) < 1e-4


POSTS = {
    "nothing": (Clamp(), ()),
    "relu": (Clamp(0.0), ()),
    "relu6, max pool": (
        Clamp(0.0, 6.0),
        (PlaneOp("max_pool", (3, 3), (2, 2), (1, 1), ceil_mode=True),),
    ),
    "lower limit, avg pool, norm": (
        Clamp(-0.5),
        (
            PlaneOp("avg_pool", (3, 2), (2, 1), (1, 1), count_include_pad=False),
            PlaneOp("local_response_norm", alpha=5e-5),
        ),
    ),
    "norm of another size": (Clamp(0.0), (PlaneOp("local_response_norm", (5, 5), alpha=0.1),)),
}


class Tree(nn.Module):
    """Passes one layer twice, with something added the second time."""

    def __init__(self, layer):
        super().__init__()
        self.first = layer
        self.inner = nn.ModuleDict({"again": layer})

    def forward(self, x):
        conv = self.first.to_dense() if isinstance(self.first, ColumnConv2d) else self.first
        residual = torch.ones_like(nn.Conv2d.forward(conv, x))
        return self.first(x), self.inner["again"](x, residual)


@pytest.mark.parametrize("post", POSTS)
def test_layers_in_an_ordinary_network(post):
    conv = pruned(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False))
    tree = Tree(ColumnConv2d.of(conv, Epilogue(*POSTS[post]))).eval()
    tree.first.weight.requires_grad_(False)
    before = copy.deepcopy(tree.state_dict())
    dense = to_dense(tree)
    assert dense.first is dense.inner["again"] and isinstance(dense.first, nn.Conv2d)
    assert torch.equal(dense.first.weight, conv.weight) and dense.first.bias is None
    assert not dense.first.weight.requires_grad and not dense.first.training
    x = torch.randn(2, 4, 9, 10, generator=torch.Generator().manual_seed(1))
    for found, expected in zip(dense(x), tree(x), strict=True):
        assert difference(found, expected) < 1e-5
    assert isinstance(tree.first, ColumnConv2d)
    assert all(torch.equal(before[key], value) for key, value in tree.state_dict().items())


def test_a_layer_alone_and_a_graph_inside_a_network():
    layer = ColumnConv2d.of(pruned(nn.Conv2d(3, 4, 3)), RELU)
    x = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    assert difference(to_dense(layer)(x), layer(x)) < 1e-6

    class LeafTracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, ColumnConv2d) or super().is_leaf_module(module, name)

    inner = nn.Sequential(layer, nn.Flatten())
    graph = fx.GraphModule(inner, LeafTracer().trace(inner))
    outer = nn.Sequential(CompactNetwork.of(graph))
    dense = to_dense(outer)
    assert type(dense[0].get_submodule("0")) is nn.Conv2d
    assert difference(dense(x), outer(x)) < 1e-6


def test_refuses_what_is_no_network():
    with pytest.raises(ValueError, match="`model` must be a network"):
        to_dense({"conv1.weight": torch.zeros(1)})
