"""Weights that a layer computes before it uses them: weight standardisation, parametrizations.

A column of zeros in such a layer's stored weight need not be one in the weight that the layer
uses. Which weight a layer uses is seen in the call of torch's convolution that its ``forward``
makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

__all__ = [
    "computes_weight",
    "effective_weight",
    "materialize_weights",
    "remove_parametrizations",
]

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_CALLS: tuple[Callable[..., Any], ...] = (
    *(F.conv1d, F.conv2d, F.conv3d, F.linear),
    *(torch.conv1d, torch.conv2d, torch.conv3d),
)


class _FoundError(Exception):
    """Carries the weight out of a layer's forward."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight


class _WeightSeeker(TorchFunctionMode):
    """Stops at the first convolution or linear layer, with its weight."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip(("input", "weight"), args, strict=False), **(kwargs or {}))
        if func in _CALLS and isinstance(given.get("weight"), Tensor):
            raise _FoundError(given["weight"])
        return func(*args, **(kwargs or {}))


def effective_weight(layer: nn.Module) -> Tensor | None:
    """The weight that a layer hands to torch's convolution in evaluation mode.

    Args:
        layer: A convolution or a linear layer, or a layer built like one.

    Returns:
        The weight, without gradients. None if the layer fails for a small input or calls no
        convolution of torch.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    >>> torch.equal(effective_weight(layer), layer.weight)
    True
    """
    if _is_plain(layer):
        return layer.get_parameter("weight").detach()
    return _weight_used_by(copy.deepcopy(layer))


def computes_weight(layer: nn.Module) -> bool:
    """Whether zeros in a layer's stored weight aren't zeros in the weight that the layer uses.

    Args:
        layer: A layer with a parameter ``weight``.

    >>> computes_weight(nn.Conv2d(3, 4, 1))
    False
    """
    if _is_plain(layer) or parametrize.is_parametrized(layer, "weight"):
        return not _is_plain(layer)
    twin = copy.deepcopy(layer)
    stored = twin._parameters.get("weight")
    if stored is None:
        return False
    zeros = torch.zeros(stored.shape, dtype=torch.bool, device=stored.device)
    zeros.view(len(stored), -1)[:, ::2] = True
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name != "weight":
                parameter.fill_(1)  # a gain may be 0 before training, and hide the weight
        stored.masked_fill_(zeros, 0)
    used = _weight_used_by(twin)
    return used is not None and used.shape == stored.shape and bool(used[zeros].any())


def materialize_weights(model: nn.Module) -> nn.Module:
    """Replace layers that compute their weight by plain layers that hold it, in place.

    The network computes the same in evaluation mode. It can be pruned then: zeros stay zeros.
    Trained on, it learns the weights themselves; weight standardisation and parametrizations act
    no longer.

    Args:
        model: A network with weight-standardised or parametrized convolutions and linear layers.

    Returns:
        ``model``.

    Raises:
        ValueError: If a layer computes more than a convolution with such a weight.

    >>> net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)))
    >>> x = torch.ones(1, 3, 2, 2)
    >>> y = net(x)
    >>> [type(layer).__name__ for layer in materialize_weights(net)], torch.equal(net(x), y)
    (['Conv2d'], True)
    """
    for name, layer in list(_computing_layers(model)):
        remove_parametrizations(layer)
        if not computes_weight(layer):
            continue
        plain = _plain_layer(name, layer)
        for parent in model.modules():
            for child, module in parent._modules.items():
                if module is layer:
                    parent._modules[child] = plain
    return model


def remove_parametrizations(layer: nn.Module) -> None:
    """Let a layer hold the weights that torch's parametrizations and norms compute, in place.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    >>> remove_parametrizations(layer)
    >>> type(layer).__name__, list(layer.state_dict())
    ('Conv2d', ['bias', 'weight'])
    """
    if parametrize.is_parametrized(layer):
        # torch's own function changes the class, which copies of the layer share.
        with torch.no_grad():
            values = {name: getattr(layer, name) for name in layer.parametrizations}  # type: ignore[union-attr]
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        for name, value in values.items():
            layer.register_parameter(name, nn.Parameter(value.detach().clone()))
    for hook in list(layer._forward_pre_hooks.values()):  # torch's older functions
        if isinstance(hook, WeightNorm):
            nn.utils.remove_weight_norm(layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            nn.utils.remove_spectral_norm(layer, hook.name)


def _weight_used_by(twin: nn.Module) -> Tensor | None:
    try:
        with torch.no_grad(), _WeightSeeker():
            twin.eval()(_small_input(twin))
    except _FoundError as found:
        return found.weight.detach()
    except Exception:  # whatever a forward of any kind may raise for a made-up input
        return None
    return None


def _computing_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model.named_modules():
        kind = isinstance(layer, (_ConvNd, nn.Linear)) and not getattr(layer, "transposed", False)
        # The weight of a layer with torch's older weight norm isn't a parameter.
        if kind and (layer._parameters.get("weight") is None or computes_weight(layer)):
            yield name, layer


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is one of torch's own, and nothing is between its weight and its use."""
    return (
        type(layer) in _PLAIN
        and "forward" not in vars(layer)
        and layer._parameters.get("weight") is not None
        and not layer._forward_pre_hooks
    )


def _small_input(layer: Any) -> Tensor:
    parameter = next(iter(layer.parameters()))
    if isinstance(layer, nn.Linear):
        shape = [1, layer.in_features]
    else:
        dilation = layer.dilation if isinstance(layer.dilation, tuple) else (layer.dilation,) * 9
        sides = [2 * d * k for d, k in zip(dilation, layer.kernel_size, strict=False)]
        shape = [1, layer.in_channels, *sides]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(parameter)


def _plain_layer(name: str, layer: Any) -> nn.Module:
    """The plain layer that computes the same."""
    weight = effective_weight(layer)
    kind = next(kind for kind in _PLAIN if isinstance(layer, kind))
    if weight is None:
        _refuse(name, layer)
    if kind is nn.Linear:
        sizes: dict[str, Any] = {"in_features": layer.in_features}
        sizes |= {"out_features": layer.out_features}
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        sizes = {key: getattr(layer, key) for key in (*names, "groups", "padding_mode")}
    bias = layer.bias
    plain: Any = kind(**sizes, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
        x = _small_input(layer)
        expected, found = copy.deepcopy(layer).eval()(x), plain(x)
    if expected.shape != found.shape or not torch.allclose(expected, found, 1e-4, 1e-5):
        _refuse(name, layer)
    return plain.train(layer.training)  # type: ignore[no-any-return]


def _refuse(name: str, layer: nn.Module) -> NoReturn:
    raise ValueError(
        f"The layer {name!r} of `model` must be a convolution or a linear layer with a computed"
        f" weight and no more, but {type(layer).__name__} computes something else, too."
    )
