"""Matrix products with their prologues and epilogues: fp16 factors, f32 sums.

Shapes: M rows; a row is token · R + r, with R transformer rows per token; C width, H heads of width D, K inner size,
N outputs. Weights are fp16 [K, N], inputs first, N a multiple of 16. The residual stream is f32 [M, C]. All sizes are
run-time numbers: one cubin serves every model.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(acc, a, w, rows, outs, M, N, K, BK: tl.constexpr):
    """acc + a[rows] · w[:, outs], f32 [BM, BN]. a: fp16 [M, K]."""
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        a_tile = tl.load(a + rows[:, None] * K + ks[None, :], mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0)
        w_tile = tl.load(w + ks[:, None] * N + outs[None, :], mask=(ks < K)[:, None] & (outs < N)[None, :], other=0.0)
        acc = tl.dot(a_tile, w_tile, acc)
    return acc


@triton.jit
def moments(x, rows, M, C, EPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Mean and 1/deviation of rows of x, f32 [BM] each: two passes over what lies in the caches."""
    total = tl.zeros([BM], tl.float32)
    for k in range(0, C, BK):
        ks = k + tl.arange(0, BK)
        live = (rows < M)[:, None] & (ks < C)[None, :]
        total += tl.sum(tl.load(x + rows[:, None] * C + ks[None, :], mask=live, other=0.0), 1)
    mean = total / C
    squares = tl.zeros([BM], tl.float32)
    for k in range(0, C, BK):
        ks = k + tl.arange(0, BK)
        live = (rows < M)[:, None] & (ks < C)[None, :]
        v = tl.load(x + rows[:, None] * C + ks[None, :], mask=live, other=0.0) - mean[:, None]
        squares += tl.sum(tl.where(live, v * v, 0.0), 1)
    return mean, tl.rsqrt(squares / C + EPS)


@triton.jit
def normed_product(
    acc, x, scale, shift, w, rows, outs, M, N, C, R, mod_stride, EPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    """acc + (LN(x)·(1 + scale) + shift as fp16)[rows] · w[:, outs]; scale, shift: f32, `mod_stride` apart per r."""
    mean, rstd = moments(x, rows, M, C, EPS, BM, BK)
    r = rows % R
    for k in range(0, C, BK):
        ks = k + tl.arange(0, BK)
        live = (rows < M)[:, None] & (ks < C)[None, :]
        v = tl.load(x + rows[:, None] * C + ks[None, :], mask=live, other=0.0)
        where = r[:, None] * mod_stride + ks[None, :]
        factor = 1.0 + tl.load(scale + where, mask=live, other=0.0)
        h = (v - mean[:, None]) * rstd[:, None] * factor + tl.load(shift + where, mask=live, other=0.0)
        w_tile = tl.load(w + ks[:, None] * N + outs[None, :], mask=(ks < C)[:, None] & (outs < N)[None, :], other=0.0)
        acc = tl.dot(tl.where(live, h, 0.0).to(w.dtype.element_ty), w_tile, acc)
    return acc


@triton.jit
def store_qkv(acc, q_bias, v_bias, log_scale, q, k_slot, v_slot, head, rows, M, C, D: tl.constexpr):
    """One head's queries (unit length × temperature), keys (unit length) or values to their place, fp16 [M, C]."""
    H = C // D
    inner = (head % H) * D + tl.arange(0, D)
    where = rows[:, None] * C + inner[None, :]
    live = (rows < M)[:, None]
    part = head // H
    if part == 2:
        acc += tl.load(v_bias + inner)[None, :].to(tl.float32)
        tl.store(v_slot + where, acc.to(v_slot.dtype.element_ty), mask=live)
    else:
        if part == 0:
            acc += tl.load(q_bias + inner)[None, :].to(tl.float32)
        length = tl.sqrt(tl.sum(acc * acc, 1))
        acc = acc / tl.maximum(length, 1e-12)[:, None]
        if part == 0:
            # exp(min(x, ln 100)): the temperature is learned as its logarithm.
            factor = tl.exp(tl.minimum(tl.load(log_scale + head % H).to(tl.float32), 4.605170185988092))
            tl.store(q + where, (acc * factor).to(q.dtype.element_ty), mask=live)
        else:
            tl.store(k_slot + where, acc.to(k_slot.dtype.element_ty), mask=live)


@triton.jit
def ln_qkv(
    x, scale, shift, w, q_bias, v_bias, log_scale, q, k_slot, v_slot, M, C, R, mod_stride,
    EPS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """LN, modulation, QKV and its epilogue. Grid: 3H heads × row tiles. w: [C, 3C]."""
    head = tl.program_id(0)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    outs = head * D + tl.arange(0, D)
    acc = normed_product(
        tl.zeros([BM, D], tl.float32), x, scale, shift, w, rows, outs, M, 3 * C, C, R, mod_stride, EPS, BM, BK
    )
    store_qkv(acc, q_bias, v_bias, log_scale, q, k_slot, v_slot, head, rows, M, C, D)


@triton.jit
def qkv(
    a, w, q_bias, v_bias, log_scale, q, k_slot, v_slot, M, C,
    D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`ln_qkv` on what `ln_mod` made, a: fp16 [M, C]."""
    head = tl.program_id(0)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    outs = head * D + tl.arange(0, D)
    acc = product(tl.zeros([BM, D], tl.float32), a, w, rows, outs, M, 3 * C, C, BK)
    store_qkv(acc, q_bias, v_bias, log_scale, q, k_slot, v_slot, head, rows, M, C, D)


@triton.jit
def gelu_tanh(z):
    """GELU by tanh: 0.5·z·(1 + tanh u) is z·sigmoid(2u), exactly."""
    return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def ln_gelu(
    x, scale, shift, w, bias, out, M, N, C, R, mod_stride,
    EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out fp16 [M, N] = GELU(LN(x) modulated · w + bias). Grid: output tiles × row tiles."""
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = normed_product(
        tl.zeros([BM, BN], tl.float32), x, scale, shift, w, rows, outs, M, N, C, R, mod_stride, EPS, BM, BK
    )
    live = outs < N
    acc = gelu_tanh(acc + tl.load(bias + outs, mask=live, other=0.0)[None, :].to(tl.float32))
    tl.store(
        out + rows[:, None] * N + outs[None, :],
        acc.to(out.dtype.element_ty),
        mask=(rows < M)[:, None] & live[None, :],
    )


@triton.jit
def gelu(a, w, bias, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out fp16 [M, N] = GELU(a · w + bias). a: fp16 [M, K]. Grid: output tiles × row tiles."""
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = product(tl.zeros([BM, BN], tl.float32), a, w, rows, outs, M, N, K, BK)
    live = outs < N
    acc = gelu_tanh(acc + tl.load(bias + outs, mask=live, other=0.0)[None, :].to(tl.float32))
    tl.store(
        out + rows[:, None] * N + outs[None, :],
        acc.to(out.dtype.element_ty),
        mask=(rows < M)[:, None] & live[None, :],
    )


@triton.jit
def gate(a, w, bias, gamma, x, out, M, C, K, R, mod_stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out f32 [M, C] = x + gamma · (a · w + bias); out may be x.

    a: fp16 [M, K]; gamma: f32, `mod_stride` apart per r.
    """
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = product(tl.zeros([BM, BN], tl.float32), a, w, rows, outs, M, C, K, BK)
    live = (rows < M)[:, None] & (outs < C)[None, :]
    acc += tl.load(bias + outs, mask=outs < C, other=0.0)[None, :].to(tl.float32)
    factor = tl.load(gamma + (rows % R)[:, None] * mod_stride + outs[None, :], mask=live, other=0.0)
    where = rows[:, None] * C + outs[None, :]
    tl.store(out + where, tl.load(x + where, mask=live, other=0.0) + factor * acc, mask=live)


@triton.jit
def head(a, w, bias, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Logits f32 [M, N] = a · w + bias. a: fp16 [M, K]. Grid: output tiles × row tiles.

    N is the vocabulary rounded up to 16: weights and bias have zeros there.
    """
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = product(tl.zeros([BM, BN], tl.float32), a, w, rows, outs, M, N, K, BK)
    live = outs < N
    acc += tl.load(bias + outs, mask=live, other=0.0)[None, :].to(tl.float32)
    tl.store(out + rows[:, None] * N + outs[None, :], acc, mask=(rows < M)[:, None] & live[None, :])


@triton.jit
def fuse(h, w, bias, mix, keep, x, M, C, K, R, branches, adds, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """x ← keep·x + Σᵢ mixᵢ·(hᵢ · wᵢ + biasᵢ), CAR's 𝓖 of several branches, in place; x f32 [M, C].

    h: fp16 [branches, M, K], what `fusion_norm` or `fusion_round` makes; w: fp16 [branches, K, C]; bias: fp16
    [branches, C]; mix: f32 [branches, R]; keep: f32 [R]. `adds`: 𝓖 adds to x, so that each branch brings x too.
    """
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    r = rows % R
    factor = tl.load(keep + r)
    total = tl.zeros([BM, BN], tl.float32)
    for branch in range(branches):
        i = tl.cast(branch, tl.int64)
        acc = product(tl.zeros([BM, BN], tl.float32), h + i * M * K, w + i * K * C, rows, outs, M, C, K, BK)
        acc += tl.load(bias + i * C + outs, mask=outs < C, other=0.0)[None, :].to(tl.float32)
        share = tl.load(mix + i * R + r)
        total += share[:, None] * acc
        factor += tl.where(adds != 0, share, 0.0)
    live = (rows < M)[:, None] & (outs < C)[None, :]
    where = rows[:, None] * C + outs[None, :]
    tl.store(x + where, factor[:, None] * tl.load(x + where, mask=live, other=0.0) + total, mask=live)


@triton.jit
def inject(x, w, bias, control, image, pos, out, S, C, R, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A branch's input, token-major f32 [S·S·R, C]: conv3(x) + 𝓕(control) + position, as an implicit product.

    x: f32 [R, S, S, C], as fp16 into the product; w: fp16 [9·C, C], tap after tap; control: f32 [B, S·S, C]; image:
    int64 [R], the image of each row; pos: f32 [S·S, C].
    """
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    M = S * S * R
    token, r = rows // R, rows % R
    py, px = token // S, token % S
    steps = tl.cdiv(C, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(0, 9 * steps):
        tap = step // steps
        ks = (step % steps) * BK + tl.arange(0, BK)
        y, z = py + tap // 3 - 1, px + tap % 3 - 1
        inside = (rows < M) & (y >= 0) & (y < S) & (z >= 0) & (z < S)
        a_tile = tl.load(
            x + ((r * S + y) * S + z)[:, None] * C + ks[None, :], mask=inside[:, None] & (ks < C)[None, :], other=0.0
        )
        w_tile = tl.load(
            w + (tap * C + ks)[:, None] * C + outs[None, :], mask=(ks < C)[:, None] & (outs < C)[None, :], other=0.0
        )
        acc = tl.dot(a_tile.to(w.dtype.element_ty), w_tile, acc)
    live = (rows < M)[:, None] & (outs < C)[None, :]
    acc += tl.load(bias + outs, mask=outs < C, other=0.0)[None, :].to(tl.float32)
    b = tl.load(image + r, mask=rows < M, other=0).to(tl.int32)
    acc += tl.load(control + (b * S * S + token)[:, None] * C + outs[None, :], mask=live, other=0.0)
    acc += tl.load(pos + token[:, None] * C + outs[None, :], mask=live, other=0.0)
    tl.store(out + rows[:, None] * C + outs[None, :], acc, mask=live)


@triton.jit
def embed(a, w, bias, image, out, M, T, C, Z, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The next scale's tokens f32 [R·T·T, C] = a[image] · w + bias. a: fp16 [B, T·T, Z]; w: fp16 [Z, C]."""
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    b = tl.load(image + rows // (T * T), mask=rows < M, other=0).to(tl.int32)
    source = b * T * T + rows % (T * T)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, Z, BK):
        ks = k + tl.arange(0, BK)
        a_tile = tl.load(
            a + source[:, None] * Z + ks[None, :], mask=(rows < M)[:, None] & (ks < Z)[None, :], other=0.0
        )
        w_tile = tl.load(w + ks[:, None] * C + outs[None, :], mask=(ks < Z)[:, None] & (outs < C)[None, :], other=0.0)
        acc = tl.dot(a_tile, w_tile, acc)
    acc += tl.load(bias + outs, mask=outs < C, other=0.0)[None, :].to(tl.float32)
    tl.store(out + rows[:, None] * C + outs[None, :], acc, mask=(rows < M)[:, None] & (outs < C)[None, :])


@triton.jit
def condition(
    label, embedding, w, bias, offset, out, R, N, K, out_stride, offsets, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """AdaLN's modulation: row r of out f32 [·, N], `out_stride` apart, = SiLU(embedding[label[r]]) · w + bias.

    label: int64 [R]; embedding: fp16 [classes + 1, K]. offset: fp16 [N], added if `offsets`.
    """
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    classes = tl.load(label + rows, mask=rows < R, other=0)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        live = (rows < R)[:, None] & (ks < K)[None, :]
        v = tl.load(embedding + classes[:, None] * K + ks[None, :], mask=live, other=0.0).to(tl.float32)
        w_tile = tl.load(w + ks[:, None] * N + outs[None, :], mask=(ks < K)[:, None] & (outs < N)[None, :], other=0.0)
        acc = tl.dot((v / (1.0 + tl.exp(-v))).to(w.dtype.element_ty), w_tile, acc)
    acc += tl.load(bias + outs, mask=outs < N, other=0.0)[None, :].to(tl.float32)
    if offsets:
        acc += tl.load(offset + outs, mask=outs < N, other=0.0)[None, :].to(tl.float32)
    tl.store(out + rows[:, None] * out_stride + outs[None, :], acc, mask=(rows < R)[:, None] & (outs < N)[None, :])
