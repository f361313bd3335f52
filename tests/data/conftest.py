from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.data.prepared import PreparedData

TEXTS = {
    "a.md": "# Title\n\nSome words, some more words.\r\n",
    "b.py": "def f(x):\n    return x  # <|endoftext|> is only text here\n",
    "sub/c.h": "#pragma once\nint f(int x);\n",
    "sub/é ü.txt": "Grüße, 世界 🙂\tand tabs  with  spaces .\n",
    "notes.txt.gz": "compressed words and more words\n",
    "lines.jsonl:1": "first line of words",
    "lines.jsonl:3": "third line\nwith a break and ünïcode",
    "more.jsonl.gz:1": "a line from a compressed file of words",
    "words.txt.bz2": "words that bzip2 has compressed\n",
    "words.jsonl.xz:1": "words of a line that xz has compressed",
    "words.txt.zst": "words that zstandard has compressed\n",
}
REPAIRED = "caf\ufffd au lait, and enough letters to be text\n"


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """Every document of `corpus`: its key, and its text as it must come back."""
    return TEXTS | {"latin.txt": REPAIRED}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder with everything that real folders hold."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "sub").mkdir()
    (root / ".hidden").mkdir()
    for key, text in TEXTS.items():
        if ".gz" not in key and ".jsonl" not in key:
            (root / key).write_bytes(text.encode())
    (root / "notes.txt.gz").write_bytes(gzip.compress(TEXTS["notes.txt.gz"].encode()))
    lines = [
        json.dumps({"text": TEXTS["lines.jsonl:1"]}),
        "",
        json.dumps({"id": 3, "text": TEXTS["lines.jsonl:3"]}),
        json.dumps({"text": " "}),
    ]
    (root / "lines.jsonl").write_text("\n".join(lines))
    line = json.dumps({"text": TEXTS["more.jsonl.gz:1"]})
    (root / "more.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (root / "words.txt.bz2").write_bytes(bz2.compress(TEXTS["words.txt.bz2"].encode()))
    line = json.dumps({"text": TEXTS["words.jsonl.xz:1"]})
    (root / "words.jsonl.xz").write_bytes(lzma.compress(line.encode()))
    pyarrow = pytest.importorskip("pyarrow")
    zstd = pyarrow.Codec("zstd")
    (root / "words.txt.zst").write_bytes(
        zstd.compress(TEXTS["words.txt.zst"].encode(), asbytes=True)
    )
    (root / "empty.txt").write_bytes(b"")
    (root / "picture.png").write_bytes(b"\x89PNG\0\0text")
    (root / "latin.txt").write_bytes(REPAIRED.replace("\ufffd", "\xe9").encode("latin-1"))
    (root / ".hidden" / "secret.txt").write_text("never read")
    (root / ".secret.txt").write_text("never read")
    return root


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """`corpus`, prepared once; tests that damage it copy it first."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    return prepare([corpus], out, vocab_size=300, held_out=0.3, progress=False)
