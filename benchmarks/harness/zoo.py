"""Networks of torchvision and timm, pruned by the method's own pruner, without training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from spp_lightning import SPPPruner, load_compact, materialize_weights, save_compact
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.method.groups import WeightGroups, weight_of

__all__ = ["ZOO", "Network", "error_of", "is_equal_after_file", "prepared", "pruned"]


class Network(NamedTuple):
    """A network of the zoo.

    Attributes:
        family: What is special about it, in words.
        kind: ``"convolutions"``, ``"depthwise"`` or ``"linear"``: where most of its MACs are, or
            most of its time.
        make: Makes it, with random weights.
        size: Side of the square image that it is run with.
        takes_list: Whether it takes a list of images, as a detector.
    """

    family: str
    kind: str
    make: Callable[[], nn.Module]
    size: int = 224
    takes_list: bool = False

    def example(self, seed: int = 0) -> Any:
        """What the network takes: a batch of one random image, or a list of one."""
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(1, 3, 8, 8, generator=generator)
        image = F.interpolate(coarse, size=self.size, mode="bilinear")[0]
        image = 0.8 * image + 0.2 * torch.rand(image.shape, generator=generator)
        return [image] if self.takes_list else (image[None] - 0.5) / 0.25


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        networks = torchvision.models
        for room in (networks, networks.segmentation, networks.detection):
            if hasattr(room, name):
                inner = {} if room is networks else {"weights_backbone": None}
                net: nn.Module = getattr(room, name)(weights=None, **inner)
                return net
        raise ValueError(f"torchvision has no network {name!r}")

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm  # of benchmarks only

        net: nn.Module = timm.create_model(name)
        return net

    return make


ZOO: dict[str, Network] = (
    {
        name: Network(family, kind, _torchvision(name))
        for name, family, kind in (
            ("resnet18", "residual", "convolutions"),
            ("resnet50", "residual, 1×1", "convolutions"),
            ("vgg16_bn", "plain", "convolutions"),
            ("densenet121", "concatenation, pre-activation", "convolutions"),
            ("mobilenet_v2", "depthwise", "depthwise"),
            ("mobilenet_v3_small", "depthwise, squeeze and excitation", "depthwise"),
            ("mobilenet_v3_large", "depthwise, squeeze and excitation", "depthwise"),
            ("efficientnet_b0", "depthwise, squeeze and excitation", "depthwise"),
            ("shufflenet_v2_x1_0", "depthwise, shuffled channels", "depthwise"),
            ("googlenet", "concatenation", "convolutions"),
            ("convnext_tiny", "depthwise 7×7, linear", "linear"),
            ("deeplabv3_resnet50", "segmentation, dilated", "convolutions"),
            ("lraspp_mobilenet_v3_large", "segmentation, depthwise", "depthwise"),
        )
    }
    | {
        name: Network("detection", "depthwise", _torchvision(name), 320, takes_list=True)
        for name in ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large")
    }
    | {
        f"timm {name}": Network(family, kind, _timm(name))
        for name, family, kind in (
            ("resnetv2_50", "pre-activation, norm+act modules", "convolutions"),
            ("nf_resnet50", "weight standardisation, no norms", "convolutions"),
            ("regnety_008", "grouped, squeeze and excitation", "convolutions"),
            ("cspresnet50", "partial stages, norm+act modules", "convolutions"),
            ("hrnet_w18_small", "parallel resolutions", "convolutions"),
            ("skresnet18", "selected kernels", "convolutions"),
            ("mobilenetv4_conv_small", "depthwise, norm+act modules", "depthwise"),
            ("ghostnet_100", "depthwise, concatenation", "depthwise"),
            ("levit_256", "attention, linear", "linear"),
            ("convnextv2_atto", "depthwise 7×7, linear, response norm", "linear"),
        )
    }
)


def prepared(network: Network) -> nn.Module:
    """The unpruned network in evaluation mode, with norms that fit its random weights."""
    torch.manual_seed(0)
    net = materialize_weights(network.make()).eval()
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and bool((module.weight == 0).all()):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
        if isinstance(module, _BatchNorm) and bool((module.weight == 0).all()):
            nn.init.uniform_(module.weight, 0.1, 0.5)  # else its branch would not be seen
        if isinstance(module, nn.BatchNorm1d) and module.running_var is not None:
            # Attention with random weights makes all tokens alike: calibrated norms of tokens would
            # magnify rounding errors to the size of the output.
            nn.init.uniform_(module.running_var, 0.5, 2)
    _calibrate(net, network)
    return net


def _calibrate(net: nn.Module, network: Network) -> None:
    """Give batch norms the statistics of four images."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momentums = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    images = [network.example(seed) for seed in range(2, 6)]
    batch = [x for image in images for x in image] if network.takes_list else torch.cat(images)
    with torch.no_grad():
        net(batch)
    for norm, momentum in zip(norms, momentums, strict=True):
        norm.momentum = momentum
        norm.eval()


def pruned(net: nn.Module, network: Network, speedup: float) -> nn.Module:
    """A copy pruned exactly by the method's own pruner, without training."""
    net = copy.deepcopy(net)
    net.example_input_array = network.example()  # type: ignore[assignment]
    pruner = SPPPruner(net, speedup=speedup, A=1.0, interval=1)
    while not pruner.finished:
        pruner.update()
    pruner.fold()
    del net.example_input_array
    for name, layer in pruner.layers.items():
        groups = WeightGroups.of(layer)
        zeros = (groups.importance(weight_of(layer)) == 0).sum()
        assert int(zeros) == pruner.num_target[name], name
    _calibrate(net, network)
    return net


def error_of(net: nn.Module, fast: nn.Module, network: Network) -> tuple[float, float]:
    """The largest difference from ``net`` in float64, relative to the largest output.

    Returns:
        That of ``fast``, and that of ``net`` in float32, which is its rounding error.

    Of a detector, whose boxes are chosen by comparing scores, the outputs of the compact parts are
    compared, for the inputs that they have in the detector.
    """
    example = network.example(seed=1)
    if isinstance(fast, CompactNetwork):
        return _error(net, fast, (example,), {})
    calls: dict[str, tuple[Any, Any]] = {}
    hooks = [
        part.register_forward_pre_hook(
            lambda part, args, kwargs, name=name: calls.setdefault(name, (args, kwargs)) and None,
            with_kwargs=True,
        )
        for name, part in fast.named_modules()
        if isinstance(part, CompactNetwork)
    ]
    with torch.no_grad():
        fast(example)
    for hook in hooks:
        hook.remove()
    errors = [
        _error(net.get_submodule(name), fast.get_submodule(name), *call)
        for name, call in calls.items()
    ]
    return max(a for a, _ in errors), max(b for _, b in errors)


def _error(net: nn.Module, fast: nn.Module, args: Any, kwargs: Any) -> tuple[float, float]:
    wide = tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x,
        (args, dict(kwargs)),
    )
    with torch.no_grad():
        expected = tree_leaves(copy.deepcopy(net).double()(*wide[0], **wide[1]))
        found, own = (tree_leaves(run(*args, **kwargs)) for run in (fast, net))

    def largest(outputs: list[Tensor]) -> float:
        pairs = zip(expected, outputs, strict=True)
        return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)

    return largest(found), largest(own)


def is_equal_after_file(fast: nn.Module, network: Network, folder: Any) -> bool:
    """Whether a compact network, or each compact part of a detector, comes back bit for bit."""
    example = network.example(seed=1)
    if isinstance(fast, CompactNetwork):
        save_compact(fast, folder / "net.spp")
        again: nn.Module = load_compact(folder / "net.spp")
    else:
        again = copy.deepcopy(fast)
        for name, part in list(fast.named_modules()):
            if isinstance(part, CompactNetwork):
                save_compact(part, folder / "part.spp")
                parent, _, child = name.rpartition(".")
                setattr(again.get_submodule(parent), child, load_compact(folder / "part.spp"))
    with torch.no_grad():
        pairs = zip(tree_leaves(fast(example)), tree_leaves(again(example)), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)
