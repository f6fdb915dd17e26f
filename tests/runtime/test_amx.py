"""The backends for AMX: their transformers are the plan's graphs, whatever the batch and the threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from car_export.config import ExportOptions
from car_export.plan2 import build_plan_of_2
from car_runtime import BackendError, open_plan
from car_runtime import verify as acceptance
from car_runtime.backends import registry
from car_runtime.backends.amx import backend as amx
from car_runtime.backends.amx import build
from car_runtime.backends.amx.memory import Workspace
from car_runtime.backends.amx.parameters import named_base, named_branch
from car_runtime.backends.amx.transformer import Transformer
from car_runtime.format.manifest import Manifest, read_manifest
from car_runtime.format.parameters import plan_parameters
from car_runtime.format.schema import Parameter
from car_runtime.plan import Plan
from car_train.config import CARConfig, ModelConfig, VARConfig, VQVAEConfig
from car_train.model import Model
from fixtures.amx_machine import needs_kernels, without_compiler
from fixtures.runtime_plan import build_plan
from fixtures.shipped import shipped_canny

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
    name = "sketch" if model.config.car else ""
    options = ExportOptions(output=tmp_path_factory.mktemp("amx") / "wide.plan", name="wide")
    return build_plan_of_2({name: model}, options)


@pytest.fixture(scope="module")
def exact(plan: Path) -> Iterator[Plan]:
    with open_plan(plan, backend="ort-cpu", threads=1) as opened:
        yield opened


def graphs_of(plan: Plan) -> list[str]:
    """The graphs that are transformers of ours."""
    return [name for name in plan.manifest.graphs if name in ("step", "branch.sketch")]


def arrays_of(plan: Plan, graph: str, scale: int, images: int, guided: bool) -> tuple[Arrays, Arrays]:
    """Random inputs of a scale, with its own constants, and places for its outputs."""
    manifest = plan.manifest
    rng = np.random.default_rng(scale)
    side, past = manifest.scales[scale].side, manifest.scales[scale].start
    sizes = {"B": images, "R": images * (1 + guided), "S": side, "P": past, "S*S": side * side, "m": 1}
    sizes["T"] = manifest.scales[scale].next_side

    def shape(port: Any) -> tuple[int, ...]:
        return tuple(sizes[d] if isinstance(d, str) else d for d in port.shape)

    ports = manifest.graphs[graph]
    inputs = {port.name: (0.5 * rng.standard_normal(shape(port))).astype(port.dtype) for port in ports.inputs}
    for name, values in inputs.items():
        if name.startswith("past_k"):
            values /= np.linalg.norm(values, axis=-1, keepdims=True) + 1e-9
        elif name.startswith("fusion_linear_weight"):
            values /= np.sqrt(values.shape[1])
    inputs |= {name: np.asarray(values) for name, values in plan._constants[scale].items() if name in inputs}
    rows, image = np.arange(sizes["R"]) % images, np.arange(images)
    known = {"rows": rows, "twin": image + (images if guided else 0), "plain": image}
    known |= {"top_k": np.ones(images, np.int64), "cfg": np.full(images, 3.0 if guided else 0.0, np.float32)}
    known |= {"cfg_ratio": np.array([0.7], np.float32), "control_cfg": np.zeros(images, np.float32)}
    known |= {"mix": np.full((1, len(rows)), 0.8, np.float32), "keep": np.full(len(rows), 0.2, np.float32)}
    known |= {"uniforms": rng.random((images, side, side)).astype(np.float32)}
    inputs |= {name: values for name, values in known.items() if name in inputs}
    return inputs, {port.name: np.zeros(shape(port), port.dtype) for port in ports.outputs}


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
def run(exact: Plan, plan: Path) -> Callable[..., Arrays]:
    """Run a transformer of ours: `run(graph, inputs, outputs, threads, terms)`."""
    manifest, made = exact.manifest, dict[tuple[str, int, int], tuple[Transformer, Any, Workspace]]()
    model, parameters = manifest.model, plan_parameters(manifest, plan)
    sizes = {"width": model.width, "heads": model.heads}
    fused = sum(branch.blocks for branch in model.branches.values())

    def prepare(graph: str, threads: int, terms: int) -> tuple[Transformer, Any, Workspace]:
        library = build.load(terms)
        if graph == "step":
            described = named_base(parameters.under("base."), depth=model.depth, fused=fused, **sizes)
            mixes = amx._Mixes(library, manifest, threads)
            return Transformer(library, described, threads), mixes, Workspace(library)
        described = named_branch(parameters.under("branches.sketch."), blocks=fused, **sizes)
        return Transformer(library, described, threads), None, Workspace(library)

    def go(graph: str, inputs: Arrays, outputs: Arrays, threads: int = 2, terms: int = 1) -> Arrays:
        if (graph, threads, terms) not in made:
            made[graph, threads, terms] = prepare(graph, threads, terms)
        transformer, mixes, workspace = made[graph, threads, terms]
        form = halved if terms == 1 else dict[str, NDArray[Any]]
        given = {name: np.full_like(a, 0) for name, a in form(outputs).items()}
        if graph == "step":
            transformer.run_step(form(inputs), given, workspace, mixes.of(inputs))
        else:
            transformer.run_branch(form(inputs), given, workspace)
        return {name: given[name] for name in given if name[:6] in ("new_k_", "new_v_", "logits", "c")}

    return go


@needs_kernels
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("terms", [1, 2])
def test_transformers_compute_what_the_graphs_do(
    exact: Plan, run: Callable[..., Arrays], images: int, guided: bool, terms: int
) -> None:
    for graph in graphs_of(exact):
        for scale in range(len(SIDES)):
            inputs, wanted = arrays_of(exact, graph, scale, images, guided)
            past = {name: to_float32(to_bfloat16(a)) for name, a in inputs.items() if name.startswith("past_")}
            inputs |= past
            exact._backend.run(graph, inputs, wanted)
            got = run(graph, inputs, wanted, terms=terms)
            assert got.keys() > {"new_k_0"}
            for name, values in got.items():
                ours = to_float32(values) if values.dtype == np.uint16 else values
                off = np.sqrt(((ours - wanted[name]) ** 2).mean() / (wanted[name] ** 2).mean())
                assert off < (0.02 if terms == 1 else 3e-5), (graph, scale, name, off)


@needs_kernels
@pytest.mark.parametrize(("threads", "terms"), [(1, 1), (3, 1), (7, 1), (3, 2)])
def test_threads_change_no_bit(exact: Plan, run: Callable[..., Arrays], threads: int, terms: int) -> None:
    for graph in graphs_of(exact):
        for scale in range(len(SIDES)):
            inputs, outputs = arrays_of(exact, graph, scale, 3, True)
            one, other = (run(graph, inputs, outputs, n, terms) for n in (2, threads))
            assert all((one[name] == other[name]).all() for name in one)
            assert one["logits" if graph == "step" else "c"].any()


@needs_kernels
@pytest.mark.parametrize("terms", [1, 2])
def test_an_image_is_the_same_in_every_batch(exact: Plan, run: Callable[..., Arrays], terms: int) -> None:
    """Axis of the rows or images → inputs that have it there; what a graph lacks is left out."""
    of_rows = {0: ("x", "modulation"), 4: ("c",), 1: ("mix",)}
    for graph, scale in product(graphs_of(exact), (1, 2)):
        inputs, outputs = arrays_of(exact, graph, scale, 3, True)
        together = run(graph, inputs, outputs, terms=terms)
        alone, places = arrays_of(exact, graph, scale, 1, True)
        for image in range(3):
            rows = [image, image + 3]
            past = {name: 1 for name in inputs if name.startswith("past_")}
            axes = {name: axis for axis, names in of_rows.items() for name in names if name in inputs} | past
            alone |= {name: inputs[name].take(rows, axis) for name, axis in axes.items()}
            alone |= {name: a for name, a in inputs.items() if name == "pos" or name.startswith("fusion_")}
            alone |= {"control": inputs["control"][image : image + 1]} if "control" in inputs else {}
            if graph == "step":
                assert (run(graph, alone, places, terms=terms)["logits"][0] == together["logits"][image]).all()
            else:
                assert (run(graph, alone, places, terms=terms)["c"] == together["c"][:, :, :, rows]).all()


@needs_kernels
@pytest.mark.parametrize(("backend", "limits"), [("amx", "bf16"), ("amx-fp32", "fp32")])
def test_the_shipped_plan_passes_its_goldens(backend: str, limits: str) -> None:
    report = acceptance.verify(shipped_canny(), backend, warmup=0, runs=1)
    assert report["passed"], report
    assert report["settings"]["limits"] == limits


@needs_kernels
def test_two_terms_draw_what_ort_cpu_draws() -> None:
    shipped = shipped_canny()
    with open_plan(shipped, "ort-cpu", threads=1) as exact, open_plan(shipped, "amx-fp32", threads=2) as plan:
        wanted, got = (p.generate(EXAMPLE, 2, seed=1, n=2) for p in (exact, plan))
    assert (wanted.tokens == got.tokens).mean() > 0.999
    assert np.abs(wanted.images.astype(int) - got.images.astype(int)).mean() < 0.01


@needs_kernels
def test_an_image_of_the_shipped_plan_is_nearly_that_of_ort_cpu() -> None:
    shipped = shipped_canny()
    with open_plan(shipped, "ort-cpu", threads=1) as exact, open_plan(shipped, "amx", threads=2) as plan:
        wanted, got = (p.generate(EXAMPLE, 2, seed=1, n=4) for p in (exact, plan))
        again = plan.generate(EXAMPLE, 2, seed=2)
        short = plan.generate(EXAMPLE, 2, seed=2, cfg_scales="-3")
        assert plan.encode(got.images[0]).shape == got.tokens[:1].shape
        assert plan._backend.report()["engine"].startswith("amx, openvino 20")
    assert (got.tokens[1] == again.tokens[0]).all()
    assert (got.images[1] == again.images[0]).all()
    coarse = exact.manifest.scales[2].stop
    # Most images have the same coarse tokens; one may part at a draw that bfloat16 decides otherwise.
    assert (got.tokens[:, :coarse] == wanted.tokens[:, :coarse]).all(axis=1).sum() >= 3
    assert (short.tokens[0] != -1).all()


@pytest.mark.parametrize("changes", [{"compute": "bf16"}, {"compute": "fp16"}, {"weights": "int8"}], ids=str)
def test_other_types_are_refused_with_a_way_on(plan: Path, changes: dict[str, str]) -> None:
    manifest = read_manifest(plan)
    other = replace(manifest, precision=replace(manifest.precision, **changes))
    with pytest.raises(BackendError, match=f"{next(iter(changes.values()))}.*use another backend"):
        amx.Amx(plan, other, 1)


@needs_kernels
@pytest.mark.parametrize("backend", ["amx", "amx-fp32"])
def test_format_1_is_refused_with_the_upgrade_and_auto_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    old = build_plan(tmp_path / "old.plan")
    assert not registry.BACKENDS[backend].runs(read_manifest(old))
    passed_over = "the backend runs plans from format 2 on, and this one is of format 1"
    remedy = "upgrade it by build_engines.py PLAN --upgrade -o NEW, or use another backend"
    with pytest.raises(BackendError, match=f"^{passed_over}; {remedy}$"):
        open_plan(old, backend)
    monkeypatch.setattr(registry, "best_first", lambda manifest: [backend, "ort-cpu"])
    with open_plan(old) as opened:
        assert opened.why == f"auto: ort-cpu, best that opens here; not {backend}: {passed_over}"


def changed_table(manifest: Manifest, change: Callable[[dict[str, Parameter]], dict[str, Parameter]]) -> Manifest:
    return replace(manifest, parameters=change(dict(manifest.parameters)))


def other_names(table: dict[str, Parameter]) -> dict[str, Parameter]:
    return {name.replace("blocks.1.", "layers.1."): entry for name, entry in table.items()}


def other_sizes(table: dict[str, Parameter]) -> dict[str, Parameter]:
    name = "base.blocks.0.mlp.fc1.weight"
    return table | {name: replace(table[name], shape=table[name].shape[::-1])}


@needs_kernels
@pytest.mark.parametrize("change", [other_names, other_sizes], ids=lambda change: change.__name__)
def test_a_base_of_another_kind_is_left_to_other_backends(
    plan: Path, change: Callable[[dict[str, Parameter]], dict[str, Parameter]]
) -> None:
    with pytest.raises(BackendError, match="--backend openvino"):
        amx.Amx(plan, changed_table(read_manifest(plan), change), 1)


@needs_kernels
@pytest.mark.parametrize(("backend", "limit", "levels"), [("amx", 0.02, 4), ("amx-fp32", 2e-5, 1)])
def test_encoder_and_decoder_compute_what_the_graphs_do(
    plan: Path, exact: Plan, backend: str, limit: float, levels: int
) -> None:
    manifest = exact.manifest
    steered = "control.sketch" in manifest.graphs
    rng = np.random.default_rng(3)
    arrays = {port.name: rng.integers(0, 256, port.shape, np.uint8) for port in controls(exact)}
    arrays["f_hat"] = rng.standard_normal((3, *manifest.graphs["decoder"].input("f_hat").shape[1:])).astype("f")
    size = manifest.model.image_size
    with open_plan(plan, backend=backend, threads=2) as opened:
        found = []
        for engine in (exact._backend, opened._backend):
            made = {"image": np.zeros((3, size, size, 3), np.uint8), "features": np.zeros(0, np.float32)}
            engine.run("decoder", {"f_hat": arrays["f_hat"]}, {"image": made["image"]})
            if steered:
                made["features"] = np.zeros(manifest.graphs["control.sketch"].output("features").shape, np.float32)
                inputs = {port.name: arrays[port.name] for port in controls(exact)}
                engine.run("control.sketch", inputs, {"features": made["features"]})
            found.append(made)
        assert opened._backend.report()["own"] == [*(["control.sketch"] if steered else []), "decoder", "step"]
    wanted, got = found
    assert np.abs(wanted["image"].astype(int) - got["image"]).max() <= levels
    assert wanted["image"].std() > 20
    off = np.abs(wanted["features"] - got["features"])
    assert not steered or off.max() < limit * np.abs(wanted["features"]).max()


def controls(plan: Plan) -> tuple[Any, ...]:
    graphs = plan.manifest.graphs
    return graphs["control.sketch"].inputs if "control.sketch" in graphs else ()


@needs_kernels
def test_a_decoder_of_another_kind_is_openvinos(plan: Path, exact: Plan) -> None:
    def other_name(table: dict[str, Parameter]) -> dict[str, Parameter]:
        return {name.replace("decoder.conv_out", "decoder.last"): entry for name, entry in table.items()}

    backend = amx.Amx(plan, changed_table(exact.manifest, other_name), 1)
    assert "decoder" not in backend.report()["own"]
    port = exact.manifest.graphs["decoder"].input("f_hat")
    image = np.zeros((1, *exact.manifest.graphs["decoder"].output("image").shape[1:]), np.uint8)
    backend.run("decoder", {"f_hat": np.zeros((1, *port.shape[1:]), np.float32)}, {"image": image})
    assert image.any()
    backend.close()


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
