"""Write a plan of format 2 (docs/reference/plan-format.md): one base, and branches as graphs of their own.

Every parameter of every model is in the manifest's table, by its name, with its place in `weights.bin`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from car_export import graphs, verify2
from car_export.config import ExportOptions
from car_export.errors import ExportError
from car_export.files import plan_written_aside
from car_export.goldens import write_goldens
from car_export.plan import (
    PAST_DIMS,
    STEP_DIMS,
    Log,
    PlanBuilder,
    compute_model,
    example_step_inputs,
)
from car_export.trace import Names, optimise, specialise
from car_export.verify import Greedy
from car_export.weights import HALVED, as_array
from car_runtime.conventions import ControlConvention
from car_runtime.format import manifest as schema
from car_runtime.format.goldens import golden_file
from car_runtime.format.schema import BRANCH_NAME, FUSIONS
from car_train.model import Model

DIMS: dict[str, Names] = STEP_DIMS | {
    "rows": ("R",),
    "twin": ("B",),
    "plain": ("B",),
    "cfg": ("B",),
    "control_cfg": ("B",),
    "top_k": ("B",),
    "top_p": ("B",),
    "smooth": ("B",),
    "bias": ("B", "S", "S", None),
    "mix": ("m", "R"),
    "keep": ("R",),
    "c": ("m", None, "S", "S", "R", None),
}
BRANCH_DIMS: dict[str, Names] = DIMS | {
    "control": ("B", "S", "S", None),
    "c": (None, "S", "S", "R", None),
}


def base_digest(model: Model) -> str:
    """SHA-256 over everything but the branch: names, shapes and bytes."""
    total = hashlib.sha256()
    assert model.car is not None
    for part in (model.vqvae, model.car.base):
        for name, tensor in sorted(part.state_dict().items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b"")
    return total.hexdigest()


def check_branches(models: Mapping[str, Model]) -> None:
    """Raise ExportError unless the models are branches on one base."""
    for name, model in models.items():
        if not BRANCH_NAME.fullmatch(name):
            raise ExportError(f"a branch is called {name!r}; a name is 1 to 32 of a-z, 0-9, _ and -")
        if model.car is None or model.car.branch is None:
            raise ExportError(f"{name} has no control branch; give a checkpoint that was trained with a control")
    first, *others = models.items()
    digest, kind = base_digest(first[1]) if others else "", _kind(first[1])
    for name, model in others:
        if base_digest(model) != digest:
            raise ExportError(
                f"{name} is on another base than {first[0]}; give branches that were trained on the same base"
            )
        if _kind(model) != kind:
            raise ExportError(
                f"{name} has the fusion {_kind(model)} and {first[0]} {kind}; give branches with one kind of fusion"
            )


def _kind(model: Model) -> str:
    assert model.config.car is not None
    return model.config.car.fusion


class PlanBuilder2(PlanBuilder):
    """One export of format 2."""

    def __init__(self, models: Mapping[str, Model], options: ExportOptions, directory: Path, log: Log):
        """models: branch name → model, the default branch first; "" → a model without a branch, alone."""
        first = next(iter(models.values()))
        super().__init__(first, options, directory, log)
        self.branches: dict[str, Model] = {}
        self.references: dict[str, Model] = {}
        self.placed: dict[str, schema.Parameter] = {}
        """Parameters that were stored apart from the graphs, by name."""
        self.greedy: dict[str, Greedy] = {}
        """What the models of the goldens draw, by branch; "" without control."""
        for name, model in models.items():
            if not name:
                continue
            reference = self._reference(model, options)
            made = self.model if model is first else compute_model(reference, options.precision)
            assert made.car is not None
            made.car.base, made.vqvae = self.car.base, self.model.vqvae
            assert reference.car is not None
            assert self.reference.car is not None
            reference.car.base, reference.vqvae = self.reference.car.base, self.reference.vqvae
            self.branches[name], self.references[name] = made, reference

    def build(self) -> schema.Manifest:
        self._fusion_parameters()
        return super().build()

    def _control(self) -> None:
        sizes = [s * self.config.patch for s in self.config.sides]
        for name, made in self.branches.items():
            inputs = {f"control_{k}": torch.zeros(s, s, 3, dtype=torch.uint8) for k, s in enumerate(sizes)}
            model = self._trace(graphs.ControlGraph(made), inputs, ["features"], {})
            optimise(model)
            self._write(f"control.{name}", model)

    def _condition(self) -> None:
        self._labelled("condition", graphs.BaseConditionGraph(self.model), ["start", "modulation"])
        self._branch_conditions()

    def _branch_conditions(self) -> None:
        for name, made in self.branches.items():
            assert made.car is not None
            if made.car.branch_blocks:
                self._labelled(f"condition.{name}", graphs.BranchConditionGraph(made), ["modulation"])

    def _labelled(self, name: str, module: nn.Module, outputs: list[str]) -> None:
        """A graph of the classes of rows."""
        model = self._trace(module, {"label": torch.zeros(4, dtype=torch.int64)}, outputs, {"label": ("R",)})
        optimise(model)
        self._write(name, model)

    def _steps(self) -> None:
        module = graphs.BaseStepGraph(self.model, more_smooth=self.options.more_smooth)
        every = self._example_inputs()
        every |= example_inputs_of_2(self.model, module, every)
        dims = DIMS | dict.fromkeys(module.fusion_names, ("m", None, None))
        dims |= {name: ("m", None) for name in module.fusion_names if "linear_weight" not in name}
        self._step_forms("step", module, every, dims)
        self._branch_steps()

    def _example_inputs(self) -> dict[str, Tensor]:
        return example_step_inputs(self.model, rows=4, images=2, side=3, past=6, next_side=7)

    def _branch_steps(self) -> None:
        every = self._example_inputs() | {"rows": torch.zeros(4, dtype=torch.int64)}
        for name, made in self.branches.items():
            self._step_forms(
                f"branch.{name}", graphs.BranchGraph(made), every | _branch_inputs(made, every), BRANCH_DIMS
            )

    def _step_forms(
        self,
        name: str,
        module: graphs.BaseStepGraph | graphs.BranchGraph,
        every: Mapping[str, Tensor],
        dims: Mapping[str, Names],
    ) -> None:
        """A graph with named dimensions, and its static forms."""
        inputs = {port: every[port] for port in module.input_names}
        past = dict.fromkeys([port for port in inputs if port.startswith("past_")], PAST_DIMS)
        model = self._trace(module, inputs, module.output_names, {**dims, **past})
        optimise(model)
        self._write(name, model)
        self.store.flush()
        for batch in self.options.batches:
            for k, (side, (start, _)) in enumerate(zip(self.config.sides, self.config.ranges, strict=True)):
                sizes = {"R": 2 * batch, "B": batch, "S": side, "P": start, "T": self._next_side(k), "m": 1}
                self._write(f"{name}.{k:02d}.b{batch}", specialise(model, sizes, self.constants[k]))

    # -- parameters --------------------------------------------------------------------------------------------------

    def _fusion_parameters(self) -> None:
        """The fusions' parameters are inputs of the step: stored as the step takes them."""
        for name, made in self.branches.items():
            assert made.car is not None
            assert made.car.branch is not None
            for i, fusion in enumerate(made.car.branch.fusions):
                for key, parameter in fusion.named_parameters():
                    turned = key == "linear.weight"
                    value = parameter.detach().T if turned else parameter.detach()
                    self.placed[f"branches.{name}.fusions.{i}.{key}"] = self._stored(key, value, turned)

    def _stored(self, name: str, value: Tensor, transposed: bool = False) -> schema.Parameter:
        halved = self.store.half and value.dtype == torch.float32 and value.numel() >= HALVED
        array = np.ascontiguousarray(as_array(value.half() if halved else value))
        tensor = self.store.add_array(name, array)
        return schema.Parameter(
            dtype=array.dtype.name,
            shape=tuple(array.shape),
            offset=tensor.offset or 0,
            bytes=array.nbytes,
            layout="transposed" if transposed else "plain",
        )

    def _parameters(self) -> dict[str, schema.Parameter]:
        """Every parameter's place; what the graphs hold in another form is stored here as it is."""
        assert self.model.car is not None
        parts: list[tuple[str, nn.Module]] = [("vqvae", self.model.vqvae), ("base", self.model.car.base)]
        for name, made in self.branches.items():
            assert made.car is not None
            assert made.car.branch is not None
            parts.append((f"branches.{name}", made.car.branch))
        table = dict(self.placed)
        for prefix, part in parts:
            for key, tensor in part.state_dict(keep_vars=True).items():
                name = f"{prefix}.{key}"
                if name in table:
                    continue
                place = self.store.find(tensor)
                if place is None:
                    table[name] = self._stored(name, tensor.detach())
                else:
                    found, turned = place
                    table[name] = schema.Parameter(
                        dtype=found.dtype.numpy().name,
                        shape=tuple(int(dim) for dim in found.shape),
                        offset=found.offset or 0,
                        bytes=found.length or 0,
                        layout="transposed" if turned else "plain",
                    )
        return table

    def _decoder_graph(self) -> graphs.DecoderGraph:
        return graphs.DecoderGraph(self.model)

    def _autoencoder(self) -> None:
        super()._autoencoder()
        self.table = self._parameters()

    def _model_facts(self) -> schema.Model:
        default = next(iter(self.branches), None)
        branches = {}
        for name, made in self.branches.items():
            car = made.config.car
            assert car is not None
            assert made.car is not None
            assert made.car.branch is not None
            branches[name] = schema.Branch(
                control_type=car.control_type,
                fusion=car.fusion,
                transformer=car.transformer,
                blocks=len(made.car.branch.blocks),
                cache_layers=len(made.car.branch_blocks),
                control_convention=ControlConvention(**asdict(car.control_convention)),
            )
        whole = super()._model_facts()
        return replace(whole, cache_layers=len(self.car.base.blocks), branches=branches, default_branch=default)

    def _goldens(self) -> None:
        sampling = asdict(self.options.sampling(self.config.vocab))
        for name, model in {"": self.reference, **self.references}.items():
            self.greedy[name] = write_goldens(
                self.directory, model, file=golden_file(name), steered=bool(name), **sampling
            )

    def _manifest(self) -> schema.Manifest:
        self.format = 2
        return super()._manifest()


def example_inputs_of_2(
    model: Model, module: graphs.BaseStepGraph, every: Mapping[str, Tensor], m: int = 5
) -> dict[str, Tensor]:
    """Inputs of a base's step that `example_step_inputs` lacks, or has in other shapes; m branches."""
    assert model.car is not None
    base = model.car.base
    R, B, side, C = len(every["x"]), len(every["uniforms"]), every["x"].shape[1], base.config.C
    inputs = {
        "modulation": torch.zeros(R, 6 * len(base.blocks) + 2, C),
        "rows": torch.zeros(R, dtype=torch.int64),
        "twin": torch.zeros(B, dtype=torch.int64),
        "plain": torch.zeros(B, dtype=torch.int64),
        "cfg": torch.ones(B),
        "control_cfg": torch.ones(B),
        "top_k": torch.ones(B, dtype=torch.int64),
        "top_p": torch.ones(B),
        "smooth": torch.zeros(B, dtype=torch.bool),
        "bias": torch.zeros(B, side, side, model.config.vqvae.vocab),
        "mix": torch.ones(m, R),
        "keep": torch.zeros(R),
        "c": torch.zeros(m, module.fused, side, side, R, C),
    }
    if model.car.branch is not None:
        for i, fusion in enumerate(model.car.branch.fusions):
            for name in FUSIONS[module.fusion]:
                value = fusion.get_parameter(name.replace("_", ".", 1)).detach()
                value = value.T if name == "linear_weight" else value
                inputs[f"fusion_{name}_{i}"] = torch.stack([value] * m)
    return inputs


def _branch_inputs(made: Model, every: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of a branch's graph in its own shapes."""
    assert made.car is not None
    R, side, C = len(every["x"]), every["x"].shape[1], made.car.base.config.C
    return {
        "modulation": torch.zeros(R, 6 * len(made.car.branch_blocks), C),
        "control": torch.zeros(len(every["uniforms"]), side, side, C),
    }


def build_plan_of_2(models: Model | Mapping[str, Model], options: ExportOptions, log: Log = lambda _: None) -> Path:
    """Build, verify and put a plan in place; returns its path. Nothing is left at `options.output` if anything fails.

    models: branch name → model on one base, the default branch first; {"": model} makes a plan without branches. Of
    one model alone the branch is called as its control type is. Raises ExportError or verify.VerificationError.
    """
    if isinstance(models, Model):
        models = {models.config.car.control_type if models.config.car is not None else "": models}
    if "" not in models:
        check_branches(models)
    with plan_written_aside(options.output) as aside:
        builder = PlanBuilder2(models, options, aside, log)
        builder.build()
        verify2.verify_plan_of_2(aside, builder.reference, builder.references, log, builder.greedy)
    return options.output
