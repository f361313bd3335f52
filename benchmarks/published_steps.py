"""Estimated steps beside published ones: the table of docs/estimates.md.

Every row is a published training throughput whose model this package can describe, with the layout
and batch that were published beside it. One set of efficiencies serves all rows; none is fitted to
a row. ``python -m benchmarks.published_steps`` prints the table's rows in Markdown and, on standard
error, where each estimated step goes; it needs no GPU and takes about half a minute.

Sources: [A] docs.nvidia.com/nemo/megatron-bridge/latest/performance-summary-archive.html, by
release; [B] docs.nvidia.com/nemo/automodel/performance/performance-summary.md. Both measure tokens
and model TFLOP/s a GPU, with balanced routing. What a page leaves open is as in NAM56R.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_megacpp.contract.layout_search import Priced, search_layouts
from nemo_megacpp.contract.machine import Machine
from nemo_megacpp.contract.machine_presets import PRESETS
from nemo_megacpp.contract.step_tables import ordered
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import job_of, shape_of

_NO_SHARED = {"moe_shared_expert_intermediate_size": None, "moe_aux_loss_coeff": 1e-3}
NEMOTRON_3_NANO = {
    "hybrid_pattern": "MEMEMAEMEMEMAEMEMEMAEMEMEMAEMEMEMAEMEMEMEMAEMEMEMEME",
    "num_layers": 52,
    "hidden_size": 2688,
    "num_attention_heads": 32,
    "num_query_groups": 2,
    "kv_channels": 128,
    "vocab_size": 131072,
    "num_moe_experts": 128,
    "moe_router_topk": 6,
    "moe_ffn_hidden_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "gated_linear_unit": False,
    "mamba_num_heads": 64,
    "mamba_state_dim": 128,
}
"""Megatron Bridge's ``nemotron_3_nano`` recipe."""
QWEN3_30B = {
    "hybrid_pattern": "AE",
    "num_layers": 96,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_query_groups": 4,
    "kv_channels": 128,
    "vocab_size": 151936,
    "num_moe_experts": 128,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 768,
    **_NO_SHARED,
}
QWEN3_235B = {
    **QWEN3_30B,
    "num_layers": 188,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "moe_ffn_hidden_size": 1536,
}
GPT_OSS_120B = {
    **QWEN3_30B,
    "num_layers": 72,
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_query_groups": 8,
    "kv_channels": 64,
    "vocab_size": 201088,
    "moe_router_topk": 4,
    "moe_ffn_hidden_size": 2880,
}


LLAMA3_70B = {
    "hybrid_pattern": "AF",
    "num_layers": 160,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_query_groups": 8,
    "kv_channels": 128,
    "ffn_hidden_size": 28672,
    "vocab_size": 128256,
}


@dataclass(frozen=True)
class Published:
    """A published throughput.

    Attributes:
        name: of model, GPUs and arithmetic.
        model: settings that differ from NAM56R's.
        machine: a preset.
        world: GPUs.
        degrees: those published; CP and ETP are 1 besides.
        micro, rows, length: micro and global batch, and tokens of a row.
        tokens: tokens a second and GPU.
        tflops: model TFLOP/s a GPU.
        source: letter of the page, and the release on it.
        fp8: whether matrix multiplications are in FP8.
        node: GPUs of a node that are used.
        remarks: what differs from the published run.
    """

    name: str
    model: Mapping[str, Any]
    machine: str
    world: int
    degrees: Mapping[str, Any]
    micro: int
    rows: int
    length: int
    tokens: float
    tflops: float
    source: str
    fp8: bool = False
    node: int = field(default=8, kw_only=True)
    remarks: str = field(default="", kw_only=True)


ROWS = (
    Published(
        *("Nemotron 3 Nano, 16 x H100, FP8", NEMOTRON_3_NANO, "dgx-h100", 16, {"ep": 8}),
        *(1, 1024, 8192, 14_719, 328, "[A], 26.06", True),
    ),
    Published(
        *("Nemotron 3 Nano, 8 x GB200, MXFP8", NEMOTRON_3_NANO, "gb200-nvl72", 8, {"ep": 8}),
        *(2, 512, 8192, 34_816, 776, "[A], 26.06.01", True),
    ),
    Published(
        *("Nemotron 3 Nano, 8 x H100, BF16", NEMOTRON_3_NANO, "dgx-h100", 8, {"ep": 8}),
        *(4, 512, 4096, 16_789, 328, "[B], 26.02"),
        remarks="FSDP",
    ),
    Published(
        *("Qwen3 30B-A3B, 8 x H100, BF16", QWEN3_30B, "dgx-h100", 8, {"ep": 8}),
        *(4, 512, 4096, 12_040, 277, "[B]"),
        remarks="FSDP",
    ),
    Published(
        *("Qwen3 30B-A3B, 16 x H100, FP8", QWEN3_30B, "dgx-h100", 16, {"ep": 16}),
        *(1, 1024, 4096, 8_826, 203, "[A], 26.06", True),
    ),
    Published(
        *("Qwen3 235B-A22B, 256 x H100, FP8", QWEN3_235B, "dgx-h100", 256),
        *({"tp": 2, "pp": 8, "vpp": 4, "ep": 32}, 1, 8192, 4096, 1_712, 253),
        *("[A], 26.04.01", True),
    ),
    Published(
        *("Qwen3 235B-A22B, 256 x GB200, BF16", QWEN3_235B, "gb200-nvl72", 256),
        *({"pp": 8, "vpp": 3, "ep": 32}, 1, 8192, 4096, 4_916, 728, "[A], 25.11"),
        node=64,
    ),
    Published(
        *("GPT-OSS 120B, 64 x H100, BF16", GPT_OSS_120B, "dgx-h100", 64, {"pp": 4, "ep": 8}),
        *(1, 1280, 4096, 5_824, 158, "[A], 26.04.01"),
        remarks="no windows, no sinks",
    ),
    Published(
        *("GPT-OSS 120B, 64 x GB200, BF16", GPT_OSS_120B, "gb200-nvl72", 64, {"ep": 64}),
        *(4, 1280, 4096, 16_640, 452, "[A], 26.04.01"),
        node=64,
        remarks="as above",
    ),
    Published(
        *("Llama 3 70B, 64 x H100, FP8", LLAMA3_70B, "dgx-h100", 64),
        *({"tp": 4, "pp": 8, "vpp": 5}, 1, 256, 8192, 1_621, 728, "[A], 26.02", True),
    ),
    Published(
        *("NAM56R, 8 x H200, BF16", {}, "dgx-h200", 8, {}, 1, 256, 4096, 0, 289),
        *("its authors, of a larger variant",),
        remarks="best layout",
    ),
)


def estimated(row: Published) -> Priced:
    """Return the layout of ``row`` with its estimate; gradients and parameters are overlapped."""
    settings = {
        **row.model,
        "seq_length": row.length,
        "micro_batch_size": row.micro,
        "global_batch_size": row.rows,
        "use_distributed_optimizer": True,
    }
    given = [f"{name}={'null' if value is None else value}" for name, value in settings.items()]
    recipe = dataclasses.replace(resolve("nam56r", given), layout=ParallelLayout())
    machine = _machine(row)
    job = dataclasses.replace(
        job_of(recipe, gpus_per_node=machine.gpus_per_node),
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    degrees = {"tp": 1, "pp": 1, "ep": 1, "vpp": None, **row.degrees} if row.degrees else {}
    fixed = {"cp": 1, "etp": 1, **degrees}
    return search_layouts(job, shape_of(recipe), row.world, machine, fixed).ranked[0]


def _machine(row: Published) -> Machine:
    """FP8 doubles the peak of matrix multiplications; attention and scans stay in BF16."""
    machine = dataclasses.replace(PRESETS[row.machine], gpus_per_node=row.node)
    if not row.fp8:
        return machine
    slower = machine.flops["bf16"] / machine.flops["fp8"]
    share = machine.efficiency
    return dataclasses.replace(
        machine,
        flops={"bf16": machine.flops["fp8"]},
        efficiency=dataclasses.replace(
            share, attention=share.attention * slower, scan=share.scan * slower
        ),
    )


def main() -> int:
    for row in ROWS:
        priced = estimated(row)
        step = priced.step
        assert step is not None
        cells = (
            row.name + (f" ({row.remarks})" if row.remarks else ""),
            f"`{priced.layout.short()}`",
            f"{row.tokens:,.0f}" if row.tokens else "-",
            f"{step.tokens_per_gpu:,.0f}",
            f"{step.tokens_per_gpu / row.tokens:.2f}" if row.tokens else "-",
            f"{row.tflops:,.0f}",
            f"{step.flops_per_gpu / 1e12:,.0f}",
            row.source,
        )
        print(f"| {' | '.join(cells)} |", flush=True)
        shares = (f"{name} {part / step.seconds:.0%}" for name, part in ordered(step).items())
        print(f"{row.name}: {', '.join(shares)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
