"""NeMo's own load path, in a rank: nothing of a checkpoint runs, whatever the launcher saw."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import checkpoint as dcp

from tests.checkpoint.malice import Payload, in_common, in_metadata

_RANK = """
import sys
import torch
from nemo_megacpp.runtime.host import ensure_host
import nemo.collections.llm
from nemo_megacpp.errors import UserError
from nemo_megacpp.nemo.strategy import HybridStrategy

folder, store = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
strategy = HybridStrategy()
for place in ("metadata", "common"):
    try:
        strategy.load_checkpoint(f"{folder}/{place}/weights")
    except UserError as error:
        print(place, "refused:", error)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_a_rank_refuses_by_itself(tmp_path: Path) -> None:
    for name, put in (("metadata", in_metadata), ("common", in_common)):
        weights = tmp_path / name / "weights"
        dcp.save({"note": {"a": 1}}, checkpoint_id=str(weights), no_dist=True)
        put(weights, Payload(tmp_path / "RUN"))
    ended = subprocess.run(
        [sys.executable, "-c", _RANK, str(tmp_path), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = [line for line in ended.stdout.splitlines() if "refused:" in line]
    assert [line.split()[0] for line in lines] == ["metadata", "common"]
    assert all("would call posix.mkdir" in line for line in lines)
    assert not (tmp_path / "RUN").exists()
