"""Feature maps: convolutions, group norms, attention over pixels; fp16, channels last, f32 sums.

Shapes: a list of square maps lies row after row, a row being a pixel: [rows, N]. C channels count, N are stored, the
next multiple of 16, with zeros from C on. B maps of P pixels each, where all are of one size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def windows(
    acc, a, w, maps, rows, outs, K, N, reach, lead, stride, doubled, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """acc + the convolution of one map at `rows` and `outs`, f32 [BM, BN]: an implicit product."""
    S, source, A = tl.load(maps + 1), tl.load(maps + 2), tl.load(maps + 3)
    py, px = rows // S, rows % S
    size = A << doubled
    inner = tl.cdiv(K, BK)
    steps = tl.where(tl.program_id(1) * BM < S * S, reach * reach * inner, 0)
    for step in range(0, steps):
        tap = step // inner
        ks = (step % inner) * BK + tl.arange(0, BK)
        y, x = py * stride + tap // reach - lead, px * stride + tap % reach - lead
        inside = (rows < S * S) & (y >= 0) & (y < size) & (x >= 0) & (x < size)
        pixel = source + (y >> doubled) * A + (x >> doubled)
        a_tile = tl.load(a + pixel[:, None] * K + ks[None, :], mask=inside[:, None] & (ks < K)[None, :], other=0.0)
        w_tile = tl.load(
            w + (tap * K + ks)[:, None] * N + outs[None, :], mask=(ks < K)[:, None] & (outs < N)[None, :], other=0.0
        )
        acc = tl.dot(a_tile, w_tile, acc)
    return acc


@triton.jit
def conv(
    a, w, bias, x, out, maps, K, N, reach, lead, stride, doubled, silu, adds, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """out fp16 [rows, N] = conv(a) + bias of each map, then SiLU if `silu`, + x if `adds`.

    a: fp16 [rows, K], zeros around each map; w: fp16 [reach²·K, N], tap after tap; x: fp16 [rows, N]. maps: int32
    [maps, 4], where each begins and its side, in `out` and then in `a`. lead: zeros above and left; `doubled`: 1 if a
    is seen at twice its side. Grid: output tiles × row tiles of the largest map × maps.
    """
    maps += tl.program_id(2) * 4
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = windows(
        tl.zeros([BM, BN], tl.float32), a, w, maps, rows, outs, K, N, reach, lead, stride, doubled, BM, BN, BK
    )
    first, S = tl.load(maps), tl.load(maps + 1)
    live = (rows < S * S)[:, None] & (outs < N)[None, :]
    acc += tl.load(bias + outs, mask=outs < N, other=0.0)[None, :].to(tl.float32)
    if silu:
        acc = acc / (1.0 + tl.exp(-acc))
    where = (first + rows)[:, None] * N + outs[None, :]
    if adds:
        acc += tl.load(x + where, mask=live, other=0.0).to(tl.float32)
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=live)


@triton.jit
def conv_wide(
    a, w, bias, out, maps, K, N, reach, lead, stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """out f32 [rows, N] = conv(a) + bias; the rest as `conv`'s."""
    maps += tl.program_id(2) * 4
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = windows(tl.zeros([BM, BN], tl.float32), a, w, maps, rows, outs, K, N, reach, lead, stride, 0, BM, BN, BK)
    first, S = tl.load(maps), tl.load(maps + 1)
    live = (rows < S * S)[:, None] & (outs < N)[None, :]
    acc += tl.load(bias + outs, mask=outs < N, other=0.0)[None, :].to(tl.float32)
    tl.store(out + (first + rows)[:, None] * N + outs[None, :], acc, mask=live)


@triton.jit
def group_moments(a, out, P, N, chunks, BP: tl.constexpr, BN: tl.constexpr):
    """Means, and sums of squared deviations, of each channel over BP pixels: out f32 [B, chunks, 2, N].

    Grid: chunks × channel tiles × B.
    """
    chunk, b = tl.program_id(0), tl.program_id(2)
    rows = chunk * BP + tl.arange(0, BP)
    cs = tl.program_id(1) * BN + tl.arange(0, BN)
    live = (rows < P)[:, None] & (cs < N)[None, :]
    v = tl.load(a + (b * P + rows)[:, None] * N + cs[None, :], mask=live, other=0.0).to(tl.float32)
    mean = tl.sum(v, 0) / tl.minimum(P - chunk * BP, BP)
    d = tl.where(live, v - mean[None, :], 0.0)
    out += (b * chunks + chunk) * 2 * N
    tl.store(out + cs, mean, mask=cs < N)
    tl.store(out + N + cs, tl.sum(d * d, 0), mask=cs < N)


@triton.jit
def group_affine(
    moments, weight, bias, out, P, channels, N, groups, chunks, EPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    GP: tl.constexpr,
):  # fmt: skip
    """out f32 [B, 2, N]: factor and summand of each channel by which its group is normalised. Grid: groups × B.

    moments: as `group_moments` has them over BP pixels; weight, bias: f32 [channels]. Zeros beyond.
    """
    group, b = tl.program_id(0), tl.program_id(1)
    size = channels // groups
    cs = tl.arange(0, GP)
    here = group * size + cs
    moments += b * chunks * 2 * N
    total = tl.zeros([BC, GP], tl.float32)
    for start in range(0, chunks, BC):
        ts = start + tl.arange(0, BC)
        live = (ts < chunks)[:, None] & (cs < size)[None, :]
        counts = tl.minimum(P - ts * BP, BP).to(tl.float32)
        total += counts[:, None] * tl.load(moments + ts[:, None] * 2 * N + here[None, :], mask=live, other=0.0)
    number = (P * size).to(tl.float32)
    mean = tl.sum(tl.sum(total, 0), 0) / number
    squares = tl.zeros([BC, GP], tl.float32)
    for start in range(0, chunks, BC):
        ts = start + tl.arange(0, BC)
        live = (ts < chunks)[:, None] & (cs < size)[None, :]
        counts = tl.minimum(P - ts * BP, BP).to(tl.float32)
        where = moments + ts[:, None] * 2 * N + here[None, :]
        d = tl.load(where, mask=live, other=0.0) - mean
        squares += tl.where(live, tl.load(where + N, mask=live, other=0.0) + counts[:, None] * d * d, 0.0)
    rstd = tl.rsqrt(tl.sum(tl.sum(squares, 0), 0) / number + EPS)
    factor = tl.load(weight + here, mask=cs < size, other=0.0) * rstd
    out += b * 2 * N
    tl.store(out + here, factor, mask=cs < size)
    tl.store(out + N + here, tl.load(bias + here, mask=cs < size, other=0.0) - mean * factor, mask=cs < size)
    beyond = channels + tl.arange(0, 16)
    unused = (beyond < N) & (group == 0)
    tl.store(out + beyond, tl.zeros([16], tl.float32), mask=unused)
    tl.store(out + N + beyond, tl.zeros([16], tl.float32), mask=unused)


@triton.jit
def group_norm(a, affine, out, P, N, silu, BP: tl.constexpr, BN: tl.constexpr):
    """out fp16 [B, P, N] = a · factor + summand, then SiLU if `silu`. Grid: pixel tiles × channel tiles × B."""
    b = tl.program_id(2)
    rows = tl.program_id(0) * BP + tl.arange(0, BP)
    cs = tl.program_id(1) * BN + tl.arange(0, BN)
    live = (rows < P)[:, None] & (cs < N)[None, :]
    where = (b * P + rows)[:, None] * N + cs[None, :]
    affine += b * 2 * N
    v = tl.load(a + where, mask=live, other=0.0).to(tl.float32)
    v = v * tl.load(affine + cs, mask=cs < N, other=0.0)[None, :]
    v += tl.load(affine + N + cs, mask=cs < N, other=0.0)[None, :]
    if silu:
        v = v / (1.0 + tl.exp(-v))
    tl.store(out + where, v.to(out.dtype.element_ty), mask=live)


@triton.jit
def pixel_attention(a, out, P, channels, N, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """out fp16 [B, P, N] = softmax(q · kᵀ / √channels) · v of one head over all pixels.

    a: fp16 [B, P, 3·N], q, k and v. Grid: output tiles × query tiles × B; each output tile computes the scores anew.
    """
    b = tl.program_id(2)
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    a += b * P * 3 * N
    scale = tl.rsqrt(channels.to(tl.float32))
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, P, BT):
        ts = start + tl.arange(0, BT)
        scores = tl.zeros([BM, BT], tl.float32)
        for k in range(0, N, BK):
            ks = k + tl.arange(0, BK)
            q = tl.load(
                a + rows[:, None] * 3 * N + ks[None, :], mask=(rows < P)[:, None] & (ks < N)[None, :], other=0.0
            )
            key = tl.load(
                a + ts[None, :] * 3 * N + N + ks[:, None], mask=(ts < P)[None, :] & (ks < N)[:, None], other=0.0
            )
            scores = tl.dot(q, key, scores)
        scores = tl.where((ts < P)[None, :], scores * scale, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - new[:, None])
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(
            a + ts[:, None] * 3 * N + 2 * N + outs[None, :], mask=(ts < P)[:, None] & (outs < N)[None, :], other=0.0
        )
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new
    live = (rows < P)[:, None] & (outs < N)[None, :]
    tl.store(
        out + (b * P + rows)[:, None] * N + outs[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=live
    )


@triton.jit
def from_pixels(pixels, out, P, BP: tl.constexpr):
    """out fp16 [P, 16] = pixels uint8 [P, 3], 0…255 to −1…1, zeros in the channels from 3 on."""
    rows = tl.program_id(0) * BP + tl.arange(0, BP)
    cs = tl.arange(0, 16)
    colours = (rows < P)[:, None] & (cs < 3)[None, :]
    v = tl.load(pixels + rows[:, None] * 3 + cs[None, :], mask=colours, other=0).to(tl.float32) / 255.0 * 2.0 - 1.0
    v = tl.where(colours, v, 0.0)
    tl.store(
        out + rows[:, None] * 16 + cs[None, :],
        v.to(out.dtype.element_ty),
        mask=(rows < P)[:, None] & (cs < 16)[None, :],
    )


@triton.jit
def to_pixels(a, pixels, P, BP: tl.constexpr):
    """pixels uint8 [P, 3] = the first channels of a fp16 [P, 16], −1…1 to 0…255, to the nearest, ties to even."""
    rows = tl.program_id(0) * BP + tl.arange(0, BP)
    cs = tl.arange(0, 4)
    live = (rows < P)[:, None] & (cs < 3)[None, :]
    v = tl.load(a + rows[:, None] * 16 + cs[None, :], mask=live, other=0.0).to(tl.float32)
    v = (tl.minimum(tl.maximum(v, -1.0), 1.0) + 1.0) * 127.5
    whole = (v + 0.5).to(tl.int32)
    tie = whole.to(tl.float32) - v == 0.5
    whole = tl.where(tie, whole - (whole & 1), whole)
    tl.store(pixels + rows[:, None] * 3 + cs[None, :], whole.to(tl.uint8), mask=live)


@triton.jit
def channels_last(f_hat, out, P, Z, N, BP: tl.constexpr, BN: tl.constexpr):
    """out fp16 [B, P, N] = f̂ f32 [B, Z, P], zeros from Z on. Grid: pixel tiles × channel tiles × B."""
    b = tl.program_id(2)
    rows = tl.program_id(0) * BP + tl.arange(0, BP)
    cs = tl.program_id(1) * BN + tl.arange(0, BN)
    there = (rows < P)[:, None] & (cs < Z)[None, :]
    v = tl.load(f_hat + (b * Z + cs)[None, :] * P + rows[:, None], mask=there, other=0.0)
    live = (rows < P)[:, None] & (cs < N)[None, :]
    tl.store(out + (b * P + rows)[:, None] * N + cs[None, :], v.to(out.dtype.element_ty), mask=live)
