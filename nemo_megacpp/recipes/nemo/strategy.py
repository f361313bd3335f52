"""NeMo's Megatron strategy on whatever host there is."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import re
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from nemo.lightning import MegatronStrategy, megatron_init
from nemo.lightning.io.pl import MegatronCheckpointIO

from nemo_megacpp.checkpoint.backends import fit_to_checkpoint
from nemo_megacpp.checkpoint.folder import find_weights
from nemo_megacpp.checkpoint.guard import guard_load
from nemo_megacpp.checkpoint.safe_pickle import read_metadata
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.nemo.checkpoint_io import AsyncCheckpointIO
from nemo_megacpp.recipes.nemo.stops import told
from nemo_megacpp.runtime.host import ensure_host
from nemo_megacpp.runtime.orphans import bind_helpers

_NON_FINITE = re.compile(r"^Rank (\d+), .*found (NaN|Inf) in local grad norm", re.DOTALL)
"""How Megatron's ``check_for_nan_in_grad`` puts it (``rerun_state_machine.py``)."""


class AcrossBackends(_WrappingCheckpointIO):
    """Asks a checkpoint for what it has, whichever backend wrote it."""

    def load_checkpoint(
        self, path: Any, sharded_state_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        fit_to_checkpoint(sharded_state_dict, read_metadata(find_weights(Path(path))))
        return self.checkpoint_io.load_checkpoint(
            path, sharded_state_dict=sharded_state_dict, **kwargs
        )


class HybridStrategy(MegatronStrategy):
    """``MegatronStrategy`` that prepares its process first.

    However the run was started (our launcher, torchrun, NeMo's command line, a NeMo-Run executor),
    every rank builds its strategy before it touches a device, so this is where the no-GPU host is
    put in place when there is no GPU.

    Args:
        seed: of the weights and of dropout; NeMo's own is fixed.
        kwargs: of ``MegatronStrategy``.
    """

    def __init__(self, seed: int = 1234, **kwargs: Any):
        ensure_host(nemo=True)
        super().__init__(**kwargs)
        self.seed = seed
        if self.async_save:
            self.checkpoint_io = AsyncCheckpointIO(
                MegatronCheckpointIO(
                    save_ckpt_format=self.save_ckpt_format,
                    load_directly_on_device=self.load_directly_on_device,
                    async_save=True,
                    torch_dist_multiproc=self.torch_dist_multiproc,
                    assume_constant_structure=self.assume_constant_structure,
                    parallel_save=self.parallel_save,
                    parallel_save_within_dp=self.parallel_save_within_dp,
                    parallel_load=self.parallel_load,
                )
            )

    def setup_distributed(self) -> None:
        """Start the process groups, then seed this rank."""
        bind_helpers()
        super().setup_distributed()
        megatron_init._set_random_seed(self.seed)

    def load_checkpoint(
        self, checkpoint_path: str | Path, selective_restore: bool = False
    ) -> dict[str, Any]:
        """Load a checkpoint of any backend, once its pickles are known to run nothing.

        Its bytes were compared with its manifest before the ranks were started.
        """
        guard_load(Path(checkpoint_path), verify=False)
        usual = self.checkpoint_io  # type: ignore[has-type]
        self.checkpoint_io = AcrossBackends(usual)
        try:
            return super().load_checkpoint(checkpoint_path, selective_restore)
        finally:
            self.checkpoint_io = usual

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step of training.

        Raises:
            UserError: the gradient is not finite on this rank; nothing was updated.
        """
        try:
            return super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if (found := _NON_FINITE.match(str(error))) is None:
                raise
            step, (rank, value) = self.trainer.global_step + 1, found.groups()
            raise UserError(told(step, f"the gradient is {value} on rank {rank}")) from None
