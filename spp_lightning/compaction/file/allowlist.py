"""What a file may name: the functions, methods and attributes that a network's graph may use.

A file comes from anywhere, so nothing that it names is looked up; it is found in these tables, or
refused. They hold functions that compute tensors from tensors, and none that reads files, loads
code or calls back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import get_overridable_functions

from spp_lightning.compaction.epilogue import local_response_norm

__all__ = ["ATTRIBUTES", "GETATTR", "function_name", "functions", "methods"]

GETATTR = "builtins.getattr"  # how torch.fx records `x.shape`
ATTRIBUTES = frozenset({"H", "T", "device", "dtype", "imag", "mH", "mT", "ndim", "real", "shape"})

_OPERATORS = """
abs add and_ eq floordiv ge getitem gt invert le lshift lt matmul mod mul ne neg not_ or_ pos pow
rshift sub truediv xor iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv
ixor
""".split()

# They call back, hand out memory or what isn't a tensor, or change what a tensor is.
_REFUSED_METHODS = """
apply_ as_subclass backward const_data_ptr data_ptr map2_ map_ module_load new numpy pin_memory
record_stream register_hook register_post_accumulate_grad_hook reinforce resize resize_ resize_as
resize_as_ resize_as_sparse_ retain_grad set_ share_memory_ sparse_resize_
sparse_resize_and_clear_ storage storage_type untyped_storage
""".split()


@cache
def functions() -> dict[str, Callable[..., Any]]:
    """The functions that a graph may call, by name with namespace.

    >>> functions()["torch.flatten"] is torch.flatten
    True
    >>> [name in functions() for name in ("torch.load", "operator.methodcaller", "os.system")]
    [False, False, False]
    """
    overridable = get_overridable_functions()
    found: dict[str, Callable[..., Any]] = {}
    for namespace, module in (("torch", torch), ("torch.nn.functional", F)):
        # Functions whose tensors torch.fx can follow: they take tensors and compute.
        known = {id(function) for function in overridable[module]}
        for name, function in vars(module).items():
            in_place = getattr(module, name.removesuffix("_"), None) if name[-1] == "_" else None
            # Some of torch.nn.functional's own functions only call others that are overridable.
            own = module is F and getattr(function, "__module__", None) == F.__name__
            if (
                not name.startswith("_")
                and callable(function)
                and not isinstance(function, type)
                and (id(function) in known or id(in_place) in known or own)
            ):
                found[f"{namespace}.{name}"] = function
    found |= {f"operator.{name}": getattr(operator, name) for name in _OPERATORS}
    found["spp_lightning.local_response_norm"] = local_response_norm
    found[GETATTR] = getattr
    return found


@cache
def _names() -> dict[int, str]:
    # Of a function with several names, the first one counts.
    return {id(function): name for name, function in reversed(functions().items())}


def function_name(function: Callable[..., Any]) -> str | None:
    """The name of a function in :func:`functions`, or None if it isn't there."""
    return _names().get(id(function))


@cache
def methods() -> frozenset[str]:
    """The methods of tensors that a graph may call.

    >>> [name in methods() for name in ("view", "mean", "numpy", "__reduce_ex__")]
    [True, True, False, False]
    """
    names = {getattr(x, "__name__", "_") for x in get_overridable_functions()[torch.Tensor]}
    return frozenset(x for x in names if not x.startswith("_")) - frozenset(_REFUSED_METHODS)
