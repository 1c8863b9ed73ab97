"""Linear layers that read the channels of an image, flattened or averaged."""

from __future__ import annotations

import math
import operator

import torch
from torch import fx, nn

from spp_lightning.compaction.graph.patterns import averages_pixels, is_pointwise
from spp_lightning.compaction.graph.query import (
    Node,
    arguments,
    calls,
    module_of,
    shape_of,
    single_user,
    times_called,
)

__all__ = ["flattened_readers", "reads_batch_size"]


def flattened_readers(graph: fx.GraphModule) -> dict[Node, Node]:
    """Find the nodes that flatten or average images for a linear layer.

    Between the two may be activations and dropout only.

    Args:
        graph: A traced network with the shapes of its tensors.

    Returns:
        The linear layer, by the node that flattens. Its features are the channels in their order,
        each with its pixels.
    """
    found = {}
    for node in graph.graph.nodes:
        if not _flattens(graph, node):
            continue
        user = single_user(node)
        while user is not None and is_pointwise(graph, user):
            user = single_user(user)
        if user is None or type(module_of(graph, user)) is not nn.Linear:
            continue
        if times_called(graph, user.target) == 1:
            found[node] = user
    return found


def reads_batch_size(node: Node) -> bool:
    """Whether a node reads no more of a tensor than how many images it has."""
    if calls(node, (), ("size",)):
        return node.args[1:] == (0,) or node.kwargs == {"dim": 0}
    if calls(node, (getattr,), ()) and node.args[1] == "shape":
        return all(calls(x, (operator.getitem,), ()) and x.args[1] == 0 for x in node.users)
    return False


def _flattens(graph: fx.GraphModule, node: Node) -> bool:
    """Whether a node makes rows of images, whose numbers are the channels with their pixels."""
    image = node.args[0] if node.args else None
    before, after = shape_of(image) or (), shape_of(node) or ()
    if len(before) != 4 or len(after) != 2 or after[0] != before[0]:
        return False
    module = module_of(graph, node)
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) in ((1, -1), (1, 3))
    if calls(node, (torch.flatten,), ("flatten",)):
        given = arguments(node, ("input", "start_dim", "end_dim"))
        return (given.get("start_dim"), given.get("end_dim", -1)) in ((1, -1), (1, 3))
    if averages_pixels(node):
        return True
    if calls(node, (torch.reshape,), ("view", "reshape")):
        shape = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        # A number of features that is written out would be wrong with fewer channels.
        is_flat = after[1] == math.prod(before[1:])
        return len(shape) == 2 and isinstance(shape[1], int) and shape[1] == -1 and is_flat
    return False
