"""Attention of one scale's queries on everything so far. No mask: a scale sees itself and all coarser ones."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attention(q, k, v, out, tokens, past, C, R, D: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr):
    """out fp16 [tokens·R, C] = softmax(q · kᵀ) · v, f32 softmax. Grid: R·H heads × query tiles.

    q: fp16 [tokens·R, C], scaled already; k, v: fp16 [(past + tokens)·R, C], token-major, a head D wide.
    """
    H = C // D
    g = tl.program_id(0)
    r, head = g // H, g % H
    T = past + tokens
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    live = (rows < tokens)[:, None]
    cols = head * D + tl.arange(0, D)
    q_tile = tl.load(q + (rows[:, None] * R + r) * C + cols[None, :], mask=live, other=0.0)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for start in range(0, T, BT):
        ts = start + tl.arange(0, BT)
        seen = ts < T
        k_tile = tl.load(k + (ts[None, :] * R + r) * C + cols[:, None], mask=seen[None, :], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(q_tile, k_tile), float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - new[:, None])
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(p, 1)
        v_tile = tl.load(v + (ts[:, None] * R + r) * C + cols[None, :], mask=seen[:, None], other=0.0)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        top = new
    acc = acc / total[:, None]
    tl.store(out + (rows[:, None] * R + r) * C + cols[None, :], acc.to(out.dtype.element_ty), mask=live)
