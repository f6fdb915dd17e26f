"""The measures of `evaluation.metrics` against closed forms, and against loops that spell out their definitions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from car_train.evaluation import metrics
from car_train.evaluation.metrics import (
    aligned_rmse,
    angular_error,
    control_errors,
    edge_f1,
    frechet_distance,
    kernel_distance,
    kid,
    perplexity,
    precision_recall,
    psnr,
    ssim,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def exact_sample(mean: np.ndarray, covariance: np.ndarray, n: int) -> np.ndarray:
    """n points whose sample mean and covariance are these, up to rounding."""
    x = rng(5).standard_normal((n, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


# --- images


def test_psnr_of_a_known_error() -> None:
    assert psnr(0.04) == pytest.approx(20.0)
    assert psnr(1.0, peak=1.0) == 0
    assert psnr(0.0) == math.inf


def test_ssim_of_equal_images_is_one_and_of_flat_ones_has_a_closed_form() -> None:
    image = rng().random((16, 20, 3))
    assert ssim(image, image) == pytest.approx(1, abs=1e-12)
    a, b = np.full((16, 16, 3), 0.2), np.full((16, 16, 3), 0.6)
    assert ssim(a, b) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), rel=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_its_definition_window_by_window(channels: int) -> None:
    a, b = rng(1).random((2, 13, 14, channels))
    at = np.arange(-5, 6)
    window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for y, x, c in product(range(5, 8), range(5, 9), range(channels)):
        p, q = (i[y - 5 : y + 6, x - 5 : x + 6, c] for i in (a, b))
        mean_p, mean_q = (window * p).sum(), (window * q).sum()
        var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
        both = (window * (p - mean_p) * (q - mean_q)).sum()
        luminance = (2 * mean_p * mean_q + 1e-4) / (mean_p**2 + mean_q**2 + 1e-4)
        values.append(luminance * (2 * both + 9e-4) / (var_p + var_q + 9e-4))
    assert ssim(a, b) == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_of_an_image_smaller_than_its_window_is_defined() -> None:
    a = rng(2).random((8, 8, 3))
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, 1 - a) < 0.5


def test_perplexity_counts_codes_by_how_evenly_they_are_used() -> None:
    assert perplexity(np.array([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(np.array([7, 0, 0])) == pytest.approx(1)
    assert perplexity(np.array([3, 1])) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert perplexity(np.zeros(4, int)) == 0


# --- sets


def test_frechet_distance_of_gaussians_with_a_common_basis_has_a_closed_form() -> None:
    a, b, shift = np.array([4.0, 1, 0.25]), np.array([1.0, 9, 0.25]), np.array([1.0, -2, 0.5])
    basis = np.linalg.qr(rng(3).standard_normal((3, 3)))[0]
    x = exact_sample(shift, basis @ np.diag(a) @ basis.T, 50)
    y = exact_sample(np.zeros(3), basis @ np.diag(b) @ basis.T, 70)
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(40, 60), (6, 60), (6, 7)])
def test_frechet_distance_equals_the_formula_with_a_matrix_root_also_with_fewer_images_than_features(
    n: int, m: int
) -> None:
    x, y = rng(4).standard_normal((n, 12)), rng(5).standard_normal((m, 12)) @ rng(6).standard_normal((12, 12))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # Rounding leaves eigenvalues of ±1e-15 where a covariance is singular; their roots are the tolerance.
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_a_set_from_itself_is_zero_and_one_image_has_none() -> None:
    x = rng(7).standard_normal((30, 50))
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(x[:1], x)


def test_kernel_distance_equals_its_double_sums() -> None:
    a, b = rng(8).standard_normal((5, 4)), rng(9).standard_normal((7, 4)) + 1

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 4 + 1) ** 3)

    expected = (
        sum(k(a[i], a[j]) for i, j in product(range(5), repeat=2) if i != j) / 20
        + sum(k(b[i], b[j]) for i, j in product(range(7), repeat=2) if i != j) / 42
        - 2 * sum(k(x, y) for x in a for y in b) / 35
    )
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_zero_on_average_for_one_distribution_and_positive_for_two() -> None:
    draw = rng(10)
    same = [kernel_distance(draw.standard_normal((20, 3)), draw.standard_normal((20, 3))) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20  # four standard errors
    assert min(same) < 0  # a biased estimate could not be
    other = [kernel_distance(draw.standard_normal((20, 3)), draw.standard_normal((20, 3)) + 1) for _ in range(100)]
    assert np.mean(other) > 4 * np.std(other) / 10


def test_kid_follows_its_generator_and_takes_at_most_half_of_a_small_set() -> None:
    a, b = rng(11).standard_normal((30, 3)), rng(12).standard_normal((40, 3))
    assert kid(a, b, rng(1)) == kid(a, b, rng(1))
    mean, std = kid(a, b, rng(1))
    assert std > 0
    assert mean == pytest.approx(kernel_distance(a, b), abs=4 * std)
    assert kid(a, b, rng(2), subsets=3, size=2) != kid(a, b, rng(1), subsets=3, size=2)


@pytest.mark.parametrize("rows", [3, 1024])
def test_precision_and_recall_equal_their_loops(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_ROWS", rows)
    real, made = rng(13).standard_normal((25, 4)), rng(14).standard_normal((19, 4)) * 0.6 + 0.5

    def covered(x: np.ndarray, by: np.ndarray, k: int) -> float:
        inside = 0
        for point in x:
            for i, centre in enumerate(by):
                others = sorted(np.linalg.norm(centre - o) for j, o in enumerate(by) if j != i)
                if np.linalg.norm(point - centre) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(x)

    for k in (1, 3):
        found = precision_recall(real, made, k)
        assert found == (covered(made, real, k), covered(real, made, k))
        assert 0 < found[1] < found[0] <= 1  # narrower than the real set: precise, and incomplete


def test_precision_and_recall_at_their_ends() -> None:
    x = rng(15).standard_normal((12, 3))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(x, x[:3])


# --- controls


def lines(*columns: int) -> np.ndarray:
    mask = np.zeros((10, 12), bool)
    mask[:, list(columns)] = True
    return mask


@pytest.mark.parametrize(
    ("given", "found", "expected"),
    [
        (lines(5), lines(5), (1, 1, 1)),
        (lines(5), lines(6), (1, 1, 1)),  # within the tolerance
        (lines(5), lines(7), (0, 0, 0)),
        (lines(2, 8), lines(3), (1, 0.5, 2 / 3)),
        (lines(2), lines(3, 6, 8, 10), (0.25, 1, 0.4)),
        (lines(), lines(), (1, 1, 1)),
        (lines(3), lines(), (0, 0, 0)),
        (lines(), lines(3), (0, 0, 0)),
    ],
)
def test_edges_match_within_one_pixel(
    given: np.ndarray, found: np.ndarray, expected: tuple[float, float, float]
) -> None:
    assert edge_f1(given, found) == pytest.approx(expected, abs=1e-12)
    image = [np.repeat(x[..., None], 3, 2).astype(np.uint8) * 255 for x in (given, found)]
    assert tuple(control_errors("canny", *image).values()) == pytest.approx(expected, abs=1e-12)


def test_tolerance_reaches_diagonally_and_can_be_none() -> None:
    a, b = np.zeros((5, 5), bool), np.zeros((5, 5), bool)
    a[2, 2] = b[3, 3] = True
    assert edge_f1(a, b)[2] == 1
    assert edge_f1(a, b, tolerance=0)[2] == 0
    given, found = (np.repeat(x[..., None], 3, 2).astype(np.uint8) * 255 for x in (a, b))
    assert [control_errors("canny", given, found, tolerance)["f1"] for tolerance in (0, 1)] == [0, 1]


def test_aligned_depth_forgives_scale_and_shift_and_nothing_else() -> None:
    given = rng(16).random((8, 9))
    assert aligned_rmse(given, 0.3 * given + 0.1) == pytest.approx(0, abs=1e-12)
    assert aligned_rmse(given, np.full((8, 9), 0.4)) == pytest.approx(given.std())
    noise = rng(17).random((8, 9))
    grid = [
        np.sqrt(np.mean((given - s * noise - t) ** 2))
        for s in np.linspace(-1, 1, 201)
        for t in np.linspace(0, 1, 101)
    ]
    assert aligned_rmse(given, noise) <= min(grid) <= aligned_rmse(given, noise) + 1e-4


def test_angles_between_normals_are_exact() -> None:
    up, left, down = (255, 255, 255), (0, 255, 255), (0, 0, 0)  # (1, 1, 1), (−1, 1, 1), (−1, −1, −1)
    a, b = np.array([[up, up, up]], np.uint8), np.array([[up, left, down]], np.uint8)
    expected = [0, math.degrees(math.acos(1 / 3)), 180]
    np.testing.assert_allclose(angular_error(a, b), [expected], atol=1e-6)
    assert control_errors("normal", a, b)["degrees"] == pytest.approx(np.mean(expected))


def test_normals_of_flat_ground_count_apart() -> None:
    flat = np.full((2, 2, 3), (128, 128, 255), np.uint8)
    given, found = flat.copy(), flat.copy()
    given[0, 0] = found[0, 0] = (255, 128, 128)
    found[1, 1] = (128, 255, 128)
    errors = control_errors("normal", given, found)
    assert errors["degrees_object"] == 0
    assert errors["degrees"] == pytest.approx(90 / 4, abs=0.2)  # 128 is 0.004, not 0
    assert math.isnan(control_errors("normal", flat, found)["degrees_object"])


def test_soft_edges_and_depth_have_the_errors_of_their_values() -> None:
    given, found = (np.full((4, 4, 3), v, np.uint8) for v in (204, 51))
    hed = control_errors("hed", given, found)
    assert (hed["mae"], hed["mse"], hed["f1"]) == pytest.approx((0.6, 0.36, 0))
    sketch = control_errors("sketch", given, found)  # dark lines: only `found` has any
    assert (sketch["mae"], sketch["precision"], sketch["recall"]) == pytest.approx((0.6, 0, 0))
    depth = control_errors("depth", given, found)
    assert (depth["mae"], depth["rmse"], depth["rmse_aligned"]) == pytest.approx((0.6, 0.6, 0))
