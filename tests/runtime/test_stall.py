"""Which rank a stalled job is said to wait for."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed

from nemo_megacpp.runtime.places import Place, describe_place, main_thread_stack, waits
from nemo_megacpp.runtime.stall import Beat, judge, write_stacks

_C10D = torch.distributed.distributed_c10d.__file__
_MEGATRON = Place(__import__("megatron.core").core.__file__, 3, "reduce")
_WAITING = [Place("/home/me/train.py", 1, "main"), _MEGATRON, Place(_C10D, 9, "all_reduce")]
_USER = [Place("/home/me/family.py", 7, "Family.forward")]
_STACKS = Path("run/logs/stacks.txt")


def _beat(stack: list[Place], still: float = 9.0, progress: int = 4, **fields: object) -> Beat:
    return Beat(1, progress, "step 2", 5.0, still, stack, **fields)  # type: ignore[arg-type]


def _judge(*beats: Beat | None, dead: tuple[int, ...] = ()) -> str:
    return judge(dict(enumerate(beats)), dead, 8.0, "limit=1", _STACKS)[0]


def test_the_rank_that_waits_for_no_other_is_the_cause() -> None:
    message = _judge(_beat(_WAITING), _beat(_USER), _beat(_WAITING))
    assert message == (
        "Rank 1 made no progress for 9 s. Rank 1 is in step 2, at Family.forward "
        "(/home/me/family.py, line 7). Ranks 0, 2 wait in step 2, at all_reduce, called by reduce "
        f"({_MEGATRON.file}, line 3), called by main (/home/me/train.py, line 1). The job was "
        f"ended (limit=1).\nStacks of all ranks: {_STACKS}"
    )


def test_of_two_the_one_behind_is_the_cause() -> None:
    message = _judge(_beat(_USER, progress=5), _beat(_USER, progress=4))
    assert message.startswith("Rank 1 made no progress")


def test_a_rank_that_does_not_respond_comes_first() -> None:
    message = _judge(_beat(_USER), None, _beat(_WAITING), dead=(1,))
    assert message.startswith("Rank 1 has not responded since the start, 8 s ago. ")


def test_many_dead_ranks_fit_a_screen() -> None:
    beats = [_beat(_WAITING, host=f"node{rank // 8} x") for rank in range(1000)]
    message = _judge(*beats, dead=tuple(range(8, 990)))
    assert "978 other ranks have not responded either." in message
    assert len(message) < 2500


def test_a_rank_that_left_is_the_cause_of_those_that_wait() -> None:
    message = _judge(_beat(_WAITING), _beat([], ended=True))
    assert message.startswith("Rank 1 left the run; the others wait. Rank 0 waits in step 2")


def test_a_rank_within_its_limit_keeps_the_job() -> None:
    """Others wait while it saves."""
    assert not _beat(_USER, still=4.0).is_stalled
    assert _beat(_USER, still=5.0).is_stalled
    assert _beat([], still=0.0, ended=True).is_stalled


def test_a_beat_survives_the_store() -> None:
    beat = _beat(_USER)
    assert Beat.from_json(beat.to_json().encode()) == beat
    process = beat.process()
    assert process is not None and process.pid == os.getpid()
    beat.created -= 100  # another process that got the same number
    assert beat.process() is None


def test_stacks_are_written_as_python_prints_them(tmp_path: Path) -> None:
    beat = _beat(main_thread_stack(), asked=True)
    write_stacks({0: beat, 1: None}, tmp_path / "logs" / "stacks.txt")
    text = (tmp_path / "logs" / "stacks.txt").read_text()
    assert f"rank 0: process {os.getpid()} on " in text
    assert "rank 1: never responded" in text
    assert f'File "{__file__}", line' in text
    assert "beat = _beat(main_thread_stack(), asked=True)" in text


def test_a_place_names_the_users_code() -> None:
    stack = main_thread_stack()
    assert not waits(stack)
    assert "test_a_place_names_the_users_code" in describe_place(stack)
    assert describe_place([]) == "an unknown place"
