"""Generation on ranks: load the weights, complete the prompts, stream the text."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemo_megacpp.checkpoint.weights import build_saved_model, load_weights
from nemo_megacpp.data.tokenizer import guard_library, load_tokenizer
from nemo_megacpp.errors import UserError
from nemo_megacpp.inference.completions import Completion, Emit, Times, complete
from nemo_megacpp.inference.request import Request
from nemo_megacpp.inference.slot_batch import SlotBatch
from nemo_megacpp.runtime.distributed import start_model_parallel, start_process_group
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool, device_for
from nemo_megacpp.specs.hybrid_model import HybridModel


@dataclass(frozen=True)
class Generated:
    """What came of a request.

    Attributes:
        completions: one for each prompt.
        times: of all of them.
        load_seconds: until the weights were there.
        state_bytes: of all slots, on the rank that has most.
    """

    completions: list[Completion]
    times: Times
    load_seconds: float
    state_bytes: int


def generate(request: Request, emit: Emit) -> Generated:
    """Complete the prompts of a request: in this process, or for several ranks in processes of
    their own, of which the first emits.

    Args:
        request: validated; the checkpoint's bytes were compared with its manifest.
        emit: can be pickled, where the layout has several ranks.

    Raises:
        UserError: what a rank refuses: weights that do not fit or are not finite.
    """
    world = request.layout.world
    if world == 1:
        with tempfile.TemporaryDirectory() as folder:
            start_process_group(0, 1, f"file://{Path(folder) / 'store'}")
            try:
                return generate_on_rank(request, emit)
            finally:
                torch.distributed.destroy_process_group()
    with WorkerPool(world, device=device_for(world)) as pool:
        try:
            found: list[Generated] = pool.run(world, generate_on_rank, request, emit)
        except WorkerError as error:
            if error.refusal is None:
                raise
            raise UserError(error.refusal) from None
    return replace(found[0], state_bytes=max(each.state_bytes for each in found))


def generate_on_rank(request: Request, emit: Emit) -> Generated:
    """Complete the prompts of a request as one rank of its layout, whose process group exists."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    begun = time.perf_counter()
    start_model_parallel(request.layout)
    dtype = getattr(torch, request.dtype)
    with warnings.catch_warnings():
        # Of TP with EP; it speaks of training.
        warnings.filterwarnings("ignore", ".*sequence parallelism must be used")
        _, (model,) = build_saved_model(request.model, request.layout, dtype)
    assert isinstance(model, HybridModel)
    load_weights([model], request.checkpoint, verify=False)
    tokenizer = load_tokenizer(request.tokenizer, tried=True)
    loaded = time.perf_counter() - begun
    batch = SlotBatch(model, request.slots, request.max_length, tokenizer.vocab_size)
    with guard_library(request.tokenizer):
        completions, times = complete(
            batch,
            request.prompts,
            lambda ids: tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False),
            tokenizer.eos_id,
            emit if torch.distributed.get_rank() == 0 else lambda index, text, ended: None,
        )
    return Generated(completions, times, loaded, batch.state_bytes)
