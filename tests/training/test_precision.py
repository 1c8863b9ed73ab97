"""Pruning under Lightning's precisions and memory formats."""

import pytest
import torch
from conftest import TinyModule, make_trainer, tiny_data, zero_columns
from lightning.pytorch import Callback
from torch import nn

from spp_lightning import SPPCallback, SPPPruner


@pytest.mark.parametrize("kernels", ["dense", "compact"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_exact_count(tiny, precision, channels_last, kernels):
    """The count is exact, and neither type nor memory format of weights and activations changes."""
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            plain, masked = pl_module.conv2._parameters["weight"], pl_module.conv2.weight
            assert masked.dtype == plain.dtype and masked.stride() == plain.stride()
            seen.append(callback.pruner.probability["conv2"].dtype)

    def note(layer, inputs, output):
        assert output.dtype == computed
        assert output.is_contiguous(memory_format=layout)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    stored = {"b": torch.bfloat16, "1": torch.float16, "3": torch.float32, "6": torch.float64}
    computed = stored[precision[0]]
    tiny = tiny.to(memory_format=layout)
    strides = tiny.conv2.weight.stride()
    handle = tiny.conv2.register_forward_hook(note)
    callback = SPPCallback(A=0.25, interval=1, kernels=kernels)
    make_trainer(callback, Watch(), max_steps=40, precision=precision).fit(tiny, tiny_data())
    handle.remove()
    assert set(seen) == {torch.float64} and len(seen) == 40
    assert callback.pruner.finished
    assert [zero_columns(tiny.conv1), zero_columns(tiny.conv2)] == [21, 54]
    assert tiny.conv2.weight.stride() == strides
    assert tiny.conv2.weight.dtype == (torch.float32 if "mixed" in precision else computed)
    assert all(value.isfinite().all() for value in tiny.state_dict().values())


@pytest.mark.parametrize("criterion", ["l1", "l2"])
@pytest.mark.parametrize(
    ("dtype", "large", "more"),
    [
        (torch.bfloat16, 256.0, 0.75),
        (torch.float16, 2048.0, 0.75),
        (torch.float64, 1.0, 2.0**-30),
    ],
    ids=str,
)
def test_importance_is_exact_enough_to_rank(dtype, large, more, criterion):
    """Two columns whose norms are one number in the weight's own type (or in float32)."""
    layer = nn.Conv2d(2, 2, 1, bias=False, dtype=dtype)
    if criterion == "l2":
        more = (2 * large * more) ** 0.5
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[large, large], [more, 0.0]]).view(2, 2, 1, 1))
    weight = layer.weight.detach()
    coarse = torch.float32 if dtype == torch.float64 else dtype
    norms = torch.linalg.vector_norm(weight.to(torch.float64), int(criterion[1]), (0, 2, 3))
    assert norms[0] > norms[1]
    assert norms.to(coarse)[0] == norms.to(coarse)[1]

    # A tie would go by position, and take the first one; the second is the less important.
    pruner = SPPPruner(nn.Sequential(layer), prune_ratio=0.5, criterion=criterion, A=1.0)
    pruner.update()
    assert pruner.probability["0"].tolist() == [0.0, 1.0]
    pruner.fold()
    assert layer.weight[:, 1].eq(0).all()


def test_mixed_precision_ranks_by_the_float32_weights():
    """Autocast doesn't reach the importance, though the step runs in bfloat16."""
    with torch.random.fork_rng():
        module = TinyModule()
    with torch.no_grad():
        # Rounded to bfloat16 all columns of conv1 are one number; the later, the smaller.
        slope = torch.linspace(1e-3, 0, 27).view(1, 3, 3, 3)
        module.conv1.weight.copy_((1 + slope).expand(8, -1, -1, -1))
    assert module.conv1.weight.bfloat16().unique().numel() == 1
    callback = SPPCallback(A=1.0, interval=10, layers=["conv1"], prune_ratio=0.25)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
    make_trainer(callback, max_steps=30, precision="bf16-mixed").fit(module, tiny_data())
    assert callback.pruner.finished
    assert callback.pruner.probability["conv1"].tolist() == [0.0] * 20 + [1.0] * 7
