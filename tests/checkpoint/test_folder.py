"""Which folder is a checkpoint, and which of a run's is the newest complete one."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_megacpp.checkpoint.folder import (
    find_checkpoint,
    new_folder,
    newest_checkpoint,
    saved_checkpoints,
)
from nemo_megacpp.checkpoint.identity import FILE, write_identity
from nemo_megacpp.errors import UserError


def saved(folder: Path, step: int = 20) -> Path:
    folder.mkdir(parents=True)
    write_identity(folder, {"model": {}, "tokenizer": "a" * 64}, step)
    return folder


def test_the_newest_is_the_one_with_most_steps(tmp_path: Path) -> None:
    for step in (100, 20, 80):
        saved(tmp_path / f"step={step}", step)
    assert newest_checkpoint(tmp_path) == tmp_path / "step=100"


def test_folders_without_identity_are_not_complete(tmp_path: Path) -> None:
    saved(tmp_path / "step=20", 20)
    (tmp_path / "step=40" / "weights").mkdir(parents=True)
    saved(tmp_path / "step=60", 60)
    (tmp_path / "step=60" / FILE).rename(tmp_path / "step=60" / f"{FILE}.partial")
    (tmp_path / "step=80-unfinished").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "step=20"
    lost = [found.path.name for found in saved_checkpoints(tmp_path) if found.damage]
    assert lost == ["step=40"], "no mark says that it was being saved"


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_damaged_newest_one_is_refused_and_the_next_named(tmp_path: Path) -> None:
    older = saved(tmp_path / "step=10", 10)
    (saved(tmp_path / "step=20") / FILE).write_text("{")
    assert newest_checkpoint(tmp_path) == older
    with pytest.raises(UserError) as refused:
        find_checkpoint(tmp_path)
    assert f"{tmp_path / 'step=20' / FILE} is damaged: invalid JSON" in str(refused.value)
    assert f"name {older} to take the newest that is complete" in str(refused.value)
    (tmp_path / "step=20-unfinished").touch()  # it was being saved
    (older / ".metadata").touch()
    assert find_checkpoint(tmp_path) == older


def test_what_is_no_checkpoint_of_a_run_does_not_count(tmp_path: Path) -> None:
    one = saved(tmp_path / "step=20", 20)
    for name in (".step=30.partial", "step=30.deleting", "step=30.damaged"):
        saved(tmp_path / name, 30)
    (tmp_path / "megatron" / "weights").mkdir(parents=True)
    assert [found.path for found in saved_checkpoints(tmp_path)] == [one]


def test_every_way_to_name_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    newest = saved(run / "checkpoints" / "step=40", 40)
    older = saved(run / "checkpoints" / "step=20", 20)
    for path in (newest, older):
        (path / "weights").mkdir()
        (path / "weights" / ".metadata").touch()
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == newest
    assert find_checkpoint(older) == find_checkpoint(older / "weights") == older
    assert find_checkpoint(older / "weights" / ".") == older
    megatron = tmp_path / "megatron"
    (megatron / "iter_0000020").mkdir(parents=True)
    (megatron / "iter_0000020" / ".metadata").touch()
    (megatron / "latest_checkpointed_iteration.txt").write_text("20\n")
    assert find_checkpoint(megatron) == megatron / "iter_0000020"
    assert find_checkpoint(megatron / "iter_0000020") == megatron / "iter_0000020"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no such folder"),
        ("empty", "it is neither a checkpoint (with .metadata or weights/.metadata in it) nor a"),
        ("cut", "is incomplete: its run ended while it was being saved"),
    ],
)
def test_what_holds_no_checkpoint_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut" / "weights").mkdir(parents=True)
    with pytest.raises(UserError) as refused:
        find_checkpoint(tmp_path / name)
    assert message in str(refused.value)


@pytest.mark.parametrize("target", ["nothing", "empty"])
def test_a_new_folder_replaces_no_link(target: str, tmp_path: Path) -> None:
    """It is refused before the work, not when the folder is renamed."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match="out is a symbolic link"), new_folder(tmp_path / "out"):
        pytest.fail("the block must not begin")
