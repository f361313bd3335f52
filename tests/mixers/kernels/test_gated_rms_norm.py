from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels.gated_rms_norm import RMSNormGated, gated_rms_norm


def reference(x, weight, z=None, *, eps=1e-5, group_size=None, norm_before_gate=True):
    size = group_size or x.shape[-1]
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    parts = [F.rms_norm(part, (size,), eps=eps) for part in x.split(size, dim=-1)]
    y = torch.cat(parts, dim=-1) * weight
    return y * F.silu(z) if z is not None and norm_before_gate else y


@pytest.mark.parametrize("group_size", [None, 3, 12])
@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_matches_reference(hold_to, group_size, norm_before_gate, gated):
    torch.manual_seed(0)
    tensors = {name: torch.randn(5, 2, 12).double() for name in ("x", "z")}
    tensors["weight"] = torch.randn(12).double()
    if not gated:
        del tensors["z"]
    options = {"eps": 1e-3, "group_size": group_size, "norm_before_gate": norm_before_gate}
    hold_to(reference, gated_rms_norm, tensors, 1e-12, options)


def test_module_has_upstreams_state_dict_and_arguments():
    norm = RMSNormGated(
        8, eps=1e-2, group_size=4, norm_before_gate=False, device="cpu", dtype=torch.bfloat16
    )
    assert list(norm.state_dict()) == ["weight"] and norm.bias is None
    assert torch.equal(norm.weight, torch.ones(8, dtype=torch.bfloat16))
    x, z = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    expected = reference(x, norm.weight, z, eps=1e-2, group_size=4, norm_before_gate=False)
    torch.testing.assert_close(norm(x, z), expected, rtol=1e-5, atol=1e-6)
    y = norm(x.bfloat16())
    assert y.dtype == torch.bfloat16


def test_a_slice_of_groups_is_bit_identical():
    torch.manual_seed(0)
    x, z, weight = torch.randn(7, 64), torch.randn(7, 64), torch.randn(64)
    whole = gated_rms_norm(x, weight, z, group_size=16)
    part = gated_rms_norm(x[:, 32:], weight[32:], z[:, 32:], group_size=16)
    assert torch.equal(whole[:, 32:], part)


def test_refuses_groups_that_do_not_divide():
    with pytest.raises(UserError, match=r"group_size \(5\).*hidden_size \(12\)"):
        RMSNormGated(12, group_size=5)
    with pytest.raises(UserError, match="group_size"):
        gated_rms_norm(torch.randn(2, 12), torch.ones(12), group_size=5)
