"""Time the M²RNN recurrence beside the eager loop that its authors' torch forms are.

    python -m benchmarks.m2rnn                 # a GPU where there is one, else the CPU
    python -m benchmarks.m2rnn --device cpu --length 512 --heads 8

First every form that runs here is held to the loop in float64, at an odd length, on packed
documents and in both clip orders; then all are timed in ``--dtype`` on the same numbers. Exit
status 1 if a form differs by more than ``--tolerance`` of the largest value of any output or
gradient. The loop indexes its inputs token by token, as the authors' do, which costs its backward
pass time that grows with the square of the length; beside it, a loop that does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import (
    Row,
    Sample,
    common_arguments,
    explain,
    finish,
    matmul_peak,
    paired,
    peak_bytes,
    start,
)
from nemo_megacpp.mixers.kernels.m2rnn_scan import m2rnn_scan
from nemo_megacpp.mixers.kernels.m2rnn_triton import m2rnn_triton, m2rnn_triton_reason
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype

Form = Callable[..., tuple[Tensor, Tensor]]
Inputs = dict[str, Tensor]
Work = Callable[[Form], Callable[[], object]]


def m2rnn_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    W: Tensor,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    state_gradient_clip: float | None = None,
    clip_order: str = "before_output",
    unbind: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence of :func:`m2rnn_scan`, token by token, with gradients by autograd.

    With ``unbind``, tokens are cut from the inputs at once: the gradient of an index is as large as
    the whole input, for every token.
    """
    acc = accumulation_dtype(v)
    batch, length, heads, value_dim = v.shape
    q_acc = (q if q.dim() == 4 else q[:, :, None]).to(acc)
    k_acc = (k if k.dim() == 4 else k[:, :, None]).to(acc)
    v_acc, f_acc, W_acc = v.to(acc), forget.to(acc), W.to(acc)
    state = v_acc.new_zeros(batch, heads, k.shape[-1], value_dim)
    if initial_state is not None:
        state = initial_state.to(acc)
    inputs = (q_acc, k_acc, v_acc, f_acc)
    cut = [x.unbind(1) for x in inputs] if unbind else None
    outputs = []
    for t in range(length):
        q_t, k_t, v_t, f_t = [x[t] for x in cut] if cut else [x[:, t] for x in inputs]
        if seq_idx is not None and t > 0:
            same = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(same[:, None, None, None], state, torch.zeros_like(state))
        drive = k_t[..., :, None] * v_t[..., None, :]
        candidate = torch.tanh(torch.einsum("bnku,nuv->bnkv", state, W_acc) + drive)
        f = f_t[..., None, None]
        state = f * state + (1 - f) * candidate
        if clip_order == "after_output":
            state = _clip_gradient(state, state_gradient_clip)
        outputs.append((state * q_t[..., None]).sum(dim=2))
        if clip_order == "before_output":
            state = _clip_gradient(state, state_gradient_clip)
    return torch.stack(outputs, dim=1).to(v.dtype), state


def _clip_gradient(x: Tensor, clip: float | None) -> Tensor:
    """Return ``x``; what flows back through the returned tensor is clamped to ``[-clip, clip]``."""
    if clip is None or not x.requires_grad:
        return x
    bound = clip
    x = x.view_as(x)
    x.register_hook(lambda grad: grad.clamp(-bound, bound))
    return x


def make_inputs(
    batch: int, length: int, heads: int, key_dim: int, value_dim: int, device: torch.device
) -> Inputs:
    """Return the arguments of a form in float64, W contracting as rounding would else grow."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device)

    eye = torch.eye(value_dim, dtype=torch.float64, device=device)
    return {
        "q": normal(batch, length, key_dim),
        "k": normal(batch, length, key_dim),
        "v": normal(batch, length, heads, value_dim),
        "forget": normal(batch, length, heads).sigmoid(),
        "W": 0.3 * (eye + 0.3 * normal(heads, value_dim, value_dim)),
        "initial_state": normal(batch, heads, key_dim, value_dim),
    }


def forms_on(
    device: torch.device, value_dim: int, dtype: torch.dtype
) -> tuple[dict[str, Form], list[tuple[str, str]]]:
    """Return the kernels that run here, and which do not and why."""
    forms: dict[str, Form] = {"torch": m2rnn_scan}
    reason = m2rnn_triton_reason(value_dim=value_dim, dtype=dtype, device=device)
    if reason is not None:
        return forms, [("m2rnn: the Triton kernel", f"it {reason}")]
    return {"triton": m2rnn_triton, **forms}, []


def with_gradients(form: Form, inputs: Inputs, weights: list[Tensor], **options: object) -> Inputs:
    """Return outputs and the gradients of all inputs of a loss with fixed random weights."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    outputs = form(**leaves, **options)
    loss = sum((out * w.to(out.dtype)).sum() for out, w in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = dict(zip(("y", "final state"), (out.detach() for out in outputs), strict=True))
    return named | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def check(forms: dict[str, Form], device: torch.device, key_dim: int, value_dim: int) -> dict:
    """Return, for every form, the largest relative difference and where it is, in float32."""
    length = 131
    exact = make_inputs(2, length, 3, key_dim, value_dim, device)
    weights = [torch.randn_like(exact["v"]), torch.randn_like(exact["initial_state"])]
    token = torch.arange(length, device=device)
    packs = torch.stack([(token >= 40).int() + (token >= 64).int(), (token >= 130).int()])
    cases: dict[str, dict[str, object]] = {
        "plain": {},
        "packs": {"seq_idx": packs},
        "clip before": {"state_gradient_clip": 0.3, "seq_idx": packs},
        "clip after": {"state_gradient_clip": 0.3, "clip_order": "after_output"},
    }
    single = {name: t.float() for name, t in exact.items()}
    # The reference takes the inputs as rounded to float32: no kernel causes that rounding.
    exact = {name: t.double() for name, t in single.items()}
    worst = dict.fromkeys(forms, (0.0, "nothing"))
    for case, options in cases.items():
        expected = with_gradients(m2rnn_naive, exact, weights, **options)
        for name, form in forms.items():
            found = with_gradients(form, single, weights, **options)
            for tensor, value in expected.items():
                error = (found[tensor].double() - value).abs().max() / value.abs().max()
                # NaN counts as the largest difference of all.
                size = float(torch.nan_to_num(error, nan=float("inf")))
                worst[name] = max(worst[name], (size, f"{tensor}, {case}"))
    return worst


def compare(
    name: str, form: Form, inputs: Inputs, arguments: argparse.Namespace, peak: float
) -> list[Row]:
    """Return a form's rows beside the eager loops: time, peak memory."""
    device, dtype = inputs["v"].device, arguments.dtype
    batch, length, heads, value_dim = inputs["v"].shape
    key_dim = inputs["q"].shape[-1]
    sizes = f"b={batch} l={length} n={heads} k={key_dim} v={value_dim} {dtype}, clip 1"
    # H W and the read-out; the outer product k vᵀ counts as one operation a number.
    operations = batch * length * heads * key_dim * value_dim * (2 * value_dim + 3)
    weights = [torch.randn_like(inputs["v"]), torch.randn_like(inputs["initial_state"])]

    def step(form: Form) -> Callable[[], object]:
        return partial(with_gradients, form, inputs, weights, state_gradient_clip=1.0)

    def forward(form: Form) -> Callable[[], object]:
        return torch.no_grad()(partial(form, **inputs, state_gradient_clip=1.0))

    def timed(what: str, work: Work, peer: Form, peer_name: str, passes: int, aim: int) -> Row:
        ours, theirs = paired(work(form), work(peer), repeats=arguments.repeats, device=device)
        row = Row(f"m2rnn, {name}: {what}", ours, theirs, peer_name, sizes, passes * operations)
        row.peak, row.aim_ratio = peak, aim or None
        row.aim = f"at least {aim}x" if aim else ""
        return explain(row, work(form), device, ("token", length))

    indexed, unbound = "eager loop, indexing", "eager loop, unbinding"
    memory = Row(
        f"m2rnn, {name}: peak memory",
        *(Sample([float(peak_bytes(step(f), device))], "B") for f in (form, m2rnn_naive)),
        indexed,
        sizes,
        aim="at most a tenth",
        aim_ratio=10.0,
    )
    rows = [
        timed("forward and backward", step, m2rnn_naive, indexed, 3, 10),
        timed("forward and backward", step, partial(m2rnn_naive, unbind=True), unbound, 3, 0),
        timed("forward", forward, m2rnn_naive, indexed, 1, 0),
        memory,
    ]
    if rows[0].met is False and device.type == "cpu":
        floor = paired(
            partial(least_operations, inputs),
            step(m2rnn_naive),
            repeats=arguments.repeats,
            device=device,
        )
        what = f"m2rnn, {name}: only the products and exponentials of forward and backward"
        rows.insert(1, Row(what, *floor, indexed, sizes))
    return rows


def least_operations(inputs: Inputs) -> None:
    """Run what no form of torch operations avoids that keeps few states: for every token one
    product and one ``expm1`` forward and again backward, the product that carries the gradient
    back, and that of W's gradient."""
    batch, length, _, value_dim = inputs["v"].shape
    W = inputs["W"].expand(batch, -1, -1, -1).reshape(-1, value_dim, value_dim)
    state = W.new_zeros(len(W), value_dim, inputs["k"].shape[-1])
    out, grad_W = torch.empty_like(state), torch.empty_like(W)
    for _ in range(length):
        for _ in range(2):
            torch.expm1(torch.bmm(W, state, out=out), out=out)
        torch.bmm(W, state, out=out)
        torch.bmm(state, state.transpose(1, 2), out=grad_W)


def main() -> int:
    """Check, time; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser)
    parser.set_defaults(repeats=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, help="2048, on a GPU 4096")
    parser.add_argument("--heads", type=int, help="of one rank: 44, on a GPU 28 (NAM56R at TP=8)")
    parser.add_argument("--key-dim", type=int, default=64)
    parser.add_argument("--value-dim", type=int, default=16)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="float32, on a GPU bfloat16"
    )
    parser.add_argument("--tolerance", type=float, default=1e-5)
    arguments = parser.parse_args()
    device = start(arguments)
    gpu = device.type == "cuda"
    length = arguments.length or (128 if arguments.quick else 4096 if gpu else 2048)
    heads = arguments.heads or (4 if arguments.quick else 28 if gpu else 44)
    arguments.dtype = arguments.dtype or ("bfloat16" if gpu else "float32")
    dtype = getattr(torch, arguments.dtype)

    forms, skipped = forms_on(device, arguments.value_dim, dtype)
    worst = check(forms, device, arguments.key_dim, arguments.value_dim)
    for name, (error, where) in worst.items():
        print(f"{name:<28}largest relative difference {error:.1e} ({where})")
    wrong = [name for name, (error, _) in worst.items() if error > arguments.tolerance]
    if wrong:
        print(f"More than {arguments.tolerance:g} from the reference: {', '.join(wrong)}.")
        return 1
    sizes = (arguments.batch, length, heads, arguments.key_dim, arguments.value_dim)
    inputs = {name: t.to(dtype) for name, t in make_inputs(*sizes, device).items()}
    peak = matmul_peak(device, dtype)
    rows = [
        row for name, form in forms.items() for row in compare(name, form, inputs, arguments, peak)
    ]
    return finish(arguments, rows, skipped)


if __name__ == "__main__":
    sys.exit(main())
