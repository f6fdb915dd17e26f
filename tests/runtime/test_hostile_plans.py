"""Plans made to hurt are refused in one line, before an engine sees them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from car_runtime import plan as car_plan
from car_runtime.backends.onnxruntime import cpu
from car_runtime.cli.main import main
from car_runtime.errors import PlanError
from car_runtime.format.graph_check import Checked, check_graph
from car_runtime.format.manifest import (
    MANIFEST,
    WEIGHTS,
    Manifest,
    Port,
    Tensor,
    describe_files,
    parse_manifest,
    read_manifest,
    verify_files,
)
from car_runtime.format.sizes import problem_with_sizes
from car_runtime.plan import DEFAULT_PLAN, open_plan
from fixtures.runtime_plan import build_plan

onnx = pytest.importorskip("onnx")
DECODER = "decoder.onnx"
SEED = 1
CONTROL = np.full((32, 32, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_plan(tmp_path_factory.mktemp("hostile") / "tiny.plan")


@pytest.fixture
def plan(built: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(built, tmp_path / "copy.plan"))


@pytest.fixture(scope="module")
def manifest(built: Path) -> Manifest:
    return read_manifest(built)


def _sign(root: Path, *names: str) -> None:
    """Bring the manifest's sizes and hashes up to date: whoever makes a plan can do that, too."""
    whole = json.loads((root / MANIFEST).read_text())
    for name, entry in describe_files(root, names).items():
        whole["files"][name] = {"bytes": entry.bytes, "sha256": list(entry.sha256)}
    (root / MANIFEST).write_text(json.dumps(whole))


# -- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model/cache_layers", 3_000_000, "cache_layers is 3000000, but must be at most 1024"),
        ("model/cache_layers", 2**31, "cache_layers is 2147483648"),
        ("model/width", 10**9, "width is 1000000000, but must be at most 16384"),
        ("model/width", 10**2200, "integer of 7309 bits"),
        ("model/width", 16, "but the model makes it"),
        ("model/heads", 2**30, "heads is"),
        ("model/latent_channels", 8, "but the model makes it"),
        ("model/vocab", 2**40, "vocab is"),
        ("name", "n" * 10_000, "name has 10000 characters"),
        ("scales/1/control_size", 4000, "control_1"),
        ("scales/1/control_size", 20_000, "control_size is 20000, more than 4096"),
        ("graphs/decoder/file", "decoder.ort", "stored as ONNX"),
        ("graphs/decoder/outputs/0/dtype", "float32", "but the model makes it uint8"),
        ("graphs/step/inputs/0/shape", ["R", "S", "S", 2**40], "the dimension 1099511627776"),
        ("tensors/pos.1/shape", [4, 2, 4], "but pos is [2, 2, 8]"),
        (
            "files",
            {f"f{i}": {"bytes": 0, "sha256": []} for i in range(4097)},
            "files has 4097 entries, but at most 4096",
        ),
    ],
)
def test_sizes_that_no_model_has_are_refused(manifest: Manifest, path: str, value: Any, says: str) -> None:
    whole = json.loads(manifest.to_json())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    at: Any = whole
    for part in parents:
        at = at[part]
    at[last] = value
    if str(value).endswith(".ort"):
        whole["files"][value] = whole["files"][DECODER]
    with pytest.raises(PlanError) as caught:
        parse_manifest(json.dumps(whole))
    assert says in str(caught.value)


def test_buffers_out_of_proportion_to_the_weights_are_refused() -> None:
    shipped = read_manifest(DEFAULT_PLAN)
    cache = 2 * (6 + 5 * 3) * 422 * 2 * 192 * 4  # K and V, layers, tokens, guidance, width, float32
    assert cache < _taken(shipped) < 2 * cache
    assert problem_with_sizes(shipped, 1_000_000, 1) is None


def _taken(manifest: Manifest) -> int:
    """Bytes that one image's buffers would take, as a refusal has them."""
    said = re.search(r"would take (\d+) bytes", str(problem_with_sizes(manifest, 0, 0)))
    assert said is not None
    return int(said[1])


def test_what_the_weights_file_holds_once_may_not_be_allocated_many_times(manifest: Manifest) -> None:
    """An input of the step that no export has, at each scale: constants of the whole file, over and over."""
    size = manifest.files[WEIGHTS].bytes // 4
    large = {f"large.{k}": Tensor(dtype="float32", shape=(size,), offset=0, bytes=4 * size) for k in range(3)}
    step = manifest.graphs["step"]
    more = replace(step, inputs=(*step.inputs, Port(name="more", dtype="float32", shape=(size,))))
    scales = [
        replace(scale, constants={**scale.constants, "more": f"large.{k}"}) for k, scale in enumerate(manifest.scales)
    ]
    hostile = replace(
        manifest,
        scales=tuple(scales),
        tensors={**manifest.tensors, **large},
        graphs={**manifest.graphs, "step": more},
    )
    assert _taken(hostile) - _taken(manifest) == 3 * 4 * size


def test_noise_for_each_code_is_counted(manifest: Manifest) -> None:
    """`smooth_noise` of the largest scale, S² × V in float32, is allocated wherever a step takes it."""
    step = manifest.graphs["step"]
    ports = (
        Port(name="smooth", dtype="bool", shape=(1,)),
        Port(name="smooth_noise", dtype="float32", shape=("B", "S", "S", manifest.model.vocab)),
    )
    noisy = replace(manifest, graphs={**manifest.graphs, "step": replace(step, inputs=(*step.inputs, *ports))})
    assert _taken(noisy) - _taken(manifest) == 4 * 4 * 4 * manifest.model.vocab


@pytest.mark.parametrize("name", ["step.x", "step.", "step.00.bx", "step.00.b0", "step.07.b1", "branch.a.00.b1"])
def test_a_static_graph_that_no_scale_has_is_refused(manifest: Manifest, name: str) -> None:
    with pytest.raises(PlanError, match=r"graphs has the name .*; a static graph of this plan is e\.g\."):
        replace(manifest, graphs={**manifest.graphs, name: manifest.graphs["step"]})


def test_a_large_manifest_is_not_read(plan: Path) -> None:
    with (plan / MANIFEST).open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(PlanError, match=r"manifest\.json has 3221225472 bytes, but at most"):
        read_manifest(plan)


def test_random_changes_of_a_manifest_are_read_or_refused(manifest: Manifest) -> None:
    rng, original = random.Random(SEED), json.loads(manifest.to_json())
    paths = list(_paths(original))
    values: list[Any] = [0, -1, 2**31, 2**63, 10**4000, 1e308, float("nan"), "", "\x1b[2J", "\ud800", "../x"]
    values += ["A" * 100_000, None, True, [], {}, [[]], {"a": 1}]
    for _ in range(300):
        whole = json.loads(manifest.to_json())
        *parents, last = rng.choice(paths)
        at = whole
        for part in parents:
            at = at[part]
        at[last] = rng.choice(values)
        with contextlib.suppress(PlanError):
            parse_manifest(json.dumps(whole))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Any:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


# -- files -----------------------------------------------------------------------------------------------------------


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 * 2**30)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "step.onnx"])
@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        Path.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("decoder.onnx"),
        lambda path: path.symlink_to("/etc/hostname"),
        _sparse,
    ],
    ids=["FIFO", "directory", "device", "link", "link out", "sparse"],
)
@pytest.mark.parametrize("command", ["run", "verify"])
def test_what_is_no_file_of_the_plan_is_refused(
    plan: Path, name: str, make: Callable[[Path], object], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (plan / name).unlink()
    make(plan / name)
    arguments = ["verify", str(plan)] if command == "verify" else ["-e", str(plan), "-o", str(plan / "out.png")]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if " error: " in line]) == 1
    assert not (plan / "out.png").exists()


@pytest.mark.skipif(os.name == "nt", reason="files in use can't be replaced there")
@pytest.mark.parametrize("limit", [0, 2**30], ids=["by name", "by descriptor"])
def test_weights_swapped_while_a_plan_is_opened_are_not_used(
    plan: Path, tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights stand at the path while the engine opens, and the hashed ones again afterwards."""
    monkeypatch.setattr(cpu, "BY_DESCRIPTOR_BYTES", limit)
    with open_plan(plan, "ort-cpu", threads=1) as opened:
        wanted = opened.generate(CONTROL, seed=1).images
    other = tmp_path / "other.bin"
    values = np.fromfile(plan / WEIGHTS, np.uint8)
    values[: len(values) // 2] ^= 1
    values.tofile(other)
    original = cpu.OrtCpu.__init__

    def swapped(self: Any, *given: Any, **more: Any) -> None:
        (plan / WEIGHTS).rename(tmp_path / "kept")
        shutil.copy(other, plan / WEIGHTS)
        original(self, *given, **more)
        (tmp_path / "kept").replace(plan / WEIGHTS)

    monkeypatch.setattr(cpu.OrtCpu, "__init__", swapped)
    if limit == 0:
        with pytest.raises(PlanError, match=r"weights\.bin was changed while the plan was opened"):
            open_plan(plan, "ort-cpu", threads=1)
        return
    with open_plan(plan, "ort-cpu", threads=1) as opened:
        assert (opened.generate(CONTROL, seed=1).images == wanted).all()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="directories are held by descriptor on Linux alone")
@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_a_directory_swapped_while_a_plan_is_opened_is_not_used(
    plan: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another plan stands at the path while the engine opens: what was hashed is used, by all engines."""
    pytest.importorskip("openvino" if backend == "openvino" else "onnxruntime")
    monkeypatch.setattr(cpu, "BY_DESCRIPTOR_BYTES", 0)
    with open_plan(plan, backend, threads=1) as opened:
        wanted = opened.generate(CONTROL, seed=1).images
    other = tmp_path / "other.plan"
    shutil.copytree(plan, other)
    values = np.fromfile(other / WEIGHTS, np.uint8)
    values[: len(values) // 2] ^= 1
    values.tofile(other / WEIGHTS)
    original = car_plan.open_backend

    def swapped(*given: Any) -> Any:
        plan.rename(tmp_path / "kept")
        other.rename(plan)
        try:
            return original(*given)
        finally:
            plan.rename(other)
            (tmp_path / "kept").rename(plan)

    monkeypatch.setattr(car_plan, "open_backend", swapped)
    with open_plan(plan, backend, threads=1) as opened:
        assert (opened.generate(CONTROL, seed=1).images == wanted).all()


def test_an_encoder_that_is_opened_after_a_change_is_refused(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BY_DESCRIPTOR_BYTES", 0)
    with open_plan(plan, "ort-cpu", threads=1) as opened:
        shutil.copy(plan / WEIGHTS, plan / "aside")
        (plan / "aside").replace(plan / WEIGHTS)
        with pytest.raises(PlanError, match="was changed while"):
            opened.encode(CONTROL)
        assert opened.generate(CONTROL, seed=1).images.any()  # what was open before stays


# -- graphs ----------------------------------------------------------------------------------------------------------


def _spoil(root: Path, change: Callable[[Any], object]) -> None:
    """Change the decoder and sign it."""
    loaded = onnx.load(root / DECODER, load_external_data=False)
    change(loaded)
    (root / DECODER).write_bytes(loaded.SerializeToString())
    _sign(root, DECODER)


def _add(kind: str, inputs: list[str], outputs: list[str], **more: Any) -> Callable[[Any], object]:
    return lambda loaded: loaded.graph.node.append(onnx.helper.make_node(kind, inputs, outputs, **more))


def _constant(name: str, values: Any) -> Callable[[Any], object]:
    return lambda loaded: loaded.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values), name))


def _loop(loaded: Any) -> None:
    helper, kinds = onnx.helper, onnx.TensorProto
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [value("i", kinds.INT64, []), value("go", kinds.BOOL, [])],
        [value("go_on", kinds.BOOL, [])],
    )
    loaded.graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))


def _weights(**values: object) -> Callable[[Any], object]:
    """A constant in weights.bin, or wherever `location` says."""

    def change(loaded: Any) -> None:
        tensor = loaded.graph.initializer.add(name="w", data_type=1, dims=[4], data_location=1)
        for key, value in {"location": WEIGHTS, "offset": 0, "length": 16, **values}.items():
            tensor.external_data.add(key=key, value=str(value))

    return change


def _truncated(loaded: Any) -> None:
    tensor = next(one for one in loaded.graph.initializer if one.raw_data)
    tensor.raw_data = tensor.raw_data[:-1]


def _two_steps(*changes: Callable[[Any], object]) -> Callable[[Any], object]:
    return lambda loaded: [change(loaded) for change in changes]


def _output_of(kind: int) -> Callable[[Any], object]:
    return lambda loaded: setattr(loaded.graph.output[0].type.tensor_type, "elem_type", kind)


def _function(loaded: Any) -> None:
    loaded.functions.add(name="f", domain="")


def _huge(operator: str) -> Callable[[Any], object]:
    return _two_steps(_constant("huge", [2**20, 2**25]), _add(operator, ["f_hat", "huge"], ["x"]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_add("If", ["f_hat"], ["x"]), "the operator 'If'"),
        (_loop, "an attribute has the field"),
        (_add("ConstantOfShape", ["f_hat"], ["x"]), "the operator 'ConstantOfShape'"),
        (_add("Add\x1b[2J", ["f_hat"], ["x"]), "the operator 'Add"),
        (_add("Add", ["f_hat", "f_hat"], ["x"], domain="com.microsoft"), "operators of 'com.microsoft'"),
        (_add("Conv", ["f_hat"], ["x"], pads=[2**40]), "must lie in ±4096"),
        (_huge("Expand"), "makes the shape [1048576, 33554432]"),
        (_huge("Tile"), "makes the shape [1048576, 33554432]"),
        (_function, "the model has the field 25"),
        (_truncated, "but its shape and type make"),
        (_constant("w", ["text"]), "a constant has the field 6"),
        (_output_of(1), "image is float32"),
        (_output_of(8), "image' is of ONNX's type 8"),
        (lambda loaded: setattr(loaded.graph.output[0], "name", "other"), "its outputs are not the manifest's"),
        (lambda loaded: loaded.graph.input.add(name="more"), "is of ONNX's type 0"),
        (_weights(location="other.bin"), "are in 'other.bin'"),
        (_weights(location="../weights.bin"), "are in '../weights.bin'"),
        (_weights(location="/proc/self/mem"), "are in '/proc/self/mem'"),
        (_weights(offset=-4096), "have the offset '-4096'"),
        (_weights(offset=2**40), "end at byte"),
        (_weights(offset=3), "16 bytes at 3"),
        (_weights(length=2**62), "but their shape and type make 16"),
        (_weights(checksum="x"), "the weights 'w' are in"),
    ],
)
@pytest.mark.parametrize("hashes", [True, False])
def test_a_graph_of_which_no_export_writes_the_like_is_refused(
    plan: Path, change: Callable[[Any], object], says: str, hashes: bool
) -> None:
    _spoil(plan, change)
    with pytest.raises(PlanError) as caught:
        verify_files(plan, read_manifest(plan), hashes=hashes)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"cannot open {DECODER}: ")


def test_what_is_good_as_a_constant_is_not_taken_for_a_node(manifest: Manifest) -> None:
    """Each message is read as what it stands for, also where the same bytes were found good as something else."""
    constant = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "w").SerializeToString()
    graph, entry = manifest.graphs["decoder"], b"".join
    as_constant = entry([b"\x2a", bytes([len(constant)]), constant])
    as_node = entry([b"\x0a", bytes([len(constant)]), constant])
    content = as_constant + as_node
    with pytest.raises(PlanError, match="a node has"):
        check_graph(b"\x3a" + bytes([len(content)]) + content, graph, 0, Checked())


def test_random_bytes_in_graphs_are_refused_or_let_through_without_another_error(
    built: Path, manifest: Manifest
) -> None:
    rng, size = random.Random(SEED), manifest.files[WEIGHTS].bytes
    originals = {name: (built / graph.file).read_bytes() for name, graph in manifest.graphs.items()}
    refused = 0
    for _ in range(1500):
        name = rng.choice(list(originals))
        data = bytearray(originals[name])
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(data))
            if rng.random() < 0.7:
                data[at] ^= 1 << rng.randrange(8)
            else:
                data[at:at] = rng.randbytes(rng.randrange(1, 12))
        try:
            check_graph(bytes(data), manifest.graphs[name], size, Checked())
        except PlanError:
            refused += 1
    assert refused > 500


def test_the_shipped_plan_is_let_through() -> None:
    verify_files(DEFAULT_PLAN, read_manifest(DEFAULT_PLAN))
