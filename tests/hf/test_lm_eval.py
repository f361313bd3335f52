"""lm-evaluation-harness runs on an export: a task made here, nothing is downloaded.

Its packages are in a folder of their own (``make lm-eval``), behind all others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_megacpp.data.tokenizer import save_tokenizer, train_tokenizer
from nemo_megacpp.hf.export import export_hf
from nemo_megacpp.hf.tokenizer import Choice
from nemo_megacpp.runtime.workers import WorkerPool
from tests.hf.models import save_with_logits, spec

FOLDER = Path(sys.prefix) / "lm-eval"
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.processes]

DOCUMENTS = [
    {"question": "some words and", "choices": [" more words", " none"], "answer": 0},
    {"question": "more", "choices": [" words and words", " and"], "answer": 1},
    {"question": "words words words", "choices": [" and", " some"], "answer": 0},
]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""
RUN = """
import json, sys
sys.path.append(sys.argv[1])
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model = HFLM(pretrained=sys.argv[2], trust_remote_code=True, device="cpu", dtype="float32",
             batch_size=4)
tasks = TaskManager(include_path=sys.argv[3], include_defaults=False)
found = simple_evaluate(model, tasks=["tiny"], task_manager=tasks, log_samples=True)
samples = [[float(r[0][0]) for r in each["resps"]] for each in found["samples"]["tiny"]]
print(json.dumps({"results": found["results"]["tiny"], "likelihoods": samples}, default=str))
"""


def test_a_task(ranks: WorkerPool, tmp_path: Path) -> None:
    """Its likelihoods are the sums of the model's own log-probabilities."""
    if not FOLDER.exists():
        pytest.skip("lm-evaluation-harness is not installed: make lm-eval")
    texts = [each["question"] + choice for each in DOCUMENTS for choice in each["choices"]]
    save_tokenizer(train_tokenizer(texts, 270), tmp_path / "tokenizer")
    one = spec("AEMRF", vocab_size=270)
    ranks.run(1, save_with_logits, [str(tmp_path / "run" / "step=3")], [one])
    out = tmp_path / "out"
    choice = Choice(tmp_path / "tokenizer")
    export_hf(tmp_path / "run" / "step=3", out, dtype="float32", tokenizer=choice)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (tasks / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    told = _run(str(FOLDER), str(out), str(tasks))
    wanted = [[_likelihood(out, d["question"], c) for c in d["choices"]] for d in DOCUMENTS]
    torch.testing.assert_close(
        torch.tensor(told["likelihoods"]), torch.tensor(wanted), rtol=1e-5, atol=1e-5
    )
    right = [row.index(max(row)) == d["answer"] for row, d in zip(wanted, DOCUMENTS, strict=True)]
    assert told["results"]["acc,none"] == pytest.approx(sum(right) / len(right))


def _run(*words: str) -> dict[str, Any]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    env["HF_HOME"] = str(Path(words[2]).parent / "hf")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@torch.no_grad()
def _likelihood(folder: Path, question: str, choice: str) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, whole = (tokenizer(text)["input_ids"] for text in (question, question + choice))
    scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    places = range(len(before), len(whole))
    return float(sum(scores[place - 1, whole[place]] for place in places))
