"""Selects the layers of a network to prune, and their ratios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from spp_lightning.method.computed import computes_weight
from spp_lightning.method.groups import weight_of
from spp_lightning.method.positions import positions_of

__all__ = [
    "Selection",
    "check_weights",
    "is_convolution",
    "is_depthwise",
    "is_linear",
    "select_layers",
]

_PARAMETRIZED = "parametrized"


def is_convolution(layer: nn.Module) -> bool:
    """Whether a layer has a parameter ``weight`` of shape ``(N, C / groups, *kernel_size)``.

    True for ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``, their subclasses, and layers built like
    them. False for transposed convolutions, whose weight is transposed, and for weights that a
    parametrization computes.

    >>> is_convolution(nn.Conv2d(3, 8, 3)), is_convolution(nn.Linear(3, 8))
    (True, False)
    """
    weight = layer._parameters.get("weight")
    if weight is None or getattr(layer, "transposed", False):
        return False
    if isinstance(weight, UninitializedParameter):
        return hasattr(layer, "kernel_size")
    kernel = getattr(layer, "kernel_size", None)
    return weight.dim() > 2 and isinstance(kernel, tuple) and kernel == tuple(weight.shape[2:])


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is an ``nn.Linear`` with a parameter ``weight``: a 1×1 convolution of tokens.

    Its columns are its input features.

    >>> is_linear(nn.Linear(3, 8)), is_linear(nn.Conv2d(3, 8, 1))
    (True, False)
    """
    return isinstance(layer, nn.Linear) and layer._parameters.get("weight") is not None


def is_depthwise(layer: nn.Module) -> bool:
    """Whether every input channel of a convolution is a group of its own.

    >>> is_depthwise(nn.Conv2d(8, 8, 3, groups=8)), is_depthwise(nn.Conv2d(1, 8, 3))
    (True, False)
    """
    groups = int(getattr(layer, "groups", 1))
    return groups > 1 and groups == getattr(layer, "in_channels", None)


@dataclass(frozen=True)
class Selection:
    """Layers to prune and their ratios, by name; layers left out, with the reason."""

    layers: dict[str, nn.Module]
    ratios: dict[str, float]
    skipped: dict[str, str]


def select_layers(
    model: nn.Module,
    prune_ratio: float | Mapping[str, float],
    patterns: Iterable[str] | None = None,
    example_input: Any = None,
) -> Selection:
    """Find the layers to prune.

    Args:
        model: The network.
        prune_ratio: Target sparsity in [0, 1). A float applies to every layer. A dict maps
            layer-name patterns (``fnmatch``'s ``*``, ``?``, ``[…]``) to ratios: the first matching
            pattern wins, and layers that match none are not pruned.
        patterns: Patterns of names of convolutions and linear layers. Default: every convolution
            that is not depthwise and whose weight is neither lazy nor shared with another module;
            and the linear layers that are applied to several tokens or pixels of a sample, if they
            take more MACs than all convolutions.
        example_input: What tells the MACs. Default: the network's ``example_input_array``, if it
            has one; without both, no linear layer is chosen by default.

    Returns:
        The layers in the network's order.

    Raises:
        ValueError: If a pattern matches no layer or there is no layer to prune (the error lists
            the convolutions of the network), if ``patterns`` match a layer whose weight is lazy
            or shared with another module, or if a chosen layer's ``forward`` or a parametrization
            computes the weight that it uses.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    >>> selection = select_layers(net, {"0": 0.5, "*": 0.75})
    >>> selection.ratios, selection.skipped
    ({'0': 0.5, '2': 0.75}, {'1': 'depthwise'})
    """
    # named_modules yields a module once, under its first name.
    candidates: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, layer in model.named_modules():
        if is_convolution(layer) or is_linear(layer):
            candidates[name] = layer
        elif isinstance(layer, _ConvNd):
            # A parametrization, such as weight norm, computes the weight from other parameters.
            skipped[name] = "transposed" if layer.transposed else _PARAMETRIZED
    if patterns is None:
        candidates = _usual_layers(model, candidates, example_input)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for name, layer in candidates.items():
        weight = layer._parameters["weight"]
        if isinstance(weight, UninitializedParameter):
            skipped[name] = "lazy, not initialised yet"
        elif owners[id(weight)] > 1:
            skipped[name] = "shares its weight"
    if patterns is None:
        depthwise = [name for name, layer in candidates.items() if is_depthwise(layer)]
        skipped = dict.fromkeys(depthwise, "depthwise") | skipped
        chosen = [name for name in candidates if name not in skipped]
    else:
        chosen = _match("layers", list(patterns), list(candidates), "There are")
        for name in chosen:
            if name in skipped:
                raise ValueError(
                    f"`layers` must match layers that can be pruned, but {name!r} can't:"
                    f" {skipped[name]}."
                )

    if isinstance(prune_ratio, Mapping):
        _match("prune_ratio", list(prune_ratio), chosen, "Layers chosen")
        ratios = {}
        for name in chosen:
            found = [ratio for pattern, ratio in prune_ratio.items() if fnmatchcase(name, pattern)]
            if found:
                ratios[name] = float(found[0])
            else:
                skipped[name] = "no ratio"
    else:
        ratios = dict.fromkeys(chosen, float(prune_ratio))

    layers = {name: candidates[name] for name in ratios}
    parametrized = [name for name, reason in skipped.items() if reason == _PARAMETRIZED]
    if isinstance(prune_ratio, Mapping):
        parametrized = _matching(list(prune_ratio), parametrized)
    check_weights(layers, parametrized if patterns is None else [])
    if not layers:
        there = ", ".join(f"{name} ({reason})" for name, reason in skipped.items()) or "none"
        linear = " Linear layers are pruned where `layers` names them."
        raise ValueError(
            f"There is no convolution to prune. Convolutions left out: {there}."
            + (linear if any(is_linear(layer) for layer in model.modules()) else "")
        )
    return Selection(layers, ratios, skipped)


def _usual_layers(
    model: nn.Module, candidates: Mapping[str, nn.Module], example_input: Any
) -> dict[str, nn.Module]:
    """The convolutions; and linear layers of tokens, where those take more MACs."""
    convolutions = {name: x for name, x in candidates.items() if not is_linear(x)}
    example = getattr(model, "example_input_array", None)
    example = example if example_input is None else example_input
    if example is None or len(convolutions) == len(candidates):
        return convolutions
    weights = {name: weight_of(layer) for name, layer in candidates.items()}
    if any(isinstance(weight, UninitializedParameter) for weight in weights.values()):
        return convolutions
    sizes = {name: weight.numel() for name, weight in weights.items()}
    positions = positions_of(model, candidates, example)
    tokens = [name for name in candidates if name not in convolutions and positions[name] > 1]
    macs = [sum(sizes[name] * positions[name] for name in x) for x in (tokens, convolutions)]
    if macs[0] <= macs[1]:
        return convolutions
    return {name: x for name, x in candidates.items() if name in convolutions or name in tokens}


def check_weights(layers: Mapping[str, nn.Module], parametrized: Iterable[str]) -> None:
    """Check that zeros in the stored weights are zeros in the weights that the layers use.

    Args:
        layers: Layers to prune, by name.
        parametrized: Names of further layers, whose weights parametrizations compute.

    Raises:
        ValueError: If they aren't.
    """
    computed = [f"{name} ({type(x).__name__})" for name, x in layers.items() if computes_weight(x)]
    computed += [f"{name} ({_PARAMETRIZED})" for name in parametrized]
    if computed:
        raise ValueError(
            "The layers to prune must use their weights as they are stored, but these compute"
            f" other ones from them: {', '.join(computed)}. Zeros would not last. Call"
            " `materialize_weights(model)` first, or choose other layers by `layers`."
        )


def _match(argument: str, patterns: list[str], names: list[str], what: str) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"`{argument}` must hold patterns that match convolutions or linear layers, but"
                f" {pattern!r} matches none. {what}: {', '.join(names) or 'none'}."
            )
    return _matching(patterns, names)


def _matching(patterns: list[str], names: list[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
