"""Time our stack beside Megatron's own: the same layers, the same weights, forward, backward and
optimizer step on one rank.

    python -m benchmarks.stack
    python -m benchmarks.stack --device cuda

Two peers: Megatron's ``MambaStack`` around our layers, which leaves only what the stack itself
costs, and ``MambaStack`` around Megatron's own modules in their plain torch form (its Transformer
Engine form where that is installed). The losses of three steps must agree, or the script fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Row, Sample, common_arguments, finish, paired, peak_bytes, start
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.distributed import start_model_parallel, start_process_group

Sizes = dict[str, Any]
SMALL: Sizes = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_state_dim": 16,
    "mamba_num_groups": 2,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "vocab_size": 128,
    "seq_length": 32,
}
MIDDLE: Sizes = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "mamba_state_dim": 64,
    "mamba_num_groups": 2,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 256,
    "moe_shared_expert_intermediate_size": 256,
    "vocab_size": 1024,
    "seq_length": 512,
}
EVERY: Sizes = {
    "moe_router_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
}
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest relative difference of two losses whose layers compute in another order."""
TAX = 1.02
"""The aim: at most this many times the stock step."""
APART = {
    "mixer.in_proj.layer_norm_weight": "norm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
}
"""Norms that our modules fuse into a projection, and Megatron's local modules keep apart."""


def our_model(config: Any) -> torch.nn.Module:
    """Return our stack in Megatron's ``MambaModel``."""
    from nemo_megacpp.specs.hybrid_model import build_hybrid_model

    return build_hybrid_model(config)


def stock_model(config: Any, layers: dict[str, Any]) -> torch.nn.Module:
    """Return ``MambaStack`` in ``MambaModel`` around layer specs by letter."""
    from megatron.core.models.mamba import MambaModel
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.specs.backend import default_backend

    # MambaStack names Transformer Engine's norm itself: its final norm is put in afterwards.
    spec = ModuleSpec(
        module=MambaStack,
        params={"post_layer_norm": False},
        submodules=MambaStackSubmodules(
            attention_layer=layers["A"], mamba_layer=layers["M"], moe_layer=layers["E"]
        ),
    )
    model = MambaModel(
        config,
        mamba_stack_spec=spec,
        vocab_size=config.vocab_size,
        max_sequence_length=config.seq_length,
        hybrid_override_pattern="".join(f.megatron_symbol for f in config.pattern.families),
        position_embedding_type=config.position_embedding_type,
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
    )
    norm = default_backend().layer_norm(rms_norm=True)
    model.decoder.final_norm = norm(config, config.hidden_size, config.layernorm_epsilon)
    model.decoder.post_layer_norm = True
    return model


def our_layers(config: Any) -> dict[str, Any]:
    """Return our layer specs by letter."""
    from nemo_megacpp.specs.stack_spec import build_hybrid_stack_spec

    return build_hybrid_stack_spec(config).submodules.layers


def megatron_layers() -> dict[str, Any]:
    """Return Megatron's layer specs by letter: its Transformer Engine ones where that is there,
    else the same layers of its local modules."""
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    if HAVE_TE:
        stock = mamba_stack_spec.submodules
        return {"A": stock.attention_layer, "M": stock.mamba_layer, "E": stock.moe_layer}
    local = LocalSpecProvider()
    norm, column = local.layer_norm(rms_norm=True), local.column_parallel_linear()
    row = local.row_parallel_linear()
    mixer = ModuleSpec(
        module=MambaMixer, submodules=MambaMixerSubmodules(in_proj=column, out_proj=row)
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column, core_attention=local.core_attention(), linear_proj=row
        ),
    )
    moe = get_moe_module_spec_for_backend(local, num_experts=1, moe_grouped_gemm=False)
    bda = get_bias_dropout_add
    return {
        "A": ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm, self_attention=attention, self_attn_bda=bda
            ),
        ),
        "M": ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(norm=norm, mixer=mixer, mamba_bda=bda),
        ),
        "E": ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=moe, mlp_bda=bda),
        ),
    }


def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copy all parameters and buffers by name, those of :data:`APART` where they are apart."""
    wanted = target.state_dict()
    state = {}
    for name, value in source.state_dict().items():
        if name not in wanted:
            for fused, apart in APART.items():
                name = name.replace(fused, apart)
        state[name] = value
    target.load_state_dict(state)


def stepper(model: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return one training step over ``tokens [b, s + 1]``, which returns its loss."""
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=tokens.device)[None].expand_as(inputs)
    mask = torch.triu(torch.ones(inputs.shape[1], inputs.shape[1], device=tokens.device), 1).bool()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(inputs, positions, mask[None, None], labels=labels).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def compare(
    pattern: str, sizes: Sizes, arguments: argparse.Namespace, device: torch.device
) -> list[Row]:
    """Return the rows of one size, for both peers."""
    from nemo_megacpp.config import HybridConfig, config_fields

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = {"hybrid_pattern": pattern, **sizes, **EVERY}
    config = HybridConfig(**config_fields(model, ParallelLayout(), dtype, device.type))
    tokens = torch.randint(config.vocab_size, (1, config.seq_length + 1), device=device)
    shown = f"{pattern} h={config.hidden_size} s={config.seq_length} {dtype}".replace("torch.", "")
    rows = []
    same = 0.0 if device.type == "cpu" else ROUNDING[dtype]  # a GPU adds in any order
    for name, layers, tolerance in (
        ("our layers", our_layers(config), same),
        ("Megatron's layers", megatron_layers(), ROUNDING[dtype]),
    ):
        ours, stock = our_model(config).to(device), stock_model(config, layers).to(device)
        copy_weights(ours, stock)
        steps = stepper(ours, tokens), stepper(stock, tokens)
        check(*steps, tolerance)
        times = paired(*steps, repeats=arguments.repeats, device=device)
        memory = [Sample([float(peak_bytes(step, device))], "B") for step in steps]
        peer, aim = f"MambaStack, {name}", f"at most {TAX}x"
        rows.append(Row("stack: step", *times, peer, shown, aim=aim, aim_ratio=1 / TAX))
        rows.append(Row("stack: memory of a step", *memory, peer, shown))
    return rows


def check(ours: Callable, stock: Callable, tolerance: float, steps: int = 3) -> None:
    """Raise if the losses of the first steps differ by more than ``tolerance``, relatively."""
    for index in range(steps):
        mine, theirs = float(ours()), float(stock())
        if abs(mine - theirs) > tolerance * abs(theirs):
            raise ValueError(f"step {index}: our loss is {mine}, the stock stack's {theirs}")


def main() -> int:
    """Compare at two sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser)
    parser.set_defaults(repeats=15)  # to tell 1.02 from 1
    arguments = parser.parse_args()
    device = start(arguments)
    with tempfile.TemporaryDirectory() as folder:
        start_process_group(0, 1, f"file://{folder}/store")
        start_model_parallel(ParallelLayout())
        from megatron.core.ssm.mamba_mixer import HAVE_MAMBA_SSM

        pattern, skipped = "AEMEAEME", []
        if device.type == "cuda" and not HAVE_MAMBA_SSM:
            pattern = "AEAEAEAE"
            skipped.append(("stack: M layers", "Megatron's MambaMixer needs mamba_ssm on a GPU"))
        rows = []
        for sizes in (SMALL,) if arguments.quick else (SMALL, MIDDLE):
            rows += compare(pattern, sizes, arguments, device)
        torch.distributed.destroy_process_group()
    return finish(arguments, rows, skipped)


if __name__ == "__main__":
    sys.exit(main())
