"""The verdicts as plain data, as a table for a terminal and as Markdown.

The document, version 1; keys are only ever added within a version::

    schema: 1
    megatron_core: version of the installed package
    settings: [{configuration, field, default, verdict, legal, reason, otherwise, proofs}]

``legal`` lists the accepted values as text; it is null where all are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.console import Console

from nemo_megacpp.core.releases import imported
from nemo_megacpp.errors import UserError, nearest
from nemo_megacpp.render import Table, Tone, Toned, print_table
from nemo_megacpp.settings.validate import TABLES, default_of, legal_values
from nemo_megacpp.settings.verdict import Verdict

SCHEMA = 1
_VERDICTS: tuple[Verdict, ...] = ("proved", "neutral", "refused")
_TONES: dict[str, Tone] = {"proved": "good", "refused": "bad"}


def settings_document(name: str | None = None) -> dict[str, Any]:
    """Return the verdicts as plain data.

    Args:
        name: of one field, with its configuration (``OptimizerConfig.bf16``) or without.

    Raises:
        UserError: there is no such field.
    """
    rows: list[dict[str, Any]] = [
        {
            "configuration": kind.__name__,
            "field": field.name,
            "default": shown(default_of(field)),
            "verdict": (setting := table[field.name]).verdict,
            "legal": (
                None
                if setting.legal is None and setting.verdict != "refused"
                else [shown(value) for value in legal_values(setting, default_of(field))]
            ),
            "reason": setting.reason,
            "otherwise": setting.otherwise,
            "proofs": list(setting.proofs),
        }
        for kind, table in TABLES.items()
        for field in dataclasses.fields(kind)
        if field.name in table
    ]
    if name is not None:
        found = [
            row for row in rows if name in (row["field"], f"{row['configuration']}.{row['field']}")
        ]
        if not found:
            raise UserError(
                f"Megatron has no setting {name!r}.{nearest(name, [row['field'] for row in rows])}"
            )
        rows = found
    return {"schema": SCHEMA, "megatron_core": imported(), "settings": rows}


def shown(value: Any) -> str:
    """Return a value as text: a function or a member of an enumeration by its name."""
    if isinstance(value, Enum):
        return value.name
    return value.__name__ if callable(value) else repr(value)


def why(row: dict[str, Any]) -> str:
    """Return the reason of a row, with its proofs and the values that are accepted."""
    text = f"{row['reason']}."
    if row["otherwise"]:
        text += f" Legal: {', '.join(row['legal'])}. {row['otherwise']}."
    if row["proofs"]:
        text += f" ({'; '.join(row['proofs'])})"
    return text


def print_settings(console: Console, document: dict[str, Any]) -> None:
    """Print a table for each configuration."""
    for kind, counts, rows in _by_configuration(document):
        table = Table(("<field", "<default", "<verdict", "<why"), f"{kind} ({counts})")
        for row in rows:
            tone = _TONES.get(row["verdict"])
            verdict = Toned(row["verdict"], tone) if tone else row["verdict"]
            table.add(row["field"], row["default"], verdict, why(row))
        print_table(console, table)


def markdown() -> str:
    """Return the tables of the documentation's page."""
    lines: list[str] = []
    for kind, counts, rows in _by_configuration(settings_document()):
        lines += ["", f"## {kind}", "", f"{counts}.", ""]
        lines += ["| field | default | verdict | why |", "|---|---|---|---|"]
        for row in rows:
            cells = (f"`{row['field']}`", f"`{row['default']}`", row["verdict"], why(row))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _by_configuration(document: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield each configuration's name, how many settings have each verdict, and their rows."""
    for kind, group in groupby(document["settings"], key=itemgetter("configuration")):
        rows = list(group)
        counts = Counter(row["verdict"] for row in rows)
        yield kind, ", ".join(f"{counts[verdict]} {verdict}" for verdict in _VERDICTS), rows
