"""quantize_compact(): which layers and values become int8, how close the outputs stay, errors."""

import copy
import pickle

import pytest
import torch
import torchvision
from networks import pruned
from torch import fx, nn
from torch.nn import functional as F

from spp_lightning import ConvNet, compact, quantize_compact, quantize_report
from spp_lightning.compaction.geometry import dense_weight
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.trace import trace
from spp_lightning.compaction.layers import int8_pool
from spp_lightning.compaction.layers import quantized as int8_layers
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.quantized import Quantize, QuantizedConv2d, QuantizedLinear


class Branches(nn.Module):
    """Values of all kinds: concatenated, pooled, sliced, added, read by float layers, too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.joined = nn.Conv2d(32, 16, 3, stride=2, padding=1)
        self.mixed = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        y = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)  # uint8, one scale
        y = F.relu(self.joined(y) + x[:, :, ::2, ::2])  # read by a layer and by a sigmoid: float
        z = self.mixed(y) * torch.sigmoid(y)
        return self.last(z).flatten(1)


NETWORKS = {  # and how many values are quantised behind float steps
    "ConvNet": (ConvNet, 32, 3),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 40, 1),
    "mobilenet": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 40, 18),
    "branches": (Branches, 16, 3),
}


def made(name):
    build, size, _ = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = pruned(build())
        batches = [torch.randn(2, 3, size, size) for _ in range(2)]
    return compact(net, batches[0]), batches


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    net, batches = made(request.param)
    before = (net.compact_steps, copy.deepcopy(net.state_dict()), net(batches[0]))
    return request.param, net, quantize_compact(net, batches), batches, before


def test_outputs_stay_close(network):
    name, net, quantized, batches, _ = network
    report = quantize_report(net, quantized, batches)
    assert report.snr_db > 20
    for row in report.layers:
        assert row.precision == "float32" or 30 < row.snr_db < 70, row
    assert isinstance(quantized, CompactNetwork) and not quantized.training
    assert sum(isinstance(x, Quantize) for x in quantized.modules()) == NETWORKS[name][2]
    if name == "mobilenet":
        why = {row.reason for row in report.layers if row.precision == "float32"}
        assert why == {"depthwise: there is no int8 kernel", SMALL}
    # Images that the network was not calibrated on.
    x = torch.randn(3, *batches[0].shape[1:], generator=torch.Generator().manual_seed(1))
    error = quantized(x) - net(x)
    assert error.norm() < 0.2 * net(x).norm()


SMALL = "a linear layer of fewer than 65,536 weights"


def test_the_float_network_is_left_as_it_was(network):
    _, net, _, batches, (steps, state, output) = network
    assert net.compact_steps == steps
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert torch.equal(net(batches[0]), output)


def test_two_calls_and_copies_give_the_same_bits(network):
    _, net, quantized, batches, _ = network
    expected = quantized(batches[0])
    again = quantize_compact(net, iter(batches))
    others = (again, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)))
    for other in others:
        assert torch.equal(other(batches[0]), expected)
    for tensor in (again.state_dict()[name] for name in again.state_dict()):
        if tensor.is_floating_point():
            tensor.mul_(0.5)
    assert not torch.equal(again(batches[0]), expected)
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(again(batches[0]), expected)


def test_kernels_and_torch_compute_the_same_bits(network, monkeypatch):
    _, _, quantized, batches, _ = network
    expected = [quantized(x) for x in batches]
    for module in (int8_layers, int8_pool):  # not float pools, which torch rounds otherwise
        monkeypatch.setattr(module, "is_unwatched", lambda *_: False)
    for x, y in zip(batches, expected, strict=True):
        assert torch.equal(quantized(x), y)


def test_values_between_layers_are_uint8():
    net, batches = made("branches")
    quantized = quantize_compact(net, batches)
    dtypes = {}
    for name, module in quantized.named_modules():
        if isinstance(module, (QuantizedConv2d, Quantize)):
            module.register_forward_hook(
                lambda _, given, out, name=name: dtypes.update({name: (given[0].dtype, out.dtype)})
            )
    quantized(batches[0])
    real, small = torch.float32, torch.uint8
    layers = ("stem", "left", "right", "joined", "mixed", "last")
    assert [dtypes[name] for name in layers] == [
        *((small, small), (small, small), (small, small)),
        *((small, real), (small, real), (small, real)),
    ]
    left, right = quantized.get_submodule("left").spec, quantized.get_submodule("right").spec
    assert left.output == right.output == quantized.get_submodule("joined").spec.input
    # A slice of a pooled value has that value's scale.
    assert quantized.get_submodule("joined").spec.residual == left.input
    assert quantized.get_submodule("stem").spec.output == left.input


class Beside(nn.Module):
    """A value that is concatenated with what a float operation makes of it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.conv(torch.cat([torch.sigmoid(x), x], 1))


def test_float_operations_read_float_numbers():
    torch.manual_seed(0)
    net = CompactNetwork.of(fx.symbolic_trace(Beside()))
    batches = [torch.randn(2, 3, 8, 8)]
    quantized = quantize_compact(net, batches)
    assert quantize_report(net, quantized, batches).snr_db > 30
    assert sum(isinstance(x, Quantize) for x in quantized.modules()) == 1


def test_dense_networks_are_folded_and_fused():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = torchvision.models.resnet18(num_classes=10).eval()
        batches = [torch.randn(2, 3, 40, 40)]
    net = CompactNetwork.of(trace(dense, (batches[0],)))  # as `compact` gives back what stays dense
    quantized = quantize_compact(net, batches)
    kinds = [type(x) for x in quantized.modules() if not list(x.children())]
    assert kinds.count(QuantizedConv2d) == 20
    assert not {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, ColumnConv2d} & {*kinds}
    assert quantize_report(net, quantized, batches).snr_db > 25


def test_networks_that_kept_their_norms_are_folded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = pruned(torchvision.models.resnet18(num_classes=10))
        batches = [torch.randn(2, 3, 40, 40)]
    fast = compact(net, batches[0], fold=False)
    assert any(isinstance(x, nn.BatchNorm2d) for x in fast.modules())
    quantized = quantize_compact(fast, batches, keep=["layer3.0.conv1"])
    kinds = [type(x) for x in quantized.modules() if not list(x.children())]
    assert kinds.count(QuantizedConv2d) == 19 and kinds.count(ColumnConv2d) == 1
    assert nn.BatchNorm2d not in kinds
    assert quantize_report(fast, quantized, batches).snr_db > 20


def test_large_linear_layers_become_int8():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)),
            *(nn.Linear(4096, 64), nn.ReLU(), nn.Linear(64, 10)),
        )
        batches = [torch.randn(8, 3, 16, 16)]
    net[4].weight.data[:, 100:3000] = 0
    fast = compact(net, batches[0])
    quantized = quantize_compact(fast, batches)
    linear = quantized.get_submodule("4")
    assert type(linear) is QuantizedLinear and linear.clamp[0] == 0
    assert linear.weight.shape == (64, 1196)
    assert type(quantized.get_submodule("6")) is nn.Linear
    report = quantize_report(fast, quantized, batches)
    assert [row.reason for row in report.layers] == ["", "", SMALL]
    assert report.snr_db > 30
    assert torch.equal(quantized.train()(batches[0]), quantized.eval()(batches[0]))


def test_kept_and_inexact_layers_stay_float():
    net, batches = made("resnet18")
    quantized = quantize_compact(net, batches, keep=["layer1.*", "conv1"])
    report = quantize_report(net, quantized, batches)
    kept = [row.name for row in report.layers if row.precision == "float32"]
    names = ["conv1", *(f"layer1.{i}.conv{j}" for i in (0, 1) for j in (1, 2)), "fc"]
    assert kept == names
    assert {row.reason for row in report.layers[:5]} == {"named by `keep`"}
    assert type(quantized.get_submodule("layer1.0.conv1")) is ColumnConv2d
    errors = sorted(
        row.error for row in quantize_report(net, quantize_compact(net, batches), batches).layers
    )
    limit = (errors[-3] + errors[-2]) / 2
    found = quantize_report(net, quantize_compact(net, batches, max_error=limit), batches)
    left = [row for row in found.layers if "is above `max_error`" in row.reason]
    assert len(left) == 2


def test_layers_with_large_errors_are_found():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    net[0].weight.data[:4] *= 1e4  # a tensor has one scale: the other channels get no steps
    net[1].weight.data[:, :4] *= 1e-4
    for conv in net:
        conv.weight.data[:, 4:6] = 0
    batches = [torch.randn(4, 8, 16, 16)]
    fast = compact(net, batches[0])
    report = quantize_report(fast, quantize_compact(fast, batches), batches)
    worst = max(report.layers, key=lambda row: row.error)
    assert (worst.name, worst.error > 0.2) == ("1", True)
    assert str(report).splitlines()[2].split()[:2] == ["1", "int8"]


def test_wrong_arguments():
    net, batches = made("ConvNet")
    x = batches[0]
    for arguments, message in (
        ((pruned(ConvNet()), batches), "`net` must be a network that `compact` made"),
        ((net, []), "`batches` must hold at least one batch"),
        ((net, x), "`batches` must be a list of batches, got one tensor"),
        ((net, 3), "`batches` must be a list of batches, got int"),
        ((net, [x, x[:, :2]]), r"`batches\[1\]` \(=\(2, 2, 32, 32\), torch.float32\) must be"),
        ((net, [[x, torch.zeros(2)]]), r"Of a loader of images and labels, give"),
        ((net, [x * torch.nan]), "`batches` must give finite numbers"),
        ((net, batches, "conv1"), "`keep` must be a list of patterns"),
        ((net, batches, ["conv1", "c?nv9"]), r"'c\?nv9' matches none of conv1, conv2, conv3"),
        ((net, batches, ["conv*"]), "has no layer that can become int8.*named by `keep`"),
        ((net, batches, (), -1.0), "`max_error` must be a number above 0"),
        ((net, batches, (), None, "best"), "`method` must be one of mse, percentile, max"),
        ((copy.deepcopy(net).double(), [x.double()]), "`net` must be of float32"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_compact(*arguments)
    with pytest.raises(ValueError, match="`quantized` must be what `quantize_compact` made of"):
        quantize_report(
            made("resnet18")[0], quantize_compact(net, batches), [torch.zeros(1, 3, 32, 32)]
        )


def test_weights_of_every_filter_use_all_of_int8():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 4, 1))
    net[0].weight.data *= torch.tensor([1e-3, 1.0, 0.0, 50.0, 2.0, 1.0])[:, None, None, None]
    net[0].weight.data[:3, 0] = net[0].weight.data[3:, 1] = 0
    batches = [torch.randn(2, 8, 9, 9)]
    quantized = quantize_compact(CompactNetwork.of(fx.symbolic_trace(net)), batches)
    layer = quantized.get_submodule("0")
    geometry, rows = layer.geometry, layer.weight.float() * 1.0
    dense = dense_weight(rows, layer.columns, geometry)
    assert dense.abs().amax((1, 2, 3)).tolist() == [127, 127, 0, 127, 127, 127]
    error = dense * layer.weight_scale[:, None, None, None] - net[0].weight
    assert (error.abs().amax((1, 2, 3)) <= 0.501 * layer.weight_scale).all()
