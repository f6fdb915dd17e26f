"""The backends for AMX: their transformer is the plan's step, whatever the batch and the threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from car_export.plan import ExportOptions, build_plan
from car_runtime import BackendError, open_plan
from car_runtime import verify as acceptance
from car_runtime.backends.amx import backend as amx
from car_runtime.backends.amx import build
from car_runtime.backends.amx.convolutions import read_decoder, read_encoder
from car_runtime.backends.amx.description import UnsupportedGraphError
from car_runtime.backends.amx.match_transformer import read_step
from car_runtime.backends.amx.memory import Workspace
from car_runtime.backends.amx.transformer import CombinedTransformer
from car_runtime.format.manifest import read_manifest
from car_runtime.plan import Plan, default_plan
from car_train.config import CARConfig, ModelConfig, VARConfig, VQVAEConfig
from car_train.model import Model
from fixtures.amx_machine import needs_kernels, without_compiler

EXAMPLE = Path(__file__).parents[2] / "examples" / "guitar.png"
SIDES = (1, 3, 10)
"""Three guided images have 600 rows in the last scale: more than the kernel takes at once."""
Arrays = dict[str, NDArray[Any]]
pytestmark = pytest.mark.usefixtures("kernels")


def config(head_width: int, control: bool) -> ModelConfig:
    """Heads of 32 or 64 channels, an odd depth, and widths and codes that fill no block of the kernel."""
    return ModelConfig(
        vqvae=VQVAEConfig(sides=SIDES, vocab=192, latent_channels=8, channels=8, multipliers=(1, 2), res_blocks=1),
        var=VARConfig(depth=3, width=320, heads=320 // head_width, classes=5, mlp_ratio=2, shared_aln=not control),
        car=CARConfig(control_type="sketch", encoder_widths=(8, 16), encoder_strides=(2,)) if control else None,
    )


@pytest.fixture(scope="module", params=[(64, True), (32, False)], ids=["steered", "unsteered"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    model = Model(config(*request.param)).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        if p.ndim >= 2 and "embedding" not in name:
            p.normal_(std=1 / p[0].numel() ** 0.5)
        elif name.endswith("bias"):
            p.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("amx")
    return build_plan(model, ExportOptions(output=folder / "wide.plan", name="wide"))


@pytest.fixture(scope="module")
def exact(plan: Path) -> Iterator[Plan]:
    with open_plan(plan, backend="ort-cpu", threads=1) as opened:
        yield opened


def step_arrays(plan: Plan, scale: int, images: int, guided: bool) -> tuple[Arrays, Arrays]:
    """Random inputs of a scale, with its own constants, and places for its outputs."""
    manifest = plan.manifest
    rng = np.random.default_rng(scale)
    side, past = manifest.scales[scale].side, manifest.scales[scale].start
    sizes = {"B": images, "R": images * (1 + guided), "S": side, "P": past, "S*S": side * side}
    sizes["T"] = manifest.scales[scale].next_side

    def shape(port: Any) -> tuple[int, ...]:
        return tuple(sizes[d] if isinstance(d, str) else d for d in port.shape)

    step = manifest.graphs["step"]
    inputs = {port.name: (0.5 * rng.standard_normal(shape(port))).astype(port.dtype) for port in step.inputs}
    for name, values in inputs.items():
        if name.startswith("past_k"):
            values /= np.linalg.norm(values, axis=-1, keepdims=True) + 1e-9
    inputs |= {name: np.asarray(values) for name, values in plan._constants[scale].items()}
    inputs |= {"top_k": np.array([1]), "cfg": np.array([3.0], np.float32), "cfg_ratio": np.array([0.7], np.float32)}
    inputs["uniforms"] = rng.random(shape(step.input("uniforms"))).astype(np.float32)
    return inputs, {port.name: np.zeros(shape(port), port.dtype) for port in step.outputs}


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, kept as uint16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float32(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (values.astype(np.uint32) << 16).view(np.float32)


def halved(arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """The same with keys and values in bfloat16."""
    return {name: to_bfloat16(a) if name[:5] in ("past_", "new_k", "new_v") else a for name, a in arrays.items()}


@pytest.fixture(scope="module")
def run(plan: Path) -> Callable[..., Arrays]:
    """Run our transformer: `run(inputs, outputs, threads, terms)`."""
    made: dict[tuple[int, int], tuple[CombinedTransformer, Workspace]] = {}

    def go(inputs: Arrays, outputs: Arrays, threads: int = 2, terms: int = 1) -> Arrays:
        if (threads, terms) not in made:
            step, library = read_step(plan / "step.onnx", plan / "weights.bin"), build.load(terms)
            made[threads, terms] = (CombinedTransformer(library, step, threads), Workspace(library))
        transformer, workspace = made[threads, terms]
        form = halved if terms == 1 else dict[str, NDArray[Any]]
        given = {name: np.full_like(a, 0) for name, a in form(outputs).items()}
        transformer.run(form(inputs), given, workspace)
        return given

    return go


@needs_kernels
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("terms", [1, 2])
def test_the_transformer_computes_what_the_graph_does(
    exact: Plan, run: Callable[..., Arrays], images: int, guided: bool, terms: int
) -> None:
    for scale in range(len(SIDES)):
        inputs, wanted = step_arrays(exact, scale, images, guided)
        if not guided:
            inputs["cfg"][:] = 0
        inputs = {name: to_float32(to_bfloat16(a)) if name.startswith("past_") else a for name, a in inputs.items()}
        exact._backend.run("step", inputs, wanted)
        got = run(inputs, wanted, terms=terms)
        for name in (*(name for name in wanted if name.startswith("new_")), "logits"):
            ours = to_float32(got[name]) if got[name].dtype == np.uint16 else got[name]
            off = np.sqrt(((ours - wanted[name]) ** 2).mean() / (wanted[name] ** 2).mean())
            assert off < (0.02 if terms == 1 else 3e-5), (scale, name, off)


@needs_kernels
@pytest.mark.parametrize(("threads", "terms"), [(1, 1), (3, 1), (7, 1), (3, 2)])
def test_threads_change_no_bit(exact: Plan, run: Callable[..., Arrays], threads: int, terms: int) -> None:
    for scale in range(len(SIDES)):
        inputs, outputs = step_arrays(exact, scale, 3, True)
        one, other = run(inputs, outputs, terms=terms), run(inputs, outputs, threads, terms)
        assert all((one[name] == other[name]).all() for name in one)
        assert one["logits"].any()


@needs_kernels
@pytest.mark.parametrize("terms", [1, 2])
def test_an_image_is_the_same_in_every_batch(exact: Plan, run: Callable[..., Arrays], terms: int) -> None:
    for scale in (1, 2):
        inputs, outputs = step_arrays(exact, scale, 3, True)
        together = run(inputs, outputs, terms=terms)["logits"]
        alone, places = step_arrays(exact, scale, 1, True)
        for image in range(3):
            rows = [image, image + 3]
            alone |= {"x": inputs["x"][rows], "modulation": inputs["modulation"][rows]}
            alone |= {name: a[:, rows].copy() for name, a in inputs.items() if name.startswith("past_")}
            alone |= {name: inputs[name] for name in ("pos", "control") if name in inputs}
            assert (run(alone, places, terms=terms)["logits"][0] == together[image]).all()


@needs_kernels
@pytest.mark.parametrize(("backend", "limits"), [("amx", "bf16"), ("amx-fp32", "fp32")])
def test_the_shipped_plan_passes_its_goldens(backend: str, limits: str) -> None:
    report = acceptance.verify(default_plan(), backend, warmup=0, runs=1)
    assert report["passed"], report
    assert report["settings"]["limits"] == limits


@needs_kernels
def test_two_terms_draw_what_ort_cpu_draws() -> None:
    with open_plan(backend="ort-cpu", threads=1) as exact, open_plan(backend="amx-fp32", threads=2) as plan:
        wanted, got = (p.generate(EXAMPLE, 2, seed=1, n=3) for p in (exact, plan))
    assert (wanted.tokens == got.tokens).mean() > 0.999
    assert np.abs(wanted.images.astype(int) - got.images.astype(int)).mean() < 0.01


@needs_kernels
def test_an_image_of_the_shipped_plan_is_nearly_that_of_ort_cpu() -> None:
    with open_plan(backend="ort-cpu", threads=1) as exact, open_plan(backend="amx", threads=2) as plan:
        wanted, got = (p.generate(EXAMPLE, 2, seed=1, n=12) for p in (exact, plan))
        again = plan.generate(EXAMPLE, 2, seed=2)
        short = plan.generate(EXAMPLE, 2, seed=2, cfg_scales="-3")
        assert plan.encode(got.images[0]).shape == got.tokens[:1].shape
        assert plan._backend.report()["engine"].startswith("amx, openvino 20")
    assert (got.tokens[1] == again.tokens[0]).all()
    assert (got.images[1] == again.images[0]).all()
    coarse = exact.manifest.scales[2].stop
    assert (got.tokens[:, :coarse] == wanted.tokens[:, :coarse]).mean() > 0.9
    assert (short.tokens[0] != -1).all()


@pytest.mark.parametrize("changes", [{"compute": "bf16"}, {"compute": "fp16"}, {"weights": "int8"}], ids=str)
def test_other_types_are_refused_with_a_way_on(changes: dict[str, str]) -> None:
    manifest = read_manifest(default_plan())
    other = replace(manifest, precision=replace(manifest.precision, **changes))
    with pytest.raises(BackendError, match=f"{next(iter(changes.values()))}.*use another backend"):
        amx.Amx(default_plan(), other, 1)


def other_gelu(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "Gelu":
            del node.attribute[:]


def other_order(graph: onnx.GraphProto) -> None:
    """γ and scale of one block exchanged."""
    names = next(list(node.output) for node in graph.node if node.op_type == "Split" and len(node.output) > 8)
    swap = {names[0]: names[2], names[2]: names[0]}
    for node in graph.node:
        if node.op_type != "Split":
            node.input[:] = [swap.get(name, name) for name in node.input]


def other_eps(graph: onnx.GraphProto) -> None:
    norm = next(node for node in graph.node if node.op_type == "LayerNormalization")
    next(a for a in norm.attribute if a.name == "epsilon").f = 1e-5


def other_guidance(graph: onnx.GraphProto) -> None:
    """t·unconditional − (1 + t)·conditional."""
    reshape = next(node for node in graph.node if "logits" in node.output)
    sub = next(node for node in graph.node if reshape.input[0] in node.output)
    sub.input[:] = list(sub.input)[::-1]


def weights_elsewhere(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"


def other_one(graph: onnx.GraphProto) -> None:
    """2 + scale."""
    for tensor in graph.initializer:
        if tensor.data_type == 1 and not tensor.dims and numpy_helper.to_array(tensor) == 1:
            tensor.CopyFrom(numpy_helper.from_array(np.array(2, np.float32), tensor.name))


def beyond_the_file(graph: onnx.GraphProto) -> None:
    tensor = next(tensor for tensor in graph.initializer if "qkv_weight" in tensor.name)
    tensor.dims[0] *= 1 << 30


def write_changed(plan: Path, name: str, change: Callable[[onnx.GraphProto], None], folder: Path) -> None:
    """A plan's graph, changed, into `folder`."""
    model = onnx.load(str(plan / name), load_external_data=False)
    change(model.graph)
    (folder / name).write_bytes(model.SerializeToString())


CHANGES = [other_gelu, other_order, other_eps, other_guidance, other_one, weights_elsewhere, beyond_the_file]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_graph_that_computes_anything_else_is_not_understood(
    plan: Path, tmp_path: Path, change: Callable[[onnx.GraphProto], None]
) -> None:
    read_step(plan / "step.onnx", plan / "weights.bin")
    write_changed(plan, "step.onnx", change, tmp_path)
    with pytest.raises(UnsupportedGraphError):
        read_step(tmp_path / "step.onnx", plan / "weights.bin")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_half_a_file_is_not_understood(plan: Path, tmp_path: Path, share: float) -> None:
    whole = (plan / "step.onnx").read_bytes()
    (tmp_path / "step.onnx").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UnsupportedGraphError):
        read_step(tmp_path / "step.onnx", plan / "weights.bin")


@needs_kernels
def test_a_step_that_is_not_understood_is_left_to_other_backends(plan: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(plan, tmp_path / "changed.plan")
    write_changed(plan, "step.onnx", other_gelu, changed)
    with pytest.raises(BackendError, match="--backend openvino"):
        amx.Amx(changed, read_manifest(changed), 1)


@needs_kernels
@pytest.mark.parametrize(("backend", "limit", "levels"), [("amx", 0.02, 4), ("amx-fp32", 2e-5, 1)])
def test_encoder_and_decoder_compute_what_the_graphs_do(
    plan: Path, exact: Plan, backend: str, limit: float, levels: int
) -> None:
    manifest = exact.manifest
    steered = "control" in manifest.graphs
    rng = np.random.default_rng(3)
    arrays = {port.name: rng.integers(0, 256, port.shape, np.uint8) for port in controls(exact)}
    arrays["f_hat"] = rng.standard_normal((3, *manifest.graphs["decoder"].input("f_hat").shape[1:])).astype("f")
    size = manifest.model.image_size
    with open_plan(plan, backend=backend, threads=2) as opened:
        assert opened._backend.report()["own"] == (["control"] if steered else []) + ["decoder", "step"]
        found = []
        for engine in (exact._backend, opened._backend):
            made = {"image": np.zeros((3, size, size, 3), np.uint8), "features": np.zeros(0, np.float32)}
            engine.run("decoder", {"f_hat": arrays["f_hat"]}, {"image": made["image"]})
            if steered:
                made["features"] = np.zeros(manifest.graphs["control"].output("features").shape, np.float32)
                inputs = {port.name: arrays[port.name] for port in controls(exact)}
                engine.run("control", inputs, {"features": made["features"]})
            found.append(made)
    wanted, got = found
    assert np.abs(wanted["image"].astype(int) - got["image"]).max() <= levels
    assert wanted["image"].std() > 20
    off = np.abs(wanted["features"] - got["features"])
    assert not steered or off.max() < limit * np.abs(wanted["features"]).max()


def controls(plan: Plan) -> tuple[Any, ...]:
    graphs = plan.manifest.graphs
    return graphs["control"].inputs if "control" in graphs else ()


def other_silu(graph: onnx.GraphProto) -> None:
    """Of something else."""
    sigmoids = [node for node in graph.node if node.op_type == "Sigmoid"]
    sigmoids[1].input[0] = sigmoids[0].input[0]


def other_pads(graph: onnx.GraphProto) -> None:
    conv = next(node for node in graph.node if node.op_type == "Conv" and node.attribute)
    next(a for a in conv.attribute if a.name == "pads").ints[:] = [2, 2, 0, 0]


def other_group_weights(graph: onnx.GraphProto) -> None:
    norm = next(node for node in graph.node if node.op_type == "InstanceNormalization")
    norm.input[1], norm.input[2] = norm.input[2], norm.input[1]


def other_rounding(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.data_type == 1 and not tensor.dims and numpy_helper.to_array(tensor) == 127.5:
            tensor.CopyFrom(numpy_helper.from_array(np.array(120, np.float32), tensor.name))


def other_quarters(graph: onnx.GraphProto) -> None:
    joined = next(node for node in graph.node if node.op_type == "Concat" and len(node.input) == 4)
    joined.input[0], joined.input[1] = joined.input[1], joined.input[0]


def other_axis(graph: onnx.GraphProto) -> None:
    """Weights of attention that do not become values of their own tokens."""
    softmax = next(node for node in graph.node if node.op_type == "Softmax")
    next(a for a in softmax.attribute if a.name == "axis").i = 1


DECODERS = [other_silu, other_pads, other_group_weights, other_rounding, other_quarters, other_axis]


@pytest.mark.parametrize("change", DECODERS, ids=lambda change: change.__name__)
def test_a_decoder_that_computes_anything_else_is_not_understood(
    plan: Path, tmp_path: Path, change: Callable[[onnx.GraphProto], None]
) -> None:
    _, channels, side, _ = read_manifest(plan).graphs["decoder"].input("f_hat").shape
    assert isinstance(channels, int)
    assert isinstance(side, int)
    read_decoder(plan / "decoder.onnx", plan / "weights.bin", channels, side)
    write_changed(plan, "decoder.onnx", change, tmp_path)
    with pytest.raises(UnsupportedGraphError):
        read_decoder(tmp_path / "decoder.onnx", plan / "weights.bin", channels, side)


@needs_kernels
def test_a_decoder_that_is_not_understood_is_openvinos(plan: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(plan, tmp_path / "changed.plan")
    write_changed(plan, "decoder.onnx", other_rounding, changed)
    backend = amx.Amx(changed, read_manifest(changed), 1)
    assert "decoder" not in backend.report()["own"]
    port = read_manifest(changed).graphs["decoder"].input("f_hat")
    image = np.zeros((1, *read_manifest(changed).graphs["decoder"].output("image").shape[1:]), np.uint8)
    backend.run("decoder", {"f_hat": np.zeros((1, *port.shape[1:]), np.float32)}, {"image": image})
    assert image.any()
    backend.close()


@pytest.mark.parametrize("scale", [0, 2])
def test_encoders_of_their_own_are_not_understood(plan: Path, tmp_path: Path, scale: int) -> None:
    if not (plan / "control.onnx").exists():
        return
    sides = tuple(int(port.shape[0]) for port in read_manifest(plan).graphs["control"].inputs)
    read_encoder(plan / "control.onnx", plan / "weights.bin", sides)

    def other_stride(graph: onnx.GraphProto) -> None:
        convolutions = [node for node in graph.node if node.op_type == "Conv"]
        changed = convolutions[scale * len(convolutions) // len(sides) + 1]
        strides = next(a for a in changed.attribute if a.name == "strides")
        strides.ints[:] = [3 - strides.ints[0]] * 2

    write_changed(plan, "control.onnx", other_stride, tmp_path)
    with pytest.raises(UnsupportedGraphError):
        read_encoder(tmp_path / "control.onnx", plan / "weights.bin", sides)


@pytest.fixture
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build, "ROOT", tmp_path / "native")
    return tmp_path / "native"


def test_without_a_compiler_the_remedy_is_said(nothing_kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BackendError, match="install gcc"):
        build.load()


def test_where_nobody_is_at_home_nothing_is_looked_for_in_a_shared_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(path: Path) -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "expanduser", nobody)
    folder = build._kept("key").parent
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o077 == 0


MARKED = """
#include <stdio.h>
const int car_bf16_terms = 1;
__attribute__((constructor)) static void mark(void) { FILE *file = fopen("%s", "w"); if (file) fclose(file); }
int car_start(void) { return 0; }
"""


def somebody_elses(path: Path) -> None:
    try:
        os.chown(path, 65534, 65534)
    except PermissionError:
        pytest.skip("files of other users are made by root alone")


def linked(library: Path) -> None:
    """To a place where everybody may write."""
    elsewhere = library.parents[3] / "other.so"
    shutil.move(library, elsewhere)
    elsewhere.chmod(0o666)
    library.symlink_to(elsewhere)


SPOILED: dict[str, Callable[[Path], None]] = {
    "another user's": somebody_elses,
    "in another user's folder": lambda library: somebody_elses(library.parent),
    "below another user's folder": lambda library: somebody_elses(library.parents[2]),
    "writable by all": lambda library: library.chmod(0o777),
    "writable by the group": lambda library: library.chmod(0o770),
    "in a folder writable by all": lambda library: library.parent.chmod(0o777),
    "in a folder writable by all, sticky": lambda library: library.parent.chmod(0o1777),
    "in a folder writable by the group": lambda library: library.parent.chmod(0o770),
    "below a folder writable by all": lambda library: library.parent.parent.chmod(0o777),
    "a link to a file writable by all": linked,
    "a second name of a file": lambda library: os.link(library, library.parents[3] / "name.so"),
}


@pytest.mark.skipif(without_compiler() is not None, reason=str(without_compiler()))
@pytest.mark.parametrize("spoiled", [None, *SPOILED])
def test_a_library_that_somebody_else_could_have_put_there_is_not_loaded(
    spoiled: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, marked, mark = tmp_path / "own.c", tmp_path / "marked.c", tmp_path / "loaded"
    own.write_text(MARKED.replace("__attribute__((constructor))", "__attribute__((unused))") % mark)
    marked.write_text(MARKED % mark)
    monkeypatch.setattr(build, "SOURCES", [own])
    monkeypatch.setattr(build, "ROOT", tmp_path / "elsewhere" / "native")
    build.load()
    (name,) = (file.name for file in build.ROOT.iterdir())
    monkeypatch.setattr(build, "ROOT", tmp_path / "home" / ".cache" / "car" / "native")
    build._private_folder.cache_clear()
    library = build.ROOT / name
    library.parent.mkdir(parents=True, mode=0o700)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, marked], check=True, timeout=60)
    library.chmod(0o700)
    if spoiled is not None:
        SPOILED[spoiled](library)
    build.load()
    assert mark.exists() == (spoiled is None)


@needs_kernels
def test_a_failing_compiler_is_quoted_and_leaves_nothing(
    nothing_kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'error: unrecognized option' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(BackendError, match="unrecognized option"):
        build.load()
    assert list(nothing_kept.iterdir()) == []
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    with pytest.raises(BackendError, match="none"):
        build.load()


@needs_kernels
def test_the_library_is_compiled_once_and_again_when_it_is_broken(
    nothing_kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.load()
    (kept,) = nothing_kept.iterdir()
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: calls.append(args))
    build.load()
    assert calls == []
    assert os.stat(kept).st_mode & 0o022 == 0
    broken = nothing_kept / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(build, "_kept", lambda key: broken)
    with pytest.raises(BackendError, match="delete it to compile"):
        build.load()


@pytest.mark.parametrize("flags", [None, ["avx2"], ["amx_tile", "avx512_bf16"]])
def test_a_cpu_without_tiles_is_reported(monkeypatch: pytest.MonkeyPatch, flags: list[str] | None) -> None:
    monkeypatch.setattr("car_runtime.system.cpu.cpu_flags", lambda: flags)
    with pytest.raises(BackendError, match="amx_bf16"):
        build.check_cpu()
