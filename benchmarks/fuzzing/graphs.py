"""Random networks: compact ones compute the same, and are the same after saving and loading."""

from __future__ import annotations

import copy
import pickle
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fuzzing.case import Failure, any_kernel
from spp_lightning.compaction.epilogue import local_response_norm
from spp_lightning.compaction.file.container import load_compact, save_compact
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.to_dense import to_dense
from spp_lightning.compaction.pipeline import compact

__all__ = ["GraphCase", "Op", "check", "draw", "network", "smaller"]


class Op(NamedTuple):
    """One operation of a network.

    Attributes:
        kind: A name in :data:`KINDS`.
        inputs: Positions of what it reads among the values: 0 is the input, i + 1 what the i-th
            operation makes.
        numbers: What else it depends on, each in [0, 1).
    """

    kind: str
    inputs: tuple[int, ...]
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class GraphCase:
    """A network, and the shape of its input. What nobody reads is returned."""

    shape: tuple[int, int, int, int]
    ops: tuple[Op, ...]
    ratio: float
    seed: int


def draw(seed: int) -> GraphCase:
    """A random case."""
    r = random.Random(seed)
    ops = []
    for i in range(r.choice([3, 6, 10, 16])):
        recent = [max(0, i - r.choice([0, 0, 0, 1, 2, 4])) for _ in range(2)]
        numbers = tuple(r.randrange(1000) / 1000 for _ in range(4))
        ops.append(Op(r.choice(WEIGHTED), tuple(recent), numbers))
    size = r.choice([1, 4, 8, 9, 12])
    shape = (r.choice([1, 2, 3]), r.choice([1, 3, 4]), size, r.choice([size, size + 3]))
    return GraphCase(shape, tuple(ops), r.choice([0.0, 0.3, 0.7, 0.7, 0.9]), seed)


# --- operations ---


def _pick(number: float, choices: list[Any]) -> Any:
    return choices[int(number * len(choices))]


class _Maker:
    """Makes the modules of a network, while an example goes through it."""

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.shared: list[str] = []

    def add(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        self.modules[name] = module
        return lambda net, x, y: net.get_submodule(name)(x)


Call = Callable[[nn.Module, Tensor, Tensor], Any]


def _conv(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    channels = x.shape[1]
    kernel, padding = _pick(n[0], [(1, 0), (3, 1), (3, 1), (3, 0), (5, 2), ((1, 3), "same")])
    stride = 1 if padding == "same" else _pick(n[1], [1, 1, 1, 2])
    groups = _pick(n[2], [1, 1, 1, 1, 2, channels])
    filters = _pick(n[3], [channels, channels, 4, 8, 12, 17])
    if channels % groups or filters % groups:
        groups = 1
    bias = n[2] < 0.7
    conv = nn.Conv2d(channels, filters, kernel, stride, padding, 1, groups, bias)
    return m.add(name, conv)


def _again(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    fitting = [
        key
        for key, layer in m.modules.items()
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))
        and x.shape[1] == getattr(layer, "in_channels", getattr(layer, "num_features", 0))
    ]
    if not fitting:
        raise ValueError("no layer to call again")
    shared = _pick(n[0], fitting)
    return lambda net, x, y: net.get_submodule(shared)(x)


def _norm(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    kind = _pick(n[0], [nn.BatchNorm2d, nn.BatchNorm2d, nn.InstanceNorm2d])
    if n[1] < 0.1:
        return m.add(name, nn.GroupNorm(1, x.shape[1]))
    return m.add(name, kind(x.shape[1]))


_ACTIVATIONS: list[Callable[..., Any]] = [
    lambda x: F.relu(x),
    lambda x: F.relu(x, inplace=True),
    lambda x: torch.relu(x),
    lambda x: x.relu(),
    lambda x: x.relu_(),
    lambda x: F.relu6(x),
    lambda x: F.hardtanh(x, -0.5, 0.5),
    lambda x: x.clamp(min=0),
    lambda x: torch.clamp(x, -1.0, max=1.0),
    lambda x: x * torch.sigmoid(x),
    lambda x: F.silu(x, inplace=True),
    lambda x: F.leaky_relu(x, 0.1),
    lambda x: F.gelu(x),
    lambda x: x.clamp_(0, 6),
    lambda x: local_response_norm(x),
    lambda x: F.dropout(x, 0.5, False),
]
_LAYERS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.ReLU6(inplace=True),
    nn.Hardswish,
    nn.SiLU,
    lambda: nn.Dropout(0.3),
    lambda: nn.Hardtanh(0.0, 2.0),
    nn.Identity,
    nn.PReLU,
    lambda: nn.LeakyReLU(0.2, inplace=True),
]


def _activation(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    if n[1] < 0.5:
        return m.add(name, _pick(n[0], _LAYERS)())
    function = _pick(n[0], _ACTIVATIONS)
    return lambda net, x, y: function(x)


def _pool(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    ceil = n[1] < 0.5
    functions: list[Call] = [
        lambda net, x, y: F.max_pool2d(x, 2, ceil_mode=ceil),
        lambda net, x, y: F.max_pool2d(x, 3, 1, 1),
        lambda net, x, y: F.avg_pool2d(x, (3, 2), (1, 2), (1, 0), ceil, n[2] < 0.5),
        lambda net, x, y: F.adaptive_avg_pool2d(x, 2),
        m.add(name, nn.MaxPool2d(3, 2, 1, ceil_mode=ceil)),
        m.add(name, nn.AvgPool2d(2, count_include_pad=n[2] < 0.5)),
    ]
    i = int(n[0] * len(functions))
    if i < 4:
        m.modules.pop(name)
    elif i == 4:
        m.modules[name] = nn.MaxPool2d(3, 2, 1, ceil_mode=ceil)
    return functions[i]


def _sum(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    def in_place(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x += y
        return x

    functions: list[Call] = [
        lambda net, x, y: x + y,
        lambda net, x, y: torch.add(x, y),
        lambda net, x, y: x.add(y),
        lambda net, x, y: x - 0.5 * y,
        lambda net, x, y: F.relu(x + y),
        lambda net, x, y: x.mul(0.5).add_(y),
        lambda net, x, y: 2 * x + y + 1,
        in_place,
    ]
    return _pick(n[0], functions)


def _cat(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    if x.shape[1] + y.shape[1] > 48:
        raise ValueError("enough channels")
    return _pick(
        n[0],
        [
            lambda net, x, y: torch.cat([x, y], 1),
            lambda net, x, y: torch.cat((x, y), dim=-3),
            lambda net, x, y: torch.cat([y, x[:, :1], x], dim=1),
        ],
    )


def _gate(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    channels = x.shape[1]
    m.modules[name] = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), nn.ReLU(inplace=True),
        nn.Conv2d(4, channels, 1), nn.Sigmoid(),
    )  # fmt: skip
    if n[0] < 0.5:
        return lambda net, x, y: x * net.get_submodule(name)(x)
    return lambda net, x, y: net.get_submodule(name)(x).mul(x)


def _shuffle(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    if x.shape[1] % 2:
        raise ValueError("an odd number of channels")

    def shuffle(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        b, c, h, w = x.size()
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)

    return _pick(
        n[0],
        [
            shuffle,
            lambda net, x, y: torch.cat(x.chunk(2, 1)[::-1], 1),
            lambda net, x, y: torch.cat(torch.split(x, x.shape[1] // 2, 1), 1),
            lambda net, x, y: x.chunk(2, dim=1)[0],
            lambda net, x, y: x.chunk(2, dim=1)[0] * x.chunk(2, dim=1)[1].sigmoid(),
            lambda net, x, y: F.channel_shuffle(x, 2) if n[1] < 0 else x.flip(1),
        ],
    )


def _view(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    def detour(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        shape = x.shape
        return F.relu(x.flatten(2)).view(shape)

    def in_place(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x * 1
        flat = x.view(x.shape[0], -1)
        flat.mul_(2)
        return flat.view(x.shape)

    return _pick(
        n[0],
        [
            detour,
            in_place,
            lambda net, x, y: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
            lambda net, x, y: x.transpose(2, 3),
            lambda net, x, y: x.contiguous(memory_format=torch.channels_last),
            lambda net, x, y: x[:, :, 1:] if x.shape[2] > 1 else x[..., :1],
            lambda net, x, y: x[:, : max(1, x.shape[1] // 2)],
            lambda net, x, y: x.reshape(x.size(0), x.size(1), -1).unflatten(2, (x.shape[2], -1)),
            lambda net, x, y: F.pad(x, (1, 0, 2, 1)),
            lambda net, x, y: F.interpolate(x, scale_factor=2.0),
            lambda net, x, y: x.squeeze(0).unsqueeze(0) if n[1] < 0 else x.clone(),
            lambda net, x, y: torch.stack([x, x], 0).mean(0),
        ],
    )


def _own(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    module = nn.Module()
    value = torch.rand(1, x.shape[1], 1, 1)
    if n[0] < 0.5:
        module.register_parameter("scale", nn.Parameter(value))
    else:
        module.register_buffer("scale", value.expand(1, -1, 2, 1)[:, :, :1])
    m.modules[name] = module
    return lambda net, x, y: x * cast(Tensor, net.get_submodule(name).scale)


def _head(m: _Maker, name: str, n: tuple[float, ...], x: Tensor, y: Tensor) -> Call:
    m.modules[name] = nn.Linear(x.shape[1], 5)

    def head(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        features = x.mean((2, 3)) if n[0] < 0.5 else torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return net.get_submodule(name)(features)[:, :, None, None]

    return head


KINDS: dict[str, Callable[[_Maker, str, tuple[float, ...], Tensor, Tensor], Call]] = {
    "conv": _conv,
    "again": _again,
    "norm": _norm,
    "activation": _activation,
    "pool": _pool,
    "sum": _sum,
    "cat": _cat,
    "gate": _gate,
    "shuffle": _shuffle,
    "view": _view,
    "own": _own,
    "head": _head,
}
WEIGHTED = [
    *(8 * ["conv"]), "again", *(3 * ["norm"]), *(5 * ["activation"]), *(2 * ["pool"]),
    *(4 * ["sum"]), *(2 * ["cat"]), "gate", "shuffle", *(2 * ["view"]), "own", "head",
]  # fmt: skip


class _Network(nn.Module):
    def __init__(self, modules: dict[str, nn.Module], calls: list[tuple[Call, tuple[int, ...]]]):
        super().__init__()
        for name, module in modules.items():
            parent, _, last = name.rpartition(".")
            if parent and not hasattr(self, parent):
                self.add_module(parent, nn.Module())
            self.get_submodule(parent).add_module(last, module)
        self._calls = calls
        read = {i for _, inputs in calls for i in inputs}
        self._results = [i for i in range(len(calls) + 1) if i not in read] or [len(calls)]

    def forward(self, x: Tensor) -> Any:
        values = [x * 1]  # may be written to
        for call, (first, second) in self._calls:
            values.append(call(self, values[first], values[second]))
        results = [values[i] for i in self._results]
        if len(results) == 1:
            return results[0]
        return {"first": results[0], "others": tuple(results[1:])}


def network(case: GraphCase) -> nn.Module:
    """The network of a case, in evaluation mode. Operations that don't fit are left out."""
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        maker, calls = _Maker(), list[tuple[Call, tuple[int, ...]]]()
        values = [torch.randn(case.shape)]
        places = [0]  # of the operations' values among those that are there
        for i, op in enumerate(case.ops):
            first, second = (places[j] if j < len(places) else places[-1] for j in op.inputs)
            x, y = values[first], values[second]
            name = f"part.{i}" if op.numbers[0] < 0.5 else f"layer{i}"
            try:
                call = KINDS[op.kind](maker, name, op.numbers, x, y)
                probe = _Network(copy.deepcopy(maker.modules), []).eval()
                with torch.no_grad():
                    made = call(probe, x.clone(), y.clone())
                if made.dim() != 4 or not made.numel() or made.numel() > 200_000:
                    raise ValueError("no images, or too large")
            except (ValueError, RuntimeError):
                maker.modules.pop(name, None)
                places.append(places[-1])
                continue
            calls.append((call, (first, second)))
            values.append(made)
            places.append(len(values) - 1)
        if not calls:
            raise ValueError("an empty network")
        net = _Network(maker.modules, calls)
        _prune(net, case)
    return net.eval()


def _prune(net: nn.Module, case: GraphCase) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                fan_in = layer.weight[0].numel()
                layer.weight.normal_(std=(2 / fan_in) ** 0.5, generator=generator)
                kept = torch.rand(layer.weight.shape[1:], generator=generator) >= case.ratio
                layer.weight.mul_(kept)
                if case.seed % 3 == 0:  # whole filters, whole channels
                    layer.weight[torch.rand(len(layer.weight), generator=generator) < 0.3] = 0
                    gone = torch.rand(layer.weight.shape[1], generator=generator) < 0.3
                    layer.weight[:, gone] = 0
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                layer.running_mean.normal_(std=0.3, generator=generator)
                layer.running_var.uniform_(0.5, 2, generator=generator)
                layer.weight.uniform_(0.5, 1.5, generator=generator)
                layer.bias.normal_(std=0.3, generator=generator)


# --- what must hold ---


def check(case: GraphCase) -> str:
    """Compact a network, save and load it, and compare all of them.

    Returns:
        Whether it was made compact as a whole, or layer by layer.

    Raises:
        Failure: If any differs, or can't be saved.
        ValueError: If there is no such network.
    """
    net = network(case)
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(case.seed + 1))
    other = torch.randn(
        (case.shape[0] + 1, *case.shape[1:]), generator=torch.Generator().manual_seed(case.seed)
    )
    try:
        with torch.no_grad():
            copy.deepcopy(net)(x.clone())
    except RuntimeError as error:  # an addition in place to a view whose elements share memory
        raise ValueError(f"no such network: {error}") from error
    with any_kernel(case.seed), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            fast = compact(net, x)
        except Exception as error:
            raise Failure(f"compact() failed: {type(error).__name__}: {error}") from error
        for batch in (x, other):
            _compare("compact", net, fast, batch)
        if not isinstance(fast, CompactNetwork):
            text = " ".join(str(warning.message) for warning in said)
            in_place = any(op.kind == "sum" for op in case.ops)
            if "computes something else" in text and not in_place:
                raise Failure(f"compact() took a network apart: {text}")
            return "layer by layer"
        _check_copies(fast, (x, other))
        _compare("to_dense", net, to_dense(fast), x)
    return "as a whole"


def _check_copies(fast: CompactNetwork, batches: tuple[Tensor, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.spp"
        try:
            save_compact(fast, path)
            loaded = load_compact(path)
            save_compact(loaded, Path(folder) / "again.spp")
        except Exception as error:
            raise Failure(f"saving or loading failed: {type(error).__name__}: {error}") from error
        if path.read_bytes() != (Path(folder) / "again.spp").read_bytes():
            raise Failure("saved, loaded and saved again, a file is another one")
    pickled = pickle.loads(pickle.dumps(fast))
    for name, copied in (("loaded", loaded), ("pickled", pickled), ("copied", copy.deepcopy(fast))):
        if [*copied.state_dict()] != [*fast.state_dict()] or repr(copied) != repr(fast):
            raise Failure(f"the {name} network has another text or other tensors")
        with torch.no_grad():
            for batch in batches:
                pairs = zip(tree_leaves(fast(batch)), tree_leaves(copied(batch)), strict=True)
                if not all(torch.equal(first, second) for first, second in pairs):
                    raise Failure(f"the {name} network computes something else")


def _compare(name: str, net: nn.Module, fast: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        given = x.clone()
        expected = tree_leaves(copy.deepcopy(net).double()(x.double()))
        rounded = tree_leaves(net(given))
        given = x.clone()
        found = tree_leaves(fast(given))
    if not torch.equal(given, x):
        raise Failure(f"{name} writes to its input")
    if len(expected) != len(found):
        raise Failure(f"{name} returns {len(found)} tensors, not {len(expected)}")
    for theirs, ours, plain in zip(expected, found, rounded, strict=True):
        if theirs.shape != ours.shape:
            raise Failure(f"{name}: {tuple(ours.shape)}, not {tuple(theirs.shape)}")
        difference, size = float((ours - theirs).norm()), float(theirs.norm())
        # A norm of nearly equal numbers magnifies rounding errors, the network's own, too.
        allowed = 1e-3 * (size + 0.1 * theirs.numel() ** 0.5) + 30 * float((plain - theirs).norm())
        if not difference <= allowed:
            raise Failure(f"{name} differs by {difference:.1e}, of a norm of {size:.1e}")


def smaller(case: GraphCase) -> Iterator[GraphCase]:
    """Cases with an operation less: what read it reads what it read."""
    for i in reversed(range(len(case.ops))):
        rest = []
        for j, op in enumerate(case.ops):
            if j != i:
                inputs = tuple(
                    case.ops[i].inputs[0] if k == i + 1 else k - (k > i + 1) for k in op.inputs
                )
                rest.append(op._replace(inputs=inputs))
        if rest:
            yield replace(case, ops=tuple(rest))
    batch, channels, height, width = case.shape
    for shape in (
        (1, channels, height, width),
        (batch, 1, height, width),
        (batch, channels, height // 2, width // 2),
    ):
        if shape != case.shape and min(shape) > 0:
            yield replace(case, shape=shape)
