"""Tables and pages: the only place that prints them. It knows nothing of what they mean.

A :class:`Table` is plain data. :func:`print_table` shows it in a terminal, :func:`html_table` on a
page of :func:`html_page`, which needs no script, no font and no file beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal, NamedTuple

from rich import table as rich_table
from rich.console import Console
from rich.text import Text

from nemo_megacpp.printable import cut, printable

Tone = Literal["good", "warning", "bad"]
_CELL = 2000
"""Most characters of a cell in a terminal."""
_COLOURS: dict[Tone, str] = {"good": "green", "warning": "yellow", "bad": "red"}

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em; overflow-wrap: anywhere; }
h2 { font-size: 1.15em; margin: 1.8em 0 .5em; } h3 { font-size: 1em; margin: 1.2em 0 .4em; }
svg { max-width: 100%; height: auto; } svg .t { font: 13px system-ui, sans-serif;
fill: currentColor; } svg .b { font-weight: 600; } svg .s { font-size: 11px; }
svg .on { fill: #fff; } table { border-collapse: collapse; font-size: 13px; }
th { text-align: left; border-bottom: 2px solid var(--line); padding: 3px 14px 3px 0; }
td { border-bottom: 1px solid var(--line); padding: 3px 14px 3px 0; vertical-align: top; }
td:last-child { overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.total td { font-weight: 600; }
.legend .key { margin-right: 1.4em; white-space: nowrap; } .legend i { display: inline-block;
width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.good { color: #2e8540; } .warning { color: #b07a00; } .bad { color: #c22; }
.scroll { overflow-x: auto; } details { margin: .4em 0; }
summary { cursor: pointer; font-weight: 600; } .note { color: #777; font-size: 13px; }
.mono { font: 14px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: 13px; }
.pill { display: inline-block; padding: 0 .6em; border-radius: 1em; background: var(--soft); }
"""


class Toned(NamedTuple):
    """A cell that stands out."""

    text: str
    tone: Tone


Cell = str | Toned


@dataclass
class Table:
    """Columns and rows.

    Attributes:
        columns: headings; ``<`` before one sets its column to the left, others stand to the right.
        title: above the table; none if empty.
        rows: as many cells each as there are columns.
        total: a last row, in bold.
    """

    columns: Sequence[str]
    title: str = ""
    rows: list[Sequence[Cell]] = field(default_factory=list)
    total: Sequence[Cell] | None = None

    def add(self, *cells: Cell) -> None:
        """Append a row."""
        assert len(cells) == len(self.columns), (cells, self.columns)
        self.rows.append(cells)


class _Console(Console):
    """Writes control characters of the strings that it prints as escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def make_console(width: int, *, stderr: bool = False) -> Console:
    """Return a console of at least ``width`` columns.

    A narrower terminal wraps the lines of wide tables rather than lose numbers.
    """
    console = _Console(stderr=stderr)
    return console if console.width >= width else _Console(width=width, stderr=stderr)


def print_table(console: Console, table: Table) -> None:
    """Print a table in a terminal."""
    if table.title:  # a line of its own: the title of a narrow table would be wrapped to its width
        console.print(Text(printable(table.title), style="italic"))
    shown = rich_table.Table(box=None, header_style="bold", padding=(0, 1))
    for column in table.columns:
        justify: Literal["left", "right"] = "left" if column.startswith("<") else "right"
        shown.add_column(_text(column.lstrip("<")), justify=justify, overflow="fold")
    for row in table.rows:
        shown.add_row(*map(_text, row))
    if table.total is not None:
        shown.add_row(*map(_text, table.total), style="bold")
    console.print(shown)


def _text(cell: Cell) -> Text:
    text, style = (cell, "") if isinstance(cell, str) else (cell.text, _COLOURS[cell.tone])
    return Text(printable(cut(text, _CELL)), style=style)


def html_text(text: str) -> str:
    """Return a text as HTML, without control characters."""
    return escape(printable(text))


def html_table(table: Table) -> str:
    """Return a table, without its title, as HTML."""
    right = ["" if column.startswith("<") else ' class="n"' for column in table.columns]

    def line(tag: str, cells: Iterable[str], name: str = "") -> str:
        row = "".join(f"<{tag}{r}>{cell}</{tag}>" for r, cell in zip(right, cells, strict=True))
        return f"<tr{name}>{row}</tr>"

    lines = [line("th", (html_text(column.lstrip("<")) for column in table.columns))]
    lines += [line("td", map(_html, row)) for row in table.rows]
    if table.total is not None:
        lines.append(line("td", map(_html, table.total), ' class="total"'))
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _html(cell: Cell) -> str:
    if isinstance(cell, str):
        return html_text(cell)
    return f'<span class="{cell.tone}">{html_text(cell.text)}</span>'


def html_pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Return names and values as a table without a heading."""
    lines = (
        f"<tr><th>{html_text(name)}</th><td>{html_text(value)}</td></tr>" for name, value in rows
    )
    return f"<table>{''.join(lines)}</table>"


def html_list(items: Iterable[str]) -> str:
    """Return a list; the items are HTML."""
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def html_details(summary: str, content: str, is_open: bool = False) -> str:
    """Return a part that folds; ``content`` is HTML."""
    start = "<details open>" if is_open else "<details>"
    return f"{start}<summary>{html_text(summary)}</summary>{content}</details>"


def html_page(title: str, parts: Iterable[str]) -> str:
    """Return a page; ``parts`` are HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html_text(title)}'
        f'</title><meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"\n<body>{''.join(parts)}</body></html>\n"
    )


def show_bytes(size: float) -> str:
    """Return ``1.23 GB`` (powers of 1000), with three digits."""
    for unit in ("B", "KB", "MB", "GB", "TB", "PB"):
        if abs(size) < 999.5 or unit == "PB":
            break
        size /= 1000
    digits = 0 if unit == "B" or abs(size) >= 99.95 else (1 if abs(size) >= 9.995 else 2)
    return f"{size:.{digits}f} {unit}"


def show_memory(size: float) -> str:
    """Return the memory of a process as GiB."""
    return f"{size / 2**30:.2f} GiB"


def show_seconds(seconds: float) -> str:
    """Return a duration in hours, minutes and seconds, without leading zero units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
