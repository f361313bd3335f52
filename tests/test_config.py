"""Settings that the hybrid stack would not read are refused, not ignored."""

from __future__ import annotations

import pytest
from torch.nn import functional as F

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.errors import UserError
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.settings.combinations import with_modules_of


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers_in_first_pipeline_stage", 1),
        ("num_layers_in_last_pipeline_stage", 1),
        ("account_for_embedding_in_pipeline_split", True),
        ("account_for_loss_in_pipeline_split", True),
        ("pipeline_model_parallel_layout", "Et|tL"),
        ("recompute_granularity", "full"),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("recompute_modules", ["moe"]),
        ("mode", "mamba9"),
        ("m2rnn_kernel", "cuda"),
        ("mamba3_kernel", "cuda"),
        ("m2rnn_kernel", "tritn"),
        ("position_embedding_type", "learned_absolute"),
        ("qk_layernorm", True),
        ("qk_clip", True),
        ("mtp_num_layers", 1),
        ("multi_latent_attention", True),
        ("rotary_interleaved", True),
        ("moe_layer_freq", 2),
        ("cpu_offloading", True),
        ("delay_wgrad_compute", True),
        ("fp4", "e2m1"),
        ("use_mamba_mem_eff_path", False),
        ("mamba3_mimo_rank", 4),
        ("add_bias_linear", True),
        ("normalization", "Foo"),
        ("moe_token_dispatcher_type", "flex"),
        ("moe_token_dispatcher_type", "Foo"),
    ],
)
def test_refused(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        HybridConfig(**tiny_model("AEMR", **{field: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias_activation_fusion": True, "activation_func": F.gelu}, "only silu with a gate"),
        (
            {"gated_linear_unit": False, "glu_linear_offset": 1.0},
            "glu_linear_offset=1.0 would be ignored",
        ),
    ],
)
def test_an_activation_that_an_mlp_would_not_compute(
    changes: dict[str, object], message: str
) -> None:
    without_experts = {"num_moe_experts": None, "moe_ffn_hidden_size": None}
    with pytest.raises(UserError, match=message):
        HybridConfig(**tiny_model("AF", **without_experts, **changes))
    HybridConfig(**tiny_model("A", **without_experts, **changes))


def test_biases_where_every_block_has_them() -> None:
    assert HybridConfig(**tiny_model("AMF", add_bias_linear=True)).add_bias_linear
    with pytest.raises(
        UserError, match=r"add_bias_linear=True: the projections of M have no biases"
    ):
        HybridConfig(**tiny_model("AM", add_bias_linear=True, mode="mamba3"))


@pytest.mark.parametrize(
    ("pattern", "modules", "message"),
    [
        ("AMR", ["moe"], "recomputes moe. It can recompute core_attn, mamba, m2rnn."),
        ("AE", ["core_attn", "mlp"], "recomputes mlp. It can recompute core_attn, moe"),
        ("FA", ["mla_up_proj"], "No block has latent attention"),
        ("FA", ["layernorm"], "recomputes layernorm. It can recompute mlp, core_attn."),
        ("E", None, r"\['core_attn'\] \(Megatron's default\): no block of this model recomputes"),
        ("MR", ["layernorm"], "recomputes layernorm. It can recompute mamba, m2rnn."),
        ("AE", ["mamba"], "recomputes mamba. It can recompute core_attn, moe"),
        ("AE", [], r"recompute_modules=\[\]: is empty"),
    ],
)
def test_what_no_block_recomputes_is_refused(
    pattern: str, modules: list[str] | None, message: str
) -> None:
    asked = {"recompute_granularity": "selective", "recompute_modules": modules}
    with pytest.raises(UserError, match=message):
        HybridConfig(**tiny_model(pattern, **asked))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute_num_layers": 1}, "needs recompute_method. Legal: 'uniform'"),
        ({"recompute_method": "uniform"}, "needs recompute_num_layers of at least 1; it is None"),
        ({"recompute_method": "block", "recompute_num_layers": 0}, "of at least 1; it is 0"),
        (
            {
                "recompute_method": "block",
                "recompute_num_layers": 1,
                "recompute_modules": ["moe"],
            },
            "recompute_modules=.'moe'. has no effect with recompute_granularity='full'",
        ),
        ({"moe_layer_recompute": True}, "moe_layer_recompute=True has no effect with"),
        (
            {"recompute_granularity": None, "recompute_method": "block"},
            "recompute_method='block', recompute_num_layers=None have no effect without",
        ),
    ],
)
def test_full_recompute_says_what_it_needs(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HybridConfig(**tiny_model("AEMR", **{"recompute_granularity": "full", **settings}))


def test_modules_that_megatron_does_not_know_are_kept() -> None:
    modules = ["mamba", "core_attn", "m2rnn"]
    asked = {"recompute_granularity": "selective", "recompute_modules": modules}
    assert HybridConfig(**tiny_model("AMR", **asked)).recompute_modules == modules


def test_a_part_of_the_families_keeps_its_modules() -> None:
    asked = {"recompute_granularity": "selective", "recompute_modules": ["moe", "mamba"]}
    assert with_modules_of(asked, "AM") == {**asked, "recompute_modules": ["mamba"]}
    assert with_modules_of({**asked, "num_layers": 1}, "A") == {"num_layers": 1}
    default = {"recompute_granularity": "selective"}
    assert with_modules_of(default, "AE")["recompute_modules"] == ["core_attn"]
    assert with_modules_of(asked, "X") == asked


def test_a_shared_expert_that_is_not_there_is_not_recomputed() -> None:
    asked = {"recompute_granularity": "selective", "recompute_modules": ["shared_experts"]}
    assert HybridConfig(**tiny_model("E", **asked)).recompute_modules == ["shared_experts"]
    with pytest.raises(UserError, match="It can recompute moe, moe_act, layernorm"):
        without = {"moe_shared_expert_intermediate_size": None}
        HybridConfig(**tiny_model("E", **asked, **without))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_dropout", 1.0),
        ("attention_dropout", -0.1),
        ("layernorm_epsilon", 0.0),
        ("softmax_scale", -1.0),
        ("init_method_std", -0.02),
        ("rotary_percent", 1.5),
        ("rotary_percent", 0.1),
        ("make_vocab_size_divisible_by", -8),
        ("moe_expert_capacity_factor", -1.0),
        ("moe_aux_loss_coeff", -1e-3),
        ("moe_aux_loss_coeff", [1e-3, 1e-3]),
        ("m2rnn_conv_kernel", 0),
        ("m2rnn_state_gradient_clip", 0.0),
    ],
)
def test_numbers_that_mean_nothing(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        HybridConfig(**tiny_model("AEMR", **{field: value}))


def test_gathered_logits_are_refused_where_they_would_change_the_loss() -> None:
    assert not HybridConfig(**tiny_model("A", parallel_output=False)).parallel_output
    with pytest.raises(UserError, match="parallel_output=False gathers the logits over TP=2"):
        HybridConfig(**tiny_model("A", parallel_output=False, tensor_model_parallel_size=2))


def test_accepted() -> None:
    assert HybridConfig(**tiny_model("AEMR")).num_layers == 4
