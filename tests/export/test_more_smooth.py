"""`more_smooth`: codes mixed by Gumbel noise, in PyTorch and in the exported step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import car_runtime
from car_export import verify
from car_export.plan import ExportOptions, build_plan
from car_runtime.cli.main import main as car_run
from car_runtime.format import manifest as schema
from car_runtime.request import SmoothNoise
from car_train import checkpoint
from car_train.cli import main as car_train
from car_train.model import Model
from car_train.model.sample import TOP_P_OFF, gumbel_noise, keep_top, sample, smooth_codes
from fixtures.small import small_model
from fixtures.small_plans import small_plan

CFG, TOP_K, TOP_P = 2.0, 20, 0.95
SEEDS = (4, 5)


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model(control=False)


@pytest.fixture(scope="module")
def plan(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Building compares every graph with PyTorch, smooth and not."""
    output = tmp_path_factory.mktemp("smooth") / "smooth.plan"
    return build_plan(model, ExportOptions(output=output, name="smooth", batches=(2,), more_smooth=True))


def uniforms(tokens: int) -> torch.Tensor:
    rows = [np.random.default_rng(seed).random(tokens, dtype=np.float32) for seed in SEEDS]
    return torch.from_numpy(np.stack(rows))


def run_plan(plan: Path, labels: list[int], smooth: bool, static: bool) -> NDArray[np.int64]:
    """Tokens [B, L] of the plan's graphs in ONNX Runtime, scale after scale."""
    manifest = schema.read_manifest(plan)
    classes, vocab, L, B = manifest.model.classes, manifest.model.vocab, manifest.tokens, len(labels)

    def session(name: str) -> ort.InferenceSession:
        return ort.InferenceSession(plan / manifest.graphs[name].file, providers=["CPUExecutionProvider"])

    rows = np.array([*labels, *[classes] * B])
    x, modulation = session("condition").run(["start", "modulation"], {"label": rows})
    E = manifest.model.latent_size
    state: dict[str, Any] = {"x": x, "f_hat": np.zeros((B, manifest.model.latent_channels, E, E), np.float32)}
    past: dict[str, list[np.ndarray]] = {}
    noise, random = gumbel_noise(SEEDS, L, vocab).numpy(), uniforms(L).numpy()
    drawn = []
    for k, scale in enumerate(manifest.scales):
        name = f"step.{k:02d}.b{B}" if static else "step"
        step, grid, mine = session(name), (B, scale.side, scale.side), slice(scale.start, scale.stop)
        feed = state | {
            "modulation": modulation,
            "uniforms": random[:, mine].reshape(grid),
            "cfg": np.array([CFG], np.float32),
            "top_k": np.array([TOP_K]),
            "top_p": np.array([TOP_P], np.float32),
            "known": np.zeros(grid, np.int64),
            "known_mask": np.zeros(grid, bool),
            "smooth": np.array([smooth]),
            "smooth_noise": noise[:, mine].reshape(*grid, vocab),
        }
        feed |= {port: verify._read(plan, manifest.tensors[tensor]) for port, tensor in scale.constants.items()}
        feed |= {f"past_{n[4:]}": np.concatenate([np.zeros_like(a[0][:0]), *a]) for n, a in past.items()}
        outputs = [port.name for port in manifest.graphs[name].outputs]
        if not past:
            kv = (0, len(rows), manifest.model.heads, manifest.model.width // manifest.model.heads)
            feed |= {f"past_{n[4:]}": np.zeros(kv, np.float32) for n in outputs if n.startswith("new_")}
        present = {port.name for port in step.get_inputs()}
        got = dict(zip(outputs, step.run(outputs, {n: a for n, a in feed.items() if n in present}), strict=True))
        drawn.append(got["tokens"].reshape(B, -1))
        state = {"x": got["next_x"], "f_hat": got["f_hat_out"]}
        for n in outputs:
            if n.startswith("new_"):
                past.setdefault(n, []).append(got[n])
    return np.concatenate(drawn, 1)


@pytest.mark.parametrize("static", [False, True], ids=["step", "static"])
@pytest.mark.parametrize("smooth", [False, True], ids=["off", "on"])
def test_the_step_draws_what_pytorch_draws_with_the_same_noise(
    plan: Path, model: Model, smooth: bool, static: bool
) -> None:
    assert model.car is not None
    tokens, labels = model.config.vqvae.tokens, [1, 3]
    noise = gumbel_noise(SEEDS, tokens, model.config.vqvae.vocab) if smooth else None
    expected, _ = sample(
        model.vqvae,
        model.car,
        torch.tensor(labels),
        uniforms(tokens),
        cfg=CFG,
        top_k=TOP_K,
        top_p=TOP_P,
        smooth_noise_BLV=noise,
    )
    np.testing.assert_array_equal(run_plan(plan, labels, smooth, static), expected.numpy())


def expected_of(model: Model, seeds: list[int], smooth: bool) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """What PyTorch's `sample` draws of class 3: tokens [n, L], images [n, H, W, 3]."""
    assert model.car is not None
    config = model.config.vqvae
    rows = [np.random.default_rng(seed).random(config.tokens, dtype=np.float32) for seed in seeds]
    tokens, pixels = sample(
        model.vqvae,
        model.car,
        torch.full((len(seeds),), 3),
        torch.from_numpy(np.stack(rows)),
        cfg=CFG,
        top_k=TOP_K,
        top_p=TOP_P,
        smooth_noise_BLV=gumbel_noise(seeds, config.tokens, config.vocab) if smooth else None,
    )
    return tokens.numpy(), ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_the_runtime_draws_what_pytorch_draws_smooth_or_not(plan: Path, model: Model) -> None:
    settings: dict[str, Any] = {"label": 3, "seed": 4, "n": 6, "cfg": CFG, "top_k": TOP_K, "top_p": TOP_P}
    seeds = list(range(4, 10))
    with car_runtime.open_plan(plan, "ort-cpu", threads=1) as opened:
        for smooth in (False, True, False, True):  # what is loaded for one request does not linger in the next
            found = opened.generate(**settings, more_smooth=smooth)
            tokens, images = expected_of(model, seeds, smooth)
            np.testing.assert_array_equal(found.tokens, tokens)
            # Both decode in float32: a value may fall on the other side of a rounding border.
            assert np.abs(found.images.astype(int) - images).max() <= 1
        alone = opened.generate(**settings | {"seed": 8, "n": 1}, more_smooth=True)
        np.testing.assert_array_equal(alone.tokens[0], found.tokens[4])
        # Known tokens keep their own codes.
        again = opened.generate(
            **settings | {"n": 1}, more_smooth=True, known_tokens=tokens[0], known_mask=np.ones(tokens.shape[1], bool)
        )
        plain = opened.generate(
            **settings | {"n": 1}, known_tokens=tokens[0], known_mask=np.ones(tokens.shape[1], bool)
        )
        np.testing.assert_array_equal(again.images, plain.images)


def test_both_commands_draw_the_same_smooth_image(plan: Path, model: Model, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "checkpoint")
    common = ["--class", "1", "--seed", "3", "--more-smooth", "-o"]
    assert car_train(["sample", str(tmp_path / "checkpoint"), *common, str(tmp_path / "a.png")]) == 0
    assert car_run(["-e", str(plan), "--backend", "ort-cpu", *common, str(tmp_path / "b.png")]) == 0
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert b.text["more_smooth"] == "True"  # type: ignore[attr-defined]
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b.convert("RGB"))).max() <= 1


def test_the_runtimes_noise_is_pytorchs_scale_after_scale() -> None:
    noise = SmoothNoise([4, 5])
    parts = [noise.next(tokens, 33) for tokens in (1, 4, 9)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), gumbel_noise([4, 5], 14, 33).numpy())


def test_a_plan_without_the_option_refuses_the_flag_and_allocates_nothing_for_it(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = small_plan("fp32")
    assert car_run(["-e", str(plain), "--more-smooth", "-o", str(tmp_path / "x.png")]) == 2
    assert (
        "was exported without; leave it out, or export the plan again with --more-smooth" in capsys.readouterr().err
    )
    for path, expected in ((plain, set()), (plan, {"smooth", "smooth_noise"})):
        with car_runtime.open_plan(path, "ort-cpu", threads=1) as opened, opened._buffers(1, 1, False, ()) as buffers:
            assert {name for name in buffers.inputs[0] if "smooth" in name} == expected


def test_smooth_and_plain_images_differ(plan: Path) -> None:
    plain, smooth = (run_plan(plan, [1, 3], on, static=False) for on in (False, True))
    np.testing.assert_array_equal(plain[:, 0], smooth[:, 0])  # the first scale is drawn before any code is mixed
    assert (plain != smooth).any()


@pytest.mark.parametrize(("kind", "format"), [("fp32", 2), ("fp16", 1)])
def test_without_the_option_the_step_has_no_such_input(kind: str, format: int) -> None:
    names = {port.name for port in schema.read_manifest(small_plan(kind, format)).graphs["step"].inputs}
    assert not names & {"smooth", "smooth_noise"}


def test_mixed_codes_are_of_kept_tokens_and_sharper_at_finer_scales() -> None:
    logits = torch.tensor([[4.0, 3.0, 0.0, -1.0]])
    kept = keep_top(logits, torch.tensor([2]), torch.tensor([TOP_P_OFF]))
    noise = gumbel_noise([0], 1, 4)[0]
    assert noise.isfinite().all()
    weights = [smooth_codes(kept, noise, torch.tensor([ratio]), torch.eye(4))[0] for ratio in (0.0, 1.0)]
    for ratio, found in zip((0.0, 1.0), weights, strict=True):
        exact = (logits[0, :2] * (1 + ratio) + noise[0, :2]) / max(0.27 * (1 - 0.95 * ratio), 0.005)
        torch.testing.assert_close(found[:2], exact.softmax(-1))
        assert not found[2:].any()
    assert weights[1].max() >= weights[0].max()


def test_noise_is_gumbels_and_each_seeds_own() -> None:
    noise = gumbel_noise([1, 2, 1], 100, 200)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    # Mean γ = 0.5772 and variance π²/6; four deviations of their estimates from 20,000 numbers.
    assert noise[0].mean().item() == pytest.approx(0.5772, abs=0.037)
    assert noise[0].var().item() == pytest.approx(np.pi**2 / 6, abs=0.11)
