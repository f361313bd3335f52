"""What tries start from, made once: data, a run's checkpoints, an export. They take copies."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from nemo_megacpp.checkpoint.lifecycle import finish_checkpoint
from nemo_megacpp.checkpoint.manifest import FILE as MANIFEST
from nemo_megacpp.checkpoint.manifest import write_manifest
from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.data.prepared import MANIFEST as DATA_MANIFEST
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.runtime.workers import WorkerPool
from tests.checkpoint.saved_run import save_run
from tests.faults.forks import Forks

RECIPE = "nam56r_tiny"
_SMALL = """
    pattern=AEMR depth=4 hidden_size=56 ffn_hidden_size=64 num_attention_heads=4
    num_query_groups=2 mamba_num_heads=4 mamba_num_groups=2 m2rnn_num_heads=4
    m2rnn_key_head_dim=8 num_moe_experts=4 seq_length=64 micro_batch_size=1
    global_batch_size=2 limit_val_batches=1 log_interval=1 max_steps=1000 save_interval=2 tp=2
"""
SETTINGS = tuple(_SMALL.split())
"""A small model of all families, on two ranks."""
STEPS = (2, 4)
MODULES = (
    "nemo_megacpp.cli",
    "nemo_megacpp.checkpoint.rewrite",
    "nemo_megacpp.checkpoint.guard",
    "nemo_megacpp.start",
    "nemo_megacpp.data.prepare",
    "nemo_megacpp.data.packed_rows",
    "nemo_megacpp.preflight",
    "nemo_megacpp.runs.comparison_tables",
    "nemo_megacpp.runs.run_page",
    "safetensors.torch",
    "tokenizers",
    "tests.faults.results",
)
"""What the commands of the cheap kinds import; not NeMo."""


class Workplace:
    """The intact inputs, and where tries work.

    Args:
        root: an empty folder.

    Attributes:
        data: prepared data.
        run: a run's folder with complete checkpoints of :data:`STEPS`.
        texts: that the data was made of.
        forks: runs commands.
        canary: folder that hostile files write into if their code runs.
    """

    def __init__(self, root: Path):
        self.root = root
        self.texts, self.run, self.canary = root / "texts", root / "run", root / "canary"
        self._tries = 0
        for folder in (self.texts, self.canary, root / "commands"):
            folder.mkdir()
        self.forks = Forks(MODULES, root / "commands")  # imports while the rest is made
        for number in range(8):
            words = (f"word{number} and {count} more, for a start" for count in range(100))
            (self.texts / f"{number}.txt").write_text("\n".join(words))
        self.data = prepare(
            [self.texts], root / "data", vocab_size=300, held_out=0.3, progress=False
        )
        self.recipe = resolve(
            RECIPE, [*SETTINGS, f"data={self.data.root}", f"vocab_size={self.data.vocab_size}"]
        )
        saved = self.forks.run(
            None,
            cwd=root,
            then=save_checkpoints,
            given=(str(self.run), str(self.data.root), str(self.data.vocab_size)),
        )
        assert saved.code == 0, saved

    @cached_property
    def pool(self) -> WorkerPool:
        """Two ranks."""
        return WorkerPool(2)

    @cached_property
    def nemo_forks(self) -> Forks:
        """Runs what needs NeMo; its import takes most of a minute on a small machine."""
        (self.root / "nemo").mkdir()
        return Forks((*MODULES, "nemo_megacpp.nemo.data_module"), self.root / "nemo")

    @cached_property
    def exported(self) -> Path:
        """The newest checkpoint as safetensors."""
        out = self.root / "exported"
        ended = self.forks.run(["checkpoint", "export", self.checkpoint(), out], cwd=self.root)
        assert ended.code == 0, ended
        return out

    def checkpoint(self, step: int = STEPS[-1]) -> Path:
        """A checkpoint of the run."""
        return self.run / "checkpoints" / f"step={step}"

    @contextmanager
    def own_folder(self) -> Iterator[Path]:
        """Yield an empty folder for one try, removed afterwards."""
        self._tries += 1
        folder = self.root / f"try-{self._tries}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def ran(self) -> list[str]:
        """Return what hostile code has written since the last call."""
        found = sorted(os.listdir(self.canary))
        shutil.rmtree(self.canary)
        self.canary.mkdir()
        return found

    def close(self) -> None:
        """End the processes that commands and tasks are forked from."""
        self.forks.__exit__()
        if "nemo_forks" in vars(self):
            self.nemo_forks.__exit__()
        if "pool" in vars(self):
            self.pool.close()


def save_checkpoints(run: str, data: str, vocabulary: str) -> None:
    """Save what a run of the small model would have saved at :data:`STEPS`; in a fork."""
    recipe = resolve(RECIPE, [*SETTINGS, f"data={data}", f"vocab_size={vocabulary}"])
    identity = {
        "model": recipe.model,
        "layout": recipe.layout.short(),
        "tokenizer": PreparedData.open(data).tokenizer_fingerprint,
    }
    with WorkerPool(recipe.layout.world) as ranks:
        for step in STEPS:
            folder = Path(run) / "checkpoints" / f"step={step}"
            (folder / "weights").mkdir(parents=True)
            spec = StepSpec(recipe.model, dtype="float32", seed=step)
            trainer = {"global_step": step, "loops": {"fit": [1, 2]}}
            ranks.run(
                ranks.size, save_run, str(folder / "weights"), spec, identity["layout"], trainer
            )
            finish_checkpoint(folder, identity, step)


def reseal(folder: Path) -> str:
    """Write checksums that match what is in a folder now, as whoever planted it would.

    Returns:
        What the folder has now, in words.
    """
    if (folder / DATA_MANIFEST).exists():
        from nemo_megacpp.data.checksums import write_checksums

        write_checksums(folder)
        return "checksums that match"
    (folder / MANIFEST).unlink(missing_ok=True)
    try:
        write_manifest(folder)
    except Exception:  # it reads .metadata, which may be what is malformed
        return "no manifest"
    return "a manifest that matches"


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the digest of every file and the target of every link, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found
