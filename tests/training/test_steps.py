"""A step is a batch at whose end an optimizer has stepped, whatever way the Trainer goes there."""

import pytest
import torch
from conftest import TinyModule, make_trainer, tiny_data, zero_columns
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.nn import functional as F

from spp_lightning import SPPCallback, SPPPruner


class Watch(Callback):
    """Notes step, probabilities and masks at the start of every batch."""

    def __init__(self, pruning: SPPCallback):
        self.pruning = pruning
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pruner = self.pruning.pruner
        p = torch.cat([*pruner.probability.values()])
        mask = torch.cat([*pruner.mask.values()])
        self.seen.append((pruner.state_dict()["step"], p, mask))

    @property
    def steps(self):
        return [step for step, *_ in self.seen]


class Manual(TinyModule):
    """Two optimizers, stepped by hand like a GAN's: which ones in a batch, ``plan`` says."""

    def __init__(self, plan):
        super().__init__()
        self.automatic_optimization = False
        self.plan = plan

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        which = self.plan[batch_idx % len(self.plan)]
        self.manual_backward(super().training_step(batch, batch_idx))
        for name, optimizer in (("D", first), ("G", second)):
            if name in which:
                self.toggle_optimizer(optimizer)
                optimizer.step()
                self.untoggle_optimizer(optimizer)
        if which:
            first.zero_grad()
            second.zero_grad()

    def configure_optimizers(self):
        return (
            torch.optim.SGD(self.conv1.parameters(), 0.05, momentum=0.9, weight_decay=1e-3),
            torch.optim.Adam([*self.conv2.parameters(), *self.head.parameters()], 1e-3),
        )


class Validated(TinyModule):
    """Can be validated, and counts how often it was."""

    validations = 0

    def validation_step(self, batch, batch_idx):
        self.validations += 1
        self.log("loss", self(batch[0]).isnan().sum().float())


CASES = {  # how, over batches of which the Trainer has 4 in an epoch; the steps of the batches
    "GAN": (lambda: Manual(["DG"]), {}, range(12)),
    "GAN_one_at_a_time": (lambda: Manual(["D", "G"]), {}, range(12)),
    "GAN_D_3_times_before_G": (lambda: Manual(["D", "D", "DDG", ""]), {}, [0, 1, 2, 3, 3, 4, 5]),
    "manual_accumulation": (lambda: Manual(["", "DG"]), {}, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
    "clip_norm": (TinyModule, {"gradient_clip_val": 0.01}, range(12)),
    "clip_value": (
        TinyModule,
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        range(12),
    ),
    "overfit_batches": (TinyModule, {"overfit_batches": 2}, range(12)),
    "incomplete_window": (
        TinyModule,
        {"accumulate_grad_batches": 3},
        [0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5],
    ),
    "limited_epoch": (
        TinyModule,
        {"limit_train_batches": 3, "accumulate_grad_batches": 2},
        [0, 0, 1, 2, 2, 3, 4, 4, 5],
    ),
    "validation_inside_a_window": (
        Validated,
        {"accumulate_grad_batches": 4, "val_check_interval": 1},
        [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2],
    ),
}


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize(("make", "options", "steps"), CASES.values(), ids=CASES)
def test_masks_change_with_an_optimizer_step_only(make, options, steps):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
    callback = SPPCallback(A=0.25, interval=2)
    watch = Watch(callback)
    trainer = make_trainer(callback, watch, max_steps=84, **options)
    validation = tiny_data(images=16) if isinstance(module, Validated) else None
    trainer.fit(module, tiny_data(), validation)

    assert watch.steps[: len(steps)] == list(steps)
    last = max(watch.steps)
    for (step, p, mask), (next_step, next_p, next_mask) in zip(
        watch.seen, watch.seen[1:], strict=False
    ):
        assert next_step in (step, step + 1)
        if next_step == step:
            assert torch.equal(mask, next_mask)
        if next_step == step or next_step % 2:
            assert torch.equal(p, next_p)
    # While p is strictly between, every step draws anew.
    masks = {step: mask for step, _, mask in watch.seen}
    assert not any(torch.equal(masks[step], masks[step + 1]) for step in range(2, 8))
    assert callback.pruner.finished and last > 10
    assert [zero_columns(module.conv1), zero_columns(module.conv2)] == [21, 54]
    if isinstance(module, Validated):
        # One a batch, and one of the sanity check.
        assert module.validations == len(watch.seen) + 1


class Quasi(TinyModule):
    """Trained by LBFGS, which calls the closure up to four times a step."""

    closures = 0

    def training_step(self, batch, batch_idx):
        self.closures += 1
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, history_size=5)


def test_lbfgs_steps_once_and_moves_nothing_pruned():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Quasi()
    callback = SPPCallback(A=0.25, interval=2)

    class Zeros(Watch):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            for name, layer in callback.pruner.layers.items():
                pruned = (callback.pruner.probability[name] == 1).view(1, *layer.weight.shape[1:])
                weight = layer._parameters["weight"].detach()
                assert not weight[pruned.expand_as(weight)].any()

    watch = Zeros(callback)
    make_trainer(callback, watch, max_steps=60).fit(module, tiny_data())
    assert watch.steps == list(range(60))
    assert 120 < module.closures <= 240
    assert callback.pruner.finished and callback.pruner.num_updates < 20
    assert [zero_columns(module.conv1), zero_columns(module.conv2)] == [21, 54]


def test_steps_go_on_from_fit_to_fit():
    """A fit that is stopped inside an interval counts; the next one begins at its next step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Validated()
    callback, data, validation = SPPCallback(A=0.25, interval=4), tiny_data(48), tiny_data(16)
    first, second = Watch(callback), Watch(callback)
    stopping = EarlyStopping("loss", patience=1)  # the loss stays 0: it stops after two epochs
    with pytest.warns(UserWarning, match="before SPP reached its target: after 6 steps"):
        make_trainer(callback, first, stopping, max_steps=300).fit(module, data, validation)
    assert type(module.conv1) is type(module.conv2) is nn.Conv2d
    assert first.steps == [0, 1, 2, 3, 4, 5]
    assert callback.pruner.num_updates == 2  # at steps 0 and 4; the next at step 8

    accumulating = make_trainer(callback, second, max_steps=80, accumulate_grad_batches=3)
    accumulating.fit(module, data, validation)
    assert second.steps[:9] == [6, 6, 6, 7, 7, 7, 8, 8, 8]
    assert torch.equal(second.seen[0][1], second.seen[5][1])
    assert not torch.equal(second.seen[5][1], second.seen[6][1])
    assert callback.pruner.finished
    assert [zero_columns(module.conv1), zero_columns(module.conv2)] == [21, 54]


OPTIMIZERS = {
    "sgd": lambda w: torch.optim.SGD(w, 0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda w: torch.optim.Adam(w, 0.01, weight_decay=0.01),
    "adamw_amsgrad": lambda w: torch.optim.AdamW(w, 0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda w: torch.optim.RMSprop(w, 0.01, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda w: torch.optim.Adagrad(w, 0.01, weight_decay=0.01),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_nothing_comes_back_in_a_thousand_steps(make_optimizer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, x = nn.Conv2d(2, 4, 2), torch.randn(2, 2, 4, 4)
    parameter, optimizer = layer.weight, make_optimizer(layer.parameters())

    def tensors():
        state = optimizer.state[parameter].values()
        return torch.stack([parameter.detach(), *(v for v in state if v.shape == parameter.shape)])

    pruner = SPPPruner(nn.Sequential(layer), A=1.0, start_step=5, interval=1000)
    largest = torch.zeros(())
    for step in range(1005):
        pruner.step(step, optimizer)
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 5:
            largest = torch.maximum(largest, tensors().abs())
    # With A = 1 the first update, at step 5, prunes the least important column.
    pruned = (pruner.probability["0"] == 1).view(2, 2, 2)
    assert pruner.num_updates == 1 and pruned.sum() == 1
    assert len(largest) >= 2 and (largest[..., pruned] == 0).all()
    assert (largest[..., ~pruned] > 0).all()
