"""Counting MACs."""

import pytest
import torch
from torch import nn

from spp_lightning import ConvNet, count_macs


def test_convnet_is_as_published():
    macs = count_macs(ConvNet(), torch.zeros(1, 3, 32, 32))
    assert macs == {"conv1": 2_457_600, "conv2": 6_553_600, "conv3": 3_276_800, "ip1": 10_240}


class Standardized(nn.Conv2d):
    """Weight standardisation: a column of zeros in the stored weight isn't one in the used one."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def test_weights_that_are_computed_count_as_they_are_used():
    plain, standard = nn.Conv2d(4, 3, 1), Standardized(4, 3, 1)
    norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 1))
    for layer in (plain, standard, norm.parametrizations.weight):
        weight = layer.original1 if layer is norm.parametrizations.weight else layer.weight
        weight.data[:, :2] = 0
    x = torch.zeros(1, 4, 5, 5)
    found = [count_macs(layer, x)[""] for layer in (plain, standard, norm)]
    assert found == [25 * 2 * 3, 25 * 4 * 3, 25 * 2 * 3]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    ("net", "shape", "macs"),
    [
        (nn.Sequential(nn.Linear(8, 5)), (1, 7, 8), 7 * 8 * 5),
        (nn.Sequential(nn.Conv1d(2, 3, 4)), (1, 2, 9), 6 * 2 * 3 * 4),
        (nn.Sequential(nn.Conv2d(2, 3, 3)), (2, 5, 6), 3 * 4 * 2 * 3 * 9),
        (Twice(), (1, 4, 5, 5), 2 * 25 * 4 * 2 * 9),
    ],
    ids=["linear on tokens", "conv1d", "conv2d without a batch", "layer passed twice"],
)
def test_macs_of_a_layer(net, shape, macs):
    net.train()
    assert list(count_macs(net, torch.zeros(shape)).values()) == [macs]
    assert all(module.training for module in net.modules())


def test_no_input_is_an_error():
    with pytest.raises(ValueError, match="`example_input` must be an input batch, got None"):
        count_macs(ConvNet(), None)
