"""SPPCallback on kept columns: the masks and counts of a dense run, and what computes a step."""

import pytest
import torch
from conftest import TinyModule, make_trainer, tiny_data
from lightning.pytorch import Callback
from torch import nn

from spp_lightning import SPPCallback
from spp_lightning.method.groups import weight_of


class Watch(Callback):
    """Notes every step's mask, and what computed conv2."""

    def __init__(self, pruning):
        self.pruning, self.masks, self.computed = pruning, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.masks.append(torch.cat(list(self.pruning.pruner.mask.values())))
        y = pl_module.conv2(torch.zeros(1, 8, 8, 8))
        self.computed.append(type(y.grad_fn).__name__ == "_ConvolutionBackward")


def run(kernels, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = TinyModule()
    pruning = SPPCallback(A=0.25, interval=2, kernels=kernels, **settings)
    watch = Watch(pruning)
    trainer = make_trainer(pruning, watch, max_steps=40)
    trainer.fit(module, tiny_data())
    assert pruning.pruner.finished
    return module, trainer.optimizers[0], watch


@pytest.mark.parametrize("settings", [{}, {"granularity": "channel"}], ids=["columns", "channels"])
def test_masks_are_those_of_a_dense_run(settings):
    """At every step, bit for bit; weights and momentum to rounding."""
    (dense, momentum, watched), (kept, other_momentum, other) = (
        run(kernels, **settings) for kernels in ("dense", "compact")
    )
    assert len(watched.masks) == 40 and all(map(torch.equal, watched.masks, other.masks))
    assert not any(watched.computed) and all(other.computed)
    assert dense.state_dict().keys() == kept.state_dict().keys()
    torch.testing.assert_close(dense.state_dict(), kept.state_dict(), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(dense.parameters(), kept.parameters(), strict=True):
        pair = momentum.state[ours], other_momentum.state[theirs]
        torch.testing.assert_close(
            *(state["momentum_buffer"] for state in pair), rtol=1e-3, atol=1e-5
        )
    assert torch.equal(dense.conv2.weight == 0, kept.conv2.weight == 0)
    assert type(kept.conv2) is nn.Conv2d and type(weight_of(kept.conv2)) is nn.Parameter


def test_scaled_masks_are_dense_until_they_are_fixed():
    _, _, watched = run("compact", masking="scale")
    assert not watched.computed[0] and watched.computed[-1]
    switch = watched.computed.index(True)
    assert watched.computed == [False] * switch + [True] * (40 - switch)
    assert sorted(watched.masks[switch].unique().tolist()) == [0, 1]


def test_small_layers_stay_dense_by_themselves():
    _, _, watched = run("auto")
    assert not any(watched.computed)
