"""Which tokens can be chosen, how often, and what is refused."""

from __future__ import annotations

import pytest
import torch

from nemo_megacpp.errors import UserError
from nemo_megacpp.inference.sampling import GREEDY, Sampler, Sampling

LOGITS = torch.log(torch.tensor([0.05, 0.4, 0.25, 0.1, 0.2]))


def _counts(sampling: Sampling, logits: torch.Tensor = LOGITS, draws: int = 4000) -> torch.Tensor:
    sampler = Sampler(sampling)
    found = torch.tensor([sampler.choose(logits) for _ in range(draws)])
    return torch.bincount(found, minlength=len(logits)) / draws


def test_greedy_takes_the_most_probable() -> None:
    assert Sampler(GREEDY).choose(LOGITS) == 1
    assert Sampler(Sampling(top_k=1)).choose(LOGITS) == 1


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(), [0.05, 0.4, 0.25, 0.1, 0.2]),
        (Sampling(top_k=2), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
        # 0.4 + 0.25 is below 0.8, and the token that reaches it belongs to the nucleus.
        (Sampling(top_p=0.8), [0, 0.4 / 0.85, 0.25 / 0.85, 0, 0.2 / 0.85]),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        # Of the first three alone, 0.4 / 0.85 and 0.25 / 0.85 reach 0.7.
        (Sampling(top_k=3, top_p=0.7), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_their_probability(sampling: Sampling, shares: list[float]) -> None:
    # Four standard deviations of 4,000 draws are at most 0.032.
    wanted = torch.tensor(shares, dtype=torch.float32)
    torch.testing.assert_close(_counts(sampling), wanted, rtol=0, atol=0.032)


def test_temperature_sharpens() -> None:
    sharp = torch.softmax(LOGITS / 0.5, 0)
    torch.testing.assert_close(_counts(Sampling(temperature=0.5)), sharp, rtol=0, atol=0.032)


def test_a_seed_gives_the_same_tokens_again() -> None:
    draws = [[sampler.choose(LOGITS) for _ in range(50)] for sampler in map(_seeded, (3, 3, 4))]
    assert draws[0] == draws[1] != draws[2]


def _seeded(seed: int) -> Sampler:
    return Sampler(Sampling(seed=seed))


@pytest.mark.parametrize("bad", [[0.0, torch.nan], [-torch.inf, -torch.inf]])
def test_logits_that_are_not_finite_are_refused(bad: list[float]) -> None:
    with pytest.raises(UserError, match="NaN or Inf"):
        Sampler(GREEDY).choose(torch.tensor(bad))


def test_every_illegal_value_is_named() -> None:
    with pytest.raises(UserError) as error:
        Sampling(temperature=-1, top_k=0, top_p=1.5, seed=-1)
    for name in ("temperature=-1", "top_k=0", "top_p=1.5", "seed=-1"):
        assert name in str(error.value)
