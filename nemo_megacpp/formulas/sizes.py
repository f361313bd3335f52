"""What formulas are written in: a job, and its tokens, widths and element sizes on one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.errors import UserError
from nemo_megacpp.families import block_of, load_families
from nemo_megacpp.layout import ParallelLayout, padded_vocab_size
from nemo_megacpp.mixer_settings import M2RNNSettings, Mamba3Dimensions, Mamba3Settings
from nemo_megacpp.mixers.kernels.m2rnn_triton import unfit_for_triton
from nemo_megacpp.mixers.recompute import recomputes
from nemo_megacpp.pattern import Family, HybridPattern
from nemo_megacpp.side_channels import channel_places

PREDICTION = "prediction"
"""The place of what a prediction depth has beside its layers."""
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
        overlap_grad_reduce, overlap_param_gather: gradients are reduced during the backward pass,
            parameters gathered during the forward pass; moves no byte.
        kernels: ``gpu`` is Transformer Engine and mamba_ssm, ``torch`` the plain forms of a machine
            without a GPU. They save different activations.
        gpus_per_node: ranks of one NVLink domain.
        hbm_bytes: memory of one GPU; None: not compared.
        name: of the job, for people.

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
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    def __post_init__(self) -> None:
        load_families(self.model.get("family_modules"))
        pattern = self.model.get("hybrid_pattern")
        letters = HybridPattern.parse(pattern).all_families if pattern else ()
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
        """Bytes of a parameter, and of an activation unless a formula names another size."""
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


@dataclass(frozen=True)
class Sizes:
    """What one rank of ``job`` works on in one microbatch.

    Attributes:
        job: the job.
        built: the model's configuration, where one is built already.
    """

    job: Job
    built: HybridConfig | None = None

    @cached_property
    def config(self) -> HybridConfig:
        """The model's configuration in the job's layout."""
        return self.built or self.job.config()

    @property
    def letters(self) -> str:
        """The families of the decoder, layer by layer."""
        return self.config.pattern.letters

    @property
    def prediction(self) -> tuple[str, ...]:
        """The places of all prediction depths, in order."""
        pattern = self.config.pattern
        return (PREDICTION, *pattern.mtp_letters) * pattern.mtp_num_depths

    @property
    def places(self) -> tuple[str, ...]:
        """The letters of the families, each once, between ``embedding`` and ``head``, and the place
        of prediction depths; then the places of side channels."""
        owners = (None, *range(len(self.letters)))
        channels = filter(None, dict.fromkeys(channel_places(self.config.side_channels, owners)))
        layers = dict.fromkeys((*self.letters, *self.prediction))
        return ("embedding", *layers, "head", *channels)

    def has(self, family: Family) -> bool:
        """Whether the model has blocks of ``family``."""
        return family in self.config.pattern.all_families

    @property
    def layout(self) -> ParallelLayout:
        return self.job.layout

    @property
    def e(self) -> int:
        """Bytes of a parameter or activation."""
        return self.job.element_size

    @property
    def wide(self) -> int:
        """Bytes of a number where bf16 would lose too much."""
        return 4

    @property
    def batch(self) -> int:
        return self.job.micro_batch_size

    @property
    def h(self) -> int:
        return int(self.config.hidden_size)

    @property
    def length(self) -> int:
        """Tokens of a row on one cp rank, before tp splits them."""
        return self.config.seq_length // self.layout.cp

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on one cp rank: inside a tensor-parallel region."""
        return self.length * self.batch

    @property
    def shared_tokens(self) -> int:
        """Tokens between tensor-parallel regions: under SP each tp rank has its share."""
        return self.tokens // self.layout.tp if self.layout.sp else self.tokens

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states inside a tensor-parallel region."""
        return self.tokens * self.h * self.e

    # --- A

    @property
    def query_heads(self) -> int:
        return int(self.config.num_attention_heads) // self.layout.tp

    @property
    def kv_heads(self) -> int:
        groups = self.config.num_query_groups or self.config.num_attention_heads
        return int(groups) // self.layout.tp

    @property
    def head_dim(self) -> int:
        return int(self.config.kv_channels)

    @property
    def cp_comm_type(self) -> str:
        """How queries meet the keys and values of other cp ranks; Megatron's default is a ring."""
        return str(self.config.cp_comm_type or "p2p")

    # --- M

    @cached_property
    def mamba_heads(self) -> int:
        """Heads of all ranks; without ``mamba_num_heads``, Megatron's mixer is twice ``h`` wide."""
        given = self.config.mamba_num_heads
        return int(given or 2 * self.h // int(self.config.mamba_head_dim))

    @cached_property
    def mamba3(self) -> Mamba3Dimensions:
        return Mamba3Settings.of(self.config).dimensions(self.config)

    # --- R

    @cached_property
    def m2rnn(self) -> M2RNNSettings:
        return M2RNNSettings.of(self.config)

    @property
    def m2rnn_heads(self) -> int:
        """Heads of a tensor-parallel rank."""
        return self.m2rnn.heads(self.h) // self.layout.tp

    @property
    def m2rnn_is_serial(self) -> bool:
        """Whether CP passes the state on instead of splitting heads."""
        return self.m2rnn.is_serial(self.m2rnn_heads, self.layout.cp)

    @property
    def m2rnn_in_triton(self) -> bool:
        """Whether the recurrence runs in our Triton kernels."""
        fits = unfit_for_triton(self.m2rnn.value_head_dim, self.config.params_dtype) is None
        return self.job.kernels == "gpu" and self.m2rnn.kernel != "torch" and fits

    # --- E

    @property
    def experts(self) -> int:
        return int(self.config.num_moe_experts or 0)

    @property
    def topk(self) -> int:
        return int(self.config.moe_router_topk)

    @property
    def router_bytes(self) -> int:
        """Bytes of a routing probability."""
        return {"fp32": 4, "fp64": 8}.get(self.config.moe_router_dtype or "", self.e)

    @property
    def expert_rows(self) -> int:
        """Token copies that this rank's experts work on, with balanced routing."""
        return self.shared_tokens * self.topk * self.layout.etp

    @property
    def shared_expert_width(self) -> int:
        """FFN width of the shared expert on this rank."""
        return int(self.config.moe_shared_expert_intermediate_size or 0) // self.layout.tp

    # --- F

    @property
    def ffn_width(self) -> int:
        """FFN width of a dense MLP on this rank."""
        return int(self.config.ffn_hidden_size) // self.layout.tp

    # --- embedding and head

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding on this rank."""
        config, tp = self.config, self.layout.tp
        return padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by, tp) // tp

    def recomputes(self, module: str) -> bool:
        """Whether ``module`` is computed again in the backward pass."""
        return recomputes(self.config, module)
