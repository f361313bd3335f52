"""Faults in real runs of ``nemo-megacpp train``; after each the newest checkpoint is good."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_megacpp.checkpoint.folder import complete_checkpoints, newest_checkpoint
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.runs.events import read_events
from tests.faults.conftest import Run

pytestmark = pytest.mark.processes

Start = Callable[..., Run]


def newest_step(run: Run) -> int:
    """The newest checkpoint's step; all that count are whole, to the last byte."""
    for _, path in complete_checkpoints(run.run_dir / "checkpoints"):
        assert "contents verified" in check_manifest(path)
    newest = newest_checkpoint(run.run_dir / "checkpoints")
    assert newest is not None
    return int(newest.name.removeprefix("step="))


@pytest.fixture(scope="module")
def stopped(start: Start) -> Run:
    """A run that saves in the background, and gets SIGTERM twice in mid-training."""
    run = start("stopped", "async_save=true", "keep_latest=2")
    run.wait_until(lambda: len(run.losses()) >= 6)
    run.process.send_signal(signal.SIGTERM)
    run.wait_until(lambda: "SIGTERM: saving" in run.output)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0, run.output
    return run


@pytest.mark.slow
def test_sigterm_saves_and_exits_0(stopped: Run) -> None:
    last = max(stopped.losses())
    assert last < 1000
    assert newest_step(stopped) == last
    lines = stopped.output.splitlines()
    assert lines[-1] == "stopped by SIGTERM; resume it with resume=auto"
    assert f"step {last:>5}  saved {stopped.run_dir / 'checkpoints' / f'step={last}'}" in lines
    assert not stopped.left_behind()


@pytest.mark.slow
def test_what_was_saved_in_the_background_is_what_was_kept(stopped: Run) -> None:
    """The last two, one line for each removal, and nothing half-done beside them."""
    found = sorted(path.name for path in (stopped.run_dir / "checkpoints").iterdir())
    steps = [line.split()[1] for line in stopped.output.splitlines() if "  saved " in line]
    assert found == sorted(f"step={step}" for step in steps[-2:])
    assert stopped.output.count("removed ") == len(steps) - 2


@pytest.fixture(scope="module")
def resumed(start: Start, stopped: Run) -> Run:
    """Goes on, under torchrun, from what was saved in the background while steps went on.

    It gets SIGTERM in the middle of an evaluation that would take hours.
    """
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--shutdown-timeout=300")
    _, older = complete_checkpoints(stopped.run_dir / "checkpoints")[0]
    hours = ("val_check_interval=4", "limit_val_batches=20000")
    run = start("resumed", f"resume={older}", *hours, launcher=torchrun)
    run.wait_until(lambda: run.losses() and max(run.losses()) % 4 == 0)
    run.process.send_signal(signal.SIGTERM)
    run.end()  # torchrun's own exit code says that it got a signal
    return run


@pytest.mark.slow
def test_a_resume_repeats_the_steps_bit_for_bit(stopped: Run, resumed: Run) -> None:
    """As it would from a checkpoint for which the training had waited."""
    both = stopped.losses().keys() & resumed.losses().keys()
    assert both
    assert {step: resumed.losses()[step] for step in both} == {
        step: stopped.losses()[step] for step in both
    }


@pytest.mark.slow
def test_sigterm_under_torchrun_saves(resumed: Run) -> None:
    assert newest_step(resumed) == max(resumed.losses())
    assert "stopped by SIGTERM" in resumed.output
    assert "held-out loss" not in resumed.output, "a part of an evaluation is none"
    assert not resumed.left_behind()


@pytest.fixture(scope="module")
def killed(start: Start, resumed: Run) -> tuple[Run, int]:
    """Goes on from the newest; rank 1 is killed while the second checkpoint is being saved."""
    before = newest_step(resumed)
    run = start("resumed", "resume=auto")
    folder = run.run_dir / "checkpoints"
    run.wait_until(lambda: newest_checkpoint(folder) != folder / f"step={before}")
    rank, saved = run.rank(1), newest_step(run)
    run.wait_until(lambda: (folder / f"step={saved + 2}-unfinished").exists())
    rank.kill()
    assert run.end() == 1, run.output
    return run, saved


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_harms_nothing(killed: tuple[Run, int]) -> None:
    run, saved = killed
    assert "Rank 1 ended with exit code -9" in run.output
    assert newest_step(run) == saved
    assert not run.left_behind()


@pytest.mark.slow
def test_a_full_disk_is_one_line(start: Start, killed: tuple[Run, int]) -> None:
    """Files may not grow beyond 64 KiB here: as on a full disk, the writers' ``write`` fails."""
    saved = killed[1]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    run = start("resumed", "resume=auto", preexec_fn=limit)
    assert run.end() == 2, run.output
    assert "a run ended while it was being saved" in run.output, "left by the killed run"
    said = run.output.splitlines()[-1]
    assert said.startswith("The checkpoint ")
    # Which of a checkpoint's files meets the limit first differs from run to run.
    assert "File too large" in said or "a limit on file sizes" in said
    assert said.endswith("Earlier checkpoints are unchanged.")
    assert "Traceback" not in run.output
    assert newest_step(run) == saved
    assert not run.left_behind()


@pytest.mark.slow
def test_an_interrupt_says_what_is_lost_and_how_to_keep_it(start: Start) -> None:
    """Ctrl-C, which a terminal sends to every process of the command."""
    run = start("interrupted", "save_interval=4", start_new_session=True)
    run.wait_until(lambda: run.losses() and max(run.losses()) >= 6)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == 130, run.output
    said = run.output.splitlines()[-1]
    step, saved = int(said.removeprefix("Interrupted at step ").partition(".")[0]), newest_step(run)
    assert step >= max(run.losses()) > saved
    assert f"Steps lost since the checkpoint of step {saved}: {step - saved}." in said
    assert f"repeat the command with resume=auto run_dir={run.run_dir}." in said
    assert f"send SIGTERM (here: kill {run.process.pid}) instead of Ctrl-C" in said
    assert "Traceback" not in run.output and "most recent call" not in run.output
    assert read_events(run.run_dir)[-1].kind == "failed"
    assert not run.left_behind()


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused(start: Start) -> None:
    """As a job that was submitted twice; the first goes on, and its end frees the folder."""
    settings = ("resume=auto", "save_interval=1000")
    one = start("twice", *settings)
    one.wait_until(lambda: one.losses())
    two = start("twice", *settings)
    assert two.end() == 2, two.output
    said = two.output.splitlines()[-1]
    assert f"Another run writes to {one.run_dir}: PID {one.process.pid} on " in said
    assert not two.left_behind()
    one.process.kill()  # its ranks end with it, and its lock is nobody's
    one.end()
    assert not one.left_behind()
    again = start("twice", *settings, "max_steps=4", "warmup_steps=1")
    assert again.end() == 0, again.output


@pytest.mark.slow
def test_nan_ends_the_run_before_it_saves(start: Start) -> None:
    run = start("diverged", "lr=1e30", "warmup_steps=1", "save_interval=1")
    assert run.end() == 2, run.output
    said = run.output.splitlines()[-1]
    assert "Traceback" not in run.output
    step = int(said.removeprefix("Step ").partition(":")[0])
    assert "The run stops and saves nothing of this step" in said
    assert newest_step(run) == max(run.losses()) == step - 1
    assert not run.left_behind()


def test_a_read_only_folder_is_refused_at_once(start: Start, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    run = start("unwritable", f"run_dir={tmp_path / 'run'}", preexec_fn=_bind_to_permissions)
    assert run.end() == 2, run.output
    assert f"run_dir={tmp_path / 'run'} cannot be written: {tmp_path} is read-only." in run.output
    assert not list(tmp_path.iterdir())


def _bind_to_permissions() -> None:
    """Root writes where it may not: give up that capability for the program started next."""
    import ctypes
    import os

    drop_from_bounding_set, dac_override = 24, 1
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0) == 0
