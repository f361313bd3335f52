"""Bridge's hybrid provider, whose model is ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.bridge.settings import validate_wrapper
from nemo_megacpp.config import HybridConfig
from nemo_megacpp.core.model import stand_in_pattern
from nemo_megacpp.runtime.host import current_host
from nemo_megacpp.specs.hybrid_model import HybridModel, build_hybrid_model


@dataclasses.dataclass
class HybridProvider(HybridConfig, HybridModelProvider):
    """``HybridModelProvider`` with our pattern, specs and stack.

    It is a :class:`nemo_megacpp.config.HybridConfig` as well, with that class's defaults and not
    Bridge's, so a recipe means the same at every door. As with all of Bridge's providers, nothing
    is derived or validated before :meth:`finalize`.

    Attributes:
        row_operations: model FLOPs of a row of ``seq_length`` tokens, as
            :class:`nemo_megacpp.runs.throughput.Throughput` counts them; Bridge's own count knows
            no R and no Mamba-3.
        said: names of the model's fields that a checkpoint records, beside what shapes its tensors.
        keep_latest, keep_every, init_side_channels: of the run
            (:class:`nemo_megacpp.recipes.training.Training`), for the checkpoint manager, to which
            Bridge gives no settings of its own.

    Virtual pipeline stages, which Bridge's provider refuses, are built as at the other doors.
    """

    row_operations: float = 0.0
    said: list[str] = dataclasses.field(default_factory=list)
    keep_latest: int | None = None
    keep_every: int | None = None
    init_side_channels: str = "same"

    def _get_num_floating_point_operations(self, batch_size: int) -> float:
        """Return the model FLOPs of a batch, for the speed that Bridge logs."""
        return batch_size * self.row_operations

    def __post_init__(self) -> None:
        """Derive nothing yet: Bridge may change fields until :meth:`finalize`."""

    def finalize(self) -> None:
        """Validate the fields, and derive what follows from them; Bridge may call it again.

        Raises:
            UserError: for a pattern that cannot be read, or a field that no backend supports.
        """
        self.derive(lambda: TransformerConfig.__post_init__(self))
        chunks = self.pipeline_model_parallel_size * (
            self.virtual_pipeline_model_parallel_size or 1
        )
        self.hybrid_layer_pattern: str | None = stand_in_pattern(self.pattern, chunks)

    def provide_distributed_model(
        self, ddp_config: Any = None, *args: Any, **options: Any
    ) -> list[Any]:
        """Build this rank's chunks, in Megatron's ``DistributedDataParallel``; see Bridge's.

        Raises:
            UserError: the run asks for FSDP.
        """
        validate_wrapper(ddp_config, options)
        models: list[Any] = super().provide_distributed_model(ddp_config, *args, **options)
        return models

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> HybridModel:
        """Build this rank's chunk of the model; see Bridge's provider for the arguments.

        The vocabulary is padded as at the other doors, whatever ``should_pad_vocab`` says.
        """
        assert pre_process is not None and post_process is not None, "Bridge's get_model gives both"
        # Bridge has just turned it off; without a GPU weights are initialised on the CPU.
        self.use_cpu_initialization = current_host().device == "cpu"
        groups: Any = self._pg_collection  # type: ignore[has-type]
        self._pg_collection: Any = None  # a group cannot be copied
        try:
            return build_hybrid_model(
                self,
                pre_process=pre_process,
                post_process=post_process,
                vp_stage=vp_stage,
                pg_collection=groups,
            )
        finally:
            self._pg_collection = groups


def make_provider(fields: Mapping[str, Any]) -> HybridProvider:
    """Return a provider with the defaults of :class:`HybridConfig`.

    Args:
        fields: of :class:`HybridConfig`.
    """
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(HybridConfig):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return HybridProvider(**{**defaults, **fields})
