"""What the kernels run, made from a plan's weights by their names: the model's own numbers, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from car_export.config import ExportOptions
from car_export.plan2 import build_plan_of_2
from car_runtime.backends.amx.description import Network, UnsupportedGraphError
from car_runtime.backends.amx.parameters import named_base, named_branch, named_decoder, named_encoder
from car_runtime.format.manifest import read_manifest
from car_runtime.format.parameters import Parameters, plan_parameters
from car_train.config import CARConfig, ModelConfig, VARConfig, VQVAEConfig
from car_train.model import Model
from fixtures.convolutions import reference
from fixtures.parameter_table import Entry, parameter_table
from fixtures.shared import build_once

FORMAT_1 = Path(__file__).parents[1] / "data" / "v0.1.0" / "small.plan"
SIZES = {"depth": 3, "width": 64, "heads": 2}
BRANCH = {"blocks": 1, "width": 64, "heads": 2}


def make_model(**car: Any) -> Model:
    torch.manual_seed(3)
    config = ModelConfig(
        vqvae=VQVAEConfig(sides=(1, 3), vocab=48, latent_channels=6, channels=8, multipliers=(1, 2, 2), res_blocks=1),
        var=VARConfig(depth=3, width=64, heads=2, classes=5, mlp_ratio=2),
        car=CARConfig(control_type="sketch", encoder_widths=(8, 16, 24), encoder_strides=(2, 2), **car),
    )
    model = Model(config).requires_grad_(False).eval()
    for p in model.parameters():
        if p.ndim >= 2:
            p.normal_(std=1 / p[0].numel() ** 0.5)
        else:
            p.add_(0.1 * torch.randn(p.shape))
    return model


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture(params=["plain", "transposed", "half"])
def parameters(request: pytest.FixtureRequest, model: Model, tmp_path: Path) -> Parameters:
    form = {} if request.param == "plain" else {request.param: True}
    return Parameters(parameter_table(model, tmp_path / "weights.bin", **form), tmp_path / "weights.bin")


def close(ours: NDArray[Any], theirs: torch.Tensor) -> bool:
    """Equal but for the rounding of half precision."""
    return ours.shape == tuple(theirs.shape) and np.allclose(ours, theirs.numpy(), rtol=1e-3, atol=1e-6)


def test_a_transformer_has_the_models_weights(model: Model, parameters: Parameters) -> None:
    assert model.car is not None
    assert model.car.branch is not None
    base = named_base(parameters.under("base."), fused=1, **SIZES)
    branch = named_branch(parameters.under("branches.a."), **BRANCH)
    blocks = [*model.car.base.blocks, *model.car.branch.attention_blocks]
    assert (len(base.blocks), len(branch.blocks)) == (3, 1)
    assert [block.layer for block in base.blocks] == [0, 1, 2]
    for ours, theirs in zip([*base.blocks, *branch.blocks], blocks, strict=True):
        attention = theirs.attn
        assert ours.modulation == 6 * ours.layer
        assert close(ours.qkv.matrix, attention.qkv_weight)
        assert close(ours.qkv.bias, torch.cat([attention.q_bias, attention.v_bias]))
        assert close(ours.temperature, attention.log_scale_H.clamp_max(np.log(100)).exp())
        for one, linear in ((ours.proj, attention.proj), (ours.fc1, theirs.mlp.fc1), (ours.fc2, theirs.mlp.fc2)):
            assert close(one.matrix, linear.weight)
            assert close(one.bias, linear.bias)
    assert base.head is not None
    assert close(base.head.matrix, model.car.base.head.weight)
    assert branch.inject is not None
    assert close(branch.inject.matrix, model.car.branch.input_conv.weight.permute(0, 2, 3, 1).flatten(1))
    assert (base.inject, branch.head) == (None, None)
    assert (base.modulation_rows, branch.modulation_rows) == (6 * 3 + 2, 6)
    assert (base.fused, branch.fused) == (1, 0)


def computes(network: Network, x: torch.Tensor, wanted: torch.Tensor) -> None:
    """The description, run in float64, gives what the model gives in float32 with weights of any stored type."""
    got = reference(network, x.numpy())[-1]
    assert got.shape == wanted.shape
    assert (got - wanted).square().mean().sqrt() < 2e-3 * wanted.square().mean().sqrt()


def test_a_decoder_computes_what_the_model_does(model: Model, parameters: Parameters) -> None:
    x = torch.randn(6, 3, 3)
    vqvae = model.vqvae
    computes(named_decoder(parameters.under("vqvae."), 6), x, vqvae.decoder(vqvae.post_quant_conv(x[None]))[0])


def test_a_control_encoder_computes_what_the_model_does(model: Model, parameters: Parameters) -> None:
    assert model.car is not None
    assert model.car.branch is not None
    x = torch.rand(3, 12, 12) * 2 - 1
    network = named_encoder(parameters.under("branches.a."), 64, 4)
    assert network.pixels
    computes(network, x, model.car.branch.encoder(x[None])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "stored as bfloat16"),
        ({"dtype": "object"}, "stored as object"),
        ({"layout": "spiral"}, "spiral"),
        ({"shape": (64, 0)}, r"\[64, 0\]"),
        ({"shape": (-64, -48)}, r"-64"),
        ({"shape": (1 << 40, 1 << 40)}, "need"),
        ({"shape": (1, 1, 1, 48, 64)}, r"\[1, 1, 1, 48, 64\]"),
        ({"shape": (48, 64, 1)}, "where any × 64 is wanted"),
        ({"shape": (64, 48)}, r"is \[64, 48\] where"),
        ({"shape": (48, 8, 8), "layout": "transposed"}, "transposed"),
        ({"offset": -4}, "at -4"),
        ({"offset": 66}, "at 66"),
        ({"offset": 1 << 60}, "bytes at"),
        ({"bytes": 4}, "has 4 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_entry_that_does_not_fit_is_refused(
    model: Model, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    weights = tmp_path / "weights.bin"
    table = parameter_table(model, weights)
    table["base.head.weight"] = replace(table["base.head.weight"], **change)
    with pytest.raises(UnsupportedGraphError, match=message):
        named_base(Parameters(table, weights, "base."), **SIZES)


def test_an_entry_reaches_to_the_last_byte_and_no_further(tmp_path: Path) -> None:
    weights = tmp_path / "weights.bin"
    weights.write_bytes(np.arange(6, dtype="<f4").tobytes())
    entry = Entry(dtype="float32", shape=(2, 3), offset=0, bytes=24)
    assert Parameters({"a": entry}, weights).view("a", 2, None).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(UnsupportedGraphError, match="24 bytes at 4"):
        Parameters({"a": replace(entry, offset=4)}, weights).view("a", 2, 3)


@pytest.mark.parametrize(
    ("part", "name", "read", "sizes"),
    [
        ("base.", "blocks.1.attn.proj.bias", named_base, SIZES),
        ("branches.a.", "input_conv.weight", named_branch, BRANCH),
    ],
)
def test_a_missing_parameter_is_named(
    model: Model, tmp_path: Path, part: str, name: str, read: Callable[..., object], sizes: dict[str, int]
) -> None:
    weights = tmp_path / "weights.bin"
    table = parameter_table(model, weights)
    del table[part + name]
    with pytest.raises(UnsupportedGraphError, match=part + name):
        read(Parameters(table, weights, part), **sizes)


def test_another_kind_of_branch_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "weights.bin"
    whole = Parameters(parameter_table(make_model(transformer="conv"), weights), weights)
    with pytest.raises(UnsupportedGraphError, match="convolutions"):
        named_branch(whole.under("branches.a."), **BRANCH)


OTHERS = [{"heads": 4}, {"heads": 0}, {"heads": 3}, {"width": 128}, {"depth": 4}, {"fused": 4}, {"fused": -1}]


@pytest.mark.parametrize("sizes", OTHERS)
def test_other_sizes_than_the_weights_have_are_refused(model: Model, tmp_path: Path, sizes: dict[str, int]) -> None:
    weights = tmp_path / "weights.bin"
    table = parameter_table(model, weights)
    with pytest.raises(UnsupportedGraphError):
        named_base(Parameters(table, weights, "base."), **SIZES | sizes)


@pytest.mark.parametrize("patch", [0, 2, 8])
def test_the_encoder_has_to_shrink_as_its_steps_can(model: Model, tmp_path: Path, patch: int) -> None:
    weights = tmp_path / "weights.bin"
    table = parameter_table(model, weights)
    with pytest.raises(UnsupportedGraphError, match=f"4 convolutions in 𝓕 shrink by {patch}"):
        named_encoder(Parameters(table, weights, "branches.a."), 64, patch)


@pytest.fixture(scope="module")
def plan() -> Path:
    """A plan of format 2 of `make_model`, with one branch."""

    def export(folder: Path) -> None:
        build_plan_of_2({"sketch": make_model()}, ExportOptions(output=folder / "two.plan", name="two"))

    return build_once("named-two", export) / "two.plan"


@pytest.mark.slow
def test_an_exported_table_gives_the_models_weights(model: Model, plan: Path) -> None:
    """What the exporter writes is what is read here: names, places and layouts, without a graph."""
    assert model.car is not None
    assert model.car.branch is not None
    manifest = read_manifest(plan)
    whole = plan_parameters(manifest, plan)
    base, branch = named_base(whole.under("base."), **SIZES), named_branch(whole.under("branches.sketch."), **BRANCH)
    blocks = [*model.car.base.blocks, *model.car.branch.attention_blocks]
    for ours, theirs in zip([*base.blocks, *branch.blocks], blocks, strict=True):
        assert np.array_equal(ours.qkv.matrix, theirs.attn.qkv_weight.numpy())
        assert np.array_equal(ours.fc2.matrix, theirs.mlp.fc2.weight.numpy())
    assert base.head is not None
    assert np.array_equal(base.head.matrix, model.car.base.head.weight.numpy())
    assert branch.inject is not None
    assert close(branch.inject.matrix, model.car.branch.input_conv.weight.permute(0, 2, 3, 1).flatten(1))
    x = torch.randn(6, 3, 3)
    wanted = model.vqvae.decoder(model.vqvae.post_quant_conv(x[None]))[0]
    computes(named_decoder(whole.under("vqvae."), 6), x, wanted)
    x = torch.rand(3, 12, 12) * 2 - 1
    wanted = model.car.branch.encoder(x[None])[0]
    computes(named_encoder(whole.under("branches.sketch."), 64, 4), x, wanted)


@pytest.mark.slow
def test_a_table_of_other_graphs_is_refused(plan: Path) -> None:
    manifest = read_manifest(plan)
    entry = manifest.files["step.onnx"]
    edited = replace(manifest, files={**manifest.files, "step.onnx": replace(entry, sha256=("0" * 64,))})
    with pytest.raises(UnsupportedGraphError, match="other graphs than the plan's; "):
        plan_parameters(edited, plan)


def test_without_a_table_the_remedy_is_said() -> None:
    with pytest.raises(UnsupportedGraphError, match=r"no table of parameters; export the plan again"):
        plan_parameters(read_manifest(FORMAT_1), FORMAT_1)
