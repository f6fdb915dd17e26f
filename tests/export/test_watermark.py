"""Watermarks: what a key adds to the draw, what a test of the key finds, and that nobody else's image changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from car_runtime import GenerationConfig, Plan, open_plan
from car_runtime.backends.openvino.backend import OpenVino
from car_runtime.cli.main import main
from car_runtime.errors import RequestError
from car_runtime.format.folder import open_folder
from car_runtime.format.manifest import WEIGHTS, read_manifest
from car_runtime.images import text_chunks
from car_runtime.request import resolve_watermark, uniforms
from car_runtime.watermark import STRENGTH, Pattern
from car_train.model.sample import draw_kept, keep_top
from fixtures.runtime_plan import build_plan, relist
from fixtures.two_branches import small, two_branches

EXAMPLES = Path(__file__).parents[2] / "examples"
KEY = "a key of some length"


@pytest.fixture(scope="module", params=["ort-cpu", "openvino"])
def plan(request: pytest.FixtureRequest) -> Iterator[Plan]:
    root = two_branches()
    if request.param == "ort-cpu":
        with open_plan(root, request.param, threads=1) as opened:
            yield opened
    else:
        pytest.importorskip("openvino")
        manifest = read_manifest(root)
        with Plan(root, manifest, OpenVino(root, manifest, 1, "f32"), "a test") as opened:
            yield opened


@pytest.fixture(scope="module")
def pattern() -> Iterator[Pattern]:
    with open_folder(two_branches()) as folder:
        yield Pattern(read_manifest(two_branches()), folder)


def digest(key: str) -> bytes:
    found = resolve_watermark(read_manifest(two_branches()), key)
    assert found is not None
    return found


def control(side: int = 8) -> Image.Image:
    image = Image.new("RGB", (side, side))
    ImageDraw.Draw(image).rectangle((2, 2, 5, 6), outline="white")
    return image


def test_the_key_is_added_before_top_k_and_to_nothing_else(plan: Plan, pattern: Pattern) -> None:
    """Each token is the one that PyTorch draws of the logits and the key's bias; the logits are without it."""
    mark, start = pattern.watermark(digest(KEY)), 0
    noise = torch.from_numpy(uniforms([5], plan.manifest.tokens))
    settings = {"cfg": 2.0, "top_k": 9, "top_p": 0.8}
    for scale in plan.stream(control(), 1, 5, watermark=KEY, logits=True, **settings):
        assert scale.logits is not None
        side, V = scale.logits.shape[1], scale.logits.shape[-1]
        biased = torch.from_numpy(scale.logits + mark.bias(scale.index)).reshape(1, -1, V)
        kept = keep_top(biased, torch.tensor([9]), torch.tensor([0.8]))
        wanted = draw_kept(kept, noise[:, start : start + side * side])
        assert (scale.tokens.reshape(1, -1) == wanted.numpy()).all()
        start += side * side
    assert (plan.generate(control(), 1, 5, watermark=KEY, **settings).tokens[0] != 0).any()


def test_images_without_a_key_are_what_they_were_in_any_company(plan: Plan) -> None:
    configs = [
        GenerationConfig(control=control(), label=1, seed=1, watermark=KEY),
        GenerationConfig(control=control(), label=1, seed=1),
        GenerationConfig(label=2, seed=1, watermark=b"other"),
        GenerationConfig(control=control(), label=1, seed=1, watermark="other"),
    ]
    before = plan.generate(configs[1]).tokens
    alone = [plan.generate(config).tokens for config in configs]
    together = [result.tokens for result in plan.generate_many(configs)]
    assert (plan.generate(configs[1]).tokens == before).all()
    assert (alone[1] == before).all()
    for one, other in zip(alone, together, strict=True):
        assert (one == other).all()
    assert len({tokens.tobytes() for tokens in alone}) == 4


def test_drawn_tokens_lean_to_their_own_key(plan: Plan, pattern: Pattern) -> None:
    drawn = plan.generate(control(), 1, 3, n=12, watermark=KEY).tokens
    plain = plan.generate(control(), 1, 3, n=12).tokens

    def mean(tokens_nL: np.ndarray, key: str) -> float:
        return float(np.mean([pattern.detect(pattern.codes[tokens], digest(key)).score for tokens in tokens_nL]))

    assert mean(drawn, KEY) > 1.2
    assert abs(mean(drawn, "other")) < 1.2
    assert abs(mean(plain, KEY)) < 1.2


CODES, PHI, NUMBER, UP = "vqvae.quantizer.embedding", "vqvae.quantizer.phi_weight", "phi.0", "up.1"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (CODES, np.nan, "does not say what its codes are"),
        (CODES, 1.0, "does not say what its codes are"),
        (PHI, np.inf, "does not say what its codes are"),
        (UP, np.nan, "does not say what its codes are"),
        (NUMBER, 99, "the φ of scale 0 is none of the plan's"),
        (NUMBER, -1, "the φ of scale 0 is none of the plan's"),
    ],
)
@pytest.mark.parametrize("what", ["draw", "detect"])
def test_a_plan_that_lies_about_its_codes_is_refused_in_one_line(
    tmp_path: Path, name: str, value: float, message: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers of `weights.bin`, whose digests whoever changes them can bring up to date."""
    root = tmp_path / "theirs.plan"
    shutil.copytree(two_branches(), root)
    manifest = read_manifest(root)
    entry = manifest.parameters.get(name) or manifest.tensors[name]
    numbers = np.memmap(root / WEIGHTS, entry.dtype, "r+", entry.offset, entry.shape)
    numbers[:] = value
    numbers.flush()
    relist(root, manifest, WEIGHTS)
    control(64).save(tmp_path / "a.png")
    arguments = [str(tmp_path / "a.png"), "-e", str(root), "--backend", "ort-cpu", "--threads", "1"]
    draw = ["--control", *arguments, "--watermark", KEY, "-o", str(tmp_path / "o.png")]
    assert main(draw if what == "draw" else ["detect", *arguments, "--key", KEY]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if " error: " in line]
    assert len(errors) == 1
    assert message in errors[0]


def test_what_the_model_expects_hides_no_watermark() -> None:
    """Of images of the shipped plan: their own keys are found, about as clearly as in all that they show."""
    own, other, shown = [], [], []
    with open_plan(backend="ort-cpu", threads=1) as plan:
        pattern = Pattern(plan.manifest, plan._folder)
        for seed, name in enumerate(["umbrella", "heart", "clock", "guitar"]):
            key = f"key {seed}"
            drawn = plan.generate(EXAMPLES / f"{name}.png", 4 + seed, seed, watermark=key).images[0]
            own.append(plan.detect(drawn, key).score)
            other.append(plan.detect(drawn, f"other {seed}").score)
            mark = resolve_watermark(plan.manifest, key)
            assert mark is not None
            shown.append(pattern.detect(pattern.codes[plan.encode(drawn)[0]], mark).score)
    print(own, other, shown)
    assert np.mean(own) > 2.3
    assert abs(np.mean(other)) < 1
    assert np.mean(own) > np.mean(shown) - 0.5


def test_p_is_uniform_over_keys(pattern: Pattern) -> None:
    """Of one image without a watermark, whatever it looks like: Kolmogorov and Smirnov's distance at 1 in 10,000."""
    tokens = np.zeros(5, np.int64)
    tokens[1:] = [3, 3, 3, 9]
    found = np.sort([pattern.detect(pattern.codes[tokens], digest(f"key {i}")).p for i in range(1000)])
    distance = np.abs(found - (np.arange(1000) + 0.5) / 1000).max()
    assert distance < 2.23 / 1000**0.5


def test_the_pattern_sees_f_hat_as_the_model_makes_it(pattern: Pattern) -> None:
    """`_latent` is the tokenizer's sum of scales, and `_back` its transpose."""
    model, rng = small(), np.random.default_rng(0)
    quantizer, (V, L) = model.vqvae.quantizer, (48, 5)
    one, other = rng.integers(0, V, (2, L))
    bounds = ((0, 1), (1, 5))

    def by_model(tokens: np.ndarray) -> np.ndarray:
        f_hat = torch.zeros(1)
        for k, (start, stop) in enumerate(bounds):
            codes = quantizer.embedding[torch.from_numpy(tokens[start:stop])].reshape(1, k + 1, k + 1, -1)
            f_hat = f_hat + quantizer.contribution(codes, k)
        return f_hat[0].permute(1, 2, 0).double().numpy()

    wanted = by_model(one) - by_model(other)  # φ's constants go
    found = pattern._latent(pattern.codes[one]) - pattern._latent(pattern.codes[other])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    direction, codes = rng.standard_normal(wanted.shape), quantizer.embedding.double().numpy()
    for k, (start, stop) in enumerate(bounds):
        changed = one.copy()
        changed[start:stop] = rng.integers(0, V, stop - start)
        step = (codes[changed] - codes[one])[start:stop].reshape(k + 1, k + 1, -1)
        gained = (pattern._latent(pattern.codes[changed] - pattern.codes[one]) * direction).sum()
        np.testing.assert_allclose((pattern._back(k, direction) * step).sum(), gained, rtol=1e-8)


def test_strength_does_not_depend_on_the_key(pattern: Pattern) -> None:
    for key in ("a", "b"):
        mark = pattern.watermark(digest(key))
        bias = np.concatenate([mark.bias(k).reshape(-1, 48) for k in range(2)])
        np.testing.assert_allclose((bias.astype(np.float64) ** 2).mean(), STRENGTH**2, rtol=1e-5)


def test_the_key_is_in_no_file_and_again_draws_the_image_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("key.txt").write_text(KEY + "\n")
    control().save("c.png")
    plan = ["-e", str(two_branches()), "--backend", "ort-cpu", "--threads", "1"]
    drawn = ["--control", "c.png", "--class", "1", "--seed", "3", *plan, "--grid", "--json"]
    assert main([*drawn, "--watermark", "@key.txt", "-o", "a.png"]) == 0
    assert main([*drawn, "--watermark", KEY, "-o", "b.png"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["watermark"] is True
    assert main([*drawn, "-o", "plain.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("plain.png").read_bytes()
    for name in ("a.png", "a-grid.png"):
        chunks = text_chunks(name)
        assert KEY not in str(chunks), "the key"
        assert chunks["watermark"] == "True"
    capsys.readouterr()
    assert main(["again", "a.png", *plan, "-o", "again.png"]) == 0
    with Image.open("a.png") as a, Image.open("again.png") as again:
        assert a.tobytes() == again.tobytes()
    assert "sampling anew" not in capsys.readouterr().err
    assert main(["again", "a.png", *plan, "--watermark", KEY, "-o", "same.png"]) == 0
    assert Path("same.png").read_bytes() == Path("a.png").read_bytes()
    capsys.readouterr()
    assert main(["again", "a.png", *plan, "--seed", "4", "-o", "other.png"]) == 0
    assert "--watermark KEY" in capsys.readouterr().err
    Path("jobs.jsonl").write_text('{"name": "j", "control": "c.png", "class": "1", "seed": 3}\n')
    assert main(["batch", "jobs.jsonl", *plan, "--watermark", KEY, "-o", "out"]) == 0
    assert KEY not in Path("out/results.jsonl").read_text()
    with Image.open("a.png") as a, Image.open("out/j.png") as j:
        assert a.tobytes() == j.tobytes()
    capsys.readouterr()
    assert main(["detect", "a.png", "--key", "@key.txt", *plan]) == 0
    assert 0 <= float(capsys.readouterr().out) <= 1
    assert main(["detect", "a.png", "--key", KEY, *plan, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    with open_plan(two_branches(), "ort-cpu", threads=1) as opened:
        found = opened.detect("a.png", KEY)
    assert (report["p"], report["score"]) == (found.p, found.score)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--watermark", ""], "the key of a watermark must be text or bytes, and not empty"),
        (["--watermark", "@gone.txt"], "the key file 'gone.txt' can't be read"),
        (["--watermark", "@fifo"], "the key file 'fifo' can't be read (it is not a regular file)"),
        (["detect", "c.png", "--key", "@/dev/zero"], "can't be read (it is not a regular file)"),
        (["detect", "c.png", "--key", "@long.txt"], "can't be read (it has over 4096 bytes)"),
        (["detect", "c.png", "--key", ""], "must be text or bytes, and not empty"),
        (["detect", "gone.png", "--key", "k"], "there is no image"),
        (["detect", "c.png"], "--key"),
        (["detect", "c.png", "--key", "k", "-e", "old.plan"], "is of format 1, which marks no images; upgrade it"),
        (["--watermark", "k", "-e", "old.plan", "--control", "c.png"], "is of format 1, which marks no images"),
        (["sheet", "--control", "c.png", "--vary", "watermark=a,b"], "--vary 'watermark=a,b' names no setting"),
    ],
)
def test_misuse_is_one_line(
    args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    control(40).save("c.png")
    build_plan(Path("old.plan"))
    os.mkfifo("fifo")
    Path("long.txt").write_text("k" * 4097)
    before = {path.name for path in tmp_path.iterdir()}
    given = args if "-e" in args else [*args, "-e", str(two_branches())]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_plan_that_does_not_say_its_codes_is_refused() -> None:
    from dataclasses import replace

    manifest = read_manifest(two_branches())
    table = {name: entry for name, entry in manifest.parameters.items() if name != "vqvae.quantizer.embedding"}
    with pytest.raises(RequestError, match="does not say what its codes are"):
        resolve_watermark(replace(manifest, parameters=table), KEY)
