"""What the pages get when the site is built.

Docstrings on the reference pages: Sphinx's roles become links, and ``::`` a colon. The page on
settings: the tables of their verdicts.
"""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>~?([^<]+)</code>")
_SETTINGS = "<!-- the verdicts on all settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables of settings into the page that asks for them."""
    if _SETTINGS not in markdown:
        return markdown
    from nemo_megacpp.settings.verdict_document import markdown as tables

    return markdown.replace(_SETTINGS, tables())


def on_page_content(html: str, **_: Any) -> str:
    """Rewrite a page after Markdown; names without a page of theirs stay plain."""
    linked = _ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', html)
    return linked.replace("::</p>", ":</p>")
