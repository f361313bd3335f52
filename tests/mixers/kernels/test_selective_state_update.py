"""One token of Mamba-2's scan against the scan of a row, and its slots."""

from __future__ import annotations

import torch

from nemo_megacpp.mixers.kernels.selective_state_update import selective_state_update
from nemo_megacpp.mixers.kernels.ssd import ssd_chunked


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_GENERATOR)


_GENERATOR = torch.Generator().manual_seed(1)


def test_a_token_is_a_row_of_one() -> None:
    b, h, p, g, n = 3, 6, 5, 2, 4
    x, z, dt = _random(b, h, p), _random(b, h, p), _random(b, h)
    A, D, dt_bias = -_random(h).exp(), _random(h), _random(h)
    B, C, state = _random(b, g, n), _random(b, g, n), _random(b, h, p, n)
    y, last = ssd_chunked(
        x[:, None],
        dt[:, None],
        A,
        B[:, None],
        C[:, None],
        chunk_size=8,
        D=D,
        z=z[:, None],
        dt_bias=dt_bias,
        dt_softplus=True,
        initial_states=state,
        return_final_states=True,
    )
    # The states lie in slots, in another order, with one between that no row has.
    slots = torch.tensor([3, 0, 1])
    memory = _random(4, h, p, n)
    memory[slots] = state
    unused = memory[2].clone()
    found = selective_state_update(
        memory,
        x,
        dt[..., None].expand(-1, -1, p),
        A[:, None, None].expand(-1, p, n),
        B,
        C,
        D[:, None].expand(-1, p),
        z=z,
        dt_bias=dt_bias[:, None].expand(-1, p),
        dt_softplus=True,
        state_batch_indices=slots,
    )
    torch.testing.assert_close(found, y[:, 0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(memory[slots], last, rtol=1e-13, atol=1e-13)
    assert torch.equal(memory[2], unused)
