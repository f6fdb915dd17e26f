"""The scale loop: next-scale prediction (VAR section 3.2) with an optional control (CAR section 3).

Shapes: B pictures; R transformer rows, 2B with guidance (first the conditional ones) or B without; K scales; S side
of a scale and T of the next, in tokens; E side of f̂; L tokens per picture; C width; Z latent channels; H heads of
width d; M modulation rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends import Backend, Buffer, Mark
from car_runtime.manifest import Manifest, Scale
from car_runtime.sampling import Request, Sampling, uniforms

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
    tokens: Buffer
    """int64 [B, S, S]."""
    f_hat: Buffer
    """f32 [B, Z, E, E], the sum of all scales so far."""
    began: Mark
    ended: Mark


def run_scales(
    backend: Backend, scales: Sequence[Scale], constants: Sequence[Mapping[str, Buffer]], state: State
) -> Iterator[Step]:
    """Make the scales, coarse first. Each step writes its K/V where the later ones read them: nothing is copied."""
    x = state.start
    for k, scale in enumerate(scales):
        past, slot = slice(0, scale.start), slice(scale.start, scale.stop)
        f_hat, f_hat_out = state.f_hat[k % 2], state.f_hat[(k + 1) % 2]
        inputs = {"x": x, "modulation": state.modulation, "f_hat": f_hat, **state.inputs[k], **constants[k]}
        outputs = {"tokens": state.tokens[k], "f_hat_out": f_hat_out, "next_x": state.next_x[k]}
        if state.features is not None:
            inputs["control"] = state.features[slot].reshape((scale.side, scale.side, state.features.shape[1]))
        if state.logits is not None:
            outputs["logits"] = state.logits[k]
        for name, cache_LRHd in state.cache.items():
            inputs[f"past_{name}"] = cache_LRHd[past]
            outputs[f"new_{name}"] = cache_LRHd[slot]
        began = backend.mark()
        backend.run(backend.step_graph(k, state.batch), inputs, outputs)
        yield Step(index=k, tokens=state.tokens[k], f_hat=f_hat_out, began=began, ended=backend.mark())
        x = state.next_x[k]


class State:
    """Every buffer that the loop touches for B pictures in R rows, allocated once and used again for the next ones.

    So a step's addresses are the same from picture to picture, which lets a GPU replay it. `logits` keeps those of
    every scale too, f32 [B, S, S, V], from plans whose step gives them.

    What differs per scale lies scale after scale in one flat buffer, each scale of all pictures in a slot that starts
    at a multiple of `SLOT` elements, so that its [B, S, S] is contiguous, aligned, and goes to the engine as it is.
    """

    def __init__(self, backend: Backend, manifest: Manifest, batch: int, rows: int, logits: bool = False) -> None:
        self.batch, self.rows = batch, rows
        self._backend, self._scales = backend, manifest.scales
        model = manifest.model
        *self._slots, size = accumulate((-(-batch * s.tokens // SLOT) * SLOT for s in manifest.scales), initial=0)
        self._uniforms = backend.allocate((size,), "float32")
        self._known = backend.allocate((size,), "int64")
        self._known_mask = backend.allocate((size,), "bool")
        self._tokens = backend.allocate((size,), "int64")
        backend.write(self._tokens, np.zeros(size, np.int64))  # the gaps between slots are read too
        self._settings = {
            "cfg": backend.allocate((1,), "float32"),
            "top_k": backend.allocate((1,), "int64"),
            "top_p": backend.allocate((1,), "float32"),
        }
        self.tokens = self._per_scale(self._tokens)
        self.inputs = [
            {"uniforms": uniforms_BSS, "known": known_BSS, "known_mask": mask_BSS, **self._settings}
            for uniforms_BSS, known_BSS, mask_BSS in zip(
                self._per_scale(self._uniforms),
                self._per_scale(self._known),
                self._per_scale(self._known_mask),
                strict=True,
            )
        ]
        latent = (batch, model.latent_channels, model.latent_size, model.latent_size)
        self.f_hat = [backend.allocate(latent, "float32") for _ in range(2)]
        self._zeros = backend.allocate(latent, "float32")
        backend.write(self._zeros, np.zeros(latent, np.float32))
        self.image = backend.allocate((batch, model.image_size, model.image_size, 3), "uint8")
        self.start = backend.allocate((rows, 1, 1, model.width), "float32")
        modulation_rows = int(manifest.graphs["condition"].output("modulation").shape[1])
        self.modulation = backend.allocate((rows, modulation_rows, model.width), "float32")
        steered = model.control_type is not None
        self.features = backend.allocate((manifest.tokens, model.width), "float32") if steered else None
        self._condition: Condition | None = None
        self._features: Buffer | None = None
        self._sampling: Sampling | None = None
        self._edited: bool | None = None
        self.logits = None
        if logits:
            flat = backend.allocate((size * model.vocab,), "float32")
            self.logits = self._per_scale(flat, model.vocab)
        self.next_x = self._double_buffered_x(model.width)
        step = manifest.graphs["step"]
        self.cache = {}
        for name in [f"{kind}_{i}" for i in range(model.cache_layers) for kind in ("k", "v")]:
            port = step.output(f"new_{name}")
            heads_and_width = tuple(int(dim) for dim in port.shape[2:])
            self.cache[name] = backend.allocate((manifest.tokens, rows, *heads_and_width), port.dtype)

    def load(self, request: Request, condition: Condition, features: Buffer | None) -> None:
        """Take the inputs of a request for exactly B pictures, and empty f̂.

        condition: of R rows. features: f32 [L, C]. What is here from the last picture is not copied again.
        """
        write, sampling = self._backend.write, request.sampling
        if condition is not self._condition:
            self._backend.copy(condition.start, self.start)
            self._backend.copy(condition.modulation, self.modulation)
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
        if sampling != self._sampling:
            write(self._settings["cfg"], np.array([sampling.cfg], np.float32))
            write(self._settings["top_k"], np.array([sampling.top_k], np.int64))
            write(self._settings["top_p"], np.array([sampling.top_p_input], np.float32))
            self._sampling = sampling
        self._backend.copy(self._zeros, self.f_hat[0])

    def all_tokens(self) -> NDArray[np.int64]:
        """The tokens of all scales, int64 [B, L], picture after picture."""
        flat = self._backend.read(self._tokens)
        slots = zip(self._slots, self._scales, strict=True)
        parts = [flat[at : at + self.batch * s.tokens].reshape(self.batch, s.tokens) for at, s in slots]
        return np.concatenate(parts, axis=1)

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
        shapes = [(self.rows, s.next_side, s.next_side, C) for s in self._scales]
        largest = max(math.prod(shape) for shape in shapes)
        pair = [self._backend.allocate((largest,), "float32") for _ in range(2)]
        return [pair[k % 2][: math.prod(shape)].reshape(shape) for k, shape in enumerate(shapes)]
