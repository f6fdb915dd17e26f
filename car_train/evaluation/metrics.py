"""What `car_train.evaluation.evaluate` measures, as pure functions: images, sets of features, control images.

Shape legend: N, M images of a set, D features of an image, H, W an image's sides, C channels. Statistics are
computed in float64, whatever the inputs are; every function is deterministic, given its random generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from car_train.conventions import ControlConvention, convention

SSIM_SIGMA, SSIM_SIDE = 1.5, 11  # pixels; Wang et al. 2004
KID_SUBSETS, KID_SIZE = 100, 1000  # Bińkowski et al. 2018
IS_PARTS = 10  # Salimans et al. 2016
NEIGHBOURS = 3  # k of precision and recall, Kynkäänniemi et al. 2019
EDGE_LEVEL = 128
"""Grey level from which a soft edge (HED; or, counted from white, a sketch's line) is an edge."""

_ROWS = 1024  # of a distance matrix at a time: 400 MB for 50,000 images

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


# --- one image ----------------------------------------------------------------------------------------------------


def psnr(mse: float, peak: float = 2.0) -> float:
    """10·log10(peak²/mse) in dB, ∞ without error. peak: the range of the values, 2 for pixels in [−1, 1]."""
    return 10 * math.log10(peak**2 / mse) if mse > 0 else math.inf


def ssim(a_HWC: Floats, b_HWC: Floats) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13), the mean over channels and pixels; 1 for equal images.

    a, b: values in [0, 1]. Gaussian window of 11×11 and σ 1.5, K1 = 0.01, K2 = 0.03. Only windows that lie within
    the image count; in an image smaller than one window all do, mirrored at the border.
    """
    a, b = (np.asarray(x, np.float64) for x in (a_HWC, b_HWC))
    mean_a, mean_b = _window(a), _window(b)
    var_a, var_b = _window(a * a) - mean_a**2, _window(b * b) - mean_b**2
    covariance = _window(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    edge = SSIM_SIDE // 2 if min(a.shape[:2]) >= SSIM_SIDE else 0
    return float((luminance * structure)[edge : a.shape[0] - edge, edge : a.shape[1] - edge].mean())


def _window(x_HWC: Floats) -> Floats:
    return cv2.GaussianBlur(x_HWC, (SSIM_SIDE, SSIM_SIDE), SSIM_SIGMA, borderType=cv2.BORDER_REFLECT_101).reshape(
        x_HWC.shape  # OpenCV drops a single channel's axis
    )


def perplexity(counts: NDArray[np.integer[Any]]) -> float:
    """exp(entropy) of how often each code was used: V for equal use, 1 for a single code, 0 for no use at all."""
    total = counts.sum()
    if not total:
        return 0.0
    p = counts[counts > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


# --- sets of features -----------------------------------------------------------------------------------------------


def frechet_distance(a_ND: Floats, b_MD: Floats) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of two sets (FID, Heusel et al. 2017).

    |μa − μb|² + tr(Ca) + tr(Cb) − 2·tr((Ca·Cb)^½), covariances with N − 1. With Ca = AᵀA and Cb = BᵀB the eigenvalues
    of Ca·Cb are the squared singular values of A·Bᵀ, so the last trace is the sum of these singular values: real and
    not negative for every N, without a square root of a matrix and without anything added to the diagonals.

    With no more images than features the covariances are singular, and the distance is biased upwards; compare it
    only with distances of equally many images. Raises ValueError for fewer than two images.
    """
    if min(len(a_ND), len(b_MD)) < 2:
        raise ValueError(f"{len(a_ND)} and {len(b_MD)} images; a covariance needs at least 2")
    mean_a, factor_a = _mean_and_factor(a_ND)
    mean_b, factor_b = _mean_and_factor(b_MD)
    root = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    traces = (factor_a**2).sum() + (factor_b**2).sum()
    return float(max(((mean_a - mean_b) ** 2).sum() + traces - 2 * root, 0.0))


def _mean_and_factor(x_ND: Floats) -> tuple[Floats, Floats]:
    """(mean [D], F [min(N, D), D] with FᵀF the covariance)."""
    x = np.asarray(x_ND, np.float64)
    mean = x.mean(0)
    centred = (x - mean) / math.sqrt(len(x) - 1)
    return mean, np.asarray(np.linalg.qr(centred, mode="r")) if len(x) > x.shape[1] else centred


def kernel_distance(a_ND: Floats, b_MD: Floats) -> float:
    """Squared maximum mean discrepancy, unbiased, with the kernel (x·y/D + 1)³ (KID, Bińkowski et al. 2018, eq. 4).

    Zero on average for sets of one distribution, so single values may be negative. Raises ValueError for fewer than
    two images.
    """
    n, m = len(a_ND), len(b_MD)
    if min(n, m) < 2:
        raise ValueError(f"{n} and {m} images; an unbiased distance needs at least 2")
    a, b = (np.asarray(x, np.float64) for x in (a_ND, b_MD))
    within_a, within_b, between = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    same = (within_a.sum() - np.trace(within_a)) / (n * (n - 1)) + (within_b.sum() - np.trace(within_b)) / (
        m * (m - 1)
    )
    return float(same - 2 * between.mean())


def _kernel(a_ND: Floats, b_MD: Floats) -> Floats:
    return (a_ND @ b_MD.T / a_ND.shape[1] + 1) ** 3


def kid(
    a_ND: Floats, b_MD: Floats, rng: np.random.Generator, subsets: int = KID_SUBSETS, size: int = KID_SIZE
) -> tuple[float, float]:
    """KID: (mean, standard deviation) of `kernel_distance` over random subsets.

    A subset has `size` images of each set, or half of the smaller set where that is less: subsets that are the
    whole set would not differ, and their deviation would say nothing.
    """
    size = min(size, max(2, min(len(a_ND), len(b_MD)) // 2))
    values = [
        kernel_distance(
            a_ND[rng.choice(len(a_ND), size, replace=False)], b_MD[rng.choice(len(b_MD), size, replace=False)]
        )
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def precision_recall(real_ND: Floats, made_MD: Floats, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2), Euclidean.

    Precision: the share of made images within the real ones' manifold, the balls around each real image that
    reach to its k-th neighbour (itself not counted). Recall: the share of real ones within the made ones' manifold.
    Raises ValueError when a set has no k-th neighbour.
    """
    if min(len(real_ND), len(made_MD)) <= k:
        raise ValueError(f"{len(real_ND)} and {len(made_MD)} images; {k} neighbours need at least {k + 1}")
    real, made = (np.asarray(x, np.float64) for x in (real_ND, made_MD))
    return _covered(made, real, k), _covered(real, made, k)


def inception_score(logits_NK: Floats, parts: int = IS_PARTS) -> tuple[float, float]:
    """exp of the mean of KL(p(y|x) ‖ p(y)), the mean and deviation over `parts` (Salimans et al. 2016, section 4).

    1 where a classifier sees the same in all images, K where it is sure of each and they are equally many of each
    class. Parts are of neighbours: shuffle first what is sorted by class. Raises ValueError for fewer images than
    parts.
    """
    if len(logits_NK) < parts:
        raise ValueError(f"{len(logits_NK)} images; {parts} parts need at least as many")
    logits = np.asarray(logits_NK, np.float64)
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scores = []
    for part in np.array_split(log_p, parts):
        p = np.exp(part)
        scores.append(math.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _covered(x_ND: Floats, by_MD: Floats, k: int) -> float:
    """Share of x within the manifold of `by`."""
    # The k-th neighbour of an image among all, itself at distance 0 included, is at position k.
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in squared_distances(by_MD, by_MD)])
    return float(np.concatenate([(d <= radii).any(1) for d in squared_distances(x_ND, by_MD)]).mean())


def squared_distances(a_ND: Floats, b_MD: Floats) -> Iterator[Floats]:
    """Squared Euclidean distances in slices of rows, each [at most _ROWS, M]."""
    b2 = (b_MD**2).sum(1)
    for start in range(0, len(a_ND), _ROWS):
        a = a_ND[start : start + _ROWS]
        yield np.maximum((a**2).sum(1)[:, None] + b2 - 2 * a @ b_MD.T, 0)


# --- control images -------------------------------------------------------------------------------------------------


def control_errors(
    control: str | ControlConvention, given: Pixels, found: Pixels, tolerance: int = 1
) -> dict[str, float]:
    """How far the control of an image is from the one that was asked for (CAR section 4).

    control: a convention or the name of a preset. given, found: uint8 [H, W, 3].

    canny:        precision, recall and f1 of the white pixels, each matched within `tolerance` pixels (`edge_f1`).
    hed, sketch:  mae and mse of the values in [0, 1]; precision, recall and f1 of the edges (from grey level 128; of
                  dark lines, 255 minus that), matched likewise.
    depth:        mae and rmse of the values in [0, 1]; rmse_aligned after the best scale and shift.
    normal:       degrees, the mean angle between the normals; degrees_object, the same where the given normal does
                  not look straight at the viewer (as a flat ground does); NaN where it does so everywhere.
    """
    how = convention(control)
    control_type = how.control_type
    if control_type == "normal":
        angles, tilted = angular_error(given, found), (np.abs(given.astype(int) - (128, 128, 255)) > 1).any(2)
        return {
            "degrees": float(angles.mean()),
            "degrees_object": float(angles[tilted].mean()) if tilted.any() else math.nan,
        }
    a, b = (x[..., 0].astype(np.float64) / 255 for x in (given, found))
    errors = {"mae": float(np.abs(a - b).mean()), "mse": float(((a - b) ** 2).mean())}
    if control_type == "depth":
        return {"mae": errors["mae"], "rmse": math.sqrt(errors["mse"]), "rmse_aligned": aligned_rmse(a, b)}
    marked = [
        (255 - x[..., 0] if how.polarity == "dark-on-light" else x[..., 0]) >= EDGE_LEVEL for x in (given, found)
    ]
    precision, recall, f1 = edge_f1(marked[0], marked[1], tolerance)
    scores = {"precision": precision, "recall": recall, "f1": f1}
    return scores if control_type == "canny" else {**errors, **scores}


def edge_f1(given_HW: Mask, found_HW: Mask, tolerance: int = 1) -> tuple[float, float, float]:
    """(precision, recall, F1) of found edges, each edge pixel matched by any within `tolerance` in x and in y.

    Precision is the share of found pixels near a given one, recall that of given pixels near a found one; where there
    are none to count the share is 0. Two images without edges agree: 1, 1, 1.
    """
    if not given_HW.any() and not found_HW.any():
        return 1.0, 1.0, 1.0
    if not given_HW.any() or not found_HW.any():
        return 0.0, 0.0, 0.0
    square = np.ones((2 * tolerance + 1, 2 * tolerance + 1), np.uint8)
    near_given, near_found = (cv2.dilate(x.astype(np.uint8), square) > 0 for x in (given_HW, found_HW))
    precision = float((found_HW & near_given).sum() / found_HW.sum())
    recall = float((given_HW & near_found).sum() / given_HW.sum())
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def aligned_rmse(given_HW: Floats, found_HW: Floats) -> float:
    """Root of the smallest mean of (given − scale·found − shift)²: errors of scale and shift don't count."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (given_HW, found_HW))
    a, b = a - a.mean(), b - b.mean()
    energy = float(b @ b)
    scale = float(a @ b) / energy if energy > 0 else 0.0
    return float(np.sqrt(np.mean((a - scale * b) ** 2)))


def angular_error(given_HW3: Pixels, found_HW3: Pixels) -> Floats:
    """Angle between two normal maps at every pixel, in degrees, float64 [H, W]. Maps: uint8, (n + 1)/2·255."""
    a, b = (x.astype(np.float64) / 127.5 - 1 for x in (given_HW3, found_HW3))
    # atan2(|a × b|, a·b): exact for any lengths, and near 0° and 180°, where arccos loses half of the digits.
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b), axis=2), (a * b).sum(2)))


def ratios(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> dict[str, float | None]:
    """Each of a's measures ÷ b's; None where one of them is unknown or b's is 0."""
    return {name: x / y if x is not None and (y := b[name]) else None for name, x in a.items()}
