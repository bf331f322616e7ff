"""Makes Markdown of docstrings: their references, such as ``:class:`~prunekit.registry.Site` ``, become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

REFERENCE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`(~?)\.?([\w.]+)`")


def markdown(text: str) -> str:
    """A docstring as Markdown; a reference to what has no place on the site stays a name."""

    def link(found: re.Match[str]) -> str:
        name = found[2].rpartition(".")[2] if found[1] else found[2]
        return f'<autoref identifier="{found[2]}" optional><code>{name}</code></autoref>'

    return REFERENCE.sub(link, re.sub(r"::\n", ":\n", text))


class Docstrings(griffe.Extension):
    """Rewrites every docstring while the package is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
