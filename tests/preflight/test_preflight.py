"""What is refused before a rank starts or a file is written, and what is settled on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_megacpp.checkpoint.lifecycle import finish_checkpoint
from nemo_megacpp.checkpoint.manifest import FILE as MANIFEST
from nemo_megacpp.checkpoint.manifest import write_manifest
from nemo_megacpp.data import builtin
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.nemo import worker
from nemo_megacpp.preflight import preflight
from nemo_megacpp.preflight.model_checks import validate_model, validate_recipe_layout
from nemo_megacpp.preflight.recipe_data import open_data
from nemo_megacpp.preflight.resume import choose_newest, find_resume
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.recipes.views import shape_of
from nemo_megacpp.runs import rank_program
from nemo_megacpp.start import train_recipe

VOCAB_SIZE = 300
Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an empty cache for the built-in corpus."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(*overrides: str) -> Recipe:
    return resolve("nam56r_tiny", overrides)


def refusal(check: Callable[[Recipe], object], *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        check(tiny(*overrides))
    return str(refused.value)


# --- layout


def test_the_shape_is_what_will_be_built() -> None:
    shape = shape_of(tiny("seq_length=512"))
    assert shape.pattern.letters == "AEMEAEMEAEMR"
    assert (shape.num_attention_heads, shape.num_query_groups) == (28, 4)
    assert (shape.seq_length, shape.micro_batch_size, shape.global_batch_size) == (512, 4, 8)
    assert shape.make_vocab_size_divisible_by == 128  # the configuration's default


def test_the_vocabulary_of_the_data_is_held_to_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(recipe: Recipe) -> tuple[Recipe, list[PreparedData]]:
        return dataclasses.replace(recipe, model={**recipe.model, "vocab_size": 301}), []

    monkeypatch.setattr("nemo_megacpp.preflight.settled.open_data", odd)
    message = refusal(preflight, "make_vocab_size_divisible_by=0")
    assert "vocab_size = 301 is not divisible by TP = 2, and padding is off" in message


def test_layout_model_and_loggers_are_refused_together() -> None:
    settings = ("tp=3", "hidden_dropout=2", "attention_dropout=-1", "wandb_name=x")
    message = refusal(preflight, *settings)
    assert message.startswith("4 settings are invalid:\n  1. Layout tp=3,sp=true,etp=1 is illegal")
    for part in (
        "\n     1. num_attention_heads = 28 is not divisible by TP = 3",
        "\n  2. hidden_dropout: 2.0 must be at least 0 and below 1.",
        "\n  3. attention_dropout: -1.0 must be at least 0 and below 1.",
        "\n  4. wandb_name is given without wandb_project",
    ):
        assert part in message, part


def test_every_violation_at_once_with_numbers_and_choices() -> None:
    message = refusal(
        validate_recipe_layout,
        "tp=8",
        "pp=5",
        "ep=3",
        "cp=3",
        "etp=5",
        "world=7",
        "vocab_size=2049",
        "make_vocab_size_divisible_by=0",
    )
    for part in (
        "num_attention_heads = 28 is not divisible by TP = 8",
        "num_query_groups = 4 is not divisible by TP = 8",
        "mamba_num_heads = 28 is not divisible by TP = 8",
        "mamba_num_groups = 4 is not divisible by TP = 8",
        "m2rnn_num_heads = 28 is not divisible by TP = 8",
        "num_moe_experts = 16 is not divisible by EP = 3",
        "moe_ffn_hidden_size = 56 is not divisible by ETP = 5",
        "mamba_num_heads = 28 is not divisible by TP x CP = 8 x 3 = 24",
        "seq_length = 256 is not divisible by 2 x CP = 6",
        "vocab_size = 2049 is not divisible by TP = 8",
        "12 layers cannot be divided into 5 equal pipeline chunks",
        "A world of 7 ranks is not divisible by TP x CP x PP = 120",
        "world of 7 ranks is not divisible by ETP x EP x PP = 75",
        "each rank of an R block holds whole heads. Use tp=1.",  # the odd vocabulary forbids 2
        "Use ep=1, 2, 4, 8 or 16.",
        "Use pp=1, 2, 3, 4, 6 or 12.",
    ):
        assert part in message
    count = message.count("\n")
    assert f"is illegal for this model of 12 layers, for {count} reasons:" in message
    assert [line.split(".")[0].strip() for line in message.splitlines()[1:]] == [
        str(number) for number in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("global_batch_size=6",),
            "Batch sizes do not fit: global 6, micro 4 × DP 1. Use",
        ),
        (("sp=false",), "Training E blocks at TP = 2 needs sequence parallelism"),
        (("tp=1", "sp=true"), "needs TP > 1; TP is 1. Use sp=false."),
        (("num_attention_heads=30",), "30 is not divisible by num_query_groups = 4. Use num_q"),
        (("mamba_num_heads=30",), "mamba_num_heads = 30 is not divisible by mamba_num_groups = 4"),
        (("num_moe_experts=null",), "The pattern has E blocks, but num_moe_experts is None."),
        (("num_attention_heads=-28",), "A blocks, but num_attention_heads is -28."),
        (("recipe=nam56r", "pp=8"), "52 layers cannot be divided into 8 equal pipeline chunks"),
        (("pattern=AE|MR", "depth=4", "pp=4"), "cut into 2 pipeline chunks"),
    ],
)
def test_a_single_violation(overrides: tuple[str, ...], message: str) -> None:
    found = refusal(validate_recipe_layout, *overrides)
    assert "\n" not in found and "is illegal" not in found
    assert message in found


def test_a_depth_below_the_unit_is_refused() -> None:
    assert "depth of 6 cuts short the unit 'AEMEAEMEAEMR'" in refusal(
        validate_recipe_layout, "depth=6"
    )


# --- model


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("hidden_size=-224",), "hidden_size: -224 must be at least 1."),
        (("seq_length=0",), "seq_length: 0 must be at least 1."),
        (("vocab_size=0",), "vocab_size: 0 must be at least 1."),
        (("moe_router_topk=17",), "moe_router_topk=17 experts per token are more than num_moe_exp"),
        (("recompute_granularity=full",), "recompute_granularity='full' needs recompute_method"),
        (("moe_router_score_function=softmax",), "Megatron refuses this model: Expert bias"),
        (
            ("recompute_granularity=selective", "recompute_modules=[foo]"),
            "recompute_modules=['foo']: No block has",
        ),
    ],
)
def test_models_that_cannot_be_built(overrides: tuple[str, ...], message: str) -> None:
    assert message in refusal(validate_model, *overrides)


def test_experts_are_not_counted_where_there_are_none() -> None:
    validate_model(tiny("pattern=AMR", "num_moe_experts=2"))


# --- data


def test_the_built_in_corpus_is_not_prepared_by_a_check(elsewhere: Path) -> None:
    recipe = tiny()
    assert open_data(recipe) == (recipe, [])
    assert list(elsewhere.iterdir()) == []


def test_the_model_takes_the_vocabulary_of_its_data(small_data: PreparedData) -> None:
    recipe, sources = open_data(tiny(f"data={small_data.root}"))
    assert sources == [small_data]
    assert recipe.model["vocab_size"] == VOCAB_SIZE
    assert recipe.defaults[-1] == f"vocab_size: {VOCAB_SIZE} (the data's)"
    same, _ = open_data(tiny(f"data={small_data.root}", f"vocab_size={VOCAB_SIZE}"))
    assert same.model == recipe.model
    assert not any(default.startswith("vocab_size") for default in same.defaults)


def test_data_of_another_vocabulary_than_the_one_asked_for(small_data: PreparedData) -> None:
    message = refusal(open_data, f"data={small_data.root}", "vocab_size=2048")
    assert "made with a vocabulary of 300, but vocab_size=2048" in message
    assert "--vocab-size 2048" in message


def test_too_little_data(small_data: PreparedData) -> None:
    tokens = small_data.splits["heldout"].tokens
    fits = tokens // 2 * 2 - 2
    open_data(tiny(f"data={small_data.root}", f"seq_length={fits}"))
    for length in (tokens, tokens + 1):
        message = refusal(open_data, f"data={small_data.root}", f"seq_length={length}")
        assert f"The heldout split of {small_data.root} has {tokens} tokens" in message
        assert f"seq_length={length} needs {length + 1}" in message


def test_missing_and_damaged_data(small_data: PreparedData, elsewhere: Path) -> None:
    assert "'nowhere' does not exist. Make it: nemo-meg" in refusal(open_data, "data=nowhere")
    Path("file").touch()
    assert "'file' is not a folder" in refusal(open_data, "data=file")
    Path("empty").mkdir()
    assert "'empty' is not prepared data: it has no data.json" in refusal(open_data, "data=empty")
    copy = Path(shutil.copytree(small_data.root, elsewhere / "copy"))
    (copy / "train.bin").write_bytes(b"")
    assert "damaged" in refusal(open_data, "data=copy")
    (copy / "data.json").write_text("{")
    assert "copy/data.json is damaged: invalid JSON" in refusal(open_data, "data=copy")


def test_a_sample_of_the_data_is_verified(small_data: PreparedData, elsewhere: Path) -> None:
    copy = Path(shutil.copytree(small_data.root, elsewhere / "copy"))
    content = bytearray((copy / "train.bin").read_bytes())
    content[100] ^= 1
    (copy / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.bin has changed in block 0 \(bytes 0 to "):
        preflight(tiny(f"data={copy}", "run_dir=next"))
    with pytest.raises(UserError, match=r"train\.bin has changed in block 0 \(bytes 0 to "):
        preflight(tiny(f"data=[{small_data.root},{copy}]", "run_dir=next"))
    preflight(tiny(f"data={copy}", "run_dir=next"), announce=False)  # one process verifies
    assert not Path("next").exists()


def test_a_built_in_corpus_is_checked_like_any_other(small_data: PreparedData) -> None:
    folder = builtin.builtin_folder(VOCAB_SIZE)
    shutil.copytree(small_data.root, folder)
    recipe, (data,) = open_data(tiny(f"vocab_size={VOCAB_SIZE}"))
    assert data.tokens == small_data.tokens
    assert recipe.model["vocab_size"] == VOCAB_SIZE
    message = refusal(open_data, f"vocab_size={VOCAB_SIZE}", "seq_length=1000000")
    assert f"split of {folder} has" in message
    shutil.copytree(small_data.root, builtin.builtin_folder(2048))
    assert "was made with a vocabulary of 300" in refusal(open_data)


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (257, "A vocabulary of 257 is too small: a byte-level BPE needs at least 258"),
        (65536, "enough text for a vocabulary of 32768, not of 65536. Prepare text of your own"),
    ],
)
def test_a_vocabulary_that_the_built_in_corpus_cannot_give(
    vocab_size: int, message: str, elsewhere: Path
) -> None:
    with pytest.raises(UserError, match=message):
        builtin.ensure_builtin(vocab_size)
    assert list(elsewhere.iterdir()) == []


# --- resume


def resumed(recipe: Recipe, data: PreparedData | None = None) -> str | None:
    return start_of(recipe, data).resume


def start_of(recipe: Recipe, data: PreparedData | None = None) -> Recipe:
    return find_resume(recipe, [] if data is None else [data], choose_newest(recipe))


def test_no_resume_is_no_resume() -> None:
    assert resumed(tiny()) is None


def test_resume_takes_a_checkpoint_or_the_newest_of_a_run(elsewhere: Path, save: Save) -> None:
    first, second, last = save(tiny(), 20), save(tiny(), 80), save(tiny(), 100)
    assert resumed(tiny(f"resume={second}")) == str(second)
    assert resumed(tiny(f"resume={elsewhere / 'run'}")) == str(last)
    assert resumed(tiny(f"resume={elsewhere / 'run' / 'checkpoints'}")) == str(last)
    assert resumed(tiny("resume=auto", "run_dir=run")) == str(last)
    assert resumed(tiny(f"resume={os.path.relpath(first)}")) == str(first)  # absolute: ranks' cwd


def test_the_layout_and_the_schedule_may_change(save: Save) -> None:
    checkpoint = save(tiny())
    changed = ("tp=1", "pp=2", "lr=1e-3", "seq_length=512", "moe_aux_loss_coeff=0")
    assert resumed(tiny(f"resume={checkpoint}", *changed)) == str(checkpoint)


def test_auto_starts_anew_where_nothing_was_saved(save: Save, elsewhere: Path) -> None:
    assert resumed(tiny("resume=auto", "run_dir=new")) is None
    half = save(tiny(), 20)
    (half / "nemo_megacpp.json").unlink()  # written last: this one was cut short
    half.with_name("step=20-unfinished").touch()
    settled = preflight(tiny("resume=auto", "run_dir=run"), announce=False)
    assert (settled.recipe.resume, settled.run_dir) == (None, Path("run"))


def _with_manifest(checkpoint: Path, step: int) -> Path:
    """Complete it as a run does."""
    identity = json.loads((checkpoint / "nemo_megacpp.json").read_text())
    finish_checkpoint(checkpoint, identity, step)
    return checkpoint


def _flip(checkpoint: Path) -> None:
    path = checkpoint / "weights" / ".metadata"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _no_identity(checkpoint: Path) -> None:
    (checkpoint / "nemo_megacpp.json").unlink()
    (checkpoint / MANIFEST).unlink()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a changed byte": _flip,
    "another size": lambda checkpoint: (checkpoint / "weights" / ".metadata").write_bytes(b"x"),
    "no manifest": lambda checkpoint: (checkpoint / MANIFEST).unlink(),
    "no identity either": _no_identity,
    "an unreadable identity": lambda path: (path / "nemo_megacpp.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_skipped_aloud_or_stops(
    damage: Callable[[Path], object],
    save: Save,
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    older, newer = _with_manifest(save(tiny(), 20), 20), _with_manifest(save(tiny(), 80), 80)
    damage(newer)
    for resume in ("auto", "run"):
        settings = (f"resume={resume}", "run_dir=run")
        settled = preflight(tiny(*settings))
        assert (settled.recipe.resume, settled.skipped) == (str(older), (_relative(newer),))
        told = capsys.readouterr().out
        assert f"resuming {older} (" in told and "contents verified)" in told
        assert f"WARNING: skipping the checkpoint {_relative(newer)}: " in told
        assert "WARNING: resuming step 20 instead; the 60 steps after it are lost" in told
        message = refusal(preflight, *settings, "damaged_checkpoint=stop")
        assert "It is the newest in run/checkpoints" in message
        assert "damaged_checkpoint=skip" in message
        # Another rank looks at names and sizes; it loads what rank 0 has chosen.
        assert preflight(tiny(*settings), announce=False).skipped == ()
    if damage is not _flip:  # contents are read when it is loaded
        assert f"name run/checkpoints/{older.name} to take" in refusal(preflight, "init_from=run")
    damage(older)
    for resume in ("auto", "run"):
        message = refusal(preflight, f"resume={resume}", "run_dir=run")
        assert "Every checkpoint in run/checkpoints is damaged. The newest: " in message
        assert "\n" not in message


def _relative(path: Path) -> Path:
    return Path(os.path.relpath(path))


def test_a_manifest_that_was_removed_is_missed(
    save: Save, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = _with_manifest(save(tiny(), 20), 20)
    (checkpoint / MANIFEST).unlink()
    for start in ("resume", "init_from"):
        message = refusal(preflight, f"{start}={checkpoint}")
        assert f"{checkpoint} has no manifest, and was saved with one" in message
        preflight(tiny(f"{start}={checkpoint}", "verify_checkpoint=false"))
        assert f"{checkpoint} (not verified)" in capsys.readouterr().out
    identity = checkpoint / "nemo_megacpp.json"
    identity.unlink()  # from elsewhere: loads, and a line says that nothing was verified
    preflight(tiny(f"init_from={checkpoint}"))
    assert "(no manifest: nothing to verify it against)" in capsys.readouterr().out


def test_auto_needs_to_know_where() -> None:
    assert "give run_dir=FOLDER" in refusal(resumed, "resume=auto")


def test_resume_of_nothing(save: Save, elsewhere: Path) -> None:
    Path("empty").mkdir()
    Path("file").touch()
    Path("begun/checkpoints").mkdir(parents=True)
    for name in ("nowhere", "empty", "file", "begun"):
        message = refusal(resumed, f"resume={name}")
        reason = "there is no such folder" if name == "nowhere" else "it is neither a checkpoint ("
        assert f"There is no checkpoint at {name}: {reason}" in message


def test_resume_of_a_checkpoint_that_was_cut_short(save: Save) -> None:
    checkpoint = save(tiny())
    (checkpoint / "weights" / ".metadata").unlink()
    message = refusal(resumed, f"resume={checkpoint}")
    assert f"The checkpoint {checkpoint} is incomplete" in message


def test_resume_of_another_model(save: Save) -> None:
    checkpoint = save(tiny())
    other = ("hidden_size=448", "kv_channels=16", "pattern=AEMR")
    message = refusal(resumed, f"resume={checkpoint}", *other)
    assert message == (
        f"{checkpoint} is a checkpoint of another model: hidden_size is 224 there and 448 here; "
        f"kv_channels is 8 there and 16 here; "
        f"the pattern is AEMEAEMEAEMR there and AEMRAEMRAEMR here."
    )


def test_resume_with_another_tokenizer(small_data: PreparedData, save: Save) -> None:
    recipe, (data,) = open_data(tiny(f"data={small_data.root}"))
    mine, foreign = save(recipe, 20, data.tokenizer_fingerprint), save(recipe, 80, "f" * 64)
    assert resumed(dataclasses.replace(recipe, resume=str(mine)), data) == str(mine)
    with pytest.raises(UserError) as refused:
        find_resume(dataclasses.replace(recipe, resume=str(foreign)), [data])
    assert "its data was made with another tokenizer (ffffffffffff there, " in str(refused.value)
    assert f"{data.tokenizer_fingerprint[:12]} here)" in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("max_steps=2",), r"is of step 4, which is past the end of the run, max_steps=2\."),
        (("max_steps=4",), r"The run is complete: \S+ is of step 4, and max_steps=4\."),
        (("stop_after=3",), r"stop_after: 3 is not past step 4"),
        (("stop_after=4",), r"stop_after: 4 is not past step 4"),
    ],
)
def test_resume_where_no_step_is_left(
    overrides: tuple[str, ...], message: str, save: Save, elsewhere: Path
) -> None:
    checkpoint = save(tiny(), 4)
    for resume in ((f"resume={checkpoint}",), ("resume=auto", "run_dir=run")):
        assert re.search(message, refusal(preflight, *resume, *overrides))
        assert resumed(tiny(*resume, "max_steps=5", "stop_after=5")) == str(checkpoint)
    assert [path.name for path in elsewhere.iterdir()] == ["run"]


def test_resume_of_weights_alone(
    save: Save, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save(tiny(), 4)
    held = {"module.decoder.weight": _tensor(), "optimizer.state.exp_avg.decoder.weight": _tensor()}
    metadata = checkpoint / "weights" / ".metadata"
    metadata.write_bytes(pickle.dumps(Metadata(held, None, {})))
    preflight(tiny(f"resume={checkpoint}"))
    del held["optimizer.state.exp_avg.decoder.weight"]
    metadata.write_bytes(pickle.dumps(Metadata(held, None, {})))
    message = refusal(preflight, f"resume={checkpoint}")
    assert f"{checkpoint} holds weights only, without optimizer state" in message
    assert message.endswith(f"from its weights with init_from={checkpoint}.")
    preflight(tiny(f"init_from={checkpoint}"))
    assert [path.name for path in elsewhere.iterdir()] == ["run"]


def test_a_new_run_starts_from_weights(
    save: Save, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save(tiny(), 200)  # past max_steps, which do not matter here
    metadata = checkpoint / "weights" / ".metadata"
    metadata.write_bytes(pickle.dumps(Metadata({"module.weight": _tensor()}, None, {})))
    settled = preflight(tiny("init_from=run", "run_dir=next"))
    assert (settled.recipe.resume, settled.recipe.init_from) == (None, str(checkpoint))
    assert f"starting from the weights of {checkpoint} (" in capsys.readouterr().out
    both = refusal(preflight, f"resume={checkpoint}", "init_from=run")
    assert "Give one of them" in both
    other = refusal(preflight, "init_from=run", "run_dir=next", "hidden_size=448", "kv_channels=16")
    assert "hidden_size is 224 there and 448 here" in other
    # A job that is restarted resumes its own checkpoint, and starts from the weights before that.
    auto = ("resume=auto", "run_dir=next", "init_from=run")
    recipe = start_of(tiny(*auto))
    assert (recipe.resume, recipe.init_from) == (None, str(checkpoint))
    own = Path(shutil.copytree(save(tiny(), 4), "next/checkpoints/step=4")).absolute()
    recipe = start_of(tiny(*auto))
    assert (recipe.resume, recipe.init_from) == (str(own), None)
    capsys.readouterr()
    preflight(tiny(*auto))
    assert "init_from=run was loaded when this run began" in capsys.readouterr().out


def test_weights_of_another_program_start_a_run(save: Save, elsewhere: Path) -> None:
    """Those that do not say their model must have the model's tensors."""
    checkpoint = save(tiny(), 4)
    metadata = checkpoint / "weights" / ".metadata"
    held = {"embedding.word_embeddings.weight": _tensor()}
    moment = {"optimizer.state.exp_avg.embedding.word_embeddings.weight": _tensor()}
    for prefix in ("", "model."):
        named_so = {f"{prefix}{name}": tensor for name, tensor in held.items()}
        metadata.write_bytes(pickle.dumps(Metadata({**named_so, **moment}, None, {})))
        preflight(tiny(f"init_from={checkpoint}", "run_dir=next"))
    message = refusal(preflight, f"resume={checkpoint}", "run_dir=next")
    assert "begin with 'model.', and those of a run's checkpoint with 'module.' or" in message
    assert message.endswith(f"from its weights with init_from={checkpoint}.")
    (checkpoint / "nemo_megacpp.json").unlink()
    message = refusal(preflight, f"init_from={checkpoint}", "run_dir=next")
    assert f"{checkpoint} is a checkpoint of another model: it has no model." in message
    assert "and 105 more" in message


def test_a_folder_of_safetensors_names_the_import(elsewhere: Path) -> None:
    Path("exported").mkdir()
    Path("exported/model.safetensors").touch()
    message = refusal(resumed, "init_from=exported")
    assert "nemo-megacpp checkpoint import exported OUT (with --from hf" in message


def _tensor() -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(), torch.Size([2]), [])


# --- the whole


def test_settle_tells_what_it_settled(
    small_data: PreparedData,
    save: Save,
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = {"vocab_size": VOCAB_SIZE}
    base = tiny()
    base = dataclasses.replace(base, model={**base.model, **shape})
    checkpoint = save(base, 20, small_data.tokenizer_fingerprint)
    before = sorted(elsewhere.rglob("*"))
    settled = preflight(
        tiny(f"data={small_data.root}", "run_dir=next", "resume=run", "tp=1", "pp=2")
    )
    recipe, run_dir = settled.recipe, settled.run_dir
    assert recipe.resume == str(checkpoint)
    assert recipe.model["vocab_size"] == VOCAB_SIZE
    assert run_dir == Path("next")
    shown = capsys.readouterr().out
    shown = re.sub(r"\([0-9.]+ s\)", "(0.0 s)", shown)
    assert shown.splitlines() == [
        "defaults taken: max_steps: 160; global_batch_size: 8; lr: 0.004; precision: fp32; "
        "vocab_size: 300 (the data's)",
        "nam56r_tiny: AEMEAEMEAEMR",
        "layout: TP=1 CP=1 EP=1 ETP=1 PP=2 (2 ranks: DP=1, expert DP=1); run folder: next",
        "data: verified 7 of 7 blocks (0.0 s)",
        f"resuming {checkpoint} (no manifest: nothing to verify it against)",
    ]
    assert sorted(elsewhere.rglob("*")) == before


def test_a_damaged_checkpoint_is_refused_unless_told_not_to_look(
    save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save(tiny())
    shard = checkpoint / "weights" / "__0_0.distcp"
    shard.write_bytes(b"as it was")
    write_manifest(checkpoint)
    preflight(tiny(f"resume={checkpoint}", "run_dir=next"))
    assert f"resuming {checkpoint} (3 files, " in capsys.readouterr().out
    shard.write_bytes(b"as it is!")
    message = refusal(preflight, f"resume={checkpoint}", "run_dir=next")
    assert f"{checkpoint} is damaged: weights/__0_0.distcp has changed" in message
    preflight(tiny(f"resume={checkpoint}", "run_dir=next", "verify_checkpoint=false"))
    assert f"resuming {checkpoint} (not verified)" in capsys.readouterr().out


def test_settle_chooses_a_new_run_folder_and_can_be_silent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = preflight(tiny(), announce=False).run_dir
    assert run_dir.parent == Path("runs")
    assert run_dir.name.startswith("nam56r_tiny-")
    assert capsys.readouterr().out == ""


def test_a_run_is_not_written_over(save: Save, elsewhere: Path) -> None:
    checkpoint = save(tiny())
    message = refusal(preflight, "run_dir=run")
    assert message.startswith("run already holds a run. Resume it with resume=auto")
    recipe = preflight(tiny("run_dir=run", "resume=auto"), announce=False).recipe
    assert recipe.resume == str(checkpoint)


def test_a_run_does_not_go_back_in_its_own_folder(save: Save, elsewhere: Path) -> None:
    """At the step of the newer checkpoint it would come to write that one again."""
    older = save(tiny())
    newer = save(tiny(), 80)
    assert newer.parent == older.parent
    message = refusal(preflight, f"resume={older}", "run_dir=run")
    assert message.startswith(f"run already holds a run, whose newest checkpoint is {newer.name}:")
    for resume, run_dir in ((older, "next"), (newer, "run"), ("auto", "run")):
        preflight(tiny(f"resume={resume}", f"run_dir={run_dir}"), announce=False)


def _start(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, node: int) -> list[Recipe]:
    """Be a rank that torchrun has started; return where what it would train is put."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", node)):
        monkeypatch.setenv(name, str(value))
    started: list[Recipe] = []
    monkeypatch.setattr(worker, "run_recipe", lambda recipe, *_, **__: started.append(recipe))
    return started


def test_a_launcher_decides_on_the_ranks_and_they_are_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = _start(monkeypatch, 0, 4, 4)
    train_recipe(tiny("run_dir=here"))
    assert started[0].layout.world == 4
    assert "(4 ranks: DP=2, expert DP=4)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("node", "overrides", "message"),
    [
        (2, (), "A run on 2 nodes needs run_dir=FOLDER"),
        (1, ("run_dir=here",), "does not fit the NVLink domain of 1 GPUs a node"),
        (4, ("run_dir=here", "world_size=2"), "world_size=2, but the launcher"),
    ],
)
def test_a_job_on_several_nodes_is_held_to_what_they_share(
    node: int, overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = _start(monkeypatch, 0, 4, node)
    with pytest.raises(UserError, match=message):
        train_recipe(tiny(*overrides))
    assert not started
    assert not Path("here").exists()


def test_an_interrupted_rank_leaves_its_launcher_to_speak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    _start(monkeypatch, 0, 2, 2)
    monkeypatch.setattr(rank_program, "end_with_parent", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["worker", "nam56r_tiny", "here", "1"])
    with pytest.raises(SystemExit) as stop:
        rank_program.run_rank(interrupted)
    said = ("Interrupted before training began; nothing is lost.\n", "")
    assert (stop.value.code, capsys.readouterr()) == (130, said)


@pytest.mark.parametrize("name", ["n" * 300, "n\0"])
def test_a_run_folder_with_an_impossible_name(name: str) -> None:
    recipe = dataclasses.replace(tiny(), run_dir=name)
    with pytest.raises(UserError, match=r"cannot be made: (File name too long|embedded null byte)"):
        preflight(recipe)


def test_a_run_folder_that_cannot_be_made(elsewhere: Path) -> None:
    Path("file").touch()
    assert refusal(preflight, "run_dir=file").startswith("run_dir=file cannot be made: file is")
    message = refusal(preflight, "run_dir=file/run/1")
    assert message == f"run_dir=file/run/1 cannot be made: {elsewhere / 'file'} is not a folder."


def test_refusals_write_nothing(small_data: PreparedData, save: Save, elsewhere: Path) -> None:
    checkpoint = save(tiny())
    damaged = save(tiny(), 80)
    (damaged / "nemo_megacpp.json").write_text(json.dumps({"step": 80}))
    before = {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")}
    for overrides in (
        ("tp=8",),
        ("hidden_size=-1",),
        ("data=nowhere",),
        (f"data={small_data.root}", "vocab_size=2048"),
        (f"resume={checkpoint}", "hidden_size=448"),
        (f"resume={damaged}",),
        ("resume=nowhere",),
        ("run_dir=run",),
    ):
        refusal(preflight, *overrides)
    assert {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")} == before


def test_side_channels_need_data_with_their_ids(small_data: PreparedData) -> None:
    channel = "side_channels=[{name: bigram, vocab_size: 64, ngram: 2}]"
    assert "and the built-in corpus has none. Prepare data: " in refusal(preflight, channel)
    message = refusal(preflight, channel, f"data={small_data.root}")
    assert "has no side channel bigram; it has none. Prepare it with --side-channel " in message
