"""What the exporter promises: weights once, graphs that agree with PyTorch in every form, nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image

import car_runtime
from car_export import verify
from car_export.cli import main as build_engines
from car_export.config import ExportOptions
from car_export.graphs import PhasedUp, phases_of
from car_export.plan2 import build_plan_of_2
from car_export.quantize import sites
from car_runtime.backends.onnxruntime.session import needless_optimizers
from car_runtime.editing.edit import Edit, prepare
from car_runtime.format import manifest as schema
from car_train import checkpoint
from car_train.model.sample import control_pyramid, sample
from car_train.model.vqvae import Up, join_tokens
from fixtures.small import small_model

KINDS = {
    "fp32": "--batch 1,2 --top-k 0 --top-p 0",
    "fp16-weights": "--weights fp16",
    "fp16": "--precision fp16",
    "var": "",
}
"""Kind → flags of the command."""
L = 39
"""Tokens of an image of `small_model`, which has 20×20 pixels."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(small_model(), tmp_path_factory.mktemp("run") / "checkpoint")


@pytest.fixture(scope="module")
def built(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Plans of each kind by the command, made once; building one verifies it against PyTorch."""
    plans: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in plans:
            folder = tmp_path_factory.mktemp("plan")
            source = checkpoint.save(small_model(control=False), folder / "var") if kind == "var" else saved
            plans[kind] = folder / f"{kind}.plan"
            assert build_engines([str(source), "-o", str(plans[kind]), *KINDS[kind].split()]) == 0
        return plans[kind]

    return build


@pytest.fixture(params=KINDS)
def plan(request: pytest.FixtureRequest, built: Callable[[str], Path]) -> Path:
    return built(request.param)


def test_files_are_what_the_manifest_says(plan: Path) -> None:
    manifest = schema.read_manifest(plan)
    schema.verify_files(plan, manifest)
    assert {p.name for p in plan.iterdir()} == {*manifest.files, "manifest.json"}
    assert ("control.sketch" in manifest.graphs) == (manifest.model.control_type is not None)


def test_every_scale_has_a_static_step_without_free_dimensions(plan: Path) -> None:
    manifest = schema.read_manifest(plan)
    static = {name: graph for name, graph in manifest.graphs.items() if name.startswith("step.")}
    batches = (1, 2) if plan.stem == "fp32" else (1,)
    assert set(static) == {f"step.{k:02d}.b{b}" for k in range(4) for b in batches}
    for name, graph in static.items():
        assert all(isinstance(d, int) for port in (*graph.inputs, *graph.outputs) for d in port.shape), name
        assert not {p.name for p in graph.inputs} & set(schema.CONSTANTS), name
        assert any(p.name.startswith("past_") for p in graph.inputs) == (not name.startswith("step.00")), name


def test_weights_lie_in_one_file_once(plan: Path) -> None:
    manifest = schema.read_manifest(plan)
    users: dict[tuple[int, int], set[str]] = {}
    for graph in manifest.graphs.values():
        for tensor in onnx.load(plan / graph.file, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entry = {e.key: e.value for e in tensor.external_data}
                assert entry["location"] == schema.WEIGHTS
                users.setdefault((int(entry["offset"]), int(entry["length"])), set()).add(graph.file)
            else:
                assert np.prod(tensor.dims) < 256, f"{tensor.name} {list(tensor.dims)} lies inside {graph.file}"
    assert max(len(files) for files in users.values()) >= 5  # all forms of the step read the same bytes
    control = manifest.model.control_type is not None
    size = 2 if manifest.precision.weights == "fp16" else 4
    parameters = sum(p.numel() * size for p in small_model(control=control).parameters())
    # 1.05 is promised for real models; here alignment and the position table weigh more.
    assert manifest.files[schema.WEIGHTS].bytes <= 1.05 * parameters + 65536


def test_fp16_keeps_norms_softmax_and_logits_in_float32(built: Callable[[str], Path]) -> None:
    plan = built("fp16")
    model = onnx.shape_inference.infer_shapes(onnx.load(plan / "step.00.b1.onnx", load_external_data=False))
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    types |= {t.name: t.data_type for t in model.graph.initializer}
    by_op: dict[str, set[int]] = {}
    for node in model.graph.node:
        by_op.setdefault(node.op_type, set()).add(types[node.input[0]])
    for op in ("LayerNormalization", "Softmax", "ReduceL2", "CumSum", "TopK"):
        assert by_op[op] == {onnx.TensorProto.FLOAT}, op
    assert onnx.TensorProto.FLOAT16 in by_op["MatMul"]
    assert onnx.TensorProto.FLOAT16 in by_op["Gelu"]
    assert {p.dtype for p in schema.read_manifest(plan).graphs["step"].outputs if p.name.startswith("new_")} == {
        "float16"
    }


def test_fp16_survives_a_residual_stream_ten_times_as_large(tmp_path: Path) -> None:
    model = small_model()
    assert model.car is not None
    for block in (*model.car.base.blocks, *model.car.branch_blocks):
        block.mlp.fc2.weight.mul_(10)
        block.attn.proj.weight.mul_(10)
    plan = build_plan_of_2(model, ExportOptions(output=tmp_path / "loud.plan", name="loud", precision="fp16"))
    with car_runtime.open_plan(plan) as opened:
        for step in opened.stream(np.full((20, 20, 3), 90, np.uint8), label=1, seed=0):
            assert np.isfinite(step.f_hat).all()


def test_sampled_images_equal_the_reference_loop(built: Callable[[str], Path]) -> None:
    """Not only greedy: the same seeds draw the same tokens in PyTorch and in the plan.

    With and without guidance, five in a batch.
    """
    model = small_model()
    assert model.car is not None
    control = verify.scene(20, np.random.default_rng(3))
    pyramid = control_pyramid(Image.fromarray(control), [4, 8, 12, 20])
    uniforms = torch.from_numpy(
        np.stack([np.random.default_rng(seed).random(L, dtype=np.float32) for seed in range(11, 16)])
    )
    with car_runtime.open_plan(built("fp32")) as opened:
        for cfg, top_k, top_p in ((3.0, 20, 0.9), (0.0, 0, 0.0), (1.5, 0, 0.7)):
            expected, _ = sample(model.vqvae, model.car, torch.full((5,), 2), uniforms, pyramid, cfg, top_k, top_p)
            result = opened.generate(control, label="cat", seed=11, n=5, cfg=cfg, top_k=top_k, top_p=top_p)
            np.testing.assert_array_equal(result.tokens, expected.numpy())


def test_known_tokens_are_kept_and_the_rest_follows_them(built: Callable[[str], Path]) -> None:
    control = np.full((20, 20, 3), 128, np.uint8)
    with car_runtime.open_plan(built("fp32")) as opened:
        free = opened.generate(control, label=0, seed=0)
        known, mask = np.full((1, L), 7), np.zeros((1, L), bool)
        mask[0, :14] = True
        edited = opened.generate(control, label=0, seed=0, known_tokens=known, known_mask=mask)
        assert (edited.tokens[0, :14] == 7).all()
        assert (edited.tokens[0, 14:] != free.tokens[0, 14:]).any()
        again = opened.encode(free.images)
        assert again.shape == (1, L)


PIXELS = np.random.default_rng(8).integers(0, 256, (20, 20, 3), np.uint8)
BOX = np.zeros((20, 20), np.bool_)
BOX[2:14, 8:20] = True
EDITS: dict[str, Edit] = {
    "paint": Edit(image=PIXELS, mask=BOX.astype(np.uint8) * 255, feather=0),
    "paint strictly": Edit(image=PIXELS, box=(8, 2, 20, 14), rule="strict"),
    "paint after a coarse scale": Edit(image=PIXELS, box=(8, 2, 20, 14), from_scale=2),
    "harmonise": Edit(image=PIXELS, box=(8, 2, 20, 14), harmonise=2),
    "extend": Edit(image=PIXELS, extend=(0, 4, 7, 0)),
    "restyle, vary": Edit(image=PIXELS, from_scale=2),
    "all anew": Edit(image=PIXELS),
    "all kept": Edit(image=PIXELS, from_scale=4),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("kind", ["fp32", "var"])
def test_an_edit_draws_what_pytorch_draws_with_these_tokens_known(
    name: str, kind: str, built: Callable[[str], Path]
) -> None:
    """PyTorch encodes what the model sees and keeps what the mask says; the plan does all of it by itself."""
    model, edit = small_model(control=kind != "var"), EDITS[name]
    assert model.car is not None
    control = None if kind == "var" else verify.scene(20, np.random.default_rng(3))
    uniforms = np.stack([np.random.default_rng(seed).random(L, dtype=np.float32) for seed in (5, 6)])
    settings: dict[str, Any] = {"cfg": 1.5, "top_k": 20, "top_p": 0.9}

    def drawn(image: Image.Image, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of both seeds, int64 [2, L], and those of the image that the model sees, [1, L]."""
        pixels = torch.from_numpy(np.array(image, np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]
        known = join_tokens(model.vqvae.encode(pixels)).expand(2, L)
        pyramid = None
        if control is not None:
            cut = Image.fromarray(control)
            cut = cut if prepared.whole else prepared.frame.cut_alike(cut)
            pyramid = control_pyramid(cut.resize((20, 20), Image.Resampling.LANCZOS), [4, 8, 12, 20])
        labels, noise = torch.full((2,), 2), torch.from_numpy(uniforms)
        given = {"known_BL": known, "known_mask_BL": torch.from_numpy(keep).expand(2, L)}
        tokens, _ = sample(model.vqvae, model.car, labels, noise, pyramid, **settings, **given)
        return tokens.numpy(), known[:1].numpy()

    with car_runtime.open_plan(built(kind)) as opened:
        prepared = prepare(opened.manifest, edit)
        found = opened.generate(control, label="cat", seed=5, n=2, edit=edit, **settings)
        keep = prepared.known_mask
        expected, encoded = drawn(prepared.frame.view(20), keep)
        if edit.harmonise:
            first = opened.generate(control, "cat", 5, 2, edit=replace(edit, harmonise=0), **settings)
            assert first.edited is not None
            keep = keep | (np.arange(L) < 5)
            both = [drawn(Image.fromarray(image), keep)[0] for image in first.edited]
            expected = np.stack([tokens[i] for i, tokens in enumerate(both)])
        else:
            assert (expected[:, keep] == encoded[:, keep]).all()
        np.testing.assert_array_equal(found.tokens, expected)
        if not keep.all():
            assert (found.tokens[0] != found.tokens[1]).any()


def test_command_line_builds_and_verifies_again(
    saved: Path, built: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = built("fp16-weights")
    manifest = schema.read_manifest(plan)
    assert manifest.model.class_names == ("ant", "bee", "cat", "dog", "eel")
    assert manifest.precision == schema.Precision(compute="fp32", weights="fp16")
    assert any(key.startswith("sha256 car.safetensors") for key in manifest.provenance)
    argv = ["-o", str(plan), "--weights", "fp16", "--verify"]
    capsys.readouterr()
    assert build_engines([str(saved), *argv]) == 0
    assert capsys.readouterr().out.strip() == str(plan)
    # The same plan is not that of other weights.
    other = checkpoint.save(small_model(spread=1.1), tmp_path / "other")
    assert build_engines([str(other), *argv]) == 1
    assert "differences between the plan and the model" in capsys.readouterr().err


def test_an_interrupted_export_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "car_export.plan2.PlanBuilder2._condition", interrupt
    )  # half-way: weights.bin is being written
    assert build_engines([str(saved), "-o", str(tmp_path / "i.plan")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_plan_can_be_moved(built: Callable[[str], Path], tmp_path: Path) -> None:
    moved = shutil.copytree(built("fp32"), tmp_path / "elsewhere.plan")
    with car_runtime.open_plan(moved) as opened:
        assert opened.generate(np.zeros((20, 20, 3), np.uint8), label=0).images.shape == (1, 20, 20, 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give either a checkpoint"),
        (["missing", "-o", "x.plan"], "no checkpoint there"),
        (["CHECKPOINT", "-o", "x.dir"], "ends in .plan"),
        (["CHECKPOINT", "-o", "FILE.plan"], "is not a plan"),
        (["CHECKPOINT", "-o", "x.plan", "--batch", "0"], "positive"),
        (["--vae", "nothing.pth", "--var", "nothing.pth", "-o", "x.plan"], "no such file"),
        (["CHECKPOINT", "-o", "x.plan", "--verify"], "no plan"),
        (["CHECKPOINT", "-o", "x.plan", "--top-p", "2"], "0…1"),
        (["CHECKPOINT", "-o", "x.plan", "--patch-nums", "1,2"], "leave out"),
        (["CHECKPOINT", "-o", "x.plan", "--class-names", "none.txt"], "one name a line"),
    ],
)
def test_bad_requests_are_one_line_with_a_remedy(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE.plan").write_text("not a plan")
    argv = [str(saved) if f == "CHECKPOINT" else f for f in flags] or ["-o", "x.plan"]
    assert build_engines(argv) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["FILE.plan"]


def test_the_script_runs_from_a_bare_checkout(saved: Path, built: Callable[[str], Path], tmp_path: Path) -> None:
    """No installation, another working directory: the three packages are found next to the script."""
    script = Path(__file__).parents[2] / "export" / "build_engines.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script), str(saved), "-o", str(built("fp32")), "--verify"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(built("fp32"))
    assert "verified against PyTorch" in done.stderr


@torch.no_grad()
def test_doubling_in_phases_is_doubling() -> None:
    """Nearest neighbour and 3×3 convolution as four 2×2 convolutions, at odd sizes and borders too."""
    up = Up(6).double()
    kernels = phases_of(up.conv.weight)
    assert [kernel.shape for kernel in kernels] == [(6, 6, 2, 2)] * 4
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    for phased in (PhasedUp(up), PhasedUp(up, kernels)):
        assert torch.allclose(phased(x), up(x), atol=1e-12)


def test_a_doubling_in_phases_stores_its_weights_once(plan: Path) -> None:
    """The 3×3 weights of the parameters' table: a graph adds them, and holds none of the sums."""
    manifest = schema.read_manifest(plan)
    tensors = onnx.load(plan / "decoder.onnx", load_external_data=False).graph.initializer
    held = {int(e.value) for t in tensors if list(t.dims[2:]) == [3, 3] for e in t.external_data if e.key == "offset"}
    ups = [one for name, one in manifest.parameters.items() if "decoder" in name and "resample.conv.weight" in name]
    assert len(ups) == 2
    assert {one.offset for one in ups} <= held
    assert not any(list(t.dims[2:]) == [2, 2] for t in tensors)


def test_kernels_of_phases_are_made_once_and_known_to_the_quantizer(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = schema.read_manifest(plan)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "decoder.onnx")
    skipped = needless_optimizers(manifest.precision, "decoder")
    ort.InferenceSession(plan / "decoder.onnx", options, ["CPUExecutionProvider"], disabled_optimizers=skipped)
    opened = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    stored = {tensor.name for tensor in opened.initializer}
    assert all(node.input[1] in stored for node in opened.node if node.op_type.endswith("Conv"))

    monkeypatch.setattr(sites, "MIN_CHANNELS", 1)
    model = onnx.load(plan / "decoder.onnx", load_external_data=False)
    made = [site for site in sites.conv_sites(model) if site.making is not None]
    assert len(made) == (8 if manifest.precision.compute == "fp32" else 0)
    for i, site in enumerate(made):
        weight = onnx.numpy_helper.to_array(site.weight, str(plan))
        wanted = phases_of(torch.from_numpy(weight.copy()).float())[i % 4]
        assert np.array_equal(site.kernels(weight), wanted.numpy())


def test_a_decoder_doubles_in_phases_for_cpus_alone(plan: Path) -> None:
    model = onnx.load(plan / "decoder.onnx", load_external_data=False)
    ops = [node.op_type for node in model.graph.node]
    compute = schema.read_manifest(plan).precision.compute
    assert (ops.count("DepthToSpace"), ops.count("Resize")) == ((2, 0) if compute == "fp32" else (0, 2))


def test_matrices_are_stored_for_cpus_as_pytorch_has_them_and_for_gpus_transposed(plan: Path) -> None:
    model = onnx.load(plan / "step.onnx", load_external_data=False).graph
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.initializer}
    widened = [node.output[0] for node in model.node if node.op_type == "Cast" and node.input[0] in stored]
    made = {*stored, *widened}
    turned = [node for node in model.node if node.op_type == "Transpose" and node.input[0] in made]
    (fc1,) = (shape for name, shape in stored.items() if "base.blocks.0.mlp.fc1.weight" in name)
    single = schema.read_manifest(plan).precision.compute == "fp32"
    assert (fc1, bool(turned)) == (((96, 48), True) if single else ((48, 96), False))


def test_reshapes_read_constants(plan: Path) -> None:
    """All but those that take S × S logits apart, and tokens and rows where a branch is mixed in.

    So an engine can infer the shapes of a run before it starts.
    """
    branches = schema.read_manifest(plan).model.branches.values()
    for graph, computed in (("step", 1 + sum(branch.blocks for branch in branches)), ("condition", 0)):
        model = onnx.load(plan / f"{graph}.onnx", load_external_data=False).graph
        known = {tensor.name for tensor in model.initializer}
        reshapes = [node for node in model.node if node.op_type == "Reshape"]
        assert reshapes
        assert sum(node.input[1] not in known for node in reshapes) <= computed, graph
