"""Decorators that let an ``__init__`` take :class:`SPPSettings` as plain arguments.

Names, types, defaults and documentation of the settings are written in :class:`SPPSettings` alone.
``help``, editors, type checkers and jsonargparse see them as the arguments of the decorated class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, get_type_hints

from torch import nn

from spp_lightning.method.settings import SPPSettings

__all__ = ["takes_model_and_settings", "takes_settings"]

_ARGS, _RAISES = "Args:\n", "\nRaises:\n"  # headings of a docstring

Owner = TypeVar("Owner")
Settings = TypeVar("Settings", bound=SPPSettings)
Arguments = ParamSpec("Arguments")


def takes_settings(
    settings: Callable[Arguments, Settings],
) -> Callable[[Callable[[Owner, Settings], None]], Callable[Concatenate[Owner, Arguments], None]]:
    """Decorate ``__init__(self, settings)``: callers give the settings as plain arguments.

    >>> class Run:
    ...     @takes_settings(SPPSettings)
    ...     def __init__(self, settings: SPPSettings) -> None:
    ...         self.settings = settings
    >>> Run(interval=90).settings.interval
    90
    """

    def decorate(
        init: Callable[[Owner, Settings], None],
    ) -> Callable[Concatenate[Owner, Arguments], None]:
        def wrapper(self: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
            init(self, settings(*args, **kwargs))

        return _described(wrapper, init, settings)

    return decorate


def takes_model_and_settings(
    settings: Callable[Arguments, SPPSettings],
) -> Callable[
    [Callable[[Owner, nn.Module, SPPSettings], None]],
    Callable[Concatenate[Owner, nn.Module, Arguments], None],
]:
    """Decorate ``__init__(self, model, settings)``, likewise."""

    def decorate(
        init: Callable[[Owner, nn.Module, SPPSettings], None],
    ) -> Callable[Concatenate[Owner, nn.Module, Arguments], None]:
        def wrapper(
            self: Owner, model: nn.Module, *args: Arguments.args, **kwargs: Arguments.kwargs
        ) -> None:
            init(self, model, settings(*args, **kwargs))

        return _described(wrapper, init, settings)

    return decorate


def _described(wrapper: Any, init: Any, settings: Any) -> Any:
    """Give a wrapper the signature and the documentation of what it stands for."""
    functools.update_wrapper(wrapper, init)
    own = list(inspect.signature(init, eval_str=True).parameters.values())[:-1]
    types = get_type_hints(settings)  # each evaluated in the module of the class that declares it
    fields = [
        field.replace(annotation=types[field.name])
        for field in inspect.signature(settings).parameters.values()
    ]
    wrapper.__signature__ = inspect.Signature([*own, *fields], return_annotation=None)
    wrapper.__doc__ = _documentation(settings)
    return wrapper


def _documentation(settings: Any) -> str:
    """The docstring of a class of settings, with the arguments of the classes that it extends."""
    parts = [inspect.getdoc(cls) or "" for cls in settings.__mro__ if issubclass(cls, SPPSettings)]
    own, *extended = (part.partition(_ARGS) for part in parts)
    before = "".join(
        after.partition(_RAISES)[0].rstrip() + "\n" for *_, after in reversed(extended)
    )
    return f"{own[0]}{own[1]}{before}{own[2]}"
