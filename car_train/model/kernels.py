"""Matrix products and convolutions of the training step, on the kernel that is fastest for their sizes.

The results are PyTorch's own up to rounding. Without gradients (sampling, export) these are PyTorch's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW_ROWS = 64
"""Below this a matrix product is bound by reading its weights, and an own kernel gains nothing."""


def _float32_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a training step's float32 arithmetic on a CPU with oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`. In float32 on a CPU by oneDNN: PyTorch asks MKL, which was half as fast on AMD's."""
    if x.numel() >= FEW_ROWS * x.shape[-1] and _float32_on_cpu(x, weight):
        return F.linear(x.to_mkldnn(), weight, bias).to_dense()
    return F.linear(x, weight, bias)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q [R, H, N, d] to k and v [R, H, T, d], scores unscaled → [R, H, N, d].

    mask: bool [N, T], true where a query sees a key. Under autocast on a CPU, with gradients, it is written out, with
    scores in the type of autocast: PyTorch's kernel took 2.3 times as long, forward and backward, at 530 tokens.
    """
    written_out = torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    if q.device.type == "cpu" and written_out:
        scores = q @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def convolve(weight: Tensor, bias: Tensor | None, maps: Sequence[Tensor], stride: int = 1) -> list[Tensor]:
    """A 3×3 convolution with padding 1, of feature maps of several sizes [B, C, H, W]; one result for each.

    Where the feature maps together have fewer pixels than each of them would have to read weights, all are one matrix
    product: the weights are read, and their gradient is written, once and not once a map.
    """
    sizes = [((m.shape[2] - 1) // stride + 1, (m.shape[3] - 1) // stride + 1) for m in maps]
    rows = [len(m) * h * w for m, (h, w) in zip(maps, sizes, strict=True)]
    if len(maps) == 1 or 2 * sum(rows) > len(maps) * len(weight) or torch.compiler.is_compiling():
        if weight.shape[1] > 3 and _float32_on_cpu(maps[0], weight):
            # oneDNN's float32 gradient of a strided kernel is four times slower in channels-last.
            weight, maps = weight.contiguous(), [m.contiguous() for m in maps]
        return [F.conv2d(m, weight, bias, stride, 1) for m in maps]
    if torch.is_autocast_enabled(maps[0].device.type):
        maps = [m.to(torch.get_autocast_dtype(m.device.type)) for m in maps]
    # With weights in channels-last, as the trainer has them, this is no copy.
    kernel = weight.permute(0, 2, 3, 1).flatten(1)
    segments = linear(_Windows.apply(stride, *maps), kernel, bias).split(rows)  # type: ignore[no-untyped-call]
    return [p.view(-1, h, w, len(weight)).permute(0, 3, 1, 2) for p, (h, w) in zip(segments, sizes, strict=True)]


class _Windows(torch.autograd.Function):
    """Feature maps [B, C, H, W] → the 3×3 windows of all their pixels, row after row: [ΣB·h·w, 9·C]."""

    @staticmethod
    def forward(ctx: Any, stride: int, *maps: Tensor) -> Tensor:
        ctx.stride, ctx.shapes = stride, [m.shape for m in maps]
        padded = [F.pad(m.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)) for m in maps]
        windows = [p.unfold(1, 3, stride).unfold(2, 3, stride).permute(0, 1, 2, 4, 5, 3) for p in padded]
        C = maps[0].shape[1]
        out = maps[0].new_empty(sum(w.numel() for w in windows) // (9 * C), 9 * C)
        start = 0
        for w in windows:
            stop = start + w.numel() // (9 * C)
            out[start:stop].view(w.shape).copy_(w)
            start = stop
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, start, s = [], 0, ctx.stride
        for B, C, H, W in ctx.shapes:
            h, w = (H - 1) // s + 1, (W - 1) // s + 1
            stop = start + B * h * w
            windows = grad[start:stop].view(B, h, w, 3, 3, C)
            padded = grad.new_zeros(B, H + 2, W + 2, C)
            for i in range(3):
                for j in range(3):
                    padded[:, i : i + s * h : s, j : j + s * w : s][:, :h, :w] += windows[:, :, :, i, j]
            grads.append(padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2))
            start = stop
        return None, *grads
