"""The scale loop: next-scale prediction (VAR section 3.2) with an optional control (CAR section 3).

Shapes: B images; R transformer rows, 2B with guidance (first the conditional ones) or B without; S side of a scale
in tokens; E side of f̂; L tokens per image; C width; Z latent channels; V vocabulary; H heads of width d.

A schedule (car_runtime.schedule) may end guidance before the last scale. From there on the loop goes on with the
first B rows alone, where the backend can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from car_runtime.backends.base import Backend, Buffer, Mark
from car_runtime.buffers import LoopBuffers
from car_runtime.format.manifest import Scale


@dataclass(frozen=True, kw_only=True)
class Step:
    """A scale just made. Later scales overwrite f̂, the next images everything."""

    index: int
    last: bool
    tokens: Buffer
    """int64 [B, S, S]."""
    f_hat: Buffer
    """f32 [B, Z, E, E], the sum of all scales so far."""
    logits: Buffer | None
    """f32 [B, S, S, V], guided; None where the buffers have no place for them."""
    began: Mark
    ended: Mark


def run_scales(
    backend: Backend, scales: Sequence[Scale], constants: Sequence[Mapping[str, Buffer]], buffers: LoopBuffers
) -> Iterator[Step]:
    """Make the scales, coarse first, as far as the schedule that was loaded goes.

    Each step writes its K/V where the later ones read them: nothing is copied, but once where guidance rows go.
    """
    rows, x = buffers.rows, buffers.start
    for k, scale in enumerate(scales[: buffers.drawn]):
        began = backend.mark()
        if k == buffers.unguided_from:
            rows = buffers.without_guidance(k)
            x = rows.next_x[k - 1]
        past, new = slice(0, scale.start), slice(scale.start, scale.stop)
        f_hat, f_hat_out = buffers.f_hat[k % 2], buffers.f_hat[(k + 1) % 2]
        inputs = {"x": x, "modulation": rows.modulation, "f_hat": f_hat, **buffers.inputs[k], **constants[k]}
        outputs = {"tokens": buffers.tokens[k], "f_hat_out": f_hat_out, "next_x": rows.next_x[k]}
        for name, cache_LRHd in rows.cache.items():
            inputs[f"past_{name}"] = cache_LRHd[past]
            outputs[f"new_{name}"] = cache_LRHd[new]
        if buffers.features is not None:
            features_NC = buffers.features[new]
            inputs["control"] = features_NC.reshape((scale.side, scale.side, features_NC.shape[1]))
        if buffers.logits is not None:
            outputs["logits"] = buffers.logits[k]
        buffers.write_noise(k)
        backend.run(backend.step_graph(k, buffers.batch), inputs, outputs)
        yield Step(
            index=k,
            last=k + 1 == buffers.drawn,
            tokens=buffers.tokens[k],
            f_hat=f_hat_out,
            logits=outputs.get("logits"),
            began=began,
            ended=backend.mark(),
        )
        x = rows.next_x[k]
