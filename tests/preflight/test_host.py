"""What this machine has no modules for is refused before a rank is started or a file written."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_megacpp.errors import UserError
from nemo_megacpp.preflight import preflight
from nemo_megacpp.preflight.model_checks import validate_host, validate_model
from nemo_megacpp.recipes.recipe import resolve


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("normalization=LayerNorm",), "Legal: 'RMSNorm'"),
        (("layernorm_zero_centered_gamma=true",), "with a gain around one"),
        (("softmax_type=learnable",), "Legal: 'vanilla'"),
        (("window_size=[8, 0]",), "has no window"),
        (("pattern=AF", "use_te_activation_func=true"), "needs Transformer Engine"),
        (("m2rnn_kernel=triton",), "m2rnn_kernel='triton' needs a GPU"),
        (("m2rnn_depth_state=true",), "from one R block to the next, and the pattern has 1 R."),
        (("mode=mamba3", "mamba3_kernel=triton"), "mamba3_kernel='triton' needs a GPU"),
        (
            ("cp=2", "m2rnn_num_heads=30", "m2rnn_context_parallel=all_to_all"),
            "m2rnn_num_heads=30 / TP=2 = 15, CP=2. Choose 'serial' or 'auto'.",
        ),
        (
            ("cp=2", "packed_documents=true", "moe_expert_capacity_factor=1.5"),
            "packed_documents with CP=2 and moe_expert_capacity_factor=1.5",
        ),
    ],
)
def test_refused_before_the_run(
    overrides: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        preflight(resolve("nam56r_tiny", overrides))
    assert message in str(refusal.value)
    assert not any(tmp_path.iterdir())


def test_what_no_block_reads_is_let_through() -> None:
    for overrides in (
        ["pattern=AM", "m2rnn_kernel=triton", "use_te_activation_func=true"],
        ["cp=2", "m2rnn_context_parallel=all_to_all"],
        ["cp=2", "moe_expert_capacity_factor=1.5"],
    ):
        recipe = resolve("nam56r_tiny", overrides)
        validate_host(recipe, validate_model(recipe))
