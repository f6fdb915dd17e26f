"""Every buffer that the scale loop touches, allocated once and used again for the next images.

So a step's addresses are the same from image to image, which lets a GPU replay it.

Shapes: B images; R transformer rows, 2B with guidance (first the conditional ones) or B without; K scales; S side of
a scale and T of the next, in tokens; E side of f̂; L tokens per image; C width; Z latent channels; V vocabulary;
H heads of width d; M modulation rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.base import Backend, Buffer
from car_runtime.conditioning import Condition
from car_runtime.format.manifest import Manifest
from car_runtime.request import Request, Sampling, SmoothNoise, noise_of
from car_runtime.schedule import Schedule

SLOT = 256
"""TensorRT wants addresses that are multiples of 256 bytes."""


@dataclass(frozen=True, kw_only=True)
class RowBuffers:
    """What a step reads and writes of its transformer rows: of all R, or of the first B alone."""

    modulation: Buffer
    """f32 [R, M, C]."""
    next_x: Sequence[Buffer]
    """f32 [R, T, T, C], one per scale."""
    cache: Mapping[str, Buffer]
    """K and V of each layer, [L, R, H, d]."""


class LoopBuffers:
    """The buffers for B images in R rows. `load` fills them for a request, `run_scales` works on them.

    What differs per scale lies scale after scale in one flat buffer, each scale of all images in a slot that starts
    at a multiple of `SLOT` elements, so that its [B, S, S] is contiguous, aligned, and goes to the engine as it is.
    """

    def __init__(self, backend: Backend, manifest: Manifest, batch: int, rows: int, logits: bool = False) -> None:
        self.batch, self.row_count = batch, rows
        self._backend, self._manifest, self._scales = backend, manifest, manifest.scales
        model = manifest.model
        *self._slots, size = accumulate((-(-batch * s.tokens // SLOT) * SLOT for s in manifest.scales), initial=0)
        self._allocate_inputs(size)
        self._noise: SmoothNoise | None = None
        self._smooth: Buffer | None = None
        if manifest.more_smooth:
            self._allocate_smooth()
        self.inputs = self._step_inputs()
        """What each scale takes of a request, by the step's input names."""
        self._tokens = backend.allocate((size,), "int64")
        backend.write(self._tokens, np.zeros(size, np.int64))  # the gaps between slots are read too
        self.tokens = self._per_scale(self._tokens)
        """int64 [B, S, S], one per scale."""
        latent = (batch, model.latent_channels, model.latent_size, model.latent_size)
        self.f_hat = [backend.allocate(latent, "float32") for _ in range(2)]
        """f32 [B, Z, E, E]: a step reads one and writes the other."""
        self._zeros = backend.allocate(latent, "float32")
        backend.write(self._zeros, np.zeros(latent, np.float32))
        self.image = backend.allocate((batch, model.image_size, model.image_size, 3), "uint8")
        self.start = backend.allocate((rows, 1, 1, model.width), "float32")
        modulation_rows = int(manifest.graphs["condition"].output("modulation").shape[1])
        modulation = backend.allocate((rows, modulation_rows, model.width), "float32")
        steered = model.control_type is not None
        self.features = backend.allocate((manifest.tokens, model.width), "float32") if steered else None
        """The control's, f32 [L, C]."""
        self.logits = None
        """f32 [B, S, S, V], one per scale, where they were asked for: guided, before top-k and top-p."""
        if logits:
            flat = backend.allocate((size * model.vocab,), "float32")
            self.logits = self._per_scale(flat, model.vocab)
        next_x = self._double_buffered_x(model.width)
        self.rows = RowBuffers(modulation=modulation, next_x=next_x, cache=self._allocate_cache(rows))
        self._first_rows: RowBuffers | None = None
        self.drawn = len(manifest.scales)
        """Scales that the request wants."""
        self.unguided_from: int | None = None
        """The scale from which on the first B rows are all that is needed."""
        self._loaded = _Loaded()

    @property
    def final_f_hat(self) -> Buffer:
        """f̂ after the last scale that is drawn, f32 [B, Z, E, E]."""
        return self.f_hat[self.drawn % 2]

    def load(self, request: Request, condition: Condition, features: Buffer | None) -> None:
        """Take the inputs of a request for exactly B images, and empty f̂.

        condition: of R rows. features: f32 [L, C]. What is here from the last images is not copied again.
        """
        loaded = self._loaded
        if condition is not loaded.condition:
            self._backend.copy(condition.start, self.start)
            self._backend.copy(condition.modulation, self.rows.modulation)
            loaded.condition = condition
        if features is not None and features is not loaded.features:
            assert self.features is not None
            self._backend.copy(features, self.features)
            loaded.features = features
        self._backend.write(self._uniforms, self._scale_major(noise_of(request)))
        edited = bool(request.known_mask.any())
        if edited or loaded.edited is not False:
            self._backend.write(self._known, self._scale_major(request.known))
            self._backend.write(self._known_mask, self._scale_major(request.known_mask))
            loaded.edited = edited
        sampling = request.sampling if request.guided else replace(request.sampling, cfg=0.0)
        if (sampling, request.schedule) != loaded.sampling:
            self._write_sampling(sampling, request.schedule)
            loaded.sampling = (sampling, request.schedule)
        self.drawn = request.schedule.drawn
        spare = self.row_count > self.batch and not self._backend.guided_only
        self.unguided_from = request.schedule.unguided_from if spare else None
        self._backend.copy(self._zeros, self.f_hat[0])
        if self._smooth is not None and request.more_smooth is not loaded.smooth:
            self._backend.write(self._smooth, np.array([request.more_smooth]))
            loaded.smooth = request.more_smooth
        self._noise = SmoothNoise(request.seeds) if request.more_smooth else None

    def write_noise(self, k: int) -> None:
        """Before scale k, and for every scale in turn: the noise that its codes are mixed by, where they are."""
        if self._noise is None:
            return
        values = self._noise.next(self._scales[k].tokens, self._manifest.model.vocab)
        target = self.inputs[k]["smooth_noise"]
        self._backend.write(target, values.reshape(target.shape))

    def without_guidance(self, k: int) -> RowBuffers:
        """The first B rows alone, with their K/V of the scales before k, to go on with from there.

        The past is copied, since in [L, 2B, H, d] it has gaps. These buffers, too, are made once and used again.
        """
        if self._first_rows is None:
            self._first_rows = RowBuffers(
                modulation=self.rows.modulation[: self.batch],
                next_x=[x_RTTC[: self.batch] for x_RTTC in self.rows.next_x],
                cache=self._allocate_cache(self.batch),
            )
        past = slice(0, self._scales[k].start)
        for name, cache_LRHd in self.rows.cache.items():
            self._backend.copy_rows(cache_LRHd[past], self._first_rows.cache[name][past])
        return self._first_rows

    def all_tokens(self) -> NDArray[np.int64]:
        """The tokens of all scales, int64 [B, L], image after image; −1 at scales that were not drawn."""
        flat = self._backend.read(self._tokens)
        tokens_BL = np.full((self.batch, self._scales[-1].stop), -1, np.int64)
        for at, s in zip(self._slots[: self.drawn], self._scales, strict=False):
            tokens_BL[:, s.start : s.stop] = flat[at : at + self.batch * s.tokens].reshape(self.batch, s.tokens)
        return tokens_BL

    def _allocate_inputs(self, size: int) -> None:
        """What a request brings; `size` elements hold one value per token, scale after scale."""
        self._uniforms = self._backend.allocate((size,), "float32")
        self._known = self._backend.allocate((size,), "int64")
        self._known_mask = self._backend.allocate((size,), "bool")
        self._cfg = self._backend.allocate((len(self._scales) * SLOT,), "float32")
        self._top_k = self._backend.allocate((1,), "int64")
        self._top_p = self._backend.allocate((1,), "float32")

    def _allocate_smooth(self) -> None:
        """For a plan that can mix codes by noise: room for the noise of one scale, which all take in turn.

        The step reads it even where nothing is mixed; then it is zeros.
        """
        self._smooth = self._backend.allocate((1,), "bool")
        largest = self.batch * max(s.tokens for s in self._scales) * self._manifest.model.vocab
        self._smooth_noise = self._backend.allocate((largest,), "float32")
        self._backend.write(self._smooth_noise, np.zeros(largest, np.float32))

    def _smooth_inputs(self, k: int) -> dict[str, Buffer]:
        if self._smooth is None:
            return {}
        s, V = self._scales[k], self._manifest.model.vocab
        noise = self._smooth_noise[: self.batch * s.tokens * V].reshape((self.batch, s.side, s.side, V))
        return {"smooth": self._smooth, "smooth_noise": noise}

    def _step_inputs(self) -> list[dict[str, Buffer]]:
        """`cfg` has a place for each scale, so that a schedule changes no address."""
        flat = {"uniforms": self._uniforms, "known": self._known, "known_mask": self._known_mask}
        views = {name: self._per_scale(buffer) for name, buffer in flat.items()}
        return [
            {
                **{name: per_scale[k] for name, per_scale in views.items()},
                **self._smooth_inputs(k),
                "cfg": self._cfg[SLOT * k : SLOT * k + 1],
                "top_k": self._top_k,
                "top_p": self._top_p,
            }
            for k in range(len(self._scales))
        ]

    def _write_sampling(self, sampling: Sampling, schedule: Schedule) -> None:
        cfg = np.zeros(self._cfg.shape, np.float32)
        cfg[SLOT * schedule.cfg_scales.start : SLOT * schedule.cfg_scales.stop] = sampling.cfg
        self._backend.write(self._cfg, cfg)
        self._backend.write(self._top_k, np.array([sampling.top_k], np.int64))
        self._backend.write(self._top_p, np.array([sampling.top_p_input], np.float32))

    def _per_scale(self, flat: Buffer, V: int = 1) -> list[Buffer]:
        """Views [B, S, S] of a flat buffer, one per scale, or [B, S, S, V]."""
        B, last = self.batch, (V,) if V > 1 else ()
        slots = zip(self._slots, self._scales, strict=True)
        return [flat[V * at : V * (at + B * s.tokens)].reshape((B, s.side, s.side, *last)) for at, s in slots]

    def _scale_major(self, values_BL: NDArray[np.generic]) -> NDArray[np.generic]:
        """Values [B, L] as the flat buffers have them: scale after scale, each of all images."""
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


@dataclass
class _Loaded:
    """What of the last request is in the buffers."""

    condition: Condition | None = None
    features: Buffer | None = None
    sampling: tuple[Sampling, Schedule] | None = None
    edited: bool | None = None
    """Whether any token is known; None: the buffers were never written."""
    smooth: bool | None = None
    """What `smooth` says."""
