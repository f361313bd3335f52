"""Multi-token prediction against its formula, and what a model refuses with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.core.multi_token import missing_prediction
from nemo_megacpp.core.releases import imported
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import Family
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from nemo_megacpp.specs.depth_losses import reduced_depth_losses
from tests.bare import build_chunks, make_config

MISSING = missing_prediction()
needs_prediction = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
DEPTHS, SCALE = 2, 0.6


def _norm(x: torch.Tensor, module: Any, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * module.weight


def _ahead(rows: torch.Tensor, places: int) -> torch.Tensor:
    """What stands so many places ahead in each row ``[b, s]``; 0 beyond its end."""
    return F.pad(rows[:, places:], (0, places))


def _cross_entropy(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """In the logits' own dtype; Megatron's computes in float32."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.t().flatten(), reduction="none")
    return losses.view(labels.t().shape).t()


def _formula(
    model: Any, batch: dict[str, torch.Tensor], per_token: bool
) -> tuple[torch.Tensor, list[float]]:
    """The main loss plus the losses of the depths, and the latter alone, from the model's weights;
    the layers of the decoder and of the depths are the model's own modules."""
    eps = model.config.layernorm_epsilon
    table, head = model.embedding.word_embeddings.weight, model.output_layer.weight
    rotary = model.rotary_pos_emb(batch["tokens"].size(1))
    hidden = model.decoder(F.embedding(batch["tokens"], table).transpose(0, 1), None, None, rotary)
    mask = batch["loss_mask"]
    losses = _cross_entropy(batch["labels"], hidden @ head.t())
    total = (losses * mask).sum() / (1 if per_token else mask.sum())
    means = []
    for depth, layer in enumerate(model.mtp.layers, start=1):
        ahead = F.embedding(_ahead(batch["tokens"], depth), table).transpose(0, 1)
        both = [_norm(ahead, layer.enorm, eps), _norm(hidden, layer.hnorm, eps)]
        hidden = torch.cat(both, dim=-1) @ layer.eh_proj.weight.t()
        stack = layer.mtp_model_layer
        for family, inner in zip(stack.families, stack.layers, strict=True):
            if family in (Family.RECURRENT, Family.MAMBA):
                hidden = inner(hidden_states=hidden, attention_mask=None, **_hands_on(inner))
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            else:
                hidden, _ = inner(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
        hidden = _norm(hidden, layer.final_layernorm, eps)
        labels, kept = _ahead(batch["labels"], depth), _ahead(mask, depth)
        mean = (_cross_entropy(labels, hidden @ head.t()) * kept).sum() / kept.sum()
        means.append(float(mean))
        total = total + SCALE / DEPTHS * mean * (mask.sum() if per_token else 1)
    return total, means


def _hands_on(layer: Any) -> dict[str, bool]:
    return {"hands_on": False} if type(layer).__name__ == "DepthStateLayer" else {}


def _compared(changes: dict[str, Any]) -> tuple[float, float, int]:
    """On one rank: how far Megatron's gradients are from the formula's, relative to the largest of
    each; the largest gradient of the depths; and how many parameters there are."""
    torch.manual_seed(3)
    layout = ParallelLayout()
    model_fields = tiny_model("AMER/RMEAF/RMEAF", mtp_loss_scaling_factor=SCALE, **changes)
    spec = StepSpec(model_fields, dtype="float64")
    start_model_parallel(layout, 5)
    config = make_config(spec, layout)
    (model,) = build_chunks(config, layout)
    model.token_loss = _cross_entropy
    text = torch.randint(1, config.vocab_size, (2, config.seq_length + 1))
    mask = (torch.rand(2, config.seq_length) < 0.7).double()
    batch = {"tokens": text[:, :-1], "labels": text[:, 1:].contiguous(), "loss_mask": mask}
    positions = torch.arange(config.seq_length).expand(2, -1).contiguous()
    losses = model(batch["tokens"], positions, None, labels=batch["labels"], loss_mask=mask)
    per_token = config.calculate_per_token_loss
    parameters = list(model.parameters())
    loss = (losses * mask).sum() / (1 if per_token else mask.sum())
    ours = torch.autograd.grad(loss, parameters)
    total, means = _formula(model, batch, per_token)
    theirs = torch.autograd.grad(total, parameters)
    apart = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )
    names = [name for name, _ in model.named_parameters()]
    logged = reduced_depth_losses([model], config)
    assert list(logged.values()) == pytest.approx(means, rel=1e-12), (logged, means)
    assert list(reduced_depth_losses([model], config).values()) == [0, 0], "not cleared"
    depths = [g.abs().max() for name, g in zip(names, ours, strict=True) if "mtp" in name]
    return apart, float(min(depths)), len(parameters)


@needs_prediction
@pytest.mark.parametrize(
    "changes",
    [{}, {"mode": "mamba3", "calculate_per_token_loss": True, "m2rnn_state_gradient_clip": None}],
    ids=["mean", "per token"],
)
def test_gradients_are_those_of_the_formula(ranks: WorkerPool, changes: dict[str, Any]) -> None:
    """In float64, two depths of all families with a loss mask: 1e-10 of each tensor's largest."""
    # Auxiliary losses of the router enter through its own backward pass in both.
    apart, least, count = ranks.run(1, _compared, changes)[0]
    assert apart < 1e-10 and least > 0 and count > 80


@needs_prediction
def test_the_pattern_says_the_number_of_depths() -> None:
    assert HybridConfig(**tiny_model("AEM/A/A")).mtp_num_layers == 2
    assert HybridConfig(**tiny_model("AEM/A/A", mtp_num_layers=2)).mtp_num_layers == 2
    assert HybridConfig(**tiny_model("AEM")).mtp_num_layers is None
    assert HybridConfig(**tiny_model("AM/E")).num_moe_experts == 8
    with pytest.raises(UserError, match="mtp_num_layers=1, and the pattern AEM/A/A has 2"):
        HybridConfig(**tiny_model("AEM/A/A", mtp_num_layers=1))


@needs_prediction
@pytest.mark.parametrize(
    ("pattern", "changes", "message"),
    [
        (
            "AM/A",
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            "recompute_granularity='full' with multi-token",
        ),
        ("AM/A", {"share_embeddings_and_output_weights": True}, "allocates a second head"),
        ("RR/R", {"m2rnn_depth_state": True}, "R blocks in a prediction depth"),
        ("AM/A", {"mtp_loss_scaling_factor": -1.0}, "-1.0 must be at least 0"),
        ("AM/A", {"mtp_use_repeated_layer": True}, "mtp_use_repeated_layer=True: No case"),
        ("AM/A", {"mtp_detach_heads": True}, "mtp_detach_heads=True: Clips"),
        ("AM/A", {"mtp_hybrid_override_pattern": "M"}, "into the pattern, as in 'AEMR/AM/AM'"),
        (
            "AM/A",
            {"side_channels": [{"name": "language", "vocab_size": 5, "field": "lang"}]},
            "side_channels with multi-token prediction",
        ),
    ],
)
def test_refused_with_prediction(pattern: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HybridConfig(**tiny_model(pattern, **changes))


@pytest.mark.skipif(MISSING is None, reason=f"Megatron-Core {imported()} has it")
def test_refused_without_it() -> None:
    with pytest.raises(
        UserError, match=r"pattern AEM/A/A has layers .*MambaModel of the installed Megatron-Core 0"
    ):
        HybridConfig(**tiny_model("AEM/A/A"))
