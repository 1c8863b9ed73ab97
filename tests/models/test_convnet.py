"""ConvNet with a teacher."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from spp_lightning import ConvNet


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    net = ConvNet()
    for layer in (net.conv1, net.conv2, net.conv3, net.ip1):  # answers that differ
        layer.weight.data.mul_(10)
    torch.save(net.state_dict(), tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_teachers_share_of_the_loss(teacher: Path, share: float) -> None:
    torch.manual_seed(2)
    net = ConvNet(teacher=teacher, distillation=share)
    net.log = lambda *_: None  # type: ignore[method-assign]  # there is no Trainer
    images, labels = 60 * torch.randn(8, 3, 32, 32), torch.arange(8)
    with torch.no_grad():
        loss = float(net.training_step((images, labels), 0))
        logits = net(images).double().numpy()
        answers = ConvNet(weights=teacher).eval()(images).double().numpy()
    ours, theirs = log_softmax(logits / 4), log_softmax(answers / 4)
    divergence = (np.exp(theirs) * (theirs - ours)).sum() / 8
    hard = -log_softmax(logits)[range(8), range(8)].mean()
    assert divergence > 0.1
    expected = (1 - share) * hard + share * 16 * divergence
    assert math.isclose(loss, expected, rel_tol=1e-4)


def test_a_teacher_is_no_part_of_the_network(teacher: Path) -> None:
    net = ConvNet(teacher=teacher)
    assert net.state_dict().keys() == ConvNet().state_dict().keys()
    assert len(list(net.parameters())) == 8
    assert "teacher" not in net.hparams
    answers = net._teacher[0]
    net.train()
    assert not answers.training and not any(p.requires_grad for p in answers.parameters())


def test_a_wrong_teacher(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`teacher` must be .* set `teacher` to"):
        ConvNet(teacher=tmp_path / "none.ckpt")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"`teacher` .* must hold this network"):
        ConvNet(teacher=tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"`distillation` must be in \[0, 1\], got 1\.5\."):
        ConvNet(distillation=1.5)
