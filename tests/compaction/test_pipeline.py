"""compact(): the same function, without what pruning left over."""

from __future__ import annotations

import copy
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning import (
    ConvNet,
    SPPPruner,
    compact,
    compact_report,
    count_macs,
    load_compact,
    save_compact,
)
from spp_lightning.compaction import ColumnConv2d, pipeline
from spp_lightning.compaction.graph import replace
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.kernels.cpu import cost


def prune(net: nn.Module, ratio: float, seed: int = 0) -> nn.Module:
    """Set random columns of every convolution to 0, except depthwise ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d) and layer.weight.shape[1] > 1:
                matrix = layer.weight.flatten(1)
                out = torch.rand(matrix.shape[1], generator=generator) < ratio
                layer.weight.copy_(matrix.masked_fill(out, 0).view(layer.weight.shape))
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(generator=generator)
                layer.running_var.uniform_(0.5, 2, generator=generator)
                layer.weight.uniform_(0.2, 0.6, generator=generator)
                layer.bias.normal_(generator=generator)
    return net.eval()


def check_same(net: nn.Module, fast: nn.Module, x: Tensor) -> None:
    """The outputs for a batch, and for another batch size, agree with float64."""
    for batch in (x, torch.cat([x, 2 * x])):
        with torch.no_grad():
            expected = copy.deepcopy(net).double().eval()(batch.double())
            found = fast(batch)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def columns(fast: nn.Module) -> dict[str, int]:
    """Stored columns of the compact layers."""
    named = fast.named_modules()
    return {name: len(x.columns) for name, x in named if isinstance(x, ColumnConv2d)}


def operations(fast: nn.Module) -> list[str]:
    """What is computed outside of modules."""
    calls = [x for x in fast.compact_steps if x.kind in ("function", "method")]
    return [getattr(x.target, "__name__", str(x.target)) for x in calls]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ConvNet": (ConvNet, (3, 3, 32, 32)),
    "vgg11": (lambda: torchvision.models.vgg11().features, (1, 3, 64, 64)),
    "resnet18": (torchvision.models.resnet18, (2, 3, 64, 64)),
    "resnext": (
        lambda: torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=16
        ),
        (1, 3, 64, 64),
    ),
    "densenet": (
        lambda: torchvision.models.DenseNet(8, (2, 2), 16),
        (1, 3, 64, 64),
    ),
    "squeezenet": (torchvision.models.squeezenet1_1, (1, 3, 64, 64)),
    "mobilenet": (torchvision.models.mobilenet_v3_small, (1, 3, 64, 64)),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, (1, 3, 64, 64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_the_same(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net, x = prune(make(), 0.75), torch.randn(shape)
    before = copy.deepcopy(net.state_dict())
    kinds = [type(module) for module in net.modules()]
    fast = compact(net, x)
    assert columns(fast)
    check_same(net, fast, x)
    assert not any(module.training for module in fast.modules())
    # The network itself is left as it was.
    assert [type(module) for module in net.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_paper_net_becomes_three_layers_and_a_linear_one() -> None:
    fast = compact(prune(ConvNet(), 0.75), torch.randn(2, 3, 32, 32))
    assert operations(fast) == ["flatten"]
    assert fast.joined_layers == [["conv1", "conv2", "conv3", "ip1"]]
    kinds = [type(module) for module in fast.children()]
    assert kinds == [ColumnConv2d, ColumnConv2d, ColumnConv2d, nn.Linear]


def test_residual_blocks_become_convolutions_alone() -> None:
    torch.manual_seed(0)
    net = prune(torchvision.models.resnet18(), 0.75)
    fast = compact(net, torch.randn(1, 3, 64, 64))
    assert operations(fast) == ["flatten"]  # no addition, no ReLU, no norm is left
    kinds = {type(x) for x in fast.modules() if not list(x.children())}
    assert kinds == {ColumnConv2d, nn.AdaptiveAvgPool2d, nn.Linear}


def test_channels_that_nobody_reads_go_with_their_filters() -> None:
    """Where a channel is read by two layers, or added to another one, both decide."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.b = nn.Conv2d(3, 8, 3, padding=1)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.read = nn.Conv2d(8, 4, 1)
            self.too = nn.Conv2d(8, 4, 1)
            self.join = nn.Conv2d(12, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(self.norm(self.a(x)) + self.b(x))
            z = self.depthwise(y)
            both = torch.cat([self.read(z), torch.sigmoid(self.too(y)), self.read(z)], 1)
            return self.join(both)

    torch.manual_seed(0)
    net = prune(Net(), 0)
    with torch.no_grad():
        net.read.weight[:, [0, 1, 2]] = 0
        net.too.weight[:, [0, 1, 5]] = 0
        net.join.weight[:, 5] = 0  # channel 1 of `too`
    x = torch.randn(2, 3, 12, 12)
    fast = compact(net, x)
    check_same(net, fast, x)
    shapes = {
        name: module.geometry if isinstance(module, ColumnConv2d) else module
        for name, module in fast.named_modules()
    }
    filters = {
        name: shapes[name].filters
        if hasattr(shapes[name], "filters")
        else shapes[name].out_channels
        for name in ("a", "b", "depthwise", "read", "too", "join")
    }
    # 0 and 1 are read by neither. The layer that is called twice is left as it is, and reads all.
    assert filters == {"a": 8, "b": 8, "depthwise": 8, "read": 4, "too": 3, "join": 5}

    class Once(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(self.norm(self.a(x)) + self.b(x))
            return self.join(torch.cat([self.read(self.depthwise(y)), self.too(y), x, x[:, :1]], 1))

    torch.manual_seed(0)
    once = prune(Once(), 0)
    once.load_state_dict(net.state_dict())
    fast = compact(once, x)
    check_same(once, fast, x)
    sizes = {name: len(fast.get_submodule(name).bias) for name in ("a", "b", "depthwise", "too")}
    assert sizes == {"a": 6, "b": 6, "depthwise": 6, "too": 3}


def test_pruned_filters_go_where_what_they_leave_is_a_number() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3)),
    ).eval()
    with torch.no_grad():
        net[0].weight[:4], net[0].bias[:4] = 0, -1.0  # 0 behind the ReLU
        net[2].weight[2:5], net[2].bias[2:5] = 0, 3.0  # read without padding: goes into a bias
        net[4].weight[1], net[4].bias[1] = 0, 2.0
    x = torch.randn(2, 3, 9, 9)
    fast = compact(net, x)
    check_same(net, fast, x)
    assert [len(fast.get_submodule(str(i)).bias) for i in (0, 2, 4, 6)] == [4, 5, 5, 4]


def test_what_the_callback_prunes() -> None:
    """A network fresh from the pruner, in training mode and with each kind of weight group."""
    for granularity, ratio in (("column", 0.75), ("channel", 0.5), ("filter", 0.5)):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)
        )
        x = torch.randn(2, 3, 16, 16)
        pruner = SPPPruner(net, prune_ratio=ratio, granularity=granularity, interval=1, A=0.25)
        with pytest.raises(ValueError, match="`model` is still being pruned"):
            compact(net, x)
        step = 0
        while not pruner.finished:
            pruner.step(step)
            step += 1
        pruner.fold()
        assert net.training
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a network this small may be faster dense
            fast = compact(net, x)
        assert net.training
        check_same(net, fast, x)


def test_what_is_changed_in_place_or_laid_out_anew() -> None:
    """A residual that an addition overwrites is read later; a layout that a view needs stays."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.third = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            kept = torch.sigmoid(self.first(x))
            kept += self.second(kept)
            y = F.relu(self.third(kept), inplace=True) + kept
            y = y.transpose(1, 2).contiguous(memory_format=torch.contiguous_format)
            return y.view(x.shape[0], -1)

    torch.manual_seed(0)
    net, x = prune(Net(), 0.7), torch.randn(2, 3, 10, 10)
    before = torch.get_rng_state()
    fast = compact(net, x)
    assert torch.equal(torch.get_rng_state(), before)  # nobody's random numbers are used up
    check_same(net, fast, x)


class InPlace(nn.Module):
    """Layers that read a tensor which is overwritten after that, or before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.d, self.relu = nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.kind == "shortcut read before":
            shortcut = self.d(y)
            return self.b(F.relu(y, inplace=True)) + shortcut
        if self.kind == "sum":
            z = self.b(y)
            kept = y
            y += z
            return self.d(y) + self.b(kept)
        if self.kind == "after it was read":
            z = self.b(y)
            y.relu_()
            return z + y
        if self.kind == "module as a statement":
            self.relu(y)
            return self.b(y)
        if self.kind == "methods as statements":
            y.mul_(2)
            y.add_(1)
            return self.b(y)
        if self.kind.startswith("a view"):
            shape = y.shape
            flat = y.flatten(2)
            self.relu(flat)
            return self.b(y if self.kind == "a view, and then its base" else flat.view(shape))
        y.view(len(y.shape), -1)  # a view of what is written to
        y[:, 0] = 1
        return self.b(y)


KINDS = ("shortcut read before", "sum", "after it was read", "module as a statement")


OTHERS = ("methods as statements", "a view", "a view, and then its base", "a part")


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
@pytest.mark.filterwarnings("ignore:The network")
def test_writing_in_place(kind: str) -> None:
    torch.manual_seed(0)
    net, x = prune(InPlace(kind), 0.7), torch.randn(2, 3, 10, 10)
    fast = compact(net, x)
    assert columns(fast)
    assert isinstance(fast, CompactNetwork) == (kind not in OTHERS[2:])
    check_same(net, fast, x)
    assert net.relu.inplace


def test_augmented_assignment_changes_what_other_names_read() -> None:
    """torch.fx alone takes ``x += y`` for ``x = x + y``, whose old value other names would read."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x += 1  # the input itself, which compact networks leave alone
            y = self.conv(x)
            z, height = y, y.shape[2]
            old = height
            height += 1
            y *= 2
            return y, z.clamp(-0.5, 0.5), y * height, y * old

    net, x = Net().eval(), torch.full((1, 1, 1, 1), 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = compact(net, x.clone())
    assert isinstance(fast, CompactNetwork)
    for value in (0.3, -0.1, 2.0):
        given = torch.full((1, 1, 1, 1), value)
        with torch.no_grad():
            expected, found = net(given.clone()), fast(given)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert given.item() == torch.tensor(value).item()


class Siamese(nn.Module):
    """Two images of different sizes, through shared and separate layers, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU())
        self.joined = nn.Conv2d(32, 8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.joined(torch.cat([self.first(x), self.second(y)], 1)).flatten(1)


class Gate(nn.Module):
    """Adds one number per image and channel to its images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(F.adaptive_avg_pool2d(x, 1)))


def test_an_example_of_one_pixel_stands_for_any_images() -> None:
    net = prune(Gate(), 0.75)
    fast = compact(net, torch.randn(1, 8, 1, 1))
    assert len(columns(fast)) == 2
    for size in ((1, 8, 1, 1), (3, 8, 9, 7)):
        check_same(net, fast, torch.randn(size))


def test_a_network_of_two_inputs(tmp_path: Path) -> None:
    net = prune(Siamese(), 0.75)
    x, y = torch.randn(2, 3, 16, 16), torch.randn(2, 1, 32, 32)
    fast = compact(net, (x, y))
    assert all(isinstance(fast.get_submodule(name), ColumnConv2d) for name in ("first.0", "joined"))
    save_compact(fast, tmp_path / "net.spp")
    with torch.no_grad():
        expected = copy.deepcopy(net).double()(x.double(), y.double())
        for made in (fast, load_compact(tmp_path / "net.spp")):
            assert float((made(x, y) - expected).abs().max() / expected.abs().max()) < 1e-5
    with pytest.raises(ValueError, match=r"`example_input` .* tuple of tensors, got int\."):
        compact(net, (x, 3))


def test_hooks_are_kept() -> None:
    net, x = prune(ConvNet(), 0.75), torch.randn(2, 3, 32, 32)
    net.conv1.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.warns(UserWarning, match="forward hooks, at conv1.*one by one: conv2, conv3"):
        fast = compact(net, x)
    check_same(net, fast, x)


def test_what_tracing_loses_is_noticed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * (1 + torch.rand(()))  # one number for ever, in a trace

    net, x = prune(Net(), 0.7), torch.randn(2, 3, 9, 9)
    with pytest.warns(UserWarning, match="computes something else when it is traced"):
        compact(net, x)


@pytest.mark.filterwarnings("error")
def test_magnified_rounding_errors_are_not_taken_for_a_wrong_trace() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(1e5 * self.conv(x))

    net, x = prune(Net(), 0.75), torch.randn(2, 16, 16, 16)
    fast = compact(net, x)
    assert isinstance(fast, CompactNetwork)
    with torch.no_grad():
        expected, found, true = net(x), fast(x), net.double()(x.double())
    error = float((expected - true).norm() / true.norm())
    assert error > 1e-3  # more than what is allowed where nothing is magnified
    assert float((found - expected).norm() / expected.norm()) < 10 * error


@pytest.mark.parametrize("ratio", [0.0, 0.75])
@pytest.mark.filterwarnings("ignore:The network has too few")
def test_outputs_of_any_kind_and_tensors_without_a_batch(ratio: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
            self.place = nn.Parameter(torch.randn(1, 8, 12, 12))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.a(x) + self.place
            return {"first": y, "second": self.b(F.relu(y))}

    torch.manual_seed(0)
    net = prune(Net(), ratio).requires_grad_(False)
    fast = compact(net, torch.randn(1, 3, 12, 12))
    x = torch.randn(4, 3, 12, 12)
    for name, value in net(x).items():
        torch.testing.assert_close(fast(x)[name], value, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in fast.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype: torch.dtype) -> None:
    net, x = prune(ConvNet(), 0.75), torch.randn(8, 3, 32, 32)
    fast = compact(net, x)
    torch.set_default_dtype(dtype)
    try:
        check_same(net, fast, torch.randn(9, 3, 32, 32, dtype=torch.float32))
        fast(x).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)


def test_macs_of_compact_networks() -> None:
    net, x = prune(ConvNet(), 0.75), torch.randn(1, 3, 32, 32)
    assert count_macs(compact(net, x), x) == count_macs(net, x)


def test_what_cannot_be_traced_is_replaced_layer_by_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding="same")

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y) if y.sum() > -1e9 else y

    net, x = prune(Net(), 0.5), torch.randn(2, 3, 9, 9)
    with pytest.warns(UserWarning, match="can't be traced.*one by one: first, second"):
        fast = compact(net, x)
    assert set(columns(fast)) == {"first", "second"}
    check_same(net, fast, x)


def test_layers_that_cannot_be_compact_stay_and_are_named() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 4, 3)
    )
    prune(net, 0.6)
    x = torch.randn(2, 3, 24, 24)
    with pytest.warns(UserWarning, match="0 .*padding_mode"):
        fast = compact(net, x)
    check_same(net, fast, x)
    assert set(columns(fast)) == {"2"}


def test_training_goes_on_with_norms() -> None:
    """With its norms, a compact network takes the steps of the masked dense one."""
    torch.manual_seed(0)
    net = prune(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        ),
        0.7,
    )
    x = torch.randn(4, 3, 16, 16)
    with pytest.raises(ValueError, match="`fold` must be True or False, got 'no'"):
        compact(net, x, fold="no")
    fast = compact(net, x, fold=False)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fast.modules()) == 2
    kept = {k: (v != 0).any(0, keepdim=True) for k, v in net.named_parameters() if v.dim() == 4}
    for model in (net.train(), fast.train()):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                for name, value in model.named_parameters():
                    if value.dim() == 4:
                        value.mul_(kept[name])
    check_same(net.eval(), fast.eval(), x)


def test_nothing_to_gain_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network in which every layer is faster dense comes back as it is, and can be saved."""
    net = prune(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2)), 0.2)
    x = torch.randn(1, 8, 4, 4)
    assert columns(compact(net, x)) == {"0": len(ColumnConv2d.of(net[0]).columns)}
    monkeypatch.setattr(cost, "dense_us", lambda *_: 0.1)
    with pytest.warns(UserWarning, match=r"no layer is faster compact .* stays dense"):
        fast = compact(net, x)
    assert columns(fast) == {}
    save_compact(fast, tmp_path / "net.spp")
    again = load_compact(tmp_path / "net.spp")
    assert torch.equal(fast(x), net(x)) and torch.equal(again(x), net(x))


@pytest.mark.parametrize("times", [[1.0, 2.0], [1.0, 0.5]], ids=["slower", "faster"])
def test_tuning_measures_the_network(times: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = prune(ConvNet(), 0.75), torch.randn(1, 3, 32, 32)
    monkeypatch.setattr(pipeline, "interleaved_ms", lambda *_, **__: times)
    monkeypatch.setattr(replace, "interleaved_ms", lambda *_, **__: [1.0, 0.5])
    if times[1] > times[0]:
        with pytest.warns(UserWarning, match=r"1\.000 ms dense, 2\.000 ms compact .* stays dense"):
            assert columns(compact(net, x, tune=True)) == {}
    else:
        fast = compact(net, x, tune=True)
        assert len(columns(fast)) == 3
        assert {row.reason for row in compact_report(fast, x).layers} == {"measured"}
        check_same(net, fast, x)


@pytest.mark.parametrize("name", ["ConvNet", "resnet18"])
def test_two_calls_give_equal_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock is read: the same graph, the same layers, the same kernels."""
    for clock in ("perf_counter", "perf_counter_ns", "monotonic", "process_time"):
        monkeypatch.setattr(time, clock, None)
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net, x = prune(make(), 0.4), torch.randn(shape)
    first, second = compact(net, x), compact(net, x)
    assert repr(first) == repr(second)  # which tells all steps
    assert compact_report(first, x) == compact_report(second, x)
    assert torch.equal(first(x), second(x))


def test_a_report_tells_what_was_chosen_and_why() -> None:
    torch.manual_seed(0)
    net, x = prune(torchvision.models.resnet18(), 0.9), torch.randn(1, 3, 64, 64)
    torch.nn.init.normal_(net.conv1.weight)  # nothing pruned
    fast = compact(net, x)
    before = copy.deepcopy(fast.state_dict())
    report = compact_report(fast, x)
    rows = {row.name: row for row in report.layers}
    convolutions = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(rows) == sorted(convolutions)
    layer = fast.get_submodule("layer1.0.conv1")
    row = rows["layer1.0.conv1"]
    assert (row.kept, row.columns) == (len(layer.columns), layer.geometry.num_columns)
    assert row.kernel in {"pixel-vectorised", "channel-blocked"} and row.reason == "cost model"
    assert row.us is not None and row.dense_us is not None and row.us < row.dense_us
    assert rows["conv1"].kept == 147
    for row in report.layers:
        assert (row.kernel == "dense") == (
            not isinstance(fast.get_submodule(row.name), ColumnConv2d)
        )
        text = next(line for line in str(report).splitlines() if row.name in line.split())
        assert f"{row.kept}" in text and row.kernel in text
    assert set(sum(report.chains, ())) <= set(rows)
    assert all(torch.equal(value, before[key]) for key, value in fast.state_dict().items())
    for wrong in (nn.Sequential(nn.Linear(3, 2)), None):
        with pytest.raises(ValueError, match="`network` must"):
            compact_report(wrong, x)


def test_the_report_of_the_paper_net_is_one_call() -> None:
    net, x = prune(ConvNet(), 0.75), torch.randn(1, 3, 32, 32)
    report = compact_report(compact(net, x), x)
    assert report.chains == (("conv1", "conv2", "conv3"),)


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory as Linux tells it")
def test_memory_doesnt_grow_with_the_number_of_image_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = prune(ConvNet(), 0.75)
    net.ip1 = nn.Identity()
    fast = compact(net.requires_grad_(False), torch.randn(1, 3, 32, 32))
    x = torch.randn(1, 3, 48, 48)
    monkeypatch.setattr(time, "perf_counter", None)
    sizes = [(height, width) for height in range(16, 48) for width in range(16, 48)]
    fast(x)
    used = []
    for height, width in sizes:
        fast(x[..., :height, :width].contiguous())
        used.append(int(Path("/proc/self/statm").read_text().split()[1]))
    pages = used[-1] - used[99]
    assert pages * os.sysconf("SC_PAGE_SIZE") < 2**20


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (None, torch.zeros(1), "`model` must be a network"),
        (nn.Conv2d(3, 4, 3), None, "`example_input` must be a tensor"),
        (nn.Conv2d(3, 4, 3), torch.zeros(1, 2, 8, 8), "`example_input`.*fails for it"),
        (nn.Conv2d(3, 4, 3, device="meta"), torch.zeros(1, 3, 8, 8), "`model` must hold values"),
        (nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8, device="meta"), "`example_input` must hold"),
    ],
)
def test_bad_arguments(model: nn.Module, example: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compact(model, example)
