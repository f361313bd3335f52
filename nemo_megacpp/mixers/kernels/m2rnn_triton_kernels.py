"""The M²RNN recurrence as two Triton kernels; :mod:`m2rnn_triton` launches them.

A program owns ``BLOCK_K`` rows of one head's state on one row of the batch and walks over time.
Rows of the state never mix (``H W`` and ``k vᵀ`` act row by row), so programs need not meet: what
sums over rows, they write as partial sums, one slab a program, and torch adds the slabs in a fixed
order. W and the state stay on chip, in float32; sizes are padded to ``BLOCK_K`` and ``BLOCK_V``
with zeros, which stay zero.
"""

# Triton compiles annotations too, and knows none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

# How the carried state gradient is clipped, as the kernels take it.
NO_CLIP, CLIP_BEFORE_OUTPUT, CLIP_AFTER_OUTPUT = 0, 1, 2


@triton.jit
def _candidate(state, weight, key, value):
    """``Z = tanh(H W + k vᵀ)``, accurate to 1e-6 relative to the result."""
    # Products in full float32: TF32 would lose what the recurrence then amplifies.
    pre = tl.dot(state, weight, input_precision="ieee") + key[:, None] * value[None, :]
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
    for chunk in range(chunks):
        tl.store(kept + (sequence * chunks + chunk) * (K * V) + in_state, state, mask=has_state)
        for t in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length)):
            token = first_token + t
            q_at = (token * q_heads + head % q_heads) * K + rows
            k_at = (token * k_heads + head % k_heads) * K + rows
            q_t = tl.load(q + q_at, mask=has_row, other=0.0).to(tl.float32)
            k_t = tl.load(k + k_at, mask=has_row, other=0.0).to(tl.float32)
            v_at = (token * heads + head) * V + cols
            v_t = tl.load(v + v_at, mask=has_col, other=0.0).to(tl.float32)
            f_t = tl.load(forget + token * heads + head).to(tl.float32)
            if HAS_RESETS:
                state = state * tl.load(keep + token).to(tl.float32)
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
        for i in range(count):
            token = first_token + start + i
            k_at = (token * k_heads + head % k_heads) * K + rows
            k_t = tl.load(k + k_at, mask=has_row, other=0.0).to(tl.float32)
            v_at = (token * heads + head) * V + cols
            v_t = tl.load(v + v_at, mask=has_col, other=0.0).to(tl.float32)
            f_t = tl.load(forget + token * heads + head).to(tl.float32)
            if HAS_RESETS:
                state = state * tl.load(keep + token).to(tl.float32)
            tl.store(scratch + (sequence * CHUNK + i) * (K * V) + in_state, state, mask=has_state)
            state = f_t * state + (1.0 - f_t) * _candidate(state, W, k_t, v_t)
        # Threads read states that other threads have written.
        tl.debug_barrier()
        for back in range(count):
            i = count - 1 - back
            token = first_token + start + i
            previous = tl.load(
                scratch + (sequence * CHUNK + i) * (K * V) + in_state, mask=has_state, other=0.0
            )
            q_at = (token * q_heads + head % q_heads) * K + rows
            k_at = (token * k_heads + head % k_heads) * K + rows
            v_at = (token * heads + head) * V + cols
            q_t = tl.load(q + q_at, mask=has_row, other=0.0).to(tl.float32)
            k_t = tl.load(k + k_at, mask=has_row, other=0.0).to(tl.float32)
            v_t = tl.load(v + v_at, mask=has_col, other=0.0).to(tl.float32)
            dy_t = tl.load(grad_y + v_at, mask=has_col, other=0.0).to(tl.float32)
            f_t = tl.load(forget + token * heads + head).to(tl.float32)
            candidate = _candidate(previous, W, k_t, v_t)
            after = f_t * previous + (1.0 - f_t) * candidate

            if CLIP == 1:
                carry = tl.minimum(tl.maximum(carry, -bound), bound)
            total = carry + q_t[:, None] * dy_t[None, :]
            if CLIP == 2:
                total = tl.minimum(tl.maximum(total, -bound), bound)
            grad_pre = (1.0 - f_t) * (1.0 - candidate * candidate) * total

            own = (token * heads + head) * K + rows
            tl.store(grad_q + own, tl.sum(after * dy_t[None, :], axis=1), mask=has_row)
            tl.store(grad_k + own, tl.sum(grad_pre * v_t[None, :], axis=1), mask=has_row)
            at = (slab * length + start + i) * heads + head
            dv_t = tl.sum(grad_pre * k_t[:, None], axis=0)
            tl.store(grad_v + at * V + cols, dv_t, mask=has_col)
            df_t = tl.sum(tl.sum((previous - candidate) * total, axis=1), axis=0)
            tl.store(grad_forget + at, df_t)
            grad_W += tl.dot(tl.trans(previous), grad_pre, input_precision="ieee")
            carry = f_t * total + tl.dot(grad_pre, W_transposed, input_precision="ieee")
            if HAS_RESETS:
                carry = carry * tl.load(keep + token).to(tl.float32)
        # The next chunk overwrites what other threads may still be reading.
        tl.debug_barrier()
    tl.store(grad_initial + sequence * (K * V) + in_state, carry, mask=has_state)
    weight_at = (slab * heads + head) * (V * V) + in_weight
    tl.store(grad_weight + weight_at, grad_W, mask=has_weight)
