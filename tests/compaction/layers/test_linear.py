"""Linear layers without their pruned columns: the layer, the passes over a graph, files."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spp_lightning import (
    SPPPruner,
    compact,
    compact_report,
    count_macs,
    load_compact,
    save_compact,
    to_dense,
)
from spp_lightning.compaction.graph.linear import decide_linear
from spp_lightning.compaction.layers.column_linear import ColumnLinear


def prune(layer, *columns):
    with torch.no_grad():
        layer.weight[:, list(columns)] = 0
    return layer


@pytest.fixture
def one_thread():
    """What the cost model says depends on the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 2, 3, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_outputs_and_gradients(shape, bias):
    torch.manual_seed(0)
    linear = prune(nn.Linear(6, 4, bias, dtype=torch.float64), 0, 3, 4)
    layer = ColumnLinear.of(linear)
    assert layer.columns.tolist() == [1, 2, 5] and layer.weight.shape == (4, 3)
    x = torch.randn(shape, dtype=torch.float64)
    for given in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        theirs, ours = (given.clone().requires_grad_() for _ in range(2))
        expected, found = linear(theirs), layer(ours)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer.weight.grad, linear.weight.grad[:, [1, 2, 5]])
    assert torch.equal(layer.to_dense().weight, linear.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": torch.tensor([1, 1], dtype=torch.int32)}, "`columns` must be ascending"),
        ({"columns": torch.tensor([0, 4], dtype=torch.int32)}, r"ascending and in \[0, 4\)"),
        ({"columns": torch.tensor([0, 1])}, "`columns` must be int32"),
        ({"weight": torch.zeros(3, 3)}, r"with 2 columns, got \(3, 3\)"),
        ({"bias": torch.zeros(2)}, r"`bias` must be \(3,\), got \(2,\)"),
    ],
)
def test_wrong_tensors(change, message):
    right = {"weight": torch.zeros(3, 2), "columns": torch.tensor([0, 2], dtype=torch.int32)}
    ColumnLinear(4, **right)
    with pytest.raises(ValueError, match=message):
        ColumnLinear(4, **{**right, **change})


class Block(nn.Module):
    """ConvNeXt's: a depthwise convolution, a norm, two linear layers of pixels, a residual."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm, self.first = nn.LayerNorm(32), nn.Linear(32, 128)
        self.second, self.scale = nn.Linear(128, 32), nn.Parameter(torch.rand(32))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.second(F.dropout(F.gelu(self.first(y)), 0.1, self.training))
        return x + y.permute(0, 3, 1, 2) * self.scale.reshape(1, -1, 1, 1)


def block_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 4, 4), Block(), Block()).eval()
    for block in net[1:]:
        prune(block.first, *range(24))
        prune(block.second, *range(32, 128))
    return net


@pytest.mark.usefixtures("one_thread")
def test_a_block_of_convnext(tmp_path):
    net, x = block_net(), torch.randn(2, 3, 64, 64)
    fast = compact(net, x)
    first, second = fast.get_submodule("1.first"), fast.get_submodule("1.second")
    # The hidden features that the second layer doesn't read are gone from the first.
    assert type(first) is ColumnLinear and first.weight.shape == (32, 8)
    assert type(second) is nn.Linear and second.weight.shape == (32, 32)
    assert count_macs(fast, x)["1.first"] == 2 * 256 * 32 * 8
    assert count_macs(net, x)["1.first"] == 2 * 256 * 128 * 8
    assert count_macs(fast, x)["1.second"] == count_macs(net, x)["1.second"] == 2 * 256 * 32 * 32
    save_compact(fast, tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp")
    report = {row.name: row for row in compact_report(again, x).layers}
    row = report["1.first"]
    assert (row.kept, row.columns, row.kernel) == (8, 32, "gather, GEMM")
    assert row.us < row.dense_us and row.reason == "cost model"
    dense = to_dense(again)
    assert type(dense.get_submodule("1.first")) is nn.Linear
    for size in ((1, 64, 64), (3, 32, 48)):
        x = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            expected = copy.deepcopy(net).double()(x.double()).float()
            assert torch.equal(again(x), fast(x))
            for made in (fast, dense):
                torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)


class TokenNorm(nn.Module):
    """LeViT's linear layer with a batch norm of tokens."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x):
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


def test_norms_of_tokens_are_folded():
    torch.manual_seed(0)
    net = nn.Sequential(TokenNorm(16, 32), nn.Hardswish(), TokenNorm(32, 16)).eval()
    for layer in (net[0], net[2]):
        layer.norm.running_mean.normal_()
        layer.norm.running_var.uniform_(0.5, 2)
    prune(net[0].linear, *range(8))
    prune(net[2].linear, *range(16))
    fast = compact(net, torch.randn(2, 49, 16))
    assert [step.target for step in fast.compact_steps[1:-1]] == ["0.linear", "1", "2.linear"]
    # Too few numbers for a gather to pay: the 8 columns of the first layer stay.
    assert fast.get_submodule("0.linear").weight.shape == (16, 16)
    x = torch.randn(3, 25, 16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)


def test_features_that_something_else_reads_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 64)

        def forward(self, x):
            y = self.first(x)
            return self.second(F.relu(y)), y

    net = Net().eval()
    prune(net.second, *range(62))
    fast = compact(net, torch.randn(500, 8))
    assert type(fast.first) is nn.Linear and fast.first.out_features == 64
    assert type(fast.second) is ColumnLinear and fast.second.columns.tolist() == [62, 63]


def test_the_cost_model_keeps_layers_of_few_numbers_dense():
    layer = ColumnLinear.of(prune(nn.Linear(64, 64), 0))
    assert not decide_linear(layer, 1).is_compact
    assert decide_linear(ColumnLinear.of(prune(nn.Linear(64, 64), *range(32))), 500).is_compact


def test_pruned_by_spp_then_compact():
    torch.manual_seed(0)
    net = block_net().train()
    net.example_input_array = x = torch.randn(1, 3, 128, 128)
    pruner = SPPPruner(net, speedup=4, A=0.9, interval=1)
    for _ in range(100):
        pruner.update()
    assert pruner.finished and pruner.num_target["1.first"] == 24
    pruner.fold()
    fast = compact(net, x)
    assert len(fast.get_submodule("2.first").columns) == 8
    assert fast.get_submodule("2.second").in_features == 32
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net.eval()(x), rtol=1e-4, atol=1e-5)
