"""From a name, a YAML file and overrides to one recipe; and what is refused on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.core.activations import squared_relu

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.nemo.resume_demo import MAX_STEPS
from nemo_megacpp.pattern import Family
from nemo_megacpp.recipes.catalog import CATALOG
from nemo_megacpp.recipes.recipe import Recipe, from_mapping, resolve
from nemo_megacpp.recipes.views import job_of, model_settings

ARTICLES_YAML = """\
mode: nemo_native
pattern: AEMEAEMEAEMR
tensor_parallel: 2
sequence_parallel: true
expert_tensor_parallel: 1
context_parallel: 1
pipeline_parallel: 1
"""


def written(folder: Path, text: str, name: str = "my.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- what a recipe becomes


def test_the_articles_yaml_is_the_tiny_recipe(tmp_path: Path) -> None:
    recipe = resolve(written(tmp_path, ARTICLES_YAML))
    assert recipe.name == "nam56r_tiny"
    tiny = CATALOG["nam56r_tiny"]
    assert recipe.model == {**tiny.model, "mode": "nemo_native"}
    assert recipe.layout == ParallelLayout(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        context_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        world_size=None,
    )
    assert recipe.training == tiny.training
    assert (recipe.data, recipe.run_dir, recipe.resume) == (None, None, None)
    assert recipe.defaults == (
        "recipe: nam56r_tiny",
        "num_layers: 12 (depth of the recipe)",
        "max_steps: 160",
        "global_batch_size: 8",
        "lr: 0.004",
        "precision: fp32",
        "data: torch's C++ headers",
    )


def test_a_named_recipe_says_its_defaults_too() -> None:
    recipe = resolve("nam56r", ["lr=1e-4", "data=texts"])
    assert recipe.defaults == (
        "layout: tp=2,sp=true,etp=1",
        "max_steps: 100000",
        "global_batch_size: 256",
        "precision: bf16",
    )
    assert recipe.given == {"lr", "data"}


def test_the_depth_that_was_chosen_says_whose_it_is() -> None:
    assert "num_layers: 12 (depth of the recipe)" in resolve("nam56r_tiny", ["pattern=AE"]).defaults
    longer = resolve("nam56r_tiny", ["pattern=AEMEAEMEAEMRAE"])
    assert "num_layers: 14 (depth of the pattern)" in longer.defaults


def test_data_given_as_null_is_the_built_in_corpus() -> None:
    recipe = resolve("nam56r_tiny", ["data=null"])
    assert recipe.data is None
    assert "data: torch's C++ headers" in recipe.defaults


def test_a_yaml_names_its_base(tmp_path: Path) -> None:
    recipe = resolve(written(tmp_path, "recipe: nam56r\nlearning_rate: 1e-4\n"))
    assert recipe == dataclasses.replace(
        resolve("nam56r"), training=dataclasses.replace(CATALOG["nam56r"].training, lr=1e-4)
    )
    assert not any(default.startswith("recipe:") for default in recipe.defaults)
    assert len(recipe.pattern) == 52


def test_the_articles_pattern_over_nam56r_is_52_layers(tmp_path: Path) -> None:
    recipe = resolve(written(tmp_path, "recipe: nam56r\n" + ARTICLES_YAML))
    assert len(recipe.pattern) == 52
    assert recipe.pattern.counts()[Family.RECURRENT] == 4
    assert recipe.model["hidden_size"] == 3584


MEGATRON_NAMES = {
    "mode": "nemo_native",
    "hybrid_pattern": "AEMEAEMEAEMR",
    "num_layers": 24,
    "tensor_model_parallel_size": 4,
    "sequence_parallel": True,
    "expert_tensor_parallel_size": 2,
    "expert_model_parallel_size": 2,
    "context_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 3,
    "lr": 0.002,
    "max_steps": 7,
    "val_check_interval": 5,
    "limit_val_batches": 2,
}
ARTICLES_NAMES = {
    "mode": "nemo_native",
    "pattern": "AEMEAEMEAEMR",
    "depth": 24,
    "tensor_parallel": 4,
    "sequence_parallel": True,
    "expert_tensor_parallel": 2,
    "expert_parallel": 2,
    "context_parallel": 2,
    "pipeline_parallel": 2,
    "virtual_pipeline": 3,
    "learning_rate": 0.002,
    "train_iters": 7,
    "eval_interval": 5,
    "eval_iters": 2,
}
SHORT_NAMES = {
    "mode": "nemo_native",
    "pattern": "AEMEAEMEAEMR",
    "depth": 24,
    "TP": 4,
    "sp": True,
    "etp": 2,
    "ep": 2,
    "cp": 2,
    "pp": 2,
    "vpp": 3,
    "learning_rate": 0.002,
    "steps": 7,
    "eval_interval": 5,
    "eval_iters": 2,
}


@pytest.mark.parametrize("names", [ARTICLES_NAMES, SHORT_NAMES], ids=["articles", "short"])
def test_all_names_give_the_same_recipe(names: dict[str, Any], tmp_path: Path) -> None:
    full = from_mapping(MEGATRON_NAMES)
    assert full.layout.describe().startswith("TP=4 SP CP=2 EP=2 ETP=2 PP=2 VPP=3 ")
    assert (full.training.max_steps, full.training.lr) == (7, 0.002)
    assert (full.training.val_check_interval, full.training.limit_val_batches) == (5, 2)
    other = from_mapping(names)
    assert other == full
    assert other.given == full.given
    assert resolve(written(tmp_path, yaml.safe_dump(names))) == full
    assert resolve("nam56r_tiny", [f"{key}={value}" for key, value in names.items()]) == full


@pytest.mark.parametrize(
    ("overrides", "layout"),
    [
        ((), "tp=2,sp=true,etp=1"),
        (("pp=2",), "tp=2,sp=true,pp=2,etp=1"),
        (("cp=2", "ep=4"), "tp=2,sp=true,cp=2,ep=4,etp=1"),
        (("tp=4",), "tp=4,sp=true,etp=1"),
        (("tp=1",), "tp=1,sp=false,etp=1"),
        (("tp=1", "pp=2"), "tp=1,sp=false,pp=2,etp=1"),
        (("tp=4", "sp=false"), "tp=4,sp=false,etp=1"),
        (("sp=false",), "tp=2,sp=false,etp=1"),
        (("etp=none",), "tp=2,sp=true"),
        (("world=8",), "tp=2,sp=true,etp=1,world=8"),
    ],
)
def test_overrides_keep_the_other_degrees(overrides: tuple[str, ...], layout: str) -> None:
    assert resolve("nam56r_tiny", overrides).layout == ParallelLayout.parse(layout)


def test_overrides_win_over_the_file_under_any_name(tmp_path: Path) -> None:
    path = written(tmp_path, ARTICLES_YAML)
    recipe = resolve(path, ["tp=4", "hybrid_pattern=AMER", "num_layers=8", "recipe=nam56r"])
    assert recipe.layout == ParallelLayout.parse("tp=4,etp=1,sp=true")
    assert recipe.pattern.letters == "AMERAMER"
    assert recipe.name == "nam56r"


@pytest.mark.parametrize(
    ("settings", "letters"),
    [
        ({"pattern": "AEMR"}, "AEMR" * 3),
        ({"pattern": "AEMRE"}, "AEMREAEMREAE"),
        ({"pattern": "ablock, eblock"}, "AE" * 6),
        ({"pattern": "AEMEAEMEAEMRA"}, "AEMEAEMEAEMRA"),  # longer than the base is deep
        ({"pattern": "AE", "depth": 3}, "AEA"),
        ({"pattern": "AE", "recipe": "nam56r"}, "AE" * 26),
    ],
)
def test_a_pattern_is_tiled_to_the_depth(settings: dict[str, Any], letters: str) -> None:
    assert from_mapping(settings).pattern.letters == letters


def test_a_unit_may_end_with_a_cut() -> None:
    pattern = from_mapping({"pattern": "AEME|"}).pattern
    assert str(pattern) == "AEME|AEME|AEME"
    with pytest.raises(UserError, match="pipeline chunk is empty"):
        from_mapping({"pattern": "AEME||"})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lr", "4e-3", 0.004),  # a text to YAML 1.1
        ("lr", "1", 1.0),
        ("weight_decay", "0", 0.0),
        ("stop_after", "null", None),
        ("use_distributed_optimizer", "yes", True),
    ],
)
def test_values_of_training(key: str, text: str, value: object) -> None:
    found = getattr(resolve("nam56r_tiny", [f"{key}={text}"]).training, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("moe_aux_loss_coeff", "1e-2", 0.01),
        ("moe_aux_loss_coeff", "[1e-2, 1]", [0.01, 1.0]),
        ("m2rnn_state_gradient_clip", "null", None),
        ("num_query_groups", "null", None),
        ("recompute_modules", "[core_attn, moe]", ["core_attn", "moe"]),
        ("window_size", "[7, 0]", (7, 0)),
        ("moe_token_dispatcher_type", "allgather", "allgather"),
    ],
)
def test_values_of_the_model(key: str, text: str, value: object) -> None:
    found = resolve("nam56r_tiny", [f"{key}={text}"]).model[key]
    assert found == value
    assert type(found) is type(value)


ROUND_TRIPS: list[tuple[str, tuple[str, ...]]] = [
    ("nam56r", ()),
    ("nam56r_tiny", ()),
    ("nam56r_tiny", ("tp=1", "pp=2", "vpp=3", "world=4", "stop_after=3")),
    ("nam56r", ("etp=none", "ep=2")),
    ("nam56r_tiny", ("tp=2", "sp=false")),
    ("nam56r_tiny", ("pattern=AE|MR|", "depth=8", "mode=nemo_native", "lr=1e-3")),
    ("nam56r_tiny", ("data=d", "run_dir=r", "resume=auto", "moe_aux_loss_coeff=[0.1, 1e-5]")),
    ("nam56r_tiny", ("m2rnn_state_gradient_clip=null", "window_size=[7, 0]")),
]


@pytest.mark.parametrize(("name", "overrides"), ROUND_TRIPS)
def test_a_recipe_survives_being_written(
    name: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = resolve(name, overrides)
    assert from_mapping(recipe.to_mapping()) == recipe
    again = resolve(written(tmp_path, yaml.safe_dump(recipe.to_mapping())))
    assert again == recipe
    assert again.to_mapping() == recipe.to_mapping()


# --- what is refused


def refused(*overrides: str, source: str = "nam56r_tiny") -> str:
    with pytest.raises(UserError) as refusal:
        resolve(source, overrides)
    return str(refusal.value)


def test_unknown_recipe_names_the_nearest() -> None:
    message = refused(source="nam56r_tinny")
    assert "no recipe 'nam56r_tinny'. Did you mean 'nam56r_tiny'?" in message
    assert "nam56r, nam56r_tiny" in message
    assert "Did you mean" not in refused(source="gpt")
    assert "no recipe 'nam56' to build on. Did you mean 'nam56r'?" in refused("recipe=nam56")
    assert "no recipe ['a'] to build on" in refused("recipe=[a]")


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("hiden_size", "hidden_size"),
        ("paterns", "pattern"),
        ("tensor_paralel", "tensor_parallel"),
        ("pipline_parallel", "pipeline_parallel"),
        ("contxt_parallel", "context_parallel"),
        ("expert_tensor_paralel", "expert_tensor_parallel"),
        ("tensor_model_parallel", "tensor_model_parallel_size"),
        ("learning_rat", "learning_rate"),
        ("max_step", "max_steps"),
        ("batch_size", "micro_batch_size"),
        ("num_expert", "num_moe_experts"),
        ("run_folder", "run_dir"),
    ],
)
def test_unknown_keys_name_the_nearest(key: str, suggestion: str) -> None:
    assert refused(f"{key}=1") == f"There is no setting {key!r}. Did you mean {suggestion!r}?"


def test_a_key_like_no_other_gets_no_suggestion() -> None:
    assert refused("qqqqqq=1") == "There is no setting 'qqqqqq'."


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("dp", "world / (tp x cp x pp)"),
        ("data_parallel_size", "world / (tp x cp x pp)"),
        ("bf16", "precision"),
        ("fp16", "precision"),
        ("params_dtype", "precision"),
        ("use_cpu_initialization", "the machine"),
        ("moe_router_dtype", "fp32"),
    ],
)
def test_what_follows_from_others_cannot_be_set(key: str, reason: str) -> None:
    message = refused(f"{key}=1")
    assert message.startswith(f"{key} is not a setting of a recipe: ")
    assert reason in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps=10.5", "max_steps: 10.5 is not a whole number."),
        ("max_steps=many", "max_steps: 'many' is not a whole number."),
        ("max_steps=true", "max_steps: True is not a whole number."),
        ("max_steps=null", "max_steps: None is not a whole number."),
        ("stop_after=soon", "stop_after: 'soon' is not a whole number or null."),
        ("lr=fast", "lr: 'fast' is not a number."),
        ("lr=[1]", "lr: [1] is not a number."),
        ("lr=nan", "lr: 'nan' is not a number."),
        ("lr=.inf", "lr: inf is not a number."),
        ("use_distributed_optimizer=3", "use_distributed_optimizer: 3 is not true or false."),
        ("precision=16", "precision: 16 is not 'fp32' or 'bf16'."),
        ("hidden_size=wide", "hidden_size: 'wide' is not a whole number."),
        ("num_attention_heads=28.0", "num_attention_heads: 28.0 is not a whole number."),
        ("num_moe_experts=few", "num_moe_experts: 'few' is not a whole number or null."),
        ("seq_length=null", "seq_length: None is not a whole number."),
        ("depth=deep", "depth: 'deep' is not a whole number."),
        ("pattern=12", "pattern: 12 is not a string."),
        ("pattern=null", "pattern is empty; give letters, for example pattern=AEMR."),
        ("add_bias_linear=2", "add_bias_linear: 2 is not true or false."),
        ("m2rnn_clip_order=x", "'x' is not 'before_output' or 'after_output'."),
        ("mode=other", "mode: 'other' is not 'nemo_native'"),
        ("moe_aux_loss_coeff=[a]", "['a'] is not a number or a list."),
        ("window_size=[1]", "window_size: [1] is not a list of 2 or null."),
        ("activation_func=mish", "'mish' is not 'silu', 'gelu', 'relu2' or 'quick_gelu'."),
        ("activation_func=[silu]", "['silu'] is not 'silu', 'gelu', 'relu2' or 'quick_gelu'."),
        ("init_method=xavier", "init_method cannot be set in a recipe"),
        ("tp=two", "tensor_model_parallel_size must be a positive whole number; got 'two'."),
        ("pp=0", "pipeline_model_parallel_size must be a positive whole number; got 0."),
        ("sp=maybe", "sequence_parallel must be true or false; got 'maybe'."),
    ],
)
def test_values_of_a_wrong_type(override: str, message: str) -> None:
    assert message in refused(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps=0", "max_steps: 0 must be at least 1."),
        ("stop_after=0", "stop_after: 0 must be at least 1."),
        ("micro_batch_size=-1", "micro_batch_size: -1 must be at least 1."),
        ("save_interval=0", "save_interval: 0 must be at least 1."),
        (
            "heartbeat_timeout_minutes=0",
            "heartbeat_timeout_minutes: 0 must be at least 0.01 and at most 10000.",
        ),
        (
            "heartbeat_timeout_minutes=30",
            "init_timeout_minutes: 20 is below heartbeat_timeout_minutes=30, and what it covers "
            "takes longer than a step. Give both.",
        ),
        ("warmup_steps=-1", "warmup_steps: -1 must be at least 0."),
        ("warmup_steps=160", "warmup_steps: 160 is not below max_steps=160"),
        ("seed=-1", "seed: -1 must be at least 0 and at most 2147483647."),
        ("seed=4294967296", "seed: 4294967296 must be at least 0 and at most 2147483647."),
        ("lr=0", "lr: 0 must be above 0."),
        ("adam_eps=0", "adam_eps: 0 must be above 0."),
        ("adam_beta1=-0.1", "adam_beta1: -0.1 must be at least 0 and below 1."),
        ("lr_decay_style=wsd", "lr_decay_style: 'wsd' is not 'constant' or 'linear' or 'cosine'"),
        ("lr_decay_style=WSD", "lr_decay_style=WSD needs lr_wsd_decay_steps"),
        ("lr_wsd_decay_steps=9", "and no other style has it"),
        ("lr_warmup_init=0.1", "lr_warmup_init: 0.1 is above lr=0.004, the peak."),
        ("stop_after=161", "stop_after: 161 is past the end of the run, max_steps=160"),
        ("lr=1e-5", "min_lr: 0.0004 is above lr=1e-05"),
        (
            "overlap_param_gather=true use_distributed_optimizer=false",
            "overlap_param_gather=true with use_distributed_optimizer=false: Megatron gathers",
        ),
        (
            "overlap_param_gather=true overlap_grad_reduce=false",
            "overlap_param_gather=true with overlap_grad_reduce=false: Megatron gathers",
        ),
        ("adam_beta2=1", "adam_beta2: 1 must be at least 0 and below 1."),
        ("precision=fp8", "precision: 'fp8' is not 'fp32' or 'bf16'."),
    ],
)
def test_values_out_of_range(override: str, message: str) -> None:
    assert message in refused(*override.split())


@pytest.mark.parametrize(
    ("overrides", "gathers"),
    [
        ((), True),
        (("overlap_param_gather=false",), False),
        (("use_distributed_optimizer=false",), False),
        (("overlap_grad_reduce=false",), False),
    ],
)
def test_parameters_are_gathered_in_the_forward_pass_where_that_is_legal(
    overrides: tuple[str, ...], gathers: bool
) -> None:
    recipe = resolve("nam56r_tiny", overrides)
    assert recipe.training.gathers_in_forward is gathers
    assert job_of(recipe).overlap_param_gather is gathers


def test_everything_that_is_wrong_is_listed_at_once_as_it_was_written() -> None:
    """Types, ranges, degrees, and relations of the settings that are themselves valid."""
    assert refused(
        *("steps=0", "learning_rate=fast", "keep_every=7", "depth=deep", "tp=two", "run_dir=3"),
        *("stop_after=400", "adam_beta1=1", "data=[]", "use_distributed_optimizer=3"),
    ).splitlines() == [
        "9 settings are invalid:",
        "  1. depth: 'deep' is not a whole number.",
        "  2. data is an empty blend; name at least one folder, or leave it out.",
        "  3. tensor_model_parallel_size must be a positive whole number; got 'two'.",
        "  4. steps: 0 must be at least 1.",
        "  5. learning_rate: 'fast' is not a number.",
        "  6. adam_beta1: 1 must be at least 0 and below 1.",
        "  7. use_distributed_optimizer: 3 is not true or false.",
        "  8. keep_every: 7 exempts checkpoints from keep_latest. Give keep_latest as well, or "
        "neither to keep all checkpoints.",
        "  9. keep_every: 7 is not a multiple of save_interval=80, so no such checkpoint would be "
        "saved.",
    ]


def test_relations_of_the_schedule() -> None:
    wsd = ("lr_decay_style=WSD", "lr_wsd_decay_steps=140")
    assert resolve("nam56r_tiny", wsd).training.lr_wsd_decay_steps == 140
    message = refused(*wsd, "warmup_steps=21")
    assert "140 is more than the steps after the warm-up, max_steps=160 - warmup" in message
    training = resolve("nam56r_tiny", ["lr_warmup_iters=7", "adam_eps=1e-5"]).training
    assert (training.warmup_steps, training.adam_eps) == (7, 1e-5)


def test_the_old_name_of_a_setting_leads_to_the_new_one() -> None:
    assert refused("keep_last=2") == "There is no setting 'keep_last'. Did you mean 'keep_latest'?"


@pytest.mark.parametrize(
    ("name", "max_steps", "warmup"),
    [
        ("nam56r_tiny", 20, 4),
        ("nam56r_tiny", 4, 0),
        ("nam56r_tiny", 99, 19),
        ("nam56r_tiny", 100, None),  # 20 of 100 are the recipe's own
        ("nam56r_tiny", 120, None),
        ("nam56r_tiny", 320, None),
        ("nam56r", 1000, 200),
        ("nam56r", 10_000, None),
    ],
)
def test_a_short_run_has_a_short_warm_up(name: str, max_steps: int, warmup: int | None) -> None:
    recipe, usual = resolve(name, [f"max_steps={max_steps}"]), resolve(name)
    said = [line for line in recipe.defaults if line.startswith("warmup_steps")]
    if warmup is None:
        assert (recipe.training.warmup_steps, said) == (usual.training.warmup_steps, [])
    else:
        assert recipe.training.warmup_steps == warmup
        assert said == [f"warmup_steps: {warmup} (max_steps / 5)"]
    assert resolve(name, [f"max_steps={max_steps}", "warmup_steps=3"]).training.warmup_steps == 3


def test_the_demos_schedule_is_the_recipes() -> None:
    """Its 120 steps keep the warm-up of 20."""
    recipe = resolve("nam56r_tiny", [f"max_steps={MAX_STEPS}"])
    assert (recipe.training.max_steps, recipe.training.warmup_steps) == (120, 20)


def test_a_warm_up_that_never_ends(tmp_path: Path) -> None:
    message = refused("max_steps=20", "warmup_steps=20")
    assert "warmup_steps: 20 is not below max_steps=20" in message
    path = written(tmp_path, yaml.safe_dump(resolve("nam56r_tiny").to_mapping()))
    assert "warmup_steps: 20 is not below max_steps=20" in refused("max_steps=20", source=path)


def test_an_unknown_letter_is_pointed_at() -> None:
    message = refused("pattern=AEXE")
    assert "'X' is not a letter of the pattern (position 3):\n  AEXE\n    ^" in message
    assert "Legal letters: A (ablock)" in message


def test_texts_are_taken_as_they_are_typed(tmp_path: Path) -> None:
    """YAML reads these names as the numbers 83 and 750, a truth, and a date that is none."""
    for name in ("0123", "12:30", "on", "2024-99-99"):
        assert resolve("nam56r_tiny", [f"run_dir={name}"]).run_dir == name
    for value in ("0123", "[a, b]", "true"):
        path = written(tmp_path, f"run_dir: {value}\n")
        assert "is not a string; put it in quotes" in refused(source=path)
    assert resolve(written(tmp_path, "run_dir: '0123'\n")).run_dir == "0123"
    assert "neither a folder nor a blend" in refused("data=0123")


@pytest.mark.parametrize("override", ["lr", "=3", ""])
def test_what_is_no_override(override: str) -> None:
    assert f"{override!r} is not a setting: write key=value." in refused(override)


def test_an_activation_has_a_name(tmp_path: Path) -> None:
    """YAML has no functions; the configuration that trains has."""
    recipe = resolve("nam56r_tiny", ["activation_func=relu2", "gated_linear_unit=false"])
    again = resolve(written(tmp_path, yaml.safe_dump(recipe.to_mapping())))
    assert again.model["activation_func"] == "relu2"
    assert model_settings(again, "cpu")["activation_func"] is squared_relu


def test_an_override_that_yaml_cannot_read() -> None:
    assert refused("lr=[1").startswith("lr: cannot read '[1' as a YAML value")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp: 2\ntensor_parallel: 4\n", "tensor_model_parallel_size is given twice"),
        ("pattern: AE\nhybrid_pattern: AM\n", "hybrid_pattern is given twice"),
        ("lr: 0.1\nsteps: 3\nlr: 0.2\n", "my.yaml gives lr twice, again in line 3."),
        ("", "must hold key: value lines; it holds nothing."),
        ("- tp\n- pp\n", "must hold key: value lines; it holds a list."),
        ("just words", "must hold key: value lines; it holds a str."),
        ("tp: [2\n", "cannot be read as YAML"),
        ("tp: 2\n---\ntp: 4\n", "cannot be read as YAML"),
        ("a: *b\n", "cannot be read as YAML"),
        ("run_dir: 2024-99-99\n", "cannot be read as YAML: month must be in 1..12"),
        ("3: 4\n", "There is no setting '3'"),
    ],
)
def test_files_that_are_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    assert message in refused(source=written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert refused(source=missing) == f"There is no file {missing}."
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml cannot be read as YAML" in refused(source=str(tmp_path / "binary.yaml"))
    (tmp_path / "folder.yml").mkdir()
    for folder in (tmp_path / "folder.yml", tmp_path):
        assert refused(source=str(folder)) == f"{folder} cannot be read: Is a directory."


def test_recipes_compare_by_what_they_train() -> None:
    given = resolve("nam56r_tiny", ["lr=4e-3"])
    assert isinstance(given, Recipe)
    assert given == resolve("nam56r_tiny")
    assert given.defaults != resolve("nam56r_tiny").defaults
