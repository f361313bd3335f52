"""What a task leaves behind in its process, undone before the next task of the same process.

Megatron and NeMo keep a job's state in their modules: process groups, random-state tracker,
auxiliary losses, the microbatch calculator. They expect one job per process and set most of it
once. :class:`CleanState` puts all of it back to what the first task found, with one exception that
no number depends on: the process groups of a layout, once created, are used again by the next task
that asks for the same layout.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from megatron.core.utils import GlobalMemoryBuffer

_AT_IMPORT: dict[str, dict[str, Callable[[], Any]]] = {
    "megatron.core.num_microbatches_calculator": {
        "_GLOBAL_NUM_MICROBATCHES_CALCULATOR": lambda: None
    },
    "megatron.core.rerun_state_machine": {"_GLOBAL_RERUN_STATE_MACHINE": lambda: None},
    "megatron.core.tensor_parallel.random": {
        "_CUDA_RNG_STATE_TRACKER": lambda: None,
        "_CUDA_RNG_STATE_TRACKER_INITIALIZED": lambda: False,
    },
    "megatron.core.transformer.moe.moe_utils": {"_MOE_LAYER_WISE_LOGGING_TRACKER": dict},
}
"""Variables of Megatron's modules, by module, and what makes the value that an import gives them.

A module that is not imported has nothing to undo."""


class CleanState:
    """The state of this process before its first task.

    Create it once per process, before the first task and after the process group. From then on,
    Megatron's ``initialize_model_parallel`` creates the groups of a layout only once.
    """

    def __init__(self) -> None:
        self._generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._no_groups = _group_variables()
        self._groups: dict[Any, dict[str, Any]] = {}
        self._initialize = parallel_state.initialize_model_parallel
        parallel_state.initialize_model_parallel = self._initialize_once
        parallel_state.destroy_model_parallel = self._leave_groups
        gc.collect()
        gc.freeze()  # so that collecting what a task leaves does not visit all imported modules

    def restore(self) -> None:
        """Undo what the last task has left in the process."""
        self._leave_groups()
        for module, variables in _AT_IMPORT.items():
            if module in sys.modules:
                vars(sys.modules[module]).update({k: make() for k, make in variables.items()})
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
        _forget_nemos_job()
        python, numpy, torchs = self._generators
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torchs)
        gc.collect()

    def _leave_groups(self) -> None:
        vars(parallel_state).update(self._no_groups)

    def _initialize_once(self, *args: Any, **kwargs: Any) -> None:
        """Stand in for ``initialize_model_parallel``, which always creates new groups."""
        # A task may start fake groups of its own, of which another world would know nothing.
        asked = torch.distributed.group.WORLD, args, tuple(sorted(kwargs.items()))
        if asked not in self._groups:
            self._initialize(*args, **kwargs)
            self._groups[asked] = _group_variables()
            return
        assert not parallel_state.model_parallel_is_initialized(), "initialized twice"
        vars(parallel_state).update(self._groups[asked])
        parallel_state._GLOBAL_MEMORY_BUFFER = GlobalMemoryBuffer()


def _group_variables() -> dict[str, Any]:
    """Return what Megatron knows of its process groups."""
    return {
        name: value.copy() if isinstance(value, (dict, list)) else value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and not name.startswith("__")
    }


def _forget_nemos_job() -> None:
    """NeMo keeps ranks and layout in a singleton, which has no way to be reset."""
    module = sys.modules.get("nemo.utils.app_state")
    if module is not None:
        instances = type(module.AppState)._Singleton__instances
        instances.pop(module.AppState, None)
