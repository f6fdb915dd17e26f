"""Watermarks: a keyed pattern that drawn images lean to, and a test for it.

The key gives a pattern of standard normal numbers for the latent f̂. While an image is drawn, each code's logit gets
more or less by how far it takes f̂ along the pattern (Kirchenbauer et al., arXiv 2301.10226, add a constant to
"green" tokens; codes that encoding swaps for similar ones keep a graded score, where green lists lose it). To test an
image it is encoded: the pattern of the right key correlates with f̂. Any other key's doesn't, and since its numbers
are normal and independent of the image, the correlation is normal, too: that makes p exact.

Shapes: E side of f̂; Z latent channels; S side of a scale, N = S·S; L tokens of an image; V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import erfc, pi, sqrt

import numpy as np
from numpy.typing import NDArray

from car_runtime.errors import RequestError
from car_runtime.format.folder import PlanFolder
from car_runtime.format.manifest import Manifest
from car_runtime.format.parameters import stored_arrays

Floats = NDArray[np.float64]

STRENGTH = 1.5
"""Root mean square of what is added to an image's logits, over all tokens and codes."""
CLIP = 3.0
"""Of f̂'s root mean square: few large values, which images have, don't decide alone."""
_TABLE = ("vqvae.quantizer.embedding", "vqvae.quantizer.phi_weight")


@dataclass(frozen=True, kw_only=True)
class Watermark:
    """What a key adds to the logits of a plan's codes."""

    directions: Sequence[NDArray[np.float32]] = field(repr=False)
    """f32 [S, S, Z], one per scale: where codes are to lead."""
    codes: NDArray[np.float32] = field(repr=False)
    """f32 [V, Z], their mean taken off."""

    def bias(self, k: int) -> NDArray[np.float32]:
        """Of scale k, f32 [S, S, V]."""
        found: np.ndarray = self.directions[k] @ self.codes.T
        return found


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How likely it is that an image has a key's watermark by chance."""

    p: float
    """Probability that an image without it scores as high, 0…1: small means marked."""
    score: float
    """Standard normal for images without it."""


class Pattern:
    """The tokenizer's latent as the table of a plan of format 2 has it: codes and φ, and their way into f̂."""

    def __init__(self, manifest: Manifest, folder: PlanFolder) -> None:
        """Raises RequestError, with the remedy, where the plan doesn't say what its codes are."""
        check_plan(manifest)
        entries = {name: manifest.parameters[name] for name in _TABLE}
        constants = {
            (k, port): manifest.tensors[scale.constants[port]]
            for k, scale in enumerate(manifest.scales)
            for port in ("up", "phi")
        }
        named = {f"{k}.{port}": entry for (k, port), entry in constants.items()}
        stored = {name: np.asarray(a, np.float64) for name, a in stored_arrays(folder, {**entries, **named}).items()}
        self._codes, phi = (stored[name] for name in _TABLE)
        self._scales, Z = manifest.scales, manifest.model.latent_channels
        self._ups = [stored[f"{k}.up"].reshape(-1, s.side) for k, s in enumerate(self._scales)]
        picked = [int(stored[f"{k}.phi"].reshape(-1)[0]) for k in range(len(self._scales))]
        self._phis = [phi[i * Z : (i + 1) * Z] for i in picked]
        self._whiten = _channel_whitening(self._codes)
        E = manifest.model.latent_size
        self._shape, self._cosines, self._weights = (E, E, Z), _cosines(E), _weights(E)

    def watermark(self, key: bytes) -> Watermark:
        """Of a key's digest."""
        direction = self._from_pattern(_normal_numbers(key, self._shape))
        centred = self._codes - self._codes.mean(0)
        led = [self._back(k, direction) for k in range(len(self._scales))]
        covariance = centred.T @ centred / len(centred)
        mean_square = sum(float(np.einsum("ijy,yz,ijz->", d, covariance, d)) for d in led) / self._scales[-1].stop
        scale = STRENGTH / sqrt(mean_square)
        return Watermark(directions=[(scale * d).astype(np.float32) for d in led], codes=centred.astype(np.float32))

    def detect(self, tokens_L: NDArray[np.int64], key: bytes) -> Detection:
        """Whether an image that was encoded leans to a key's pattern."""
        found = self._to_pattern(self._latent(tokens_L)).reshape(-1)
        limit = CLIP * sqrt(float((found**2).mean())) or 1.0
        found = found.clip(-limit, limit)
        norm = sqrt(float(found @ found)) or 1.0
        score = float(found @ _normal_numbers(key, self._shape).reshape(-1)) / norm
        return Detection(p=erfc(score / sqrt(2)) / 2, score=score)

    def _latent(self, tokens_L: NDArray[np.int64]) -> Floats:
        """f̂ of an image's tokens but for φ's constants, [E, E, Z]."""
        f_hat = np.zeros(self._shape)
        for s, up, phi in zip(self._scales, self._ups, self._phis, strict=True):
            codes = self._codes[tokens_L[s.start : s.stop]].reshape(s.side, s.side, -1)
            h = np.einsum("ia,jb,abz->ijz", up, up, codes, optimize=True)
            f_hat += 0.5 * h + 0.5 * _convolved(h, phi)
        return f_hat

    def _back(self, k: int, direction: Floats) -> Floats:
        """The transpose of one scale's part of `_latent`: [E, E, Z] → [S, S, Z]."""
        flipped = self._phis[k].transpose(1, 0, 2, 3)[..., ::-1, ::-1]
        h = 0.5 * direction + 0.5 * _convolved(direction, flipped)
        up = self._ups[k]
        found: np.ndarray = np.einsum("ia,jb,ijz->abz", up, up, h, optimize=True)
        return found

    def _to_pattern(self, f_hat: Floats) -> Floats:
        """f̂ by frequency and channel, about as strong in all of them, [E, E, Z]."""
        C = self._cosines
        found: np.ndarray = np.einsum("ui,vj,yz,ijz->uvy", C, C, self._whiten, f_hat, optimize=True) * self._weights
        return found

    def _from_pattern(self, pattern: Floats) -> Floats:
        """The transpose of `_to_pattern`."""
        C = self._cosines
        found: np.ndarray = np.einsum("ui,vj,yz,uvy->ijz", C, C, self._whiten, pattern * self._weights, optimize=True)
        return found


def check_plan(manifest: Manifest) -> None:
    """Raise RequestError where a plan has no table of its codes."""
    if manifest.format == 1:
        raise RequestError(
            f"the plan {manifest.name!r} is of format 1, which marks no images; upgrade it with "
            "export/build_engines.py --upgrade"
        )
    V, Z = manifest.model.vocab, manifest.model.latent_channels
    codes, phi = (manifest.parameters.get(name) for name in _TABLE)
    problem = manifest.table_problem
    if problem is None and (codes is None or phi is None or codes.shape != (V, Z) or phi.shape[1:] != (Z, 3, 3)):
        problem = f"the plan {manifest.name!r} does not say what its codes are, which watermarks need"
    if problem is not None:
        raise RequestError(f"{problem}; export it again")


def _normal_numbers(key: bytes, shape: tuple[int, ...]) -> Floats:
    """Standard normal numbers of a key: SHAKE-256, then Box and Muller's transform."""
    count = int(np.prod(shape))
    raw = hashlib.shake_256(b"car watermark 1 " + key).digest(8 * count)
    uniform = (np.frombuffer(raw, "<u4").reshape(2, count) + 0.5) / 2**32
    return np.asarray(np.sqrt(-2 * np.log(uniform[0])) * np.cos(2 * pi * uniform[1])).reshape(shape)


def _channel_whitening(codes_VZ: Floats) -> Floats:
    """[Z, Z]: makes the channels of codes equally strong and uncorrelated, but for the weakest."""
    centred = codes_VZ - codes_VZ.mean(0)
    covariance = centred.T @ centred / len(centred)
    Z = len(covariance)
    values, vectors = np.linalg.eigh(covariance + 0.02 * np.trace(covariance) / Z * np.eye(Z))
    return np.asarray(vectors * values**-0.5 @ vectors.T)


def _cosines(E: int) -> Floats:
    """The orthonormal discrete cosine transform, [frequency, place]."""
    u, i = np.arange(E)[:, None], np.arange(E)[None]
    return np.sqrt(np.where(u == 0, 1, 2) / E) * np.cos(pi * (i + 0.5) * u / E)


def _weights(E: int) -> Floats:
    """Frequencies weighed against what images have much of, the low ones, [E, E, 1]."""
    square = np.add.outer(np.arange(E) ** 2, np.arange(E) ** 2)
    found: np.ndarray = np.sqrt((square + 0.3) / (square + 8))[..., None]
    return found


def _convolved(h_EEZ: Floats, kernel_OZ33: Floats) -> Floats:
    """A 3×3 convolution with zeros around."""
    E = len(h_EEZ)
    padded = np.pad(h_EEZ, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((E, E, len(kernel_OZ33)))
    for a in range(3):
        for b in range(3):
            out += padded[a : a + E, b : b + E] @ kernel_OZ33[:, :, a, b].T
    return out
