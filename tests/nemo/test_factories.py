"""The recipes behind ``nemo llm pretrain --factory``: in this process, then through the program."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import fiddle
import pytest

from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout.legality import padded_vocab_size
from nemo_megacpp.layout.parallel import FIELD_OF
from nemo_megacpp.recipes.catalog import CATALOG

NEMO = Path(sysconfig.get_path("scripts")) / "nemo"
NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def factories() -> ModuleType:
    """The module under test; importing it imports NeMo, which takes seconds."""
    from nemo_megacpp.nemo import factories

    return factories


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no launcher around this process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _launch(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, local: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))


def test_the_program_finds_the_factories(factories: Any) -> None:
    """``nemo`` imports what is installed in this group."""
    (entry,) = entry_points(group="nemo_run.cli", name="nemo_megacpp")
    assert entry.load() is factories
    for name in CATALOG:
        assert callable(getattr(entry.load(), name))


@pytest.mark.parametrize("name", CATALOG)
def test_defaults_are_those_of_the_catalogue(factories: Any, here: Path, name: str) -> None:
    from nemo.collections import llm

    task, recipe = getattr(factories, name)(), CATALOG[name]
    assert task.__fn_or_cls__ is llm.pretrain
    assert {key: getattr(task.model.config, key) for key in recipe.model} == recipe.model
    for owner in (task.model.config, task.trainer.strategy):
        assert owner.tensor_model_parallel_size == 2
        assert owner.sequence_parallel is True
        assert owner.expert_tensor_parallel_size == 1
    assert (task.trainer.devices, task.trainer.num_nodes) == (2, 1)
    assert task.trainer.max_steps == recipe.training.max_steps
    assert task.optim.config.lr == recipe.training.lr
    assert task.data.global_batch_size == recipe.training.global_batch_size
    assert task.log.explicit_log_dir.startswith(f"runs/{name}-")
    assert not any(here.iterdir()), "a configuration writes nothing"


def test_settings_reach_the_configuration(
    factories: Any, here: Path, small_data: PreparedData
) -> None:
    task = factories.nam56r_tiny(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=2,
        max_steps=7,
        stop_after=5,
        micro_batch_size=2,
        global_batch_size=4,
        seq_length=64,
        lr=1e-3,
        precision="bf16",
        save_interval=3,
        data=str(small_data.root),
        run_dir="there",
    )
    strategy, config = task.trainer.strategy, task.model.config
    vocab_size = small_data.vocab_size
    assert (strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size) == (1, 2)
    assert strategy.sequence_parallel is False, "SP follows TP unless it is given"
    assert (task.trainer.devices, task.trainer.max_steps) == (2, 7)
    assert task.optim.lr_scheduler.max_steps == 7
    (early,) = [entry for entry in task.trainer.callbacks if "StopEarly" in str(entry)]
    assert early.stop_after == 5
    assert (task.data.micro_batch_size, task.data.global_batch_size) == (2, 4)
    assert (config.seq_length, task.data.seq_length) == (64, 64)
    assert (config.vocab_size, task.data.vocab_size) == (vocab_size, vocab_size), "the data's"
    assert config.bf16 and task.optim.config.bf16
    assert (task.optim.config.lr, task.log.ckpt.every_n_train_steps) == (1e-3, 3)
    assert (task.data.folder, task.log.explicit_log_dir) == (str(small_data.root), "there")


def test_ranks_are_laid_out_on_nodes(factories: Any, here: Path) -> None:
    task = factories.nam56r(num_nodes=4, devices=8)
    assert (task.trainer.num_nodes, task.trainer.devices) == (4, 8)
    task = factories.nam56r(
        tensor_model_parallel_size=8, pipeline_model_parallel_size=2, num_nodes=2
    )
    assert (task.trainer.num_nodes, task.trainer.devices) == (2, 8), "what the layout needs"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_model_parallel_size": 3}, r"tp=3,sp=true,etp=1 is illegal"),
        ({"devices": 3}, r"world of 3 ranks"),
        ({"devices": 0}, r"devices=0: the layout needs a multiple of 2 ranks"),
        ({"num_nodes": 3}, r"num_nodes=3, devices=None: the layout needs a multiple of 2 ranks"),
        ({"num_nodes": 2}, r"TP = 2 does not fit the NVLink domain of 1 GPUs a node"),
        ({"precision": "fp8"}, r"'fp8' is not 'fp32' or 'bf16'"),
        ({"data": "nowhere"}, r"'nowhere' does not exist"),
        ({"resume": "nowhere"}, r"no checkpoint at nowhere"),
        ({"resume": "auto"}, r"resume=auto looks in run_dir"),
    ],
)
def test_a_script_gets_a_user_error(
    factories: Any, here: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        factories.nam56r_tiny(**settings)


def test_a_folder_that_holds_a_run_is_refused(factories: Any, here: Path) -> None:
    (here / "old" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a run"):
        factories.nam56r_tiny(run_dir="old")


def test_a_launcher_decides_on_the_ranks(
    factories: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _launch(monkeypatch, rank=1, world_size=4, local=4)
    assert factories.nam56r_tiny().trainer.devices == 4, "TP=2 and DP=2"
    with pytest.raises(UserError, match="devices=2, but the launcher has started 4"):
        factories.nam56r_tiny(devices=2)
    _launch(monkeypatch, rank=5, world_size=8, local=4)
    with pytest.raises(UserError, match="A run on 2 nodes needs run_dir"):
        factories.nam56r_tiny()
    with pytest.raises(UserError, match=r"global 8, micro .* global_batch_size=16"):
        factories.nam56r_tiny(run_dir="shared")
    task = factories.nam56r_tiny(run_dir="shared", global_batch_size=16)
    assert (task.trainer.num_nodes, task.trainer.devices) == (2, 4)


def test_all_factories_take_the_same_settings_and_all_are_known(factories: Any) -> None:
    from nemo_megacpp.recipes.names import field_owners

    first = inspect.signature(factories.nam56r).parameters
    world = {"devices", "num_nodes", "num_gpus_per_node"}
    assert set(first) - world <= {*field_owners(), *FIELD_OF}
    assert {parameter.default for parameter in first.values()} == {None}
    for recipe in CATALOG:
        factory = getattr(factories, recipe)
        assert inspect.signature(factory).parameters == first
        assert factory.__doc__.startswith("Pre-train ")
        for name in first:
            assert f"\n    {name}:" in factory.__doc__, f"{name} is not documented"


def test_help_shows_what_a_factory_takes(
    factories: Any, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``nemo llm pretrain --help --docs``; without ``--docs`` NeMo-Run prints names only."""
    from nemo.collections import llm
    from nemo_run.core.frontend.console.api import CONSOLE
    from nemo_run.help import help_for_type

    monkeypatch.setattr(CONSOLE, "width", 160)
    help_for_type(llm.pretrain, CONSOLE, with_docs=True)
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if "nam56r" in line and "Pre-train" in line]
    assert len(rows) == 4
    shown = {line.strip(" │") for line in text.splitlines()}
    for line in factories.nam56r.__doc__.splitlines()[1:]:
        assert line.strip() in shown, "cut at the width of the column"


def test_heartbeats_have_the_limits_that_are_given(factories: Any, here: Path) -> None:
    def heartbeats(**limits: float | None) -> list[Any]:
        task = factories.nam56r_tiny(**limits)
        return [entry for entry in task.trainer.callbacks if "Heartbeats" in str(entry)]

    (usual,) = heartbeats()
    assert (usual.timeout_minutes, usual.init_timeout_minutes) == (5, 20)
    (given,) = heartbeats(heartbeat_timeout_minutes=7.5)
    assert (given.timeout_minutes, given.init_timeout_minutes) == (7.5, 20)


def test_a_list_travels_as_a_factorys_parameter(factories: Any, here: Path) -> None:
    task = factories.nam56r_tiny(use_pytorch_profiler=True, profile_ranks=[0, 1])
    profiler = task.trainer.callbacks[-1]
    assert (profiler.start, profiler.end, profiler.ranks) == (10, 12, [0, 1])
    assert profiler.folder == f"{task.log.explicit_log_dir}/profile"
    copy.deepcopy(fiddle.build(task.trainer.callbacks))  # as NeMo's trainer does


def test_nemos_own_names(factories: Any, here: Path) -> None:
    task = factories.nam52(
        tensor_parallelism=4, sequence_parallelism=True, expert_parallelism=2, num_gpus_per_node=8
    )
    strategy = task.trainer.strategy
    assert (strategy.tensor_model_parallel_size, strategy.sequence_parallel) == (4, True)
    assert (strategy.expert_model_parallel_size, task.trainer.devices) == (2, 8)
    both = "twice: tensor_parallelism=2 and tensor_model_parallel_size=4"
    with pytest.raises(UserError, match=both):
        factories.nam52(tensor_parallelism=2, tensor_model_parallel_size=4)
    for name in ("data", "resume", "run_dir", "tokenizer"):
        with pytest.raises(UserError, match=f"{name} is empty"):
            factories.nam56r_tiny(**{name: ""})
    with pytest.raises(UserError, match="two names of one number"):
        factories.nam52(devices=8, num_gpus_per_node=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tensor_paralelism'"):
        factories.nam52(tensor_paralelism=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nam56r_tiny(max_steps=2, max_steps=3)",), "twice: max_steps=2 and max_steps=3"),
        (
            ("nam56r_tiny(tensor_parallelism=2, tensor_model_parallel_size=4)",),
            "twice: tensor_parallelism=2 and tensor_model_parallel_size=4",
        ),
        (("nam56r_tiny(data=, max_steps=3)",), "data is empty"),
        (
            ("nam56r_tiny", "trainer.max_steps=2", "lr=1", "trainer.max_steps=3"),
            "twice: trainer.max_steps=2 and trainer.max_steps=3",
        ),
        (("nam56r_tiny", "optim.config.lr="), "optim.config.lr is empty"),
    ],
)
def test_nemos_command_line_keeps_no_last_of_two(
    words: tuple[str, ...],
    message: str,
    factories: Any,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(factories, "_on_nemo_command_line", lambda: True)
    monkeypatch.setattr(sys, "argv", ["nemo", "llm", "pretrain", "--factory", *words])
    with pytest.raises(SystemExit) as stop:
        factories.nam56r_tiny()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    once = [
        "nam56r_tiny(max_steps=3, data=a b)",
        "trainer.callbacks+=[a]",
        "trainer.callbacks+=[b]",
    ]
    monkeypatch.setattr(sys, "argv", ["nemo", "llm", "pretrain", "--factory", *once])
    assert factories.nam56r_tiny(max_steps=3).trainer.max_steps == 3


def test_loggers_and_checkpoints(
    factories: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = factories.nam56r_tiny().log
    assert (log.tensorboard.name, log.wandb) == ("tensorboard", None)
    assert (log.ckpt.keep_latest, log.ckpt.keep_every) == (None, None)
    task = factories.nam56r_tiny(
        tensorboard=False,
        wandb_project="hybrids",
        run_dir="first",
        keep_latest=3,
        keep_every=160,
        async_save=True,
    )
    log = task.log
    assert log.tensorboard is None
    assert (log.wandb.project, log.wandb.name) == ("hybrids", "first")
    assert (log.ckpt.keep_latest, log.ckpt.keep_every) == (3, 160)
    assert task.trainer.strategy.ckpt_async_save
    with pytest.raises(UserError, match="wandb_name is given without wandb_project"):
        factories.nam56r_tiny(wandb_name="first")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "wandb" else find(name)
    )
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb"):
        factories.nam56r_tiny(wandb_project="hybrids")


def test_command_line_values_get_their_types(
    factories: Any, here: Path, small_data: PreparedData
) -> None:
    from nemo.collections import llm
    from nemo_run.cli.cli_parser import parse_cli_args, parse_factory

    text = (
        f"nam56r_tiny(tensor_model_parallel_size=1, sequence_parallel=false, max_steps=3, lr=1e-3, "
        f"seq_length=64, data={small_data.root}, precision=fp32)"
    )
    task = parse_factory(llm.pretrain, "", llm.pretrain, text)
    assert task.trainer.strategy.sequence_parallel is False
    assert (task.trainer.max_steps, task.optim.config.lr) == (3, 1e-3)
    overrides = {
        "trainer.max_steps": 2,
        "trainer.strategy.ckpt_async_save": False,
        "trainer.callbacks[0].log_interval": 1,
        "data.seed": 3,
        "data.folder": "elsewhere",
        "log.ckpt.every_n_train_steps": 1,
        "optim.config.lr": 2e-3,
        "model.config.moe_aux_loss_coeff": 0.01,
    }
    task = parse_cli_args(task, [f"{key}={value}" for key, value in overrides.items()])
    assert task.trainer.max_steps == 2
    assert task.trainer.strategy.ckpt_async_save is False
    assert task.trainer.callbacks[0].log_interval == 1
    assert (task.data.seed, task.data.folder) == (3, "elsewhere")
    assert task.log.ckpt.every_n_train_steps == 1
    assert (task.optim.config.lr, task.model.config.moe_aux_loss_coeff) == (2e-3, 0.01)


def test_data_of_a_factory(factories: Any, here: Path, small_data: PreparedData) -> None:
    from nemo.collections import llm
    from nemo_run.cli.cli_parser import parse_factory

    (here / "second").symlink_to(small_data.root)
    blend = {str(small_data.root): 0.7, "second": 0.3}
    tokenizer = str(small_data.tokenizer_dir)
    settings: dict[str, Any] = {"tokenizer": tokenizer, "packed_documents": True}
    task = factories.nam56r_tiny(data=blend, seq_length=64, **settings)
    assert (task.data.blend, task.data.folder) == (blend, str(small_data.root))
    assert (task.data.made_with, task.data.packed_documents) == (tokenizer, True)
    assert factories.nam56r_tiny(data=list(blend), seq_length=64).data.blend == dict.fromkeys(blend)
    # NeMo-Run cuts the text of a factory at commas, so a blend is told without them there.
    text = f"nam56r_tiny(data=0.7 {small_data.root} 0.3 second, seq_length=64, tokenizer="
    told = parse_factory(llm.pretrain, "", llm.pretrain, f"{text}{tokenizer}, packed_documents=1)")
    assert told.data == task.data
    with pytest.raises(UserError, match="No tokenizer in 'nowhere'"):
        factories.nam56r_tiny(data=blend, tokenizer="nowhere")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_configuration_travels(factories: Any, here: Path, precision: str) -> None:
    from nemo_run.cli.config import ConfigSerializer
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    task = factories.nam56r_tiny(precision=precision, stop_after=3)
    executors = ZlibJSONSerializer()
    assert executors.deserialize(executors.serialize(task)) == task
    for extension in ("yaml", "json", "toml"):
        file = here / f"task.{extension}"
        ConfigSerializer().dump(task, file)
        assert "HybridModelConfig" in file.read_text()


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        ({"megatron-core": "0.16.1", "nemo_run": "0.11"}, "nemo-toolkit is not installed"),
        (
            {"nemo-toolkit": "3.0.0", "megatron-core": "0.17.0", "nemo_run": "0.11"},
            "nemo-toolkit is 3.0.0 and megatron-core is 0.17.0",
        ),
    ],
)
def test_another_nemo_is_named(
    monkeypatch: pytest.MonkeyPatch, factories: Any, installed: dict[str, str], reason: str
) -> None:
    monkeypatch.setattr("nemo_megacpp.nemo.versions._installed", installed.get)
    spec = importlib.util.spec_from_file_location("fresh_factories", factories.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=f"need nemo-toolkit 2.7 .* but {reason}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.slow
@pytest.mark.processes
def test_the_program_writes_and_refuses(tmp_path: Path) -> None:
    """What it lists, shows and prints as it trains is in docs/nemo.md, whose commands are run."""
    commands = {
        "refusal": ["--factory", "nam56r_tiny(tensor_model_parallel_size=3)", "--yes"],
        "yaml": ["--factory", "nam52_mamba3", "--to-yaml", "task.yaml"],
        "mismatch": ["--factory", "nam52", "--yes"],
    }
    # Another Megatron-Core, by what importlib.metadata finds first.
    other = tmp_path / "megatron_core-0.17.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.17.0\n")
    empty = tmp_path / "here"
    empty.mkdir()
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    running = {
        name: subprocess.Popen(
            [NEMO, "llm", "pretrain", *arguments],
            cwd=empty,
            env={**NO_GPU, "PYTHONPATH": paths} if name == "mismatch" else NO_GPU,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, arguments in commands.items()
    }
    try:
        said = {name: process.communicate(timeout=400) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    codes = {name: process.returncode for name, process in running.items()}
    assert codes == {"refusal": 2, "yaml": 0, "mismatch": 2}, said
    assert "nam56r_tiny: Layout tp=3,sp=true,etp=1 is illegal" in said["refusal"][1]
    assert "Traceback" not in said["refusal"][1]
    written = (empty / "task.yaml").read_text()
    assert "_target_: nemo.collections.llm.api.pretrain" in written
    assert "mode: mamba3" in written and "hybrid_pattern: AEME" in written
    assert [path.name for path in empty.iterdir()] == ["task.yaml"], "nothing else is written"
    assert "but megatron-core is 0.17.0" in said["mismatch"][1]
    assert "No matching factory" not in "".join(said["mismatch"])


EXECUTORS = """
import sys
import nemo_run as run
from nemo_megacpp.nemo.factories import nam56r, nam56r_tiny

if __name__ == "__main__":
    data, home = sys.argv[1:]
    slurm = run.SlurmExecutor(
        account="mine", partition="gpu", nodes=2, ntasks_per_node=8, gpus_per_node=8,
        container_image="nemo-megacpp.sqsh", packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=home),
    )
    with run.Experiment("slurm", executor=slurm) as experiment:
        experiment.add(nam56r(num_nodes=2, devices=8, run_dir=f"{home}/big"), name="nam56r")
        experiment.dryrun()
    task = nam56r_tiny(
        data=data, seq_length=64, global_batch_size=4, max_steps=2, save_interval=1,
        keep_latest=1, run_dir=f"{home}/run",
    )
    local = run.LocalExecutor(ntasks_per_node=2, launcher="torchrun")
    run.run(task, executor=local, name="local", tail_logs=True)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_nemo_runs_executors(tmp_path: Path, small_data: PreparedData) -> None:
    """Slurm prints the script it would submit; the local one trains two ranks under torchrun."""
    (tmp_path / "go.py").write_text(EXECUTORS)
    environment = {
        **NO_GPU,
        "NEMORUN_HOME": str(tmp_path / "home"),
        "PATH": os.pathsep.join((str(NEMO.parent), os.environ["PATH"])),
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [sys.executable, "go.py", str(small_data.root), str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8", "--container-image"):
        assert line in done.stdout
    assert not (tmp_path / "big").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=2"]


@pytest.mark.slow
@pytest.mark.processes
def test_the_program_trains_under_torchrun(tmp_path: Path, small_data: PreparedData) -> None:
    """In the layout and the model that its overrides make of the factory's."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"),
            *(NEMO, "llm", "pretrain", "--yes"),
            *(
                "--factory",
                f"nam56r_tiny(data={small_data.root}, seq_length=64, global_batch_size=4)",
            ),
            *("trainer.max_steps=2", "trainer.callbacks[0].log_interval=1"),
            "trainer.strategy.tensor_model_parallel_size=1",
            "trainer.strategy.sequence_parallel=False",
            "trainer.strategy.pipeline_model_parallel_size=2",
            "model.config.add_qkv_bias=True",
        ],
        cwd=tmp_path,
        env=NO_GPU,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("run folder: ") == 1, "only rank 0 announces the run"
    assert "step     2/2" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    records = [
        json.loads(line) for line in (run / "record" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == [1, 2]
    uniform = math.log(padded_vocab_size(small_data.vocab_size, divisible_by=128, tp=1))
    first, second = (record["loss"] for record in records)
    assert first == pytest.approx(uniform, abs=0.5), "an untrained model's guess is about uniform"
    assert second < first
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == "step=2"
    identity = json.loads((checkpoint / "nemo_megacpp.json").read_text())
    assert (identity["step"], identity["layout"]) == (2, "pp=2,etp=1")
    assert identity["model"]["add_qkv_bias"] is True
