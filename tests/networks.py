"""Networks with pruned columns, without training."""

import torch
from torch import nn


def pruned(net, ratio=0.75, seed=0):
    """A network with weights of a useful size, of whose columns ``ratio`` are zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            fan_in = layer.weight[0].numel()
            size = (2 / fan_in / (1 - ratio)) ** 0.5
            kept = torch.randperm(fan_in, generator=generator) >= int(ratio * fan_in)
            weight = torch.randn(layer.weight.shape, generator=generator) * size
            layer.weight.data.copy_(weight * kept.view(layer.weight[0].shape))
    return net.eval()
