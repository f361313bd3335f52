"""``nemo-megacpp checkpoint``: inspect, verify, reshard, export, import."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from nemo_megacpp import cli
from nemo_megacpp.checkpoint import export as export_module
from nemo_megacpp.checkpoint.content import CheckpointContent, describe
from nemo_megacpp.checkpoint.export import CONFIG, INDEX, export, read_export
from nemo_megacpp.checkpoint.identity import read_identity, write_identity
from nemo_megacpp.checkpoint.manifest import FILE, check_manifest, is_complete, write_manifest
from nemo_megacpp.checkpoint.rewrite import import_safetensors, reshard
from nemo_megacpp.checkpoint.safe_pickle import scan_checkpoint
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.workers import WorkerPool
from tests.checkpoint.conftest import SMALL
from tests.checkpoint.malice import PLACES, Payload
from tests.checkpoint.saved_run import save_run

IDENTITY = {
    "model": {**SMALL.model, "num_layers": 5},
    "layout": "tp=2,sp=true,etp=1",
    "tokenizer": "a" * 64,
}


@pytest.fixture(scope="session")
def run_checkpoint(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint, with optimizer, identity and manifest; only read it."""
    folder = tmp_path_factory.mktemp("run") / "step=20"
    (folder / "weights").mkdir(parents=True)
    ranks.run(2, save_run, str(folder / "weights"), SMALL, IDENTITY["layout"])
    write_identity(folder, IDENTITY, 20)
    write_manifest(folder)
    return folder


@pytest.fixture
def own_run(run_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_checkpoint, tmp_path / "own"))


def command(*arguments: object) -> int:
    """Run ``nemo-megacpp checkpoint …`` in this process; return its exit code."""
    before = sys.argv
    sys.argv = ["nemo-megacpp", "checkpoint", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    assert isinstance(ended.value.code, int)
    return ended.value.code


def flip(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


def values(path: Path) -> dict[str, torch.Tensor]:
    content = CheckpointContent(path)
    return {name: content.read_tensor(name) for name in content.tensors}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# --- inspect and verify


def test_inspect_tells_all(run_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("inspect", run_checkpoint, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["pattern"], found["layout"]) == (20, "AEMRF", IDENTITY["layout"])
    assert found["model"] == IDENTITY["model"]
    assert found["manifest"].endswith("sizes match, contents not read")
    assert found["tensors"]["decoder.layers.0.self_attention.linear_proj.weight"] == {
        "shape": [48, 48],
        "dtype": "float32",
        "shards": 2,
        "bytes": 48 * 48 * 4,
    }
    assert found["optimizer_tensors"] == 2 * len(found["tensors"]) + 1
    assert found["objects"] == ["rng_state/shard_0_1"]
    # 8 query heads in 4 groups, two chunks of layers, 8 experts, 20 wide
    assert found["loads_in"]["tp"] == [1, 2, 4]
    assert found["loads_in"]["pp"] == [1, 2]
    assert found["loads_in"]["ep"] == [1, 2, 4, 8]
    size = sum(path.stat().st_size for path in run_checkpoint.rglob("*") if path.is_file())
    assert found["bytes"] == size
    assert command("inspect", run_checkpoint / "weights") == 0
    text = capsys.readouterr().out
    assert "saved in    tp=2,sp=true,etp=1" in text
    assert "loads in    tp=1,2,4; " in text
    assert "48×48" in text
    assert f"{len(found['tensors'])} tensors" in text


def test_inspect_of_bare_weights(small_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("inspect", small_weights) == 0
    text = capsys.readouterr().out
    assert "a checkpoint from elsewhere" in text
    assert "optimizer   none" in text
    assert "decoder.layers.3.mixer.state_weight" in text


def test_megatrons_own_checkpoint(own_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As its script saves it: iter_0000020 beside a tracker, arguments in common.pt."""
    folder = own_weights.parent / "megatron"
    folder.mkdir()
    own_weights.rename(folder / "iter_0000020")
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    (folder / "iter_0000020" / FILE).unlink()
    arguments = argparse.Namespace(tensor_model_parallel_size=2, params_dtype=torch.bfloat16)
    held = io.BytesIO()
    torch.save({"args": arguments, "iteration": 20, "checkpoint_version": 3.0}, held)
    (folder / "iter_0000020" / "common.pt").write_bytes(held.getvalue())
    assert command("inspect", folder) == 0
    text = capsys.readouterr().out
    assert "step        20" in text
    assert "no manifest" in text
    assert command("verify", folder / "iter_0000020") == 0
    assert "no manifest" in capsys.readouterr().out
    export(folder, folder / "out")
    assert len(read_export(folder / "out")) == len(describe(folder)["tensors"])
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    assert command("inspect", folder) == 2
    assert "names no iteration" in capsys.readouterr().err


def test_a_checkpoint_of_fsdp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tensors are DTensors, whose parts of a matrix have no names."""
    state = {"args": argparse.Namespace(), "model": {"weight": torch.ones(2)}}
    dcp.save(state, checkpoint_id=tmp_path / "iter_0000002", no_dist=True)
    assert command("inspect", tmp_path / "iter_0000002") == 2
    assert "is a checkpoint of Megatron's FSDP (fsdp_dtensor)" in capsys.readouterr().err
    with pytest.raises(UserError, match="Only Megatron's script reads it"):
        export(tmp_path / "iter_0000002", tmp_path / "out")


def test_verify(own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("verify", own_run) == 0
    assert "contents verified; its pickles hold data only" in capsys.readouterr().out
    shard = next((own_run / "weights").glob("*.distcp"))
    flip(shard)
    assert command("verify", own_run) == 2
    error = capsys.readouterr().err
    assert f"weights/{shard.name} has changed in bytes" in error
    assert "(of " in error
    assert error.count("\n") == 1
    assert command("inspect", own_run) == 0, "it still says what it is"
    flip(shard)
    PLACES["object"](own_run / "weights", Payload(tmp_path / "RUN"))
    write_manifest(own_run)
    assert command("verify", own_run) == 2
    assert "would call posix.mkdir" in capsys.readouterr().err
    assert not (tmp_path / "RUN").exists()


def _no_metadata(folder: Path) -> Path:
    (folder / "weights" / ".metadata").unlink()
    return folder


def _bad_metadata(folder: Path) -> Path:
    (folder / "weights" / ".metadata").write_bytes(b"\x80\x05nonsense")
    return folder


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder / "weights")
    return folder


def _bad_identity(folder: Path) -> Path:
    (folder / "nemo_megacpp.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: folder / "nowhere", "there is no such folder"),
        (_emptied, "it is neither a checkpoint ("),
        (lambda folder: folder / "nemo_megacpp.json", "it is neither a checkpoint ("),
        (_no_metadata, "is incomplete"),
        (_bad_metadata, ".metadata cannot be read"),
        (_bad_identity, "nemo_megacpp.json is damaged: invalid JSON"),
    ],
    ids=["missing", "empty", "file", "cut short", "damaged metadata", "damaged identity"],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(
    break_it: Any, message: str, own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = break_it(own_run)
    out = own_run.parent / "out"
    for arguments in (("inspect", target), ("export", target, out)):
        assert command(*arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out
    assert not out.exists()


def _run_folder(checkpoint: Path, folder: Path) -> Path:
    """A run with two complete checkpoints and an incomplete one."""
    for step in (20, 9):
        one = Path(shutil.copytree(checkpoint, folder / "checkpoints" / f"step={step}"))
        write_identity(one, IDENTITY, step)
        write_manifest(one)
    shutil.copytree(checkpoint, folder / "checkpoints" / "step=30")
    (folder / "checkpoints" / "step=30" / FILE).unlink()
    write_identity(folder / "checkpoints" / "step=30", {**IDENTITY, "manifest": FILE}, 30)
    (folder / "checkpoints" / "step=30-unfinished").touch()
    return folder


def test_a_run_folder_means_its_newest_complete_checkpoint(
    run_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run_folder(run_checkpoint, tmp_path / "run")
    newest = run / "checkpoints" / "step=20"
    for given in (run, run / "checkpoints", newest / "weights"):
        assert command("inspect", given, "--json") == 0
        told = capsys.readouterr()
        assert json.loads(told.out)["checkpoint"] == str(newest)
        assert told.err == f"{given}: taking the checkpoint {newest}\n"
    assert command("inspect", newest) == 0
    assert capsys.readouterr().err == ""
    assert command("verify", run) == 0
    assert capsys.readouterr().out.startswith(f"{newest}: ")
    assert command("export", run, tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith(f"{newest}: ")
    assert command("reshard", run, tmp_path / "resharded", "--layout", "tp=3") == 2
    told = capsys.readouterr()
    assert f"{run}: taking the checkpoint {newest}" in told.err
    assert "is illegal for this model" in told.err


def test_a_run_whose_newest_checkpoint_is_damaged_is_refused(
    run_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not silently taken for the one before."""
    run = _run_folder(run_checkpoint, tmp_path / "run")
    newest, older = (run / "checkpoints" / f"step={step}" for step in (20, 9))
    next((newest / "weights").glob("*.distcp")).write_bytes(b"")
    out = tmp_path / "out"
    for words in (["inspect", run], ["verify", run], ["export", run, out]):
        assert command(*words) == 2
        told = capsys.readouterr()
        assert f"The checkpoint {newest} is damaged: " in told.err and not told.out
        assert f"name {older} to take the newest that is complete" in told.err
    assert command("verify", older) == 0


def test_a_manifest_that_was_removed_is_missed(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    export(own_run, tmp_path / "exported")
    (tmp_path / "exported" / FILE).unlink()
    (own_run / FILE).unlink()
    write_identity(own_run, {**IDENTITY, "manifest": FILE}, 20)
    for words in (
        ("verify", own_run),
        ("export", own_run, out),
        ("reshard", own_run, out, "--layout", "tp=1"),
    ):
        assert command(*words) == 2
        told = capsys.readouterr()
        assert f"{own_run} has no manifest, and was saved with one" in told.err
        assert told.err.count("\n") == 1 and not told.out
    assert command("inspect", own_run) == 0
    assert "manifest    damaged: The checkpoint" in capsys.readouterr().out
    assert command("import", tmp_path / "exported", out) == 2
    assert "has no manifest (" in capsys.readouterr().err
    assert not out.exists()
    assert command("export", own_run, out, "--no-verify") == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_layers", "4", "num_layers: '4' is not a whole number"),
        ("num_layers", 10**12, "num_layers: 1,000,000,000,000 is more than 65,536"),
        ("hidden_size", 10**30, "hidden_size is larger than"),
        ("hybrid_pattern", 3, "hybrid_pattern: 3 is not a string"),
        ("mode", "other", "mode: 'other' is not"),
    ],
)
def test_an_impossible_model_is_refused_in_one_line(
    name: str,
    value: object,
    message: str,
    own_run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = {**IDENTITY, "model": {**IDENTITY["model"], name: value}}
    write_identity(own_run, changed, 20)
    for arguments in (("inspect", own_run), ("reshard", own_run, "out", "--layout", "tp=1")):
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert "nemo_megacpp.json is damaged: model: " in error
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "1" * 50, "-1", "²", "1e3", "release", "\0"])
def test_a_damaged_tracker_is_refused_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert command("inspect", tmp_path) == 2
    error = capsys.readouterr().err
    assert "latest_checkpointed_iteration.txt names no iteration: " in error
    assert error.count("\n") == 1 and len(error) < 400


# --- reshard


@contextlib.contextmanager
def _pool(ranks: WorkerPool) -> Iterator[WorkerPool]:
    yield ranks


@pytest.mark.parametrize(
    "text",
    [
        "pp=2",
        pytest.param("tp=1,ep=2", marks=pytest.mark.slow),
        pytest.param("tp=4,etp=1", marks=pytest.mark.slow),
    ],
)
def test_reshard_keeps_every_bit(
    ranks: WorkerPool, run_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    split, whole = reshard(
        run_checkpoint, out, ParallelLayout.parse(text), lambda size: _pool(ranks)
    )
    there, here = CheckpointContent(run_checkpoint), CheckpointContent(out)
    assert same(values(run_checkpoint), values(out))
    states = sum(name.startswith("random_state.") for name in there.tensors)
    assert whole == 1 + states > 1, "what belongs to no parameter: a bucket, random states"
    assert split == len(there.tensors) - whole
    assert there.metadata.state_dict_metadata.keys() == here.metadata.state_dict_metadata.keys()
    assert here.common() == there.common()
    assert here.common()["content_metadata"] == {"kind": "a run"}
    assert "contents verified" in check_manifest(out)
    assert is_complete(run_checkpoint), "what was read is as it was"
    assert (read_identity(out) or {}) == {
        **IDENTITY,
        "step": 20,
        "manifest": FILE,
        "layout": ParallelLayout.parse(text).short(),
    }
    shards = {name: info.shards for name, info in here.model_tensors.items()}
    degree = ParallelLayout.parse(text).tp
    assert shards["decoder.layers.0.self_attention.linear_proj.weight"] == degree
    moment = "optimizer.state.exp_avg.module.decoder.layers.0.self_attention.linear_proj.weight"
    assert here.tensors[moment].shards == degree
    before = {name: info.shards for name, info in there.model_tensors.items()}
    assert before["decoder.layers.0.self_attention.linear_proj.weight"] == 2


def test_reshard_refuses_before_it_starts_a_rank(
    own_run: Path, small_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, taken = tmp_path / "out", tmp_path / "taken"
    taken.mkdir()
    (taken / "x").touch()
    assert command("reshard", own_run, out, "--layout", "tp=3") == 2
    assert "is illegal for this model" in capsys.readouterr().err
    assert command("reshard", small_weights, out, "--layout", "tp=2") == 2
    assert "does not say which model" in capsys.readouterr().err
    assert command("reshard", own_run, taken, "--layout", "tp=1") == 2
    assert "taken exists already" in capsys.readouterr().err
    flip(next((own_run / "weights").glob("*.distcp")))
    assert command("reshard", own_run, out, "--layout", "tp=1") == 2
    assert "is damaged" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "taken"]


def test_reshard_imports_no_code_that_a_checkpoint_names(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = own_run / "family.py"
    module.write_text(f"import os; os.mkdir({str(tmp_path / 'RUN')!r})")
    model = {**IDENTITY["model"], "family_modules": [str(module)]}  # type: ignore[dict-item]
    write_identity(own_run, {**IDENTITY, "model": model}, 20)
    write_manifest(own_run)
    assert command("inspect", own_run) == 0
    capsys.readouterr()
    assert command("reshard", own_run, tmp_path / "out", "--layout", "tp=1") == 2
    assert "reshard imports no code that a checkpoint names" in capsys.readouterr().err
    assert not (tmp_path / "RUN").exists()


def test_a_reshard_that_fails_leaves_nothing(own_run: Path, tmp_path: Path) -> None:
    class Failing:
        def run(self, *_: Any) -> list[Any]:
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"out was not written: .*No space left on device"):
        reshard(
            own_run,
            tmp_path / "out",
            ParallelLayout.parse("tp=1"),
            lambda size: contextlib.nullcontext(Failing()),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


# --- safetensors


def test_export_and_back_is_exact(
    ranks: WorkerPool,
    run_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(export_module, "_FILE_BYTES", 40_000)
    out, back = tmp_path / "out", tmp_path / "back"
    assert command("export", run_checkpoint, out) == 0
    there = CheckpointContent(run_checkpoint)
    text = capsys.readouterr().out
    assert f"{len(there.model_tensors)} tensors" in text
    left_out = len(there.other_tensors) + 1
    (line,) = (line for line in text.splitlines() if line.startswith(f"{out}: "))
    assert line.endswith(
        f" files; {left_out} tensors and objects of optimizer and random state left out"
    )
    index = json.loads((out / INDEX).read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    found = {}
    for file in files:
        tensors = load_file(file)
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        found.update(tensors)
    wanted = values(run_checkpoint)
    model = {
        name.removeprefix("module."): value
        for name, value in wanted.items()
        if name.startswith("module.")
    }
    assert same(model, found)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in model.values())
    assert json.loads((out / CONFIG).read_text())["identity"]["model"] == IDENTITY["model"]
    assert files[0].stat().st_mode == (out / INDEX).stat().st_mode
    import_safetensors(out, back, lambda size: _pool(ranks))
    assert same({n: v for n, v in wanted.items() if n.startswith("module.")}, values(back))
    assert read_identity(back) == {**(read_identity(run_checkpoint) or {}), "manifest": FILE}
    assert is_complete(back)
    again = tmp_path / "again"
    export(back, again)
    assert same(found, read_export(again))


def test_a_damaged_export_is_not_imported(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    export(own_run, out)
    file = next(out.glob("*.safetensors"))
    whole = file.read_bytes()
    flip(file)
    assert command("import", out, back) == 2
    assert f"{file.name} has changed" in capsys.readouterr().err
    file.write_bytes(whole[:1000])
    assert command("import", out, back, "--no-verify") == 2
    assert "cannot be read" in capsys.readouterr().err
    file.write_bytes(whole)
    index = json.loads((out / INDEX).read_text())
    index["weight_map"]["more"] = file.name
    (out / INDEX).write_text(json.dumps(index))
    assert command("import", out, back, "--no-verify") == 2
    assert "differ in more" in capsys.readouterr().err
    config = json.loads((out / CONFIG).read_text())
    for identity in ("", {}):
        (out / CONFIG).write_text(json.dumps({**config, "identity": identity}))
        assert command("import", out, back, "--no-verify") == 2
        assert "config.json is damaged: identity" in capsys.readouterr().err
    (out / CONFIG).write_text(json.dumps({"model_type": "llama"}))
    assert command("import", out, back, "--no-verify") == 2
    assert "model_type should be 'nemo_megacpp', and is 'llama'" in capsys.readouterr().err
    assert command("import", tmp_path / "nowhere", back) == 2
    assert not back.exists()


def test_an_export_of_damaged_weights_says_where(own_run: Path, tmp_path: Path) -> None:
    content = CheckpointContent(own_run)
    name = "module.decoder.final_norm.weight"
    place = next(p for i, p in content.metadata.storage_data.items() if i.fqn == name)
    shard = content.weights / place.relative_path
    data = bytearray(shard.read_bytes())
    data[place.offset : place.offset + 8] = bytes(8)
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged at module\.decoder\.final_norm\.weight"):
        export(own_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reading_leaves_megatron_what_it_may_load(run_checkpoint: Path) -> None:
    """Megatron's loads after it, in the same process, need the classes that it has registered."""
    from megatron.core.safe_globals import SAFE_GLOBALS

    torch.serialization.add_safe_globals(list(SAFE_GLOBALS))
    CheckpointContent(run_checkpoint).common()
    scan_checkpoint(run_checkpoint / "weights")
    assert set(SAFE_GLOBALS) <= set(torch.serialization.get_safe_globals())
