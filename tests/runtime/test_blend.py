"""Between two classes or seeds: both ends are exact, the way is fair, and receipts know of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from car_runtime import RequestError, open_plan
from car_runtime.cli.main import main
from car_runtime.conditioning import Between
from car_runtime.config import Blend, GenerationConfig
from car_runtime.images import text_chunks
from car_runtime.plan import Plan, default_plan
from car_runtime.request import blended_uniforms, uniforms

CONTROL = Path(__file__).parents[2] / "examples" / "umbrella.png"


@pytest.fixture(scope="module")
def plan() -> Iterator[Plan]:
    with open_plan(None, "ort-cpu", threads=1) as opened:
        yield opened


def test_the_ends_are_the_images_of_the_classes_and_seeds(plan: Plan) -> None:
    config = GenerationConfig(control=CONTROL, label=4, seed=3, n=2)
    one, other = plan.generate(config), plan.generate(config, label=22, seed=40)
    ends = [plan.generate(config, blend=Blend(share=share, label=22, seed=40)) for share in (0.0, 1.0)]
    assert (ends[0].tokens == one.tokens).all()
    assert (ends[1].tokens == other.tokens).all()
    assert (ends[1].images == other.images).all()
    assert (one.tokens != other.tokens).any()


@pytest.mark.parametrize("what", [{"label": 22}, {"seed": 40}])
def test_the_way_leads_from_one_to_the_other(plan: Plan, what: dict[str, int]) -> None:
    config = GenerationConfig(control=CONTROL, label=4, seed=3, n=4)
    way = [plan.generate(config, blend=Blend(share=share, **what)).tokens for share in (0, 0.25, 0.5, 0.75, 1)]
    assert len({tokens.tobytes() for tokens in way}) == 5
    coarse = 1 + 4 + 9  # one token that differs changes most of those that follow it
    near, far = (np.mean(way[at][:, :coarse] != way[0][:, :coarse]) for at in (1, 4))
    assert near < far


def test_a_class_leads_away_from_no_class_with_guidance(plan: Plan) -> None:
    """The conditional rows alone are mixed: those of "no class" stay what guidance pushes away from."""
    config = GenerationConfig(control=CONTROL, seed=3, cfg=3)
    mixed = plan.generate(config, blend=Blend(share=1.0, label=4))
    assert (mixed.tokens == plan.generate(config, label=4).tokens).all()
    free = plan.manifest.model.classes
    rows = [plan._conditioning.condition((label, free)) for label in (4, 9)]
    halfway = plan._conditioning.condition((Between(one=4, other=9, share=0.5), free))
    one, other, found = (plan._backend.read(condition.modulation) for condition in (*rows, halfway))
    assert np.allclose(found[0], (one[0] + other[0]) / 2, atol=1e-6)
    assert (found[1] == one[1]).all()


def test_numbers_on_the_way_stay_uniform_and_come_from_one_of_both() -> None:
    """Over 4,000 seeds of one token as over 4,000 tokens: Kolmogorov's distance at 1 in 10,000 is 2.23/√N."""
    one, other = uniforms(range(4000), 50), uniforms(range(9000, 13000), 50)
    for share in (0.2, 0.5, 0.8):
        mixed = blended_uniforms(one, other, share)
        assert ((mixed == one) | (mixed == other)).all()
        for numbers in (mixed[:, 7], mixed[:, 31], mixed.reshape(-1)):
            steps = np.arange(1, numbers.size + 1) / numbers.size
            assert np.abs(np.sort(numbers) - steps).max() < 2.23 / np.sqrt(numbers.size)
    shares = [(blended_uniforms(one, other, share) == other).mean() for share in (0.0, 0.5, 1.0)]
    assert shares[0] == 0
    assert 0.3 < shares[1] < 0.7
    assert shares[2] == 1
    early, late = (blended_uniforms(one, other, share) == other for share in (0.3, 0.6))
    assert (late | ~early).all(), "a token that has gone over stays there"


@pytest.mark.parametrize(
    ("blend", "said"),
    [
        (Blend(share=0.5), "names neither another class nor another seed"),
        (Blend(share=1.5, seed=1), "share is 1.5, but must be a number in 0…1"),
        (Blend(share=float("nan"), seed=1), "share is nan"),
        (Blend(share=0.5, label="no such"), "there is no class 'no such'"),
        (Blend(share=0.5, seed=-1), "seed is -1"),
    ],
)
def test_a_bad_blend_is_refused(plan: Plan, blend: Blend, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        plan.generate(CONTROL, 4, blend=blend)


def test_the_command_draws_both_ends_and_again_knows_the_way(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "b.png")]
    given = ["--class", "fluent-objects", "--class", "noto-travel-places", "--seed", "3", "--seed", "8"]
    assert main(["blend", "--control", str(CONTROL), *given, "--steps", "3", "--grid", *out]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"b-{end}.png") for end in (0, 1, 2, "grid")]
    first = plan.generate(CONTROL, "fluent-objects", 3).images[0]
    last = plan.generate(CONTROL, "noto-travel-places", 8).images[0]
    for at, wanted in ((0, first), (2, last)):
        with Image.open(tmp_path / f"b-{at}.png") as image:
            assert (np.asarray(image) == wanted).all()
    assert main(["again", str(tmp_path / "b-1.png"), "-o", str(tmp_path / "same.png")]) == 0
    assert "agrees: 422 of 422 tokens" in capsys.readouterr().err
    assert (tmp_path / "same.png").read_bytes() == (tmp_path / "b-1.png").read_bytes()
    assert text_chunks(tmp_path / "b-1.png")["blend_share"] == "0.5"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--class", "0"], "there is one end only; give --class twice, or --seed"),
        (["--class", "0", "--class", "1", "--class", "2"], "--class is given 3 times"),
        (["--seed", "0", "--seed", "1", "--steps", "1"], "--steps is 1, but must be in 2…64"),
        (["--seed", "0", "--seed", "x"], "invalid int value: 'x'"),
        (["--class", "0", "--class", "dog!"], "there is no class 'dog!'"),
        (["--seed", "0", "--seed", "1", "-o", "b.jpg"], "name it *.png"),
        (["--seed", "0", "--seed", "1", "-o", "no/b.png"], "does not exist"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(
    args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["blend", "-e", str(default_plan()), "--control", str(CONTROL), *args]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
