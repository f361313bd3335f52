"""Every malformed file of a checkpoint ends in one message, in seconds; nothing of it is run."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import randoms

from nemo_megacpp.checkpoint import content
from nemo_megacpp.checkpoint.content import _order, describe
from nemo_megacpp.checkpoint.export import export, read_config, read_export
from nemo_megacpp.checkpoint.folder import find_checkpoint
from nemo_megacpp.checkpoint.guard import inspect_before_load
from nemo_megacpp.checkpoint.identity import FILE as IDENTITY
from nemo_megacpp.checkpoint.identity import write_identity
from nemo_megacpp.checkpoint.manifest import FILE as MANIFEST
from nemo_megacpp.checkpoint.manifest import check_manifest, write_manifest
from nemo_megacpp.checkpoint.pickle_limits import limited_memory
from nemo_megacpp.checkpoint.rewrite import reshard
from nemo_megacpp.checkpoint.safe_pickle import read_metadata, read_torch_file, scan_checkpoint
from nemo_megacpp.commands.checkpoint import _print
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from tests import malformed
from tests.checkpoint.conftest import SMALL
from tests.checkpoint.malice import replace_object, torch_bytes

_SECONDS = 20
"""On a loaded machine; alone, none takes more than three."""
HOSTILE_PICKLES = dict(malformed.hostile_pickles())
HOSTILE_FILES = dict(malformed.hostile_torch_files())
_RUNS_NO_PICKLE = {"escapes in a key"}
"""Data that a file may hold."""


@pytest.fixture(scope="module")
def whole(small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an identity and a manifest; only read it."""
    folder = tmp_path_factory.mktemp("whole") / "step=4"
    shutil.copytree(small_weights, folder / "weights", ignore=shutil.ignore_patterns(MANIFEST))
    model = {k: v for k, v in SMALL.model.items() if isinstance(v, str | int | float | None)}
    layout = ParallelLayout.parse("tp=2,etp=1").short()
    write_identity(folder, {"model": model, "tokenizer": None, "layout": layout}, 4)
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def own(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it, in which each test puts a damaged file, and the whole one back."""
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("own") / "step=4"))


@pytest.fixture(autouse=True)
def few_degrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an inspection says of them takes longer than all that it reads."""
    monkeypatch.setattr(content, "_LARGEST_DEGREE", 2)


def outcome(use: Callable[[], Any]) -> str:
    """Return what a UserError says, or nothing; anything else fails the test."""
    began = time.monotonic()
    try:
        use()
        said = ""
    except UserError as error:
        said = str(error)
        assert said and len(said) < 3000, said[:3000]
    assert time.monotonic() - began < _SECONDS
    return said


def read_all(folder: Path) -> None:
    """As ``checkpoint inspect`` and ``verify`` do."""
    found = describe(find_checkpoint(folder))
    json.dumps(found, allow_nan=False)
    _print(found)
    inspect_before_load(folder)


FILES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    IDENTITY: malformed.mutate_json,
    MANIFEST: malformed.mutate_manifest,
    "weights/metadata.json": malformed.mutate_json,
    "weights/.metadata": malformed.mutate_pickle,
    "weights/common.pt": malformed.mutate_torch_file,
}


@pytest.mark.parametrize("how", ["values", "bytes"])
@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_read_or_refused(name: str, how: str, whole: Path, own: Path) -> None:
    whole_content = (whole / name).read_bytes()
    mutate = FILES[name] if how == "values" else malformed.mutate_bytes
    manifest = (own / MANIFEST).read_bytes()

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(randoms(use_true_random=False))
    def check(chance: random.Random) -> None:
        (own / name).write_bytes(mutate(chance, whole_content))
        if name != MANIFEST:  # which would name the file, and nothing would read it
            (own / MANIFEST).unlink(missing_ok=True)
        outcome(lambda: read_all(own))

    try:
        check()
    finally:
        (own / name).write_bytes(whole_content)
        (own / MANIFEST).write_bytes(manifest)
    assert outcome(lambda: read_all(own)) == ""


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_metadata(case: str, own_weights: Path) -> None:
    (own_weights / ".metadata").write_bytes(HOSTILE_PICKLES[case])
    assert outcome(lambda: read_metadata(own_weights))
    assert outcome(lambda: scan_checkpoint(own_weights))


@pytest.mark.parametrize("case", HOSTILE_FILES)
def test_hostile_common_file(case: str, own_weights: Path) -> None:
    (own_weights / "common.pt").write_bytes(HOSTILE_FILES[case])
    said = outcome(lambda: scan_checkpoint(own_weights))
    assert bool(said) == (case not in _RUNS_NO_PICKLE)
    assert bool(outcome(lambda: read_torch_file(own_weights / "common.pt"))) == bool(said)


@pytest.mark.parametrize("case", ["deep", "shared references"])
def test_nothing_may_nest_or_multiply_inside_an_object(case: str, own_weights: Path) -> None:
    held: Any = []
    for _ in range(60 if case == "shared references" else 220):
        held = [held, held] if case == "shared references" else {"a": held}
    replace_object(own_weights, torch_bytes([held]))
    said = outcome(lambda: scan_checkpoint(own_weights))
    assert ("refer to each other" if case == "shared references" else "nested deeper") in said


def change_metadata(weights: Path, change: Callable[[Any], None]) -> None:
    metadata = read_metadata(weights)
    change(metadata)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def _first_tensor(metadata: Any) -> Any:
    return next(held for held in metadata.state_dict_metadata.values() if hasattr(held, "chunks"))


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda metadata: setattr(_first_tensor(metadata), name, value)


def _set_place(name: str, value: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        places = metadata.storage_data.items()
        place = next(place for index, place in places if index.offset is not None)
        setattr(place, name, value)

    return change


INCONSISTENT: dict[str, tuple[Callable[[Any], None], str]] = {
    "no dictionary": (
        lambda m: setattr(m, "state_dict_metadata", [1]),
        "state_dict_metadata should",
    ),
    "no storage": (lambda m: setattr(m, "storage_data", None), "storage_data should be"),
    "text as size": (_set("size", "12"), "size should be a valid tuple, and is '12'"),
    "negative size": (_set("size", (-1, 2)), "greater than or equal to 0, and is -1"),
    "other size": (_set("size", (1,)), "is not inside the tensor's [1]"),
    "no properties": (_set("properties", None), "properties"),
    "chunks of numbers": (_set("chunks", [1, 2]), "chunks.0"),
    "many dimensions": (_set("size", (1,) * 100), "size tuple should have at most 32 items"),
    "outside": (_set_place("relative_path", "../../it"), "which is outside the checkpoint"),
    "absolute": (_set_place("relative_path", "/etc/passwd"), "which is outside the checkpoint"),
    "negative offset": (_set_place("offset", -1), "greater than or equal to 0, and is -1"),
    "huge length": (_set_place("length", 2**60), "less than or equal to 9007199254740992"),
    "beyond the file": (_set_place("length", 2**40), "bytes instead of at least 1,099,511,"),
    "missing file": (_set_place("relative_path", "it.distcp"), "cannot be read: No such file"),
    "short": (_set_place("length", 1), "bytes instead of"),
    "unknown": (lambda m: m.state_dict_metadata.popitem(), "does not describe"),
    "unsaved": (lambda m: m.storage_data.popitem(), "is in no file"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_metadata_that_does_not_agree(case: str, own_weights: Path) -> None:
    change, message = INCONSISTENT[case]
    change_metadata(own_weights, change)
    assert message in outcome(lambda: scan_checkpoint(own_weights))


@pytest.mark.parametrize("held", ["a text", True, [1, 2]])
def test_common_state_is_a_mapping(own_weights: Path, held: object) -> None:
    """Megatron would merge it with the sharded state, and end in a traceback."""
    torch.save(held, own_weights / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt is damaged: it holds a .*, not a mapping"):
        scan_checkpoint(own_weights)


@pytest.mark.parametrize("name", ["weights/common.pt", "weights/.metadata", IDENTITY, MANIFEST])
def test_a_named_pipe_is_not_waited_for(name: str, whole: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(whole, tmp_path / "it"))
    for path in (own / name, own / MANIFEST):
        path.unlink(missing_ok=True)
    os.mkfifo(own / name)
    assert outcome(lambda: read_all(own))


@pytest.mark.parametrize("text", ["", "9" * 5000, "-1", "release", malformed.ESCAPES, "٣", "1\n2"])
def test_a_tracker_that_names_no_iteration(text: str, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text, encoding="utf-8")
    assert outcome(lambda: find_checkpoint(tmp_path))


def test_names_in_an_inspection_are_escaped_and_short(
    own_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rename(metadata: Any) -> None:
        name = next(
            n for n, held in metadata.state_dict_metadata.items() if hasattr(held, "chunks")
        )
        new = malformed.ESCAPES + "x" * 900
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(name)
        for index in [index for index in metadata.storage_data if index.fqn == name]:
            place = metadata.storage_data.pop(index)
            metadata.storage_data[type(index)(new, index.offset, index.index)] = place

    change_metadata(own_weights, rename)
    _print(describe(own_weights))
    printed = capsys.readouterr().out
    assert "\\x1b]0;owned" in printed and "\x1b" not in printed and "\u202e" not in printed
    assert max(map(len, printed.splitlines())) < 400


def test_a_layer_of_many_digits_is_a_name() -> None:
    names = ["a.10", "a.2", "a." + "9" * 5000, "a.²"]
    assert sorted(names, key=_order)[2:] == ["a.2", "a.10"]


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]
)
def test_a_changed_export_is_read_or_refused(name: str, whole: Path, tmp_path: Path) -> None:
    export(whole, tmp_path / "out")
    path = tmp_path / "out" / name
    whole_content = path.read_bytes()
    mutate = malformed.mutate_bytes if name.endswith("tensors") else malformed.mutate_json

    def read() -> None:
        read_config(tmp_path / "out")
        read_export(tmp_path / "out")

    for seed in range(60):
        header = 4096 if name.endswith("tensors") else len(whole_content)
        head, rest = whole_content[:header], whole_content[header:]
        path.write_bytes(mutate(random.Random(seed), head) + rest)
        outcome(read)


@pytest.mark.parametrize("change", [{"it": 1}, {"hidden_size": 10**9}])
def test_reshard_builds_no_model_of_foreign_settings(
    change: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(whole, tmp_path / "it"))
    identity = json.loads((own / IDENTITY).read_bytes())
    identity["model"] |= change
    (own / IDENTITY).write_text(json.dumps(identity))
    write_manifest(own)
    layout = ParallelLayout.parse("tp=1")

    def start(ranks: int) -> Any:
        pytest.fail("ranks were started")

    said = outcome(lambda: reshard(own, tmp_path / "out", layout, start))
    assert f"{IDENTITY} is damaged: model: " in said
    assert not (tmp_path / "out").exists()


def test_memory_is_limited_for_a_while_only() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), limited_memory(0):
        bytearray(1 << 36)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_manifest_of_the_right_checksum_and_wrong_values(own: Path) -> None:
    whole_content = (own / MANIFEST).read_bytes()
    try:
        for seed in range(100):
            changed = malformed.mutate_manifest(random.Random(seed), whole_content)
            (own / MANIFEST).write_bytes(changed)
            outcome(lambda: check_manifest(own))
    finally:
        (own / MANIFEST).write_bytes(whole_content)
