"""The training step's kernels compute what PyTorch's own do, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from car_train.config import CARConfig, ModelConfig, VARConfig, VQVAEConfig
from car_train.model import kernels
from car_train.model.car import CAR
from car_train.training.optimizer import match_layout

MODEL = ModelConfig(
    vqvae=VQVAEConfig(sides=(1, 2, 3), vocab=32, latent_channels=8, channels=8, multipliers=(1, 2), res_blocks=1),
    var=VARConfig(depth=2, width=32, heads=2, classes=3),
    car=CARConfig(encoder_widths=(8, 8), encoder_strides=(2,)),
)


def grads(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad((out * torch.randn(out.shape)).sum(), inputs)


def test_linear_is_pytorchs_with_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((2, 70, 48), (40, 48), (40,)))
    called = []
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda t, real=torch.Tensor.to_mkldnn: called.append(1) or real(t))
    ours, theirs = kernels.linear(x, w, b), F.linear(x, w, b)
    assert bool(called) == torch.backends.mkldnn.is_available()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grads(ours, [x, w, b]), grads(theirs, [x, w, b]))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_under_autocast_is_pytorchs_within_bf16(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 3, 14, 8, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        q[:], k[:] = 4 * F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scale = torch.tensor([0] + 4 * [1] + 9 * [2])
    mask = scale[:, None] >= scale if masked else None
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # not what computes it here
    with torch.autocast("cpu", torch.bfloat16):
        ours = kernels.attend(q, k, v, mask).float()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    torch.testing.assert_close(grads(ours, [q, k, v]), grads(theirs, [q, k, v]), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("out", "across"), [(4, False), (300, True)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_convolution_of_many_maps_is_pytorchs_of_each(
    stride: int, out: int, across: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = nn.Conv2d(6, out, 3, padding=1, stride=stride).to(memory_format=layout)  # type: ignore[call-overload]
    maps = [torch.randn(2, 6, s, s, requires_grad=True) for s in (1, 2, 4, 7)]
    called = []
    real = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda *a: called.append(1) or real(*a))
    ours = kernels.convolve(conv.weight, conv.bias, maps, stride)
    assert bool(called) == across
    theirs = [conv(m) for m in maps]
    assert [m.shape for m in ours] == [m.shape for m in theirs]
    inputs = [*maps, conv.weight, conv.bias]
    flat = [torch.cat([m.flatten() for m in found]) for found in (ours, theirs)]
    torch.testing.assert_close(flat[0], flat[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads(flat[0], inputs), grads(flat[1], inputs), rtol=1e-4, atol=1e-4)


def test_all_scales_at_once_are_injected_as_each_by_itself() -> None:
    model = CAR(MODEL)
    branch, base, sides = model.branch, model.base, MODEL.vqvae.sides
    assert branch is not None
    for p in model.parameters():
        p.data.normal_(std=0.2)
    start, inputs = base.start(torch.tensor([0, 2])), torch.randn(2, 13, 8)
    controls = [torch.randn(2, 3, 2 * s, 2 * s) for s in sides]
    ours = branch.inject_all(start, inputs, base.word_embedding, controls, sides)
    grids = torch.cat([start, base.embed(inputs)], 1).split([s * s for s in sides], 1)
    theirs = torch.cat(
        [
            branch.inject(grid.unflatten(1, (s, s)), branch.features(control))
            for grid, s, control in zip(grids, sides, controls, strict=True)
        ],
        1,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    trained = [*branch.input_conv.parameters(), *branch.encoder.parameters()]
    torch.testing.assert_close(grads(ours, trained), grads(theirs, trained), rtol=1e-4, atol=1e-4)


def test_the_fused_step_is_the_plain_one_also_after_a_change_of_layout() -> None:
    first = torch.randn(8, 4, 3, 3)
    gradients = [torch.randn(8, 4, 3, 3) for _ in range(4)]
    last = torch.channels_last
    plain, fused = first.clone().requires_grad_(), first.clone(memory_format=last).requires_grad_()
    optimizers = [torch.optim.AdamW([plain], lr=0.1), torch.optim.AdamW([fused], lr=0.1, fused=True)]
    for i, g in enumerate(gradients):
        plain.grad, fused.grad = g, g.clone(memory_format=last)
        for optimizer in optimizers:
            optimizer.step()
        if i == 1:  # as a run resumed from one in the other layout
            for state in optimizers[1].state.values():
                state["exp_avg"] = state["exp_avg"].contiguous()
            match_layout(optimizers[1])
    torch.testing.assert_close(fused.detach(), plain.detach())
