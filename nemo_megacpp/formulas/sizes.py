"""The numbers that formulas are written in: tokens, widths and element sizes on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.formulas.job import Job
from nemo_megacpp.layout import ParallelLayout, padded_vocab_size
from nemo_megacpp.mixer_settings import M2RNNSettings, Mamba3Dimensions, Mamba3Settings
from nemo_megacpp.mixers.kernels.m2rnn_triton import unfit_for_triton


@dataclass(frozen=True)
class Sizes:
    """What one rank of ``job`` works on in one microbatch.

    Attributes:
        job: the job.
        config: its model configuration.
    """

    job: Job
    config: HybridConfig

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
        """Tokens of a row on one cp rank, before tp shares them out."""
        return self.config.seq_length // self.layout.cp

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on one cp rank: inside a tensor-parallel region."""
        return self.length * self.batch

    @property
    def shared_tokens(self) -> int:
        """Tokens between tensor-parallel regions: under SP each tp rank keeps its share."""
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
        """Whether CP hands the state on instead of spreading heads."""
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

    # --- embedding and head

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding on this rank."""
        rows = padded_vocab_size(
            self.config.vocab_size,
            self.config.make_vocab_size_divisible_by,
            self.layout.tp,
        )
        return rows // self.layout.tp

    def recomputes(self, module: str) -> bool:
        """Whether ``module`` is computed again in the backward pass."""
        return self.config.recompute_granularity == "selective" and module in (
            self.config.recompute_modules or ()
        )


def sizes_of_job(job: Job) -> Sizes:
    """Return the sizes of ``job``."""
    return Sizes(job, job.config())
