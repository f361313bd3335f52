"""One rank of a run through Bridge: builds its configuration from a resolved recipe, and trains."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path

from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.runs.non_finite import non_finite_gradient
from nemo_megacpp.runs.rank_program import begin_rank, run_rank
from nemo_megacpp.runtime import heartbeat
from nemo_megacpp.runtime.imports import importing
from nemo_megacpp.runtime.launch import launched
from nemo_megacpp.runtime.orphans import bind_helpers


def run_recipe(recipe: Recipe, run_dir: Path, devices: int) -> None:
    """Train ``recipe`` as the rank that the launcher made this process.

    Args:
        recipe: resolved and checked.
        run_dir: where the run writes.
        devices: ranks on this node.
    """
    begin_rank(recipe, run_dir)
    training = recipe.training
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
    sigterm = StopOnSigterm(run_dir)
    recorder = RunRecorder(run_dir, training.log_interval, recipe.resume, sigterm)
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
    except (Exception, KeyboardInterrupt) as error:
        found = isinstance(error, RuntimeError) and non_finite_gradient(recorder.step + 1, error)
        if recorder.begun:
            recorder.fail(found or error)
            if isinstance(error, KeyboardInterrupt):
                sys.exit(128 + signal.SIGINT)
        if found:
            raise found from None
        raise
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


if __name__ == "__main__":
    run_rank(run_recipe)
