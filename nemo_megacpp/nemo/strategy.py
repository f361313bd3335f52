"""NeMo's Megatron strategy, with or without a GPU, with exact resumption."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import logging
from pathlib import Path
from typing import Any, Literal, Union

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.lightning import MegatronStrategy, megatron_init
from nemo.lightning._strategy_lib import init_model_parallel
from nemo.lightning.io.pl import MegatronCheckpointIO, ckpt_to_weights_subdir

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.described import actual_layout, actual_model
from nemo_megacpp.checkpoint.folder import find_checkpoint
from nemo_megacpp.checkpoint.guard import guard_load
from nemo_megacpp.checkpoint.identity import validate_same_model
from nemo_megacpp.checkpoint.optimizer_state import content_metadata
from nemo_megacpp.checkpoint.random_state import (
    RandomState,
    load_random_state,
    random_state,
    set_random_state,
    sharded_random_state,
)
from nemo_megacpp.checkpoint.script_state import consumed_samples
from nemo_megacpp.errors import UserError
from nemo_megacpp.nemo.actual import (
    tokenizer_of,
    validate_actual,
    validate_run_steps_left,
    validate_training,
    validate_wrapper,
)
from nemo_megacpp.nemo.checkpointing import AcrossBackends, AsyncCheckpointIO
from nemo_megacpp.nemo.hybrid_optimizer import HybridOptimizer
from nemo_megacpp.nemo.recorded import Recorded
from nemo_megacpp.nemo.trainer_state import trainer_state
from nemo_megacpp.preflight.resume import validate_optimizer_state
from nemo_megacpp.runs.non_finite import non_finite_gradient
from nemo_megacpp.runtime.host import ensure_host
from nemo_megacpp.runtime.orphans import bind_helpers
from nemo_megacpp.settings.validate import validate_config

_logger = logging.getLogger(__name__)


class HybridStrategy(Recorded, MegatronStrategy):
    """``MegatronStrategy`` that prepares its process first and resumes runs exactly.

    However the run was started (our launcher, torchrun, NeMo's command line, a NeMo-Run executor),
    every rank builds its strategy before it touches a device, so the no-GPU host is installed here
    if there is no GPU.

    NeMo saves no random state. Here each training step begins with the generators as the step
    before has left them, whatever was drawn in between (a data loader draws a seed whenever it is
    started, for training or validation), and a checkpoint saves that state.

    Args:
        seed: of the weights and of dropout; NeMo's own is fixed.
        init_side_channels: ``any`` starts a run from the weights of a checkpoint with other side
            channels; ``same`` refuses it.
        ddp: Megatron's wrapper, or its configuration. NeMo can write it down only as an argument of
            its own, not among ``kwargs``.
        kwargs: of ``MegatronStrategy``. ``ckpt_optim_fully_reshardable`` has no effect: optimizer
            state is always saved so that any layout can load it.

    Raises:
        UserError: FSDP or a DDP other than Megatron's, or a setting of ``ddp`` that is neither
            proved nor neutral.
    """

    def __init__(
        self,
        seed: int = 1234,
        init_side_channels: Literal["same", "any"] = "same",
        ddp: Union[Literal["megatron", "pytorch"], DistributedDataParallelConfig] = "megatron",  # noqa: UP007
        **kwargs: Any,
    ):
        ensure_host(nemo=True)
        if isinstance(ddp, DistributedDataParallelConfig):
            validate_config(ddp)
        validate_wrapper(kwargs.get("fsdp"), ddp, kwargs.get("save_ckpt_format"))
        if not isinstance(ddp, DistributedDataParallelConfig) and ddp != "megatron":
            raise UserError(
                f"trainer.strategy.ddp={ddp!r}: Megatron's optimizer needs Megatron's wrapper. "
                f"Legal: 'megatron', or a DistributedDataParallelConfig."
            )
        super().__init__(ddp=ddp, **kwargs)
        validate_config(self.ddp_config)  # some of the strategy's own settings enter it
        self.seed = seed
        self.init_side_channels = init_side_channels
        self._random_state: RandomState | None = None
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

    def connect(self, model: Any) -> None:
        """Validate layout, model and data as they are after NeMo's overrides, and connect.

        Raises:
            UserError: an illegal layout, data that do not fit the model, or a setting that is
                neither proved nor neutral.
        """
        trainer = model.trainer
        layout = actual_layout(self.parallelism, trainer.world_size)
        node = trainer.num_devices if trainer.num_nodes > 1 else 0
        validate_actual(layout, model.config, trainer.datamodule, node)
        if model.optim is not None and not isinstance(model.optim, HybridOptimizer):
            raise UserError(
                f"optim is a {type(model.optim).__name__}, which does not work with Megatron-Core "
                f"0.16 or our checkpoints. Legal: HybridOptimizer "
                f"(nemo_megacpp.nemo.hybrid_optimizer)."
            )
        super().connect(model)
        # By now the precision plugin and the strategy have changed all three.
        validate_training(model.config, self.ddp_config, model.optim)

    def setup_distributed(self) -> None:
        """Start the process groups, on the caller's default one if there is one; seed this rank."""
        bind_helpers()
        joined = torch.distributed.is_initialized()
        super().setup_distributed()
        if joined:  # NeMo then skips what follows
            init_model_parallel(self.model)
            if self.data_sampler:
                self.data_sampler.setup(torch.distributed.get_rank())
        megatron_init._set_random_seed(self.seed)

    def training_step(self, dataloader_iter: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one training step on the random numbers that follow those of the step before.

        Raises:
            UserError: the gradient is not finite on this rank; nothing was updated.
        """
        if self._random_state is not None:
            set_random_state(self._random_state)
        try:
            output = super().training_step(dataloader_iter, *args, **kwargs)
        except RuntimeError as error:
            if (found := non_finite_gradient(self.trainer.global_step + 1, error)) is None:
                raise
            raise found from None
        self._random_state = random_state()
        return output

    @property
    def sharded_state_dict_metadata(self) -> dict[str, Any]:
        """What a checkpoint says of its form."""
        sharded = bool(getattr(self.ddp_config, "use_distributed_optimizer", False))
        return {**super().sharded_state_dict_metadata, **content_metadata(sharded)}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing: NeMo saves the sharded state instead. Megatron cannot return the plain
        state where a pipeline stage has no experts, or before the first step."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Save a checkpoint with the random state."""
        state = self._random_state or random_state()
        checkpoint["random_state"] = sharded_random_state(state)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, selective_restore: bool = False
    ) -> dict[str, Any]:
        """Load a checkpoint of any backend, after its pickles were checked to run no code.

        Random state is restored along with optimizer state. The checkpoint's bytes were compared
        with its manifest before the ranks started.
        """
        checkpoint_path = guard_load(Path(checkpoint_path), verify=False)
        config: Any = self.lightning_module.config
        tokenizer = tokenizer_of(self.lightning_module.trainer.datamodule)
        model, letters = actual_model(config, ()), config.pattern.uncut
        directory = find_checkpoint(Path(checkpoint_path))  # NeMo gives its weights/
        new = selective_restore and self.init_side_channels == "any"
        validate_same_model(directory, model, letters, tokenizer, new_side_channels=new)
        if self.should_restore_optimizer_states(selective_restore=selective_restore):
            validate_optimizer_state(directory)
            validate_run_steps_left(directory, self.trainer)
        usual = self.checkpoint_io  # type: ignore[has-type]
        self.checkpoint_io = AcrossBackends(usual, new_side_channels=new)
        try:
            checkpoint = super().load_checkpoint(checkpoint_path, selective_restore)
        finally:
            self.checkpoint_io = usual
        restores = self.should_restore_optimizer_states(selective_restore=selective_restore)
        if restores and "loops" not in checkpoint:  # another program saved it
            content = CheckpointContent(directory)
            step, consumed = content.step, content.consumed_samples
            if consumed is None:
                consumed = consumed_samples(checkpoint)
            if step is None or consumed is None:
                raise UserError(
                    f"{directory} does not say how many steps and rows its run had done, so it "
                    f"cannot be resumed. Start a new run from it with init_from={directory}."
                )
            checkpoint |= trainer_state(self.lightning_module.trainer, step, consumed)
        _count_saving_step(checkpoint)
        if restores:
            weights = ckpt_to_weights_subdir(checkpoint_path, is_saving=False)
            self._random_state = load_random_state(weights)
            if self._random_state is None:
                _logger.info(
                    "The checkpoint has no random state for this layout: dropout restarts from "
                    "the seed."
                )
        return checkpoint


def _count_saving_step(checkpoint: dict[str, Any]) -> None:
    """Count the batch of the saving step as completed. Lightning saves before it counts it, and
    would repeat its number: every validation would come one step late."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    for counts in (progress.get("current"), progress.get("total")):
        if counts is not None:
            counts["completed"] = counts["processed"]
