"""Check the forms of the M²RNN recurrence against the reference, and time them side by side.

    python benchmarks/m2rnn.py                 # a GPU where there is one, else the CPU
    python benchmarks/m2rnn.py --device cpu --length 512 --heads 8

First every form that runs here is held to the reference loop in float64, at an odd length, on
packed documents and in both clip orders; then all are timed in ``--dtype``, forward and with the
backward pass, on the same numbers. Exit status 1 if a form differs by more than ``--tolerance`` of
the largest value of any output or gradient.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nemo_megacpp.mixers.kernels.m2rnn_scan import m2rnn_scan
from nemo_megacpp.mixers.kernels.m2rnn_triton import m2rnn_triton, m2rnn_triton_reason
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype

Form = Callable[..., tuple[Tensor, Tensor]]
Inputs = dict[str, Tensor]


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
) -> tuple[Tensor, Tensor]:
    """The recurrence of :func:`m2rnn_scan`, token by token, with gradients by autograd."""
    acc = accumulation_dtype(v)
    batch, length, heads, value_dim = v.shape
    q_acc = (q if q.dim() == 4 else q[:, :, None]).to(acc)
    k_acc = (k if k.dim() == 4 else k[:, :, None]).to(acc)
    v_acc, f_acc, W_acc = v.to(acc), forget.to(acc), W.to(acc)
    state = v_acc.new_zeros(batch, heads, k.shape[-1], value_dim)
    if initial_state is not None:
        state = initial_state.to(acc)
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            same = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(same[:, None, None, None], state, torch.zeros_like(state))
        drive = k_acc[:, t, :, :, None] * v_acc[:, t, :, None, :]
        candidate = torch.tanh(torch.einsum("bnku,nuv->bnkv", state, W_acc) + drive)
        f = f_acc[:, t, :, None, None]
        state = f * state + (1 - f) * candidate
        if clip_order == "after_output":
            state = _clip_gradient(state, state_gradient_clip)
        outputs.append((state * q_acc[:, t, :, :, None]).sum(dim=2))
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


def forms_on(device: torch.device, value_dim: int, dtype: torch.dtype) -> dict[str, Form]:
    """Return the kernels that run here, and print why the Triton kernels do not if they do not."""
    forms: dict[str, Form] = {
        "torch": m2rnn_scan,
        "torch, 1 state in 64 saved": partial(m2rnn_scan, checkpoint_every=64),
    }
    reason = m2rnn_triton_reason(value_dim=value_dim, dtype=dtype, device=device)
    if reason is not None:
        print(f"Skipping the Triton kernel, which {reason}.")
        return forms
    for block_k in (16, 32, 64):
        forms[f"triton, {block_k} rows a program"] = partial(m2rnn_triton, block_k=block_k)
    return forms


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


def milliseconds(work: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Return the median time of ``work`` after one run to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeat + 1):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def time_forms(forms: dict[str, Form], inputs: Inputs, repeat: int) -> None:
    """Print a row for every form: forward, forward and backward, and peak memory on a GPU."""
    device = inputs["v"].device
    weights = [torch.randn_like(inputs["v"]), torch.randn_like(inputs["initial_state"])]
    print(f"{'form':<28}{'forward':>12}{'+ backward':>12}{'peak memory':>14}")
    for name, form in forms.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            forward = milliseconds(partial(form, **inputs, state_gradient_clip=1.0), device, repeat)
        step = partial(with_gradients, form, inputs, weights, state_gradient_clip=1.0)
        both = milliseconds(step, device, repeat)
        memory = "-"
        if device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB"
        print(f"{name:<28}{forward:>9.2f} ms{both:>9.2f} ms{memory:>14}", flush=True)


def main() -> int:
    """Parse the command line, check, time; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"here: {default}")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=28, help="of one rank; NAM56R at TP=8 has 28")
    parser.add_argument("--key-dim", type=int, default=64)
    parser.add_argument("--value-dim", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    sizes = (arguments.heads, arguments.key_dim, arguments.value_dim)

    forms = forms_on(device, arguments.value_dim, dtype)
    worst = check(forms, device, arguments.key_dim, arguments.value_dim)
    for name, (error, where) in worst.items():
        print(f"{name:<28}largest relative difference {error:.1e} ({where})")
    wrong = [name for name, (error, _) in worst.items() if error > arguments.tolerance]
    if wrong:
        print(f"More than {arguments.tolerance:g} from the reference: {', '.join(wrong)}.")
        return 1
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"\n{where}, {arguments.dtype}, b={arguments.batch} l={arguments.length} "
        "n={} k={} v={}, median of {}".format(*sizes, arguments.repeat)
    )
    inputs = make_inputs(arguments.batch, arguments.length, *sizes, device)
    time_forms(forms, {name: t.to(dtype) for name, t in inputs.items()}, arguments.repeat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
