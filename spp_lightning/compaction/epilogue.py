"""The epilogue of a convolution: what a layer computes with it, while its output is in the cache.

To add an operation, follow the list in ``docs/kernels.md``, "Extend the kernels".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from spp_lightning.compaction.geometry import Pair

__all__ = [
    "ACTIVATIONS",
    "KINDS",
    "LRN_ALPHA",
    "LRN_SIZE",
    "RELU",
    "Activation",
    "Clamp",
    "Epilogue",
    "PlaneOp",
    "local_response_norm",
]


Kind = Literal["max_pool", "avg_pool", "local_response_norm"]

# A kind's place is its number in the C++ kernels and in the operators.
KINDS: tuple[Kind, ...] = get_args(Kind)

Activation = Literal["none", "sigmoid", "silu", "hardsigmoid", "hardswish", "gelu", "gelu_tanh"]

# Likewise. "gelu_tanh" is torch's GELU with approximate="tanh".
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class Clamp(NamedTuple):
    """Limits of the output. ReLU is (0, inf); (-inf, inf) is no clamp."""

    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def of(cls, limits: object) -> Clamp:
        """The limits of a pair of numbers, (low, high).

        Raises:
            ValueError: If ``limits`` isn't a tuple of two numbers.
        """
        if (
            not isinstance(limits, tuple)
            or len(limits) != 2
            or not all(type(x) is float or type(x) is int for x in limits)
        ):
            raise ValueError(f"`clamp` must be two numbers, such as (0, inf), got {limits!r}.")
        return cls(*limits)


class PlaneOp(NamedTuple):
    """A pool or a norm of each plane of a convolution's output.

    Attributes:
        kind: The operation. Its arguments are those of torch's pools.
        kernel_size: Rows and columns of the window. The norm's window is square and odd; of the
            other attributes the norm reads ``alpha`` only.
        alpha: Weight of the mean in the local response norm.
    """

    kind: Kind
    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    alpha: float = 0.0

    def check(self) -> None:
        """Check the attributes.

        Raises:
            ValueError: If the operation is a norm whose window isn't square and odd.
        """
        height, width = self.kernel_size
        if self.kind == "local_response_norm" and (height != width or height % 2 == 0):
            raise ValueError(
                f"`kernel_size` of a norm must be square and odd, got {self.kernel_size}."
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operation in torch: ``(B, N, H, W)`` to ``(B, N, H', W')``."""
        if self.kind == "max_pool":
            pooled: Tensor = F.max_pool2d(
                x, self.kernel_size, self.stride, self.padding, ceil_mode=self.ceil_mode
            )
            return pooled
        if self.kind == "avg_pool":
            return F.avg_pool2d(
                x,
                self.kernel_size,
                self.stride,
                self.padding,
                self.ceil_mode,
                self.count_include_pad,
            )
        return local_response_norm(x, self.kernel_size[0], self.alpha)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the input ``x``, given the gradient of the output."""
        aten = torch.ops.aten
        sizes = (self.kernel_size, self.stride, self.padding)
        if self.kind == "max_pool":
            rest = ((1, 1), self.ceil_mode)
            _, places = aten.max_pool2d_with_indices(x, *sizes, *rest)
            pooled: Tensor = aten.max_pool2d_with_indices_backward(grad, x, *sizes, *rest, places)
            return pooled
        if self.kind == "avg_pool":
            flags = (self.ceil_mode, self.count_include_pad, None)
            spread: Tensor = aten.avg_pool2d_backward(grad, x, *sizes, *flags)
            return spread
        # y = x · s^(-3/4), s = 1 + α · mean(x²); the mean is its own transpose.
        window = (self.kernel_size[0], 1, self.kernel_size[0] // 2)
        scale = 1 + self.alpha * F.avg_pool2d(x * x, *window)
        power = torch.rsqrt(scale * scale.sqrt())
        inner = F.avg_pool2d(grad * x * power / scale, *window)
        return grad * power - 1.5 * self.alpha * x * inner

    def out_size(self, height: int, width: int) -> Pair:
        """Height and width of the output planes.

        Raises:
            ValueError: If the input planes are smaller than the window.
        """
        if self.kind == "local_response_norm":
            return height, width
        sizes = []
        for axis, size in enumerate((height, width)):
            kernel, stride, pad = self.kernel_size[axis], self.stride[axis], self.padding[axis]
            room = size + 2 * pad - kernel
            out = (-(-room // stride) if self.ceil_mode else room // stride) + 1
            if self.ceil_mode and (out - 1) * stride >= size + pad:
                out -= 1  # the last window would start beyond the image
            if out < 1:
                raise ValueError(
                    f"`x` is too small: planes of {height} × {width} are left for a"
                    f" {self.kind} of {self.kernel_size}, stride {self.stride}."
                )
            sizes.append(out)
        return sizes[0], sizes[1]


class Epilogue(NamedTuple):
    """What a layer computes after its convolution: ``post(activation(clamp(y + residual)))``.

    The residual is an input of the layer, not a property of it, so it has no field here.

    Attributes:
        clamp: Limits of the output.
        post: Operations on the planes of what comes out of the activation, in order.
        activation: A function of each number. A layer has a clamp or an activation, not both.

    >>> relu_and_pool = Epilogue(Clamp(0.0), (PlaneOp("max_pool", (2, 2), (2, 2)),))
    >>> relu_and_pool(torch.tensor([[[[1.0, -2.0], [3.0, -4.0]]]]))
    tensor([[[[3.]]]])
    >>> Epilogue.of(*relu_and_pool.numbers()) == relu_and_pool
    True
    """

    clamp: Clamp = Clamp()
    post: tuple[PlaneOp, ...] = ()
    activation: Activation = "none"

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing."""
        return self == Epilogue()

    def check(self) -> None:
        """Check the types and the attributes of the operations.

        Raises:
            ValueError: If ``clamp`` isn't a pair of numbers, ``post`` isn't a tuple of
                :class:`PlaneOp` that the kernels compute, ``activation`` isn't a name of one, or
                there are a clamp and an activation.
        """
        clamp = Clamp.of(self.clamp)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}."
            )
        if self.activation != "none" and clamp != Clamp():
            raise ValueError(
                f"`activation` (={self.activation!r}) must be 'none' where there is a `clamp`"
                f" (={tuple(clamp)})."
            )
        if not isinstance(self.post, tuple) or not all(isinstance(x, PlaneOp) for x in self.post):
            raise ValueError(f"`post` must be a tuple of PlaneOps, got {self.post!r}.")
        for op in self.post:
            op.check()

    def numbers(self) -> tuple[list[int], list[float]]:
        """All of it as two flat lists, as operators of torch take it; :meth:`of` reads them."""
        sizes = [
            number
            for op in self.post
            for number in (
                KINDS.index(op.kind),
                *(*op.kernel_size, *op.stride, *op.padding),
                *(int(op.ceil_mode), int(op.count_include_pad)),
            )
        ]
        function = ACTIVATIONS.index(self.activation)
        return [function, *sizes], [*self.clamp, *(op.alpha for op in self.post)]

    @classmethod
    def of(cls, sizes: Sequence[int], scalars: Sequence[float]) -> Epilogue:
        """The epilogue of which :meth:`numbers` made two lists."""
        (function, *sizes), (low, high, *alphas) = sizes, scalars
        ops = []
        for i, alpha in enumerate(alphas):
            kind, kh, kw, sh, sw, ph, pw, ceil_mode, include = sizes[9 * i : 9 * i + 9]
            flags = (bool(ceil_mode), bool(include))
            ops.append(PlaneOp(KINDS[kind], (kh, kw), (sh, sw), (ph, pw), *flags, alpha))
        return cls(Clamp(low, high), tuple(ops), ACTIVATIONS[function])

    def __call__(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply it in torch to the convolution's output: ``(B, N, H, W)`` to ``(B, N, H', W')``."""
        if residual is not None:
            y = y + residual
        if self.clamp == (0, math.inf):
            y = F.relu(y)
        elif self.clamp != Clamp():
            y = y.clamp(*self.clamp)
        y = _FUNCTIONS[self.activation](y)
        for op in self.post:
            y = op(y)
        return y

    def gradient(self, y: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the convolution's output ``y`` (residual added).

        Written as formulas, since torch doesn't differentiate the inside of an operator.

        Args:
            y: Input of the epilogue, ``(B, N, H, W)``.
            grad: Gradient of the epilogue's output.
        """
        inputs = [_FUNCTIONS[self.activation](y.clamp(*self.clamp))]
        for op in self.post[:-1]:
            inputs.append(op(inputs[-1]))
        for op, planes in zip(reversed(self.post), reversed(inputs), strict=False):
            grad = op.gradient(planes, grad)
        if self.activation != "none":
            return _activation_gradient(self.activation, y, grad)
        inside = (y > self.clamp.low) & (y < self.clamp.high)
        return torch.where(inside, grad, 0).contiguous()

    def out_size(self, height: int, width: int) -> Pair:
        """Height and width of the output for a convolution's output of ``height`` by ``width``.

        Raises:
            ValueError: If the planes are smaller than a window.

        >>> pool, norm = PlaneOp("max_pool", (2, 2), (2, 2)), PlaneOp("local_response_norm")
        >>> Epilogue(post=(pool, norm)).out_size(8, 6)
        (4, 3)
        """
        for op in self.post:
            height, width = op.out_size(height, width)
        return height, width


def _activation_gradient(activation: Activation, y: Tensor, grad: Tensor) -> Tensor:
    aten = torch.ops.aten
    if activation == "sigmoid":
        found: Tensor = aten.sigmoid_backward(grad, torch.sigmoid(y))
    elif activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        found = aten.gelu_backward(grad, y, approximate=approximate)
    else:
        backward = {
            "silu": aten.silu_backward,
            "hardsigmoid": aten.hardsigmoid_backward,
            "hardswish": aten.hardswish_backward,
        }
        found = backward[activation](grad, y)
    return found.contiguous()


RELU = Epilogue(Clamp(0.0))

LRN_SIZE, LRN_ALPHA = 3, 5e-5


def local_response_norm(x: Tensor, size: int = LRN_SIZE, alpha: float = LRN_ALPHA) -> Tensor:
    """Normalise ``x`` within each channel: ``x · (1 + α·mean(x²))^(−0.75)``.

    Args:
        x: Feature maps, ``(B, C, H, W)``. Pixels outside the image count as 0.
        size: Rows and columns of the window of the mean, odd.
        alpha: α, the weight of the mean.

    Returns:
        The normalised maps, of the shape of ``x``.

    Source: Caffe's LRN layer with ``norm_region: WITHIN_CHANNEL``.
    """
    if torch.is_autocast_enabled(x.device.type):
        # 1 + α·mean needs more digits than 16 bits have, and products of mixed types are slow.
        with torch.autocast(x.device.type, enabled=False):
            return local_response_norm(x.float(), size, alpha).to(x.dtype)
    mean = F.avg_pool2d(x * x, size, stride=1, padding=size // 2)
    scale = 1 + alpha * mean
    # scale^(-3/4) through two square roots: several times faster than pow, forward and backward.
    return x * torch.rsqrt(scale * scale.sqrt())
