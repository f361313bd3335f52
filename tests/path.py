"""What takes the steps of the tests' proofs: NeMo's trainer, or Megatron-Core alone without NeMo.

The tests of parity, of settings and of resharding are the same on both; the newest Megatron-Core
has no NeMo (``make test-core-new``).
"""

from __future__ import annotations

from nemo_megacpp.nemo.versions import describe_mismatch

NO_NEMO = describe_mismatch()
"""Why NeMo is not there, None if it is."""

if NO_NEMO is None:
    from nemo_megacpp.nemo.proof_run import (
        NEMO as PATH,
    )
    from nemo_megacpp.nemo.proof_run import (
        resume_and_train,
        run_step,
        train_and_save,
    )

    LOADS_OPTIMIZER = "nemo_megacpp.nemo.hybrid_optimizer"
else:
    from nemo_megacpp.proof.core_run import (
        CORE as PATH,
    )
    from nemo_megacpp.proof.core_run import (
        resume_and_train,
        run_step,
        train_and_save,
    )

    LOADS_OPTIMIZER = "nemo_megacpp.checkpoint.training_state"

__all__ = [
    "LOADS_OPTIMIZER",
    "NO_NEMO",
    "PATH",
    "resume_and_train",
    "run_step",
    "train_and_save",
]
