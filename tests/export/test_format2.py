"""Plans of format 2: a base once, branches as graphs of their own, mixed where they fuse, parameters by name."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from car_export import cli
from car_export.branches import add_branch, remove_branch
from car_export.cli import control_type_of
from car_export.cli import main as build_engines
from car_export.config import ExportOptions
from car_export.errors import ExportError
from car_export.plan2 import build_plan_of_2, check_branches
from car_runtime import GenerationConfig, open_plan
from car_runtime import receipt as receipts
from car_runtime.cli.main import main as car_run
from car_runtime.errors import PlanError, RequestError
from car_runtime.format import manifest as schema
from car_runtime.format.folder import open_folder
from car_runtime.format.graph_check import Checked, check_graph
from car_runtime.format.parameters import stored_arrays
from car_runtime.format.sizes import problem_with_sizes
from car_runtime.request import resolve
from car_train import checkpoint
from car_train.config import CARConfig
from car_train.model import Model
from fixtures.golden import Golden
from fixtures.small import sibling, small_config
from fixtures.two_branches import small, two_branches

Logits = Callable[[list[float], float], np.ndarray]


@pytest.fixture(scope="module")
def two() -> Path:
    """A plan of two checkpoints; building it compares each branch, and none, with PyTorch."""
    return two_branches()


def test_a_plan_has_its_base_once_and_every_parameter_by_name(two: Path) -> None:
    manifest, model = schema.read_manifest(two), small()
    assert list(manifest.model.branches) == ["sketch", "other"]
    assert manifest.model.default_branch == "sketch"
    assert manifest.table_problem is None
    assert model.car is not None
    assert model.car.branch is not None
    weights = np.fromfile(two / schema.WEIGHTS, np.uint8)
    parts = {"vqvae": model.vqvae, "base": model.car.base, "branches.sketch": model.car.branch}
    wanted = {f"{prefix}.{name}": t for prefix, part in parts.items() for name, t in part.state_dict().items()}
    assert wanted.keys() <= manifest.parameters.keys()
    for name, tensor in wanted.items():
        one = manifest.parameters[name]
        stored = weights[one.offset : one.offset + one.bytes].view(one.dtype).reshape(one.shape)
        assert np.array_equal(stored.T if one.layout == "transposed" else stored, tensor.numpy()), name
    base, branch = (
        sum(one.bytes for name, one in manifest.parameters.items() if name.startswith(part))
        for part in (("vqvae", "base"), ("branches.other",))
    )
    small_things = 100_000  # positions by scale, constants, alignment
    assert manifest.files[schema.WEIGHTS].bytes <= base + 2 * branch + small_things


def test_graphs_are_let_through_and_an_edited_one_makes_the_table_useless(two: Path) -> None:
    manifest, checked = schema.read_manifest(two), Checked()
    for graph in manifest.graphs.values():
        check_graph((two / graph.file).read_bytes(), graph, manifest.files[schema.WEIGHTS].bytes, checked)
    entry = replace(manifest.files["step.onnx"], sha256=("0" * 64,))
    edited = replace(manifest, files={**manifest.files, "step.onnx": entry})
    assert "belongs to other graphs" in str(edited.table_problem)


@pytest.fixture(scope="module")
def logits(two: Path) -> Logits:
    """The second scale's guided logits of two images, one of them unguided, by the weights of the branches."""
    manifest = schema.read_manifest(two)
    session = ort.InferenceSession(str(two / "step.onnx"), providers=["CPUExecutionProvider"])

    def run(mix: list[float], keep: float) -> np.ndarray:
        sizes = {"R": 3, "B": 2, "S": 2, "P": 1, "T": 1, "m": 2}
        rng, feed = np.random.default_rng(1), {}
        for port in manifest.graphs["step"].inputs:
            shape = tuple(sizes.get(str(dim), dim) for dim in port.shape)
            values = rng.normal(size=shape) * 0.5  # type: ignore[arg-type]
            feed[port.name] = values.astype(port.dtype) if port.dtype == "float32" else np.zeros(shape, port.dtype)  # type: ignore[arg-type]
        for name in [n for n in feed if n == "c" or n.startswith("fusion_")]:
            feed[name] = feed[name][: len(mix)]
        feed |= {"rows": np.array([0, 1, 0]), "twin": np.array([2, 1]), "plain": np.array([0, 1])}
        feed |= {"top_k": np.array([1, 5]), "phi": np.array([1]), "control_cfg": np.zeros(2, np.float32)}
        feed["mix"] = np.array(mix, np.float32).reshape(-1, 1).repeat(3, 1)
        feed["keep"] = np.full(3, keep, np.float32)
        (result,) = session.run(["logits"], feed)
        return np.asarray(result)

    return run


def test_a_branch_at_weight_1_is_itself_in_any_mix(logits: Logits) -> None:
    one = logits([1], 0)
    assert np.array_equal(logits([1, 0], 0), one)
    assert np.array_equal(logits([0, 0], 1), logits([0], 1))
    assert not np.allclose(logits([0.5, 0.5], 0), one, atol=1e-3)


@pytest.mark.parametrize("kind", [{"fusion": "zero"}, {"fusion": "cross_norm", "transformer": "conv"}])
def test_other_fusions_agree_with_pytorch(kind: dict[str, str], tmp_path: Path) -> None:
    config = small_config(depth=2, sides=(1, 2))
    car = CARConfig(control_type="sketch", encoder_widths=(8, 16), encoder_strides=(4,), **kind)  # type: ignore[arg-type]
    torch.manual_seed(5)
    model = Model(replace(config, car=car)).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif "norm" not in name:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    build_plan_of_2({"sketch": model}, ExportOptions(output=tmp_path / "one.plan", name="one"))


def test_a_bf16_plan_stores_its_branches_in_bfloat16_and_takes_another(tmp_path: Path) -> None:
    model = small()
    plan = build_plan_of_2(
        {"sketch": model}, ExportOptions(output=tmp_path / "half.plan", name="half", precision="bf16")
    )
    manifest = schema.read_manifest(plan)
    step = manifest.graphs["step"]
    for name, dtype in (("linear_weight", "bfloat16"), ("norm_weight", "float32")):
        assert manifest.parameters[f"branches.sketch.fusions.0.{name.replace('_', '.')}"].dtype == dtype
        assert step.input(f"fusion_{name}_0").dtype == dtype
    folder = open_folder(plan)
    one = manifest.parameters["branches.sketch.fusions.0.linear.weight"]
    bits = stored_arrays(folder, {"w": one})["w"].astype(np.uint32) << 16
    folder.close()
    assert model.car is not None
    assert model.car.branch is not None
    weight = model.car.branch.fusions[0].get_parameter("linear.weight").T.numpy()
    assert np.abs(bits.view(np.float32) - weight).max() <= 2**-8 * np.abs(weight).max()
    both = add_branch(plan, checkpoint.save(sibling(small()), tmp_path / "other"), name="other")
    assert list(schema.read_manifest(both).model.branches) == ["sketch", "other"]


def test_what_is_no_branch_of_one_base_is_refused(tmp_path: Path) -> None:
    options, model = ExportOptions(output=tmp_path / "no.plan", name="no"), small()
    stranger = sibling(model)
    assert stranger.car is not None
    stranger.car.base.pos_start.data.add_(1)
    with pytest.raises(ExportError, match="another base than a; give branches"):
        build_plan_of_2({"a": model, "b": stranger}, options)
    with pytest.raises(ExportError, match="a name is 1 to 32"):
        build_plan_of_2({"A B": model}, options)


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], two: Path) -> None:
    one, other = (checkpoint.save(small(), tmp_path / name) for name in ("one", "other"))
    out = ["-o", str(tmp_path / "x.plan")]
    for arguments, says in (
        ([str(one), str(other), *out], "two branches are called 'sketch'"),
        ([str(one), f"b={other}", "--default-branch", "c", *out], "--default-branch c is not one of"),
        ([str(one), "--default-branch", "other", *out], "--default-branch other is not one of"),
    ):
        assert build_engines(arguments) == 2
        text = capsys.readouterr().err
        assert says in text, text
        assert text.count("\n") == 1
    assert not (tmp_path / "x.plan").exists()


def test_the_runtime_refuses_what_a_plan_cannot_follow_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], two: Path
) -> None:
    """Unknown and missing branches, one named twice, weights out of range, a table that doesn't fit its graphs."""
    edges, out = str(tmp_path / "e.png"), ["-o", str(tmp_path / "out.png")]
    Image.new("RGB", (12, 12)).save(edges)
    edited = tmp_path / "edited.plan"
    shutil.copytree(two, edited)
    (edited / "step.onnx").write_bytes((edited / "step.onnx").read_bytes() + b"\x32\x00")  # an empty doc_string
    manifest = schema.read_manifest(two)
    files = {**manifest.files, **schema.describe_files(edited, ["step.onnx"])}
    schema.write_manifest(edited, replace(manifest, files=files))
    for plan, controls, says in (
        (two, [f"depth={edges}"], "there is no branch 'depth' in the plan 'two'; it has sketch, other"),
        (two, [edges, f"other={edges}"], "names no branch; with several of them give BRANCH=IMAGE"),
        (two, [f"other={edges}", f"other={edges}"], "names the branch 'other' twice; give each branch once"),
        (two, ["other="], "'other=' names no image; give BRANCH=IMAGE or BRANCH=IMAGE:WEIGHT"),
        (two, ["nowhere.png"], "there is no image 'nowhere.png'"),
        (two, [f"other={edges}:2.5"], "the weight of other is 2.5, but must be a number in 0…2; 1 is what the"),
        (two, [f"other={edges}:-0.1"], "the weight of other is -0.1, but must be a number in 0…2"),
        (edited, [edges], "the table of parameters of 'two' belongs to other graphs than the plan's; export"),
    ):
        flags = [flag for control in controls for flag in ("--control", control)]
        assert car_run(["-e", str(plan), "--backend", "ort-cpu", *flags, *out]) == 2
        text = capsys.readouterr().err
        assert says in text, text
        assert text.count("\n") == 1
        assert text.startswith("car-run: error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.png", "edited.plan"]
    foreign = resolve(read_plan_of_one(tmp_path), GenerationConfig(control=Image.open(edges)))
    message = "config 1: the request is not for the plan 'two'; resolve it against this plan"
    with open_plan(two, "ort-cpu", threads=1) as opened, pytest.raises(RequestError, match=message):
        opened.generate_many([GenerationConfig(), foreign])


def read_plan_of_one(folder: Path) -> schema.Manifest:
    """Of a plan whose scales and vocabulary are those of `two`."""
    one = remove_branch(two_branches(), "other", output=folder / "one.plan")
    return schema.read_manifest(one)


def test_a_branch_out_of_its_base_is_refused_by_the_reader(two: Path) -> None:
    manifest = schema.read_manifest(two)
    with pytest.raises(PlanError, match="default_branch"):
        replace(manifest.model, default_branch="depth")
    wrong = replace(manifest.model.branches["other"], fusion="zero")
    with pytest.raises(PlanError, match="differ in fusion"):
        replace(manifest.model, branches={**manifest.model.branches, "other": wrong})


def test_what_branches_make_the_loop_allocate_is_counted(two: Path) -> None:
    """Entries of the table may all name the same bytes of weights.bin."""
    both = schema.read_manifest(two)
    model = replace(both.model, branches={"sketch": both.model.branches["sketch"]})
    table = {name: entry for name, entry in both.parameters.items() if not name.startswith("branches.other.")}
    graphs = {name: graph for name, graph in both.graphs.items() if "other" not in name}
    one = replace(both, model=model, parameters=table, graphs=graphs)
    taken = []
    for manifest in (one, both):
        said = re.search(r"would take (\d+) bytes", str(problem_with_sizes(manifest, 0, 0)))
        assert said is not None
        taken.append(int(said[1]))
    C, L, h = both.model.width, both.tokens, both.model.branches["other"].blocks
    fusions = h * (2 * C + 2 * C + 2 * C * C + C)
    cache, outputs = 2 * h * L * 2 * C, h * 2 * 2 * 2 * C  # K and V; `c` at 2 × 2 tokens; both of two rows
    assert 4 * (fusions + cache + outputs) <= taken[1] - taken[0] <= 4 * (fusions + cache + outputs + 10 * h * C * 6)


def test_parameters_that_all_lie_in_one_place_are_refused_where_together_they_are_many(two: Path) -> None:
    """Who packs the parameters takes memory for each."""
    manifest = schema.read_manifest(two)
    total = sum(one.bytes for one in manifest.parameters.values())
    assert problem_with_sizes(manifest, total, 0) is None
    assert f"all parameters would take {total} bytes" in str(problem_with_sizes(manifest, total - 1, 0))


def test_a_receipt_of_branches_is_believed_within_bounds(two: Path) -> None:
    manifest = schema.read_manifest(two)

    def branches(weight: object) -> tuple[tuple[str, float, str], ...]:
        body = {"version": 1, "plan": receipts.plan_digest(manifest), "branches": [["other", weight, "0" * 64]]}
        plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
        text = json.dumps({"receipt": body, "sha256": hashlib.sha256(plain.encode()).hexdigest()})
        found = receipts.receipt_of({receipts.KEY: text}, manifest)
        assert found is not None
        return found.branches

    assert branches(0.5) == (("other", 0.5, "0" * 64),)
    for weight in (10**400, float("nan"), float("inf"), -1, True, "1", None):
        assert branches(weight) == ()


def test_published_files_of_several_branches_are_one_plan(
    official_files: Callable[[Golden], dict[str, Path]],
    tiny: Golden,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the command exports; of what it is given, test_golden.py makes a plan."""
    files, other, plan = official_files(tiny), tmp_path / "car_depth.pth", tmp_path / "both.plan"
    torch.save({name: 0.97 * x if x.is_floating_point() else x for name, x in tiny.state_dicts["car"].items()}, other)
    common = ["--vae", files["vae"], "--var", files["var"], "--patch-nums", "1,2,3,4", "-o", plan]
    same = [*common, "--control-type", "canny", "--car", files["car"], "--car", other]
    assert build_engines([str(a) for a in same]) == 2
    assert "two branches are called 'canny'; name one, e.g. canny-2=" in capsys.readouterr().err
    named = [*common, "--car", f"canny={files['car']}", "--car", f"depth={other}", "--default-branch", "depth"]
    exported: list[dict[str, Model]] = []
    monkeypatch.setattr(cli, "build_plan_of_2", lambda models, *_: exported.append(models))
    assert build_engines([str(a) for a in named]) == 0
    (models,) = exported
    check_branches(models)
    assert [(name, control_type_of(model)) for name, model in models.items()] == [
        ("depth", "depth"),
        ("canny", "canny"),
    ]
    depth, canny = (model.car.branch.state_dict() for model in models.values() if model.car and model.car.branch)
    for name, tensor in canny.items():
        torch.testing.assert_close(depth[name], 0.97 * tensor)
