"""``checkpoint import --from hf``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_megacpp.checkpoint.identity import read_identity
from nemo_megacpp.checkpoint.manifest import check_manifest, write_manifest
from nemo_megacpp.checkpoint.rewrite import reshard
from nemo_megacpp.errors import UserError
from nemo_megacpp.hf import folder as folder_module
from nemo_megacpp.hf.exchange import EMBEDDING
from nemo_megacpp.hf.export import export_hf
from nemo_megacpp.hf.importing import import_hf
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.workers import WorkerPool
from tests.hf.values import same, values


@pytest.mark.parametrize("name", ["all", "MIMO", "tied"])
def test_there_and_back(
    name: str,
    ranks: WorkerPool,
    saved: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit; in several files, too; and the checkpoint can be resharded."""
    monkeypatch.setattr(folder_module, "FILE_BYTES", 60_000)
    counts = export_hf(saved(name), tmp_path / "out")
    assert counts.files > 1
    back = tmp_path / "back"
    pool = lambda size: contextlib.nullcontext(ranks)  # noqa: E731
    count = import_hf(tmp_path / "out", back, pool)
    before, after = values(saved(name)), values(back)
    assert len(after) == count
    assert same(before, after)
    assert read_identity(back) == read_identity(saved(name))
    assert "contents verified" in check_manifest(back)
    if name == "all":
        reshard(back, tmp_path / "tp2", ParallelLayout.parse("tp=2,etp=1"), pool)
        assert same(before, values(tmp_path / "tp2"))


def _change(folder: Path, file: str, **fields: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **fields}))
    write_manifest(folder)


def _model(folder: Path, prefix: str = "", **fields: Any) -> None:
    source = json.loads((folder / "config.json").read_text())["source"]
    source["identity"]["model"].update(fields)
    _change(folder, "config.json", source={**source, "prefix": prefix})


def _embedding(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, EMBEDDING: change(tensors[EMBEDDING])}, folder / "model.safetensors")


def _make_a_pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {EMBEDDING: "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: _change(f, "config.json", model_type="llama"), "describes model_type='llama'"),
        (lambda f: _change(f, "config.json", source={"prefix": ""}), "is damaged: source.identity"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "model.safetensors cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (_lose_a_shard, r"model-00002-of-00002\.safetensors cannot be read"),
        (_make_a_pipe, r"model\.safetensors cannot be read: it is not a regular file"),
        (lambda f: _model(f, vocab_size="90"), r"config\.json is damaged: model: vocab_size"),
        (lambda f: _model(f, vocab_size=0), "a vocab_size of 0 and a hidden_size of 48"),
        (lambda f: _model(f, vocab_size=4096), "a vocab_size of 4096 and a hidden_size of 48"),
        (lambda f: _model(f, hidden_size=96), "a vocab_size of 90 and a hidden_size of 96"),
        (lambda f: _model(f, "x."), r"is damaged: source\.prefix"),
        (lambda f: _embedding(f, torch.Tensor.long), f"{EMBEDDING} has dtype int64; weights are"),
        (lambda f: _embedding(f, lambda t: t[0, 0].clone()), r"has the shape \(\), and the model"),
    ],
    ids=[
        *("no config", "another model", "no identity", "damaged", "no weights", "no shard"),
        *(
            "pipe",
            "type",
            "no vocabulary",
            "larger vocabulary",
            "wider",
            "prefix",
            "integers",
            "scalar",
        ),
    ],
)
def test_refusals(
    break_it: Callable[[Path], Any], message: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    export_hf(saved("A"), folder)
    break_it(folder)
    with pytest.raises(UserError, match=message):
        import_hf(folder, tmp_path / "out", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn_hidden_size": 128}, r"linear_fc1\.weight is \(128, 48\) in place of \(256, 48\)"),
        ({"num_attention_heads": 0}, "This describes no model: "),
    ],
)
def test_weights_of_another_model_are_refused(
    fields: dict[str, Any],
    message: str,
    ranks: WorkerPool,
    saved: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Whatever config.json says of it: the shapes are compared with Megatron's."""
    export_hf(saved("A"), tmp_path / "folder")
    _model(tmp_path / "folder", **fields)
    with pytest.raises(UserError, match=message):
        import_hf(tmp_path / "folder", tmp_path / "out", lambda size: contextlib.nullcontext(ranks))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_a_changed_byte_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(tmp_path / "folder")
    export_hf(saved("A"), folder)
    shutil.copyfile(folder / "config.json", folder / "generation_config.json")
    with pytest.raises(UserError, match=r"is damaged: generation_config\.json has"):
        import_hf(folder, tmp_path / "out")
