"""The scale loop: next-scale prediction (VAR section 3.2) with an optional control (CAR section 3).

Shapes: B pictures; R transformer rows, 2B with guidance (first the conditional ones) or B without; K scales; S side
of a scale and T of the next, in tokens; E side of f̂; L tokens per picture; C width; Z latent channels; H heads of
width d; M modulation rows.

A schedule (car_runtime.schedule) may end guidance before the last scale. From there on the loop goes on with the
first B rows alone, where the backend can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.base import Backend, Buffer, Mark
from car_runtime.format.manifest import Manifest, Scale
from car_runtime.request import Request, Sampling, uniforms
from car_runtime.schedule import Schedule

SLOT = 256
"""TensorRT wants addresses that are multiples of 256 bytes."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the class contributes, computed once an image: f32 [R, 1, 1, C] and [R, M, C]."""

    start: Buffer
    modulation: Buffer


@dataclass(frozen=True, kw_only=True)
class Step:
    """A scale just made. The buffers are overwritten by later scales."""

    index: int
    last: bool
    tokens: Buffer
    """int64 [B, S, S]."""
    f_hat: Buffer
    """f32 [B, Z, E, E], the sum of all scales so far."""
    began: Mark
    ended: Mark


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a step reads and writes of its transformer rows: of all R, or of the first B alone."""

    modulation: Buffer
    """f32 [R, M, C]."""
    next_x: Sequence[Buffer]
    """f32 [R, T, T, C], one per scale."""
    cache: Mapping[str, Buffer]
    """K and V of each layer, [L, R, H, d]."""


def run_scales(
    backend: Backend, scales: Sequence[Scale], constants: Sequence[Mapping[str, Buffer]], state: State
) -> Iterator[Step]:
    """Make the scales, coarse first, as far as the state's schedule goes.

    Each step writes its K/V where the later ones read them: nothing is copied, but once where guidance rows go.
    """
    rows, x = state.rows, state.start
    for k, scale in enumerate(scales[: state.drawn]):
        began = backend.mark()
        if k == state.unguided_from:
            rows = state.without_guidance(k)
            x = rows.next_x[k - 1]
        past, slot = slice(0, scale.start), slice(scale.start, scale.stop)
        f_hat, f_hat_out = state.f_hat[k % 2], state.f_hat[(k + 1) % 2]
        inputs = {"x": x, "modulation": rows.modulation, "f_hat": f_hat, **state.inputs[k], **constants[k]}
        outputs = {"tokens": state.tokens[k], "f_hat_out": f_hat_out, "next_x": rows.next_x[k]}
        if state.features is not None:
            inputs["control"] = state.features[slot].reshape((scale.side, scale.side, state.features.shape[1]))
        if state.logits is not None:
            outputs["logits"] = state.logits[k]
        for name, cache_LRHd in rows.cache.items():
            inputs[f"past_{name}"] = cache_LRHd[past]
            outputs[f"new_{name}"] = cache_LRHd[slot]
        backend.run(backend.step_graph(k, state.batch), inputs, outputs)
        yield Step(
            index=k,
            last=k + 1 == state.drawn,
            tokens=state.tokens[k],
            f_hat=f_hat_out,
            began=began,
            ended=backend.mark(),
        )
        x = rows.next_x[k]


class State:
    """Every buffer that the loop touches for B pictures in R rows, allocated once and used again for the next ones.

    So a step's addresses are the same from picture to picture, which lets a GPU replay it. `logits` keeps those of
    every scale too, f32 [B, S, S, V], from plans whose step gives them.

    What differs per scale lies scale after scale in one flat buffer, each scale of all pictures in a slot that starts
    at a multiple of `SLOT` elements, so that its [B, S, S] is contiguous, aligned, and goes to the engine as it is.
    """

    def __init__(self, backend: Backend, manifest: Manifest, batch: int, rows: int, logits: bool = False) -> None:
        self.batch, self.row_count = batch, rows
        self._backend, self._manifest, self._scales = backend, manifest, manifest.scales
        model = manifest.model
        *self._slots, size = accumulate((-(-batch * s.tokens // SLOT) * SLOT for s in manifest.scales), initial=0)
        self._uniforms = backend.allocate((size,), "float32")
        self._known = backend.allocate((size,), "int64")
        self._known_mask = backend.allocate((size,), "bool")
        self._tokens = backend.allocate((size,), "int64")
        backend.write(self._tokens, np.zeros(size, np.int64))  # the gaps between slots are read too
        self._cfg = backend.allocate((len(manifest.scales) * SLOT,), "float32")
        self._top_k = backend.allocate((1,), "int64")
        self._top_p = backend.allocate((1,), "float32")
        self.tokens = self._per_scale(self._tokens)
        self.inputs = self._step_inputs()
        latent = (batch, model.latent_channels, model.latent_size, model.latent_size)
        self.f_hat = [backend.allocate(latent, "float32") for _ in range(2)]
        self._zeros = backend.allocate(latent, "float32")
        backend.write(self._zeros, np.zeros(latent, np.float32))
        self.image = backend.allocate((batch, model.image_size, model.image_size, 3), "uint8")
        self.start = backend.allocate((rows, 1, 1, model.width), "float32")
        modulation_rows = int(manifest.graphs["condition"].output("modulation").shape[1])
        modulation = backend.allocate((rows, modulation_rows, model.width), "float32")
        steered = model.control_type is not None
        self.features = backend.allocate((manifest.tokens, model.width), "float32") if steered else None
        self._condition: Condition | None = None
        self._features: Buffer | None = None
        self._sampling: tuple[Sampling, Schedule] | None = None
        self._edited: bool | None = None
        self.logits = None
        if logits:
            flat = backend.allocate((size * model.vocab,), "float32")
            self.logits = self._per_scale(flat, model.vocab)
        next_x = self._double_buffered_x(model.width)
        self.rows = Rows(modulation=modulation, next_x=next_x, cache=self._allocate_cache(rows))
        self._first_rows: Rows | None = None
        self.drawn = len(manifest.scales)
        """Scales that the request wants."""
        self.unguided_from: int | None = None
        """The scale from which on the first B rows are all that is needed."""

    def load(self, request: Request, condition: Condition, features: Buffer | None) -> None:
        """Take the inputs of a request for exactly B pictures, and empty f̂.

        condition: of R rows. features: f32 [L, C]. What is here from the last picture is not copied again.
        """
        write, sampling, schedule = self._backend.write, request.sampling, request.schedule
        if condition is not self._condition:
            self._backend.copy(condition.start, self.start)
            self._backend.copy(condition.modulation, self.rows.modulation)
            self._condition = condition
        if features is not None and features is not self._features:
            assert self.features is not None
            self._backend.copy(features, self.features)
            self._features = features
        noise_BL = uniforms(request.seeds, request.known.shape[1])
        write(self._uniforms, self._scale_major(noise_BL))
        edited = bool(request.known_mask.any())
        if edited or self._edited is not False:
            write(self._known, self._scale_major(request.known))
            write(self._known_mask, self._scale_major(request.known_mask))
            self._edited = edited
        if (sampling, schedule) != self._sampling:
            cfg = np.zeros(self._cfg.shape, np.float32)
            cfg[SLOT * schedule.cfg_scales.start : SLOT * schedule.cfg_scales.stop] = sampling.cfg
            write(self._cfg, cfg)
            write(self._top_k, np.array([sampling.top_k], np.int64))
            write(self._top_p, np.array([sampling.top_p_input], np.float32))
            self._sampling = (sampling, schedule)
        self.drawn = schedule.drawn
        spare = self.row_count > self.batch and not self._backend.guided_only
        self.unguided_from = schedule.unguided_from if spare else None
        self._backend.copy(self._zeros, self.f_hat[0])

    def without_guidance(self, k: int) -> Rows:
        """The first B rows alone, with their K/V of the scales before k, to go on with from there.

        The past is copied, since in [L, 2B, H, d] it has gaps. These buffers, too, are made once and used again.
        """
        if self._first_rows is None:
            self._first_rows = Rows(
                modulation=self.rows.modulation[: self.batch],
                next_x=[x_RTTC[: self.batch] for x_RTTC in self.rows.next_x],
                cache=self._allocate_cache(self.batch),
            )
        past = slice(0, self._scales[k].start)
        for name, cache_LRHd in self.rows.cache.items():
            self._backend.copy_rows(cache_LRHd[past], self._first_rows.cache[name][past])
        return self._first_rows

    def all_tokens(self) -> NDArray[np.int64]:
        """The tokens of all scales, int64 [B, L], picture after picture; −1 at scales that were not drawn."""
        flat = self._backend.read(self._tokens)
        tokens_BL = np.full((self.batch, self._scales[-1].stop), -1, np.int64)
        for at, s in zip(self._slots[: self.drawn], self._scales, strict=False):
            tokens_BL[:, s.start : s.stop] = flat[at : at + self.batch * s.tokens].reshape(self.batch, s.tokens)
        return tokens_BL

    def _step_inputs(self) -> list[dict[str, Buffer]]:
        """What each scale takes of a request. `cfg` has a place for each, so that a schedule changes no address."""
        flat = {"uniforms": self._uniforms, "known": self._known, "known_mask": self._known_mask}
        views = {name: self._per_scale(buffer) for name, buffer in flat.items()}
        return [
            {
                **{name: per_scale[k] for name, per_scale in views.items()},
                "cfg": self._cfg[SLOT * k : SLOT * k + 1],
                "top_k": self._top_k,
                "top_p": self._top_p,
            }
            for k in range(len(self._scales))
        ]

    def _per_scale(self, flat: Buffer, V: int = 1) -> list[Buffer]:
        """Views [B, S, S] of a flat buffer, one per scale, or [B, S, S, V]."""
        B, last = self.batch, (V,) if V > 1 else ()
        slots = zip(self._slots, self._scales, strict=True)
        return [flat[V * at : V * (at + B * s.tokens)].reshape((B, s.side, s.side, *last)) for at, s in slots]

    def _scale_major(self, values_BL: NDArray[np.generic]) -> NDArray[np.generic]:
        flat = np.zeros(self._uniforms.shape, values_BL.dtype)
        for at, s in zip(self._slots, self._scales, strict=True):
            flat[at : at + self.batch * s.tokens] = values_BL[:, s.start : s.stop].reshape(-1)
        return flat

    def _double_buffered_x(self, C: int) -> list[Buffer]:
        """Views [R, T, T, C], one per scale, of two buffers in turn: a step reads one and writes the other."""
        shapes = [(self.row_count, s.next_side, s.next_side, C) for s in self._scales]
        largest = max(math.prod(shape) for shape in shapes)
        pair = [self._backend.allocate((largest,), "float32") for _ in range(2)]
        return [pair[k % 2][: math.prod(shape)].reshape(shape) for k, shape in enumerate(shapes)]

    def _allocate_cache(self, R: int) -> dict[str, Buffer]:
        """K and V of every layer, [L, R, H, d]."""
        manifest = self._manifest
        step, cache = manifest.graphs["step"], {}
        for name in [f"{kind}_{i}" for i in range(manifest.model.cache_layers) for kind in ("k", "v")]:
            port = step.output(f"new_{name}")
            dtype = self._backend.cache_dtype or port.dtype
            heads_and_width = tuple(int(dim) for dim in port.shape[2:])
            cache[name] = self._backend.allocate((manifest.tokens, R, *heads_and_width), dtype)
        return cache
