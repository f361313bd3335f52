"""Runs of a model with side channels: trained, resumed with other cuts, and begun from weights."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.runs.curves import read_curve
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool

pytestmark = pytest.mark.slow

SOURCES = {"language": "lang", "kind": "kinds"}
LANGUAGE = {"name": "language", "vocab_size": 5, "field": "lang"}
KIND = {"name": "kind", "vocab_size": 3, "field": "kinds", "owner": [1, 2], "combine": "concat"}
BIGRAM = {"name": "bigram", "vocab_size": 64, "ngram": 2, "partition": "vocabulary"}
CHANNELS = [LANGUAGE, KIND, BIGRAM]

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("channels")
    lines = []
    for number in range(40):
        text = f"word{number} and {number % 7} more, for a start\n" * 12
        kinds = [character.isdigit() + 2 * character.isspace() for character in text]
        lines.append(json.dumps({"text": text, "lang": number % 5, "kinds": kinds}))
    (folder / "a.jsonl").write_text("\n".join(lines))
    sources = [{key: c[key] for key in c.keys() & {"name", "vocab_size", "field", "ngram"}}
               for c in CHANNELS]  # fmt: skip
    options: dict[str, Any] = {"vocab_size": 280, "held_out": 0.3, "document_multiple": 4}
    paths = [folder / "a.jsonl"]
    return prepare(paths, folder / "data", side_channels=sources, **options, progress=False)


@pytest.fixture
def train(ranks: WorkerPool, data: PreparedData, tmp_path: Path) -> Train:
    """Return a function that trains on two ranks; a run is named by its folder."""
    from tests.nemo import nemo_ranks

    model = tiny_model("AMRA", num_layers=4, vocab_size=280, seq_length=32)
    run_settings = {
        **{"micro_batch_size": 1, "global_batch_size": 4, "max_steps": 4, "warmup_steps": 0},
        **{"save_interval": 2, "val_check_interval": 2, "limit_val_batches": 1},
        **{"precision": "fp32", "use_distributed_optimizer": False, "etp": 1},
    }

    def run(name: str, channels: list[dict[str, Any]], **settings: Any) -> Path:
        declared = json.dumps(channels) if channels else "null"
        given = {**model, **run_settings, "side_channels": declared, **settings}
        given |= {"data": data.root, "run_dir": tmp_path / name}
        overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        ranks.run(2, nemo_ranks.run_train, port, overrides)
        return tmp_path / name

    return run


def _tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    reader = dcp.FileSystemReader(str(run / "checkpoints" / f"step={step}" / "weights"))
    saved = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in saved.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith("module.")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def test_resumed_with_other_cuts(train: Train) -> None:
    """Through the prepared ids, in packs: TP, then CP, then cuts before and after an owner."""
    packs = {"packed_documents": True, "mode": "mamba3"}
    first = train("first", CHANNELS, tp=2, stop_after=2, **packs)
    keys = [key for key in _tensors(first, 2) if "side_channels" in key]
    assert sorted(key.removeprefix("module.") for key in keys) == [
        "decoder.side_channels.1.projection",
        "decoder.side_channels.1.tables.kind.weight",
        "decoder.side_channels.2.projection",
        "decoder.side_channels.2.tables.kind.weight",
        "embedding.side_channels.tables.bigram.weight",
        "embedding.side_channels.tables.language.weight",
    ]
    start = first / "checkpoints" / "step=2"
    layouts: dict[str, dict[str, Any]] = {
        "tp": {"tp": 2},
        "cp": {"tp": 1, "cp": 2},
        "before": {"tp": 1, "pp": 2, "pattern": "A|MRA"},
        "after": {"tp": 1, "pp": 2, "pattern": "AM|RA"},
    }
    ends = {}
    for name, layout in layouts.items():
        fields = {"hybrid_pattern": None, **layout} if "pattern" in layout else layout
        run = train(name, CHANNELS, resume=start, **fields, **packs)
        ends[name] = read_curve(run).steps[4]["loss"], _tensors(run, 4)
    loss, weights = ends.pop("tp")
    for name, (other_loss, other) in ends.items():
        assert other_loss == pytest.approx(loss, rel=1e-5), name
        assert other.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5, msg=f"{name} {key}")


def test_begun_from_other_channels(train: Train) -> None:
    first = train("first", [LANGUAGE, KIND], tp=2, max_steps=2)
    start = first / "checkpoints" / "step=2"
    with pytest.raises(WorkerError, match="the side channels are language"):
        train("refused", [KIND, BIGRAM], tp=2, init_from=start)
    still = {"lr": "1e-30", "min_lr": 0, "weight_decay": 0, "max_steps": 1, "save_interval": 1}
    asked = {"init_from": start, "init_side_channels": "any"}
    begun = train("begun", [KIND, BIGRAM], tp=2, **asked, **still)
    before, after = _tensors(first, 2), _tensors(begun, 1)
    assert not [key for key in after if "language" in key]
    assert [key for key in after if key not in before] == [
        "module.embedding.side_channels.tables.bigram.weight"
    ]
    for key in before.keys() & after.keys():
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-20, msg=key)
    assert after["module.embedding.side_channels.tables.bigram.weight"].std() > 1e-3
