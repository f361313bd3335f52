"""What autograd keeps of one microbatch for the backward pass: formulas, family by family.

Each entry names a tensor and gives its bytes on one rank. The ``torch`` entries follow the plain
torch modules and kernels and are held to recorded runs. The ``gpu`` entries follow what Transformer
Engine's and mamba_ssm's autograd functions save; no GPU has confirmed them yet. Routing is data:
E's entries are those of balanced routing.

Of Megatron's selective recomputation, ``core_attn``, ``moe`` and ``shared_experts`` are counted;
other modules are reckoned as if they kept everything. Not counted, on either: tensors that live
only inside a kernel or between two operations, and what an allocator rounds up or cannot reuse.
"""

from __future__ import annotations

from typing import NamedTuple

from nemo_megacpp.contract.activations_scan import mamba2_scan, mamba3_scan, recurrent_scan
from nemo_megacpp.contract.sizes import Sizes
from nemo_megacpp.pattern import Family

COUNTED_RECOMPUTATION = frozenset(("core_attn", "moe", "shared_experts"))
"""Megatron's ``recompute_modules`` whose effect the formulas know."""


class Kept(NamedTuple):
    """A tensor that waits for the backward pass.

    Attributes:
        what: its name.
        bytes: on one rank.
    """

    what: str
    bytes: int


def block_activations(sizes: Sizes, family: Family) -> list[Kept]:
    """Return what one layer of ``family`` keeps of one microbatch."""
    made = {
        Family.ATTENTION: _attention,
        Family.MAMBA: _mamba,
        Family.EXPERT: _expert,
        Family.RECURRENT: _recurrent,
    }[family](sizes)
    return [Kept(what, size) for what, size in made if size]


def embedding_activations(sizes: Sizes) -> list[Kept]:
    """Return what the embedding keeps of one microbatch."""
    mask = sizes.tokens if sizes.layout.tp > 1 else 0
    return [Kept("token numbers and their mask", sizes.tokens * 8 + mask)]


def head_activations(sizes: Sizes) -> list[Kept]:
    """Return what final norm, head and loss keep of one microbatch."""
    tokens = sizes.tokens
    return [
        *_norm(sizes),
        Kept("probabilities of the vocabulary (float32)", tokens * sizes.vocabulary * 4),
        Kept("targets and their mask", tokens * 9),
    ]


def _norm(sizes: Sizes) -> list[Kept]:
    """An RMS norm over ``h``, and its output, which the linear behind it keeps."""
    tokens, h = sizes.shared_tokens, sizes.h
    # torch composes the norm, and keeps the wide input and its product with the scale.
    width = sizes.e if sizes.job.kernels == "gpu" else 2 * sizes.wide
    return [
        Kept("norm: input", tokens * h * width),
        Kept("norm: scale of each token", tokens * 4),
        Kept("norm: output", tokens * h * sizes.e),
    ]


def _attention(sizes: Sizes) -> list[Kept]:
    tokens, e, d = sizes.tokens, sizes.e, sizes.head_dim
    heads, groups, cp = sizes.query_heads, sizes.kv_heads, sizes.layout.cp
    kept = _norm(sizes)
    if sizes.config.position_embedding_type == "rope":
        turned = int(d * sizes.config.rotary_percent)
        kept.append(Kept("sines and cosines for q and k", 4 * sizes.length * turned * e))
    kept.append(Kept("q", tokens * heads * d * e))
    gathers = cp > 1 and sizes.job.kernels == "torch"
    if gathers:
        whole = tokens * cp * groups * d * e
        kept += [Kept("k of the whole sequence", whole), Kept("v of the whole sequence", whole)]
    else:
        kept.append(Kept("k", tokens * groups * d * e))
        kept.append(Kept("q, k, v as projected", tokens * (heads + 2 * groups) * d * e))
    if not sizes.recomputes("core_attn"):
        kept.append(Kept("log-sum-exp", tokens * heads * 4))
        if gathers:
            kept.append(Kept("mask", sizes.length * sizes.config.seq_length * e))
    elif gathers:  # what goes into the recomputed core is kept as well: q, and k and v as shards
        kept = kept[:-2]
        kept.append(Kept("q, k, v as projected", tokens * (heads + 2 * groups) * d * e))
        kept.append(Kept("k", tokens * groups * d * e))
    kept.append(Kept("attention output", tokens * heads * d * e))
    return kept


def _mamba(sizes: Sizes) -> list[Kept]:
    scan = mamba3_scan if sizes.config.mode == "mamba3" else mamba2_scan
    return [*_norm(sizes), *(Kept(*item) for item in scan(sizes))]


def _recurrent(sizes: Sizes) -> list[Kept]:
    return [*_norm(sizes), *(Kept(*item) for item in recurrent_scan(sizes))]


def _expert(sizes: Sizes) -> list[Kept]:
    kept = _norm(sizes)
    if sizes.recomputes("moe"):
        return kept
    if not sizes.recomputes("shared_experts"):
        width = sizes.tokens * sizes.shared_expert_width * sizes.e
        kept.append(Kept("shared expert: between its matrices", _inside_mlp(sizes) * width))
    return [*kept, *_routing(sizes), *_routed(sizes)]


def _inside_mlp(sizes: Sizes) -> int:
    """FFN widths that an MLP keeps: gate and value as projected, and what leads to their product.

    The torch form keeps the projection (2), the value plus its offset, the activated gate, and the
    product that the second matrix takes; a fused form the projection and the product.
    """
    if sizes.config.gated_linear_unit:
        return 5 if sizes.job.kernels == "torch" else 3
    return 2


def _routing(sizes: Sizes) -> list[Kept]:
    tokens, experts, k, p = sizes.shared_tokens, sizes.experts, sizes.topk, sizes.router_bytes
    kinds = sizes.config.moe_router_load_balancing_type
    balances = sizes.config.moe_aux_loss_coeff and kinds != "none"
    choice = tokens * (experts * p + k * 8 + p)
    kept = [
        Kept("router: scores, choice and its sum", choice),
        Kept("router: chosen scores", tokens * k * p),
        Kept("router: map and probabilities", tokens * experts * (1 + p)),
        Kept("router: order of the token copies", tokens * k * 8),
    ]
    if balances:
        kept.append(Kept("balancing loss: scores and choice", choice))
        kept.append(Kept("balancing loss: tokens per expert", experts * sizes.batch * 8 + 4))
    return kept


def _routed(sizes: Sizes) -> list[Kept]:
    rows, e = sizes.expert_rows, sizes.e
    width = rows * (sizes.config.moe_ffn_hidden_size or 0) // sizes.layout.etp * e
    inside = _inside_mlp(sizes) + (1 if sizes.job.kernels == "torch" else 0)
    return [
        Kept("experts: token copies", rows * sizes.h * e),
        Kept("experts: probabilities", rows * sizes.router_bytes),
        Kept("experts: between their matrices", inside * width),
    ]


def total(kept: list[Kept]) -> int:
    """Return the bytes of all entries."""
    return sum(item.bytes for item in kept)
