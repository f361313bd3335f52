"""Data through NeMo's data module: no file of an index, no id beyond the vocabulary."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from tests.checkpoint.malice import Payload


def module_of(data: Path, **options: Any) -> Any:
    from nemo_megacpp.nemo.data_module import HybridDataModule

    module = HybridDataModule(str(data), 300, 32, num_workers=0, output_log=False, **options)
    module.build(16, 16, 4, 4)
    return module


def test_no_file_of_an_index_is_loaded_or_written(
    small_data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy.load, as Megatron calls it, runs the code of a planted file."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

    data, second = (
        Path(shutil.copytree(small_data.root, tmp_path / name)) for name in ("first", "second")
    )
    ran = tmp_path / "ran"
    stock = PreTrainingDataModule(
        {split: [str(data / "train")] for split in ("train", "validation", "test")},
        32,
        tokenizer=AutoTokenizer(str(small_data.tokenizer_dir)),
        split=None,  # type: ignore[arg-type]
        num_workers=0,
        output_log=False,
    )
    stock.build(16, 16, 4, 4)
    for planted in data.rglob("cache/**/*.npy"):
        planted.write_bytes(pickle.dumps(Payload(ran)))
    with suppress(Exception):
        stock.build(16, 16, 4, 4)
    assert ran.exists(), "the planted files work"
    ran.rmdir()

    there = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("an index file is loaded"))
    for options in (
        {},
        {"packed_documents": True},
        {"blend": {str(data): 1.0, str(second): 3.0}},
    ):
        module = module_of(data, **options)
        for split in (module._train_ds, module._validation_ds, module._test_ds):
            assert split[0]["tokens"].shape == (32,)
    assert sorted(tmp_path.rglob("*")) == there and not ran.exists()
    with pytest.raises(UserError, match=r"index_mapping_dir: Megatron loads .* leave the setting"):
        module_of(data, index_mapping_dir=str(tmp_path))


@pytest.mark.parametrize("packed", [False, True])
def test_an_id_beyond_the_vocabulary_ends_the_run(
    small_data: PreparedData, tmp_path: Path, packed: bool
) -> None:
    data = Path(shutil.copytree(small_data.root, tmp_path / "data"))
    module = module_of(data, packed_documents=packed)
    document = small_data.splits["train"].documents - 1
    place = IndexedTokens.open(data / "train").offsets[document]
    with (data / "train.bin").open("r+b") as file:
        file.seek(int(place))
        file.write(np.uint16(300).tobytes())
    message = rf"train split of {data} has token id 300 in document {document}, but vocab_size=300"
    with pytest.raises(UserError, match=message):
        for number in range(len(module._train_ds)):
            module._train_ds[number]


UNSEEN = """
import sys
from nemo_megacpp import cli
from nemo_megacpp.preflight import settled
settled.verify_sample = lambda sources: "as if the damage lay outside of the sample"
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("tp", [1, 2])
def test_damage_that_the_sample_missed_ends_the_run(
    small_data: PreparedData, tmp_path: Path, tp: int
) -> None:
    """With TP=2 Megatron embeds such an id as zeros; with TP=1 it raises an IndexError."""
    data = Path(shutil.copytree(small_data.root, tmp_path / "data"))
    tokens = np.fromfile(data / "train.bin", np.uint16)
    tokens[len(tokens) // 2 :] = 40000
    tokens.tofile(data / "train.bin")
    settings = (f"data={data}", "seq_length=128", "max_steps=8", "limit_val_batches=1", f"tp={tp}")
    words = [sys.executable, "-c", UNSEEN, "train", "nam56r_tiny", *settings, "run_dir=run"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    message = f"The train split of {data} has token id 40000 in document "
    assert done.stderr.count(message) == 1 and "vocab_size=300" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
