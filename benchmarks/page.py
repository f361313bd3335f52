"""Write the results of ``make bench`` into docs/benchmarks.md.

    python -m benchmarks.page build/bench-cpu.json

The page has a part per device, between ``<!-- results: cpu -->`` and ``<!-- end -->``; the rest of
the page is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks.harness import profile_table, rows_table
from nemo_megacpp.render import Table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"


def results(bench: dict) -> str:
    """Return the Markdown of one run: the machine, the table, what did not run."""
    machine = bench["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = [row for entry in bench["scripts"] for row in entry.get("rows", ())]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, {machine['date']}, commit "
        f"`{machine['commit']}`, load average {machine['load']:.1f} at the start; {versions}.",
        "",
        *markdown(rows_table(rows)),
    ]
    if missed := [row for row in rows if row.get("profile")]:
        lines += ["", "What one run of ours spends its time on, of what was missed:"]
    for row in missed:
        lines += ["", f"*{row['claim']}*", "", *markdown(profile_table(row))]
    notes = [
        f"- {entry['script']} failed: {entry['problem']}"
        for entry in bench["scripts"]
        if entry["problem"]
    ]
    notes += [f"- {what}: {why}" for what, why in bench["skipped"]]
    if notes:
        lines += ["", "Did not run:", "", *notes]
    return "\n".join(lines)


def markdown(table: Table) -> list[str]:
    """Return the lines of ``table``."""
    sides = ("---" if column.startswith("<") else "--:" for column in table.columns)
    lines = [
        "| " + " | ".join(column.lstrip("<") for column in table.columns) + " |",
        "|" + "|".join(sides) + "|",
    ]
    for cells in table.rows:
        texts = (cell if isinstance(cell, str) else f"**{cell.text}**" for cell in cells)
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    return lines


def write(bench: dict, page: Path) -> None:
    """Replace the part of the run's device in ``page``."""
    device = bench["machine"]["kind"]
    text = page.read_text()
    part = re.compile(rf"(<!-- results: {device} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    assert part.search(text), f"{page} has no part for {device}"
    page.write_text(part.sub(lambda found: found[1] + results(bench) + found[2], text))


def main() -> int:
    """Write the page."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    write(json.loads(Path(sys.argv[1]).read_text()), PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
