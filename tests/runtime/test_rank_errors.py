"""The exception of a rank, with the line of the user's own code."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.rank_errors import describe_tracebacks


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
