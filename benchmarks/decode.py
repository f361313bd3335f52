"""Time one decode step after prompts of several lengths: flat for M and R, growing for A.

    python -m benchmarks.decode
    python -m benchmarks.decode --device cuda

Each form is four layers of one family, a batch of one, float32. The peer of the step after a long
prompt is the step after the shortest, taken in turn: the ratio is how much of its speed is left.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

import torch

from benchmarks.harness import Row, common_arguments, finish, paired, start
from benchmarks.stack import MIDDLE, SMALL
from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.core.inference import inference_mode
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.slot_context import SlotContext
from nemo_megacpp.runtime.distributed import start_model_parallel, start_process_group
from nemo_megacpp.specs.hybrid_model import build_hybrid_model

LAYERS = 4
FORMS = {
    "A": {"hybrid_pattern": "A" * LAYERS},
    "M": {"hybrid_pattern": "M" * LAYERS},
    "M, mamba3": {"hybrid_pattern": "M" * LAYERS, "mode": "mamba3"},
    "R": {"hybrid_pattern": "R" * LAYERS},
}
LENGTHS, QUICK = (64, 512, 2048, 8192), (8, 16)


class Step:
    """One token after a prompt, again and again at the same place.

    Args:
        model: of one family.
        length: of the prompt.
        vocab_size: of the model.
    """

    def __init__(self, model: Any, length: int, vocab_size: int):
        self._model, self._context = model, SlotContext(1, length + 1)
        self._device = next(model.parameters()).device
        self._token = torch.ones(1, 1, dtype=torch.long, device=self._device)
        prompt = torch.randint(vocab_size, (1, length), device=self._device)
        self._context.select([0], length)
        self._run(prompt)
        self._context.advance()
        self._context.select([0], 1)

    def _run(self, tokens: torch.Tensor) -> None:
        with torch.no_grad(), inference_mode():
            self._model(
                tokens, None, None, inference_context=self._context, runtime_gather_output=True
            )

    def __call__(self) -> None:
        self._run(self._token)


def main() -> int:
    """Measure, print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    common_arguments(parser)
    arguments = parser.parse_args()
    device = start(arguments)
    sizes, lengths = (SMALL, QUICK) if arguments.quick else (MIDDLE, LENGTHS)
    layout = ParallelLayout()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start_process_group(0, 1, f"file://{folder}/store")
        start_model_parallel(layout)
        for name, form in FORMS.items():
            fields = config_fields({**sizes, **form}, layout, torch.float32, device.type)
            model = build_hybrid_model(HybridConfig(**fields)).to(device).eval()
            steps = {length: Step(model, length, sizes["vocab_size"]) for length in lengths}
            for length in lengths[1:]:
                ours, peer = paired(
                    steps[length], steps[lengths[0]], repeats=arguments.repeats, device=device
                )
                rows.append(
                    Row(
                        f"decode, {name}, after {length:,} tokens",
                        ours,
                        peer,
                        peer_name=f"the step after {lengths[0]} tokens",
                        sizes=f"{LAYERS} layers, hidden {sizes['hidden_size']}, batch 1, float32",
                    )
                )
        torch.distributed.destroy_process_group()
    return finish(arguments, rows)


if __name__ == "__main__":
    sys.exit(main())
