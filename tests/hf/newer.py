"""Models in another environment: ``python -m tests.hf.newer FOLDER LOGITS …``.

Loads every folder, and prints as JSON how far its logits are from those in the file, and how far
those of steps are from those of one pass, all in float64.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.hf.float64 import Float64

PROMPT = 9


@torch.no_grad()
def compare(folder: str, logits: str) -> dict[str, Any]:
    """Return the differences, and whether greedy generation gives the tokens of one pass."""
    held = json.loads((Path(folder) / "config.json").read_text())
    native = held["model_type"] == "nemotron_h"
    # Its default form of the experts has no float64.
    how = {"experts_implementation": "eager"} if native else {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **how).eval()
    tokens, wanted = torch.load(logits)
    with Float64():
        found = model(tokens).logits
        steps = 0.0 if native else _steps(model, tokens, found)
        made = model.generate(tokens[:1, :PROMPT], max_new_tokens=6, do_sample=False)
        again = model(made).logits[0, PROMPT - 1 : -1, : int(tokens.max()) + 1]
    suppressed = set(model.generation_config.suppress_tokens or ())
    return {
        "class": type(model).__name__,
        "logits": float((found - wanted).abs().max()),
        "steps": steps,
        "generates": bool((again.argmax(-1) == made[0, PROMPT:]).all())
        and not suppressed & set(made[0, PROMPT:].tolist()),
    }


def _steps(model: Any, tokens: torch.Tensor, wanted: torch.Tensor) -> float:
    cache, done, most = None, 0, 0.0
    for size in (PROMPT, 1, 1, 3):
        output = model(tokens[:, done : done + size], past_key_values=cache, use_cache=True)
        part = wanted[:, done : done + size]
        most = max(most, float((output.logits - part).abs().max()))
        cache, done = output.past_key_values, done + size
    return most


if __name__ == "__main__":
    words = sys.argv[1:]
    found = [compare(*pair) for pair in zip(words[::2], words[1::2], strict=True)]
    print(json.dumps({"transformers": transformers.__version__, "found": found}))
