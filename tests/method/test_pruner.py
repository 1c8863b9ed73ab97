"""SPPPruner in a bare PyTorch loop."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spp_lightning import SPPPruner, materialize_weights


@pytest.fixture(autouse=True)
def _same_networks():
    """The same weights and data in every test, without touching the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2))


def train(net, pruner, optimizer, steps, data=None):
    """Train on noise; the steps are numbers."""
    x = torch.randn(2, 3, 8, 8) if data is None else data
    for step in steps:
        pruner.step(step, optimizer)
        net(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.01)


def set_probability(pruner, **probabilities):
    state = pruner.state_dict()
    for name, values in probabilities.items():
        state["probability"][name.strip("_")] = torch.as_tensor(values, dtype=torch.float64)
    pruner.load_state_dict(state)


def finish(pruner, at_most=300):
    for _ in range(at_most):
        pruner.update()
    assert pruner.finished


def saved(thing, **options):
    """The thing after a way through a file."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


def zero_groups(layer, granularity):
    weight = layer._parameters["weight"].detach().float().numpy()
    groups = reference.members(weight.shape, layer.groups, granularity)
    return sum(all(weight[spot] == 0 for spot in group) for group in groups)


class ScaledConv2d(nn.Conv2d):
    """A convolution with a forward of its own, in which zeros of the weight stay zeros."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * 0.5, self.bias)


class StandardizedConv2d(nn.Conv2d):
    """Weight standardisation, as in NFNet and BiT ResNets: every filter has the mean 0."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.gain = nn.Parameter(torch.zeros(self.out_channels, 1, 1, 1))

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, self.gain * weight, self.bias)


# --- exactly the target number of groups ---


@pytest.mark.parametrize(
    ("layer", "granularity", "expected"),  # expected: min(ceil(0.7 · N_c), N_c − 1)
    [
        (lambda: nn.Conv1d(5, 6, 3), "column", 11),
        (lambda: nn.Conv3d(2, 4, (2, 3, 1)), "column", 9),
        (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), "column", 19),
        (lambda: nn.Conv2d(3, 4, (3, 2), dilation=(1, 2), padding="same"), "column", 13),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "column", 19),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), "column", 26),
        (lambda: nn.Conv2d(4, 8, 3, groups=4), "column", 26),
        (lambda: nn.Conv2d(10, 3, 1), "column", 7),
        (lambda: nn.Conv2d(2, 3, 1), "column", 1),
        (lambda: nn.Conv2d(1, 3, 1), "column", 0),
        (lambda: nn.Conv2d(10, 4, 3), "channel", 7),
        (lambda: nn.Conv2d(10, 4, 3, groups=2), "channel", 7),
        (lambda: nn.Conv2d(3, 10, 3), "filter", 7),
        (lambda: nn.Conv2d(4, 10, 3, groups=2), "filter", 7),
        (lambda: ScaledConv2d(3, 4, 3), "column", 19),
        (lambda: nn.Conv2d(3, 4, 3, dtype=torch.bfloat16), "column", 19),
        (lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), "column", 19),
        (lambda: nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last), "column", 26),
    ],
    ids=[
        *("conv1d", "conv3d", "stride", "dilation", "padding_mode", "grouped", "depthwise", "1x1"),
        *("two_groups", "one_group", "channel", "channel_grouped", "filter", "filter_grouped"),
        *("own_forward", "bf16", "channels_last", "channels_last_grouped"),
    ],
)
def test_exact_count(layer, granularity, expected):
    layer = layer()
    net = nn.Sequential(layer)
    parameter, strides = layer.weight, layer.weight.stride()
    x = torch.randn(4, layer.in_channels, *(7 for _ in layer.kernel_size), dtype=parameter.dtype)
    pruner = SPPPruner(
        net, prune_ratio=0.7, granularity=granularity, A=0.4, interval=2, layers=["0"]
    )
    assert layer.weight.stride() == strides  # of the masked weight
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    train(net, pruner, optimizer, range(60), x)
    assert pruner.finished
    assert pruner.num_pruned == pruner.num_target == {"0": expected}
    assert set(pruner.probability["0"].tolist()) <= {0.0, 1.0}
    pruner.fold()
    assert zero_groups(layer, granularity) == expected
    assert layer.weight is parameter and parameter.stride() == strides


def test_depthwise_layers_only_by_pattern():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1))
    pruner = SPPPruner(net)
    assert list(pruner.layers) == ["1"] and pruner.skipped == {"0": "depthwise"}
    pruner.fold()
    assert list(SPPPruner(net, layers=["*"]).layers) == ["0", "1"]


def test_ratios_by_pattern():
    net = nn.Sequential(nn.Conv2d(4, 5, 1), nn.Conv2d(5, 10, 1), nn.Conv2d(10, 20, 1))
    pruner = SPPPruner(net, prune_ratio={"0": 0.25, "[02]": 0.5}, interval=1, A=0.5)
    assert pruner.num_target == {"0": 1, "2": 5}
    finish(pruner)
    pruner.fold()
    assert [zero_groups(layer, "column") for layer in net] == [1, 0, 5]
    assert pruner.sparsity == {"0": 0.25, "2": 0.5}
    assert pruner.total_sparsity == 6 / 14


def test_layers_finish_one_by_one():
    net = nn.Sequential(nn.Conv2d(4, 5, 1), nn.Conv2d(5, 10, 1))
    pruner = SPPPruner(net, prune_ratio={"0": 0.25, "1": 0.8}, interval=1, A=0.5)
    step = 0
    while pruner.num_pruned["0"] < 1 and step < 300:
        pruner.step(step)
        step += 1
    assert not pruner.finished
    first = pruner.probability["0"].clone()
    assert sorted(first.tolist()) == [0, 0, 0, 1]
    for later in range(step, step + 100):
        updated = pruner.step(later)
    assert pruner.finished and not updated
    assert step < pruner.num_updates < step + 100  # a finished pruner counts none
    assert torch.equal(pruner.probability["0"], first)
    for name, p in pruner.probability.items():
        assert torch.equal(pruner.mask[name], p < 1)


def test_nothing_to_prune():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    pruner = SPPPruner(net, speedup=1)
    assert pruner.finished and not pruner.step(0)
    assert pruner.expected_updates == 0
    assert pruner.expected_steps == 0


def test_updates_fall_on_the_interval_from_start_step():
    pruner = SPPPruner(small_net(), interval=3, start_step=4)
    asked = [step for step in range(12) for _ in range(2) if pruner.step(step)]
    assert asked == [4, 7, 10]  # a step asked for twice is one step
    assert pruner.num_updates == 3


# --- masks act through the weight alone ---


@pytest.mark.parametrize(
    ("layer", "function", "granularity"),
    [
        (lambda: nn.Conv1d(4, 6, 3, groups=2), F.conv1d, "column"),
        (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2), F.conv2d, "column"),
        (lambda: nn.Conv2d(3, 4, (2, 3), padding=1), F.conv2d, "column"),
        (lambda: nn.Conv2d(6, 4, 3, groups=2), F.conv2d, "channel"),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), F.conv2d, "filter"),
        (lambda: nn.Conv3d(2, 4, 2), F.conv3d, "column"),
    ],
    ids=["conv1d_grouped", "conv2d_grouped", "conv2d", "channel", "filter", "conv3d"],
)
def test_forward_and_gradient(layer, function, granularity):
    layer = layer().double()
    parameter = layer.weight
    value = parameter.detach().clone()
    pruner = SPPPruner(nn.Sequential(layer), granularity=granularity, layers=["0"])
    p = 1 - torch.arange(len(pruner.probability["0"]), dtype=torch.float64) % 4 / 4
    set_probability(pruner, _0=p)  # 1, 3/4, 1/2, 1/4, 1, …
    pruner.step(1)

    def mask(factors):
        mask = reference.weight_mask(factors, value.shape, layer.groups, granularity)
        return torch.from_numpy(mask)

    def plain(x, weight):
        options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return function(x, weight, layer.bias, *options)

    x = torch.randn(2, layer.in_channels, *(9 for _ in layer.kernel_size), dtype=torch.float64)
    sampled, kept_for_good = mask(pruner.mask["0"].tolist()), mask((p < 1).tolist())
    assert 0 < sampled.sum() < kept_for_good.sum() < value.numel()

    masked = (value * sampled).requires_grad_()
    expected = plain(x, masked)
    expected.square().sum().backward()
    output = layer(x)
    output.square().sum().backward()
    assert torch.equal(output, expected)
    assert torch.equal(parameter.grad, masked.grad * sampled)
    assert torch.equal(parameter.detach(), value * kept_for_good)

    layer.eval()
    assert torch.equal(layer.weight, value * mask((1 - p).tolist()))
    assert torch.equal(layer(x), plain(x, value * mask((1 - p).tolist())))
    pruner.fold()
    assert torch.equal(layer(x), plain(x, value * kept_for_good))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluation_follows_every_update_and_ends_with_whole_weights(dtype):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=dtype)).eval()
    parameter, pruner = net[0].weight, SPPPruner(net, A=0.4, interval=1)
    factors = []
    for step in range(60):
        pruner.step(step)
        p = pruner.probability["0"]
        factor = (1 - p).float().to(dtype).view(3, 3, 3)
        assert torch.equal(net[0].weight, parameter * factor)
        assert not net[0].weight[:, (p == 1).view(3, 3, 3)].any()
        factors.append(tuple(factor.flatten().tolist()))
    assert pruner.finished and len(set(factors)) == pruner.num_updates
    assert torch.equal(net[0].weight, parameter)  # the kept groups are at p = 0 again
    assert zero_groups(net[0], "column") == 21


def test_masked_weight_keeps_its_value_but_for_momentum_and_decay():
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False))
    parameter = net[0].weight
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.5, weight_decay=0.25)
    x = torch.randn(4, 2, 3, 3)
    net(x).sum().backward()
    optimizer.step()
    buffer = optimizer.state[parameter]["momentum_buffer"].clone()

    pruner = SPPPruner(net, interval=1000)
    set_probability(pruner, _0=[0.5, 0.0])
    step = next(step for step in range(1, 99) if pruner.step(step) or not pruner.mask["0"][0])
    assert step < 99
    before = parameter.detach().clone()
    optimizer.zero_grad()
    net(x).sum().backward()
    optimizer.step()
    slope = 0.5 * buffer + 0.25 * before
    masked, other = parameter.detach().unbind(1)
    torch.testing.assert_close(masked, (before - 0.1 * slope)[:, 0])
    torch.testing.assert_close(
        other, (before - 0.1 * (slope + x.sum((0, 2, 3)).view(1, 2, 1, 1)))[:, 1]
    )


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda w: torch.optim.SGD(w, 0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda w: torch.optim.Adam(w, 0.01, weight_decay=0.01, amsgrad=True),
        lambda w: torch.optim.AdamW(w, 0.01, weight_decay=0.1),
        lambda w: torch.optim.RMSprop(w, 0.01, momentum=0.9, weight_decay=0.01, centered=True),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop"],
)
def test_no_revival(make_optimizer):
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    parameter = net[0].weight
    optimizer = make_optimizer(net.parameters())

    def tensors():
        state = [v for v in optimizer.state[parameter].values() if v.shape == parameter.shape]
        return torch.stack([parameter.detach(), *state])

    # With A = 1 the least important column is pruned by the first update, at step 5.
    pruner = SPPPruner(net, A=1.0, start_step=5, interval=1000)
    train(net, pruner, optimizer, range(5))
    before = tensors()
    assert (before.flatten(3).abs().amax((0, 1, 3)) > 0).all()
    pruned = None
    for step in range(5, 205):
        train(net, pruner, optimizer, [step])
        if pruned is None:
            pruned = (pruner.probability["0"] == 1).view(3, 3, 3)
            assert pruned.sum() == 1
            assert (before[..., pruned].abs().amax((1, 2)) > 0).all()
        assert (tensors()[..., pruned] == 0).all()
    assert not pruner.finished
    assert (tensors()[..., ~pruned].abs().amax(1) > 0).all()


def test_a_gradient_from_before_the_update_revives_nothing():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    optimizer = sgd(net)
    pruner = SPPPruner(net, A=1.0, interval=1000)
    net(torch.randn(1, 3, 8, 8)).square().sum().backward()
    pruner.step(0, optimizer)
    optimizer.step()
    assert zero_groups(net[0], "column") == pruner.num_pruned["0"] == 1


def test_what_is_written_to_a_pruned_group_has_no_effect():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    pruner = SPPPruner(net, A=1.0, interval=1)
    pruner.update()
    x = torch.randn(1, 3, 8, 8)
    net.eval()
    before = net(x)
    pruned = (pruner.probability["0"] == 1).view(3, 3, 3)
    with torch.no_grad():
        next(net.parameters())[:, pruned] = 5.0
    assert torch.equal(net(x), before)
    pruner.fold()
    assert not net[0].weight[:, pruned].any()


# --- the network stays what it is ---


def test_state_dict_is_that_of_the_plain_network():
    net, plain = small_net(), small_net()
    pruner = SPPPruner(net, A=0.3, interval=2)
    optimizer = sgd(net)
    for step in range(50):
        train(net, pruner, optimizer, [step])
        state = net.state_dict()
        assert list(state) == list(plain.state_dict())
        plain.load_state_dict(state, strict=True)
        for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
        if step == 5:
            # Masked weights are saved with their values; only p = 1 is saved as zeros.
            assert not pruner.mask["0"].all()
            assert (plain[0].weight != 0).all() and pruner.num_pruned["0"] == 0
    assert pruner.finished


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy_of_layer": lambda net: nn.Sequential(*(copy.copy(layer) for layer in net)),
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch_save": lambda net: saved(net, weights_only=False),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_are_plain(make_copy):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), ScaledConv2d(4, 6, 3))
    fresh = vars(nn.Conv2d(4, 6, 3)).keys()
    pruner = SPPPruner(net, A=0.6, interval=1)
    train(net, pruner, sgd(net), range(3))
    assert not pruner.finished and 0 in pruner.mask["0"]
    twin = make_copy(net)
    assert [type(layer) for layer in twin] == [nn.Conv2d, ScaledConv2d]
    assert all(vars(layer).keys() == fresh for layer in twin)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(twin(x), twin.eval()(x))
    assert not torch.equal(net(x), twin(x))  # the masks still act here


def test_fold_leaves_a_plain_network():
    net, plain = small_net(), small_net()
    pruner = SPPPruner(net, A=0.6, interval=2)
    optimizer = sgd(net)
    train(net, pruner, optimizer, range(6))
    assert not pruner.finished and pruner.num_pruned["0"] > 0
    before = [parameter.detach().clone() for parameter in net.parameters()]
    pruner.fold(optimizer)
    pruner.fold()  # a second time changes nothing
    for layer, twin in zip(net, plain, strict=True):
        assert type(layer) is type(twin)
        assert vars(layer).keys() == vars(twin).keys()
        assert not any(value for name, value in vars(layer).items() if name.endswith("hooks"))
    for parameter, value in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    for name, layer in pruner.layers.items():
        assert zero_groups(layer, "column") == pruner.num_pruned[name]
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(net.train()(x), net.eval()(x))
    with pytest.raises(RuntimeError, match=r"masks are folded.*`attach\(\)`"):
        pruner.step(6)
    with pytest.raises(RuntimeError, match=r"masks are folded"):
        pruner.update()
    pruner.attach()
    train(net, pruner, optimizer, range(6, 40))
    assert pruner.finished


# --- sampling ---


def masks_by_step(seed, steps):
    pruner = SPPPruner(small_net(), seed=seed)
    set_probability(pruner, _0=torch.full((27,), 0.5), _2=torch.full((36,), 0.5))
    drawn = []
    for step in steps:
        pruner.sample(step)
        drawn.append(tuple(torch.cat(list(pruner.mask.values())).tolist()))
    return drawn


def test_masks_depend_on_seed_and_step_alone():
    expected = masks_by_step(0, range(5))
    assert len({*expected, *masks_by_step(1, range(5))}) == 10
    torch.manual_seed(123)
    assert masks_by_step(0, [3, 1]) == [expected[3], expected[1]]


def test_masks_do_not_depend_on_the_default_dtype():
    expected = masks_by_step(0, [3])
    torch.set_default_dtype(torch.float64)
    try:
        assert masks_by_step(0, [3]) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_step_leaves_the_global_generator_alone():
    pruner = SPPPruner(small_net(), interval=2)
    before = torch.get_rng_state()
    assert pruner.step(0) and not pruner.step(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_are_out_with_probability_p():
    steps = 4000
    pruner = SPPPruner(nn.Sequential(nn.Conv2d(10, 4, 3)), interval=10**9)
    p = torch.linspace(0, 1, 90, dtype=torch.float64) * 0.999
    p[-20:] = 1
    set_probability(pruner, _0=p)
    drawn = []
    for step in range(1, steps + 1):
        pruner.step(step)
        drawn.append(~pruner.mask["0"])
    masked = torch.stack(drawn).double()

    def within(observed, expected, draws):
        """Within 5 standard deviations of a binomial, which by chance 1 in 1.7 million isn't."""
        bound = 5 * (expected * (1 - expected) / draws).sqrt()
        return ((observed - expected).abs() <= bound).all()

    assert (masked[:, p == 1] == 1).all() and (masked[:, p == 0] == 0).all()
    assert within(masked.mean(0), p, steps)
    spread = ((p * (1 - p)).sum() / steps).sqrt()
    assert (masked.mean(0).sum() - p.sum()).abs() <= 5 * spread  # all groups together
    # Nor does a draw depend on the one of the step before, or on its neighbour's.
    assert within((masked[1::2] * masked[::2]).mean(0), p**2, steps // 2)
    assert within((masked[:, 1:] * masked[:, :-1]).mean(0), p[1:] * p[:-1], steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_scaling_acts_with_one_minus_p_in_training_and_evaluation(dtype):
    layer = nn.Conv2d(3, 4, 2, dtype=dtype)
    value = layer.weight.detach().clone()
    pruner = SPPPruner(nn.Sequential(layer), masking="scale")
    p = torch.linspace(0, 1, 12, dtype=torch.float64)
    set_probability(pruner, _0=p)
    pruner.step(1)
    factors = (1 - p).to(torch.float32).to(dtype).view(1, 3, 2, 2)
    assert torch.equal(layer.weight, value * factors)
    layer.weight.sum().backward()
    assert torch.equal(layer._parameters["weight"].grad, factors.expand(4, 3, 2, 2))
    layer.eval()
    assert torch.equal(layer.weight, value * factors)


def test_scaling_ends_on_the_exact_count():
    net = small_net()
    pruner = SPPPruner(net, prune_ratio=0.7, A=0.4, interval=2, masking="scale")
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    train(net, pruner, optimizer, range(60), torch.randn(4, net[0].in_channels, 7, 7))
    assert pruner.finished and pruner.num_pruned == pruner.num_target
    for name, mask in pruner.mask.items():
        assert torch.equal(mask, (pruner.probability[name] < 1).float())


def test_layers_hold_views_of_one_buffer():
    pruner = SPPPruner(small_net(), interval=1)
    pruner.step(0)
    for views in (pruner.probability, pruner.mask):
        first, second = views.values()
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        assert second.storage_offset() == first.numel()
    probability, mask = pruner.probability["2"], pruner.mask["2"]
    old_p, old_mask = probability.clone(), mask.clone()
    pruner.load_state_dict(pruner.state_dict())
    for step in range(1, 9):
        pruner.step(step)
    assert not torch.equal(probability, old_p) and not torch.equal(mask, old_mask)
    assert torch.equal(probability, pruner.probability["2"])


class Reads(TorchFunctionMode):
    """Notes every way in which Python can read a tensor's values."""

    names = (
        *("item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose", "masked_select"),
        *("__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"),
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.names:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_torch", [False, True], ids=["as_built", "in_torch"])
def test_a_step_reads_nothing_and_an_update_once(in_torch, request):
    if in_torch:  # as on a GPU
        request.getfixturevalue("without_library")
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(5)))
    optimizer = sgd(net)
    pruner = SPPPruner(net, A=0.5, interval=4)
    net(torch.randn(1, 4, 16, 16)).sum().backward()
    optimizer.step()
    for step in range(40):
        with Reads() as reads:
            updated = pruner.step(step, optimizer)
        assert reads.seen == (["tolist"] if updated else [])
    assert pruner.finished and pruner.num_updates > 4


def test_a_step_needs_no_values():
    # Tensors without values: whatever would read one raises.
    with FakeTensorMode():
        pruner = SPPPruner(small_net(), interval=4)
        assert pruner.step(1) is False
        with pytest.raises(DataDependentOutputException):  # an update reads
            pruner.step(4)


# --- saving and going on ---


@pytest.mark.parametrize("crash", [1, 4, 5, 10, 15])
@pytest.mark.parametrize("folded", [False, True], ids=["attached", "folded"])
def test_resumes_bitwise(crash, folded):
    options = {
        "prune_ratio": {"0": 0.5, "*": 0.75},
        "layers": ["0", "2"],
        "interval": 4,
        "A": 0.4,
        "seed": 3,
    }
    data = torch.randn(2, 3, 8, 8)

    def start():
        net = small_net()
        return net, SPPPruner(net, **options), sgd(net)

    def everything(net, pruner, optimizer):
        momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()]
        state = pruner.state_dict()
        return [
            *(parameter.detach().clone() for parameter in net.parameters()),
            *momentum,
            *state["probability"].values(),
            *(mask.clone() for mask in pruner.mask.values()),
            torch.tensor([state["num_updates"], state["last_update"], state["step"]]),
        ]

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    net, pruner, optimizer = start()
    train(net, pruner, optimizer, range(crash), data)
    middle = everything(net, pruner, optimizer)
    file = [net.state_dict(), optimizer.state_dict(), pruner.state_dict()]
    file = saved(file, weights_only=True)
    train(net, pruner, optimizer, range(crash, 18), data)
    end = everything(net, pruner, optimizer)
    assert not same(middle, end)

    torch.manual_seed(99)
    net, pruner, optimizer = start()
    if folded:
        pruner.fold()
    net.load_state_dict(file[0])
    optimizer.load_state_dict(file[1])
    pruner.load_state_dict(file[2])
    if folded:
        pruner.attach()
        pruner.sample(crash - 1)
    assert same(everything(net, pruner, optimizer), middle)
    assert not pruner.step(crash - 1)  # the step done before the crash isn't updated again
    train(net, pruner, optimizer, range(crash, 18), data)
    assert same(everything(net, pruner, optimizer), end)


def test_saved_state_is_a_copy():
    pruner = SPPPruner(small_net(), interval=1, A=0.5)
    pruner.update()
    state = pruner.state_dict()
    kept = copy.deepcopy(state)
    pruner.update()
    for name, p in state["probability"].items():
        assert torch.equal(p, kept["probability"][name])
    assert state["num_updates"] == 1


def test_loading_zeroes_what_is_pruned():
    first = SPPPruner(small_net(), interval=1, A=0.5)
    finish(first)
    net = small_net()
    second = SPPPruner(net, interval=1, A=0.5)
    second.load_state_dict(first.state_dict())
    assert second.finished and second.num_pruned == first.num_pruned
    for name, layer in second.layers.items():
        assert zero_groups(layer, "column") == second.num_target[name]
        assert torch.equal(second.mask[name], first.probability[name] < 1)


# --- errors ---


WRONG_ARGUMENTS = [
    ({"prune_ratio": 0.5, "speedup": 2}, r"`prune_ratio` and `speedup` must not both.*0\.5.*2"),
    ({"prune_ratio": 1.0}, r"`prune_ratio` must be in \[0, 1\), got 1\.0"),
    ({"prune_ratio": -0.1}, r"`prune_ratio` must be in \[0, 1\), got -0\.1"),
    ({"prune_ratio": math.nan}, r"`prune_ratio` must be in \[0, 1\), got nan"),
    ({"prune_ratio": {"*": 2}}, r"`prune_ratio\['\*'\]` must be in \[0, 1\), got 2"),
    ({"prune_ratio": {}}, r"`prune_ratio` must name at least one .*\{\}"),
    ({"speedup": 0.5}, r"`speedup` must be .* at least 1, got 0\.5"),
    ({"speedup": math.inf}, r"`speedup` must be a finite .*, got inf"),
    ({"A": 0}, r"`A` must be in \(0, 1\], got 0"),
    ({"A": -0.05}, r"`A` must be in \(0, 1\], got -0\.05"),
    ({"u": 0.0}, r"`u` must be in \(0, 1\), got 0\.0"),
    ({"u": 1.0}, r"`u` must be in \(0, 1\), got 1\.0"),
    ({"crossing": 0}, r"`crossing` must be in \(0, 1\], got 0"),
    ({"recovery": 1}, r"`recovery` must be True or False, got 1"),
    ({"masking": "soft"}, r"`masking` must be one of \"sample\", \"scale\", got 'soft'"),
    ({"interval": 0}, r"`interval` must be a whole number of at least 1, got 0"),
    ({"interval": 1.5}, r"`interval` must be a whole number of at least 1, got 1\.5"),
    ({"start_step": -1}, r"`start_step` must be .* at least 0, got -1"),
    ({"granularity": "row"}, r"`granularity` must be one of \"column\".*, got 'row'"),
    ({"criterion": "l3"}, r"`criterion` must be one of \"l1\", \"l2\", got 'l3'"),
    ({"layers": "0"}, r"`layers` must be a list .*, got '0'"),
    ({"layers": ["0", "head.*"]}, r"`layers` .*'head\.\*' matches none\. There are: 0, 2\."),
    ({"prune_ratio": {"9": 0.5}}, r"`prune_ratio` .*'9' matches none\. Layers chosen: 0, 2\."),
]


@pytest.mark.parametrize(
    ("options", "message"),
    WRONG_ARGUMENTS,
    ids=[", ".join(f"{k}={v}" for k, v in options.items()) for options, _ in WRONG_ARGUMENTS],
)
def test_wrong_argument(options, message):
    net = small_net()
    with pytest.raises(ValueError, match=message):
        SPPPruner(net, **options)
    assert type(net[0]) is nn.Conv2d


def shared_net():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("make_net", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), r"no convolution to prune\. .*: none\."),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 1, groups=4)),
            r"no convolution to prune\. .*: 0 \(depthwise\)",
        ),
        (shared_net, r"left out: 0 \(shares its weight\), 1 \(shares its weight\)"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), r"left out: 0 \(lazy, not initialised yet\)"),
    ],
    ids=["no_convolution", "only_depthwise", "shared_weight", "lazy"],
)
def test_network_that_cannot_be_pruned(make_net, message):
    with pytest.raises(ValueError, match=message):
        SPPPruner(make_net())


class Tokens(nn.Module):
    """A stem, and linear layers of its pixels, as in ConvNeXt; a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.classifier = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 2)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x):
        return self.classifier(self.mlp(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def test_linear_layers_are_pruned_where_they_are_named_or_take_most_macs():
    net, x = Tokens(), torch.randn(2, 3, 16, 16)
    macs = {"stem": 16 * 8 * 48, "mlp.0": 16 * 8 * 32, "mlp.2": 16 * 8 * 32}
    assert macs["stem"] < macs["mlp.0"] + macs["mlp.2"]
    with pytest.raises(ValueError, match=r"none\. Linear layers are pruned where `layers` names"):
        SPPPruner(net.mlp)
    SPPPruner(net).fold()
    assert list(SPPPruner(copy.deepcopy(net)).num_target) == ["stem"]  # nothing tells the MACs
    named = SPPPruner(copy.deepcopy(net), layers=["mlp.*", "classifier"], prune_ratio=0.5)
    assert named.num_target == {"classifier": 4, "mlp.0": 4, "mlp.2": 16}
    net.example_input_array = x
    pruner = SPPPruner(net, speedup=4, A=0.5, interval=1)
    assert pruner.num_target == {"stem": 36, "mlp.0": 6, "mlp.2": 24}
    finish(pruner)
    net(x)
    assert pruner.macs == {name: (count, count // 4) for name, count in macs.items()}
    pruner.fold()
    zeros = {name: int((net.get_submodule(name).weight == 0).all(0).sum()) for name in macs}
    assert zeros["mlp.0"] == 6 and zeros["mlp.2"] == 24
    net.stem = nn.Conv2d(3, 64, 4, 4)  # whose MACs are more now
    net.mlp[0] = nn.Linear(64, 32)
    assert list(SPPPruner(net).num_target) == ["stem"]


def test_the_exact_count_of_a_linear_layer():
    net = nn.Sequential(nn.Linear(10, 6))
    pruner = SPPPruner(net, prune_ratio=0.7, layers=["0"], A=0.4, interval=2)
    train(net, pruner, sgd(net), range(60), torch.randn(4, 5, 10))
    assert pruner.finished and pruner.num_pruned == {"0": 7}
    assert pruner.macs == {"0": (5 * 60, 5 * 18)}
    pruner.fold()
    assert int((net[0].weight == 0).all(0).sum()) == 7 and type(net[0]) is nn.Linear


def test_layer_that_cannot_be_pruned_is_left_out_unless_named():
    net = nn.Sequential(shared_net(), nn.Conv2d(4, 8, 3))
    pruner = SPPPruner(net, prune_ratio={"1": 0.5})
    assert pruner.num_target == {"1": 18}
    assert pruner.skipped == {"0.0": "shares its weight", "0.1": "shares its weight"}
    pruner.fold()
    with pytest.raises(ValueError, match=r"`layers` must match layers .* '0\.0' can't: shares"):
        SPPPruner(net, layers=["*"])


def computed_net():
    """A plain layer between one that computes its weight in ``forward`` and one with a norm."""
    norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 3))
    return nn.Sequential(StandardizedConv2d(3, 4, 3), nn.Conv2d(4, 4, 3), norm)


def test_layers_that_compute_their_weight_are_refused_by_name():
    net = computed_net()
    refused = r"compute other ones from them: 0 \(StandardizedConv2d\), 2 \(parametrized\)\. Zeros"
    with pytest.raises(ValueError, match=refused):
        SPPPruner(net)
    with pytest.raises(ValueError, match=r"from them: 0 \(StandardizedConv2d\)\. "):
        SPPPruner(net, layers=["0"])
    assert type(net[0]) is StandardizedConv2d  # nothing was masked
    assert list(SPPPruner(net, prune_ratio={"1": 0.5}).num_target) == ["1"]


def test_materialized_weights_compute_the_same_and_can_be_pruned():
    net = computed_net().eval()
    net[0].gain.data.uniform_(0.5, 1)
    x = torch.randn(2, 3, 9, 9)
    before = net(x)
    assert materialize_weights(net) is net
    assert [type(layer) for layer in net] == [nn.Conv2d] * 3
    torch.testing.assert_close(net(x), before)
    pruner = SPPPruner(net, A=0.9, interval=1)
    finish(pruner)
    pruner.fold()
    assert zero_groups(net[0], "column") == pruner.num_target["0"] == 21


def test_a_layer_that_computes_more_than_its_weight_is_not_materialized():
    class Doubling(StandardizedConv2d):
        def forward(self, x):
            return 2 * super().forward(x) + 1

    with pytest.raises(ValueError, match=r"'0' of `model` .* but Doubling computes something else"):
        materialize_weights(nn.Sequential(Doubling(3, 4, 3)))


def test_a_second_pruner_is_an_error():
    net = small_net()
    first = SPPPruner(net)
    with pytest.raises(ValueError, match=r"`model` is being pruned already \(layers 0, 2\)"):
        SPPPruner(net)
    first.fold()
    assert type(net[0]) is type(net[2]) is nn.Conv2d


def test_a_pruner_that_fails_masks_nothing():
    net = small_net()
    first = SPPPruner(net, layers=["2"])
    with pytest.raises(ValueError, match=r"being pruned already \(layers 2\)"):
        SPPPruner(net)
    assert type(net[0]) is nn.Conv2d
    first.fold()
    SPPPruner(net).fold()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_weight_that_is_not_finite(value):
    net = small_net()
    optimizer = sgd(net)
    pruner = SPPPruner(net, A=0.6, interval=3)
    train(net, pruner, optimizer, range(6))
    with torch.no_grad():
        dict(net.named_parameters())["2.weight"][0, 0, 0, 0] = value
    before = pruner.state_dict()
    masks = {name: mask.clone() for name, mask in pruner.mask.items()}
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    with pytest.raises(ValueError, match=r"layer '2' must be finite.* at step 6\."):
        pruner.step(6, optimizer)
    after = pruner.state_dict()
    assert (after["num_updates"], after["last_update"]) == (2, 3)
    assert not pruner.finished
    for name, p in after["probability"].items():
        assert torch.equal(p, before["probability"][name])
        assert torch.equal(pruner.mask[name], masks[name])
        assert pruner.num_pruned[name] == (p == 1).sum()
    for parameter, weight in zip(net.parameters(), weights, strict=True):
        np.testing.assert_array_equal(parameter.detach(), weight)


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


def with_probability(state, **probability):
    return state | {"probability": {name.strip("_"): p for name, p in probability.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"version": 2}, r"version 1, got version 2"),
        (lambda s: without(s, "version"), r"version 1, got version None"),
        (lambda s: without(s, "step"), r"lacks step"),
        (lambda s: s | {"step": 1.5}, r"step must be a whole number, got 1\.5"),
        (
            lambda s: s | {"settings": s["settings"] | {"interval": 90}},
            r"these settings, but interval was 90 and is 180",
        ),
        (
            lambda s: with_probability(s, _9=torch.zeros(8), _1=torch.zeros(10)),
            r"holds 9 \(8 groups\), 1 \(10 groups\); here are 0 \(8 groups\), 1 \(10 groups\)",
        ),
        (
            lambda s: with_probability(s, _0=torch.zeros(8), _1=torch.zeros(9)),
            r"holds 0 \(8 groups\), 1 \(9 groups\)",
        ),
        (
            lambda s: with_probability(s, _0=torch.zeros(8), _1=torch.full((10,), 1.5)),
            r"layer '1' must be in \[0, 1\], .* 1\.5",
        ),
        (
            lambda s: with_probability(s, _0=torch.zeros(8), _1=torch.full((10,), -0.5)),
            r"layer '1' must be in \[0, 1\], .* -0\.5",
        ),
        (
            lambda s: with_probability(s, _0=torch.full((8,), math.nan), _1=torch.zeros(10)),
            r"layer '0' must be in \[0, 1\], .* nan",
        ),
        (
            lambda s: with_probability(s, _0=torch.zeros(8), _1=torch.ones(10)),
            r"at most 8 groups of layer '1', .* pruned 10",
        ),
    ],
    ids=[
        *("version", "no_version", "incomplete", "counter", "settings", "layers", "shape"),
        *("above_1", "below_0", "nan", "too_many"),
    ],
)
def test_wrong_state(change, message):
    net = nn.Sequential(nn.Conv2d(8, 10, 1), nn.Conv2d(10, 4, 1))
    pruner = SPPPruner(net)
    set_probability(pruner, _0=torch.full((8,), 0.5), _1=[1.0] + [0.25] * 9)
    before = pruner.state_dict()
    with pytest.raises(ValueError, match=message):
        pruner.load_state_dict(change(before))
    after = pruner.state_dict()
    assert without(after, "probability") == without(before, "probability")
    for name, p in before["probability"].items():
        assert torch.equal(after["probability"][name], p)
    assert pruner.num_pruned == {"0": 0, "1": 1}


# --- torch.compile ---


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_evaluation_follows_the_updates(backend):
    net = small_net().eval()
    pruner = SPPPruner(net, A=0.5, interval=1)
    x, outputs = torch.randn(2, 3, 8, 8), []
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        for step in range(20):
            pruner.step(step)
            outputs.append(compiled(x))
            torch.testing.assert_close(outputs[-1], net(x))
    torch._dynamo.reset()
    assert pruner.finished and not torch.allclose(outputs[0], outputs[3])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_network_follows_the_masks(backend):
    net = small_net()
    pruner = SPPPruner(net, A=0.5, interval=3)
    optimizer = sgd(net)
    x = torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        seen = set()
        for step in range(30):
            pruner.step(step, optimizer)
            output = compiled(x)
            torch.testing.assert_close(output, net(x))
            seen.add(tuple(torch.cat(list(pruner.mask.values())).tolist()))
            output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch._dynamo.reset()
    assert pruner.finished and len(seen) > 5
