"""The backends for AMX on plans of format 2: base and branches are the graphs, and so is what draws whole images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from car_export.config import ExportOptions
from car_export.graphs import BaseStepGraph, BranchGraph
from car_export.plan import example_step_inputs
from car_export.plan2 import build_plan_of_2, example_inputs_of_2
from car_runtime import BackendError, GenerationConfig, Plan, open_plan
from car_runtime.backends.amx import build
from car_runtime.backends.amx.backend import Amx, _Mixes
from car_runtime.backends.amx.memory import Workspace
from car_runtime.backends.amx.parameters import named_base, named_branch
from car_runtime.backends.amx.transformer import Transformer
from car_runtime.editing.edit import Edit
from car_runtime.format.manifest import read_manifest
from car_runtime.format.parameters import Parameters
from car_train.config import CARConfig, ModelConfig, VARConfig, VQVAEConfig
from car_train.model import Model
from fixtures.amx_machine import needs_kernels
from fixtures.parameter_table import parameter_table
from fixtures.shared import build_once
from fixtures.small import sibling

SIDES = (1, 2, 4)
FUSIONS = ("concat", "zero", "cross_norm")
Arrays = dict[str, NDArray[Any]]
pytestmark = pytest.mark.usefixtures("kernels")


def make_model(fusion: str, transformer: str = "blocks", depth: int = 5) -> Model:
    """Shared AdaLN, heads of 32 channels, an odd depth; fusions and gates of ordinary size, not those of a start."""
    torch.manual_seed(5)
    car = CARConfig(
        control_type="sketch",
        encoder_widths=(8, 16),
        encoder_strides=(2,),
        fusion=fusion,  # type: ignore[arg-type]
        transformer=transformer,  # type: ignore[arg-type]
    )
    config = ModelConfig(
        vqvae=VQVAEConfig(sides=SIDES, vocab=64, latent_channels=8, channels=8, multipliers=(1, 2), res_blocks=1),
        var=VARConfig(depth=depth, width=128, heads=4, classes=5, mlp_ratio=2, shared_aln=True),
        car=car,
    )
    model = Model(config).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        if p.ndim >= 2 and "embedding" not in name:
            p.normal_(std=1 / p[0].numel() ** 0.5)
        else:
            p.add_(0.1 * torch.randn(p.shape))
    return model


def step_inputs(model: Model, m: int, seed: int, past: int) -> dict[str, torch.Tensor]:
    """Random inputs of a base's step for three images: two guided by the class, one of these and one by the control.

    Rows: three images, two twins without class, one row without control, which no branch is mixed into.
    """
    torch.manual_seed(seed)
    module = BaseStepGraph(model)
    every = example_step_inputs(model, rows=6, images=3, side=3, past=past, next_side=3)
    fusions = example_inputs_of_2(model, module, every, m)
    inputs = {name: (every | fusions)[name] for name in module.input_names}
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = 0.5 * torch.randn(value.shape)
    for name in module.fusion_names:
        value = fusions[name]
        inputs[name] = value + 0.05 * torch.randn(value.shape) * (1 if "weight" in name else 0.2)
    for name in [name for name in inputs if name.startswith("past_k")]:
        inputs[name] = torch.nn.functional.normalize(inputs[name], dim=-1)
    mix = torch.rand(m, 6)
    mix[:, 5] = 0
    rows = {"rows": [0, 1, 2, 0, 2, 2], "twin": [3, 1, 4], "plain": [0, 1, 5]}
    inputs |= {name: torch.tensor(values) for name, values in rows.items()}
    inputs |= {"mix": mix, "keep": 1 - mix.sum(0), "cfg_ratio": torch.tensor([0.7])}
    inputs |= {"cfg": torch.tensor([3.0, 0.0, 1.5]), "control_cfg": torch.tensor([0.0, 0.0, 2.0])}
    return inputs | {"top_k": torch.ones(3, dtype=torch.int64), "uniforms": torch.rand(3, 3, 3)}


def computed(module: Any, inputs: Mapping[str, torch.Tensor]) -> Arrays:
    """A graph's outputs as PyTorch computes them before it is exported, by name."""
    outputs = module(*(inputs[name] for name in module.input_names))
    return {name: value.numpy() for name, value in zip(module.output_names, outputs, strict=True)}


def kept_in(transformer: Transformer, values: torch.Tensor) -> NDArray[Any]:
    if transformer.cache_dtype is np.float32:
        return np.ascontiguousarray(values.numpy())
    return np.ascontiguousarray(values.bfloat16().view(torch.uint16).numpy())


def ours(transformer: Transformer, inputs: Mapping[str, torch.Tensor], wanted: Arrays) -> tuple[Arrays, Arrays]:
    """The same inputs as the kernels take them, and empty places for their outputs."""
    given = {
        name: kept_in(transformer, value) if name.startswith("past_") else np.ascontiguousarray(value.numpy())
        for name, value in inputs.items()
    }
    places = {
        name: np.zeros(value.shape, transformer.cache_dtype if name.startswith("new_") else np.float32)
        for name, value in wanted.items()
    }
    return given, places


def as_numbers(values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype != np.uint16:
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)


def off(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Relative root of the mean square."""
    return float(np.sqrt(((as_numbers(got) - wanted) ** 2).mean() / (wanted**2).mean()))


def rounded(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys and values of the past as bf16 has them: in what the kernels add, that is no error of theirs."""
    return {name: v.bfloat16().float() if name.startswith("past_") else v for name, v in inputs.items()}


LIMITS = {1: 0.02, 2: 3e-5}


@pytest.fixture(scope="module", params=FUSIONS)
def steered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Parameters]:
    model = make_model(request.param)
    weights = tmp_path_factory.mktemp("steered") / "weights.bin"
    return model, Parameters(parameter_table(model, weights), weights)


class _Facts:
    """Of a manifest what `_Mixes` reads."""

    def __init__(self, fusion: str, blocks: int) -> None:
        self.model = self
        self.branches = {"a": self}
        self.fusion, self.blocks, self.width = fusion, blocks, 128


def base_of(model: Model, parameters: Parameters, terms: int) -> tuple[Transformer, Workspace, _Mixes]:
    """The base in our kernels, where it works, and its fusions."""
    assert model.config.car is not None
    library = build.load(terms)
    base = named_base(parameters.under("base."), depth=5, width=128, heads=4, fused=2)
    mixes = _Mixes(library, _Facts(model.config.car.fusion, 2), 2)  # type: ignore[arg-type]
    return Transformer(library, base, 2), Workspace(library), mixes


@needs_kernels
@pytest.mark.parametrize("terms", [1, 2])
def test_a_base_computes_what_its_graph_does(steered: tuple[Model, Parameters], terms: int) -> None:
    """With one branch and two, idle ones, and rows of every kind."""
    model, parameters = steered
    transformer, workspace, mixes = base_of(model, parameters, terms)
    for m, past, idle in product((1, 2), (0, 5), (False, True)):
        inputs = rounded(step_inputs(model, m, 10 * m + past, past))
        if idle:
            inputs |= {"mix": torch.zeros(m, 6), "keep": torch.ones(6)}
        wanted = computed(BaseStepGraph(model), inputs)
        given, places = ours(transformer, inputs, wanted)
        transformer.run_step(given, places, workspace, mixes.of(given))
        for name in (*(name for name in wanted if name.startswith("new_")), "logits"):
            assert off(places[name], wanted[name]) < LIMITS[terms], (m, past, idle, name)


@needs_kernels
def test_a_branch_of_weight_0_changes_no_bit(steered: tuple[Model, Parameters]) -> None:
    model, parameters = steered
    transformer, workspace, mixes = base_of(model, parameters, 1)
    two = step_inputs(model, 2, 3, 5)
    two |= {"mix": torch.tensor([[1.0] * 6, [0.0] * 6]), "keep": torch.zeros(6)}
    one = {name: v[:1] if name in ("c", "mix") or name.startswith("fusion_") else v for name, v in two.items()}
    found = []
    for inputs in (one, two):
        given, places = ours(transformer, inputs, computed(BaseStepGraph(model), inputs))
        transformer.run_step(given, places, workspace, mixes.of(given))
        found.append(places)
    assert all((found[0][name] == found[1][name]).all() for name in found[0])
    assert found[0]["logits"].any()


@needs_kernels
@pytest.mark.parametrize("terms", [1, 2])
def test_a_branch_computes_what_its_graph_does(steered: tuple[Model, Parameters], terms: int) -> None:
    model, parameters = steered
    library = build.load(terms)
    branch = named_branch(parameters.under("branches.a."), blocks=2, width=128, heads=4)
    transformer, workspace = Transformer(library, branch, 2), Workspace(library)
    module = BranchGraph(model)
    for past in (0, 5):
        torch.manual_seed(past)
        inputs = {"x": 0.5 * torch.randn(5, 3, 3, 128), "modulation": 0.5 * torch.randn(5, 12, 128)}
        inputs |= {"control": torch.randn(3, 3, 3, 128), "rows": torch.tensor([0, 1, 2, 2, 0])}
        inputs["pos"] = torch.randn(3, 3, 128)
        for i in range(2):
            inputs[f"past_k_{i}"] = torch.nn.functional.normalize(torch.randn(past, 5, 4, 32), dim=-1)
            inputs[f"past_v_{i}"] = torch.randn(past, 5, 4, 32)
        inputs = rounded(inputs)
        wanted = computed(module, inputs)
        given, places = ours(transformer, inputs, wanted)
        transformer.run_branch(given, places, workspace)
        for name in wanted:
            assert off(places[name], wanted[name]) < LIMITS[terms], (past, name)


@needs_kernels
def test_numbers_that_do_not_fit_are_refused(steered: tuple[Model, Parameters]) -> None:
    """Rows that there aren't, and arrays of other shapes: before a kernel reads them."""
    model, parameters = steered
    transformer, workspace, mixes = base_of(model, parameters, 1)
    inputs = step_inputs(model, 2, 1, 5)
    given, places = ours(transformer, inputs, computed(BaseStepGraph(model), inputs))
    fusions = mixes.of(given)
    changes: list[Arrays] = [{name: np.array([0, 1, row])} for name in ("twin", "plain") for row in (-1, 6, 1 << 40)]
    changes += [{"mix": given["mix"][:1]}, {"c": given["c"][:1]}, {"keep": given["keep"][:5]}]
    changes += [{"control_cfg": given["control_cfg"][:2]}]
    for change in changes:
        with pytest.raises(ValueError, match=r"the kernels don't have|is wanted"):
            transformer.run_step(given | change, places, workspace, fusions)


# -- whole plans


def drawing(number: int) -> Image.Image:
    image = Image.new("RGB", (8, 8))
    ImageDraw.Draw(image).ellipse((number, 1, 7, 3 + number), outline="white", width=1)
    return image


@pytest.fixture(scope="module", params=[("concat", "blocks"), ("zero", "conv")], ids="-".join)
def root(request: pytest.FixtureRequest) -> Path:
    def export(folder: Path) -> None:
        model = make_model(*request.param, depth=3)
        options = ExportOptions(output=folder / "two.plan", name="two", more_smooth=True)
        build_plan_of_2({"sketch": model, "other": sibling(model)}, options)

    return build_once(f"amx-two-{'-'.join(request.param)}", export) / "two.plan"


@pytest.fixture(scope="module")
def exact(root: Path) -> Iterator[Plan]:
    with open_plan(root, backend="ort-cpu", threads=1) as opened:
        yield opened


def requests() -> list[GenerationConfig]:
    """One branch, the other, both, none; guided by class, by the control, and not at all; edits."""
    a, b = {"sketch": drawing(1)}, {"other": drawing(3)}
    tokens = np.arange(sum(side**2 for side in SIDES)) % 64
    return [
        GenerationConfig(control=a, label=1, seed=3, n=2, cfg=2.0, top_k=5),
        GenerationConfig(control=drawing(2), label=4, seed=8, cfg=0, top_p=0.5),
        GenerationConfig(control=b, label=2, seed=5, cfg=1.0, cfg_scales="-1"),
        GenerationConfig(label=2, seed=6, cfg=3.0),
        GenerationConfig(control={**a, "other": (drawing(2), 0.4)}, label=0, seed=1, control_cfg=1.0),
        GenerationConfig(control=a, label=2, seed=3, control_cfg=2.0, cfg=1.0, more_smooth=True),
        GenerationConfig(
            control=b, label=3, seed=4, cfg=1.0, edit=Edit(image=drawing(2), tokens=tokens, from_scale=1)
        ),
        GenerationConfig(label=1, seed=9, edit=Edit(image=drawing(2), tokens=tokens, box=(0, 0, 4, 8))),
    ]


@needs_kernels
@pytest.mark.parametrize(("backend", "share", "limit"), [("amx", 0.8, 0.05), ("amx-fp32", 0.98, 2e-4)])
def test_whole_plans_draw_what_ort_cpu_draws(
    root: Path, exact: Plan, backend: str, share: float, limit: float
) -> None:
    """Tokens, whose draws a rounding can turn; logits of the last scale when all tokens before are the same."""
    transformer = exact.manifest.model.branches["sketch"].transformer
    with open_plan(root, backend=backend, threads=2) as plan:
        wanted, got = (p.generate_many(requests()) for p in (exact, plan))
        alone = [plan.generate(config) for config in requests()[:2]]
        tokens = wanted[4].tokens
        mixed = {"sketch": (drawing(1), 0.7), "other": (drawing(2), 0.6)}
        known = {"known_tokens": tokens, "known_mask": np.ones(tokens.shape, bool)}
        config = GenerationConfig(control=mixed, label=2, cfg=2.0, control_cfg=1.5, **known)
        steps = [list(p.stream(config, logits=True)) for p in (exact, plan)]
        own = plan._backend.report()["own"]
    assert own == [
        *(["branch.other", "branch.sketch"] if transformer == "blocks" else []),
        *("control.other", "control.sketch", "decoder", "step"),
    ]
    pairs = [(one.tokens == other.tokens).mean() for one, other in zip(wanted, got, strict=True)]
    assert np.mean(pairs) >= share, pairs
    for one, other in zip(*steps, strict=True):
        assert off(np.asarray(other.logits), np.asarray(one.logits)) < limit, one.index
    for one, other in zip(alone, got, strict=False):
        assert (one.tokens == other.tokens).all()
        assert (one.images == other.images).all()


def test_a_table_of_other_graphs_is_refused_with_a_way_on(root: Path) -> None:
    manifest = read_manifest(root)
    entry = replace(manifest.files["step.onnx"], sha256=("0" * 64,))
    edited = replace(manifest, files={**manifest.files, "step.onnx": entry})
    with pytest.raises(BackendError, match=r"belongs to other graphs than the plan's; export the plan again"):
        Amx(root, edited, 1)
