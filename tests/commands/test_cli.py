"""The command line as a person meets it: what it says, its exit code, what it leaves behind."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.checkpoint.metadata import Metadata

import nemo_megacpp
from nemo_megacpp import cli, start
from nemo_megacpp.checkpoint.identity import write_identity
from nemo_megacpp.data.builtin import builtin_folder
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import RankFailed, UserError
from nemo_megacpp.recipes.catalog import CATALOG, NAM56R_TINY_MODEL
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.runtime.workers import WorkerError

ARTICLES_YAML = """\
mode: nemo_native
pattern: AEMEAEMEAEMR
tensor_parallel: 2
sequence_parallel: true
expert_tensor_parallel: 1
context_parallel: 1
pipeline_parallel: 1
"""
HEAVY = ("torch", "megatron", "nemo", "nemo_run", "lightning", "transformers", "numpy")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command line here, in an empty folder, without training.

    ``run("train", "nam56r_tiny")`` gives exit code, stdout and stderr.
    """
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def launch(*_: object) -> None:
        pytest.fail("ranks were started")

    monkeypatch.setattr(start, "launch", launch)
    monkeypatch.setattr(start, "validate_device_count", lambda ranks: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nemo-megacpp", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with a vocabulary of 300, made by the command line."""
    root = tmp_path_factory.mktemp("cli")
    (root / "texts").mkdir()
    for number in range(8):
        lines = (f"word{number} and {count} more, for a start" for count in range(100))
        (root / "texts" / f"{number}.txt").write_text("\n".join(lines))
    out = root / "prepared"
    command = ["data", "prepare", str(root / "texts"), "--out", str(out), "--vocab-size", "300"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["nemo-megacpp", *command, "--held-out", "0.3"])
        cli.main()
    assert stop.value.code == 0
    return out


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below ``folder``, hidden ones too, with size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


# --- light to load


@pytest.mark.processes
@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import nemo_megacpp"),
        ("-c", "import nemo_megacpp.cli"),
        ("-m", "nemo_megacpp.cli", "--help"),
        ("-m", "nemo_megacpp.cli", "train", "--help"),
        ("-m", "nemo_megacpp.cli", "--version"),
    ],
    ids=" ".join,
)
def test_loads_nothing_heavy_in_under_half_a_second(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    done = python("-X", "importtime", *arguments, cwd=tmp_path)
    assert done.returncode == 0
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "nemo_megacpp" in loaded
    assert loaded.isdisjoint(HEAVY)
    assert min(_cpu_seconds(arguments, tmp_path) for _ in range(3)) < 0.5


def _cpu_seconds(arguments: Sequence[str], folder: Path) -> float:
    """Return the CPU time of a Python process: the machine may be busy."""
    started = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    assert started.returncode == 0
    return used.ru_utime + used.ru_stime


@pytest.mark.processes
@pytest.mark.parametrize(
    "arguments",
    [("recipes",), ("train", "nam56r_tinny"), ("train", "nam56r_tiny", "tensor_paralel=2")],
)
def test_what_needs_no_torch_loads_none(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = python("-X", "importtime", "-m", "nemo_megacpp.cli", *arguments, cwd=tmp_path)
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert loaded.isdisjoint({"torch", "megatron", "nemo"})


@pytest.mark.processes
def test_a_refusal_needs_no_nemo(tmp_path: Path) -> None:
    """The whole of it in one real process: layout, model, data and run folder are checked."""
    script = (
        "import sys\n"
        "from nemo_megacpp.cli import main\n"
        "sys.argv[1:] = ['train', 'nam56r_tiny', 'data=nowhere']\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print('nemo' in sys.modules, 'megatron' in sys.modules)\n"
    )
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == "False True\n"
    assert done.stderr == (
        "nemo-megacpp: Prepared data 'nowhere' does not exist. "
        "Make it: nemo-megacpp data prepare PATH… --out DIR\n"
    )
    assert listing(tmp_path) == {}


# --- what it says


def test_help_names_the_commands(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for command in ("train", "demo", "recipes", "data"):
        assert re.search(rf"^ +{command} ", out, re.MULTILINE)


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"nemo-megacpp {nemo_megacpp.__version__}\n", "")


def test_recipes_are_listed(run: Run) -> None:
    code, out, err = run("recipes")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(CATALOG)
    assert {"nam56r", "nam56r_tiny", "nam56r_mamba3", "nam56r_tiny_mamba3"} <= set(CATALOG)
    assert "52 layers" in out


def test_a_recipe_printed_is_that_recipe(run: Run, tmp_path: Path) -> None:
    for name in CATALOG:
        code, out, err = run("recipes", name)
        assert (code, err) == (0, "")
        file = tmp_path / f"{name}.yaml"
        file.write_text(out)
        assert resolve(str(file)) == resolve(name)


@pytest.mark.parametrize("arguments", [(), ("fly",), ("train",), ("data",), ("demo", "extra")])
def test_usage_errors(arguments: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: nemo-megacpp")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian", "nam56r_tiny"), "there is no command 'trian'. Did you mean 'train'? Commands: "),
        (("train", "nam56r_tiny", "--tp", "2"), "--tp 2. tp is a setting: write tp=2"),
        (("train", "nam56r_tiny", "--max-steps=2"), "max_steps is a setting: write max_steps=2"),
        (("train", "nam56r_tiny", "--fast"), "unrecognized arguments: --fast\n"),
    ],
)
def test_usage_errors_name_what_was_meant(
    arguments: tuple[str, ...], message: str, run: Run
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_recipes_prints_the_settings_that_are_given(run: Run) -> None:
    code, out, _ = run("recipes", "nam56r_tiny", "tp=4", "etp=none", "max_steps=7")
    assert code == 0
    settings = yaml.safe_load(out)
    assert (settings["tensor_model_parallel_size"], settings["max_steps"]) == (4, 7)


def test_a_dry_run_starts_and_writes_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(start, "launch", lambda *_: pytest.fail("ranks were started"))
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run("train", "nam56r_tiny", "--dry-run")
    assert code == 0 and out.endswith("everything is valid; nothing was started or written\n")
    assert run("train", "nam56r_tiny", "tp=3", "--dry-run")[0] == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_train_asks_for_a_recipe_only(run: Run) -> None:
    assert run("train")[2].endswith("the following arguments are required: recipe\n")


# --- a run that may start


@pytest.fixture
def started(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sequence[str], int, Path]]:
    """What would have been launched."""
    calls: list[tuple[Sequence[str], int, Path]] = []
    monkeypatch.setattr(start, "launch", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(start, "ensure_builtin", lambda vocab_size: None)
    return calls


def test_the_articles_yaml_starts_the_tiny_run(run: Run, started: list[Any]) -> None:
    Path("my.yaml").write_text(ARTICLES_YAML)
    code, out, err = run("train", "my.yaml", "run_dir=out")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "defaults taken: recipe: nam56r_tiny; num_layers: 12 (depth of the recipe); "
        "max_steps: 160; global_batch_size: 8; lr: 0.004; precision: fp32; "
        "data: torch's C++ headers",
        "nam56r_tiny: AEMEAEMEAEMR",
        "layout: TP=2 SP CP=1 EP=1 ETP=1 PP=1 (2 ranks: DP=1, expert DP=2); run folder: out",
        f"built-in corpus: {builtin_folder(2048)}",
    ]
    ((arguments, ranks, logs),) = started
    assert (ranks, logs) == (2, Path("out/logs"))
    words = ["-m", "nemo_megacpp.nemo.worker", "out/record/recipe.yaml", "out", str(os.getpid())]
    assert arguments == words
    ranks_read = resolve("out/record/recipe.yaml")
    assert ranks_read == resolve("my.yaml", ["run_dir=out"])


def test_what_the_ranks_read_is_what_was_asked(
    run: Run, started: list[Any], small_data: Path
) -> None:
    code, _, _ = run(
        "train", "nam56r_tiny", f"data={small_data}", "run_dir=out", "tp=2", "etp=none", "lr=1e-3"
    )
    assert code == 0
    recipe = resolve("out/record/recipe.yaml")
    assert recipe.layout.etp == 2
    assert recipe.model["vocab_size"] == 300
    assert recipe.training.lr == 1e-3
    assert yaml.safe_load(Path("out/record/recipe.yaml").read_text())["data"] == str(small_data)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (RankFailed("Rank 1 ended", user_error=True), 2),
        (RankFailed("Rank 1 ended"), 1),
        (WorkerError("Rank 1 ended"), 1),
    ],
)
def test_a_rank_that_fails(
    failure: RankFailed, code: int, run: Run, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(start, "launch", fail)
    assert run("train", "nam56r_tiny", "run_dir=out")[::2] == (code, "Rank 1 ended\n")


def test_a_full_disk_is_one_line(
    run: Run, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write names no file in its error, where opening one does."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(start, "launch", full)
        told = run("train", "nam56r_tiny", "run_dir=out")[::2]
        assert told == (2, "nemo-megacpp: No space left on device.\n")
    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = run("train", "nam56r_tiny", "run_dir=new")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("nemo-megacpp: new/record/") and "No space left on device" in err
    assert not [path for path in Path("new").rglob("*") if path.name == "lock"]


def test_too_few_devices(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(ranks: int) -> None:
        raise UserError(f"The layout needs {ranks} ranks and this machine has 1 GPUs.")

    monkeypatch.setattr(start, "validate_device_count", refuse)
    code, _, err = run("train", "nam56r_tiny")
    assert (code, err) == (
        2,
        "nemo-megacpp: The layout needs 2 ranks and this machine has 1 GPUs.\n",
    )
    assert listing(Path()) == {}


def test_an_interrupt_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "preflight", interrupt)
    assert run("train", "nam56r_tiny") == (130, "", "")


class _Interrupted:
    """Interrupted while it is deleted, where Python cannot raise."""

    def __del__(self) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_that_python_cannot_raise_is_not_lost(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(args: object) -> int:
        _Interrupted()
        for _ in range(1000):  # ten seconds at most, on a busy machine
            time.sleep(0.01)
        return 0

    monkeypatch.setattr(cli, "_run", work)
    assert run("train", "nam56r_tiny") == (130, "", "")


@pytest.mark.processes
def test_an_interrupt_at_the_exit_ends_it_in_silence() -> None:
    script = (
        "import atexit, os, signal, sys, time\n"
        "from nemo_megacpp import cli\n"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(5)))\n"
        "sys.argv = ['nemo-megacpp', 'recipes']\n"
        "cli.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


# --- refusals: exit code 2, one message, nothing written


def checkpoint(path: Path, tokenizer: str = "0" * 64, **model: object) -> None:
    (path / "weights").mkdir(parents=True)
    (path / "weights" / ".metadata").write_bytes(pickle.dumps(Metadata({}, None, {})))
    identity = {"model": {**NAM56R_TINY_MODEL, **model}, "tokenizer": tokenizer}
    write_identity(path, identity, 20)


@pytest.fixture
def littered(run: Run, small_data: Path) -> Path:
    """A working directory that holds something wrong of every kind."""
    here = Path()
    (here / "twice.yaml").write_text("tp: 2\ntp: 4\n")
    (here / "names.yaml").write_text("tp: 2\ntensor_parallel: 2\n")
    (here / "list.yaml").write_text("- tp\n")
    (here / "broken.yaml").write_text("tp: [2\n")
    (here / "binary.yaml").write_bytes(b"\xff\xfe")
    (here / "base.yaml").write_text("recipe: nam57r\n")
    (here / "folder").mkdir()
    (here / "data").symlink_to(small_data)
    shutil.copytree(small_data, here / "damaged")
    (here / "damaged" / "heldout.bin").write_bytes(b"")
    fingerprint = PreparedData.open(small_data).tokenizer_fingerprint
    checkpoint(here / "run" / "checkpoints" / "step=20", fingerprint, vocab_size=300)
    checkpoint(here / "wide", fingerprint, hidden_size=448, vocab_size=300)
    checkpoint(here / "foreign", "f" * 64, vocab_size=300)
    return here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train nam56r_tinny", r"no recipe 'nam56r_tinny'\. Did you mean 'nam56r_tiny'\?"),
        ("train base.yaml", r"no recipe 'nam57r' to build on\. Did you mean 'nam56r'\?"),
        ("train missing.yaml", r"There is no file missing\.yaml\."),
        ("train broken.yaml", r"broken\.yaml cannot be read as YAML"),
        ("train binary.yaml", r"binary\.yaml cannot be read as YAML"),
        ("train folder", r"folder cannot be read: Is a directory"),
        ("train list.yaml", r"list\.yaml must hold key: value lines; it holds a list\."),
        ("train twice.yaml", r"twice\.yaml gives tp twice, again in line 2\."),
        ("train names.yaml", r"tensor_model_parallel_size is given twice"),
        ("train nam56r_tiny hiden_size=3", r"'hiden_size'\. Did you mean 'hidden_size'\?"),
        ("train nam56r_tiny tp", r"'tp' is not a setting: write key=value\."),
        ("train nam56r_tiny lr=fast", r"lr: 'fast' is not a number\."),
        ("train nam56r_tiny hidden_size=wide", r"hidden_size: 'wide' is not a whole number"),
        ("train nam56r_tiny bf16=true", r"bf16 is not a setting of a recipe"),
        ("train nam56r_tiny mode=other", r"mode: 'other' is not 'nemo_native'"),
        ("train nam56r_tiny pattern=AXE", r"'X' is not a letter .*\n  AXE\n   \^\nLegal letters"),
        ("train nam56r_tiny depth=6", r"depth of 6 cuts short the unit"),
        ("train nam56r_tiny tp=8 pp=5", r"for 6 reasons:\n  1\. .*\n  6\. PP = 5: 12 lay"),
        ("train nam56r pp=8", r"52 layers cannot be divided into 8"),
        ("train nam56r_tiny world=3", r"A world of 3 ranks is not divisible by .* = 2\. Use"),
        ("train nam56r_tiny moe_router_topk=17", r"moe_router_topk=17 .* num_moe_experts=16"),
        (
            "train nam56r_tiny data=nowhere",
            r"'nowhere' does not exist\. Make it: nemo-megacpp data",
        ),
        ("train nam56r_tiny data=folder", r"'folder' is not prepared data"),
        ("train nam56r_tiny data=damaged", r"'damaged' is damaged\. .*heldout\.bin has 0 bytes"),
        ("train nam56r_tiny data=data vocab_size=2048", r"vocabulary of 300, but vocab_size=2048"),
        ("train nam56r_tiny data=data seq_length=999998", r"one sample of seq_length=999998"),
        ("train nam56r_tiny vocab_size=257", r"vocabulary of 257 is too small"),
        (
            "train nam56r_tiny vocab_size=65536",
            r"enough text for a vocabulary of 32768, not of 65536",
        ),
        ("train nam56r_tiny resume=nowhere", r"There is no checkpoint at nowhere"),
        ("train nam56r_tiny resume=auto", r"give run_dir=FOLDER"),
        ("train nam56r_tiny data=data resume=wide", r"hidden_size is 448 there and 224 here\."),
        (
            "train nam56r_tiny data=data resume=run pattern=AEMR",
            r"AEMR there and AEMRAEMRAEMR here",
        ),
        ("train nam56r_tiny data=data resume=foreign", r"another tokenizer \(ffffffffffff there"),
        ("train nam56r_tiny data=data run_dir=run", r"run already holds a run\. .*resume=auto"),
        ("train nam56r_tiny run_dir=list.yaml", r"list\.yaml is not a folder"),
        ("train nam56r_tiny num_layers=1000000000000", r"1,000,000,000,000 is more than 65,536"),
        ("train nam56r_tiny fp8=hybrid", r"fp8='hybrid' needs Transformer Engine"),
        ("plan nam56r_tiny --html nowhere/x.html", r"nowhere/x\.html: No such file"),
        (
            "verify nam56r_tiny --layout tp=3",
            r"is illegal .* num_attention_heads = 28 is not divisible by TP = 3",
        ),
        ("demo --out list.yaml", r"list\.yaml is not a folder\. Choose another --out"),
        ("data prepare nowhere --out new", r"'nowhere' does not exist"),
        ("data prepare folder --out new", r"folder"),
        ("data inspect folder", r"'folder' is not prepared data"),
        ("train nam56r_tiny tp=2 tensor_parallel=4", r"twice: tp=2 and tensor_parallel=4"),
        ("plan nam56r_tiny tp=2 --layout tp=4", r"twice: tp=2 and tp=4 of --layout"),
        ("verify nam56r_tiny tp=2 tp=4", r"twice: tp=2 and tp=4"),
        ("layouts nam56r_tiny world=2 --world-size 2", r"twice: world=2 and --world-size 2"),
        ("compare nam56r nam56r --in-b tp=1 --in-b TP=2", r"twice: tp=1 and TP=2"),
        ("megatron-args nam56r_tiny steps=2 max_steps=3", r"twice: steps=2 and max_steps=3"),
        ("doctor nam56r_tiny --layout tp=2,tp=4", r"twice: tp=2 and tp=4"),
        ("train nam56r_tiny data=", r"data is empty\. .* data=null for the built-in corpus"),
        ("train nam56r_tiny resume=", r"resume is empty\. .* resume=null for a run from scratch"),
        ("plan nam56r_tiny etp=", r"etp is empty"),
        ("train nam56r_tiny normalization=Foo", r"normalization: 'Foo' is not 'RMSNorm' or"),
        (
            "train nam56r_tiny pattern=AEMR/A depth=4",
            r"after '/': MambaModel of the installed Megatron-Core 0\.16",
        ),
        ("train nam56r_tiny m2rnn_kernel=triton", r"m2rnn_kernel='triton' needs a GPU"),
        ("plan nam56r_tiny moe_token_dispatcher_type=flex", r"Legal: 'allgather', 'alltoall'"),
        ("train nam56r_tiny max_steps=20 warmup_steps=20", r"20 is not below max_steps=20"),
        ("train nam56r_tiny data=data resume=run max_steps=20", r"The run is complete: "),
    ],
)
def test_refusals(arguments: str, message: str, run: Run, littered: Path) -> None:
    before = listing(littered)
    code, _, err = run(*arguments.split(" "))
    assert code == 2
    assert re.search(message, err, re.DOTALL), err
    assert err.startswith("nemo-megacpp: ")
    assert err.count("nemo-megacpp: ") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert listing(littered) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("plan", "nam56r_tiny", "--layout", "tp=2", "--layout", "tp=4"),
            "--layout is given twice",
        ),
        (("plan", "nam56r_tiny", "--world-size=4", "--world-size=8"), "twice, '4' and '8'"),
        (("data", "prepare", "x", "--out", "y", "--out", "y"), "--out is given twice"),
        (("plan", "nam56r_tiny", "--layout", ""), "the argument after --layout is empty"),
        (("plan", "nam56r_tiny", "--layout="), "--layout= is empty"),
        (("train", ""), "the argument after train is empty"),
        (("train", "nam56r_tiny", " "), "the argument after nam56r_tiny is empty"),
    ],
)
def test_options_typed_twice_or_empty(words: tuple[str, ...], message: str, run: Run) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_what_is_refused_is_refused_for_its_own_reason(
    run: Run, littered: Path, started: list[Any]
) -> None:
    """The same folders, asked for rightly, are taken."""
    for overrides in (
        ("data=data",),
        ("data=data", "vocab_size=300", "seq_length=512"),
        ("data=data", "resume=run"),
        ("data=data", "resume=run", "mode=nemo_native", "tp=1", "pp=2"),
        ("data=data", "run_dir=run", "resume=auto"),
    ):
        code, _, err = run("train", "nam56r_tiny", *overrides)
        assert (code, err) == (0, "")
    assert len(started) == 5


def test_a_bare_installation_is_sent_to_the_doctor(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(start, "train_recipe", missing)
    code, _, error = run("train", "nam56r_tiny")
    assert (code, error) == (2, "nemo-megacpp: No module named 'torch'; see nemo-megacpp doctor.\n")


@pytest.mark.processes
def test_a_reader_that_has_had_enough() -> None:
    """As in ``nemo-megacpp recipes | head -1``."""
    command = [sys.executable, "-m", "nemo_megacpp.cli", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 128 + signal.SIGPIPE
