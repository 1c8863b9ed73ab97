"""SPPCallback with coupled channels: targets of MACs, resuming, stages."""

import pytest
import torch
from conftest import make_trainer, same, tiny_data
from lightning.pytorch.callbacks import ModelCheckpoint

from spp_lightning import SPPCallback, StagedSPPCallback, compact, plan, to_dense

pytest.importorskip("torch_pruning", reason="Torch-Pruning is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")

DENSE = 8 * 27 * 64 + 8 * 72 * 64 + 32  # TinyModule's MACs on 8×8 images


def channels(module):
    """Filters that aren't 0 of both convolutions."""
    return [int(x.weight.detach().flatten(1).any(1).sum()) for x in (module.conv1, module.conv2)]


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"speedup": 3, "of": "network"}, DENSE / 3),
        ({"speedup": 3}, DENSE / 3),
        ({"macs": 20_000}, 20_000),
        ({"prune_ratio": 0.5}, DENSE),
    ],
    ids=["network", "layers", "macs", "ratio"],
)
def test_the_network_ends_at_its_target(tiny, settings, limit):
    tiny.example_input_array = torch.zeros(1, 3, 8, 8)
    pruning = SPPCallback(**settings, granularity="coupled-channel", A=0.5, interval=1)
    make_trainer(pruning, max_steps=30).fit(tiny, tiny_data())
    first, second = channels(tiny)
    kept = [8 - pruning.pruner.num_target[name] for name in ("conv1", "conv2")]
    assert [first, second] == kept

    def macs(first, second):
        return first * 27 * 64 + second * first * 9 * 64 + second * 4

    assert macs(first, second) <= limit
    if limit == DENSE:
        assert [first, second] == [4, 4]
    else:  # no channel more could be kept
        assert macs(first + 1, second) > limit and macs(first, second + 1) > limit
    assert (pruning.plan.dense_macs, pruning.plan.macs) == (DENSE, macs(first, second))
    x = torch.rand(2, 3, 8, 8)
    small = to_dense(compact(tiny, x))
    assert small.conv2.weight.shape == (second, first, 3, 3)
    assert small.head.weight.shape == (4, second)
    torch.testing.assert_close(small(x), tiny.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_resumed_fit_ends_like_the_uninterrupted_one(tiny, tmp_path):
    start = {name: value.clone() for name, value in tiny.state_dict().items()}

    def fit(max_steps, *more, **options):
        tiny.load_state_dict(start)
        settings = {"of": "network", "granularity": "coupled-channel", "A": 0.3, "interval": 2}
        pruning = SPPCallback(speedup=2, **settings)
        trainer = make_trainer(pruning, *more, max_steps=max_steps, enable_checkpointing=bool(more))
        trainer.fit(tiny, tiny_data(), **options)
        return {name: value.clone() for name, value in tiny.state_dict().items()}, pruning

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    whole, first = fit(40, saving)
    resumed, second = fit(40, ckpt_path=tmp_path / "step=8.ckpt")
    assert first.pruner.finished and second.pruner.finished
    assert same(whole, resumed)
    assert first.plan == second.plan


def test_stages_prune_further_and_further(tiny):
    class Validated(type(tiny)):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 0.5)

    tiny.__class__ = Validated
    pruning = StagedSPPCallback(
        monitor="val_acc", stages=(1.5, 3.0), granularity="coupled-channel", A=0.5, interval=1
    )
    trainer = make_trainer(pruning, max_steps=80, val_check_interval=4)
    trainer.fit(tiny, tiny_data(), tiny_data())
    assert pruning.stage == 2
    first, second = pruning.plans
    assert first.macs <= DENSE / 1.5 and second.macs <= DENSE / 3
    assert all(a.pruned <= b.pruned for a, b in zip(first.layers, second.layers, strict=True))
    assert channels(tiny) == [8 - layer.pruned for layer in second.layers]


def test_plan_counts_both_sides_of_a_layer(tiny):
    found = plan(tiny, torch.zeros(1, 3, 8, 8), speedup=2, granularity="coupled-channel")
    counts = {layer.name: layer.groups - layer.pruned for layer in found.layers}
    first, second = counts["conv1"], counts["conv2"]
    assert found.dense_macs == DENSE
    assert found.macs == first * 27 * 64 + second * first * 9 * 64 + second * 4 <= DENSE / 2


@pytest.mark.parametrize(
    "settings", [{"speedup": 2, "of": "latency"}, {"latency_ms": 3}], ids=["of", "latency_ms"]
)
def test_a_latency_is_refused(settings):
    with pytest.raises(ValueError, match=r"must not ask for a latency with coupled channels, got"):
        SPPCallback(granularity="coupled-channel", **settings)
