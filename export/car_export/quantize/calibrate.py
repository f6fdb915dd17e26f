"""Quantization parameters: scale, zero point and smoothing of a matrix product, chosen on sampled activations.

Weights are symmetric INT8 with one scale per output; activations are UINT8 with one scale and one zero point.

Shapes: n sampled rows, K inputs, N outputs, h, w kernel size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from car_export.quantize.statistics import ActivationStats, Floats

_ONE = np.float32(1)
OUTPUTS = 512
"""Columns of a product on which its error is measured."""
POWERS = (0.5, 0.7, 0.85, 1.0)
"""Migration strengths α of SmoothQuant (arXiv 2211.10438, equation 4) that are tried."""
CLIPS = (1.0, 0.9, 0.8)
"""Shares of the range that are tried; values beyond are clipped."""


@dataclass(frozen=True, kw_only=True)
class QuantParams:
    """How a product is quantized."""

    scale: np.float32
    """Quantization of x: x ≈ scale · (x_uint8 − zero_point)."""
    zero_point: np.uint8
    smoothing: Floats | None
    """f32 [K], x is divided by it and the weights are multiplied with it; None: neither."""
    error: float
    """‖quantized − exact‖ ÷ ‖exact‖ of the result, on the sampled rows."""


def calibrate(weight_NK: Floats, stats: ActivationStats, foldable: bool) -> QuantParams:
    """The parameters with the least error on the sampled rows.

    foldable: whether x may be divided channel by channel, which smoothing needs.
    """
    product = ProductError(weight_NK, stats)
    best: QuantParams | None = None
    for power in (None, *POWERS) if foldable else (None,):
        smoothing = None if power is None else _smoothing(weight_NK, stats, power)
        low, high = stats.range(_ONE if smoothing is None else smoothing)
        error_of = product.with_smoothing(smoothing)
        for clip in CLIPS:
            scale, zero_point = activation_params(low * clip, high * clip)
            error = error_of(scale, zero_point)
            if best is None or error < best.error:
                best = QuantParams(scale=scale, zero_point=zero_point, smoothing=smoothing, error=error)
    assert best is not None
    return best


class ProductError:
    """The relative error of a product in INT8, on its sampled rows and at most `OUTPUTS` of its outputs."""

    def __init__(self, weight_NK: Floats, stats: ActivationStats) -> None:
        self._rows_nK = np.concatenate(stats.rows)
        self._some_NK = weight_NK[:: -(-len(weight_NK) // OUTPUTS)]
        self._exact_nN = self._rows_nK @ self._some_NK.T
        self._size = max(float(np.linalg.norm(self._exact_nN)), 1e-30)

    def with_smoothing(self, smoothing: Floats | None) -> Callable[[np.float32, np.uint8], float]:
        """A function from scale and zero point of x to ‖quantized − exact‖ ÷ ‖exact‖."""
        factor = _ONE if smoothing is None else smoothing
        weights, scales = quantize_weights(self._some_NK * factor)
        rounded_KN = (weights * scales[:, None]).T
        rows_nK = self._rows_nK / factor

        def error(scale: np.float32, zero_point: np.uint8) -> float:
            x = np.clip(np.round(rows_nK / scale) + np.float32(zero_point), 0, 255) - np.float32(zero_point)
            return float(np.linalg.norm((x * scale) @ rounded_KN - self._exact_nN)) / self._size

        return error


def activation_params(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of UINT8 for the range low…high, which includes 0."""
    scale = np.float32(max((high - low) / 255, 1e-30))
    return scale, np.uint8(np.clip(np.round(-low / scale), 0, 255))


def quantize_weights(weight_N: Floats) -> tuple[NDArray[np.int8], Floats]:
    """A matrix [N, K], or kernels [N, K, h, w], as INT8 in −127…127, and the scale of each output, f32 [N]."""
    scales = (np.abs(weight_N).reshape(len(weight_N), -1).max(1) / 127).astype(np.float32)
    scales[scales == 0] = 1
    each = scales.reshape(-1, *[1] * (weight_N.ndim - 1))
    return np.clip(np.round(weight_N / each), -127, 127).astype(np.int8), scales


def _smoothing(weight_NK: Floats, stats: ActivationStats, power: float) -> Floats:
    """SmoothQuant's vector, f32 [K], normalised to a geometric mean of 1."""
    largest_x = np.maximum(np.maximum(-stats.low, stats.high), 1e-5)
    largest_w = np.maximum(np.abs(weight_NK).max(0), 1e-5)
    logs = power * np.log(largest_x) - (1 - power) * np.log(largest_w)
    smoothing: Floats = np.exp(logs - logs.mean()).astype(np.float32)
    return smoothing
