"""ConvNet: the small CIFAR-10 network of Caffe's ``cifar10_full``, as a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from spp_lightning.compaction.epilogue import (
    LRN_ALPHA,
    Clamp,
    Epilogue,
    PlaneOp,
    local_response_norm,
)
from spp_lightning.compaction.layers.kept import with_epilogue

__all__ = ["ConvNet"]

# What follows each convolution. A max pool and a ReLU may change places.
_MAX, _AVG = (PlaneOp(kind, (3, 3), (2, 2), ceil_mode=True) for kind in ("max_pool", "avg_pool"))
_NORM = PlaneOp("local_response_norm", (3, 3), alpha=LRN_ALPHA)
_AFTER_1, _AFTER_2, _AFTER_3 = (
    Epilogue(Clamp(0.0), ops) for ops in ((_MAX, _NORM), (_AVG, _NORM), (_AVG,))
)


class ConvNet(LightningModule):
    """Three 5×5 convolutions and a linear layer for 32×32 colour images.

    Inputs: pixels in 0…255 minus the training set's mean image, ``(B, 3, 32, 32)``. Outputs:
    logits, ``(B, num_classes)``. A batch for training, validation or testing is
    ``(images, labels)``. Logs ``train_loss``, ``val_loss``, ``val_acc``, ``test_loss`` and
    ``test_acc`` (accuracies in [0, 1]).

    Args:
        num_classes: Number of classes.
        lr: Learning rate of the convolutions' weights. The biases of conv1, conv2 and ip1 learn at
            twice this rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of the convolutions, weights and biases. ip1's weight decays 250
            times as fast, its bias not at all.
        milestones: Optimizer steps at which the learning rate is multiplied by ``gamma``.
        gamma: Factor of the learning rate at each milestone.
        weights: Checkpoint of a ConvNet to start from: Lightning's, or a plain state dict.
        channels_last: Whether weights and activations are in channels-last memory format, which is
            faster on CPUs and on GPUs with tensor cores. Shapes and results are the same.

    Raises:
        FileNotFoundError: If there is no file ``weights``.
        ValueError: If ``weights`` holds another network.

    Source: Caffe's ``cifar10_full``, which the SPP paper prunes (Wang et al., BMVC 2018).

    >>> net = ConvNet()
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> [tuple(layer.weight.shape) for layer in (net.conv1, net.conv2, net.conv3)]
    [(32, 3, 5, 5), (32, 32, 5, 5), (64, 32, 5, 5)]
    """

    def __init__(
        self,
        num_classes: int = 10,
        lr: float = 0.001,
        momentum: float = 0.9,
        weight_decay: float = 0.004,
        milestones: Sequence[int] = (60_000, 65_000),
        gamma: float = 0.1,
        weights: str | Path | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        # Checkpoints hold the weights: they must load where this file doesn't exist.
        self.save_hyperparameters(ignore=["weights"])
        self.channels_last = channels_last
        self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.ip1 = nn.Linear(64 * 4 * 4, num_classes)
        self._initialise()
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")
        self.example_input_array = torch.zeros(1, 3, 32, 32)
        if weights is not None:
            self.load_state_dict(_read_weights(Path(weights), self))
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _initialise(self) -> None:
        deviations = {"conv1": 1e-4, "conv2": 0.01, "conv3": 0.01, "ip1": 0.01}
        for name, std in deviations.items():
            nn.init.normal_(self.get_parameter(f"{name}.weight"), std=std)
            nn.init.zeros_(self.get_parameter(f"{name}.bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of images.

        Args:
            x: Pixels minus the mean image, ``(B, 3, 32, 32)``.

        Returns:
            Logits, ``(B, num_classes)``.
        """
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = with_epilogue(self.conv1, x, _AFTER_1, _after_1)
        x = with_epilogue(self.conv2, x, _AFTER_2, _after_2)
        x = with_epilogue(self.conv3, x, _AFTER_3, _after_3)
        return self.ip1(x.flatten(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: D102
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: D102
        self._evaluate(batch, "test", self.test_acc)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Predicted classes of a batch, ``(B,)``."""
        return self(batch[0]).argmax(1)

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy
    ) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log(f"{stage}_acc", accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """SGD with learning rate and weight decay per layer, and a step schedule."""
        hp = self.hparams
        lr, decay = hp["lr"], hp["weight_decay"]
        convs = (self.conv1, self.conv2, self.conv3)
        groups = [
            {"params": [conv.weight for conv in convs] + [self.conv3.bias]},
            {"params": [self.conv1.bias, self.conv2.bias], "lr": 2 * lr},
            {"params": [self.ip1.weight], "weight_decay": 250 * decay},
            {"params": [self.ip1.bias], "lr": 2 * lr, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr, hp["momentum"], weight_decay=decay)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, list(hp["milestones"]), hp["gamma"]
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def _after_1(y: Tensor) -> Tensor:
    return local_response_norm(F.relu(F.max_pool2d(y, 3, 2, ceil_mode=True)))


def _after_2(y: Tensor) -> Tensor:
    return local_response_norm(_after_3(y))


def _after_3(y: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(y), 3, 2, ceil_mode=True)


def _read_weights(path: Path, net: nn.Module) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"`weights` must be a checkpoint file, but {path.absolute()} isn't a file. First"
            " train the network to prune, then set `weights` to its checkpoint."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for bad files
        raise ValueError(f"`weights` (={path}) can't be read as a checkpoint: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    expected = {name: value.shape for name, value in net.state_dict().items()}
    found = {name: getattr(value, "shape", None) for name, value in state.items()}
    if expected != found:
        wrong = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        raise ValueError(
            f"`weights` (={path}) must hold this network, but these entries are missing,"
            f" unknown or of another shape: {', '.join(wrong)}."
        )
    return dict(state)
