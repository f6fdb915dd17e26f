"""The comparison with ControlNet, T2I-Adapter and LCM: the whole command on toys, and what its numbers rest on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import controlnet
from benchmarks.analysis.counting import count_image
from benchmarks.baselines import diffusion
from benchmarks.baselines.diffusion import METHODS, SD15, SMALL, Method, openvino_networks
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.workload import draw_control
from fixtures.toy_plan import folder, toy

SIZE = 16


ENGINES: dict[tuple[Any, ...], diffusion.Networks] = {}


def engines_of(architecture: diffusion.Architecture, method: Method, *how: Any) -> diffusion.Networks:
    """`openvino_networks`, which takes the longest by far, once for all tests of a method and precision."""
    key = (architecture.name, method.name, *how)
    if key not in ENGINES:
        ENGINES[key] = openvino_networks(architecture, method, *how)
    return ENGINES[key]


def run(file: Path, flags: str) -> dict[str, Any]:
    """One real run with the toys, as it was written; stdout is next to it."""
    with contextlib.suppress(FileExistsError):  # the toy's plan for one image is that for one and two
        (folder() / toy().plan.name.replace("-b1.2-", "-b1-")).symlink_to(toy().plan)
    out, log = io.StringIO(), io.StringIO()
    flags = f"--small --model tiny --cache {folder()} --warmup 1 --threads 1 {flags}"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
        patch.setattr(diffusion, "openvino_networks", engines_of)
        assert controlnet.main([*flags.split(), "-o", str(file)]) == 0, log.getvalue()
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert out.getvalue().splitlines()[-1] == line
    return {**json.loads(line), "stdout": out.getvalue()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All methods in float32, of 20 and 50 steps the first five."""
    file = tmp_path_factory.mktemp("controlnet") / "results.jsonl"
    return run(file, "--tiers eager,engine --precisions fp32 --timed-steps 5 --runs 3")


def rows(found: dict[str, Any], question: str, **wanted: Any) -> list[dict[str, Any]]:
    chosen = [row for row in found["results"] if row["question"] == question]
    return [row for row in chosen if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.slow
def test_every_method_is_measured_in_every_tier_alongside_ours(found: dict[str, Any]) -> None:
    works = [("ControlNet", 20), ("ControlNet", 50), ("T2I-Adapter", 20), ("LCM + ControlNet", 4)]
    theirs = rows(found, "end_to_end", whose="theirs")
    assert Counter((r["tier"], r["method"], r["steps"]) for r in theirs) == Counter(
        (tier, *work) for tier in ("eager", "engine") for work in works
    )
    for row in theirs:
        assert row["size"] == SIZE
        assert row["finite"] is True
        assert row["runs"] == 3
        assert 0 < row["min"] <= row["p50"] <= row["p95"]
        assert row["backend"] == ("openvino" if row["tier"] == "engine" else None)
    ours = rows(found, "end_to_end", whose="ours")
    candidates = {"eager": ["published way, fp32", "PyTorch, fp32"], "engine": ["openvino", "ort-cpu"]}
    assert Counter((r["tier"], r["candidate"]) for r in ours) == Counter(
        (tier, name) for tier, names in candidates.items() for name in names * len(METHODS)
    )
    assert {r["gflop"] for r in ours} == {count_image(toy().plan).total("flops") / 1e9}
    # A ratio for each of theirs to each of ours that it took turns with.
    assert Counter((r["tier"], r["method"], r["steps"], r["candidate"]) for r in rows(found, "ratio")) == Counter(
        (tier, *work, name) for tier, names in candidates.items() for work in works for name in names
    )


@pytest.mark.slow
def test_a_ratio_lies_between_the_extremes_of_the_times_that_it_is_made_of(found: dict[str, Any]) -> None:
    for row in rows(found, "ratio"):
        group = f"{row['method']} {row['size']}² {row['tier']} {row['precision']}"
        (mine,) = rows(found, "end_to_end", whose="ours", group=group, candidate=row["candidate"])
        (other,) = rows(found, "end_to_end", whose="theirs", group=group, steps=row["steps"])
        # p95 of three values is below their maximum by at most a tenth of the way from the median.
        most = [r["p50"] + (r["p95"] - r["p50"]) / 0.9 + 1e-12 for r in (mine, other)]
        assert other["min"] / most[0] <= row["p10"] <= row["times_ours"] <= row["p90"] <= most[1] / mine["min"]
        assert row["scaled"] == other["scaled"]
        assert row["compares"] == "theirs of 16×16 with ours of 8×8: not the same number of pixels"


@pytest.mark.slow
def test_steps_that_were_not_run_are_scaled_and_the_row_says_so(found: dict[str, Any]) -> None:
    for row in rows(found, "end_to_end", whose="theirs"):
        assert row["timed_steps"] == min(5, row["steps"])
        assert row["scaled"] == (row["steps"] > 5)
        # 20 steps cannot take less than 20 of the fastest; medians of parts lie near the whole's.
        assert row["p95"] > 0.5 * row["steps"] * row["step_s"]
    (short, long) = rows(found, "end_to_end", tier="eager", method="ControlNet")
    assert short["step_s"] == long["step_s"]  # measured once, scaled twice
    assert long["p50"] - short["p50"] == pytest.approx(30 * short["step_s"], rel=0.5)
    assert controlnet.scaled_seconds([10.0, 20.0], [4.0, 8.0], 2, 20) == [10 + 9 * 4, 20 + 9 * 8]
    assert controlnet.scaled_seconds([10.0], [4.0], 4, 4) == [10]


@pytest.mark.slow
def test_the_lower_precision_and_our_int8_plan_are_measured_as_well(tmp_path: Path) -> None:
    found = run(tmp_path / "r.jsonl", "--methods controlnet --precisions bf16 --int8 --timed-steps 1 --runs 1")
    assert {r["precision"] for r in rows(found, "end_to_end", whose="theirs")} == {"bf16"}
    ours = {r["candidate"]: r["precision"] for r in rows(found, "end_to_end", whose="ours")}
    assert ours == {
        "published way, bf16 autocast": "bf16",
        "PyTorch, bf16": "bf16",
        "openvino, bf16": "bf16",
        "openvino, int8": "int8",
    }
    assert all(r["finite"] for r in rows(found, "end_to_end", whose="theirs"))
    assert [r["candidate"] for r in rows(found, "ratio", steps=20)] == list(ours)


@pytest.mark.slow
def test_settings_name_what_was_compared_and_toys_are_called_toys(found: dict[str, Any]) -> None:
    settings = found["settings"]
    assert settings["theirs"] == "small, not Stable Diffusion 1.5"
    assert settings["ours"]["image_size"] == 8
    assert settings["random_weights"] is True
    assert settings["guidance"]["ControlNet"] == 7.5
    assert settings["timed_steps"] == 5
    assert found["machine"]["diffusers"] == diffusers.__version__
    assert [r["published"] for r in rows(found, "parameters")] == [None] * len(diffusion.PARTS)
    for heading in ("How many times", "How long", "What is compared with? small, not Stable Diffusion 1.5"):
        assert heading in found["stdout"]


# ---- The same work as diffusers' own ----


def networks_of(method: Method) -> tuple[diffusion.NetworkCache, diffusion.Networks]:
    workshop = diffusion.NetworkCache(SMALL, torch.float32, "cpu")
    return workshop, diffusion.assemble(SMALL, method, workshop, torch.float32, "cpu")


def pipeline_of(method: Method, workshop: diffusion.NetworkCache) -> Any:
    kind = diffusers.StableDiffusionAdapterPipeline if method.adapter else diffusers.StableDiffusionControlNetPipeline
    pipeline = kind(
        vae=workshop("vae"),
        text_encoder=workshop("text"),
        tokenizer=None,
        unet=workshop(method.unet),
        scheduler=diffusion.scheduler_of(method),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **{method.branch: workshop(method.branch)},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", METHODS)
def test_an_image_is_the_one_that_diffusers_pipeline_makes(name: str) -> None:
    method = METHODS[name]
    workshop, networks = networks_of(method)
    control, steps = draw_control(2 * SIZE), 5
    drawn = diffusion.draw(networks, control, 7, SIZE, steps, steps)
    with torch.no_grad():
        states = networks.text(diffusion.prompt_ids(SMALL, 2))
        latents = pipeline_of(method, workshop)(
            prompt_embeds=states[1:],
            negative_prompt_embeds=states[:1],
            image=Image.fromarray(control),
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            guidance_scale=method.guidance,
            generator=torch.Generator().manual_seed(7),
            output_type="latent",
        ).images
    # One batch of prompts instead of two, and another order of the same sums: nothing but rounding.
    torch.testing.assert_close(drawn.latents, latents, rtol=1e-4, atol=1e-4)
    assert drawn.latents.std() > 0.1
    with torch.no_grad():
        decoded = workshop("vae").decode(latents / workshop("vae").config.scaling_factor).sample
    expected = np.round(np.asarray((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)) * 255)
    assert np.abs(drawn.pixels - expected).max() <= 1
    assert drawn.pixels.shape == (1, SIZE, SIZE, 3)


@pytest.mark.parametrize("name", ["t2i", "lcm"])  # an adapter, ControlNet, and guidance as an embedding
def test_an_engine_computes_what_pytorch_computes(name: str) -> None:
    _, networks = networks_of(METHODS[name])
    engines = engines_of(SMALL, METHODS[name], SIZE, "f32", 1)
    control = draw_control(SIZE)
    ours, theirs = (diffusion.draw(n, control, 3, SIZE, 4, 4) for n in (networks, engines))
    # Float32 sums in another order over four steps; latents are of size 10.
    torch.testing.assert_close(theirs.latents, ours.latents, rtol=1e-3, atol=1e-3)
    assert np.abs(theirs.pixels.astype(int) - ours.pixels).max() <= 1


def test_control_and_seed_matter() -> None:
    for method in METHODS.values():
        _, networks = networks_of(method)
        control = draw_control(SIZE)
        first, same, other_seed, other_control = (
            diffusion.draw(networks, image, seed, SIZE, 3, 3).latents
            for image, seed in ((control, 0), (control, 0), (control, 1), (255 - control, 0))
        )
        assert torch.equal(first, same)
        assert not torch.allclose(first, other_seed, atol=1e-2)
        assert not torch.allclose(first, other_control, atol=1e-4)


def test_the_networks_have_the_published_numbers_of_parameters() -> None:
    found = {row["part"]: row["parameters"] for row in controlnet.parameter_rows(SD15)}
    assert found == {
        "text": 123_060_480,
        "unet": 859_520_964,
        "lcm_unet": 859_602_884,
        "controlnet": 361_279_120,
        "adapter": 77_369_280,
        "vae": 83_653_863,
    }


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"cross_attention_dim": 1024}),
        ("controlnet", {"block_out_channels": (320, 640, 1280, 1024)}),
        ("text", {"num_hidden_layers": 11}),
        ("adapter", {"num_res_blocks": 1}),
    ],
)
def test_a_network_of_another_size_is_refused(part: str, change: dict[str, Any]) -> None:
    wrong = dataclasses.replace(SD15, **{part: {**getattr(SD15, part), **change}})
    with pytest.raises(BenchmarkError, match=rf"{part} of .* has [\d,]+ parameters .*; give it the published sizes"):
        diffusion.build(wrong, part, torch.float32, "cpu")


def test_operations_are_those_of_stable_diffusion() -> None:
    counts = {name: diffusion.count_flops(SD15, method, 512) for name, method in METHODS.items()}
    # Published: 803 GFLOP for a row of the UNet at 512×512 (two rows of a guided step; ControlNet adds its own).
    assert counts["t2i"]["step"] / 2e9 == pytest.approx(803, rel=0.01)
    assert counts["lcm"]["step"] == pytest.approx(counts["controlnet"]["step"] / 2, rel=1e-3)
    assert counts["controlnet"]["control"] == 0 < counts["t2i"]["control"]
    small = diffusion.count_flops(SD15, METHODS["controlnet"], 256)
    assert 4 < counts["controlnet"]["step"] / small["step"] < 5  # pixels × 4, attention more
    assert counts["controlnet"]["text"] == small["text"]


def test_what_training_starts_from_zero_is_small_but_not_zero() -> None:
    branch = diffusion.build(SMALL, "controlnet", torch.float32, "cpu")
    for name, p in branch.named_parameters():
        if p.ndim >= 2:
            expected = p[0].numel() ** -0.5 * (0.1 if diffusion._starts_from_zero(name) else 1)
            assert float(p.std()) == pytest.approx(expected, rel=0.35), name
    assert sum(map(diffusion._starts_from_zero, dict(branch.named_parameters()))) > 2


def test_only_one_unet_is_held_at_once() -> None:
    workshop = diffusion.NetworkCache(SMALL, torch.float32, "cpu")
    vae, unet = workshop("vae"), workshop("unet")
    assert workshop("unet") is unet
    assert workshop("lcm_unet") is not unet
    assert workshop("vae") is vae
    assert [name for name in workshop._parts if name.endswith("unet")] == ["lcm_unet"]


@pytest.mark.slow
def test_compiled_networks_and_loop_are_compared(tmp_path: Path) -> None:
    found = run(tmp_path / "r.jsonl", "--methods lcm --tiers compiled --precisions fp32 --runs 1")
    (row,) = rows(found, "ratio")
    assert (row["tier"], row["against"], row["candidate"]) == (
        "compiled",
        "compiled",
        "published way, fp32, compiled",
    )
    _, networks = networks_of(METHODS["lcm"])
    control = draw_control(SIZE)
    eager, fast = (diffusion.draw(n, control, 3, SIZE, 4, 4) for n in (networks, diffusion.compiled(networks)))
    torch.testing.assert_close(fast.latents, eager.latents, rtol=1e-3, atol=1e-3)


# ---- Misuse ----


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("--runs 0", "give at least 1"),
        ("--warmup -1", "warmup is -1; give at least 0"),
        ("--timed-steps 0", "give at least 1"),
        ("--threads 0", "give 1…1024"),
        ("--sizes 250", "give multiples of 16"),
        ("--sizes x", "give multiples of 16"),
        ("--sizes 272", "multiples of 64"),
        ("--methods ip-adapter", "give some of controlnet,t2i,lcm"),
        ("--tiers fast", "give some of eager,engine,compiled"),
        ("--precisions fp16", "give fp32,bf16"),
        ("--model d17", "invalid choice"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_with_a_remedy(
    flags: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        controlnet.main(flags.split())
    assert stop.value.code == 2
    assert remedy in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_reported_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert controlnet.main(["-o", str(tmp_path / "no" / "folder.jsonl")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.controlnet: error: ")


def test_a_gpu_is_by_default_measured_in_half_precision_with_all_steps() -> None:
    args = controlnet.parse_args(["--device", "cuda"])
    assert (args.precisions, args.timed_steps, args.sizes) == (("fp16",), None, (256, 512))
    assert set(args.tiers) == {"eager", "engine", "compiled"}
    args = controlnet.parse_args(["--device", "cuda", "--precisions", "fp16,bf16", "--timed-steps", "3"])
    assert (args.precisions, args.timed_steps) == (("fp16", "bf16"), 3)
