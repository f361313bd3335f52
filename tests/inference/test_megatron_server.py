"""Megatron's text generation server around its static engine, with our model."""

from __future__ import annotations

import json
import threading
import urllib.request
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from nemo_megacpp.inference.completions import Prompt, complete
from nemo_megacpp.inference.sampling import GREEDY
from nemo_megacpp.inference.slot_batch import SlotBatch
from nemo_megacpp.runtime.workers import WorkerPool
from tests.generation import CASES, random_model
from tests.inference.megatron_engine import LENGTH, NEW, PROMPTS, VOCAB, static_engine, text_of

ASKED = {
    "prompts": [text_of(prompt) for prompt in PROMPTS],
    "tokens_to_generate": NEW,
    "top_k": 1,
    "no_log": True,
}
"""A request to ``/api``."""


def _ours(model: Any) -> list[list[int]]:
    batch = SlotBatch(model, len(PROMPTS), LENGTH, VOCAB)
    asked = [Prompt(tuple(prompt), NEW, GREEDY) for prompt in PROMPTS]
    done, _ = complete(batch, asked, text_of, None)
    return [[*prompt, *one.tokens] for prompt, one in zip(PROMPTS, done, strict=True)]


def _handled(layout: str) -> None:
    """Call what a request calls, on the first rank, and what the others do meanwhile."""
    from megatron.core.inference.text_generation_server.run_mcore_engine import run_mcore_engine

    model = random_model(CASES["AEMR"], layout)
    answer = partial(run_mcore_engine, static_engine(model))
    first = torch.distributed.get_rank() == 0
    found = answer(ASKED["prompts"], 1.0, 1, 0.0, False, NEW) if first else answer()
    wanted = _ours(model)
    if first:
        assert found["tokens"] == wanted
        assert found["text"] == [text_of(tokens) for tokens in wanted]


def test_what_a_request_calls_gives_our_tokens(ranks: WorkerPool) -> None:
    ranks.run(2, _handled, "tp=2,sp=false")


def _over_http() -> None:
    from megatron.core.inference.text_generation_server import MegatronServer
    from werkzeug.serving import make_server

    model = random_model(CASES["AEMR"])
    app = MegatronServer(static_engine(model)).app
    # In this thread: torch's stand-ins for a GPU belong to it.
    listening = make_server("127.0.0.1", 0, app, threaded=False)
    url, answers = f"http://127.0.0.1:{listening.port}/api", []
    request = urllib.request.Request(
        url, json.dumps(ASKED).encode(), {"Content-Type": "application/json"}, method="PUT"
    )

    def ask() -> None:
        with urllib.request.urlopen(request, timeout=120) as answer:
            answers.append(json.load(answer))

    client = threading.Thread(target=ask)
    client.start()
    listening.handle_request()
    client.join()
    listening.server_close()
    assert answers[0]["tokens"] == _ours(model)


@pytest.mark.skipif(find_spec("flask_restful") is None, reason="the server needs flask-restful")
def test_the_server_answers_a_request_with_our_tokens(ranks: WorkerPool) -> None:
    ranks.run(1, _over_http)
