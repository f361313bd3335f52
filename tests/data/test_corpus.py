from __future__ import annotations

import gzip
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nemo_megacpp.data import corpus as corpus_module
from nemo_megacpp.data.corpus import find_files, iter_documents, torch_headers
from nemo_megacpp.errors import UserError


def test_reads_every_document_once_and_counts_the_rest(corpus: Path, texts: dict[str, str]) -> None:
    counts: Counter[str] = Counter()
    found = list(iter_documents(find_files([corpus, corpus / "a.md"]), counts=counts))
    assert {d.key: d.text for d in found} == texts
    assert len(found) == len(texts)
    assert all(d.size == len(d.text.encode()) for d in found)
    assert counts == {"empty": 2, "binary": 1, "bad_utf8": 1}


def test_named_hidden_file_is_read_and_output_is_passed_over(corpus: Path) -> None:
    (named,) = find_files([corpus / ".secret.txt"])
    assert named.key == ".secret.txt"
    keys = {file.key for file in find_files([corpus], exclude=corpus / "sub")}
    assert "a.md" in keys
    assert not any(key.startswith(("sub/", ".")) for key in keys)


def test_mostly_undecodable_file_is_binary(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(128, 256)) + b"ab")
    counts: Counter[str] = Counter()
    assert list(iter_documents(find_files([tmp_path]), counts=counts)) == []
    assert counts == {"binary": 1}


def test_byte_order_mark_and_half_surrogates(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "a\\ud800b"}\n')
    counts: Counter[str] = Counter()
    texts = [d.text for d in iter_documents(find_files([tmp_path]), counts=counts)]
    assert texts == ["one", "a?b"]
    assert counts == {"bad_utf8": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"x\.jsonl:2 is not JSON"),
        ("[1]", r"x\.jsonl:2 is a JSON list"),
        ('{"txt": "a"}', r"x\.jsonl:2 has no field 'text'; its fields: txt\. Did you mean 'txt'"),
        ('{"text": 5}', r"x\.jsonl:2: field 'text' is a int"),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(iter_documents(find_files([tmp_path])))


def test_text_key(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "b", "text": "t"}\n')
    assert [d.text for d in iter_documents(find_files([tmp_path]), text_key="body")] == ["b"]


def test_unreadable_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.txt' does not exist"):
        find_files([tmp_path / "missing.txt"])
    with pytest.raises(UserError, match="No files in"):
        find_files([tmp_path])
    with pytest.raises(UserError, match="at least one file or folder"):
        find_files([])
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"Cannot read .*gone'"):
        find_files([tmp_path])


@pytest.mark.parametrize("damage", [lambda raw: raw[:-12], lambda raw: b"text" + raw])
def test_broken_gzip_is_named(tmp_path: Path, damage) -> None:
    path = tmp_path / "x.txt.gz"
    path.write_bytes(damage(gzip.compress(bytes(range(1, 120)) * 50)))
    with pytest.raises(UserError, match=r"Cannot read .*x\.txt\.gz"):
        list(iter_documents(find_files([path])))


def test_document_too_large_for_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "x.txt").write_text("x" * 11)
    with pytest.raises(UserError, match=r"x\.txt is one document of more than 10 bytes"):
        list(iter_documents(find_files([tmp_path])))


def test_torch_headers_without_importing_torch() -> None:
    assert (torch_headers() / "torch").is_dir()
    code = (
        "import sys, nemo_megacpp.data.commands\n"
        "from nemo_megacpp.data.corpus import torch_headers\n"
        "torch_headers()\n"
        "print({'torch', 'tokenizers', 'megatron', 'numpy'} & set(sys.modules) or 'none')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"
