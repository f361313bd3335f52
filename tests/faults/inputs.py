"""What users type or bring: recipe files, overrides, texts, records of runs."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests import malformed
from tests.faults.documents import VALUES, draw_example
from tests.faults.judge import Outcome, judge
from tests.faults.kinds import Kind, Site
from tests.faults.workplace import RECIPE, SETTINGS


def _settings(place: Any) -> dict[str, Any]:
    text = "\n".join(setting.replace("=", ": ", 1) for setting in SETTINGS)
    return {"recipe": RECIPE, **yaml.safe_load(text), "data": str(place.data.root)}


def _recipe(draw: random.Random, site: Site) -> Outcome:
    held, how = _settings(site.place), draw.choice(("hostile", "value", "bytes", "object"))
    text = yaml.safe_dump(held)
    what = how
    if how == "hostile":
        what, more = draw.choice(list(malformed.hostile_yaml()))
        text = more if draw.random() < 0.5 else f"{text}\n{more}"
    elif how == "value":
        name = draw.choice(sorted(held))
        held[name] = draw_example(VALUES, draw.randrange(1 << 32))
        text, what = yaml.safe_dump(held), f"{name} is {str(held[name])[:40]!r}"
    elif how == "object":
        canary = site.place.canary / "ran"
        tag = draw.choice(("object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir"))
        text += f"run_dir: !!python/{tag} ['{canary}']\n"
    content = text.encode()
    if how == "bytes":
        content = malformed.mutate_bytes(draw, content)
    file = site.folder / "recipe.yaml"
    file.write_bytes(content)
    command = draw.choice(
        (["train", file, "--dry-run"], ["plan", file], ["compare", file, RECIPE], ["layouts", file])
    )
    ended = site.place.forks.run(command, cwd=site.folder)
    return judge(ended, site.place, f"a recipe file ({what}); {command[0]}")


def _override(draw: random.Random, site: Site) -> Outcome:
    names = [setting.partition("=")[0] for setting in SETTINGS] + ["data", "run_dir", "resume"]
    texts = (
        *("[" * 5000, "{" * 5000, "9" * 5000, "1e999", "nan", "-1", "0", "999999999", "&a [*a]"),
        *(malformed.ESCAPES, "!!python/object/apply:os.system [id]", "x" * 100_000, "../../.."),
        *("~", "[]", "{}", "true", "2**64", "1_0", "0b1", "1:59:59", "\u202e"),
    )
    name = draw.choice((*names, malformed.ESCAPES, "x" * 5000, "recipe.model.hidden_size"))
    value = draw.choice((*texts, draw_example(st.text(min_size=1), draw.randrange(1 << 32))))
    given = f"{name}={value}".replace("\0", "")
    command = draw.choice((["train", RECIPE, given, "--dry-run"], ["plan", RECIPE, given]))
    ended = site.place.forks.run(command, cwd=site.folder)
    return judge(ended, site.place, f"{name[:40]!r}={value[:40]!r}; {command[0]}")


def _text(draw: random.Random, site: Site) -> Outcome:
    """Documents for ``data prepare``, among good ones."""
    source = Path(shutil.copytree(site.place.texts, site.folder / "source"))
    good = json.dumps({"text": "a good line"})
    lines = {
        "depth": '{"text": ' + "[" * 5000 + "]" * 5000 + "}",
        "digits": '{"text": "x", "n": ' + "9" * 5000 + "}",
        "escapes": json.dumps({malformed.ESCAPES: "x"}),
        "surrogate": '{"text": "\\ud800"}',
        "null": '{"text": null}',
        "list": "[1, 2]",
        "cut off": '{"text": "x',
        "not UTF-8": '{"text": "\udcff"}',
        "nul": '{"text": "\\u0000\\u0000"}',
        "value": json.dumps({"text": draw_example(VALUES, draw.randrange(1 << 32))}),
    }
    how = draw.choice((*lines, "pipe", "link", "gzip", "cut gzip", "name", "bytes"))
    if how == "pipe":
        os.mkfifo(source / "pipe.txt")
    elif how == "link":
        (source / "loop").symlink_to(source, target_is_directory=True)
        (source / "zero.txt").symlink_to("/dev/zero")
    elif how in ("gzip", "cut gzip"):
        content = gzip.compress(bytes(80 << 20))
        (source / "many.txt.gz").write_bytes(content if how == "gzip" else content[:-100])
    elif how == "name":
        (source / f"a{malformed.ESCAPES}.txt".replace("/", "")).write_text("named")
    elif how == "bytes":
        (source / "bytes.txt").write_bytes(draw.randbytes(draw.randint(1, 20_000)))
    else:
        content = "\n".join([good, lines[how], good]).encode("utf-8", "surrogateescape")
        (source / "lines.jsonl").write_bytes(content)
    lenient = draw.choice(([], ["--skip-bad"]))
    command = ["data", "prepare", source, "--out", site.folder / "out", "--vocab-size", 300]
    ended = site.place.forks.run(
        [*command, "--held-out", 0.3, "--max-document-bytes", 1 << 20, *lenient], cwd=site.folder
    )
    return judge(ended, site.place, f"text: {how}; data prepare {' '.join(lenient)}")


def _record(draw: random.Random, site: Site) -> Outcome:
    """A run's folder from elsewhere, for ``compare`` and ``report``."""
    run = site.folder / "foreign"
    record = run / "record"
    record.mkdir(parents=True)
    begun = {
        "kind": "started",
        "step": 0,
        "time": "2026-01-01T00:00:00.000+00:00",
        "details": {"layout": "TP=2", "ranks": 2, "startup_seconds": 20},
    }
    metrics = "".join(
        json.dumps(
            {"step": step, "loss": 6 - step / 10, "grad_norm": 1.5, "lr": 1e-3, "seconds": 0.5}
            | {"tokens_per_second": 100.0, "tflops_per_rank": 0.02, "mfu": None, "aux": {"z": 1.0}}
        )
        + "\n"
        for step in range(1, 9)
    )
    files = {
        "recipe.yaml": yaml.safe_dump(site.place.recipe.to_mapping()).encode(),
        "metrics.jsonl": metrics.encode(),
        "events.jsonl": json.dumps(begun).encode() + b"\n",
    }
    name = draw.choice(sorted(files))
    content = files[name]
    if name.endswith(".yaml") or draw.random() < 0.3:
        files[name] = malformed.mutate_bytes(draw, content)
    else:
        first, _, rest = content.partition(b"\n")
        files[name] = malformed.mutate_json(draw, first) + b"\n" + rest
    for file, held in files.items():
        (record / file).write_bytes(held)
    command = draw.choice((["report", run], ["compare", run, RECIPE], ["compare", run, run]))
    ended = site.place.forks.run(command, cwd=site.folder)
    outcome = judge(ended, site.place, f"a malformed {name} of a run; {command[0]}")
    page = record / "report.html"
    if page.exists() and ("\x1b" in (text := page.read_text()) or "<script>alert" in text):
        outcome.wrong.append("the page holds what the file put there")
    return outcome


KINDS = (
    Kind("recipe", "recipe files with bombs, objects, wrong values, changed bytes", _recipe),
    Kind("override", "settings on the command line with hostile names and values", _override),
    Kind("text", "JSONL, archives, pipes and names that data prepare cannot use", _text),
    Kind("record", "a foreign run's record for compare and report", _record),
)
