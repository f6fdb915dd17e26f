"""A PyTorch model in half precision as tensor cores compute it: the strict side of the measurement.

Shapes: L tokens of an image; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from car_export.precision.case import Case
from car_train.model import Model
from car_train.model.sample import mix
from car_train.model.vqvae import split_tokens


class Rounding(TorchDispatchMode):
    """Products of half-precision tensors as tensor cores make them: summed in float32, the result rounded.

    On CPUs without such instructions PyTorch's own half-precision kernels are up to a hundred times as slow.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        halves = {a.dtype for a in args if isinstance(a, Tensor) and a.dtype in (torch.float16, torch.bfloat16)}
        if func.overloadpacket not in _PRODUCTS or not halves:
            return func(*args, **given)
        floats = [a.float() if isinstance(a, Tensor) else a for a in args]
        result = func(*floats, **{k: v.float() if isinstance(v, Tensor) else v for k, v in given.items()})
        (dtype,) = halves
        return result.to(dtype) if isinstance(result, Tensor) else (result[0].to(dtype), *result[1:])


_PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.convolution,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
}


@torch.no_grad()
def torch_logits(model: Model, case: Case) -> Tensor:
    """Guided logits [L, V] of a model in any type, teacher-forced in one pass: every operator's result is rounded."""
    car, config = model.car, model.config.vqvae
    assert car is not None
    grids = split_tokens(case.tokens[None], config.sides)
    _, inputs = model.vqvae.quantizer.decode(grids)
    labels = torch.tensor([case.label, car.base.config.classes])
    with Rounding():
        logits_2LV = car(labels, inputs.repeat(2, 1, 1), case.pyramid)
    ratio = torch.cat([torch.full((s * s,), r) for s, r in zip(config.sides, config.ratios, strict=True)])
    return mix(logits_2LV, case.cfg * ratio[:, None], 1)[0]
