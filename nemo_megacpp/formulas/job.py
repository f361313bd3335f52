"""What a plan is made of: a model, a layout, a batch, a precision, and the hardware."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.errors import UserError
from nemo_megacpp.families import block_of, load_families
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import HybridPattern

Precision = Literal["fp32", "bf16"]
Kernels = Literal["gpu", "torch"]


@dataclass(frozen=True)
class Job:
    """One training job, before it runs.

    Attributes:
        model: fields of :class:`nemo_megacpp.config.HybridConfig`, without the layout's.
        layout: the parallel degrees.
        micro_batch_size, global_batch_size: rows of ``seq_length`` tokens.
        precision: of parameters and activations. In ``bf16`` gradients, and the optimizer's
            copy of the parameters, are float32.
        use_distributed_optimizer: shard the optimizer's state over data-parallel ranks.
        kernels: ``gpu`` is Transformer Engine and mamba_ssm, ``torch`` the plain forms of a machine
            without a GPU. They keep different activations, and split attention over CP differently.
        gpus_per_node: ranks of one NVLink domain.
        hbm_bytes: memory of one GPU; None: not compared.
        name: what to call the job in a report.

    Raises:
        UserError: the pattern has blocks of a family that does not declare what it sends and saves.
    """

    model: dict[str, Any] = field(hash=False)
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    micro_batch_size: int = 1
    global_batch_size: int = 1
    precision: Precision = "bf16"
    use_distributed_optimizer: bool = False
    kernels: Kernels = "gpu"
    gpus_per_node: int = 8
    hbm_bytes: int | None = None
    name: str = "model"

    def __post_init__(self) -> None:
        load_families(self.model.get("family_modules"))
        pattern = self.model.get("hybrid_pattern")
        letters = HybridPattern.parse(pattern).families if pattern else ()
        unpriced = [f.value for f in dict.fromkeys(letters) if not block_of(f).is_priced]
        if unpriced:
            raise UserError(
                f"The pattern has {', '.join(unpriced)} blocks, whose family declares neither "
                f"collectives nor saved_activations, so a plan would be wrong. Declare both in its "
                f"BlockFamily, as examples/short_conv.py does. 'nemo-megacpp verify' proves a "
                f"layout of any family."
            )

    @property
    def element_size(self) -> int:
        """Bytes of a parameter, and of an activation where nothing else is said."""
        return 4 if self.precision == "fp32" else 2

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one data-parallel rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.layout.data_parallel_size)

    def config(self) -> HybridConfig:
        """Return the model's configuration in this layout, for building it without numbers."""
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        fields = config_fields(self.model, self.layout, dtype, "cpu")
        return HybridConfig(**fields, perform_initialization=False)
