"""DistillationCallback: the teacher's share of the loss, its teacher over resumes, and errors."""

import numpy as np
import pytest
import torch
from conftest import TinyModule, tiny_data
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from spp_lightning import DistillationCallback, SPPCallback, distillation_loss


def fit(net, *callbacks, steps=6, resume=None, **options):
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "enable_checkpointing": False} | options
    trainer = Trainer(max_steps=steps, callbacks=list(callbacks), **settings)
    trainer.fit(net, tiny_data(), ckpt_path=resume, weights_only=True)
    return net


def tiny(seed=0, scale=1.0):
    torch.manual_seed(seed)
    net = TinyModule()
    with torch.no_grad():
        net.head.weight.mul_(scale)
    return net


def test_the_loss_is_the_divergence_of_the_softmax():
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=(2, 8, 5)) * 4
    p, q = (np.exp(x / 3) / np.exp(x / 3).sum(1, keepdims=True) for x in (theirs, ours))
    expected = 9 * (p * np.log(p / q)).sum() / 8
    found = distillation_loss(torch.tensor(ours), torch.tensor(theirs), 3.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert expected > 1


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_follows_the_gradient_of_both_losses(accumulated):
    teacher, net, manual = tiny(1, 20.0), tiny(), tiny()
    callback = DistillationCallback(teacher, share=0.25, temperature=2.0)
    fit(net, callback, steps=1, accumulate_grad_batches=accumulated)
    for batch, _ in zip(tiny_data(), range(accumulated), strict=False):
        scores = manual(batch[0])
        hard = F.cross_entropy(scores, batch[1])
        soft = F.kl_div(
            (scores / 2).log_softmax(1), (teacher(batch[0]) / 2).softmax(1), reduction="batchmean"
        )
        ((0.75 * hard + 0.25 * 4 * soft) / accumulated).backward()
    before = tiny()
    for name, parameter in net.named_parameters():
        update = before.get_parameter(name) - parameter
        expected = 0.05 * (manual.get_parameter(name).grad + 1e-3 * before.get_parameter(name))
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-7)


def test_without_a_share_it_changes_nothing_and_leaves_nothing():
    plain, net = fit(tiny()), tiny()
    fit(net, DistillationCallback(tiny(1), share=0.0))
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "training_step" not in vars(net) and not net._forward_hooks
    assert net.state_dict().keys() == TinyModule().state_dict().keys()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_has_the_teacher_that_it_began_with(tmp_path):
    """The teacher is the unpruned network, which the checkpoint's network no longer is."""

    def callbacks():
        pruning = SPPCallback(prune_ratio=0.5, interval=1, A=0.2, seed=0)
        return pruning, DistillationCallback(share=0.9)

    def saving():
        return ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=12, save_top_k=-1)

    whole = fit(tiny(), *callbacks(), saving(), steps=24, enable_checkpointing=True)
    first = tmp_path / "step=12.ckpt"
    options = {"resume": first, "enable_checkpointing": True}
    again = fit(tiny(3), *callbacks(), saving(), steps=24, **options)
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    state = torch.load(first, weights_only=True)["callbacks"]["DistillationCallback"]
    assert torch.equal(state["teacher"]["conv1.weight"], tiny().conv1.weight)


class Wrapped(LightningModule):
    """Calls a submodule in its training step and returns a dict."""

    def __init__(self, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        self.net = tiny()

    def training_step(self, batch):
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1]), "images": len(batch[0])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Outputs(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.last = outputs


def test_a_submodule_may_give_the_scores():
    seen = Outputs()
    net = fit(Wrapped(), DistillationCallback(tiny(1, 20.0), 1.0, module="net"), seen, steps=1)
    assert seen.last["images"] == 16
    batch = next(iter(tiny_data()))
    expected = distillation_loss(tiny()(batch[0]), tiny(1, 20.0)(batch[0]))
    assert seen.last["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert not torch.equal(net.net.head.weight, tiny().head.weight)


def test_what_is_wrong_is_said_before_or_in_the_first_step():
    with pytest.raises(ValueError, match=r"`share` must be in \[0, 1\], got -0\.1"):
        DistillationCallback(share=-0.1)
    with pytest.raises(ValueError, match=r"shape of `scores`, \(2, 3\), got \(2, 1\)"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"`temperature` must be above 0, got 0"):
        DistillationCallback(temperature=0)
    with pytest.raises(ValueError, match=r"`module` must name a submodule.*got 'body'.*'net'"):
        fit(Wrapped(), DistillationCallback(module="body"))
    with pytest.raises(ValueError, match=r"`training_step` didn't call it"):
        fit(net := Wrapped(), DistillationCallback())
    assert "training_step" not in vars(net)
    with pytest.raises(ValueError, match=r"`automatic_optimization=False`"):
        fit(Wrapped(manual=True), DistillationCallback(module="net"))
    broken = Wrapped()
    broken.net.forward = lambda x: {"scores": nn.functional.relu(x)}
    broken.training_step = lambda batch: broken.net(batch[0])["scores"].sum()
    with pytest.raises(ValueError, match=r"must return a tensor of class scores, got dict"):
        fit(broken, DistillationCallback(tiny(), module="net"))
