"""The embeddings of side channels against their equation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.side_channels import SideChannelEmbeddings
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.runtime.distributed import fake_rank
from nemo_megacpp.side_channels import SideChannel, read_side_channels


def _naive(
    x: torch.Tensor,
    ids: dict[str, torch.Tensor],
    channels: tuple[SideChannel, ...],
    weights: dict[str, torch.Tensor],
) -> torch.Tensor:
    """``x + Σ E[ids] + W [x; E[ids]; …]``, token by token."""
    out = torch.empty_like(x)
    for s in range(x.size(0)):
        for b in range(x.size(1)):
            added, joined = x[s, b], [x[s, b]]
            for channel in channels:
                row = weights[f"tables.{channel.name}.weight"][ids[channel.name][b, s]]
                if channel.combine == "add":
                    added = added + row
                else:
                    joined.append(row)
            if len(joined) > 1:
                added = added + weights["projection"] @ torch.cat(joined)
            out[s, b] = added
    return out


CHANNELS: dict[str, list[dict[str, Any]]] = {
    "add": [{"name": "a", "vocab_size": 5, "field": "a"}],
    "add-split": [{"name": "a", "vocab_size": 5, "field": "a", "partition": "vocabulary"}],
    "concat": [{"name": "a", "vocab_size": 5, "field": "a", "combine": "concat", "width": 3}],
    "all": [
        {"name": "a", "vocab_size": 5, "field": "a"},
        {"name": "b", "vocab_size": 7, "ngram": 2, "combine": "concat", "width": 3},
        {
            "name": "c",
            "vocab_size": 6,
            "field": "c",
            "combine": "concat",
            "partition": "vocabulary",
        },
        {"name": "d", "vocab_size": 4, "field": "d", "partition": "vocabulary"},
    ],
}


@pytest.mark.parametrize("kind", CHANNELS)
def test_against_the_equation(kind: str) -> None:
    with fake_rank(ParallelLayout(), 0):
        from megatron.core import parallel_state

        torch.manual_seed(0)
        fields = {"params_dtype": torch.float64, "use_cpu_initialization": True}
        config = HybridConfig(**tiny_model("A", hidden_size=9, num_attention_heads=2), **fields)
        channels = read_side_channels(CHANNELS[kind])
        group = parallel_state.get_tensor_model_parallel_group()
        module = SideChannelEmbeddings(config, channels, group)
        weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        x = torch.randn(5, 3, 9, dtype=torch.float64)
        ids = {c.name: torch.randint(c.vocab_size, (3, 5)) for c in channels}
        direction = torch.randn_like(x)

        leaves = [x.clone().requires_grad_(), *(w.requires_grad_() for w in weights.values())]
        expected = _naive(leaves[0], ids, channels, weights)
        wanted = torch.autograd.grad((expected * direction).sum(), leaves)
        mine = x.clone().requires_grad_()
        found = module(mine, ids)
        got = torch.autograd.grad((found * direction).sum(), [mine, *module.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
