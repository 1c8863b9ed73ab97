"""Batch norms that a network calls as functions, made layers, so that they can be folded."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn import functional as F

from spp_lightning.compaction.graph.query import arguments, set_module, shape_of

__all__ = ["make_norms_layers"]

_TENSORS = ("running_mean", "running_var", "weight", "bias")
_ARGUMENTS = ("input", *_TENSORS, "training", "momentum", "eps")


def make_norms_layers(graph: fx.GraphModule) -> None:
    """Replace calls of ``F.batch_norm`` by calls of ``nn.BatchNorm2d``.

    Libraries join a norm and an activation in one module of their own, which torch.fx traces
    through. The norm of the module ``bn1`` becomes the layer ``bn1.norm``, with the same tensors.

    Args:
        graph: A traced network with the shapes of its tensors, changed in place.
    """
    made: dict[tuple[object, ...], str] = {}
    for node in list(graph.graph.nodes):
        if node.target is not F.batch_norm or len(shape_of(node) or ()) != 4:
            continue
        given = arguments(node, _ARGUMENTS)
        sources = [given.get(name) for name in _TENSORS]
        names = [x.target if isinstance(x, fx.Node) and x.op == "get_attr" else x for x in sources]
        if (
            not all(x is None or isinstance(x, str) for x in names)
            or None in names[:2]
            or (names[2] is None) != (names[3] is None)
            or given.get("training", False) is not False
        ):
            continue
        momentum, eps = given.get("momentum", 0.1), given.get("eps", 1e-5)
        key = (*names, momentum, eps)
        if key not in made:
            tensors = [None if name is None else _tensor_of(graph, str(name)) for name in names]
            made[key] = _free_name(graph, f"{str(names[0]).rpartition('.')[0]}.norm".lstrip("."))
            set_module(graph, made[key], _norm(tensors, momentum, eps))
        with graph.graph.inserting_before(node):
            layer = graph.graph.call_module(made[key], (given["input"],))
        layer.meta = dict(node.meta)
        node.replace_all_uses_with(layer)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _tensor_of(graph: fx.GraphModule, name: str) -> Tensor:
    parent, _, last = name.rpartition(".")
    tensor: Tensor = getattr(graph.get_submodule(parent), last)
    return tensor


def _free_name(graph: fx.GraphModule, name: str) -> str:
    parent, _, last = name.rpartition(".")
    count = 0
    while hasattr(graph.get_submodule(parent), last if not count else f"{last}_{count}"):
        count += 1
    return name if not count else f"{name}_{count}"


def _norm(tensors: list[Tensor | None], momentum: float, eps: float) -> nn.BatchNorm2d:
    mean, variance, weight, bias = tensors
    assert mean is not None
    norm = nn.BatchNorm2d(len(mean), eps, momentum, affine=weight is not None, device=mean.device)
    norm.running_mean, norm.running_var = mean, variance
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
            norm.register_parameter(name, own)
    return norm.eval()
