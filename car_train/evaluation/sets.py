"""Sets of images against each other, and the noise floor of the distances between them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from car_train.evaluation.metrics import (
    KID_SIZE,
    NEIGHBOURS,
    frechet_distance,
    kernel_distance,
    kid,
    precision_recall,
)

LEAST_IMAGES = 64
"""Below this many images a Fréchet distance is left out: it would be bias of the covariances for the most part."""
FEWEST = 4
"""Images of a set that can be halved for an unbiased KID."""
HALVINGS = 10
"""Random halvings behind each noise floor."""
MOST_NEIGHBOURS = 10_000
"""Images of each set behind precision and recall, at most."""

Floats = NDArray[np.floating[Any]]
Report = dict[str, Any]


def compare_sets(
    bank: Mapping[str, Floats], seed: int, notes: list[str], owners: NDArray[np.intp] | None = None
) -> Report:
    """The distances of sets of images from the real ones, and the noise floor of these distances.

    bank: features [N, D] by source; `truth` holds the real ones, all in the same order. notes: is added to.
    owners: int [M] where the sets besides `truth` have M images each: the real image that each belongs to (its class,
    its control), −1: to none. By default image i belongs to real image i.

    Per source: `kid` and `kid_std` over subsets, `fid` of all images (that is: the Fréchet distance on these
    features), `precision`, `recall`; and, so that nothing but the source differs from the floor, the same from one
    half of the real images to the source's images of the other half, mean and std over random halvings
    (`kid_half`, `kid_half_std`, …), of as many images at most. `floor`: these for the real images themselves.
    """
    real = bank["truth"]
    n, D = real.shape
    frechet = n >= LEAST_IMAGES
    if not frechet:
        notes.append(
            f"{n} images are too few for covariances of {D} features: no Fréchet distance, only KID; "
            f"evaluate at least {LEAST_IMAGES}"
        )
    elif n // 2 <= D:
        notes.append(
            f"{n} images, {D} features: covariances of a half are singular and Fréchet distances biased upwards; "
            "compare them only with the floor and with reports of as many images"
        )
    if n < FEWEST:
        notes.append(f"{n} images can't be halved: no distances between sets; evaluate more")
        return {}
    for source, made in bank.items():
        if len(made) < (least := LEAST_IMAGES if frechet else FEWEST):
            what = "distances" if len(made) < FEWEST else "a Fréchet distance"
            notes.append(f"{len(made)} images ({source}) are too few for {what}; draw at least {least}")
    rng = np.random.default_rng([seed, 1])
    halvings: list[Sequence[NDArray[np.intp]]] = [np.array_split(rng.permutation(n), 2) for _ in range(HALVINGS)]
    report: Report = {"halvings": HALVINGS, "floor": _half_scores(real, real, halvings, frechet)}
    if owners is not None:
        chosen: list[Sequence[NDArray[np.intp]]] = [
            (a, _of_owners(owners, b, n, np.random.default_rng([seed, 3]))) for a, b in halvings
        ]
        halvings = chosen if min(len(pair[1]) for pair in chosen) >= 2 else []
    for source, made in tqdm(bank.items(), "statistics", unit="set", file=sys.stderr, disable=None):
        if source != "truth" and len(made) >= FEWEST:
            mean, std = kid(real, made, np.random.default_rng([seed, 2]))
            distance = frechet and len(made) >= LEAST_IMAGES
            whole = _scores(real, made, MOST_NEIGHBOURS, distance, np.random.default_rng([seed, 5]))
            halves = _half_scores(real, made, halvings, distance) if halvings else {}
            report[source] = {"kid": mean, "kid_std": std, **whole, **halves}
    return report


def _of_owners(
    owners: NDArray[np.intp], half: NDArray[np.intp], n: int, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Random images that belong to a half of the n real ones or to none, as many as it has or fewer."""
    within = np.zeros(n, bool)
    within[half] = True
    return rng.permutation(np.flatnonzero(within[owners] | (owners < 0)))[: len(half)]


def _scores(
    real: Floats, made: Floats, most: int, frechet: bool, rng: np.random.Generator | None = None
) -> dict[str, float]:
    """Fréchet distance if wanted; precision and recall of at most `most` images: these cost N².

    rng: chooses them where the images stand in an order, of classes for example; else they are the first.
    """
    out = {"fid": frechet_distance(real, made)} if frechet and len(made) >= 2 else {}
    if min(len(real), len(made)) > NEIGHBOURS:
        a, b = (x[:most] if rng is None else x[rng.permutation(len(x))[:most]] for x in (real, made))
        out["precision"], out["recall"] = precision_recall(a, b)
    return out


def _half_scores(
    real: Floats, made: Floats, halvings: Sequence[Sequence[NDArray[np.intp]]], frechet: bool
) -> dict[str, float]:
    each: list[dict[str, float]] = []
    for a, b in halvings:
        distance = kernel_distance(real[a[:KID_SIZE]], made[b[:KID_SIZE]])
        each.append({"kid": distance, **_scores(real[a], made[b], KID_SIZE, frechet)})
    out: dict[str, float] = {}
    for name in (name for name in each[0] if all(name in scores for scores in each)):
        values = [scores[name] for scores in each]
        out |= {f"{name}_half": float(np.mean(values)), f"{name}_half_std": float(np.std(values))}
    return out
