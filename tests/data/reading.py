"""How the tests read a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_megacpp.data.corpus import (
    Document,
    Reading,
    Tally,
    find_files,
)
from nemo_megacpp.data.documents import iter_documents


def read(*paths: Path, **reading: Any) -> tuple[list[Document], Tally]:
    """Read all documents, and what was left out."""
    tally = Tally()
    files = find_files(paths, tally)
    return list(iter_documents(files, Reading(**reading), tally)), tally
