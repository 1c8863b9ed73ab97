"""Statistics, crops and flips of batches of images, on any device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Normalize = Literal["mean_image", "mean_std"]


def statistics(images: Tensor, indices: Tensor, normalize: Normalize) -> tuple[Tensor, Tensor]:
    """Compute the shift and scale that normalise images.

    Args:
        images: Pixels, uint8 ``(n, c, h, w)``, in 0 … 255.
        indices: The images to use, int64 ``(m,)``.
        normalize: ``"mean_image"``: the mean of every pixel, and scale 1.
            ``"mean_std"``: mean and standard deviation of every channel.

    Returns:
        Shift and scale in pixel units, float32: ``(c, h, w)`` and ``(1, 1, 1)`` for
        ``"mean_image"``, both ``(c, 1, 1)`` for ``"mean_std"``. A constant channel gets scale 1.

    >>> images = torch.tensor([0, 200], dtype=torch.uint8).reshape(2, 1, 1, 1)
    >>> shift, scale = statistics(images, torch.arange(2), "mean_std")
    >>> shift.item(), scale.item()
    (100.0, 100.0)
    """
    total = torch.zeros(images.shape[1:], dtype=torch.float64)
    squares = torch.zeros_like(total)
    # In parts: float64 takes 8 times the memory of uint8. Sums of integers are exact.
    for part in torch.split(indices, 1000):
        pixels = images[part].double()
        total += pixels.sum(0)
        if normalize == "mean_std":
            squares += pixels.square().sum(0)
    mean_image, mean_square = total / len(indices), squares / len(indices)
    if normalize == "mean_image":
        return mean_image.float(), torch.ones(1, 1, 1)
    mean = mean_image.mean((1, 2), keepdim=True)
    variance = mean_square.mean((1, 2), keepdim=True) - mean.square()
    # A smaller variance is rounding: one changed pixel causes more.
    constant = variance < 1e-9
    return mean.float(), torch.where(constant, 1.0, variance.sqrt()).float()


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Crop each image from its zero-padded version, then flip the marked images.

    Args:
        images: Images ``(b, c, h, w)``.
        top: First row to keep of each padded image, int64 ``(b,)``, in [0, 2 · padding].
        left: First column to keep, likewise.
        flip: The images to flip left to right, bool ``(b,)``.
        padding: Zero padding on every side, in pixels.

    Returns:
        Images of the shape and type of ``images``.

    >>> row = torch.tensor([[[[1, 2, 3]]]])
    >>> one, two = torch.tensor([1]), torch.tensor([2])
    >>> crop_and_flip(row, top=one, left=two, flip=torch.tensor([True]), padding=1)
    tensor([[[[0, 3, 2]]]])
    """
    b, c, h, w = images.shape
    device = images.device
    rows = top[:, None] + torch.arange(h, device=device)
    columns = left[:, None] + torch.arange(w, device=device)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    image = torch.arange(b, device=device)[:, None, None, None]
    channel = torch.arange(c, device=device)[:, None, None]
    padded = pad(images, (padding, padding, padding, padding))
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def augment(images: Tensor, flip: bool, padding: int, generator: torch.Generator) -> Tensor:
    """Crop zero-padded images at random and flip each with probability 0.5.

    Args:
        images: Images ``(b, c, h, w)``.
        flip: Whether to flip images left to right.
        padding: Zero padding on every side before the crop, in pixels; 0 for no crops.
        generator: Random generator on the device of ``images``.

    Returns:
        Images of the shape and type of ``images``.
    """
    b, device = len(images), images.device
    top, left = torch.randint(2 * padding + 1, (2, b), generator=generator, device=device)
    flips = torch.rand(b, generator=generator, device=device) < 0.5 * flip
    return crop_and_flip(images, top, left, flips, padding)
