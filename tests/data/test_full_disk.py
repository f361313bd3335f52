"""A disk that is full from any moment on: one message, nothing half-made, and a restart works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_megacpp.data.prepared import PreparedData

EVERY_MOMENT = """
import ctypes, sys
from functools import partial
from pathlib import Path
from nemo_megacpp.data import shards
from nemo_megacpp.data.adopt import adopt
from nemo_megacpp.data.checksums import verify
from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError

disk = ctypes.CDLL(sys.argv[1])
disk.counted.restype = ctypes.c_long
corpus, known, folder = map(Path, sys.argv[2:5])
step, out = int(sys.argv[5]), folder / "out"
shards.SHARD_BYTES = 300
options = {"held_out": 0.3, "progress": False, "overwrite": True}
tokenizer = known / "tokenizer"
ways = {
    "prepare": partial(prepare, [corpus], out, vocab_size=270, num_workers=1, **options),
    "adopt": partial(adopt, known / "train", out, tokenizer=tokenizer, **options),
}
for name, make in ways.items():
    for replaced in (False, True):
        moment, before = 0, {p: p.stat().st_mtime_ns for p in out.rglob("*")}
        while True:
            disk.fill(str(folder).encode(), ctypes.c_long(moment))
            try:
                make()
                count = disk.counted()
                disk.fill(b"", 0)
                break
            except UserError as error:
                disk.fill(b"", 0)
                assert str(error) == f"Cannot write '{out}': No space left on device.", error
            left = [path.name for path in folder.iterdir()]
            assert left == (["out"] if replaced else []), (moment, left)
            assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before, moment
            moment += step
        assert moment >= count > 20, (moment, count)
        verify(PreparedData.open(out))
        print(f"{name} {'over older data' if replaced else ''}: {moment} moments")
    import shutil
    shutil.rmtree(out)
"""


@pytest.mark.processes
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_at_every_moment(corpus: Path, prepared: PreparedData, tmp_path: Path, step: int) -> None:
    library, folder = tmp_path / "full_disk.so", tmp_path / "disk"
    source = Path(__file__).with_name("full_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    folder.mkdir()
    words = [sys.executable, "-c", EVERY_MOMENT, library, corpus, prepared.root, folder, str(step)]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("moments") == 4
    assert "Traceback" not in done.stderr
