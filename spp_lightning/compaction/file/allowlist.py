"""What a file may name: the functions, methods, attributes and layers that a network may use.

Nothing that a file names is looked up in Python. It is found in these tables, or refused. The
tables hold what computes new tensors from tensors and numbers. They hold nothing that

* reads or writes files, loads code, calls back, or returns a Python object of another kind;
* writes to an argument: no function of the kind ``relu_``, no ``out``, no ``inplace=True``;
* changes what a tensor is (``set_``, ``resize_``, ``requires_grad_``) or watches it (hooks);
* returns memory that nobody wrote (``empty_like``, ``new_empty``), or reads memory by an address
  or by strides (``as_strided``, ``data_ptr``).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning.compaction.epilogue import local_response_norm
from spp_lightning.compaction.graph.inputs import items_of
from spp_lightning.compaction.graph.steps import Value
from spp_lightning.compaction.layers.int8_pool import max_pool_uint8

__all__ = ["LAYERS", "METHODS", "check_call", "check_layer", "function_name", "functions"]

GETATTR = "builtins.getattr"  # how torch.fx records `x.shape`
ATTRIBUTES = frozenset({"H", "T", "device", "dtype", "imag", "mH", "mT", "ndim", "real", "shape"})

_OPERATORS = """
abs add and_ eq floordiv ge getitem gt invert le lshift lt matmul mod mul ne neg not_ or_ pos
pow rshift sub truediv xor
""".split()

_POINTWISE = """
abs absolute acos acosh add addcdiv addcmul arccos arcsin arctan arctan2 asin asinh atan atan2
atanh bitwise_and bitwise_not bitwise_or bitwise_xor ceil clamp clamp_max clamp_min clip
copysign cos cosh deg2rad div divide eq erf erfc exp exp2 expm1 fix floor floor_divide fmax fmin
fmod frac ge greater greater_equal gt heaviside hypot isfinite isinf isnan le lerp less
less_equal log log10 log1p log2 logaddexp logical_and logical_not logical_or logical_xor logit
lt masked_fill maximum minimum mul multiply nan_to_num ne neg negative not_equal positive pow
prelu rad2deg reciprocal relu remainder round rsqrt sgn sigmoid sign sin sinc sinh sqrt square
sub subtract tan tanh true_divide trunc where xlogy
""".split()

_REDUCTIONS = """
all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum diff
dist log_softmax logcumsumexp logsumexp max mean median min nanmean nansum norm prod quantile
softmax sort std sum topk var
""".split()

_SHAPES = """
broadcast_to chunk clone detach diag_embed diagonal dsplit flatten flip fliplr flipud gather
hsplit index_add index_select moveaxis movedim narrow permute ravel repeat_interleave reshape
roll rot90 scatter scatter_add select split split_with_sizes squeeze swapaxes swapdims t
take_along_dim tensor_split tile transpose tril triu unbind unflatten unsqueeze vsplit
""".split()

_PRODUCTS = "addbmm addmm addmv addr baddbmm bmm dot inner kron matmul mm mv outer".split()

_TORCH_ONLY = """
adaptive_avg_pool1d adaptive_max_pool1d alpha_dropout arange avg_pool1d bilinear broadcast_tensors
cat cdist celu channel_shuffle column_stack concat concatenate conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d cosine_similarity dropout dstack einsum feature_dropout
full full_like group_norm hardshrink hstack layer_norm max_pool1d max_pool2d max_pool3d meshgrid
ones ones_like pairwise_distance pixel_shuffle pixel_unshuffle rms_norm rsub selu stack std_mean
tensordot threshold var_mean vstack zeros zeros_like
""".split()

_FUNCTIONAL = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d affine_grid alpha_dropout avg_pool1d avg_pool2d
avg_pool3d batch_norm bilinear celu conv1d conv2d conv3d conv_transpose1d conv_transpose2d
conv_transpose3d cosine_similarity dropout dropout1d dropout2d dropout3d elu embedding
feature_alpha_dropout fold gelu glu grid_sample group_norm gumbel_softmax hardshrink hardsigmoid
hardswish hardtanh instance_norm interpolate layer_norm leaky_relu linear local_response_norm
log_softmax logsigmoid lp_pool1d lp_pool2d lp_pool3d max_pool1d max_pool2d max_pool3d mish
normalize pad pairwise_distance pixel_shuffle pixel_unshuffle prelu relu relu6 rms_norm rrelu
scaled_dot_product_attention selu sigmoid silu softmax softmin softplus softshrink softsign tanh
tanhshrink threshold unfold upsample
""".split()

_METHODS_ONLY = """
bfloat16 bool contiguous cpu cuda dim double expand expand_as float half int is_floating_point
item long ndimension nelement new_full new_ones new_zeros numel repeat reshape_as size
sum_to_size to type_as unfold view view_as
""".split()

METHODS = frozenset(
    name
    for name in (*_POINTWISE, *_REDUCTIONS, *_SHAPES, *_PRODUCTS, *_METHODS_ONLY)
    if hasattr(Tensor, name)
)

LAYERS: Mapping[str, type[nn.Module]] = {
    name: vars(nn)[name]
    for name in """
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
    AdaptiveMaxPool3d AlphaDropout AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d
    Bilinear CELU ChannelShuffle CircularPad1d CircularPad2d CircularPad3d ConstantPad1d
    ConstantPad2d ConstantPad3d Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    CosineSimilarity Dropout Dropout1d Dropout2d Dropout3d ELU Embedding FeatureAlphaDropout Flatten
    Fold GELU GLU GroupNorm Hardshrink Hardsigmoid Hardswish Hardtanh Identity InstanceNorm1d
    InstanceNorm2d InstanceNorm3d LPPool1d LPPool2d LPPool3d LayerNorm LeakyReLU Linear
    LocalResponseNorm LogSigmoid LogSoftmax MaxPool1d MaxPool2d MaxPool3d Mish PReLU
    PairwiseDistance PixelShuffle PixelUnshuffle RMSNorm RReLU ReLU ReLU6 ReflectionPad1d
    ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d SELU SiLU
    Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold
    Unflatten Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d
    """.split()
}

# What a call may not be given: with these it would write to an argument, or make what isn't dense.
_REFUSED_ARGUMENTS = ("inplace", "out", "layout", "max_norm", "generator")
# Functions that write to running statistics unless this argument is False.
_TRAINING = {"batch_norm": "training", "instance_norm": "use_input_stats"}


@cache
def functions() -> dict[str, Callable[..., Any]]:
    """The functions that a network may call, by name with namespace.

    >>> functions()["torch.flatten"] is torch.flatten
    True
    >>> [name in functions() for name in ("torch.load", "operator.methodcaller", "torch.relu_")]
    [False, False, False]
    """
    names = (*_POINTWISE, *_REDUCTIONS, *_SHAPES, *_PRODUCTS, *_TORCH_ONLY)
    found: dict[str, Callable[..., Any]] = {
        f"torch.{name}": getattr(torch, name) for name in names if hasattr(torch, name)
    }
    found |= {f"torch.nn.functional.{name}": getattr(F, name) for name in _FUNCTIONAL}
    found |= {f"operator.{name}": getattr(operator, name) for name in _OPERATORS}
    found["spp_lightning.local_response_norm"] = local_response_norm
    found["spp_lightning.items_of"] = items_of
    found["spp_lightning.max_pool_uint8"] = max_pool_uint8
    found[GETATTR] = getattr
    return found


@cache
def _names() -> dict[int, str]:
    # Of a function with several names, the first one counts.
    return {id(function): name for name, function in reversed(functions().items())}


def function_name(function: Callable[..., Any]) -> str | None:
    """The name of a function in :func:`functions`, or None if it isn't there."""
    return _names().get(id(function))


def check_call(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that the call of a function or method writes to nothing and computes with tensors.

    Args:
        name: The name in :func:`functions` or :data:`METHODS`.
        args: Positional arguments, with :class:`Value` for results of earlier steps.
        kwargs: Keyword arguments.

    Raises:
        ValueError: If it is given what no file may give it.
    """
    if name == GETATTR:
        if (
            len(args) != 2
            or kwargs
            or not isinstance(args[0], Value)
            or str(args[1]) not in ATTRIBUTES
        ):
            raise ValueError(f"no file may ask for the attribute {list(args[1:])!r}")
        return
    if name in METHODS and (not args or not isinstance(args[0], Value)):
        raise ValueError(f"the method {name!r} must be one of an earlier step's result")
    if name.startswith("operator.") and any(isinstance(x, str) for x in args):
        raise ValueError(f"{name} must be given tensors and numbers, got text")
    given = {**_by_name(name, args), **kwargs}
    for argument in _REFUSED_ARGUMENTS:
        if given.get(argument) not in (None, False) or isinstance(given.get(argument), Value):
            raise ValueError(f"{name} must not be given `{argument}`")
    training = _TRAINING.get(name.rpartition(".")[2])
    if training is not None and "torch.nn.functional" in name:
        has_statistics = (
            given.get("running_mean") is not None or given.get("running_var") is not None
        )
        if has_statistics and given.get(training, training == "use_input_stats") is not False:
            raise ValueError(
                f"{name} must be given `{training}`=False: it writes to its statistics"
            )


def check_layer(name: str, arguments: Mapping[str, Any]) -> None:
    """Check that a layer writes to nothing but its own statistics, and is made on no device.

    Args:
        name: The name in :data:`LAYERS`.
        arguments: What the layer is made with.

    Raises:
        ValueError: If it is given what no file may give it.
    """
    for argument in (*_REFUSED_ARGUMENTS, "device", "dtype"):
        if arguments.get(argument) not in (None, False):
            raise ValueError(f"a layer {name} must not be given `{argument}`")


def _by_name(name: str, args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments by name, of functions that are written in Python."""
    function = functions().get(name) or getattr(Tensor, name, None)
    try:
        parameters = list(inspect.signature(function).parameters.values())  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return {}  # written in C++: takes what is refused by name only
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return {}
    return dict(zip((parameter.name for parameter in parameters), args, strict=False))
