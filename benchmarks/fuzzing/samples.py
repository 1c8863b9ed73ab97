"""The files that are damaged: small networks that together have all that a file can hold."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning.compaction.epilogue import local_response_norm
from spp_lightning.compaction.file.container import save_compact
from spp_lightning.compaction.pipeline import compact

__all__ = ["samples"]


class _Plain(nn.Module):
    """Convolutions in a row, and a linear layer: one call of the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3)
        self.ip1 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = local_response_norm(F.max_pool2d(F.relu(self.conv1(x)), 2))
        return self.ip1(F.relu(self.conv2(y)).flatten(1))


class _Residual(nn.Module):
    """Residuals, norms, a layer that is called twice, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(8), nn.PReLU()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.first(x)
        y = F.relu(y + self.again(y))
        return {"y": self.act(self.norm(self.again(y))), "mean": y.mean((2, 3))}


class _Tensors(nn.Module):
    """Tensors of the network's own, of several types."""

    mask: Tensor
    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.register_buffer("mask", torch.rand(8, 1, 1) > 0.5)
        self.register_buffer("order", torch.randperm(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * self.scale
        y = torch.where(self.mask, y, 0.0)[:, self.order]
        return torch.cat([y, y.chunk(2, 1)[0]], 1).reshape(x.shape[0], -1)


class _Parts(nn.Module):
    """Names with dots, views and slices."""

    def __init__(self) -> None:
        super().__init__()
        block = [nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Hardswish(), nn.AvgPool2d(2)]
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.Sequential(*block, nn.Sequential(*block))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.blocks(self.stem(x))
        b, c, h, w = y.shape
        shuffled = y.view(b, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)
        return F.interpolate(shuffled, scale_factor=2.0)[..., 1:], y.softmax(dim=1)


def samples(path: Path) -> tuple[list[bytes], Tensor]:
    """The files' bytes, and an input for all of their networks."""
    contents, x = [], torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for make in (_Plain, _Residual, _Tensors, _Parts):
        net = make().eval().requires_grad_(False)
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(torch.rand(layer.weight.shape[1:]) > 0.6)
        save_compact(compact(net, x), path)
        contents.append(path.read_bytes())
    return contents, x
