"""A compiled network is compiled once for training and once for validation, and never again."""

import pytest
import torch
from conftest import TARGETS, TinyModule, columns, make_trainer, tiny_data
from lightning.pytorch import Callback
from torch._dynamo.utils import counters

from spp_lightning import SPPCallback


class Validated(TinyModule):
    """Can be validated."""

    def validation_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)


class Graphs(Callback):
    """Notes how many graphs there are, and whether pruning is done, after every batch."""

    def __init__(self, pruning):
        self.pruning, self.seen = pruning, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        graphs = counters["stats"]["unique_graphs"]
        self.seen.append((graphs, trainer.global_step, self.pruning.pruner.finished))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.on_train_batch_end(trainer, pl_module)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_once(mode):
    """Through sampling, updates, validation and the switch to retraining."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Validated()
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(module, mode=mode, fullgraph=True)
    callback = SPPCallback(A=0.5, interval=1)
    graphs = Graphs(callback)
    trainer = make_trainer(callback, graphs, val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(compiled, tiny_data(), tiny_data())
    torch._dynamo.reset()
    assert columns(module) == TARGETS
    # One graph after step 1; the other with the first validation, after step 2.
    assert [count for count, *_ in graphs.seen] == [1, 1] + [2] * (len(graphs.seen) - 2)
    assert {finished for _, step, finished in graphs.seen if step > 2} == {False, True}
