"""Saved, pruned, removed: which checkpoints are complete at each moment, and after a crash."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_megacpp.checkpoint import lifecycle, manifest
from nemo_megacpp.checkpoint.folder import (
    is_complete_checkpoint,
    newest_checkpoint,
    saved_checkpoints,
)
from nemo_megacpp.checkpoint.identity import read_identity, write_identity
from nemo_megacpp.checkpoint.lifecycle import (
    begin_checkpoint,
    clear_leftovers,
    finish_checkpoint,
    prune,
    remove_checkpoint,
    set_damaged_aside,
)
from nemo_megacpp.errors import UserError

IDENTITY = {"model": {}, "tokenizer": "a" * 64}


def written(folder: Path, step: int) -> Path:
    """A checkpoint with weights and nothing else."""
    path = folder / f"step={step}"
    begin_checkpoint(path)
    (path / "weights").mkdir()
    (path / "weights" / "__0_0.distcp").write_bytes(bytes(1000))
    return path


def saved(folder: Path, step: int) -> Path:
    path = written(folder, step)
    finish_checkpoint(path, IDENTITY, step)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_counts_from_the_manifest_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, 20)
    assert not is_complete_checkpoint(path)

    def crash(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_manifest", crash)
        with pytest.raises(OSError, match="No space left"):
            finish_checkpoint(path, IDENTITY, 20)
    assert read_identity(path) is not None
    assert not is_complete_checkpoint(path), "its identity promises a manifest"
    assert newest_checkpoint(tmp_path) is None
    finish_checkpoint(path, IDENTITY, 20)
    assert newest_checkpoint(tmp_path) == path
    assert "contents verified" in manifest.check_manifest(path)


def test_one_that_no_longer_matches_is_skipped(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, 20), saved(tmp_path, 40)
    (newer / "weights" / "__0_0.distcp").write_bytes(bytes(999))
    for damage in ("has 999 bytes instead of 1,000", "has no manifest, and was saved with one"):
        assert newest_checkpoint(tmp_path) == older
        first, second = saved_checkpoints(tmp_path)
        assert (first, second[:2]) == ((20, older, None), (40, newer))
        assert damage in str(second.damage)
        (newer / manifest.FILE).unlink(missing_ok=True)


def test_damaged_ones_are_set_aside_and_their_steps_saved_again(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, 20), saved(tmp_path, 40)
    for attempt in ("step=40.damaged", "step=40.2.damaged"):
        # Names and sizes match: its contents were found damaged, so the run resumed step 20.
        (line,) = set_damaged_aside(tmp_path, 20)
        assert line == f"renamed the damaged checkpoint {newer} to {attempt}"
        assert [found.path for found in saved_checkpoints(tmp_path)] == [older]
        assert saved(tmp_path, 40) == newer
    assert set_damaged_aside(tmp_path, 40) == []
    assert names(tmp_path) == ["step=20", "step=40", "step=40.2.damaged", "step=40.damaged"]


def test_one_without_the_promise_of_a_manifest_counts(tmp_path: Path) -> None:
    path = written(tmp_path, 20)
    write_identity(path, IDENTITY, 20)
    assert newest_checkpoint(tmp_path) == path


def test_a_half_saved_one_is_begun_anew_and_a_whole_one_never(tmp_path: Path) -> None:
    path = written(tmp_path, 20)
    begin_checkpoint(path)
    assert names(tmp_path) == ["step=20"]
    assert names(path) == []
    whole = saved(tmp_path, 40)
    with pytest.raises(UserError, match="exists already, and a run that resumed"):
        begin_checkpoint(whole)
    assert is_complete_checkpoint(whole)


def test_a_removal_that_is_cut_short_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = saved(tmp_path, 20), saved(tmp_path, 40)

    def crash(path: Path) -> None:
        (path / "weights" / "__0_0.distcp").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle.shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(newer)
    assert newest_checkpoint(tmp_path) == older
    saved(tmp_path, 40)
    remove_checkpoint(newer)  # the remains of the first time are in its way
    assert names(tmp_path) == ["step=20"]


# --- retention


def kept(folder: Path, *steps: int, last: int, every: int | None = None) -> list[int]:
    """Save ``steps`` one after the other, pruning each time; return what is there then."""
    for step in steps:
        prune(folder, saved(folder, step), last, every)
    return sorted(int(name.removeprefix("step=")) for name in names(folder))


def test_the_last_n_are_kept(tmp_path: Path) -> None:
    assert kept(tmp_path, 20, 40, 60, 80, last=2) == [60, 80]


def test_the_last_one_is_kept(tmp_path: Path) -> None:
    assert kept(tmp_path, 20, 40, last=1) == [40]


def test_every_kth_step_is_kept_besides(tmp_path: Path) -> None:
    assert kept(tmp_path, *range(20, 220, 20), last=2, every=60) == [60, 120, 180, 200]


def test_nothing_goes_before_the_new_one_is_whole(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, 20), written(tmp_path, 40)
    assert prune(tmp_path, newer, 1) == []
    assert is_complete_checkpoint(older)
    finish_checkpoint(newer, IDENTITY, 40)
    (newer / "weights" / "__0_0.distcp").write_bytes(b"")
    assert prune(tmp_path, newer, 1) == []
    assert is_complete_checkpoint(older)


def test_damaged_ones_and_strangers_neither_count_nor_go(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        saved(tmp_path, step)
    (tmp_path / "step=40" / "weights" / "__0_0.distcp").write_bytes(b"")
    (tmp_path / "mine").mkdir()
    assert prune(tmp_path, saved(tmp_path, 80), 2) == [tmp_path / "step=20"]
    assert names(tmp_path) == ["mine", "step=40", "step=60", "step=80"]


def test_what_was_saved_last_stays_though_its_step_is_lower(tmp_path: Path) -> None:
    """A run that goes on from an earlier checkpoint, in the folder of a longer one."""
    saved(tmp_path, 100)
    assert kept(tmp_path, 20, 40, last=1) == [40, 100]


# --- after a crash


def test_leftovers_are_cleared_with_a_line_each(tmp_path: Path) -> None:
    good = saved(tmp_path, 20)
    (tmp_path / "step=20-unfinished").touch()  # killed between the manifest and NeMo's mark
    half = written(tmp_path, 40)
    (tmp_path / "step=40-unfinished").touch()
    (tmp_path / "step=60-unfinished").touch()  # killed before the folder
    going = tmp_path / "step=10.deleting"
    shutil.copytree(good, going)
    (tmp_path / "mine").mkdir()
    assert clear_leftovers(tmp_path) == [
        f"removed {going}: a run ended while it was being removed",
        f"removed {half}: a run ended while it was being saved",
    ]
    assert names(tmp_path) == ["mine", "step=20"]
    assert "contents verified" in manifest.check_manifest(good)
    assert clear_leftovers(tmp_path) == []
    assert clear_leftovers(tmp_path / "nowhere") == []
