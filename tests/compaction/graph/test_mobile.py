"""Blocks of mobile networks: depthwise layers and activations are computed with the others."""

import pytest
import torch
from networks import pruned
from torch import nn

from spp_lightning.compaction import ColumnConv2d, compact, load_compact, save_compact, to_dense
from spp_lightning.compaction.kernels.cpu.library import is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="built without the kernels")


class InvertedResidual(nn.Module):
    """Expand, depthwise, project, and the input added to it."""

    def __init__(self, channels: int, kernel: int, activation: type[nn.Module]) -> None:
        super().__init__()
        inner = 4 * channels
        self.expand = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), activation()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            activation(),
        )
        self.project = nn.Sequential(
            nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x):
        return x + self.project(self.depthwise(self.expand(x)))


def network(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1),
        activation(),
        InvertedResidual(12, 3, activation),
        InvertedResidual(12, 5, activation),
        nn.Conv2d(12, 12, 3, 2, 1, groups=12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()
    for norm in (x for x in net.modules() if isinstance(x, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.bias.data.normal_()
    return net


ACTIVATIONS = [nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.ReLU6]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_block_is_one_call(activation, tmp_path):
    net, x = pruned(network(activation)), torch.randn(1, 3, 64, 64)
    fast = compact(net, x)
    # Nothing is left beside the layers: no norm, no activation, no addition.
    called = [step.target for step in fast.compact_steps if step.kind != "input"]
    assert sum(isinstance(fast.get_submodule(y), ColumnConv2d) for y in called[:8]) == 8
    assert ["3.expand.0", "3.depthwise.0", "3.project.0"] in fast.joined_layers
    save_compact(fast, tmp_path / "net.spp")
    with torch.no_grad():
        for given in (x, torch.randn(3, 3, 50, 43)):
            expected, found = net(given), fast(given)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(load_compact(tmp_path / "net.spp")(given), found)
            torch.testing.assert_close(to_dense(fast)(given), expected, rtol=1e-4, atol=1e-5)


def test_a_compact_block_trains_as_the_network_does():
    net, x = pruned(network(nn.SiLU)), torch.randn(2, 3, 32, 32)
    fast = compact(net, x)
    dense = to_dense(fast)
    fast(x).square().sum().backward()
    dense(x).square().sum().backward()
    for name in ("2.depthwise.0", "3.project.0", "4"):
        ours, theirs = fast.get_submodule(name), dense.get_submodule(name)
        gradient = theirs.weight.grad.flatten(1)
        if ours.geometry.is_depthwise:
            gradient = gradient.flatten()[None]
        torch.testing.assert_close(ours.weight.grad, gradient[:, ours.columns.long()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    net, x = pruned(network(nn.SiLU)).to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype)
    with torch.no_grad():
        expected = net.double()(x.double())
        fast = compact(net.to(dtype), x)
        tolerance = {torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
        torch.testing.assert_close(fast(x).double(), expected, rtol=tolerance, atol=tolerance)
        # A network made compact in float32, and then of another type, with its depthwise layers.
        fast = compact(net.float(), x.float()).to(dtype)
        tolerance = max(tolerance, 1e-5)
        torch.testing.assert_close(fast(x).double(), expected, rtol=tolerance, atol=tolerance)
