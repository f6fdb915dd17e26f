"""Plans of format 1 as plans of format 2, without their checkpoints: every weight to the bit, and what they say."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from car_export import upgrade as upgrading
from car_export.branches import check_base
from car_export.cli import main as build_engines
from car_export.config import ExportOptions
from car_export.errors import ExportError
from car_export.plan import build_plan, reference_model
from car_export.upgrade import OldPlan, graphs_of, model_of, upgrade
from car_runtime.format import manifest as schema
from car_train.config import CARConfig
from car_train.model import Model
from fixtures.shared import build_once
from fixtures.small import small_config

KINDS: dict[str, tuple[dict[str, Any] | None, bool, dict[str, Any]]] = {
    "concat": ({}, True, {"more_smooth": True, "cfg": 2.5, "top_k": 7, "top_p": 0.9}),
    "zero": ({"fusion": "zero", "encoder": "vqvae"}, False, {"weights": "fp16"}),
    "conv": ({"fusion": "cross_norm", "transformer": "conv"}, True, {"precision": "fp16"}),
    "var": (None, False, {}),
}
"""Kind → its branch, whether AdaLN is shared, options of the export."""


def model_of_kind(kind: str) -> Model:
    """Random weights, norms included: none is another's twin, but for the biases of φ, which are zeros."""
    branch, shared, _ = KINDS[kind]
    config = small_config(sides=(1, 2), depth=2)
    assert config.var is not None
    # Two levels of 64 channels: a tokenizer that a branch can take its encoder from.
    vqvae = replace(config.vqvae, channels=16, multipliers=(1, 4, 4))
    car = None
    if branch is not None:
        car = CARConfig(control_type="sketch", encoder_widths=(8, 64, 16), encoder_strides=(2, 2), **branch)
    torch.manual_seed(11)
    # In half precision a gain of fewer than 64 channels is folded; no published width is as small.
    size = {"width": 64, "heads": 4} if kind == "conv" else {}
    config = replace(config, vqvae=vqvae, var=replace(config.var, shared_aln=shared, **size), car=car)
    model = Model(config).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embedding" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif not name.endswith("phi_bias"):
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def old_plan(kind: str) -> Path:
    def export(folder: Path) -> None:
        build_plan(
            model_of_kind(kind),
            ExportOptions(output=folder / "old.plan", name=kind, provenance={"sha256 x": "7"}, **KINDS[kind][2]),
        )

    return build_once(f"upgrade-{kind}", export) / "old.plan"


def new_plan(kind: str) -> Path:
    source = old_plan(kind)
    return build_once(f"upgraded-{kind}", lambda folder: upgrade(source, folder / "new.plan")) / "new.plan"


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_made_again_to_the_bit(kind: str) -> None:
    manifest = schema.read_manifest(old_plan(kind))
    wanted = reference_model(model_of_kind(kind), manifest.precision.compute, manifest.precision.weights)
    if manifest.precision.compute == "fp16":  # small parameters too are in half precision, but for norms of products
        for name, parameter in wanted.named_parameters():
            convolutional = name.startswith(("vqvae.", "car.branch.blocks."))
            if (convolutional or "norm" not in name) and "quantizer" not in name:
                parameter.data = parameter.half().float()
    made, phases = model_of(OldPlan.read(old_plan(kind)))
    assert bool(phases) == (manifest.precision.compute == "fp32")
    got, want = made.state_dict(), wanted.state_dict()
    assert got.keys() == want.keys()
    folded = ("pos_LC", "level_KC", "log_scale_H")
    for name, tensor in want.items():
        if name.endswith(folded):
            continue
        rebuilt = phases and name.endswith("resample.conv.weight") and "decoder" in name
        if rebuilt:
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-3 if "weights" in KINDS[kind][2] else 1e-6)
        else:
            assert torch.equal(got[name], tensor), name
    assert made.car is not None
    assert wanted.car is not None
    stored = reference_model(model_of_kind(kind), manifest.precision.compute, manifest.precision.weights)
    assert stored.car is not None
    assert torch.equal(made.car.base.position(), stored.car.base.position())
    for mine, theirs in zip(made.car.base.blocks, wanted.car.base.blocks, strict=True):
        assert np.array_equal(*(np.exp(one.attn.log_scale_H.numpy()) for one in (mine, theirs)))
    assert made.config.vqvae == wanted.config.vqvae
    if wanted.config.car is not None:
        assert made.config.car is not None
        known = {"convention": "sketch"}
        if wanted.config.car.encoder == "vqvae":  # has no widths of its own
            known |= {name: getattr(made.config.car, name) for name in ("encoder_widths", "encoder_strides")}
        assert made.config.car == replace(wanted.config.car, **known)  # type: ignore[arg-type]


def test_a_plan_says_of_itself_what_it_said_before() -> None:
    kind = "concat"
    old, new = schema.read_manifest(old_plan(kind)), schema.read_manifest(new_plan(kind))
    assert new.format == 2
    assert list(new.model.branches) == ["sketch"]
    for field in ("name", "precision", "sampling", "scales"):
        assert getattr(new, field) == getattr(old, field), field
    for field in ("class_names", "control_type", "control_convention", "classes", "image_size", "depth"):
        assert getattr(new.model, field) == getattr(old.model, field), field
    assert new.more_smooth is old.more_smooth
    assert new.provenance["sha256 x"] == "7"
    assert {name.rsplit(".", 1)[1] for name in new.graphs if name.startswith("step.")} == {
        name.rsplit(".", 1)[1] for name in old.graphs if name.startswith("step.")
    }
    assert (new_plan(kind) / "goldens.sketch.npz").read_bytes() == (old_plan(kind) / "goldens.npz").read_bytes()
    assert new.table_problem is None
    weights = {plan: np.fromfile(plan / schema.WEIGHTS, np.uint8) for plan in (old_plan(kind), new_plan(kind))}
    for name, tensor in old.tensors.items():
        places = ((old_plan(kind), tensor), (new_plan(kind), new.tensors[name]))
        before, after = (weights[plan][one.offset : one.offset + one.bytes] for plan, one in places)
        assert np.array_equal(before, after), name


def test_kernels_of_phases_stay() -> None:
    _, phases = model_of(OldPlan.read(old_plan("concat")))
    manifest = schema.read_manifest(new_plan("concat"))
    held = OldPlan(new_plan("concat"), manifest, graphs_of(new_plan("concat"), manifest, ["decoder"]))
    assert len(phases) == 2
    for name, kernels in phases.items():
        for i, kernel in enumerate(kernels):
            stored = held.parameter(f"vqvae.decoder.{name}.kernels.{i}")
            assert stored is not None
            assert np.array_equal(stored, kernel.numpy())


def test_what_cannot_be_upgraded_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = old_plan("var"), ["-o", str(tmp_path / "x.plan")]
    int8 = copy_of(source, tmp_path / "int8.plan", ("precision", "weights"), "int8")
    bf16 = copy_of(source, tmp_path / "bf16.plan", ("precision", "weights"), "bf16")
    renamed = copy_of(source, tmp_path / "wrong.plan", ("model", "vocab"), 48)
    (renamed / "encoder.onnx").write_bytes((renamed / "decoder.onnx").read_bytes())
    for arguments, says in (
        (
            [str(int8), "--upgrade", *out],
            "stores int8, of which no model can be made again; upgrade the float32 plan",
        ),
        ([str(bf16), "--upgrade", *out], "stores bf16, of which no model can be made again; upgrade one in fp16 or"),
        ([str(new_plan("concat")), "--upgrade", *out], "is of format 2 already"),
        ([str(renamed), "--upgrade", *out], "encoder.onnx"),
        ([str(source), "--upgrade", "-o", str(source)], "is another one; name it"),
        ([str(source), "--upgrade"], "is another one; name it"),
        ([str(source), "--upgrade", "--cfg", "2", *out], "--cfg settle"),
        ([str(tmp_path), "--upgrade", *out], "is for a plan"),
    ):
        assert build_engines(arguments) == 2
        text = capsys.readouterr().err
        assert says in text, text
        assert text.count("\n") == 1
    assert not (tmp_path / "x.plan").exists()


def copy_of(plan: Path, target: Path, at: tuple[str, str], value: object) -> Path:
    """A plan whose manifest says something else."""
    shutil.copytree(plan, target)
    text = json.loads((target / "manifest.json").read_text())
    text[at[0]][at[1]] = value
    (target / "manifest.json").write_text(json.dumps(text))
    return target


def test_a_temperature_that_no_logarithm_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = OldPlan.read(old_plan("var"))
    exact = upgrading.temperature(plan, "car.base.blocks.0.attn")
    assert exact is not None
    monkeypatch.setattr(upgrading, "NEAR", 0)
    monkeypatch.setattr(upgrading, "temperature", lambda *_: exact * np.float32(1.01) + np.float32(50))
    with pytest.raises(ExportError, match="are no exponentials here"):
        upgrading._logarithms(plan, "car.base.blocks.0.attn")


def test_the_command_writes_the_plan(tmp_path: Path) -> None:
    wanted = tmp_path / "named.plan"
    assert build_engines([str(old_plan("var")), "--upgrade", "-o", str(wanted), "--name", "other"]) == 0
    manifest = schema.read_manifest(wanted)
    assert (manifest.format, manifest.name, dict(manifest.model.branches)) == (2, "other", {})
    assert manifest.model.control_type is None


def test_a_branch_on_the_old_base_can_be_added_to_an_upgraded_plan() -> None:
    plan = new_plan("concat")
    manifest, model = schema.read_manifest(plan), model_of_kind("concat")
    check_base(manifest, plan, model, Path("again"))
    assert model.car is not None
    model.car.base.blocks[0].attn.log_scale_H[0] += 1e-3
    with pytest.raises(ExportError, match=r"base\.blocks\.0\.attn\.log_scale_H differs"):
        check_base(manifest, plan, model, Path("other"))
