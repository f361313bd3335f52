"""A recipe as arguments of Megatron-LM: all of them exist, and they build the recipe's model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.models.mamba import MambaModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import import_module
from torch.nn import functional as F

from nemo_megacpp.cli import build_parser
from nemo_megacpp.config import HybridConfig
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.megatron_args.argument_list import megatron_arguments
from nemo_megacpp.megatron_args.dialect import Dialect, choose
from nemo_megacpp.megatron_args.list_options import describe
from nemo_megacpp.recipes.catalog import CATALOG
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import model_settings
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from nemo_megacpp.specs.hybrid_model import build_hybrid_model
from nemo_megacpp.specs.named import read_spec_name, spec_name
from nemo_megacpp.values import read_value

DIALECT, _ = choose("core_v0.16.1")
_PLAIN = "use_distributed_optimizer=false"
"""A run on a CPU resumes no other optimizer."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory and cache: no built-in corpus, nothing to write over."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def _words(name: str, *overrides: str, device: Any = "cpu") -> list[str]:
    words, _ = megatron_arguments(resolve(name, overrides), DIALECT, "there", device)
    return words


def _parse(words: list[str], dialect: Dialect = DIALECT) -> Namespace:
    """Parse as the script would: with an option table, and without abbreviations."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for name, option in dialect.options.items():
        kind: dict[str, Any] = {"action": "store_const", "const": option.get("const")}
        if "nargs" in option:
            kind = {"nargs": option["nargs"]}
        kind |= {"dest": option["dest"], "default": option["default"]}
        parser.add_argument(name, *option.get("also", []), **kind)
    args, unknown = parser.parse_known_args(words)
    assert not unknown
    return args


def _configuration(args: Namespace) -> TransformerConfig:
    """Build what ``pretrain_mamba.py`` builds of its arguments."""

    def read(name: str) -> Any:
        value = getattr(args, name)
        if value == DIALECT.default(name):
            return value or False if name == "use_cpu_initialization" else value
        if isinstance(value, str):
            value = read_value(TransformerConfig, name, yaml.safe_load(value))
        elif isinstance(value, list):
            value = [yaml.safe_load(item) for item in value]
            value = value[0] if len(value) == 1 and name.startswith("moe_") else value
        return value

    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    functions = {"activation_func", "attention_backend", "cp_comm_type"}
    fields = {name: read(name) for name in names - functions if hasattr(args, name)}
    assert args.swiglu
    fields |= {
        "num_moe_experts": None if args.num_experts is None else int(args.num_experts),
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "bias_activation_fusion": args.bias_swiglu_fusion,
        "persist_layer_norm": not args.no_persist_layer_norm,
        "num_query_groups": fields["num_query_groups"] if args.group_query_attention else None,
        "params_dtype": torch.bfloat16 if args.bf16 else torch.float32,
    }
    fields["overlap_p2p_comm"] = False  # without virtual stages
    fields["moe_aux_loss_coeff"] = float(fields["moe_aux_loss_coeff"])
    return TransformerConfig(**fields)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", CATALOG)
def test_the_configuration_is_the_recipes(name: str, device: str) -> None:
    """Field by field, but for how the script runs its pipeline and names its backend."""
    args = _parse(_words(name, "run_dir=run", device=device))
    built, meant = _configuration(args), HybridConfig(**model_settings(resolve(name), device))
    others = {"init_method", "output_layer_init_method", "embedding_init_method", "pipeline_dtype"}
    others |= {"cp_comm_type", "transformer_impl"}
    for field in dataclasses.fields(TransformerConfig):
        if field.name not in others:
            assert getattr(built, field.name) == getattr(meant, field.name), field.name
    assert (args.transformer_impl == "local") is (device == "cpu")
    training = CATALOG[name].training
    assert (int(args.train_iters), int(args.lr_decay_iters)) == (training.max_steps,) * 2
    assert (float(args.lr), float(args.min_lr)) == (training.lr, training.min_lr)
    assert int(args.global_batch_size) == training.global_batch_size
    assert args.bf16 is (training.precision == "bf16")
    assert len(args.hybrid_override_pattern) == meant.num_layers, "the script counts layers by it"
    assert args.save == str(Path("there/checkpoints").absolute())


def _both_models(name: str, overrides: tuple[str, ...], words: list[str]) -> list[str]:
    """On a rank: build the model from arguments and from the recipe; return what differs."""
    recipe, args = resolve(name, overrides), _parse(words)
    start_model_parallel(recipe.layout)
    ours = build_hybrid_model(HybridConfig(**model_settings(recipe, "cpu")))
    theirs = MambaModel(
        config=_configuration(args),
        mamba_stack_spec=import_module(args.spec),
        vocab_size=int(args.padded_vocab_size),
        max_sequence_length=int(args.max_position_embeddings),
        hybrid_override_pattern=args.hybrid_override_pattern,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=float(args.rotary_percent),
        rotary_base=int(args.rotary_base),
        parallel_output=True,
    )
    shapes = [
        {key: value.shape for key, value in model.named_parameters()} for model in (ours, theirs)
    ]
    if shapes[0] != shapes[1]:
        return [str(set(shapes[0].items()) ^ set(shapes[1].items()))]
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(2048, (2, 32), generator=torch.manual_seed(3))
    positions = torch.arange(32).expand(2, -1)
    losses = [model(tokens, positions, None, labels=tokens) for model in (ours, theirs)]
    for loss in losses:
        (1e3 * loss.mean()).backward()  # steep enough for the R block's bound to matter
    different = [] if torch.equal(*losses) else ["loss"]
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not torch.equal(mine.grad, other.grad):
            different.append(f"gradient of {key}")
    return different


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (
            "nam56r_tiny",
            ("seq_length=32", "m2rnn_clip_order=after_output", "m2rnn_state_gradient_clip=1e-3"),
        ),
        ("nam56r_tiny_mamba3", ("seq_length=32", "mamba3_mimo_rank=2", "mamba3_output_norm=true")),
        ("nam56r_tiny", ("seq_length=32", "pattern=FAFM", "num_layers=4", "ffn_hidden_size=80")),
    ],
)
def test_the_model_is_the_recipes(ranks: WorkerPool, name: str, overrides: tuple[str, ...]) -> None:
    """Same parameters; with the same weights the same loss and gradients, bit for bit, at TP=2."""
    words = _words(name, "precision=fp32", *overrides)
    assert ranks.run(2, _both_models, name, overrides, words) == [[], []]


def test_data_and_training(small_data: PreparedData) -> None:
    args = _parse(
        _words(
            "nam56r_tiny",
            *(f"data={small_data.root}", "seq_length=64", "stop_after=7", "precision=bf16"),
        )
    )
    assert args.train_data_path == [small_data.train_prefix]
    assert args.data_cache_path == f"{Path(args.save).parent}/index"  # not beside the data
    assert args.valid_data_path == args.test_data_path == [small_data.heldout_prefix]
    assert (args.tokenizer_type, args.tokenizer_model) == (
        "HuggingFaceTokenizer",
        str(small_data.tokenizer_dir.absolute()),
    )
    assert args.padded_vocab_size == "384", "300 tokens, in multiples of 128 whatever TP is"
    assert (args.exit_interval, args.bf16, args.use_distributed_optimizer) == ("7", True, True)
    assert args.overlap_grad_reduce and args.overlap_param_gather
    assert not args.mock_data and args.load is None
    plain = _parse(_words("nam56r_tiny", "use_distributed_optimizer=false"))
    assert plain.overlap_grad_reduce
    assert not plain.use_distributed_optimizer and not plain.overlap_param_gather
    mock = _parse(
        _words("nam56r_tiny", "resume=auto", "tensorboard=false", "wandb_project=us", _PLAIN)
    )
    assert (mock.load, mock.tensorboard_dir) == (mock.save, None)
    assert (mock.wandb_project, mock.wandb_exp_name) == ("us", "there")
    assert (mock.mock_data, mock.vocab_size, mock.padded_vocab_size) == (True, "2047", "2048")


def test_the_schedule_and_the_optimizer() -> None:
    wsd = ("lr_decay_style=WSD", "lr_wsd_decay_steps=30", "lr_wsd_decay_style=linear")
    args = _parse(_words("nam56r_tiny", *wsd, "adam_beta1=0.8", "adam_eps=1e-6"))
    assert (args.lr_decay_style, args.lr_wsd_decay_iters) == ("WSD", "30")
    assert (args.lr_wsd_decay_style, args.adam_beta1, args.adam_eps) == ("linear", "0.8", "1e-06")
    assert float(args.lr_warmup_init) == 4e-3 / 21, "as the recipe's own warm-up begins"
    args = _parse(_words("nam56r_tiny", "warmup_steps=0", "resume=auto", _PLAIN))
    assert (args.lr_warmup_init, args.lr_decay_style) == (0.0, "cosine")
    assert args.override_opt_param_scheduler, "the settings of the resumed run hold"


def test_a_profile_is_the_scripts() -> None:
    settings = ("use_pytorch_profiler=true", "profile_step_start=3", "profile_step_end=5")
    read = _parse(_words("nam56r_tiny", *settings, "profile_ranks=[0,1]"))
    assert (read.profile, read.use_pytorch_profiler) == (True, True)
    assert (read.profile_step_start, read.profile_step_end) == ("3", "5")
    assert read.profile_ranks == ["0", "1"]
    assert not _parse(_words("nam56r_tiny")).profile
    with pytest.raises(UserError, match="use_pytorch_profiler with tensorboard=false"):
        _words("nam56r_tiny", *settings, "tensorboard=false")
    with pytest.raises(UserError, match="profile_step_start=3, profile_step_end=3"):
        _words("nam56r_tiny", *settings[:2], "profile_step_end=3")


def test_a_blend(small_data: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "second").symlink_to(small_data.root)
    first, second = str(small_data.root), str(tmp_path / "second")
    args = _parse(_words("nam56r_tiny", f"data=0.7 {first} 0.3 {second}", "seq_length=64"))
    assert args.train_data_path == ["0.7", small_data.train_prefix, "0.3", f"{second}/train"]
    assert args.valid_data_path == ["0.7", small_data.heldout_prefix, "0.3", f"{second}/heldout"]
    args = _parse(_words("nam56r_tiny", f"data={first} {second}", "seq_length=64"))
    assert args.train_data_path == [small_data.train_prefix, f"{second}/train"]


def test_what_cannot_be_said_is_listed_at_once() -> None:
    with pytest.raises(UserError) as refusal:
        _words(
            "nam56r_tiny",
            *("tp=1", "pp=4", "vpp=3", "global_batch_size=16"),
            *("softmax_scale=0.5", "resume=runs/old"),
            *("recompute_granularity=selective", "recompute_modules=[core_attn,mamba]"),
        )
    lines = str(refusal.value).splitlines()
    assert lines[0] == "pretrain_mamba.py has no option for this of nam56r_tiny:"
    for line, start in zip(
        lines[1:],
        ("recompute_modules=['mamba']: ", "softmax_scale=0.5", "resume", "virtual_pipeline"),
        strict=True,
    ):
        assert line.strip().startswith(start)


def test_the_script_starts_from_weights_that_a_script_saved(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    """The newest of a folder; another program's it would read in an old order, or not at all."""
    recipe = resolve("nam56r_tiny")
    saved = save(recipe, 4).rename(tmp_path / "iter_0000004")
    weights = saved / "weights"
    for file in weights.iterdir():
        file.rename(saved / file.name)
    weights.rmdir()
    torch.save({"iteration": 4}, saved / "common.pt")
    with pytest.raises(UserError, match="the script loads only checkpoints that a script saved"):
        _words("nam56r_tiny", f"init_from={saved}")
    torch.save({"iteration": 4, "checkpoint_version": 3.0}, saved / "common.pt")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("8")
    with pytest.raises(UserError, match="the script loads the newest checkpoint of"):
        _words("nam56r_tiny", f"init_from={saved}")
    tracker.write_text("4")
    for settings in ((), ("resume=auto", _PLAIN)):
        args = _parse(_words("nam56r_tiny", f"init_from={tmp_path}", *settings))
        assert args.pretrained_checkpoint == str(tmp_path)
        assert (args.load is None) == (not settings), "a checkpoint of the run itself has priority"


def test_a_distributed_optimizer_is_not_resumed_on_a_cpu() -> None:
    with pytest.raises(UserError, match="resume=auto with use_distributed_optimizer=true on a CPU"):
        _words("nam56r_tiny", "resume=auto")
    assert "--load" in _words("nam56r_tiny", "resume=auto", device="cuda")


def test_full_recompute_is_an_option() -> None:
    settings = ("recompute_granularity=full", "recompute_method=block", "recompute_num_layers=2")
    read = _parse(_words("nam56r_tiny", *settings))
    assert (read.recompute_granularity, read.recompute_method) == ("full", "block")
    assert read.recompute_num_layers == "2"


def test_the_exchange_of_context_parallelism_is_an_option() -> None:
    assert _parse(_words("nam56r_tiny", "cp_comm_type=a2a")).cp_comm_type == ["a2a"]
    for settings in ((), ("cp_comm_type=p2p",)):
        assert _parse(_words("nam56r_tiny", *settings)).cp_comm_type == ["p2p"]


def test_a_stage_without_experts_is_refused() -> None:
    """The script would sum the auxiliary losses of unequal lists over the stages."""
    stages = ("tp=1", "pp=2", "pattern=AEAE|MRMR", "num_layers=8")
    with pytest.raises(UserError, match="pipeline stage 1 of 2 without an E block"):
        _words("nam56r_tiny", *stages)
    assert "*E*E|MRMR" in _words("nam56r_tiny", *stages, "moe_router_load_balancing_type=none")


def test_an_illegal_layout_is_refused() -> None:
    with pytest.raises(UserError, match="tp=3,sp=true,etp=1 is illegal"):
        _words("nam56r_tiny", "tp=3")


@pytest.mark.parametrize(
    ("megatron", "release"), [(None, "0.16.1"), ("0.16.0", "0.16.0"), ("core_v0.16.1", None)]
)
def test_releases_that_are_known(megatron: str | None, release: str | None) -> None:
    dialect, found = choose(megatron)
    assert (dialect.script, found) == ("pretrain_mamba.py", release or megatron)


@pytest.mark.parametrize(
    ("megatron", "message"),
    [
        ("core_v0.17.0", r"core_v0.17.0 is not 0.16 or 0.19. From 0.17 on .*--hybrid-layer-"),
        ("0.20", "0.20 is not 0.16 or 0.19"),
        ("no/such/folder", "no such folder"),
    ],
)
def test_other_releases_are_refused(megatron: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(megatron)


def test_a_checkout_says_its_release(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkout"):
        choose(str(tmp_path))
    info = tmp_path / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True)
    info.write_text("MAJOR = 0\nMINOR = 16\nPATCH = 2\n")
    assert choose(str(tmp_path))[1] == "0.16.2"
    info.write_text("MAJOR = 0\nMINOR = 18\nPATCH = 0\n")
    with pytest.raises(UserError, match=r"0\.18\.0 is not 0\.16 or 0\.19"):
        choose(str(tmp_path))


def test_a_parser_becomes_a_table() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-s", "--size", "--width", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["a"])
    parser.add_argument("--no-bias", action="store_false", dest="bias")
    assert describe(parser) == {
        "--size": {"dest": "size", "default": 3, "nargs": None, "also": ["--width", "-s"]},
        "--kinds": {"dest": "kinds", "default": ["a"], "nargs": "+"},
        "--no-bias": {"dest": "bias", "default": True, "const": False},
    }


def test_a_pattern_that_starts_with_an_mlp() -> None:
    """Its symbol, "-", must not look like an option."""
    words = _words("nam56r_tiny", "pattern=FAFM", "num_layers=4", "ffn_hidden_size=80")
    args = _parse(words)
    assert (args.hybrid_override_pattern, args.ffn_hidden_size) == ("-*-M", "80")
    assert _configuration(args).ffn_hidden_size == 80


def test_a_spec_name_carries_settings() -> None:
    config = HybridConfig(
        **{
            **CATALOG["nam56r_tiny_mamba3"].model,
            **{"m2rnn_state_gradient_clip": None, "m2rnn_num_heads": 20, "mamba3_A_floor": 1e-5},
        }
    )
    name = spec_name(config)
    assert name == (
        "hybrid_mamba3_stack_spec(m2rnn_num_heads=20,m2rnn_key_head_dim=32,m2rnn_value_head_dim=8,"
        "m2rnn_state_gradient_clip=null,mamba3_A_floor=1e-05)"
    )
    assert read_spec_name(name) == HybridFields(
        mode="mamba3",
        m2rnn_num_heads=20,
        m2rnn_key_head_dim=32,
        m2rnn_value_head_dim=8,
        m2rnn_state_gradient_clip=None,
        mamba3_A_floor=1e-5,
    )
    assert spec_name(HybridConfig(**CATALOG["nam56r"].model)) == "hybrid_stack_spec"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hybrid_stack_spce()", "no spec .* Did you mean 'hybrid_stack_spec'"),
        ("hybrid_stack_spec(m2rnn_key_head=3)", "Did you mean 'm2rnn_key_head_dim'"),
        ("hybrid_stack_spec(hidden_size=3)", "cannot carry 'hidden_size'"),
        ("hybrid_stack_spec(mamba3_mimo_rank=2)", "a setting of hybrid_mamba3_stack_spec"),
        ("hybrid_stack_spec(m2rnn_num_heads)", "is not name=value"),
        ("hybrid_stack_spec(m2rnn_num_heads=many)", "m2rnn_num_heads: 'many' is not a whole"),
    ],
)
def test_a_wrong_spec_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_module(("nemo_megacpp.specs", name))


def _plain_stack(settings: dict[str, Any]) -> str:
    """On a rank: build the stack with a plain configuration, and return the refusal."""
    start_model_parallel(ParallelLayout())
    words = _words("nam56r_tiny")
    config = _configuration(_parse(words))
    for name, value in settings.items():
        setattr(config, name, value)
    try:
        MambaModel(
            config=config,
            mamba_stack_spec=import_module(("nemo_megacpp.specs", "hybrid_stack_spec")),
            vocab_size=128,
            max_sequence_length=32,
            hybrid_override_pattern="AEMR",
        )
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distribute_saved_activations": True}, "distribute_saved_activations=True: It splits"),
        ({"virtual_pipeline_model_parallel_size": 2}, "2 virtual pipeline stages"),
        ({"qk_layernorm": True}, "qk_layernorm=True: An A block is grouped-query attention"),
        ({"hidden_dropout": 1.0}, "hidden_dropout: 1.0 must be at least 0 and below 1"),
        ({"calculate_per_token_loss": True}, "calculate_per_token_loss=True scales gradients"),
    ],
)
def test_a_plain_configuration_is_held_to_the_same_rules(
    ranks: WorkerPool, settings: dict[str, Any], message: str
) -> None:
    (refusal,) = ranks.run(1, _plain_stack, settings)
    assert message in refusal


def _command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    args = build_parser().parse_args(["megatron-args", *arguments])
    assert args.run(args) == 0
    return capsys.readouterr()


def test_the_command_prints_words_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, remarks = _command(capsys, "nam56r_tiny", "--device=cpu")
    (line,) = out.splitlines()
    assert shlex.split(line)[:3] == [
        "--spec",
        "nemo_megacpp.specs",
        "hybrid_stack_spec(m2rnn_key_head_dim=32,m2rnn_value_head_dim=8)",
    ]
    assert "mock data" in remarks and "no GPU" not in remarks
    _, remarks = _command(capsys, "nam56r_tiny")
    assert "this machine has no GPU: these are arguments for a CPU (--device cuda)" in remarks
    short = ("run_dir=r", "max_steps=20")
    out, remarks = _command(capsys, "nam56r_tiny", *short, "--json", "--layout", "tp=1,pp=2")
    assert "defaults taken: warmup_steps: 4 (max_steps / 5)" in remarks
    assert "layout: TP=1 CP=1 EP=1 ETP=1 PP=2 (2 ranks" in remarks
    assert _parse(json.loads(out)["arguments"]).lr_warmup_iters == "4"
    told = json.loads(out)
    assert (told["script"], told["megatron"], told["ranks"]) == ("pretrain_mamba.py", "0.16.1", 2)
    assert _parse(told["arguments"]).pipeline_model_parallel_size == "2"
    assert not any(tmp_path.iterdir()), "nothing is written"
