"""`more_smooth`: codes mixed by Gumbel noise, in PyTorch and in the exported step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from car_export import verify
from car_export.plan import ExportOptions, build_plan
from car_runtime.format import manifest as schema
from car_train.model import Model
from car_train.model.sample import TOP_P_OFF, gumbel_noise, keep_top, sample, smooth_codes
from fixtures.small import small_model

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


def test_smooth_and_plain_images_differ(plan: Path) -> None:
    plain, smooth = (run_plan(plan, [1, 3], on, static=False) for on in (False, True))
    np.testing.assert_array_equal(plain[:, 0], smooth[:, 0])  # the first scale is drawn before any code is mixed
    assert (plain != smooth).any()


def test_without_the_option_the_step_has_no_such_input(model: Model, tmp_path: Path) -> None:
    plan = build_plan(model, ExportOptions(output=tmp_path / "plain.plan", name="plain"))
    names = {port.name for port in schema.read_manifest(plan).graphs["step"].inputs}
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
