"""One rank of a run through Bridge: builds its configuration from a resolved recipe, and trains."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from pathlib import Path

from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.runs.heartbeat_start import start_heartbeats
from nemo_megacpp.runs.non_finite import non_finite
from nemo_megacpp.runtime import heartbeat, stopping
from nemo_megacpp.runtime.imports import importing
from nemo_megacpp.runtime.launch import launched
from nemo_megacpp.runtime.orphans import bind_helpers, end_with_parent
from nemo_megacpp.runtime.rank_errors import record_failure

_NON_FINITE = re.compile(r"^Rank (\d+), .*found (NaN|Inf) in local grad norm", re.DOTALL)
"""The message of Megatron's ``check_for_nan_in_grad`` (``rerun_state_machine.py``)."""


def run_recipe(recipe: Recipe, run_dir: Path, devices: int) -> None:
    """Train ``recipe`` as the rank that the launcher made this process.

    Args:
        recipe: resolved and checked.
        run_dir: where the run writes.
        devices: ranks on this node.
    """
    stopping.listen()
    training = recipe.training
    if training.heartbeat_timeout_minutes is not None:
        start_heartbeats(run_dir, training.heartbeat_timeout_minutes, training.init_timeout_minutes)
    from nemo_megacpp.bridge.terminal import keep_library_output
    from nemo_megacpp.runtime.host import ensure_host

    keep_library_output(run_dir)
    ensure_host(bridge=True)
    _say_what_is_supplied()
    bind_helpers()
    with importing(), contextlib.redirect_stderr(sys.stdout):  # the run's log
        from megatron.bridge.training.pretrain import pretrain

        from nemo_megacpp.bridge.callbacks import Heartbeats, RunRecorder, StopOnSigterm
        from nemo_megacpp.bridge.config import to_config
        from nemo_megacpp.bridge.forward_step import hybrid_forward_step
    config = to_config(recipe, run_dir)
    recorder = RunRecorder(run_dir, training.log_interval, recipe.resume)
    sigterm = StopOnSigterm(run_dir)
    callbacks = [recorder, sigterm]
    if training.heartbeat_timeout_minutes is not None:
        callbacks.append(
            Heartbeats(training.heartbeat_timeout_minutes, training.init_timeout_minutes)
        )
    try:
        pretrain(config, hybrid_forward_step, callbacks)
    except SystemExit as end:  # how Bridge's loop ends before its last step
        if end.code:
            raise
    except RuntimeError as error:
        if (found := _NON_FINITE.match(str(error))) is None:
            raise
        rank, value = found.groups()
        raise non_finite(recorder.step + 1, f"the gradient is {value} on rank {rank}") from None
    finally:
        heartbeat.stop()
    recorder.finish(training.max_steps)
    sigterm.finish()


def _say_what_is_supplied() -> None:
    """Name the libraries that Bridge's package imports and that the no-GPU host stands in for."""
    from nemo_megacpp.bridge.terminal import tell
    from nemo_megacpp.runtime.host import supplied_libraries

    place, absent = launched(), supplied_libraries()
    if absent and (place is None or place.rank == 0):
        tell(f"no-GPU host: Bridge imports {', '.join(absent)} as empty modules; no step uses them")


def main() -> None:
    """Entry point of a rank: ``worker RECIPE.yaml RUN_DIR LAUNCHER``, whose process id that is."""
    end_with_parent(int(sys.argv[3]))
    try:
        record_failure(_run_rank)()
    except UserError:
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _run_rank() -> None:
    place = launched()
    assert place is not None, "a rank is started by a launcher"
    with importing():  # Megatron, for the names of its settings
        recipe = resolve(sys.argv[1])
    run_recipe(recipe, Path(sys.argv[2]), place.local_world_size)


if __name__ == "__main__":
    main()
