"""Blends of prepared data, and packed documents: what a recipe accepts and makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_megacpp.data.packed_rows import read_rows
from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.preflight.recipe_data import open_data
from nemo_megacpp.recipes.recipe import Recipe, from_mapping, resolve
from nemo_megacpp.runtime.host import Host


@pytest.fixture(scope="module")
def other(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Other text with the tokenizer of `small_data`, in multiples of four tokens."""
    texts = tmp_path_factory.mktemp("texts")
    for number in range(6):
        (texts / f"{number}.txt").write_text(f"other {number} " * 60)
    out = tmp_path_factory.mktemp("other") / "data"
    options: dict[str, Any] = {"tokenizer": small_data.tokenizer_dir, "document_multiple": 4}
    return prepare([texts], out, **options, held_out=0.3, progress=False)


def recipe_of(**settings: Any) -> Recipe:
    return from_mapping({"recipe": "nam56r_tiny", "seq_length": 32, **settings})


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("data=mine", "mine"),
        ("data=[a, b]", {"a": None, "b": None}),
        ("data={a: 0.7, b: 3}", {"a": 0.7, "b": 3.0}),
        ("data=[0.7, a, '3', b]", {"a": 0.7, "b": 3.0}),
        ("data=0.7 a 3 b", {"a": 0.7, "b": 3.0}),
        ("data=a b", {"a": None, "b": None}),
        ("data=null", None),
    ],
)
def test_spellings(text: str, data: object) -> None:
    recipe = resolve("nam56r_tiny", [text])
    assert recipe.data == data
    assert from_mapping(recipe.to_mapping()).data == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=[]", "empty blend"),
        ("data={}", "empty blend"),
        ("data=[a, a]", "names a twice"),
        ("data={a: 1, b: }", "b has no weight, others have one"),
        ("data={a: 0}", "a has the weight 0; it must be a positive number"),
        ("data=0.7 a b", "b has no partner; write a weight before each folder"),
        ("data=0.7 a b 0.3", "0.3 has the weight 'b'"),
        ("data=0.7 a 0.3 a", "a twice"),
        ("data=0 a 1 b", "a has the weight '0'"),
        ("data={a: much}", "a has the weight 'much'"),
        ("packed_documents=true micro_batch_size=4", "one row, and micro_batch_size=4"),
        ("reset_position_ids=true", "packed_documents=true sets all three"),
        ("eod_mask_loss=true", "packed_documents=true sets all three"),
    ],
)
def test_refused_settings(text: str, message: str) -> None:
    settings = [text] if text.startswith("data") else text.split()
    with pytest.raises(UserError, match=message):
        resolve("nam56r_tiny", settings)


def test_a_pack_is_a_microbatch_of_its_own() -> None:
    recipe = recipe_of(packed_documents=True)
    assert recipe.training.micro_batch_size == 1
    assert "micro_batch_size: 1 (a row is a pack of documents)" in recipe.defaults
    assert from_mapping(recipe.to_mapping()).training == recipe.training


def test_blends_are_opened_and_refused(
    small_data: PreparedData, other: PreparedData, tmp_path: Path
) -> None:
    blend = {str(small_data.root): 1, str(other.root): 3}
    recipe, sources = open_data(recipe_of(data=blend))
    assert sources == [small_data, other]
    assert recipe.model["vocab_size"] == small_data.vocab_size
    with pytest.raises(UserError, match=r"train split of .* one sample of seq_length=100000"):
        open_data(recipe_of(data=blend, seq_length=100000))
    with pytest.raises(UserError, match="nowhere' does not exist"):
        open_data(recipe_of(data=[str(small_data.root), "nowhere"]))
    (tmp_path / "a.txt").write_text("some other words " * 60)
    (tmp_path / "b.txt").write_text("and some more of them " * 60)
    foreign = prepare([tmp_path], tmp_path / "out", vocab_size=270, held_out=0.5, progress=False)
    with pytest.raises(UserError, match=r"different tokenizers, .* --tokenizer .*/tokenizer"):
        open_data(recipe_of(data=[str(small_data.root), str(foreign.root)]))


def test_a_folder_with_a_blank_in_its_name_is_no_blend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my data").mkdir()
    assert recipe_of(data="my data").data == "my data"


def test_a_folder_named_like_a_number_is_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as a weight, one folder of the two would be left out without a word."""
    monkeypatch.chdir(tmp_path)
    for name in ("2024", "2025"):
        Path(name).mkdir()
    for data in ("2024 2025", [2024, 2025], ["2024", "2025"]):
        with pytest.raises(
            UserError, match=r"2024 is in the place of a weight and is also a folder"
        ):
            recipe_of(data=data)
    assert recipe_of(data=["./2024", "2025"]).data == {"./2024": None, "2025": None}
    assert recipe_of(data="0.7 2024 0.3 2025").data == {"2024": 0.7, "2025": 0.3}


def test_the_tokenizer_that_is_asked_for(
    small_data: PreparedData, other: PreparedData, tmp_path: Path
) -> None:
    mine = str(small_data.tokenizer_dir)
    blend = [str(small_data.root), str(other.root)]
    recipe, _ = open_data(recipe_of(data=blend, tokenizer=mine))
    assert from_mapping(recipe.to_mapping()).tokenizer == mine
    with pytest.raises(UserError, match=r"no data is given\. Prepare data with it: .* --tokenizer"):
        open_data(recipe_of(tokenizer=mine))
    tokenizer = json.loads((small_data.tokenizer_dir / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="made with another tokenizer than the one in"):
        open_data(recipe_of(data=blend, tokenizer=str(tmp_path)))
    with pytest.raises(UserError, match="made with another tokenizer than the one in"):
        _module(str(small_data.root), made_with=str(tmp_path))
    with pytest.raises(UserError, match="No tokenizer in 'nowhere'"):
        open_data(recipe_of(data=blend, tokenizer="nowhere"))


def test_packs_over_cp_need_filled_documents(
    small_data: PreparedData, other: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"packed_documents": True, "tp": 1, "cp": 2, "mode": "mamba3"}
    settings |= {"mamba_num_heads": 56}
    message = r"multiple of 4 tokens, but those of .* have multiples of 1\. .*--document-multiple 4"
    with pytest.raises(UserError, match=message):
        open_data(recipe_of(data=str(small_data.root), **settings))
    open_data(recipe_of(data=str(other.root), **settings))
    with pytest.raises(UserError, match="needs a multiple of 8 tokens"):
        open_data(recipe_of(data=str(other.root), **settings | {"cp": 4}))
    native = recipe_of(data=str(other.root), **settings | {"mode": "nemo_native"})
    open_data(native)  # the no-GPU host tells Megatron's mixer the order of a pack
    gpu_host = "nemo_megacpp.preflight.recipe_data.current_host"
    monkeypatch.setattr(gpu_host, lambda: Host("cuda", "nccl"))
    monkeypatch.setattr("megatron.core.ssm.mamba_context_parallel.tex", None)
    with pytest.raises(UserError, match=r"CP=2: Megatron's MambaMixer .* mode='mamba3'"):
        open_data(native)


def _module(data: str, **options: Any) -> Any:
    from nemo_megacpp.nemo.data_module import HybridDataModule

    module = HybridDataModule(data, 300, 32, num_workers=0, output_log=False, **options)
    module.build(16, 16, 4, 4)
    return module


def test_blend_and_packs_through_nemo(small_data: PreparedData, other: PreparedData) -> None:
    blend = {str(small_data.root): 1.0, str(other.root): 3.0}
    module = _module(str(small_data.root), blend=blend, packed_documents=True)
    drawn = [int(module._train_ds[number]["dataset_id"]) for number in range(128)]
    assert drawn.count(1) == pytest.approx(96, abs=2)
    assert "document_start" in module._train_ds[0]
    assert module.tokenizer.eod == small_data.eos_id
    by_size = _module(str(small_data.root), blend=dict.fromkeys(blend))
    assert "document_start" not in by_size._train_ds[0]


def test_inspected_rows_are_those_of_a_run(small_data: PreparedData) -> None:
    module = _module(str(small_data.root), packed_documents=True)
    for parts, sample in zip(read_rows(small_data, 5, 32), module._train_ds, strict=False):
        ids = [token for part in parts for token in part.ids]
        assert torch.equal(sample["tokens"], torch.tensor(ids))
