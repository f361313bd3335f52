"""Loading a checkpoint from anywhere runs nothing of it."""

from __future__ import annotations

import argparse
import io
import pickle
import random
import re
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from torch.distributed.checkpoint import FileSystemReader

from nemo_megacpp.checkpoint.guard import guard_load, inspect_before_load
from nemo_megacpp.checkpoint.manifest import FILE, write_manifest
from nemo_megacpp.checkpoint.safe_pickle import read_metadata, read_torch_file, scan_checkpoint
from nemo_megacpp.checkpoint.weights import load_weights
from nemo_megacpp.core.checkpoints import COMMON_OBJECT
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool
from tests.bare import build_chunks, make_config
from tests.checkpoint.conftest import SMALL
from tests.checkpoint.malice import (
    PLACES,
    Payload,
    byte_tensor,
    replace_object,
    torch_bytes,
)


def refusal(weights: Path) -> str:
    with pytest.raises(UserError) as refused:
        scan_checkpoint(weights)
    return str(refused.value)


def test_what_megatron_wrote_is_let_through(small_weights: Path) -> None:
    metadata = read_metadata(small_weights)
    stock = FileSystemReader(small_weights).read_metadata()
    assert metadata.state_dict_metadata == stock.state_dict_metadata
    assert metadata.storage_data == stock.storage_data
    names = [name for name in stock.state_dict_metadata if "_extra_state" in name]
    assert names
    names += {COMMON_OBJECT} & stock.state_dict_metadata.keys()  # from 0.19 on, beside common.pt
    assert scan_checkpoint(small_weights) == len(names) + 2  # .metadata and common.pt


@pytest.mark.parametrize("place", PLACES)
def test_a_payload_is_named_and_not_run(place: str, own_weights: Path, tmp_path: Path) -> None:
    PLACES[place](own_weights, Payload(tmp_path / "RUN"))
    message = refusal(own_weights)
    if place == "modelopt state":
        assert "modelopt_state is refused" in message
    else:
        assert "loading it would call posix.mkdir" in message
        assert str(own_weights) in message
    with pytest.raises(UserError):
        inspect_before_load(own_weights, verify=False)
    assert not (tmp_path / "RUN").exists()


def test_the_payload_is_real(own_weights: Path, tmp_path: Path) -> None:
    """Torch's own reader runs it."""
    PLACES["metadata"](own_weights, Payload(tmp_path / "RUN"))
    FileSystemReader(own_weights).read_metadata()
    assert (tmp_path / "RUN").is_dir()


def _load(folder: str) -> None:
    layout = ParallelLayout.parse("tp=1")
    start_model_parallel(layout)
    load_weights(build_chunks(make_config(SMALL, layout), layout), folder, verify=False)


def _load_stock(folder: str) -> None:
    from megatron.core import dist_checkpointing

    from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict

    layout = ParallelLayout.parse("tp=1")
    start_model_parallel(layout)
    chunks = build_chunks(make_config(SMALL, layout), layout)
    dist_checkpointing.load(model_sharded_state_dict(chunks), folder)


def _guard(folder: str) -> None:
    guard_load(Path(folder), verify=True)


@pytest.mark.parametrize("place", ["metadata", "common", "object"])
def test_load_model_refuses_it(
    ranks: WorkerPool, place: str, own_weights: Path, tmp_path: Path
) -> None:
    PLACES[place](own_weights, Payload(tmp_path / "RUN"))
    with pytest.raises(WorkerError, match=r"UserError: .*would call posix\.mkdir"):
        ranks.run(1, _load, str(own_weights))
    assert not (tmp_path / "RUN").exists()


def test_megatron_alone_would_run_an_object(
    ranks: WorkerPool, own_weights: Path, tmp_path: Path
) -> None:
    PLACES["object"](own_weights, Payload(tmp_path / "RUN"))
    ranks.run(1, _load_stock, str(own_weights))
    assert (tmp_path / "RUN").is_dir()


def test_all_ranks_refuse_what_one_finds(
    ranks: WorkerPool, own_weights: Path, tmp_path: Path
) -> None:
    """The objects are divided among the ranks, and rank 0 reads the manifest."""
    PLACES["object"](own_weights, Payload(tmp_path / "RUN"))
    (own_weights / FILE).unlink()
    with pytest.raises(WorkerError) as refused:
        ranks.run(2, _guard, str(own_weights))
    assert str(refused.value).count("would call posix.mkdir") == 2
    write_manifest(own_weights)
    (own_weights / "common.pt").write_bytes(b"shorter")
    with pytest.raises(WorkerError) as refused:
        ranks.run(2, _guard, str(own_weights))
    assert str(refused.value).count("common.pt has 7 bytes instead of") == 2


def test_ranks_share_the_objects(small_weights: Path) -> None:
    whole = scan_checkpoint(small_weights)
    shares = [scan_checkpoint(small_weights, share, 3) for share in range(3)]
    assert sum(shares) == whole + 2 * 2  # each reads .metadata and common.pt
    assert max(shares) < whole


def test_metadata_of_something_else_is_damaged(own_weights: Path) -> None:
    for content in (pickle.dumps({}), pickle.dumps([1]), b"", b"\x80\x04", b"garbage"):
        (own_weights / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match=r"\.metadata (is damaged|cannot be read): "):
            read_metadata(own_weights)
    (own_weights / ".metadata").unlink()
    with pytest.raises(UserError, match=r"\.metadata cannot be read: No such file"):
        read_metadata(own_weights)


def test_damaged_metadata_never_ends_in_a_traceback(own_weights: Path) -> None:
    whole = (own_weights / ".metadata").read_bytes()
    chance = random.Random(11)
    refused = 0
    for _ in range(200):
        content = bytearray(whole)
        content[chance.randrange(len(content))] = chance.randrange(256)
        (own_weights / ".metadata").write_bytes(content)
        try:
            scan_checkpoint(own_weights)
        except UserError:
            refused += 1
    assert refused > 20


# --- what a checkpoint may hold


def _rng_state() -> list[dict[str, Any]]:
    return [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        }
    ]


def _arguments() -> dict[str, Any]:
    return {
        "args": argparse.Namespace(
            params_dtype=torch.bfloat16,
            model_type=ModelType.encoder_or_decoder,
            attention_backend=AttnBackend.auto,
            save=Path("somewhere"),
            extra=types.SimpleNamespace(a=1),
        ),
        "optimizer": OptimizerConfig(lr=1e-3),
        "seen": {1, 2},
        "step": torch.tensor(3.0),
        "raw": b"\x00\xff",
        "numbers": np.arange(3, dtype=np.uint32),
        "scalar": np.float32(2.0),
    }


@pytest.mark.parametrize("held", [_rng_state(), _arguments()], ids=["rng", "arguments"])
def test_the_data_of_a_training_run_is_let_through(held: Any, own_weights: Path) -> None:
    (own_weights / "common.pt").write_bytes(torch_bytes({"held": held}))
    replace_object(own_weights, torch_bytes([held]))
    read_torch_file(own_weights / "common.pt")


def test_fp8_state_of_transformer_engine_is_let_through_without_it(
    own_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = types.ModuleType("transformer_engine.common.recipe")
    packages = [types.ModuleType(f"transformer_engine{name}") for name in ("", ".common")]
    for module in (*packages, recipe):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    scaling = type("DelayedScaling", (), {"__module__": recipe.__name__})
    recipe.DelayedScaling = scaling  # type: ignore[attr-defined]
    state = {"recipe": scaling(), "scale_fwd": torch.ones(3), "extra_fp8_variables": {"a": 1}}
    kept = [byte_tensor(pickle.dumps(state)), io.BytesIO(torch_bytes(state)), None]
    for module in (*packages, recipe):
        monkeypatch.delitem(sys.modules, module.__name__)
    for value in (*kept, torch.empty(0, dtype=torch.uint8), io.BytesIO()):
        assert "_extra_state" in replace_object(own_weights, torch_bytes([value]))
        scan_checkpoint(own_weights)
    assert "transformer_engine" not in sys.modules


# --- unusual files


def _forms(held: Any) -> dict[str, bytes]:
    """``held`` in every file form that ``torch.load`` accepts or that could mislead a scanner."""
    normal = torch_bytes(held)
    (record,) = (
        zipfile.ZipFile(io.BytesIO(normal)).read(name)
        for name in zipfile.ZipFile(io.BytesIO(normal)).namelist()
        if name.endswith("data.pkl")
    )

    def rewritten(base: Any, **entries: bytes) -> bytes:
        stream = io.BytesIO(torch_bytes(base))
        with zipfile.ZipFile(stream, "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two entries of one name
            for name, content in entries.items():
                archive.writestr(f"archive/{name}.pkl", content)
            archive.comment = entries.get("comment", b"")
        return stream.getvalue()

    return {
        "two pickles, first": rewritten(held, data=pickle.dumps(1)),
        "two pickles, second": rewritten({"step": 1}, data=record),
        "comment": rewritten(held, comment=b"behind"),
        "TorchScript": rewritten(held, constants=pickle.dumps(())),
        "bytes in front": normal[:4] + normal,
        "old format": torch_bytes(held, _use_new_zipfile_serialization=False),
        "bare pickle": pickle.dumps(held, protocol=2),
        "half": normal[: len(normal) // 2],
        "empty": b"",
    }


@pytest.mark.parametrize("form", _forms({}))
@pytest.mark.parametrize("place", ["common", "object"])
def test_no_form_of_a_file_hides_a_payload(
    place: str, form: str, own_weights: Path, tmp_path: Path
) -> None:
    """What the scan lets through, torch's unrestricted reader loads without running anything."""
    content = _forms({"args": Payload(tmp_path / "RUN")})[form]
    if place == "common":
        (own_weights / "common.pt").write_bytes(content)
    else:
        replace_object(own_weights, content)
    if form == "two pickles, second":  # torch reads the first entry of a name, with any unpickler
        scan_checkpoint(own_weights)
        assert torch.load(io.BytesIO(content), weights_only=False) == {"step": 1}
    else:
        found = refusal(own_weights)
        assert "would call posix.mkdir" in found or "cannot be read: " in found
        assert found.count("\n") == 0
        named = ("two pickles, first", "comment", "old format", "bare pickle")
        assert ("posix.mkdir" in found) == (form in named), found
    assert not (tmp_path / "RUN").exists()


class _Eval:
    def __reduce__(self) -> Any:
        return eval, ("1",)


@pytest.mark.parametrize("place", ["metadata", "common", "object", "byte tensor"])
def test_what_another_library_has_allowed_is_refused(place: str, own_weights: Path) -> None:
    torch.serialization.add_safe_globals([eval])
    before = set(torch.serialization.get_safe_globals())
    try:
        PLACES[place](own_weights, _Eval())  # type: ignore[arg-type]
        assert re.search(r"would call (builtins\.|__builtin__\.)?eval", refusal(own_weights))
        assert set(torch.serialization.get_safe_globals()) == before
    finally:
        torch.serialization._weights_only_unpickler._remove_safe_globals([eval])


def test_an_object_outside_of_the_checkpoint_is_refused(own_weights: Path) -> None:
    metadata = read_metadata(own_weights)
    for index, place in metadata.storage_data.items():
        if "_extra_state" in index.fqn:
            place.relative_path = "../elsewhere"
    (own_weights / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "is outside the checkpoint" in refusal(own_weights)


def test_module_state_in_common_is_refused(own_weights: Path) -> None:
    """It would be merged with the module's own, and unpickled by Transformer Engine."""
    held = {"state_dict": {"module.decoder.layers.0.mixer.in_proj._extra_state": torch.zeros(3)}}
    (own_weights / "common.pt").write_bytes(torch_bytes(held))
    assert "_extra_state does not belong in this file" in refusal(own_weights)
