"""Kernels of whole rows: norms, positions, cross normalisation. One program a row.

Shapes as in `products.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_moments(x, C, EPS: tl.constexpr, BC: tl.constexpr):
    """Mean and variance + EPS of the C numbers at x."""
    total = tl.zeros([BC], tl.float32)
    for c in range(0, C, BC):
        cs = c + tl.arange(0, BC)
        total += tl.load(x + cs, mask=cs < C, other=0.0)
    mean = tl.sum(total, 0) / C
    squares = tl.zeros([BC], tl.float32)
    for c in range(0, C, BC):
        cs = c + tl.arange(0, BC)
        v = tl.load(x + cs, mask=cs < C, other=0.0) - mean
        squares += tl.where(cs < C, v * v, 0.0)
    return mean, tl.sum(squares, 0) / C + EPS


@triton.jit
def ln_mod(x, scale, shift, out, C, R, mod_stride, EPS: tl.constexpr, BC: tl.constexpr):
    """out fp16 [M, C] = LN(x)·(1 + scale) + shift; scale, shift: f32, `mod_stride` apart per r."""
    row = tl.program_id(0)
    x += row * C
    mean, variance = row_moments(x, C, EPS, BC)
    rstd = tl.rsqrt(variance)
    scale += (row % R) * mod_stride
    shift += (row % R) * mod_stride
    for c in range(0, C, BC):
        cs = c + tl.arange(0, BC)
        live = cs < C
        v = (tl.load(x + cs, mask=live, other=0.0) - mean) * rstd
        v = v * (1.0 + tl.load(scale + cs, mask=live, other=0.0)) + tl.load(shift + cs, mask=live, other=0.0)
        tl.store(out + row * C + cs, v.to(out.dtype.element_ty), mask=live)


@triton.jit
def fusion_norm(x, c, weight, bias, out, M, C, c_stride, EPS: tl.constexpr, BC: tl.constexpr):
    """LayerNorm([x, cᵢ])·weightᵢ + biasᵢ as fp16 [branches, M, 2C]. Grid: M rows × branches.

    x: f32 [M, C]; c: f32 [M, C], the next branch's `c_stride` elements on; weight, bias: f32 [branches, 2C].
    """
    row = tl.program_id(0)
    i = tl.program_id(1).to(tl.int64)
    x += row * C
    c += i * c_stride + row * C
    total = tl.zeros([BC], tl.float32)
    for k in range(0, C, BC):
        cs = k + tl.arange(0, BC)
        total += tl.load(x + cs, mask=cs < C, other=0.0) + tl.load(c + cs, mask=cs < C, other=0.0)
    mean = tl.sum(total, 0) / (2 * C)
    squares = tl.zeros([BC], tl.float32)
    for k in range(0, C, BC):
        cs = k + tl.arange(0, BC)
        v = tl.load(x + cs, mask=cs < C, other=0.0) - mean
        u = tl.load(c + cs, mask=cs < C, other=0.0) - mean
        squares += tl.where(cs < C, v * v + u * u, 0.0)
    rstd = tl.rsqrt(tl.sum(squares, 0) / (2 * C) + EPS)
    out += (i * M + row) * 2 * C
    weight += i * 2 * C
    bias += i * 2 * C
    for k in range(0, C, BC):
        cs = k + tl.arange(0, BC)
        live = cs < C
        v = (tl.load(x + cs, mask=live, other=0.0) - mean) * rstd
        v = v * tl.load(weight + cs, mask=live, other=0.0) + tl.load(bias + cs, mask=live, other=0.0)
        tl.store(out + cs, v.to(out.dtype.element_ty), mask=live)
        u = (tl.load(c + cs, mask=live, other=0.0) - mean) * rstd
        u = u * tl.load(weight + C + cs, mask=live, other=0.0) + tl.load(bias + C + cs, mask=live, other=0.0)
        tl.store(out + C + cs, u.to(out.dtype.element_ty), mask=live)


@triton.jit
def fusion_round(c, out, M, C, c_stride, BC: tl.constexpr):
    """cᵢ as fp16 [branches, M, C]. Grid: M rows × branches; c as `fusion_norm` takes it."""
    row = tl.program_id(0)
    i = tl.program_id(1).to(tl.int64)
    for k in range(0, C, BC):
        cs = k + tl.arange(0, BC)
        v = tl.load(c + i * c_stride + row * C + cs, mask=cs < C, other=0.0)
        tl.store(out + (i * M + row) * C + cs, v.to(out.dtype.element_ty), mask=cs < C)


@triton.jit
def cross_norm(x, c, gain, mix, keep, C, R, branches, c_stride, EPS: tl.constexpr, BC: tl.constexpr):
    """x ← keep·x + Σᵢ mixᵢ·(x + gainᵢ·(LN(cᵢ)·deviation(x) + mean(x))), 𝓖 of ControlNeXt, in place.

    x, c: as `fusion_norm` takes them; gain: fp16 [branches, C]; mix: f32 [branches, R]; keep: f32 [R].
    """
    row = tl.program_id(0)
    r = row % R
    x += row * C
    mean, variance = row_moments(x, C, EPS, BC)
    deviation = tl.sqrt(variance)
    for k in range(0, C, BC):
        cs = k + tl.arange(0, BC)
        live = cs < C
        before = tl.load(x + cs, mask=live, other=0.0)
        total = tl.load(keep + r) * before
        for branch in range(branches):
            i = tl.cast(branch, tl.int64)
            one = c + i * c_stride + row * C
            its_mean, its_variance = row_moments(one, C, EPS, BC)
            v = (tl.load(one + cs, mask=live, other=0.0) - its_mean) * tl.rsqrt(its_variance) * deviation + mean
            factor = tl.load(gain + i * C + cs, mask=live, other=0.0).to(tl.float32)
            total += tl.load(mix + i * R + r) * (before + factor * v)
        tl.store(x + cs, total, mask=live)


@triton.jit
def add_position(x, pos, out, tokens, C, R, BC: tl.constexpr):
    """Token-major out f32 [tokens·R, C] = x f32 [R, tokens, C] + pos f32 [tokens, C]."""
    row = tl.program_id(0)
    token, r = row // R, row % R
    for c in range(0, C, BC):
        cs = c + tl.arange(0, BC)
        live = cs < C
        v = tl.load(x + (r * tokens + token) * C + cs, mask=live, other=0.0)
        tl.store(out + row * C + cs, v + tl.load(pos + token * C + cs, mask=live, other=0.0), mask=live)


@triton.jit
def start(label, embedding, first, out, C, BC: tl.constexpr):
    """Start tokens out f32 [R, C] = embedding[label] + first, in fp16. embedding: fp16 [classes + 1, C]."""
    row = tl.program_id(0)
    embedding += tl.load(label + row) * C
    for c in range(0, C, BC):
        cs = c + tl.arange(0, BC)
        live = cs < C
        v = tl.load(embedding + cs, mask=live, other=0.0).to(tl.float32)
        v = (v + tl.load(first + cs, mask=live, other=0.0).to(tl.float32)).to(embedding.dtype.element_ty)
        tl.store(out + row * C + cs, v.to(tl.float32), mask=live)
