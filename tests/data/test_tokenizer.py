from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from nemo_megacpp.data import tokenizer as tokenizer_module
from nemo_megacpp.data.tokenizer import (
    EOS_TOKEN,
    MIN_VOCAB_SIZE,
    PAD_TOKEN,
    copy_tokenizer,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from nemo_megacpp.errors import UserError

TEXTS = [f"int function_{i}(const Tensor& self, int64_t dim);\n" for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXTS, 320), folder)
    return folder


def edit(folder: Path, name: str, **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def test_transformers_loads_it_offline_with_the_exact_vocabulary(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    ours = load_tokenizer(folder)
    assert len(loaded) == loaded.vocab_size == ours.vocab_size == 320
    assert loaded.eos_token == EOS_TOKEN
    assert loaded.eos_token_id == ours.eos_id
    assert loaded.pad_token == PAD_TOKEN
    assert loaded.pad_token_id != loaded.eos_token_id
    text = "A word , spaced .  Ünïcode 🙂\r\n\tint function_7();"
    assert loaded.encode(text) == ours.tokenizer.encode(text).ids
    assert loaded.decode(loaded.encode(text)) == text


def test_fingerprint_survives_saving_again_and_sees_a_changed_merge(
    folder: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(str(folder))
    loaded(["a", "b b"], padding=True, truncation=True, max_length=2)
    loaded.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is not None
    assert fingerprint(tmp_path) == fingerprint(folder)
    saved["model"]["merges"][3:5] = saved["model"]["merges"][4:2:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    assert fingerprint(tmp_path) != fingerprint(folder)


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(iter(TEXTS), 320), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_text_never_becomes_a_special_token_and_is_never_cut(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t")
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit(tmp_path / "t", "tokenizer.json", truncation=truncation)
    loaded = load_tokenizer(tmp_path / "t")
    text = f"before {EOS_TOKEN} after {PAD_TOKEN}" * 9
    ids = loaded.tokenizer.encode(text).ids
    assert not {0, 1} & set(ids)
    assert loaded.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_copy_takes_the_tokenizer_only(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(folder, source)
    (source / "model.safetensors").write_bytes(b"heavy")
    (source / "tokenizer_config.json").unlink()
    copy_tokenizer(source, tmp_path / "copy")
    assert {p.name for p in (tmp_path / "copy").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert load_tokenizer(tmp_path / "copy").eos_id == load_tokenizer(folder).eos_id


def test_bad_tokenizers_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"needs at least {MIN_VOCAB_SIZE}"):
        train_tokenizer(TEXTS, MIN_VOCAB_SIZE - 1)
    with pytest.raises(UserError, match=r"nowhere': tokenizer\.json is missing"):
        load_tokenizer(tmp_path / "nowhere")
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    edit(bad, "tokenizer_config.json", eos_token={"content": "</s>", "special": True})
    with pytest.raises(UserError, match=r"no end-of-document token '</s>'"):
        load_tokenizer(bad)
    (bad / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(bad)
    (bad / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged: invalid JSON"):
        load_tokenizer(bad)


def test_ids_with_holes_are_refused(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    model = json.loads((bad / "tokenizer.json").read_text())["model"]
    model["vocab"]["unused"] = 999
    edit(bad, "tokenizer.json", model=model)
    with pytest.raises(UserError, match="321 tokens but ids up to 999"):
        load_tokenizer(bad)


def split_at(pattern: str) -> dict:
    kind = {"type": "Split", "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole = [{**kind, "pattern": {"Regex": pattern}}, {**bytes_, "use_regex": False}]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": whole}}


def replacing(pattern: str) -> dict:
    return {"normalizer": {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (split_at("(["), "is not a tokenizer: Oniguruma error: premature end of char-class"),
        (split_at("(" * 5000 + ")" * 5000), "is not a tokenizer: Oniguruma error: parse depth"),
        (split_at("(a+)+$"), "is not a tokenizer: Onig: Regex search error: retry-limit-in-match"),
        (replacing(""), "is not a tokenizer: index out of bounds"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            "is not a tokenizer: Precompiled: Error",
        ),
        ({"added_tokens": 5}, "is not a tokenizer: invalid type: integer `5`"),
        ({"model": []}, "is not a tokenizer: data did not match any variant"),
    ],
)
def test_hostile_tokenizers_are_refused_in_silence(
    folder: Path, tmp_path: Path, change: dict, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Four of these are panics of the Rust library, which are no ``Exception``."""
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    edit(bad, "tokenizer.json", **change)
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        load_tokenizer(bad)
    assert len(str(refused.value)) < 600
    assert capfd.readouterr() == ("", "")


def test_files_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    for token in ({"special": True}, {"content": 3}, [1]):
        edit(bad, "tokenizer_config.json", eos_token=token)
        with pytest.raises(UserError, match="eos_token should be a string"):
            load_tokenizer(bad)
    for text in ("[" * 99999, '{"a": ' + "9" * 5000 + "}", "[]", "\0"):
        (bad / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=r"tokenizer\.json is damaged: "):
            load_tokenizer(bad)
    (bad / "tokenizer.json").unlink()
    os.mkfifo(bad / "tokenizer.json")
    with pytest.raises(UserError, match="is not a regular file"):
        load_tokenizer(bad)


def test_a_tokenizer_that_does_not_end_is_given_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern takes so long on some texts only, so that a trial cannot find it."""
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    edit(bad, "tokenizer.json", **split_at("(a+)+$"))
    loaded = load_tokenizer(bad, tried=True)
    with pytest.raises(UserError, match="cannot be used as a tokenizer: Onig: Regex search error"):
        loaded.encode(["a" * 40 + "c"])
    edit(bad, "tokenizer.json", **split_at("(a+)+c"))  # each of many attempts is just allowed
    loaded = load_tokenizer(bad)
    monkeypatch.setattr(tokenizer_module, "_SECONDS", 1)
    with pytest.raises(UserError, match="has not encoded 460 characters within 1 s"):
        loaded.encode([("a" * 22 + " ") * 20])
    monkeypatch.setattr(tokenizer_module, "_TRIAL", "import time; time.sleep(60)")
    with pytest.raises(UserError, match="does not load and encode a few words within 1 s"):
        load_tokenizer(bad)
