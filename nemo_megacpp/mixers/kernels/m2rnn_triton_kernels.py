"""The M²RNN recurrence as two Triton kernels; :mod:`m2rnn_triton` launches them.

A program owns ``BLOCK_K`` rows of one head's state on one row of the batch and walks over time.
Rows of the state never mix (``H W`` and ``k vᵀ`` act row by row), so programs need not meet: what
sums over rows, they write as partial sums, one slab a program, and torch adds the slabs in a fixed
order. W and the state stay on chip, in float32; sizes are padded to ``BLOCK_K`` and ``BLOCK_V``
with zeros, which stay zero. While a token is computed, the next one is loaded, since nothing else
could hide the latency of memory from a program of one warp.
"""

# Triton compiles annotations too, and knows none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

# How the carried state gradient is clipped, as the kernels take it.
NO_CLIP, CLIP_BEFORE_OUTPUT, CLIP_AFTER_OUTPUT = 0, 1, 2


@triton.jit
def _dot(a, b):
    # Three TF32 products on tensor cores; one alone would lose what the recurrence then amplifies.
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _candidate(state, weight, key, value):
    """``Z = tanh(H W + k vᵀ)``, accurate to 1e-6 relative to the result."""
    pre = _dot(state, weight) + key[:, None] * value[None, :]
    # By the sigmoid tanh is accurate relative to 1 only; near 0 its series takes over.
    square = pre * pre
    series = (62.0 / 2835.0 - 1382.0 / 155925.0 * square) * square - 17.0 / 315.0
    series = ((series * square + 2.0 / 15.0) * square - 1.0 / 3.0) * square + 1.0
    return tl.where(square < 0.0625, pre * series, 2.0 * tl.sigmoid(2.0 * pre) - 1.0)


@triton.jit
def _places(part, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Rows and columns of a program's part of the state, and where they lie in it and in W."""
    rows = part * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.arange(0, BLOCK_V)
    return rows, cols, rows[:, None] * V + cols[None, :], cols[:, None] * V + cols[None, :]


@triton.jit
def _row(x, token, head, heads, places, WIDTH: tl.constexpr):
    """Load a head's row of a token, ``places`` of ``WIDTH``, of ``x [tokens, heads, WIDTH]``."""
    at = x + (token * heads + head % heads) * WIDTH + places
    return tl.load(at, mask=places < WIDTH, other=0.0)


@triton.jit
def _keep(keep, token, HAS_RESETS: tl.constexpr):
    """Does the token continue its document?"""
    return tl.load(keep + token) != 0 if HAS_RESETS else True


@triton.jit
def m2rnn_forward(
    q,  # [b, l, q_heads, k]
    k,  # [b, l, k_heads, k]
    v,  # [b, l, n, v]
    forget,  # [b, l, n]
    weight,  # [n, v, v]
    keep,  # [b, l] int8, zero where a document starts; not read without HAS_RESETS
    initial,  # [b, n, k, v] float32, as all that follows
    y,  # [parts, b, l, n, v], partial sums over the rows of the state
    final,  # [b, n, k, v]
    kept,  # [b, n, chunks, k, v], the state before every chunk
    length,
    heads,
    q_heads,
    k_heads,
    HAS_RESETS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1)
    part = tl.program_id(2)
    rows, cols, in_state, in_weight = _places(part, V, BLOCK_K, BLOCK_V)
    has_row, has_col = rows < K, cols < V
    has_state = has_row[:, None] & has_col[None, :]
    has_weight = has_col[:, None] & has_col[None, :]
    # Offsets grow beyond 32 bits.
    sequence = row.to(tl.int64) * heads + head
    chunks = tl.cdiv(length, CHUNK)
    first_token = row.to(tl.int64) * length
    first_output = (part.to(tl.int64) * tl.num_programs(1) + row) * length

    W = tl.load(weight + head * V * V + in_weight, mask=has_weight, other=0.0).to(tl.float32)
    state = tl.load(initial + sequence * (K * V) + in_state, mask=has_state, other=0.0)
    q_next = _row(q, first_token, head, q_heads, rows, K)
    k_next = _row(k, first_token, head, k_heads, rows, K)
    v_next = _row(v, first_token, head, heads, cols, V)
    f_next = tl.load(forget + first_token * heads + head)
    keep_next = _keep(keep, first_token, HAS_RESETS)
    for chunk in range(chunks):
        tl.store(kept + (sequence * chunks + chunk) * (K * V) + in_state, state, mask=has_state)
        for t in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length)):
            q_t, k_t, v_t = q_next.to(tl.float32), k_next.to(tl.float32), v_next.to(tl.float32)
            f_t, keep_t = f_next.to(tl.float32), keep_next
            token = first_token + tl.minimum(t + 1, length - 1)
            q_next = _row(q, token, head, q_heads, rows, K)
            k_next = _row(k, token, head, k_heads, rows, K)
            v_next = _row(v, token, head, heads, cols, V)
            f_next = tl.load(forget + token * heads + head)
            keep_next = _keep(keep, token, HAS_RESETS)
            if HAS_RESETS:
                state = tl.where(keep_t, state, 0.0)
            state = f_t * state + (1.0 - f_t) * _candidate(state, W, k_t, v_t)
            y_at = ((first_output + t) * heads + head) * V + cols
            tl.store(y + y_at, tl.sum(state * q_t[:, None], axis=0), mask=has_col)
    tl.store(final + sequence * (K * V) + in_state, state, mask=has_state)


@triton.jit
def m2rnn_backward(
    q,  # as in m2rnn_forward
    k,
    v,
    forget,
    weight,
    keep,
    kept,
    grad_y,  # [b, l, n, v]
    grad_final,  # [b, n, k, v] float32, as all that follows
    scratch,  # [b, n, CHUNK, k, v], the states of the current chunk
    grad_q,  # [b, l, n, k], of every head, also where heads share q
    grad_k,  # [b, l, n, k]
    grad_v,  # [parts, b, l, n, v]
    grad_forget,  # [parts, b, l, n]
    grad_weight,  # [parts, b, n, v, v]
    grad_initial,  # [b, n, k, v]
    length,
    heads,
    q_heads,
    k_heads,
    bound,
    CLIP: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1)
    part = tl.program_id(2)
    rows, cols, in_state, in_weight = _places(part, V, BLOCK_K, BLOCK_V)
    has_row, has_col = rows < K, cols < V
    has_state = has_row[:, None] & has_col[None, :]
    has_weight = has_col[:, None] & has_col[None, :]
    sequence = row.to(tl.int64) * heads + head
    slab = part.to(tl.int64) * tl.num_programs(1) + row
    chunks = tl.cdiv(length, CHUNK)
    first_token = row.to(tl.int64) * length

    W = tl.load(weight + head * V * V + in_weight, mask=has_weight, other=0.0).to(tl.float32)
    W_transposed = tl.trans(W)
    grad_W = tl.zeros((BLOCK_V, BLOCK_V), dtype=tl.float32)
    carry = tl.load(grad_final + sequence * (K * V) + in_state, mask=has_state, other=0.0)
    for done in range(chunks):
        chunk = chunks - 1 - done
        start = chunk * CHUNK
        count = tl.minimum(CHUNK, length - start)
        # Recompute the state before each token of the chunk.
        state = tl.load(
            kept + (sequence * chunks + chunk) * (K * V) + in_state, mask=has_state, other=0.0
        )
        token = first_token + start
        k_next = _row(k, token, head, k_heads, rows, K)
        v_next = _row(v, token, head, heads, cols, V)
        f_next = tl.load(forget + token * heads + head)
        keep_next = _keep(keep, token, HAS_RESETS)
        for i in range(count):
            k_t, v_t = k_next.to(tl.float32), v_next.to(tl.float32)
            f_t, keep_t = f_next.to(tl.float32), keep_next
            token = first_token + start + tl.minimum(i + 1, count - 1)
            k_next = _row(k, token, head, k_heads, rows, K)
            v_next = _row(v, token, head, heads, cols, V)
            f_next = tl.load(forget + token * heads + head)
            keep_next = _keep(keep, token, HAS_RESETS)
            if HAS_RESETS:
                state = tl.where(keep_t, state, 0.0)
            tl.store(scratch + (sequence * CHUNK + i) * (K * V) + in_state, state, mask=has_state)
            state = f_t * state + (1.0 - f_t) * _candidate(state, W, k_t, v_t)
        # Threads read states that other threads have written.
        tl.debug_barrier()
        token = first_token + start + count - 1
        last = scratch + (sequence * CHUNK + count - 1) * (K * V)
        previous_next = tl.load(last + in_state, mask=has_state, other=0.0)
        q_next = _row(q, token, head, q_heads, rows, K)
        k_next = _row(k, token, head, k_heads, rows, K)
        v_next = _row(v, token, head, heads, cols, V)
        dy_next = _row(grad_y, token, head, heads, cols, V)
        f_next = tl.load(forget + token * heads + head)
        keep_next = _keep(keep, token, HAS_RESETS)
        for back in range(count):
            i = count - 1 - back
            previous, dy_t = previous_next, dy_next.to(tl.float32)
            q_t, k_t, v_t = q_next.to(tl.float32), k_next.to(tl.float32), v_next.to(tl.float32)
            f_t, keep_t = f_next.to(tl.float32), keep_next
            then = tl.maximum(i - 1, 0)
            place = scratch + (sequence * CHUNK + then) * (K * V)
            previous_next = tl.load(place + in_state, mask=has_state, other=0.0)
            token = first_token + start + then
            q_next = _row(q, token, head, q_heads, rows, K)
            k_next = _row(k, token, head, k_heads, rows, K)
            v_next = _row(v, token, head, heads, cols, V)
            dy_next = _row(grad_y, token, head, heads, cols, V)
            f_next = tl.load(forget + token * heads + head)
            keep_next = _keep(keep, token, HAS_RESETS)
            candidate = _candidate(previous, W, k_t, v_t)
            after = f_t * previous + (1.0 - f_t) * candidate

            if CLIP == 1:
                carry = tl.minimum(tl.maximum(carry, -bound), bound)
            total = carry + q_t[:, None] * dy_t[None, :]
            if CLIP == 2:
                total = tl.minimum(tl.maximum(total, -bound), bound)
            grad_pre = (1.0 - f_t) * (1.0 - candidate * candidate) * total

            own = ((first_token + start + i) * heads + head) * K + rows
            tl.store(grad_q + own, tl.sum(after * dy_t[None, :], axis=1), mask=has_row)
            tl.store(grad_k + own, tl.sum(grad_pre * v_t[None, :], axis=1), mask=has_row)
            at = (slab * length + start + i) * heads + head
            dv_t = tl.sum(grad_pre * k_t[:, None], axis=0)
            tl.store(grad_v + at * V + cols, dv_t, mask=has_col)
            df_t = tl.sum(tl.sum((previous - candidate) * total, axis=1), axis=0)
            tl.store(grad_forget + at, df_t)
            grad_W += _dot(tl.trans(previous), grad_pre)
            carry = f_t * total + _dot(grad_pre, W_transposed)
            if HAS_RESETS:
                carry = tl.where(keep_t, carry, 0.0)
        # The next chunk overwrites what other threads may still be reading.
        tl.debug_barrier()
    tl.store(grad_initial + sequence * (K * V) + in_state, carry, mask=has_state)
    weight_at = (slab * heads + head) * (V * V) + in_weight
    tl.store(grad_weight + weight_at, grad_W, mask=has_weight)
