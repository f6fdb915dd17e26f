"""The plan's manifest: what is read back, what is refused, and what a damaged plan is called."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from car_runtime.errors import PlanError
from car_runtime.format.manifest import (
    MANIFEST,
    WEIGHTS,
    Engine,
    Manifest,
    hash_file,
    parse_manifest,
    read_manifest,
    verify_files,
    write_manifest,
)
from fixtures.runtime_plan import build_plan

RUNTIME = Path(__file__).parents[2] / "runtime"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_plan(tmp_path_factory.mktemp("manifest") / "tiny.plan")


@pytest.fixture
def plan(built: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(built, tmp_path / "copy.plan"))


@pytest.fixture(scope="module")
def manifest(built: Path) -> Manifest:
    return read_manifest(built)


def test_manifest_reads_back_what_was_written(manifest: Manifest) -> None:
    engine = Engine(
        file="engines/step.rtx", flavour="rtx", target="sm89", key="ab", details={"profiles": [1, 2], "ok": True}
    )
    files = {**manifest.files, engine.file: manifest.files[WEIGHTS]}
    whole = replace(manifest, engines=(engine,), files=files)
    assert parse_manifest(whole.to_json()) == whole
    assert parse_manifest(whole.to_json().encode()) == whole
    assert json.loads(whole.to_json())["engines"][0]["profiles"] == [1, 2]


def test_keys_of_a_later_version_are_ignored(manifest: Manifest) -> None:
    value = json.loads(manifest.to_json())
    value["model"]["rope"] = True
    value["new"] = 1
    assert parse_manifest(json.dumps(value)) == manifest


def _edited(manifest: Manifest, path: str, value: Any) -> str:
    """The manifest's JSON with the value at a dotted path replaced, or removed where it is `...`."""
    whole = json.loads(manifest.to_json())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    at: Any = whole
    for part in parents:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return json.dumps(whole)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("format", 3, "format is 3, but this car_runtime reads up to 2; upgrade"),
        ("format", 0, "format is 0"),
        ("format", "1", "format is '1', but must be an integer"),
        ("format", ..., "format is missing"),
        ("name", ..., "name is missing"),
        ("name", "", "name is ''"),
        ("model/vocab", 4096.0, "model.vocab is 4096.0, but must be an integer"),
        ("model/vocab", True, "model.vocab is True, but must be an integer"),
        ("model/vocab", 0, "model.vocab is 0, but must be at least 1"),
        ("model/class_names", ["a"], "class_names has 1 names for 3 classes"),
        ("model/class_names", ["a", "b", 3], "model.class_names[2] is 3, but must be a string"),
        ("model/image_size", 33, "image_size is 33, but latent_size × patch is 32"),
        ("precision/compute", "int3", "precision.compute is 'int3'"),
        ("sampling/cfg", "4", "sampling.cfg is '4', but must be a finite number"),
        ("sampling/cfg", -1, "sampling.cfg is -1.0"),
        ("sampling/top_p", 1.5, "sampling.top_p is 1.5"),
        ("scales", [], "scales is empty"),
        ("scales/1/start", 2, "scales[1].start is 2, but the scales before it end at 1"),
        ("scales/1/stop", 6, "scales[1].stop is 6"),
        ("scales/1/tokens", 5, "scales[1].tokens is 5, but side² is 4"),
        ("scales/1/next_side", 3, "scales[1].next_side is 3, but must be 4"),
        ("scales/2/cfg_ratio", 2, "scales[2].cfg_ratio is 2.0"),
        ("scales/2/constants/pos", "nope", "unknown tensor 'nope'"),
        ("scales/2/constants/pos", ..., "scales[2].constants lacks pos"),
        ("tensors/pos.0/offset", 10**9, "ends at byte 1000000032 of weights.bin"),
        ("tensors/pos.0/offset", -4, "tensors['pos.0'] ends at byte"),
        ("tensors/pos.0/bytes", 4, "tensors['pos.0'].bytes is 4, but its shape and dtype make 32"),
        ("tensors/pos.0/dtype", "bfloat16", "dtype is 'bfloat16'"),
        ("graphs/step", ..., "graphs.step is missing"),
        ("graphs/control", ..., "graphs.control is missing"),
        ("graphs/step/file", "other.onnx", "'other.onnx' is used but not listed in files"),
        ("graphs/condition/outputs", [], "graphs.condition.outputs lacks modulation, start"),
        ("graphs/decoder/inputs/0/dtype", "float64", "f_hat has dtype 'float64'"),
        ("graphs/decoder/inputs/0/shape", ["B", 4, -1, 4], "the dimension -1"),
        ("graphs/condition/outputs/1/shape", ["R", "M", 8], "dimensions (1, 2) must be numbers"),
        ("files/weights.bin", ..., "'weights.bin' is used but not listed"),
        ("files/weights.bin/sha256", [], "has 0 digests for 1 chunks"),
        ("files/weights.bin/sha256", ["zz"], "has the digest 'zz'"),
        ("files/weights.bin/bytes", -1, "bytes is -1"),
        ("chunk_bytes", 0, "chunk_bytes is 0"),
        ("provenance", ["a"], "provenance is ['a'], but must be an object"),
        ("engines", [{"file": 1}], "engines[0].file is 1, but must be a string"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused_by_name(
    manifest: Manifest, path: str, value: Any, says: str
) -> None:
    with pytest.raises(PlanError) as caught:
        parse_manifest(_edited(manifest, path, value))
    assert says in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"format": NaN}', b"\xff\xfe", "[" * 100_000, '{"format": 1}']
)
def test_what_is_no_manifest_is_refused_in_one_line(text: str | bytes) -> None:
    with pytest.raises(PlanError) as caught:
        parse_manifest(text)
    assert MANIFEST in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../weights.bin",
        "engines/../../x",
        "engines/a/b",
        "a/b",
        "C:\\x",
        "a\\b",
        ".",
        "..",
        "",
        "x\0",
        "é",
    ],
)
def test_file_names_that_could_leave_the_plan_are_refused(manifest: Manifest, name: str) -> None:
    value = json.loads(manifest.to_json())
    value["files"][name] = value["files"][WEIGHTS]
    with pytest.raises(PlanError, match="not a plain name inside the plan"):
        parse_manifest(json.dumps(value))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: None, "no plan at"),
        (lambda root: root.write_text("x"), "is a file, but a plan is a directory"),
        (lambda root: root.mkdir(), "is not a plan: it has no manifest.json"),
    ],
)
def test_a_path_that_is_no_plan_is_named(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path / "x.plan")
    with pytest.raises(PlanError, match=says):
        read_manifest(tmp_path / "x.plan")


def test_an_intact_plan_verifies_and_still_does_when_moved(plan: Path, tmp_path: Path) -> None:
    verify_files(plan, read_manifest(plan))
    moved = plan.rename(tmp_path / "elsewhere")
    verify_files(moved, read_manifest(moved))
    (tmp_path / "link").symlink_to(moved)
    verify_files(tmp_path / "link", read_manifest(tmp_path / "link"))


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link_out(path: Path) -> None:
    outside = path.parent.parent / "outside.bin"
    path.rename(outside)
    path.symlink_to(outside)


def _link_within(path: Path) -> None:
    path.rename(path.with_name("stored"))
    path.symlink_to("stored")


def _link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("name", [WEIGHTS, "step.onnx"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "{} is missing"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "{} is truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "{} has grown"),
        (_flip_last_byte, "{} was changed after the export"),
        (_replace_by_directory, "{} "),
        (_link_out, "{} is a link"),
        (_link_within, "{} is a link"),
        (_link_to_itself, "{} is a link"),
    ],
)
def test_a_damaged_plan_is_refused_saying_which_file_and_how(plan: Path, name: str, damage: Any, says: str) -> None:
    damage(plan / name)
    with pytest.raises(PlanError) as caught:
        verify_files(plan, read_manifest(plan))
    assert str(caught.value).startswith(says.format(name))
    assert "; " in str(caught.value)


def test_sizes_are_checked_even_without_hashes(plan: Path) -> None:
    _flip_last_byte(plan / WEIGHTS)
    verify_files(plan, read_manifest(plan), hashes=False)
    os.truncate(plan / WEIGHTS, 5)
    with pytest.raises(PlanError, match="truncated"):
        verify_files(plan, read_manifest(plan), hashes=False)


@pytest.mark.parametrize(("size", "chunk"), [(0, 10), (1, 10), (10, 10), (11, 10), (100, 7), (3_000_001, 2_000_000)])
def test_chunks_are_hashed_each_for_itself(tmp_path: Path, size: int, chunk: int) -> None:
    content = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    (tmp_path / "x").write_bytes(content)
    expected = [hashlib.sha256(content[i : i + chunk]).hexdigest() for i in range(0, size, chunk)]
    assert hash_file(tmp_path / "x", chunk) == expected


def test_writing_leaves_nothing_but_the_manifest(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(tmp_path, manifest)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import car_runtime", ["numpy", "PIL", "onnxruntime", "torch", "onnx"]),
        ("import car_runtime.format.manifest", ["numpy", "PIL", "onnxruntime", "torch", "onnx"]),
        ("from car_runtime import open_plan", ["onnxruntime", "torch", "onnx", "cv2"]),
        ("import car_runtime.cli.main", ["numpy", "PIL", "onnxruntime", "torch", "onnx"]),
    ],
)
def test_importing_loads_no_more_than_it_needs(statement: str, absent: list[str]) -> None:
    code = f"{statement}; import sys; print([name for name in {absent} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(RUNTIME)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
