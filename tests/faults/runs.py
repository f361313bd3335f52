"""Faults in real runs of ``nemo-megacpp train`` on two ranks: killed, stopped, started twice."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import psutil

from nemo_megacpp.checkpoint.folder import complete_checkpoints
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.errors import UserError
from tests.faults.conftest import Run, train_command
from tests.faults.judge import Outcome, unruly_text
from tests.faults.kinds import Kind, Site
from tests.faults.workplace import Workplace

_STEPS = 8
_QUIET = 0.3
"""Minutes without a sign of life after which a run ends."""
_PATIENCE = 240.0
_losses: dict[Path, dict[int, float]] = {}


def _start(place: Workplace, folder: Path, name: str, *overrides: str) -> Run:
    return Run(
        folder / "run",
        folder / f"{name}.log",
        train_command(folder / "run", place.data.root, f"max_steps={_STEPS}", *overrides),
    )


def _undisturbed(place: Workplace) -> dict[int, float]:
    """Return the losses of a run that nothing happens to; found once."""
    if place.root not in _losses:
        with place.own_folder() as folder:
            run = _start(place, folder, "whole")
            assert run.end() == 0, run.output
            _losses[place.root] = run.losses()
    return _losses[place.root]


def _resume(site: Site, outcome: Outcome) -> None:
    """What is complete is whole, and a resumed run repeats the undisturbed one bit for bit."""
    for _, path in complete_checkpoints(site.folder / "run" / "checkpoints"):
        try:
            if "contents verified" not in check_manifest(path):
                outcome.wrong.append(f"{path.name} counts without a manifest")
        except UserError as error:
            outcome.wrong.append(f"{path.name} counts and is damaged: {error}")
    whole = _undisturbed(site.place)
    run = _start(site.place, site.folder, "resumed", "resume=auto")
    code = run.end()
    # A kill may come after the last save: nothing is left to train then.
    if code != 0 and not (code == 2 and "The run is complete" in run.output):
        outcome.wrong.append(f"resume=auto ends with {code}: {run.output[-500:]}")
    outcome.wrong += unruly_text("the resumed run", run.output)
    losses = run.losses()
    if different := [step for step in whole if losses.get(step) != whole[step]]:
        outcome.wrong.append(f"other losses than an undisturbed run's in steps {different}")


def _strike(draw: random.Random, run: Run) -> tuple[str, list[psutil.Process]]:
    """Wait for a random moment of a run; return its name and a victim or all of them."""
    step = draw.randint(0, _STEPS - 1)
    give_up = time.monotonic() + _PATIENCE
    while run.process.poll() is None and time.monotonic() < give_up:
        if max(run.losses(), default=0) >= step:
            break
        time.sleep(0.005)
    pause = draw.uniform(0, 15 if step == 0 else 1)
    time.sleep(pause)
    who = draw.choice(("rank 0", "rank 1", "the ranks", "the launcher", "all"))
    moment = f"{who}, {pause:.2f} s after step {step}"
    if run.process.poll() is not None:
        return moment, []
    launcher = psutil.Process(run.process.pid)
    ranks = [
        process
        for process in launcher.children()
        if "nemo_megacpp.nemo.worker" in " ".join(process.cmdline())
    ]
    by_rank = {f"rank {process.environ().get('RANK')}": process for process in ranks}
    victims = {"the ranks": ranks, "the launcher": [launcher], "all": [launcher, *ranks]}
    return moment, victims.get(who) or [by_rank[who]] if by_rank else [launcher]


def _send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _end(run: Run, outcome: Outcome, codes: tuple[int, ...], seconds: float) -> None:
    """Wait for the end of a run, and judge it."""
    try:
        code = run.process.wait(seconds)
        if code not in codes:
            outcome.wrong.append(f"exit code {code}: {run.output[-500:]}")
    except Exception:
        outcome.wrong.append(f"hangs: it still ran after {seconds:.0f} s")
        _send(run.processes(), signal.SIGKILL)
    outcome.wrong += unruly_text("the run", run.output)
    outcome.said = run.output.strip().rpartition("\n")[2][-500:]
    if left := run.left_behind():
        outcome.wrong.append(f"processes left: {left}")
        _send(run.processes(), signal.SIGKILL)


def _kill(draw: random.Random, site: Site) -> Outcome:
    number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    run = _start(site.place, site.folder, "killed")
    moment, victims = _strike(draw, run)
    _send(victims, number)
    outcome = Outcome(f"{number.name} to {moment}", "survived")
    outcome.moment = f"{number.name} to {moment.partition(',')[0]}"
    _end(run, outcome, (0, 1, -number), _PATIENCE)
    _resume(site, outcome)
    return outcome


def _stop(draw: random.Random, site: Site) -> Outcome:
    limits = (f"heartbeat_timeout_minutes={_QUIET}", "init_timeout_minutes=1")
    run = _start(site.place, site.folder, "stopped", *limits)
    while run.process.poll() is None and not run.losses():
        time.sleep(0.01)
    pause = draw.uniform(0, 2)
    time.sleep(pause)
    rank = draw.randrange(2)
    outcome = Outcome(f"SIGSTOP to rank {rank}, {pause:.2f} s after the first step", "survived")
    if run.process.poll() is None:
        _send([run.rank(rank)], signal.SIGSTOP)
        outcome.moment = f"SIGSTOP to rank {rank}"
    _end(run, outcome, (1, 0), 60 * (1 + _QUIET) + 60)
    if run.process.returncode == 1 and f"ank {rank}" not in run.output:
        outcome.wrong.append(f"the message does not name rank {rank}")
    _resume(site, outcome)
    return outcome


def _twice(draw: random.Random, site: Site) -> Outcome:
    pause = draw.uniform(0, 20)
    first = _start(site.place, site.folder, "first", "resume=auto")
    time.sleep(pause)
    second = _start(site.place, site.folder, "second", "resume=auto")
    outcome = Outcome(f"two runs in one folder, {pause:.1f} s apart", "survived")
    codes = second.process.wait(_PATIENCE), first.process.wait(_PATIENCE)
    outcome.wrong += unruly_text("the second", second.output)
    outcome.moment = f"exit codes {codes[1]} and {codes[0]}"
    if sorted(codes) != [0, 2]:
        outcome.wrong.append(f"exit codes {codes}: {second.output[-300:]}")
    _resume(site, outcome)
    return outcome


KINDS = (
    Kind("kill-run", "ranks, launcher or all of a run killed at random moments", _kill, heavy=True),
    Kind("stop-run", "a rank of a run stopped, as by a stuck driver", _stop, heavy=True),
    Kind("two-runs", "a second run started in the folder of a first", _twice, heavy=True),
)
