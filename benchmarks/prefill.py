"""Time prompts of different lengths that go through the model in one row, beside a pass of each.

    python -m benchmarks.prefill
    python -m benchmarks.prefill --device cuda

Each form is four layers, float32; the prompts of a set have lengths from an eighth of the longest
to the longest, so their mean is a little over half of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence

import torch

from benchmarks.harness import Row, common_arguments, finish, paired, start
from benchmarks.stack import MIDDLE, SMALL
from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.inference.slot_batch import SlotBatch
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.distributed import start_model_parallel, start_process_group
from nemo_megacpp.specs.hybrid_model import build_hybrid_model

FORMS = {
    "A": {"hybrid_pattern": "AAAA"},
    "M": {"hybrid_pattern": "MMMM"},
    "M, mamba3": {"hybrid_pattern": "MMMM", "mode": "mamba3"},
    "R": {"hybrid_pattern": "RRRR"},
    "AEMR": {"hybrid_pattern": "AEMR"},
}
PROMPTS = 8
LONGEST, QUICK = (16, 64, 256), (8,)


class Prefill:
    """Begins sequences and ends them again.

    Args:
        batch: with a slot for each.
        prompts: their tokens.
        together: in one pass, or in one of each.
    """

    def __init__(self, batch: SlotBatch, prompts: Sequence[list[int]], together: bool):
        self._batch, self._prompts, self._together = batch, prompts, together

    def __call__(self) -> None:
        if self._together:
            self._batch.add_all(self._prompts)
        else:
            for prompt in self._prompts:
                self._batch.add(prompt)
        for slot in self._batch.used:
            self._batch.remove(slot)


def main() -> int:
    """Measure, print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    common_arguments(parser)
    arguments = parser.parse_args()
    device = start(arguments)
    sizes, longest = (SMALL, QUICK) if arguments.quick else (MIDDLE, LONGEST)
    layout, rows = ParallelLayout(), []
    with tempfile.TemporaryDirectory() as folder:
        start_process_group(0, 1, f"file://{folder}/store")
        start_model_parallel(layout)
        for name, form in FORMS.items():
            fields = config_fields({**sizes, **form}, layout, torch.float32, device.type)
            model = build_hybrid_model(HybridConfig(**fields)).to(device)
            for most in longest:
                prompts = [[1] * (most * number // PROMPTS) for number in range(1, PROMPTS + 1)]
                batch = SlotBatch(model, PROMPTS, most, sizes["vocab_size"])
                ours, peer = paired(
                    Prefill(batch, prompts, together=True),
                    Prefill(batch, prompts, together=False),
                    repeats=arguments.repeats,
                    device=device,
                )
                rows.append(
                    Row(
                        f"prefill, {name}, {PROMPTS} prompts of {most // PROMPTS} to {most} tokens",
                        ours,
                        peer,
                        peer_name="a pass of each",
                        sizes=f"4 layers, hidden {sizes['hidden_size']}, float32",
                    )
                )
        torch.distributed.destroy_process_group()
    return finish(arguments, rows)


if __name__ == "__main__":
    sys.exit(main())
