"""What NeMo 2.7.3 needs beyond :mod:`cpu_megatron` to run without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _keep_devices(checkpoint: dict) -> dict:
    """Stock form asserts that CUDA is initialised, to move CUDA tensors; there are none here."""
    return checkpoint


def _seed_tracker_too(set_random_seed: Callable[[int], None]) -> Callable[[int], None]:
    """Stock form seeds Megatron's random-state tracker only with a GPU; layers fork it."""

    def seeded(seed: int) -> None:
        from megatron.core import parallel_state, tensor_parallel

        set_random_seed(seed)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * stage)

    return seeded


def install() -> None:
    """Install the replacements. Called once, by :func:`nemo_megacpp.runtime.host.ensure_host`."""
    from nemo.lightning import megatron_init
    from nemo.lightning.io import pl

    io: Any = pl
    io._fix_tensors_device = _keep_devices
    start: Any = megatron_init
    start._set_random_seed = _seed_tracker_too(start._set_random_seed)
