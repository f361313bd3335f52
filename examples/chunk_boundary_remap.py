"""Chunk-boundary remap: the change of token order between families under CP, and back.

Attention holds the zigzag: of 2 x CP chunks rank r has chunk r and chunk 2 x CP - 1 - r, so that
each rank has as much causal work. A scan wants one contiguous segment per rank. In a pack each
document is dealt so on its own. Needs no GPU::

    python examples/chunk_boundary_remap.py
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.mixers.sequence_layout import token_order

TOKENS, CP = 16, 2


def main() -> None:
    """Print which tokens each rank holds, and remap a sequence to segments and back."""
    ends = torch.tensor([0, 4, 16], dtype=torch.int32)
    pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    for name, packed in (("one document", None), ("documents of 4 and 12 tokens", pack)):
        order = token_order(TOKENS, CP, packed)
        print(f"{TOKENS} tokens over CP={CP}, {name}")
        for rank in range(CP):
            print(f"  rank {rank} in attention: {order.of_rank(rank).tolist()}")
        tokens = torch.arange(TOKENS)
        zigzag = tokens[order.positions]  # the ranks' shares laid end to end
        segments = zigzag[order.places]
        print(f"  remapped, one segment per rank: {segments.view(CP, -1).tolist()}")
        print(f"  and back, every token in its place: {segments[order.positions].equal(zigzag)}")


if __name__ == "__main__":
    main()
