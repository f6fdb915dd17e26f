"""Every buffer that the scale loop touches, allocated once and used again for the next images.

So a step's addresses are the same from image to image, which lets a GPU replay it.

Shapes: B images; R transformer rows (car_runtime.batch); m branches; h blocks of a branch; K scales; S side of a
scale and T of the next, in tokens; E side of f̂; L tokens per image; C width; Z latent channels; V vocabulary; H
heads of width d; M modulation rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.base import Backend, Buffer
from car_runtime.batch import Drawing, Rows
from car_runtime.conditioning import Condition
from car_runtime.format.manifest import Graph, Manifest
from car_runtime.request import SmoothNoise, noise_of
from car_runtime.watermark import Watermark

SLOT = 256
"""TensorRT wants addresses that are multiples of 256 bytes."""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """What steers a batch: of the class, and of the branches that are mixed into it."""

    condition: Condition
    """Of R rows."""
    modulations: Mapping[str, Buffer | None]
    """Branch → f32 [R, M, C] of its blocks; empty in format 1, whose step has them among the base's."""
    features: Mapping[str, Sequence[Buffer]]
    """Branch → f32 [L, C] per image; in format 1 one for all images."""
    fusions: Mapping[str, Buffer]
    """Step input name → [m, …], the parameters of 𝓖; empty in format 1."""
    watermarks: Sequence[Watermark | None] = ()
    """Per image; empty where no image has one."""


@dataclass(frozen=True, kw_only=True)
class RowBuffers:
    """What steps read and write of a batch's transformer rows."""

    rows: Rows
    modulation: Buffer
    """f32 [R, M, C], the base's."""
    modulations: Mapping[str, Buffer | None]
    """Branch → f32 [R, M, C]."""
    next_x: Sequence[Buffer]
    """f32 [R, T, T, C], one per scale."""
    cache: Mapping[str, Buffer]
    """K and V of each layer of the step, [L, R, H, d]."""
    caches: Mapping[str, Mapping[str, Buffer]]
    """Branch → K and V of each of its layers, likewise."""
    inputs: Mapping[str, Buffer]
    """Step inputs that say what the rows are: `rows`, `twin`, `plain`, `mix`, `keep`; empty in format 1."""
    outputs: Sequence[Buffer]
    """What the branches give the step, `c` f32 [m, h, S, S, R, C], one per scale; empty where the step takes none."""


class LoopBuffers:
    """The buffers for B images and, at first, so many rows. `load` fills them for a batch, `ScaleLoop` works on them.

    What differs per scale lies scale after scale in one flat buffer, each scale of all images in a slot that starts
    at a multiple of `SLOT` elements, so that its [B, S, S] is contiguous, aligned, and goes to the engine as it is.
    """

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        batch: int,
        rows: int,
        logits: bool = False,
        branches: tuple[str, ...] = (),
    ) -> None:
        self.batch, self.row_count, self.branches = batch, rows, branches
        self._backend, self._manifest, self._scales = backend, manifest, manifest.scales
        self.own_settings = manifest.format > 1
        """Whether each image has settings and a control of its own."""
        model = manifest.model
        *self._slots, size = accumulate((-(-batch * s.tokens // SLOT) * SLOT for s in manifest.scales), initial=0)
        self._allocate_inputs(size)
        self._watermarks: Sequence[Watermark | None] = ()
        self._noise: SmoothNoise | None = None
        self._smooth: Buffer | None = None
        if manifest.more_smooth:
            self._allocate_smooth()
        self.inputs = self._step_inputs()
        """What each scale takes of a batch, by the step's input names."""
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
        self._features = {branch: self._allocate_features() for branch in branches}
        self.features = {branch: self._features_per_scale(flat) for branch, flat in self._features.items()}
        """Branch → the control's features, one per scale: f32 [B, S, S, C], in format 1 [S, S, C]."""
        self.fusions: Mapping[str, Buffer] = {}
        """Step input name → [m, …]."""
        self.logits = None
        """f32 [B, S, S, V], one per scale, where they were asked for: guided, before top-k and top-p."""
        if logits:
            flat = backend.allocate((size * model.vocab,), "float32")
            self.logits = self._per_scale(flat, model.vocab)
        self._row_buffers: dict[tuple[int, bool], RowBuffers] = {}
        self._weights: list[list[float]] = []
        """Image → the weight of each branch."""
        self.rows: RowBuffers
        """Of the rows at the first scale."""
        self.drawn = len(manifest.scales)
        """Scales that the batch wants."""
        self._loaded = _Loaded()

    @property
    def final_f_hat(self) -> Buffer:
        """f̂ after the last scale that is drawn, f32 [B, Z, E, E]."""
        return self.f_hat[self.drawn % 2]

    @property
    def brings_codes(self) -> bool:
        """Whether `write_codes` has anything to write."""
        return self._noise is not None or bool(self._watermarks)

    def load(self, batch: Sequence[Drawing], rows: Rows, steering: Steering) -> None:
        """Take the inputs of exactly B images, and empty f̂. What is here from the last ones is not copied again."""
        loaded, backend = self._loaded, self._backend
        self._weights = [[control.weight for control in drawing.request.controls] for drawing in batch]
        if steering.condition is not loaded.condition:
            backend.copy(steering.condition.start, self.start)
        self.rows = self._rows(rows)
        if steering.condition is not loaded.condition:
            backend.copy(steering.condition.modulation, self.rows.modulation)
            loaded.condition = steering.condition
        for branch, modulation in steering.modulations.items():
            target = self.rows.modulations[branch]
            if modulation is not None and target is not None and modulation is not loaded.modulations.get(branch):
                backend.copy(modulation, target)
                loaded.modulations[branch] = modulation
        for branch, features in steering.features.items():
            for i, one in enumerate(features):
                if one is not loaded.features.get((branch, i)):
                    self._load_features(branch, i, one)
                    loaded.features[branch, i] = one
        self.fusions = steering.fusions
        if self._watermarks and not steering.watermarks:
            backend.write(self._bias, np.zeros(self._bias.shape, np.float32))
        self._watermarks = steering.watermarks
        noise = np.concatenate([noise_of(drawing.request, [drawing.index]) for drawing in batch])
        backend.write(self._uniforms, self._scale_major(noise))
        edited = any(bool(drawing.request.known_mask[drawing.index].any()) for drawing in batch)
        if edited or loaded.edited is not False:
            known = np.stack([drawing.request.known[drawing.index] for drawing in batch])
            mask = np.stack([drawing.request.known_mask[drawing.index] for drawing in batch])
            backend.write(self._known, self._scale_major(known))
            backend.write(self._known_mask, self._scale_major(mask))
            loaded.edited = edited
        self._write_settings(batch)
        self.drawn = batch[0].request.schedule.drawn
        backend.copy(self._zeros, self.f_hat[0])

    def write_codes(self, k: int) -> None:
        """Before scale k, and for every scale in turn: what there is for each code of each token.

        The noise that codes are mixed by, and what watermarks add to their logits.
        """
        inputs = self.inputs[k]
        if self._noise is not None:
            values = self._noise.next(self._scales[k].tokens, self._manifest.model.vocab)
            self._backend.write(inputs["smooth_noise"], values.reshape(inputs["smooth_noise"].shape))
        if self._watermarks:
            bias = np.zeros(inputs["bias"].shape, np.float32)
            for image, watermark in enumerate(self._watermarks):
                if watermark is not None:
                    bias[image] = watermark.bias(k)
            self._backend.write(inputs["bias"], bias)

    def narrowed(
        self, k: int, x: Buffer, old: RowBuffers, rows: Rows, kept: Sequence[int]
    ) -> tuple[RowBuffers, Buffer]:
        """Fewer rows, `kept` of the old ones, with their K/V of the scales before k and their input x of scale k.

        The past is copied, since in [L, R, H, d] it has gaps. These buffers, too, are made once and used again.
        """
        backend, first = self._backend, list(kept) == list(range(len(kept)))
        if first and old is self.rows:  # views of all but the past
            new = self._rows(rows, old)
        else:
            new = self._rows(rows)
            self._gather(old.modulation, new.modulation, kept)
            for branch, modulation in old.modulations.items():
                target = new.modulations[branch]
                if modulation is not None and target is not None:
                    self._gather(modulation, target, kept)
            self._gather(x, new.next_x[k - 1], kept)
        past = slice(0, self._scales[k].start)
        for source, wanted in ((old.cache, new.cache), *((old.caches[b], new.caches[b]) for b in old.caches)):
            for name, cache_LRHd in source.items():
                backend.copy_rows(cache_LRHd[past], wanted[name][past], None if first else kept)
        return new, new.next_x[k - 1]

    def take_over(self, k: int, other: LoopBuffers, images: Sequence[int]) -> None:
        """What some images of other buffers had come to before scale k. `load` was called for them here."""
        for at in range(k):
            self._gather(other.tokens[at], self.tokens[at], images)
        self._gather(other.f_hat[k % 2], self.f_hat[k % 2], images)
        if other._noise is not None:
            self._noise = other._noise.part(images)

    def all_tokens(self) -> NDArray[np.int64]:
        """The tokens of all scales, int64 [B, L], image after image; −1 at scales that were not drawn."""
        flat = self._backend.read(self._tokens)
        tokens_BL = np.full((self.batch, self._scales[-1].stop), -1, np.int64)
        for at, s in zip(self._slots[: self.drawn], self._scales, strict=False):
            tokens_BL[:, s.start : s.stop] = flat[at : at + self.batch * s.tokens].reshape(self.batch, s.tokens)
        return tokens_BL

    # -- inputs of a batch -------------------------------------------------------------------------------------------

    def _allocate_inputs(self, size: int) -> None:
        """What a batch brings; `size` elements hold one value per token, scale after scale."""
        allocate, count = self._backend.allocate, self.batch if self.own_settings else 1
        self._uniforms = allocate((size,), "float32")
        self._known = allocate((size,), "int64")
        self._known_mask = allocate((size,), "bool")
        self._cfg = allocate((len(self._scales), -(-count // SLOT) * SLOT), "float32")
        self._settings = {"top_k": allocate((count,), "int64"), "top_p": allocate((count,), "float32")}
        if self.own_settings:
            self._bias = self._per_code()
            if self._manifest.model.branches:
                self._settings |= {"control_cfg": allocate((count,), "float32")}

    def _allocate_smooth(self) -> None:
        """For a plan that can mix codes by noise: room for the noise of one scale, which all take in turn.

        The step reads it even where nothing is mixed; then it is zeros.
        """
        self._smooth = self._backend.allocate((self.batch if self.own_settings else 1,), "bool")
        self._smooth_noise = self._per_code()

    def _per_code(self) -> Buffer:
        """Zeros for every code of every token of the largest scale, which all scales take in turn."""
        largest = self.batch * max(s.tokens for s in self._scales) * self._manifest.model.vocab
        flat = self._backend.allocate((largest,), "float32")
        self._backend.write(flat, np.zeros(largest, np.float32))
        return flat

    def _code_inputs(self, k: int) -> dict[str, Buffer]:
        """What scale k takes for every code of every token, f32 [B, S, S, V], and whether codes are mixed by it."""
        s, V, inputs = self._scales[k], self._manifest.model.vocab, {}
        shape = (self.batch, s.side, s.side, V)
        if self.own_settings:
            inputs["bias"] = self._bias[: math.prod(shape)].reshape(shape)
        if self._smooth is not None:
            noise = self._smooth_noise[: math.prod(shape)].reshape(shape)
            inputs |= {"smooth": self._smooth, "smooth_noise": noise}
        return inputs

    def _step_inputs(self) -> list[dict[str, Buffer]]:
        """`cfg` has a place for each scale, so that a schedule changes no address."""
        flat = {"uniforms": self._uniforms, "known": self._known, "known_mask": self._known_mask}
        views = {name: self._per_scale(buffer) for name, buffer in flat.items()}
        count, padded = self.batch if self.own_settings else 1, self._cfg.shape[1]
        return [
            {
                **{name: per_scale[k] for name, per_scale in views.items()},
                **self._code_inputs(k),
                "cfg": self._cfg[k : k + 1].reshape((padded,))[:count],
                **self._settings,
            }
            for k in range(len(self._scales))
        ]

    def _write_settings(self, batch: Sequence[Drawing]) -> None:
        """Sampling, guidance and noise of each image; in format 1 those of the one request."""
        backend, requests = self._backend, [drawing.request for drawing in batch]
        requests = requests if self.own_settings else requests[:1]
        settings = [(r.sampling, r.schedule, r.guided, r.control_cfg, r.more_smooth) for r in requests]
        if settings != self._loaded.settings:
            cfg = np.zeros(self._cfg.shape, np.float32)
            for i, r in enumerate(requests):
                cfg[r.schedule.cfg_scales.start : r.schedule.cfg_scales.stop, i] = r.sampling.cfg if r.guided else 0
            backend.write(self._cfg, cfg)
            top_p = [r.sampling.top_p_input for r in requests]
            backend.write(self._settings["top_k"], np.array([r.sampling.top_k for r in requests], np.int64))
            backend.write(self._settings["top_p"], np.array(top_p, np.float32))
            if "control_cfg" in self._settings:
                backend.write(self._settings["control_cfg"], np.array([r.control_cfg for r in requests], np.float32))
            if self._smooth is not None:
                backend.write(self._smooth, np.array([r.more_smooth for r in requests]))
            self._loaded.settings = settings
        smooth = any(r.more_smooth for r in requests)
        self._noise = SmoothNoise([drawing.seed for drawing in batch]) if smooth else None

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

    # -- controls ----------------------------------------------------------------------------------------------------

    def _allocate_features(self) -> Buffer:
        images = self.batch if self.own_settings else 1
        return self._backend.allocate((self._manifest.tokens * images, self._manifest.model.width), "float32")

    def _features_per_scale(self, flat: Buffer) -> list[Buffer]:
        images, C = ((self.batch,) if self.own_settings else ()), self._manifest.model.width
        B = math.prod(images)
        return [flat[B * s.start : B * s.stop].reshape((*images, s.side, s.side, C)) for s in self._scales]

    def _load_features(self, branch: str, image: int, features_LC: Buffer) -> None:
        """Those of one image to its place at every scale."""
        flat, B = self._features[branch], self.batch if self.own_settings else 1
        if B == 1:
            self._backend.copy(features_LC, flat)
            return
        for s in self._scales:
            at = B * s.start + image * s.tokens
            self._backend.copy(features_LC[s.start : s.stop], flat[at : at + s.tokens])

    # -- rows --------------------------------------------------------------------------------------------------------

    def _rows(self, rows: Rows, whole: RowBuffers | None = None) -> RowBuffers:
        """Buffers for so many rows, which say what the rows are. whole: where they are the first ones of these."""
        key = (len(rows.image), whole is not None)
        if key not in self._row_buffers:
            self._row_buffers[key] = self._allocate_rows(rows, whole)
        found = self._row_buffers[key] = replace(self._row_buffers[key], rows=rows)
        if found.inputs:
            self._write_rows(found)
        return found

    def _allocate_rows(self, rows: Rows, whole: RowBuffers | None) -> RowBuffers:
        model, graphs, R = self._manifest.model, self._manifest.graphs, len(rows.image)
        branches = self.branches if self.own_settings else ()
        caches = {b: self._allocate_cache(f"branch.{b}", model.branches[b].cache_layers, R) for b in branches}
        own: dict[str, Any] = {
            "rows": rows,
            "cache": self._allocate_cache("step", model.cache_layers, R),
            "caches": caches,
            "inputs": self._allocate_row_inputs(R),
            "outputs": self._allocate_outputs(R, model.width),
        }
        if whole is not None:
            return RowBuffers(
                modulation=whole.modulation[:R],
                modulations={
                    b: None if rows_RMC is None else rows_RMC[:R] for b, rows_RMC in whole.modulations.items()
                },
                next_x=[x_RTTC[:R] for x_RTTC in whole.next_x],
                **own,
            )
        conditions = {b: graphs.get(f"condition.{b}") for b in branches}
        return RowBuffers(
            modulation=self._allocate_modulation(graphs["condition"], R),
            modulations={b: None if c is None else self._allocate_modulation(c, R) for b, c in conditions.items()},
            next_x=self._double_buffered_x(R, model.width),
            **own,
        )

    def _allocate_row_inputs(self, R: int) -> dict[str, Buffer]:
        if not self.own_settings:
            return {}
        B, m, allocate = self.batch, max(1, len(self.branches)), self._backend.allocate
        inputs = {"rows": allocate((R,), "int64"), "twin": allocate((B,), "int64")}
        if self._manifest.model.branches:
            inputs |= {"plain": allocate((B,), "int64")}
            inputs |= {"mix": allocate((m, R), "float32"), "keep": allocate((R,), "float32")}
        return inputs

    def _allocate_outputs(self, R: int, C: int) -> list[Buffer]:
        """`c`; where a step of a plan with branches uses none, one of zeros."""
        branch = next(iter(self._manifest.model.branches.values()), None)
        if branch is None:
            return []
        m, h = max(1, len(self.branches)), branch.blocks
        flat = self._backend.allocate((m * h * max(s.tokens for s in self._scales) * R * C,), "float32")
        if not self.branches:
            self._backend.write(flat, np.zeros(flat.shape, np.float32))
        return [flat[: m * h * s.tokens * R * C].reshape((m, h, s.side, s.side, R, C)) for s in self._scales]

    def _write_rows(self, found: RowBuffers) -> None:
        rows, backend = found.rows, self._backend
        backend.write(found.inputs["rows"], np.array(rows.image, np.int64))
        backend.write(found.inputs["twin"], np.array(rows.twin, np.int64))
        if "mix" in found.inputs:
            backend.write(found.inputs["plain"], np.array(rows.plain, np.int64))
            mix = np.zeros((max(1, len(self.branches)), len(rows.image)), np.float32)
            for row, steered in enumerate(rows.steered):
                if steered:
                    mix[:, row] = self._weights[rows.image[row]]
            backend.write(found.inputs["mix"], mix)
            backend.write(found.inputs["keep"], 1 - mix.sum(0, dtype=np.float32))

    def _double_buffered_x(self, R: int, C: int) -> list[Buffer]:
        """Views [R, T, T, C], one per scale, of two buffers in turn: a step reads one and writes the other."""
        shapes = [(R, s.next_side, s.next_side, C) for s in self._scales]
        largest = max(math.prod(shape) for shape in shapes)
        pair = [self._backend.allocate((largest,), "float32") for _ in range(2)]
        return [pair[k % 2][: math.prod(shape)].reshape(shape) for k, shape in enumerate(shapes)]

    def _allocate_modulation(self, condition: Graph, R: int) -> Buffer:
        M = int(condition.output("modulation").shape[1])
        return self._backend.allocate((R, M, self._manifest.model.width), "float32")

    def _allocate_cache(self, graph: str, layers: int, R: int) -> dict[str, Buffer]:
        """K and V of every layer of a step or a branch, [L, R, H, d]."""
        cache = {}
        for name in [f"{kind}_{i}" for i in range(layers) for kind in ("k", "v")]:
            port = self._manifest.graphs[graph].output(f"new_{name}")
            dtype = self._backend.cache_dtype or port.dtype
            shape = (self._manifest.tokens, R, *(int(dim) for dim in port.shape[2:]))
            cache[name] = self._backend.allocate(shape, dtype)
        return cache

    def _gather(self, source: Buffer, target: Buffer, rows: Sequence[int]) -> None:
        """Some entries of the first axis of a buffer to another."""
        self._backend.copy_rows(source.reshape((1, *source.shape)), target.reshape((1, *target.shape)), rows)


@dataclass
class _Loaded:
    """What of the last batch is in the buffers."""

    condition: Condition | None = None
    modulations: dict[str, Buffer] = field(default_factory=dict)
    features: dict[tuple[str, int], Buffer] = field(default_factory=dict)
    settings: object = None
    edited: bool | None = None
    """Whether any token is known; None: the buffers were never written."""
