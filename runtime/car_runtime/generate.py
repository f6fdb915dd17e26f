"""The scale loop: next-scale prediction (VAR section 3.2) with an optional control (CAR section 3).

Shapes: B images; R transformer rows (car_runtime.batch); S side of a scale in tokens; E side of f̂; L tokens per
image; C width; Z latent channels; V vocabulary; H heads of width d.

A schedule (car_runtime.schedule) may end guidance before the last scale. From there on the loop goes on without the
rows of guidance, where the backend can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from car_runtime.backends.base import Backend, Buffer, Mark
from car_runtime.batch import Drawing, rows_of
from car_runtime.buffers import LoopBuffers
from car_runtime.format.manifest import Manifest, Scale


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


@dataclass(frozen=True, kw_only=True)
class Finished:
    """All scales of a batch and their images, made in one go."""

    steps: tuple[Step, ...]
    decoding: tuple[Mark, Mark]
    """Before and after the decoder."""
    fusions: Mapping[str, Buffer]
    """What a recording of it reads, beyond the buffers of the loop."""


class ScaleLoop:
    """The scales of a batch, one at a time, as far as its schedule goes.

    Each step writes its K/V where the later ones read them: nothing is copied, but where rows go: those of guidance
    after its last scale, and those of images that nobody waits for any more (`keep`).
    """

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        constants: Sequence[Mapping[str, Buffer]],
        batch: Sequence[Drawing],
        buffers: LoopBuffers,
    ) -> None:
        """buffers: with the batch loaded."""
        self.batch, self.buffers = tuple(batch), buffers
        self._backend, self._manifest, self._constants = backend, manifest, constants
        self._next, self._x, self._rows = 0, buffers.start, buffers.rows
        self.decoding: tuple[Mark, Mark] | None = None
        """Before and after the decoder, once the images are in the buffers."""

    @property
    def done(self) -> bool:
        """Whether all scales are drawn."""
        return self._next == self.buffers.drawn

    @property
    def unbroken(self) -> bool:
        """Whether nothing comes between the scales: no rows go, and the host has nothing to bring."""
        scales, guided_only = range(self.buffers.drawn), self._backend.guided_only
        same = (rows_of(self.batch, k, guided_only) == self._rows.rows for k in scales)
        return not self.buffers.brings_codes and all(same)

    def finish(self, decode: Callable[[Buffer, Buffer], None]) -> tuple[Step, ...]:
        """Draw all scales and decode, for an unbroken loop at its start; a backend may record it and replay that.

        decode: f̂ to images.
        """
        backend, buffers = self._backend, self.buffers

        def work() -> Finished:
            self._next, self._x = 0, buffers.start
            steps = []
            while not self.done:
                steps.append(self.step())
            began = backend.mark()
            decode(buffers.final_f_hat, buffers.image)
            decoding = (began, backend.mark())
            return Finished(steps=tuple(steps), decoding=decoding, fusions=buffers.fusions)

        key = (len(self._rows.rows.image), buffers.drawn, id(buffers.fusions))
        finished = backend.repeated(buffers, key, work)
        self._next, self.decoding = buffers.drawn, finished.decoding
        return finished.steps

    def step(self) -> Step:
        """Draw the next scale."""
        backend, buffers, k = self._backend, self.buffers, self._next
        scale, began = self._manifest.scales[k], backend.mark()
        wanted = rows_of(self.batch, k, backend.guided_only)
        if wanted != self._rows.rows:
            kept = [row for row in range(len(self._rows.rows.image)) if self._rows.rows.holds(row, wanted)]
            self._rows, self._x = buffers.narrowed(k, self._x, self._rows, wanted, kept)
        rows = self._rows
        f_hat, f_hat_out = buffers.f_hat[k % 2], buffers.f_hat[(k + 1) % 2]
        inputs = {"x": self._x, "modulation": rows.modulation, "f_hat": f_hat}
        inputs |= {**buffers.inputs[k], **rows.inputs, **buffers.fusions, **self._constants[k]}
        outputs = {"tokens": buffers.tokens[k], "f_hat_out": f_hat_out, "next_x": rows.next_x[k]}
        _bind_cache(inputs, outputs, rows.cache, scale)
        if rows.outputs:
            inputs["c"] = rows.outputs[k]
        if buffers.own_settings:
            for i, branch in enumerate(buffers.branches):
                self._run_branch(k, i, branch)
        else:
            for features in buffers.features.values():
                inputs["control"] = features[k]
        if buffers.logits is not None:
            outputs["logits"] = buffers.logits[k]
        buffers.write_codes(k)
        backend.run(backend.step_graph(k, buffers.batch), inputs, outputs)
        self._next, self._x = k + 1, rows.next_x[k]
        return Step(
            index=k,
            last=self.done,
            tokens=buffers.tokens[k],
            f_hat=f_hat_out,
            logits=outputs.get("logits"),
            began=began,
            ended=backend.mark(),
        )

    def keep(self, images: Sequence[int], buffers: LoopBuffers) -> None:
        """Go on with some of the images alone, in other buffers, into which they were loaded."""
        old, k = self._rows, self._next
        batch = tuple(self.batch[i] for i in images)
        place = {image: i for i, image in enumerate(images)}
        kept = [row for row, image in enumerate(old.rows.image) if image in place]
        buffers.take_over(k, self.buffers, images)
        self._rows, self._x = buffers.narrowed(k, self._x, old, old.rows.part(images), kept)
        self.batch, self.buffers = batch, buffers

    def _run_branch(self, k: int, number: int, branch: str) -> None:
        """One scale of a branch, for all rows (CAR section 3)."""
        rows, scale, backend = self._rows, self._manifest.scales[k], self._backend
        c = rows.outputs[k][number : number + 1]
        inputs = {
            "x": self._x,
            "control": self.buffers.features[branch][k],
            "rows": rows.inputs["rows"],
            "pos": self._constants[k]["pos"],
        }
        modulation = rows.modulations[branch]
        if modulation is not None:
            inputs["modulation"] = modulation
        outputs = {"c": c.reshape(c.shape[1:])}
        _bind_cache(inputs, outputs, rows.caches[branch], scale)
        backend.run(f"branch.{branch}", inputs, outputs)


def _bind_cache(
    inputs: dict[str, Buffer], outputs: dict[str, Buffer], cache: Mapping[str, Buffer], scale: Scale
) -> None:
    """K and V of the scales before, and where this one's go."""
    for name, cache_LRHd in cache.items():
        inputs[f"past_{name}"] = cache_LRHd[: scale.start]
        outputs[f"new_{name}"] = cache_LRHd[scale.start : scale.stop]
