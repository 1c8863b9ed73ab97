"""Docstrings as the site needs them: Sphinx roles become links, examples become code blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data):`~?(?P<name>[\w.]+)`")
_EXAMPLE = re.compile(r"^>>> .*?(?=^\s*$|\Z)", re.DOTALL | re.MULTILINE)


class Roles(griffe.Extension):
    """Turns ``:class:`~spp_lightning.SPPPruner``` into a link, and ``>>>`` into a code block."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite every docstring of a package."""
        # What the package imports for type checkers are its public names.
        homes = {
            name: x.target_path for name, x in pkg.members.items() if isinstance(x, griffe.Alias)
        }
        self._rewrite(pkg, homes)

    def _rewrite(self, item: griffe.Object, homes: dict[str, str]) -> None:
        if item.docstring is not None:
            text = _ROLE.sub(lambda match: _link(match["name"], item, homes), item.docstring.value)
            item.docstring.value = _EXAMPLE.sub(
                lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text
            )
        if isinstance(item, griffe.Function) and any(
            re.match("takes_.*settings", str(decorator.value)) for decorator in item.decorators
        ):
            # Callers give the fields of the settings, each as an argument.
            item.parameters["settings"].kind = griffe.ParameterKind("variadic keyword")
        for member in item.members.values():
            if isinstance(member, griffe.Object):  # not what it imports
                self._rewrite(member, homes)


def _link(name: str, item: griffe.Object, homes: dict[str, str]) -> str:
    """A link to a public name, or to a method of the class that the docstring is in."""
    short = name.rpartition(".")[2]
    if short in homes:
        return f"[`{short}`][{homes[short]}]"
    for place in (item, item.parent):
        if place is not None and place.is_class and short in place.members:
            return f"[`{short}`][{place.path}.{short}]"
    return f"`{short}`"
