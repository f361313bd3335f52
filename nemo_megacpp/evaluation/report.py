"""An evaluation as numbers, tables and one JSON document."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_megacpp.data.tokenizer import load_tokenizer
from nemo_megacpp.errors import UserError
from nemo_megacpp.evaluation.heldout import Request, evaluate_on_rank
from nemo_megacpp.render import Table, Toned
from nemo_megacpp.runtime.workers import WorkerError

_BAR = 40
"""Characters of the longest bar of the curve."""


@dataclass(frozen=True)
class Evaluation:
    """The losses of a held-out split.

    Attributes:
        request: what was evaluated.
        loss: nats per token.
        bytes: of the text that was predicted; None where the tokenizer does not say.
        by_position: loss at each place of a row, in nats, float64 ``[s]``; NaN where there was
            no token.
        tokens_by_position: ``[s]``.
    """

    request: Request
    loss: float
    bytes: int | None
    by_position: np.ndarray
    tokens_by_position: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens that were predicted."""
        return int(self.tokens_by_position.sum())

    @property
    def bits_per_byte(self) -> float | None:
        """All bits over all bytes of text; the tokens that end documents cost bits too."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def buckets(self) -> list[tuple[int, int, int, float]]:
        """Return first and last place, tokens and loss: of place 0, 1, 2 to 3, 4 to 7, and so on,
        as far as there are tokens."""
        found, first = [], 0
        places = int(np.flatnonzero(self.tokens_by_position)[-1]) + 1
        while first < places:
            last = min(max(2 * first, 1), places)
            tokens = self.tokens_by_position[first:last]
            total = float((np.nan_to_num(self.by_position[first:last]) * tokens).sum())
            if tokens.sum():
                found.append((first, last - 1, int(tokens.sum()), total / float(tokens.sum())))
            first = last
        return found


def evaluate(request: Request, start: Callable[[int], AbstractContextManager[Any]]) -> Evaluation:
    """Evaluate a request on ranks.

    Args:
        request: validated.
        start: starts that many ranks, as :class:`nemo_megacpp.runtime.workers.WorkerPool` does.

    Raises:
        UserError: nothing to predict, a loss that is NaN or Inf, or what a rank refuses.
    """
    data = request.rows.data
    bytes_of = load_tokenizer(data.tokenizer_dir).bytes_of_tokens()
    text = None if bytes_of is None else request.rows.predicted_bytes(np.array(bytes_of))
    world = request.layout.world
    with start(world) as ranks:
        try:
            losses = ranks.run(world, evaluate_on_rank, request)[0]
        except WorkerError as error:
            if error.refusal is None:
                raise
            raise UserError(error.refusal) from None
    total, tokens, wrong = losses
    if not tokens.sum():
        raise UserError(f"The held-out split of {data.root} has no token to predict.")
    if wrong.any():
        raise UserError(
            f"The loss of {request.checkpoint} is NaN or Inf for {int(wrong.sum()):,} of "
            f"{int(tokens.sum()):,} tokens, first at place {int(wrong.nonzero()[0][0])} of a row: "
            f"its weights are damaged by training, or overflow in {request.dtype}."
        )
    with np.errstate(invalid="ignore"):
        by_position = total / tokens
    return Evaluation(request, float(total.sum() / tokens.sum()), text, by_position, tokens)


def evaluation_tables(found: Evaluation) -> list[Table]:
    """Return the numbers, and the loss by position as a curve."""
    bits = found.bits_per_byte
    numbers = Table(["<", ""])
    numbers.add("loss, nats per token", f"{found.loss:.6f}")
    numbers.add("perplexity", f"{_perplexity(found.loss):,.3f}")
    unknown = "unknown (not a byte-level tokenizer)"
    numbers.add("bits per byte", unknown if bits is None else f"{bits:.6f}")
    numbers.add("tokens predicted", f"{found.tokens:,}")
    numbers.add("bytes of their text", "unknown" if found.bytes is None else f"{found.bytes:,}")
    curve = Table(["tokens before", "tokens", "loss", "<"], "Loss by position in the row")
    buckets = found.buckets()
    most = max(loss for *_, loss in buckets)
    for first, last, tokens, loss in buckets:
        places = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        bar = "█" * max(1, round(_BAR * loss / most)) if most > 0 else ""
        curve.add(places, f"{tokens:,}", f"{loss:.4f}", Toned(bar, "good"))
    return [numbers, curve]


def evaluation_document(found: Evaluation) -> dict[str, Any]:
    """Return the JSON document of an evaluation."""
    request, places = found.request, found.tokens_by_position
    return {
        "checkpoint": str(request.checkpoint),
        "data": str(request.rows.data.root),
        "layout": request.layout.short(),
        "dtype": request.dtype,
        "seq_length": request.rows.seq_length,
        "packed_documents": request.rows.packed,
        "rows": len(request.rows),
        "tokens": found.tokens,
        "bytes": found.bytes,
        "loss": found.loss,
        "perplexity": _finite(_perplexity(found.loss)),
        "bits_per_byte": found.bits_per_byte,
        "tokens_by_position": [int(count) for count in places],
        "loss_by_position": [
            float(loss) if count else None
            for loss, count in zip(found.by_position, places, strict=True)
        ],
    }


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
