"""Docstrings on the reference pages: Sphinx's roles become links, and ``::`` a colon."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>~?([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Rewrite a page after Markdown; names without a page of theirs stay plain."""
    linked = _ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', html)
    return linked.replace("::</p>", ":</p>")
