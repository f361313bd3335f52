"""Choosing the next token of a sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nemo_megacpp.errors import UserError, raise_violations

_LARGEST_SEED = 2**63


@dataclass(frozen=True)
class Sampling:
    """How the next token of one sequence is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: choose among this many of the most probable tokens; None: among all.
        top_p: choose among the most probable tokens that together have at least this probability,
            after ``top_k``; 1: among all.
        seed: of the sequence. Its tokens depend on nothing else in the batch.

    Raises:
        UserError: a value is illegal.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        messages = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            messages.append(
                f"temperature={self.temperature} must be at least 0; 0 is the most probable token."
            )
        if self.top_k is not None and self.top_k < 1:
            messages.append(f"top_k={self.top_k} must be at least 1.")
        if not 0 < self.top_p <= 1:
            messages.append(f"top_p={self.top_p} must be above 0, at most 1.")
        if not 0 <= self.seed < _LARGEST_SEED:
            messages.append(f"seed={self.seed} must be from 0 to 2^63 - 1.")
        raise_violations(messages)


GREEDY = Sampling(temperature=0.0)


class Sampler:
    """Chooses the tokens of one sequence, with random numbers of its own.

    Args:
        sampling: how.
    """

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token.

        Args:
            logits: ``[v]``, in any dtype.

        Raises:
            UserError: a logit is NaN, or none is finite.
        """
        logits = logits.detach().to("cpu", torch.float64)
        if logits.isnan().any() or not logits.isfinite().any():
            raise UserError(
                f"The model's logits are NaN or Inf ({int((~logits.isfinite()).sum()):,} of "
                f"{len(logits):,}), so no token can be chosen: the checkpoint's weights are not "
                f"finite, or the numbers overflow in this dtype (--precision fp32)."
            )
        how = self.sampling
        if how.temperature == 0:
            return int(logits.argmax())
        # Sorted, so that a draw depends on the probabilities alone; equal ones by their ids.
        ordered, ids = logits.sort(descending=True, stable=True)
        ordered, ids = ordered[: how.top_k], ids[: how.top_k]
        summed = torch.softmax(ordered / how.temperature, dim=0).cumsum(0)
        kept = 1 + int((summed[:-1] < how.top_p).sum())
        drawn = torch.rand((), dtype=torch.float64, generator=self._generator) * summed[kept - 1]
        place = int((summed[:kept] <= drawn).sum())
        return int(ids[min(place, kept - 1)])
