"""The built-in corpus: where it lies, and that it is prepared once."""

from __future__ import annotations

import fcntl
import json
import threading
from importlib.metadata import version
from pathlib import Path

import pytest

from nemo_megacpp.data import builtin
from nemo_megacpp.data.builtin import builtin_folder, ensure_builtin, torch_headers
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.data.staging import lock_file
from nemo_megacpp.errors import UserError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a small folder in the place of torch's headers."""
    headers = tmp_path / "include"
    headers.mkdir()
    for number in range(20):
        text = "".join(f"int function_{number}_{n}(int x);\n" for n in range(50))
        (headers / f"{number}.h").write_text(text)
    monkeypatch.setattr(builtin, "torch_headers", lambda: headers)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_one_folder_for_each_user_torch_and_vocabulary(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"torch-{version('torch')}-headers-2048"
    assert builtin_folder(2048) == cache / "nemo_megacpp" / name
    monkeypatch.setenv("HOME", "/home/someone")
    for value in ("", "relative"):  # such values are ignored, by the XDG standard
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert builtin_folder(2048) == Path("/home/someone/.cache/nemo_megacpp") / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert builtin_folder(2048) == Path("/home/someone/.cache/nemo_megacpp") / name


def test_headers_are_found() -> None:
    assert (torch_headers() / "torch").is_dir()


def test_it_is_prepared_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_builtin(300, progress=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(builtin, "torch_headers", lambda: pytest.fail("it was prepared again"))
    assert ensure_builtin(300, progress=False) == first
    assert first.root == builtin_folder(300)
    assert list(Path().iterdir()) == []


def test_one_of_an_older_version_is_made_again(cache: Path) -> None:
    folder = ensure_builtin(300, progress=False).root
    (folder / "checksums.json").unlink()
    manifest = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(manifest | {"version": 1}))
    assert ensure_builtin(300, progress=False).root == folder
    assert PreparedData.open(folder).tokens > 0


def test_a_process_waits_for_the_one_that_prepares(cache: Path) -> None:
    folder = builtin_folder(300)
    folder.parent.mkdir(parents=True)
    with (folder.parent / f".{folder.name}.once").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=ensure_builtin, args=(300, False), daemon=True)
        waiting.start()
        waiting.join(timeout=0.3)
        assert waiting.is_alive() and not folder.exists()
    waiting.join(timeout=60)
    assert folder.exists()


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("not a folder")
    message = rf"Cannot write the built-in corpus to {cache}.*Set XDG_CACHE_HOME to a folder"
    with pytest.raises(UserError, match=message):
        ensure_builtin(300, progress=False)


def test_a_vocabulary_that_is_too_large_writes_nothing(cache: Path) -> None:
    with pytest.raises(UserError, match=r"for a vocabulary of 32768, not of 32769"):
        ensure_builtin(builtin.MAX_VOCAB_SIZE + 1)
    assert not cache.exists()


def test_a_lock_that_its_holder_removed_is_not_shared(tmp_path: Path) -> None:
    path, excluded = tmp_path / "lock", threading.Event()

    def second() -> None:
        with lock_file(path), pytest.raises(BlockingIOError), lock_file(path, wait=False):
            pass
        excluded.set()

    with lock_file(path):
        waiting = threading.Thread(target=second, daemon=True)
        waiting.start()
        assert not excluded.wait(0.2)
        path.unlink()
    assert excluded.wait(10)
