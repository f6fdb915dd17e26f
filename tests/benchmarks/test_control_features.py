"""t-SNE of control features: neighbours have their closed forms, and the command draws a plot of real encoders."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks.control_features import main, neighbours, plane
from car_train import checkpoint
from fixtures.small import small_model


def test_neighbours_of_apart_classes_are_their_own_and_chance_has_its_closed_form() -> None:
    labels = np.repeat([0, 1, 2], [4, 3, 3])
    apart = labels[:, None] * 10.0 + np.random.default_rng(0).random((10, 2))
    assert neighbours(apart, labels) == (1.0, pytest.approx((4 * 3 + 3 * 2 + 3 * 2) / (10 * 9)))
    mixed = np.arange(10.0)[:, None]
    assert neighbours(mixed, np.arange(10) % 2)[0] == 0


def test_neighbours_of_many_points_take_the_memory_of_some_rows() -> None:
    draw = np.random.default_rng(0)
    x, labels = 1000 + draw.standard_normal((1500, 64)), draw.integers(0, 3, 1500)
    tracemalloc.start()
    share, _ = neighbours(x, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # of all differences at once: 1.15 GB
    nearest = [np.square(x - point).sum(1).argsort()[1] for point in x]
    assert share == (labels[nearest] == labels).mean()


def test_the_plane_keeps_apart_what_is_apart() -> None:
    labels = np.repeat([0, 1], 20)
    x = labels[:, None] * 20.0 + np.random.default_rng(0).standard_normal((40, 6))
    points = plane(x, 0)
    assert neighbours(points, labels)[0] == 1
    np.testing.assert_array_equal(points, plane(x, 0))


def test_the_command_draws_every_type_and_prints_the_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, name in enumerate(("ant", "bee", "cat", "dog", "eel")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            image = Image.new("RGB", (20, 20), "white")
            ImageDraw.Draw(image).rectangle((2 + k, 2 + i, 12 + k, 8 + i), fill=(10, 50 * k, 99))
            image.save(tmp_path / "data" / name / f"{i}.png")
    run = str(checkpoint.save(small_model(), tmp_path / "car"))
    flags = ["--data", str(tmp_path / "data"), "--split", "all", "-o", str(tmp_path / "t.png")]
    assert main([run, run, *flags]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [row["neighbour of"] for row in rows] == ["its class", "its class", "its type"]
    assert rows[0] == rows[1]  # the same checkpoint twice
    assert rows[0]["chance"] == pytest.approx(5 * 3 * 2 / (15 * 14))
    assert Image.open(tmp_path / "t.png").width > 1000
    plain = str(checkpoint.save(small_model(control=False), tmp_path / "var"))
    assert main([plain, *flags]) == 2
    assert "no control branch" in capsys.readouterr().err
