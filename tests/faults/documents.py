"""Metadata that is well-formed and wrong: types, keys, depth, sizes, numbers, references.

Most tries change one thing of a real file (:mod:`tests.malformed`); in some hypothesis draws the
whole document.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from nemo_megacpp.checkpoint.export import CONFIG, INDEX
from nemo_megacpp.checkpoint.identity import FILE as IDENTITY
from nemo_megacpp.checkpoint.manifest import FILE as MANIFEST
from tests import malformed
from tests.faults.doors import CHECKPOINT, DATA, EXPORT, Door
from tests.faults.judge import Outcome, judge
from tests.faults.kinds import Kind, Site
from tests.faults.workplace import reseal

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)
"""Any value of JSON."""


def draw_example(strategy: st.SearchStrategy[Any], seed: int) -> Any:
    """Return an example of a strategy that depends on nothing but ``seed``."""
    found = []

    @seeded(seed)
    @settings(
        max_examples=5,  # the first ones are the simplest
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def keep(value: Any) -> None:
        found.append(value)

    keep()
    return found[-1]


def _document(draw: random.Random, content: bytes) -> bytes:
    """Return a JSON document with the keys of ``content`` and other values, or with other keys."""
    held = json.loads(content)
    keys = {name: st.just(value) | VALUES for name, value in held.items()}
    strategy = st.fixed_dictionaries(keys) | st.fixed_dictionaries({}, optional=keys) | VALUES
    return json.dumps(draw_example(strategy, draw.randrange(1 << 32))).encode()


def _json(draw: random.Random, content: bytes) -> bytes:
    return draw.choice((malformed.mutate_json, malformed.mutate_json, _document))(draw, content)


def _pickle(draw: random.Random, content: bytes) -> bytes:
    if draw.random() < 0.3:
        return draw.choice(list(malformed.hostile_pickles()))[1]
    return malformed.mutate_pickle(draw, content)


def _torch_file(draw: random.Random, content: bytes) -> bytes:
    if draw.random() < 0.3:
        return draw.choice(list(malformed.hostile_torch_files()))[1]
    return malformed.mutate_torch_file(draw, content)


_Change = Callable[[random.Random, bytes], bytes]
_TARGETS: dict[str, tuple[str, _Change, tuple[Door, ...]]] = {
    "identity": (IDENTITY, _json, CHECKPOINT),
    "manifest": (MANIFEST, malformed.mutate_manifest, CHECKPOINT),
    "metadata": ("weights/.metadata", _pickle, CHECKPOINT),
    "common": ("weights/common.pt", _torch_file, CHECKPOINT),
    "config": (CONFIG, _json, EXPORT),
    "index": (INDEX, _json, EXPORT),
    "data": ("data.json", _json, DATA),
    "tokenizer": ("tokenizer/tokenizer.json", _json, DATA),
    "tokenizer config": ("tokenizer/tokenizer_config.json", _json, DATA),
}


def _attempt(draw: random.Random, site: Site) -> Outcome:
    """In most tries the checksums match the changed file."""
    name = draw.choice((*sorted(_TARGETS), "tracker"))
    if name == "tracker":
        return _tracker(draw, site)
    file, change, doors = _TARGETS[name]
    place = site.place
    source = {CHECKPOINT: place.checkpoint(), EXPORT: place.exported}.get(doors, place.data.root)
    copy = Path(shutil.copytree(source, site.folder / "input"))
    (copy / file).write_bytes(change(draw, (copy / file).read_bytes()))
    sealed = "the old checksums"
    if file != MANIFEST and draw.random() < 0.8:
        sealed = reseal(copy)
    return site.meet(draw.choice(doors), copy, f"{name} is malformed, {sealed}", None)


def _tracker(draw: random.Random, site: Site) -> Outcome:
    """The file with which Megatron's script names the newest iteration."""
    place, folder = site.place, site.folder / "megatron"
    shutil.copytree(place.checkpoint(), folder / "iter_0000004")
    texts = ("", "-1", "4\n4", "release", "9" * 5000, "../4", "\x1b[2J4", "４", "0x4", "4" + "\0")
    text = draw.choice((*texts, draw_example(st.text(), draw.randrange(1 << 32))))
    (folder / "latest_checkpointed_iteration.txt").write_text(text, errors="replace")
    door = draw.choice(CHECKPOINT)
    ended = door.open(place, folder, site.folder)
    return judge(ended, place, f"a tracker of {text[:40]!r}; {door.name}")


KINDS = (
    Kind("metadata", "JSON, pickles and tokenizers of wrong types, keys, depth, sizes", _attempt),
)
