"""Prompts of different lengths that go through the model in one row, one after another.

What works on single tokens (projections, norms, experts) takes the row as it is, and attention
takes it as a packed row of documents. A recurrent mixer needs the state at the end of every
prompt: it takes each prompt as a row of a batch, all of them ending at its last token, with zeros
before. Zeros leave a state of zeros as it is, and the last state of a row is the prompt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams


class PromptPack:
    """Where the tokens of ``n`` prompts lie in a row ``[s]`` that packs them.

    Args:
        lengths: of the prompts, at least one token each.
        device: of the tensors.

    Attributes:
        longest: tokens of the longest prompt.
        sequence_of: number of the prompt of each token, ``[1, s]``.
        positions: place of each token in its prompt, ``[1, s]``.
        last: place of the last token of each prompt in the row, ``[n]``.
        packed_seq_params: the same for Megatron's modules.
    """

    def __init__(self, lengths: Sequence[int], device: Any = None):
        assert min(lengths) > 0, lengths
        self.longest = max(lengths)
        counts = torch.tensor(lengths, device=device)
        ends = counts.cumsum(0)
        rows = torch.arange(len(lengths), device=device).repeat_interleave(counts)
        places = torch.arange(sum(lengths), device=device) - (ends - counts)[rows]
        self.sequence_of, self.positions, self.last = rows[None], places[None], ends - 1
        self._rows, self._aligned = rows, places + (self.longest - counts)[rows]
        self._before = torch.arange(self.longest, device=device) < (self.longest - counts)[:, None]
        starts = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        self.packed_seq_params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
        )

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens ``[s, 1, …]`` of the row as rows of a batch ``[longest, n, …]``."""
        rows = x.new_zeros(self.longest, len(self.last), *x.shape[2:])
        rows[self._aligned, self._rows] = x.squeeze(1)
        return rows

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`spread`."""
        return x[self._aligned, self._rows].unsqueeze(1)

    def clear_before(self, x: torch.Tensor) -> torch.Tensor:
        """Set what lies before the prompts to zero, in a batch ``[n, longest, c]``."""
        return x.masked_fill(self._before.unsqueeze(-1), 0)
