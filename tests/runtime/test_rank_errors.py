"""The exception of a rank, with the line of the user's own code."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.rank_errors import describe_tracebacks, read_error, record_failure


def _written(path: Path, text: str) -> ModuleType:
    path.write_text(text)
    module = ModuleType(path.stem)
    exec(compile(text, str(path), "exec"), vars(module))
    return module


def _text(function: object, *args: object) -> str:
    with pytest.raises(Exception) as error:
        function(*args)  # type: ignore[operator]
    return "".join(traceback.format_exception(error.value))


def test_the_innermost_frame_of_the_user(tmp_path: Path) -> None:
    user = _written(
        tmp_path / "family.py",
        "import torch\n\ndef outer(x):\n    return inner(x)\n\ndef inner(x):\n"
        "    return torch.nn.functional.linear(x, x.T[1:])\n",
    )
    first = _text(user.outer, torch.ones(2, 3))
    second = _text(user.outer, None)
    found = describe_tracebacks(f"rank 1: {first}\nrank 0: {second}")
    assert found.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert found.endswith(f"({tmp_path / 'family.py'}, line 7, in inner)")


def test_a_rank_that_lost_the_others_is_not_the_cause(tmp_path: Path) -> None:
    user = _written(tmp_path / "family.py", "def f():\n    raise KeyError('x')\n")
    lost = "rank 0: Traceback (most recent call last):\nRuntimeError: Connection closed by peer"
    assert describe_tracebacks(f"{lost}\nrank 1: {_text(user.f)}") == (
        f"KeyError: 'x' ({tmp_path / 'family.py'}, line 2, in f)"
    )


def test_a_refusal_of_ours_has_no_place() -> None:
    text = _text(ParallelLayout.parse, "tp=none")
    ours = text.replace(str(Path(__file__)), str(Path(torch.__file__)))
    assert describe_tracebacks(f"rank 0: {ours}") == (
        "nemo_megacpp.errors.UserError: tp must be a positive whole number; got 'none'."
    )
    assert describe_tracebacks("rank 0: the process died") == "rank 0: the process died"


def test_an_error_file_that_cannot_be_written_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception itself is raised; half a file counts as none."""

    def fail() -> None:
        raise UserError("lr is too high")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "missing" / "0.json"))
    with pytest.raises(UserError, match="lr is too high"):
        record_failure(fail)()
    file = tmp_path / "1.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(UserError):
        record_failure(fail)()
    error = read_error(file, 1)
    assert error is not None
    assert (error.rank, error.message, error.user_error) == (1, "lr is too high", True)
    file.write_text(file.read_text()[:20])
    assert read_error(file, 1) is None
    assert read_error(tmp_path / "2.json", 2) is None
