"""`car-run verify`: a plan that does what PyTorch did passes, one that doesn't fails, and the report says where."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from car_export import goldens as golden_arrays
from car_runtime import BackendError, GenerationConfig, PlanError, open_plan
from car_runtime import agreement as acceptance
from car_runtime.agreement import LIMITS
from car_runtime.cli.main import main
from car_runtime.conditioning import Conditioning
from car_runtime.format.goldens import GOLDENS, Goldens, golden_file, read_goldens
from car_runtime.format.manifest import WEIGHTS, Manifest, describe_files, read_manifest, write_manifest
from car_runtime.system.process import peak_rss
from car_runtime.verify import verify
from car_train.model.sample import control_pyramid, sample
from car_train.model.sample import draw as reference_draw
from fixtures.golden import Golden
from fixtures.runtime_plan import build_plan as tiny_plan
from fixtures.small import small_model
from fixtures.small_plans import small_plan

RUNTIME = Path(__file__).parents[2] / "runtime"
L = 30
"""Tokens of an image of the golden model `tiny`."""
QUICK: dict[str, Any] = {"backend": "ort-cpu", "threads": 1, "warmup": 1, "runs": 2}


@pytest.fixture
def built(plans: Callable[..., Path], tiny: Golden) -> Callable[[str], Path]:
    """Plans that other tests read too: copy one before changing it. The model of fp32 is the golden `tiny`."""
    return lambda kind: plans(tiny) if kind == "fp32" else small_plan({"var": "fp32"}.get(kind, kind))


def relist(root: Path, *names: str) -> None:
    """Make the manifest's hashes agree with files that were changed on purpose."""
    manifest = read_manifest(root)
    write_manifest(root, replace(manifest, files={**manifest.files, **describe_files(root, names)}))


def altered(source: Path, target: Path, graph: str, tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A copy of a plan in which one weight is another, with hashes that agree."""
    plan = Path(shutil.copytree(source, target))
    manifest = read_manifest(plan)
    file = manifest.graphs[graph if graph in manifest.graphs else f"{graph}.{manifest.model.default_branch}"].file
    for found in onnx.load(plan / file, load_external_data=False).graph.initializer:
        if found.name.removesuffix(".T") == tensor:  # half-precision plans store matrices transposed
            place = {entry.key: entry.value for entry in found.external_data}
            dtype = onnx.helper.tensor_dtype_to_np_dtype(found.data_type)
            weights = np.memmap(plan / WEIGHTS, dtype, "r+", int(place["offset"]), tuple(found.dims))
            weights[...] = change(np.array(weights))
            weights.flush()
            relist(plan, WEIGHTS)
            return plan
    raise AssertionError(f"{graph} has no {tensor}")


# -- the goldens -----------------------------------------------------------------------------------------------------


def test_goldens_are_those_of_the_reference_loop(
    built: Callable[[str], Path], models: Callable[..., Any], tiny: Golden
) -> None:
    plan, model = built("fp32"), models(tiny)
    stored = read_goldens(plan, read_manifest(plan), "canny")
    assert stored.control is not None
    pyramid = control_pyramid(Image.fromarray(stored.control), [16 * side for side in tiny.sides])
    noise = torch.from_numpy(np.random.default_rng(stored.seed).random((1, L), dtype=np.float32))
    label = torch.tensor([stored.label])
    tokens, pixels = sample(model.vqvae, model.car, label, noise, pyramid, stored.cfg, top_k=1)
    np.testing.assert_array_equal(stored.tokens, tokens[0].numpy())
    np.testing.assert_array_equal(stored.image, ((pixels[0] + 1) * 127.5).round().permute(1, 2, 0).numpy())
    sampled, _ = sample(model.vqvae, model.car, label, noise, pyramid, stored.cfg, stored.top_k, stored.top_p)
    np.testing.assert_array_equal(stored.sampled_tokens, sampled[0].numpy())
    np.testing.assert_array_equal(stored.logit_index[:, 0], stored.tokens)
    assert (np.diff(stored.logit_value, axis=1) <= 0).all()
    assert 0 < np.count_nonzero(stored.control) < stored.control.size / 2, "the control is no drawing of edges"
    assert (stored.cfg, stored.top_k, round(stored.top_p, 6)) == (4.0, 128, 0.95)


def test_goldens_are_guided_even_where_the_plan_is_not(tmp_path: Path) -> None:
    golden_arrays.write_goldens(tmp_path, small_model(control=False), cfg=0.0, top_k=0, top_p=0.0)
    with np.load(tmp_path / GOLDENS) as stored:
        assert stored["cfg"] == 1
        assert "control" not in stored


def test_goldens_are_the_same_bytes_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for year in (1999, 2030):
        monkeypatch.setattr("time.time", lambda year=year: (year - 1970) * 31556952.0)
        golden_arrays.write_goldens(tmp_path, small_model(), cfg=2.0, top_k=0, top_p=0.0)
        written.append((tmp_path / GOLDENS).read_bytes())
    assert written[0] == written[1]
    with np.load(tmp_path / GOLDENS, allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype.hasobject for name in arrays} == dict.fromkeys(arrays, False)


@pytest.mark.slow
def test_goldens_of_a_256_pixel_model_are_small(tmp_path: Path, models: Callable[..., Any]) -> None:
    golden_arrays.write_goldens(tmp_path, models(Golden("ten")), cfg=4.0, top_k=900, top_p=0.95)
    assert (tmp_path / GOLDENS).stat().st_size <= 300_000


# -- passing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "limits"), [("fp32", "fp32"), ("fp16", "fp16"), ("var", "fp32")])
def test_a_plan_passes_where_it_was_made(built: Callable[[str], Path], kind: str, limits: str) -> None:
    report = verify(built(kind), **QUICK)
    assert report["passed"], report["checks"]
    assert report["settings"]["limits"] == limits
    forced = report["agreement"]["teacher_forced"]
    assert [scale["side"] for scale in forced["scales"]] == [
        scale.side for scale in read_manifest(built(kind)).scales
    ]
    # What is stored leaves no room for a comparison of something with itself.
    assert 0 < forced["all"]["largest"] < (2e-4 if limits == "fp32" else 0.2)
    assert report["agreement"]["greedy"] == {"equal": 1.0, "first_difference": None}
    if limits == "fp32":
        assert report["agreement"]["sampled"]["equal"] == 1.0


def test_the_report_has_every_stage_and_adds_up(built: Callable[[str], Path]) -> None:
    report = verify(built("fp32"), batches=(1, 3), **QUICK)
    stages = ["control", "condition", *(f"scale_{k}" for k in range(4)), "decoder", "image"]
    assert [(entry["batch"], entry["runs"], list(entry["stages"])) for entry in report["latency"]] == [
        (1, 2, stages),
        (3, 2, stages),
    ]
    for entry in report["latency"]:
        parts = [found["p50"] for stage, found in entry["stages"].items() if stage != "image"]
        assert all(0 < found["p50"] <= found["p95"] for found in entry["stages"].values())
        assert sum(parts) <= 1.5 * entry["stages"]["image"]["p50"]
    cold = report["cold_start"]
    assert cold["first_image"] > 0
    assert cold["open"] > 0
    assert 0 <= cold["jit"] <= cold["first_image"]
    if cold["before_open"] is not None:
        assert cold["process_start_to_image"] > cold["before_open"] + cold["open"]
    manifest = read_manifest(built("fp32"))
    size = sum(path.stat().st_size for path in built("fp32").iterdir())
    assert (report["plan"]["bytes"], report["plan"]["engine_bytes"]) == (size, 0)
    assert report["plan"]["weight_bytes"] == manifest.files[WEIGHTS].bytes
    if report["memory"]["peak_rss"] is not None:
        assert report["memory"]["peak_rss"] > 20e6
    assert report["machine"]["cores"] == os.cpu_count()
    assert report["backend"]["name"] == "ort-cpu"


def test_every_measured_run_computes_control_and_class_anew(
    built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, counted = built("fp32"), []
    compute = Conditioning.compute_features

    def count(conditioning: Conditioning, image: Image.Image, branch: str) -> Any:
        counted.append(image.size)
        return compute(conditioning, image, branch)

    monkeypatch.setattr(Conditioning, "compute_features", count)
    verify(plan, **QUICK | {"warmup": 2, "runs": 5})
    assert len(counted) == 1 + 2 + 5  # the first image; comparing finds its features there


def test_a_stream_gives_the_logits_that_it_draws_from(built: Callable[[str], Path]) -> None:
    with open_plan(built("fp32"), "ort-cpu", threads=1) as plan:
        stored = read_goldens(plan.path, plan.manifest)
        config = GenerationConfig(control=stored.control, label=stored.label, cfg=stored.cfg, top_k=1, top_p=0, n=2)
        for scale in list(plan.stream(config, logits=True)):
            assert scale.logits is not None
            assert scale.logits.shape == (2, *scale.tokens.shape[1:], plan.manifest.model.vocab)
            assert (scale.logits.argmax(-1) == scale.tokens).all()
        free = plan.generate(config)
        given = {"known_tokens": free.tokens, "known_mask": np.ones(free.tokens.shape, bool)}
        forced = [scale.logits for scale in plan.stream(config, seed=5, logits=True, **given)]
        drawn = [scale.logits for scale in plan.stream(config, logits=True)]
    for found, wanted in zip(forced, drawn, strict=True):
        np.testing.assert_array_equal(found, wanted)


# -- failing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "tensor", "change"),
    [
        ("step", "car.base.blocks.1.mlp.fc2.weight", lambda w: 0 * w),
        ("step", "car.base.blocks.0.attn.proj.weight", lambda w: -w),
        ("step", "quantizer.embedding", lambda w: np.roll(w, 1, axis=0)),
        ("decoder", "vqvae.decoder.conv_in.weight", lambda w: 1.5 * w),
        ("control", "branch.encoder.conv_out.weight", lambda w: 0 * w),
    ],
)
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_a_plan_with_another_weight_fails(
    built: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    graph: str,
    tensor: str,
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    plan = altered(built(kind), tmp_path / "altered.plan", graph, tensor, change)
    report = verify(plan, **QUICK)
    assert not report["passed"]
    failed = {check["name"] for check in report["checks"] if not check["passed"]}
    assert ("image of the golden tokens: levels off" in failed) == (graph == "decoder" or "quantizer" in tensor)
    assert ("logits: largest error ÷ range" in failed) == (graph != "decoder")


def test_logits_that_are_not_finite_fail_and_the_report_is_still_json(
    built: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = altered(built("fp32"), tmp_path / "nan.plan", "step", "car.base.head.weight", lambda w: w * np.nan)
    output = tmp_path / "report.json"
    argv = ["verify", plan, "--backend", "ort-cpu", "--threads", 1, "--runs", 1, "--warmup", 0, "-o", output]
    assert main([str(a) for a in argv]) == 1
    out, err = capsys.readouterr()
    assert out == f"{output}\n"
    assert "inf or nan" in err
    assert err.splitlines()[-1].startswith("memory: ")
    report = json.loads(output.read_text(), parse_constant=lambda name: pytest.fail(f"the report has {name}"))
    assert not report["passed"]
    assert not report["agreement"]["teacher_forced"]["all"]["finite"]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.json"]


def test_a_draw_that_is_not_the_definition_fails(built: Callable[[str], Path]) -> None:
    """The sampled run is judged on its own logits, so right logits do not hide a wrong draw."""
    report = verify(built("fp32"), **QUICK)
    agreement = report["agreement"]
    agreement["sampled"]["drawn_by_the_definition"] = 0.9
    failed = [check["name"] for check in acceptance.judge(agreement, LIMITS["fp32"]) if not check["passed"]]
    assert failed == ["sampled run: share drawn by the definition"]


def test_the_first_difference_of_a_run_is_located_and_weighed(built: Callable[[str], Path]) -> None:
    manifest = read_manifest(built("fp32"))
    stored = read_goldens(built("fp32"), manifest)
    got = stored.tokens.copy()
    got[14 + 6] = stored.logit_index[20, 3]  # scale 3 of side 4 starts at 14; 6 is row 1, column 2
    got[14 + 9] = _unlisted(stored, 23)
    found = acceptance._tokens(manifest, stored, got, stored.tokens)
    assert found["equal"] == pytest.approx((L - 2) / L)
    value = stored.logit_value
    gap = max(value[20, 0] - value[20, 3], value[23, 0] - value[23, 15]) / stored.logit_range
    expected = {"token": 20, "scale": 3, "row": 1, "column": 2, "in_this_scale": 2, "gap": pytest.approx(gap)}
    assert found["first_difference"] == expected


def _unlisted(stored: Goldens, token: int) -> int:
    """A code that is not among the largest of a token."""
    return min(set(range(128)) - set(stored.logit_index[token].tolist()))


def test_the_draw_is_that_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    logits, uniforms = rng.normal(0, 3, (200, 50)).astype(np.float32), rng.random(200, dtype=np.float32)
    logits[:20] = np.round(logits[:20])  # ties
    for top_k, top_p in ((50, 2.0), (1, 2.0), (7, 0.6), (50, 0.8)):
        expected = reference_draw(
            torch.from_numpy(logits), torch.from_numpy(uniforms), torch.tensor([top_k]), torch.tensor([top_p])
        )
        got = acceptance.draw(logits, uniforms, top_k, top_p)
        assert (got == expected.numpy()).mean() >= 0.99  # float32 there, float64 here: a border may fall otherwise


# -- what cannot be verified -----------------------------------------------------------------------------------------


def _without(plan: Path, change: Callable[[Manifest], Manifest]) -> Path:
    write_manifest(plan, change(read_manifest(plan)))
    return plan


def test_an_older_plan_says_to_export_it_again(
    built: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Path(shutil.copytree(built("fp32"), tmp_path / "old.plan"))
    _without(plan, lambda m: replace(m, files={n: e for n, e in m.files.items() if n != GOLDENS}))
    assert main(["verify", str(plan)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("car-run: error: the plan 'tiny' lacks goldens.npz, which verifying needs; export it again")
    assert err.count("\n") == 1
    with pytest.raises(PlanError, match=r"lacks goldens\.npz"):
        verify(tiny_plan(tmp_path / "tiny.plan"))


def test_a_step_that_keeps_its_logits_says_to_export_again(tmp_path: Path) -> None:
    """Of format 1; in format 2 every step gives them."""
    old = Path(__file__).parents[1] / "data" / "v0.1.0" / "small.plan"
    plan = Path(shutil.copytree(old, tmp_path / "old.plan"))

    def forget(manifest: Manifest) -> Manifest:
        step = manifest.graphs["step"]
        outputs = tuple(port for port in step.outputs if port.name != "logits")
        return replace(manifest, graphs={**manifest.graphs, "step": replace(step, outputs=outputs)})

    with pytest.raises(PlanError, match=r"lacks the step's output 'logits', .*; export it again"):
        verify(_without(plan, forget))


def test_a_backend_that_cannot_run_the_plan_is_an_error_of_its_own(built: Callable[[str], Path]) -> None:
    with pytest.raises(BackendError, match="computes in bfloat16"):
        verify(built("bf16"), "ort-cpu")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": np.zeros(29, np.int64)}, r"tokens is int64 \[29\], not int64 \[30\]"),
        ({"logit_value": np.zeros((L, 16))}, r"logit_value is float64"),
        ({"control": None}, "control is missing"),
        ({"sampled_tokens": np.full(L, 128)}, r"sampled_tokens leaves 0…127"),
        ({"label": np.array([{}])}, "cannot read goldens.canny.npz"),
    ],
)
def test_goldens_that_do_not_fit_are_refused(
    built: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    plan, file = Path(shutil.copytree(built("fp32"), tmp_path / "bad.plan")), golden_file("canny")
    with np.load(plan / file) as stored:
        arrays = {name: value for name, value in {**stored, **change}.items() if value is not None}
    np.savez(plan / file, **arrays)
    relist(plan, file)
    with pytest.raises(PlanError, match=f"{says}.*; export the plan again"):
        verify(plan)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (30,), \x00}\n",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (30,), }(\n",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (" + b"(" * 5000 + b"\n",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (3" + b"0" * 5000 + b",), }\n",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (30,), }\n",
        b"{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (30,), }\n",
    ],
    ids=["a null byte", "an open bracket", "many of them", "a long number", "objects", "records"],
)
def test_a_header_is_read_as_numpy_writes_it_and_never_evaluated(
    built: Callable[[str], Path], tmp_path: Path, header: bytes
) -> None:
    plan = Path(shutil.copytree(built("fp32"), tmp_path / "bad.plan"))
    with zipfile.ZipFile(plan / GOLDENS) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["tokens.npy"] = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(240)
    with zipfile.ZipFile(plan / GOLDENS, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    relist(plan, GOLDENS)
    with pytest.raises(PlanError, match=r"cannot read goldens\.npz \(an array whose header is not as"):
        read_goldens(plan, read_manifest(plan))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--runs", "0"], "runs is 0, but must be a whole number from 1"),
        (["--warmup", "-1"], "warmup is -1"),
        (["--batch", "0"], "batch is 0"),
        (["--batch", "1,x"], "argument --batch: invalid"),
        (["--runs", "x"], "see car-run verify --help"),
        (["--threads", "0"], "threads is 0"),
        (["--backend", "gpu"], "there is no backend 'gpu'"),
        (["-o", "report.txt"], "but it is written as JSON; name it *.json"),
        (["-o", "no/report.json"], "the output's directory 'no' does not exist"),
        (["--control", "x.png"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(
    built: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = str(built("fp32"))
    capsys.readouterr()
    assert main(["verify", plan, *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_its_report(built: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["verify", str(built("fp16")), "--backend", "ort-cpu", "--threads", "1", "--runs", "1", "--warmup", "0"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out == "passed\n"
    assert "pass  logits: largest error ÷ range" in err
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert (report["format"], report["plan"]["name"]) == (1, "small-fp16")


@pytest.mark.parametrize("command", ["verify", "doctor"])
def test_help_of_a_command_loads_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from car_runtime.cli.main import main; code = main(sys.argv[1:]);"
        "print(code, [name for name in ('numpy', 'PIL', 'onnxruntime', 'cuda', 'openvino') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, "--help"],
        env={**os.environ, "PYTHONPATH": str(RUNTIME)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(f"usage: car-run {command} ")
    assert done.stdout.endswith("0 []\n")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child may be handed its parent's peak")
def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    before = np.ones(60_000_000)  # 0.5 GB
    code = "from car_runtime.system.process import peak_rss; print(peak_rss())"
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    ours = peak_rss()
    assert ours is not None
    assert peak < before.nbytes < ours
