"""Branches of an existing plan: added from checkpoints, taken out again, and what is said of them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from car_export import verify as verify_module
from car_export import verify2
from car_export.config import ExportOptions
from car_export.errors import VerificationError
from car_export.plan2 import build_plan_of_2
from car_export.verify2 import verify_plan_of_2
from car_runtime.cli.main import main as car_run
from car_runtime.format import manifest as schema
from car_runtime.format.goldens import read_goldens
from car_runtime.format.graph_check import Checked, check_graph
from car_runtime.receipt import UPGRADED
from car_runtime.verify import verify
from car_train import checkpoint
from fixtures.shared import build_once
from fixtures.small import sibling, small_model
from fixtures.two_branches import small, two_branches

FORMAT_1 = Path(__file__).parents[1] / "data" / "v0.1.0" / "small.plan"


@pytest.fixture
def two() -> Path:
    return two_branches()


def stored(plan: Path) -> dict[str, np.ndarray]:
    """A plan's parameters as the model has them."""
    weights, found = np.fromfile(plan / schema.WEIGHTS, np.uint8), {}
    for name, one in schema.read_manifest(plan).parameters.items():
        array = weights[one.offset : one.offset + one.bytes].view(one.dtype).reshape(one.shape)
        found[name] = array.T if one.layout == "transposed" else array
    return found


def check_whole(plan: Path) -> schema.Manifest:
    """A plan whose files, graphs, table and goldens are as its manifest says."""
    manifest, checked = schema.read_manifest(plan), Checked()
    schema.verify_files(plan, manifest)
    for graph in manifest.graphs.values():
        check_graph((plan / graph.file).read_bytes(), graph, manifest.files[schema.WEIGHTS].bytes, checked)
    assert manifest.table_problem is None
    for branch in ("", *manifest.model.branches):
        assert (read_goldens(plan, manifest, branch).control is not None) is bool(branch)
    return manifest


def run(arguments: Sequence[object], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """stdout of a command that ends so; of one that fails, its one line on stderr."""
    assert car_run(["plan", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    if code == 0:
        return out
    assert err.count("\n") == 1, err
    return err


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_branch_goes_and_comes_back(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, other = tmp_path / "one.plan", two.parent / "other"
    before, whole = schema.read_manifest(two), stored(two)
    assert run(["remove-branch", two, "other", "-o", plan], capsys).strip() == str(plan)
    manifest = check_whole(plan)
    assert list(manifest.model.branches) == ["sketch"]
    assert same(stored(plan), {name: x for name, x in whole.items() if not name.startswith("branches.other.")})
    gone = sum(one.bytes for name, one in before.parameters.items() if name.startswith("branches.other."))
    spare = before.files[schema.WEIGHTS].bytes - gone - manifest.files[schema.WEIGHTS].bytes
    assert abs(spare) < 8192  # alignment
    assert not list(plan.glob("*other*"))

    run(["add-branch", plan, other, "--name", "other"], capsys)  # in place
    again = check_whole(plan)
    assert same(stored(plan), whole)
    assert (again.model, again.graphs) == (before.model, before.graphs)
    assert (plan / "goldens.other.npz").read_bytes() == (two / "goldens.other.npz").read_bytes()
    assert again.files[schema.WEIGHTS].bytes < before.files[schema.WEIGHTS].bytes + 8192
    assert not list(tmp_path.glob(".*"))  # nothing aside


def test_another_default_is_named_where_it_goes(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "x.plan"
    shutil.copytree(two, tmp_path / "two.plan")
    two = tmp_path / "two.plan"
    upgraded = schema.read_manifest(two)
    schema.write_manifest(two, replace(upgraded, provenance={**upgraded.provenance, UPGRADED: "7" * 64}))
    assert "is the default branch" in run(["remove-branch", two, "sketch", "-o", plan], capsys, 2)
    run(["remove-branch", two, "sketch", "--default", "other", "-o", plan], capsys)
    assert check_whole(plan).model.default_branch == "other"
    assert UPGRADED not in schema.read_manifest(plan).provenance  # its receipts would be of another branch
    run(["remove-branch", two, "other", "-o", tmp_path / "y.plan"], capsys)
    assert UPGRADED in schema.read_manifest(tmp_path / "y.plan").provenance
    assert "other is the last branch" in run(["remove-branch", plan, "other"], capsys, 2)


def test_a_plan_without_branches_gets_its_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def export(folder: Path) -> None:
        build_plan_of_2(
            {"": small(control=False)}, ExportOptions(output=folder / "bare.plan", name="bare", weights="fp16")
        )

    plan = tmp_path / "bare.plan"
    shutil.copytree(build_once("branches-bare", export) / "bare.plan", plan)
    path = checkpoint.save(small(), tmp_path / "one")
    assert json.loads(run(["info", plan, "--json"], capsys))["branches"] == {}
    facts = json.loads(run(["add-branch", plan, path, "--json"], capsys))
    manifest = check_whole(plan)
    assert facts["default_branch"] == manifest.model.control_type == "sketch"
    assert facts["branches"]["sketch"]["convention"] == "sketch"
    table = manifest.parameters
    assert facts["branches"]["sketch"]["bytes"] == sum(
        one.bytes for name, one in table.items() if name.startswith("branches.")
    )


def test_what_does_not_fit_is_refused_and_nothing_changes(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "two.plan"
    shutil.copytree(two, plan)
    before = {file.name: file.read_bytes() for file in plan.iterdir()}
    stranger = sibling(small())
    assert stranger.car is not None
    stranger.car.base.blocks[1].mlp.fc1.weight.data[0, 0] += 1e-3
    elsewhere = checkpoint.save(stranger, tmp_path / "elsewhere")
    plain = checkpoint.save(small_model(control=False, depth=2, sides=(1, 2)), tmp_path / "plain")
    deeper = checkpoint.save(small_model(depth=4, sides=(1, 2)), tmp_path / "deeper")
    for arguments, says in (
        (["add-branch", plan, two.parent / "other", "--name", "other"], "has a branch 'other'; give another --name"),
        (["add-branch", plan, two.parent / "other", "--name", "A"], "a name is 1 to 32"),
        (["add-branch", plan, elsewhere, "--name", "c"], "another base than"),
        (["add-branch", plan, elsewhere, "--name", "c"], "(base.blocks.1.mlp.fc1.weight differs)"),
        (["add-branch", plan, plain, "--name", "c"], "has no control branch"),
        (["add-branch", plan, deeper, "--name", "c"], "and the plan's branches concat in 1"),
        (["add-branch", plan, tmp_path / "nowhere"], "no checkpoint there"),
        (["add-branch", plan], "needs a checkpoint after the plan"),
        (["add-branch", FORMAT_1, elsewhere], "is of format 1, which holds one branch"),
        (["remove-branch", plan, "depth"], "has no branch 'depth'; name one of: sketch, other"),
        (["remove-branch", plan, "other", "--default", "depth"], "--default depth is not one of"),
        (["remove-branch", plan], "needs the name of a branch"),
        (["info", plan, "sketch"], "info takes nothing but the plan; leave out 'sketch'"),
        (["remove-branch", plan, "other", "--name", "c"], "--name is not for remove-branch; leave it out"),
    ):
        assert says in run(arguments, capsys, 2)
    assert {file.name: file.read_bytes() for file in plan.iterdir()} == before


def test_info_says_what_a_plan_is(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(run(["info", two, "--json"], capsys))
    assert (facts["format"], list(facts["branches"]), facts["default_branch"]) == (2, ["sketch", "other"], "sketch")
    assert facts["base_bytes"] > facts["branches"]["other"]["bytes"] > 100_000
    assert facts["class_names"] == ["ant", "bee", "cat", "dog", "eel"]
    lines = run(["info", two], capsys).splitlines()
    assert lines[0].startswith("two: format 2, ")
    assert any(line.startswith("branch other: sketch, maps sketch, ") for line in lines)
    old = json.loads(run(["info", FORMAT_1, "--json"], capsys))
    assert old["format"] == 1
    assert old["branches"] == {"sketch": {"control_type": "sketch", "convention": "sketch-dark", "bytes": None}}


def test_without_the_exporter_it_says_what_to_install(
    two: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "car_export.branches", None)
    assert "pip install 'car-deploy[cpu,export]'" in run(["remove-branch", two, "other"], capsys, 2)


def test_verify_compares_every_branch_and_none(two: Path, tmp_path: Path) -> None:
    report = verify(two, "ort-cpu", threads=1, warmup=0, runs=1)
    assert report["passed"], report["checks"]
    assert list(report["others"]) == ["other", ""]
    plan = tmp_path / "swapped.plan"
    shutil.copytree(two, plan)
    shutil.copy(plan / "goldens.sketch.npz", plan / "goldens.other.npz")
    files = schema.describe_files(plan, list(schema.read_manifest(two).files))
    schema.write_manifest(plan, replace(schema.read_manifest(two), files=files))
    failed = [c["name"] for c in verify(plan, "ort-cpu", threads=1, warmup=0, runs=1)["checks"] if not c["passed"]]
    assert failed
    assert all(name.startswith("branch other, ") for name in failed)


@pytest.mark.parametrize("general", [verify_module.GENERAL, 0])
@pytest.mark.parametrize("graph", ["step.01.b1", "branch.other.01.b1"])
def test_a_static_form_that_computes_something_else_is_found(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str, general: int
) -> None:
    """Those of the step are compared with the first branch alone, those of a branch with their own.

    Also at scales at which nothing else is compared.
    """
    for module in (verify_module, verify2):
        monkeypatch.setattr(module, "GENERAL", general)
    plan = shutil.copytree(two, tmp_path / "changed.plan")
    branches = {"sketch": small(), "other": sibling(small())}
    verify_plan_of_2(plan, branches["sketch"], branches, lambda _: None)
    model = onnx.load(plan / f"{graph}.onnx", load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(attribute for attribute in norm.attribute if attribute.name == "epsilon").f = 0.5
    (plan / f"{graph}.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(VerificationError, match=f" {graph}: "):
        verify_plan_of_2(plan, branches["sketch"], branches, lambda _: None)


def test_a_constant_of_another_scale_is_found(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (verify_module, verify2):
        monkeypatch.setattr(module, "GENERAL", 0)
    plan, branches = shutil.copytree(two, tmp_path / "changed.plan"), {"sketch": small()}
    manifest = schema.read_manifest(plan)
    tensors = {**manifest.tensors, "cfg_ratio.1": manifest.tensors["cfg_ratio.0"]}
    schema.write_manifest(plan, replace(manifest, tensors=tensors))
    with pytest.raises(VerificationError, match=r"constants\.1: cfg_ratio is off"):
        verify_plan_of_2(plan, branches["sketch"], branches, lambda _: None)
