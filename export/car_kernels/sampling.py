"""From logits to tokens, and from tokens to f̂ and the next scale's input: all in float32.

Shapes: B images, R rows, S side of this scale, T of the next, E side of f̂, Z latent channels, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered_bits(z):
    """float32 as int32 in the same order; −0 and 0 are one."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def from_ordered_bits(key):
    """The inverse of `ordered_bits`."""
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def draw(
    logits, cfg, control_cfg, cfg_ratio, twin, plain, extra, top_k, top_p, uniforms, known, known_mask, tokens,
    guided, border, cells, R, V, N, steered, store, keeps, VP: tl.constexpr,
):  # fmt: skip
    """Guidance, top-k, top-p and the inverse CDF: one token a program. Grid: cells × B.

    logits: f32 [cells, R, N], of which V count. cfg, control_cfg, top_p: f32 [B]; top_k, twin, plain: int64 [B];
    cfg_ratio: f32 [1]; extra: f32 [B, cells, V], added before top-k. uniforms: f32 [B, cells]; known, tokens: int64
    [B, cells]; known_mask: bool. guided: f32 [B, cells, V], written if `store`; border: f32 [B, cells], the least
    logit that top-k and top-p keep, written if `keeps`. `steered`: whether a control guides too.

    The k-th largest logit and the border of top-p are found by bisection on integers in the order of the floats, so
    ties at a border stay together, as in the plan's graph.
    """
    cell, b = tl.program_id(0), tl.program_id(1)
    v = tl.arange(0, VP)
    ok = v < V
    at = b * cells + cell
    ratio = tl.load(cfg_ratio)
    t = tl.load(cfg + b) * ratio
    logits += cell * R * N
    stored = v < N  # of 16 bytes a load: N is a multiple of 16, V any number
    cond = tl.load(logits + b * N + v, mask=stored, other=0.0)
    z = (1.0 + t) * cond - t * tl.load(logits + tl.load(twin + b) * N + v, mask=stored, other=0.0)
    if steered:
        g = tl.load(control_cfg + b) * ratio
        z += g * (cond - tl.load(logits + tl.load(plain + b) * N + v, mask=stored, other=0.0))
    if store:
        tl.store(guided + at * V + v, z, mask=ok)
    z = tl.where(ok, z + tl.load(extra + at * V + v, mask=ok, other=0.0), float("-inf"))
    key = ordered_bits(z)
    least, most = tl.min(tl.where(ok, key, 0x7FFFFFFF)), tl.max(tl.where(ok, key, -0x7FFFFFFF))
    k = tl.load(top_k + b)
    low, high = least.to(tl.int64), most.to(tl.int64)
    for _ in range(32):  # the largest border with at least k keys not below it
        middle = (low + high + 1) >> 1
        enough = tl.sum((ok & (key >= middle.to(tl.int32))).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    # The logits again from their bits, which takes fewer registers than to keep both.
    p = tl.exp(from_ordered_bits(key) - from_ordered_bits(most))
    p = tl.where(ok & (key >= low.to(tl.int32)), p, 0.0)
    share = tl.load(top_p + b) * tl.sum(p)
    high = most.to(tl.int64)
    for _ in range(32):  # the least border above which less than the share has passed
        middle = (low + high) >> 1
        within = tl.sum(tl.where(key > middle.to(tl.int32), p, 0.0)) < share
        high = tl.where(within, middle, high)
        low = tl.where(within, low, middle + 1)
    p = tl.where(ok & (key >= high.to(tl.int32)), p, 0.0)
    if keeps:
        least_kept = tl.min(tl.where(p > 0.0, key, 0x7FFFFFFF))
        tl.store(border + at, from_ordered_bits(least_kept))
    cdf = tl.cumsum(p, 0)
    beyond = (cdf > tl.load(uniforms + at) * tl.max(cdf)) & (p > 0.0)
    # The last kept token where rounding of the sums leaves none beyond: never a token outside of the vocabulary.
    last = tl.maximum(tl.max(tl.where(p > 0.0, v, 0)), 0)
    drawn = tl.minimum(tl.min(tl.where(beyond, v, VP)), last).to(tl.int64)
    token = tl.where(tl.load(known_mask + at) != 0, tl.load(known + at), drawn)
    tl.store(tokens + at, token)


@triton.jit
def smooth(guided, extra, border, noise, cfg_ratio, codes, out, cells, V, Z, VP: tl.constexpr):
    """`more_smooth`: out f32 [B, cells, Z], a Gumbel-softmax mixture of the kept codes. Grid: cells × B.

    guided, extra, noise: f32 [B, cells, V]; border: f32 [B, cells], what `draw` kept; cfg_ratio: f32 [1].
    """
    cell, b = tl.program_id(0), tl.program_id(1)
    v = tl.arange(0, VP)
    ok = v < V
    at = b * cells + cell
    ratio = tl.load(cfg_ratio)
    z = tl.load(guided + at * V + v, mask=ok, other=0.0) + tl.load(extra + at * V + v, mask=ok, other=0.0)
    kept = ok & (z >= tl.load(border + at))
    z = z * (1.0 + ratio) + tl.load(noise + at * V + v, mask=ok, other=0.0)
    z = tl.where(kept, z / tl.maximum(0.27 * (1.0 - 0.95 * ratio), 0.005), float("-inf"))
    p = tl.exp(z - tl.max(z))
    total = tl.sum(p)
    for channel in range(Z):
        code = tl.load(codes + v * Z + channel, mask=ok, other=0.0)
        tl.store(out + at * Z + channel, tl.sum(p * code) / total)


@triton.jit
def upsample(
    tokens, codes, up, smoothed, smooth, known_mask, out, S, E, Z, V, smooths, SP: tl.constexpr, EP: tl.constexpr
):
    """out f32 [B, Z, E, E] = up · codes[tokens] · upᵀ. codes: f32 [V, Z]; up: f32 [E, S]. Grid: Z × B.

    A token outside of 0…V−1 counts as the nearest one inside. If `smooths`, images of `smooth` (bool [B]) take
    `smoothed` f32 [B, S·S, Z] instead where no token is known.
    """
    z, b = tl.program_id(0), tl.program_id(1)
    s, e = tl.arange(0, SP), tl.arange(0, EP)
    grid = (s < S)[:, None] & (s < S)[None, :]
    token = tl.load(tokens + b * S * S + s[:, None] * S + s[None, :], mask=grid, other=0)
    token = tl.minimum(tl.maximum(token, 0), V - 1)
    code = tl.load(codes + token * Z + z, mask=grid, other=0.0)
    if smooths:
        place = b * S * S + s[:, None] * S + s[None, :]
        free = grid & (tl.load(known_mask + place, mask=grid, other=1) == 0) & (tl.load(smooth + b) != 0)
        code = tl.where(free, tl.load(smoothed + place * Z + z, mask=grid, other=0.0), code)
    inside = (e < E)[:, None] & (s < S)[None, :]
    matrix = tl.load(up + e[:, None] * S + s[None, :], mask=inside, other=0.0)
    rows = tl.dot(matrix, code, input_precision="ieee")
    h = tl.dot(rows, tl.trans(matrix), input_precision="ieee")
    where = (b * Z + z) * E * E + e[:, None] * E + e[None, :]
    tl.store(out + where, h, mask=(e < E)[:, None] & (e < E)[None, :])


@triton.jit
def residual(latent, f_hat, down, out, T, E, Z, N, EP: tl.constexpr):
    """out f32 [B, T·T, Z] = down · (latent − f̂) · downᵀ: what a scale is to quantise, channels last. Grid: Z × B.

    latent: fp16 [B, E·E, N], of which Z count; f_hat: f32 [B, Z, E, E]; down: f32 [T, E], T at most E.
    """
    z, b = tl.program_id(0), tl.program_id(1)
    t, e = tl.arange(0, EP), tl.arange(0, EP)
    place = e[:, None] * E + e[None, :]
    whole = (e < E)[:, None] & (e < E)[None, :]
    rest = tl.load(latent + (b * E * E + place) * N + z, mask=whole, other=0.0).to(tl.float32)
    rest -= tl.load(f_hat + (b * Z + z) * E * E + place, mask=whole, other=0.0)
    matrix = tl.load(down + t[:, None] * E + e[None, :], mask=(t < T)[:, None] & (e < E)[None, :], other=0.0)
    small = tl.dot(tl.dot(matrix, rest, input_precision="ieee"), tl.trans(matrix), input_precision="ieee")
    where = (b * T * T + t[:, None] * T + t[None, :]) * Z + z
    tl.store(out + where, small, mask=(t < T)[:, None] & (t < T)[None, :])


@triton.jit
def nearest(rest, codes, grid, tokens, cells, first, L, V, Z, BV: tl.constexpr, BZ: tl.constexpr):
    """The nearest code of each cell by Euclidean distance, the first of several. Grid: cells × B.

    rest: f32 [B, cells, Z]; codes: f32 [V, Z]; grid: int64 [B, cells]; tokens: int64 [B, L], written from `first` on.
    """
    cell, b = tl.program_id(0), tl.program_id(1)
    at = b * cells + cell
    best = tl.full([BV], float("inf"), tl.float32)
    index = tl.zeros([BV], tl.int32)
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        distance = tl.zeros([BV], tl.float32)
        for z in range(0, Z, BZ):
            zs = z + tl.arange(0, BZ)
            live = (v < V)[:, None] & (zs < Z)[None, :]
            code = tl.load(codes + v[:, None] * Z + zs[None, :], mask=live, other=0.0)
            x = tl.load(rest + at * Z + zs, mask=zs < Z, other=0.0)
            distance += tl.sum(code * (code - 2.0 * x[None, :]), 1)
        closer = (v < V) & (distance < best)
        best = tl.where(closer, distance, best)
        index = tl.where(closer, v, index)
    least = tl.min(best)
    token = tl.min(tl.where(best == least, index, V)).to(tl.int64)
    token = tl.minimum(token, V - 1)
    tl.store(grid + at, token)
    tl.store(tokens + b * L + first + cell, token)


@triton.jit
def accumulate(h, f_hat, w, bias, phi, out, E, Z, BP: tl.constexpr, BZ: tl.constexpr):
    """out = f_hat + ½h + ½(conv3(h) + bias) with the φ of number `phi`; f32 [B, Z, E, E]. Grid: pixels × Z × B.

    w: f32 [phis·Z, Z, 3, 3]; bias: f32 [phis·Z]; phi: int64 [1].
    """
    pixels = tl.program_id(0) * BP + tl.arange(0, BP)
    outs = tl.program_id(1) * BZ + tl.arange(0, BZ)
    b = tl.program_id(2)
    first = tl.load(phi).to(tl.int32) * Z
    py, px = pixels // E, pixels % E
    steps = tl.cdiv(Z, BZ)
    acc = tl.zeros([BP, BZ], tl.float32)
    for step in range(0, 9 * steps):
        tap = step // steps
        zs = (step % steps) * BZ + tl.arange(0, BZ)
        y, x = py + tap // 3 - 1, px + tap % 3 - 1
        inside = (pixels < E * E) & (y >= 0) & (y < E) & (x >= 0) & (x < E)
        h_tile = tl.load(
            h + ((b * Z + zs)[None, :] * E + y[:, None]) * E + x[:, None],
            mask=inside[:, None] & (zs < Z)[None, :],
            other=0.0,
        )
        w_tile = tl.load(
            w + ((first + outs)[None, :] * Z + zs[:, None]) * 9 + tap,
            mask=(zs < Z)[:, None] & (outs < Z)[None, :],
            other=0.0,
        )
        acc = tl.dot(h_tile, w_tile, acc, input_precision="ieee")
    live = (pixels < E * E)[:, None] & (outs < Z)[None, :]
    acc += tl.load(bias + first + outs, mask=outs < Z, other=0.0)[None, :]
    where = (b * Z + outs)[None, :] * E * E + pixels[:, None]
    sum_before = tl.load(f_hat + where, mask=live, other=0.0)
    tl.store(out + where, sum_before + (0.5 * tl.load(h + where, mask=live, other=0.0) + 0.5 * acc), mask=live)


@triton.jit
def downsample(f_hat, down, out, T, E, Z, TP: tl.constexpr, EP: tl.constexpr):
    """out fp16 [B, T·T, Z] = down · f_hat · downᵀ, channels last. down: f32 [T, E]. Grid: Z × B."""
    z, b = tl.program_id(0), tl.program_id(1)
    t, e = tl.arange(0, TP), tl.arange(0, EP)
    whole = (e < E)[:, None] & (e < E)[None, :]
    f = tl.load(f_hat + (b * Z + z) * E * E + e[:, None] * E + e[None, :], mask=whole, other=0.0)
    matrix = tl.load(down + t[:, None] * E + e[None, :], mask=(t < T)[:, None] & (e < E)[None, :], other=0.0)
    small = tl.dot(tl.dot(matrix, f, input_precision="ieee"), tl.trans(matrix), input_precision="ieee")
    where = (b * T * T + t[:, None] * T + t[None, :]) * Z + z
    tl.store(out + where, small.to(out.dtype.element_ty), mask=(t < T)[:, None] & (t < T)[None, :])
