"""Files that run code, or take all memory or time, where they are loaded without care."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nemo_megacpp.checkpoint.manifest import FILE as MANIFEST
from tests.checkpoint import malice
from tests.faults import results
from tests.faults.doors import CHECKPOINT, DATA, EXPORT
from tests.faults.judge import Outcome, judge
from tests.faults.kinds import Kind, Site
from tests.faults.workplace import reseal

_STRICT = [door for door in CHECKPOINT if "inspect" not in door.name and "export" not in door.name]
"""Doors that load pickles other than ``.metadata``; the others need not refuse the rest."""


def _payload(site: Site) -> malice.Payload:
    return malice.Payload(site.place.canary / "ran")


def _pickle(draw: random.Random, site: Site) -> Outcome:
    """The manifest matches the hostile bytes: whoever planted them wrote it as well."""
    copy = Path(shutil.copytree(site.place.checkpoint(), site.folder / "input"))
    name = draw.choice(sorted(malice.PLACES))
    (copy / MANIFEST).unlink()
    malice.PLACES[name](copy / "weights", _payload(site))
    how = draw.choice(("own manifest", "no manifest", "no identity"))
    if how == "no identity":
        (copy / "nemo_megacpp.json").unlink()
    elif how == "own manifest":
        how = reseal(copy)
    doors = CHECKPOINT if name != "metadata" else _STRICT
    door = draw.choice(doors)
    what = f"a pickle that calls os.mkdir in {name}, {how}"
    return site.meet(door, copy, what, None, refuse=door in _STRICT)


def _cached_index(draw: random.Random, site: Site) -> Outcome:
    """Megatron loads a cached index with ``allow_pickle``."""
    copy = Path(shutil.copytree(site.place.data.root, site.folder / "input"))
    cache = copy / draw.choice(("cache/GPTDataset_indices", "cache", "GPTDataset_indices"))
    cache.mkdir(parents=True, exist_ok=True)
    hostile = np.array([_payload(site)], dtype=object)
    for number in range(3):
        np.save(cache / f"{draw.randbytes(16).hex()}-{number}.npy", hostile, allow_pickle=True)
    sealed = reseal(copy) if draw.random() < 0.5 else "the old checksums"
    door = draw.choice(DATA)
    return site.meet(
        door, copy, f"{sealed}, pickles in {cache.relative_to(copy)}", site.place.data.root
    )


def _tokenizer(draw: random.Random, site: Site) -> Outcome:
    copy, how = _hostile_tokenizer(draw, site)
    return site.meet(draw.choice(DATA), copy, f"tokenizer: {how}", None)


def _tokenizer_in_nemo(draw: random.Random, site: Site) -> Outcome:
    """The ranks load it through transformers, whose classes can be told to import code."""
    copy, how = _hostile_tokenizer(draw, site)
    place = site.place
    ended = place.nemo_forks.run(
        None, cwd=site.folder, then=results.of_data_module, given=(str(copy),)
    )
    return judge(ended, place, f"tokenizer: {how}; the data module")


def _hostile_tokenizer(draw: random.Random, site: Site) -> tuple[Path, str]:
    copy = Path(shutil.copytree(site.place.data.root, site.folder / "input"))
    folder = copy / "tokenizer"
    kinds = ("auto_map", "class", "template", "pattern", "depth", "module")
    how = draw.choice(kinds)
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    code = f"import os; os.mkdir({str(site.place.canary / 'ran')!r})\n"
    if how == "auto_map":
        (folder / "planted.py").write_text(f"{code}class Planted: pass\n")
        config["auto_map"] = {"AutoTokenizer": ["planted.Planted", "planted.Planted"]}
    elif how == "module":
        (folder / "tokenizers.py").write_text(code)
        (folder / "__init__.py").write_text(code)
    elif how == "class":
        config["tokenizer_class"] = draw.choice(("../planted", "os.system", "x" * 100_000, 7))
    elif how == "template":
        config["chat_template"] = "{{ ''.__class__.__mro__[1].__subclasses__() }}" * 10
    elif how == "depth":
        config["nested"] = eval("[" * 60 + "]" * 60)
        (folder / "special_tokens_map.json").write_text("[" * 100_000)
    else:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": draw.choice((r"(a+)+$", r"(?:(?:\w+\s?)+)+!", "(" * 3000, "[[["))},
            "behavior": "Isolated",
            "invert": False,
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if draw.random() < 0.7:
        how += f", {reseal(copy)}"
    return copy, how


def _special_file(draw: random.Random, site: Site) -> Outcome:
    """A named pipe, a link or a folder in the place of a file."""
    place = site.place
    intact, doors = draw.choice(
        (
            (place.checkpoint(), CHECKPOINT),
            (place.exported, EXPORT),
            (place.data.root, DATA),
        )
    )
    copy = Path(shutil.copytree(intact, site.folder / "input"))
    path = draw.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
    how = draw.choice(("pipe", "folder", "link to itself", "link to /dev/zero", "unreadable"))
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "link to itself":
        path.symlink_to(path.name)
    elif how == "link to /dev/zero":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to("/proc/self/mem")
    what = f"{path.relative_to(copy)} is a {how}"
    door = draw.choice(doors)
    ended = door.open(place, copy, site.folder)
    return judge(ended, place, f"{what}; {door.name}")


def _archive(draw: random.Random, site: Site) -> Outcome:
    """A ``common.pt`` that is a zip bomb, or a pickle that expands."""
    copy = Path(shutil.copytree(site.place.checkpoint(), site.folder / "input"))
    path = copy / "weights" / "common.pt"
    how = draw.choice(("zip of zeros", "shared references", "deep", "long integer", "opcodes"))
    if how == "zip of zeros":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(200 << 20))
            archive.writestr("archive/version", "3")
    else:
        held: Any = ["x"]
        if how == "shared references":
            for _ in range(40):
                held = [held, held]
        elif how == "deep":
            for _ in range(400):
                held = [held]
        elif how == "long integer":
            held = 1 << 4_000_000
        content = malice.torch_bytes(held)
        if how == "opcodes":
            content = pickle.PROTO + b"\x02" + b"(" * 3_000_000 + b"."
        path.write_bytes(content)
    reseal(copy)
    return site.meet(draw.choice(_STRICT), copy, f"common.pt: {how}", None)


def _family(draw: random.Random, site: Site) -> Outcome:
    """A family module is code: a recipe that names one says so first, all else never imports it."""
    place, module = site.place, site.folder / "family.py"
    mark = "the module runs"
    module.write_text(
        f"import os, sys\nos.mkdir({str(place.canary / 'ran')!r})\n"
        f"for stream in (sys.stdout, sys.stderr): print({mark!r}, file=stream, flush=True)\n"
    )
    where = draw.choice(("checkpoint", "export", "recipe"))
    if where == "recipe":
        recipe = {**place.recipe.to_mapping(), "family_modules": [str(module)]}
        file = site.folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        command = draw.choice((["train", file, "--dry-run"], ["plan", file]))
        ended = place.forks.run(command, cwd=site.folder)
        ran = place.ran()
        outcome = judge(ended, place, f"a recipe that names a family module; {command[0]}")
        told = any(str(module) in text.partition(mark)[0] for text in (ended.out, ended.err))
        if ran and not told:
            outcome.wrong.append("the module ran before it was named")
        return outcome
    intact, file, doors = (
        (place.checkpoint(), "nemo_megacpp.json", CHECKPOINT)
        if where == "checkpoint"
        else (place.exported, "config.json", EXPORT)
    )
    copy = Path(shutil.copytree(intact, site.folder / "input"))
    held = json.loads((copy / file).read_text())
    (held if where == "checkpoint" else held["identity"])["model"]["family_modules"] = [str(module)]
    (copy / file).write_text(json.dumps(held))
    reseal(copy)
    return site.meet(draw.choice(doors), copy, f"{where} that names a family module", None)


KINDS = (
    Kind("pickle", "a checkpoint with a pickle that calls a function", _pickle),
    Kind("archive", "a common.pt that expands without end", _archive),
    Kind("cached-index", "pickles in the place of Megatron's index of data", _cached_index),
    Kind("tokenizer", "a tokenizer's folder with code, patterns, classes or depth", _tokenizer),
    Kind("tokenizer-nemo", "the same where a rank loads it", _tokenizer_in_nemo, heavy=True),
    Kind("family", "a module of code named by a checkpoint, an export, a recipe", _family),
    Kind("special-file", "a pipe, link, device or folder in the place of a file", _special_file),
)
