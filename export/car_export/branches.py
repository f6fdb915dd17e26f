"""Branches of an existing plan of format 2: another one added, or one taken out. All others stay to the bit.

`car-run plan add-branch` and `plan remove-branch` are these. A branch's graphs are made from its checkpoint, whose
base must be the plan's: every parameter that the branch was trained on is compared with the plan's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto

from car_export.bf16_to_fp32 import runnable
from car_export.command import run_command
from car_export.config import ExportOptions
from car_export.errors import ExportError, VerificationError
from car_export.files import plan_written_aside
from car_export.goldens import write_goldens
from car_export.plan import Log, reference_model
from car_export.plan2 import PlanBuilder2, check_branches
from car_export.verify2 import Verifier2, whole_runs
from car_export.weights import Place, WeightStore, alignment, as_array, external, place, refer
from car_runtime.format import manifest as schema
from car_runtime.format.goldens import golden_file
from car_runtime.format.signature import SIGNATURE
from car_runtime.receipt import UPGRADED
from car_train import checkpoint
from car_train.model import Model
from car_train.model.var import MAX_LOG_SCALE

__all__ = ["add_branch", "remove_branch", "run_command"]


def read_plan(plan: Path) -> schema.Manifest:
    """The manifest of a plan whose branches can be changed. Raises ExportError, PlanError."""
    manifest = schema.read_manifest(plan)
    if manifest.format == 1:
        raise ExportError(
            f"{plan} is of format 1, which holds one branch; make one of format 2 of it: "
            f"python export/build_engines.py {plan} --upgrade -o {plan.name.removesuffix('.plan')}-2.plan"
        )
    if manifest.precision.weights == "int8":
        raise ExportError(f"{plan} stores int8; change the float32 plan that it was made of, and make it again")
    if manifest.table_problem is not None:
        raise ExportError(manifest.table_problem)
    schema.verify_files(plan, manifest)
    return manifest


def graphs_of(manifest: schema.Manifest, branch: str) -> list[str]:
    """The names of a branch's graphs."""
    own = {f"control.{branch}", f"condition.{branch}", f"branch.{branch}"}
    statics = f"branch.{branch}."
    return [name for name in manifest.graphs if name in own or _is_static(name, statics)]


def _is_static(name: str, start: str) -> bool:
    return name.startswith(start) and name.removeprefix(start).partition(".")[0].isdecimal()


# -- adding ----------------------------------------------------------------------------------------------------------


class AddedBranch(PlanBuilder2):
    """An export of a branch alone, into a copy of its plan: what the base's graphs hold is referred to."""

    def __init__(
        self, name: str, model: Model, old: schema.Manifest, options: ExportOptions, directory: Path, log: Log
    ):
        self.old = old
        super().__init__({name: model}, options, directory, log)
        self.format, self.tensors, self.graphs = old.format, dict(old.tensors), dict(old.graphs)
        self._know_base()

    def _open_store(self, directory: Path, *, half: bool, transposed: bool) -> WeightStore:
        return WeightStore(directory, half=half, transposed=transposed, append=True)

    def _know_base(self) -> None:
        """Let graphs refer to the base's parameters where the plan has them, and steps to the scales' constants."""
        self.placed.update(self.old.parameters)
        for name, part in (("vqvae", self.model.vqvae), ("base", self.car.base)):
            for key, tensor in part.state_dict(keep_vars=True).items():
                one = self.old.parameters.get(f"{name}.{key}")
                if one is not None:
                    found = external(key, np.dtype(one.dtype), one.shape, one.offset, one.bytes, self.directory)
                    self.store.know(tensor, found, transposed=one.layout == "transposed")
        for scale in self.old.scales:
            named = {port: self.old.tensors[tensor] for port, tensor in scale.constants.items()}
            self.constants.append(
                {
                    port: external(port, np.dtype(t.dtype), t.shape, t.offset, t.bytes, self.directory)
                    for port, t in named.items()
                }
            )

    def build(self) -> schema.Manifest:
        """Add the branch's graphs, parameters and goldens; the manifest is not written."""
        self._fusion_parameters()
        self._control()
        self._branch_conditions()
        if self.old.model.branches:
            self._branch_steps()
        else:  # the base's step had no place for one
            self._steps()
        self.table = self._parameters()
        self.store.close()
        (name,) = self.branches
        sampling = asdict(self.old.sampling)
        self.greedy[name] = write_goldens(self.directory, self.reference, file=golden_file(name), **sampling)
        return replace(self._manifest(), scales=self.old.scales)

    def _model_facts(self) -> schema.Model:
        old, new = self.old.model, super()._model_facts()
        if not old.branches:
            return replace(new, class_names=old.class_names)
        return replace(old, branches=old.branches | new.branches)


def add_branch(
    plan: Path,
    path: Path,
    *,
    name: str | None = None,
    default: str | None = None,
    output: Path | None = None,
    log: Log = lambda _: None,
) -> Path:
    """Add the branch of a checkpoint to a plan on the same base; returns the plan, in place or at `output`.

    name: of the branch (None: its control type). default: the branch of a control that names none, from now on.
    Nothing is changed if anything fails. Raises ExportError, VerificationError, CheckpointError, PlanError.
    """
    read_plan(plan)  # before a folder is made next to what is none
    model = checkpoint.load(path)
    name = name or (model.config.car.control_type if model.config.car is not None else "")
    check_branches({name: model})
    with plan_written_aside(output or plan) as aside:
        old = read_plan(plan)  # as the last writer left it
        _check_room(old, name, model, path, plan)
        check_base(old, plan, reference_model(model, old.precision.compute, old.precision.weights), path)
        options = ExportOptions(
            output=output or plan,
            name=old.name,
            precision=old.precision.compute,
            weights=old.precision.weights if old.precision.compute == "fp32" else "fp32",
            batches=old.batches,
            more_smooth=old.more_smooth,
            provenance={
                **_provenance(old, default),
                **{f"sha256 {name} {file}": digest for file, digest in checkpoint.fingerprint(path).items()},
            },
            **asdict(old.sampling),
        )
        _copy(plan, old, aside)
        builder = AddedBranch(name, model, old, options, aside, log)
        _finish(builder.build(), aside, default)
        with runnable(aside) as whole:
            verifier = Verifier2(whole, builder.reference, name, log)
            verifier.check(builder.greedy[name], shared=False, statics=False)
            whole_runs(whole, {name: verifier}, builder.greedy)
        if verifier.problems:
            raise VerificationError(
                f"{len(verifier.problems)} differences between the plan and {path}:\n  "
                + "\n  ".join(verifier.problems)
            )
    log(f"{options.output} has the branches {', '.join([*old.model.branches, name])}")
    return options.output


def _check_room(old: schema.Manifest, name: str, model: Model, path: Path, plan: Path) -> None:
    """Raise ExportError for a branch that the plan's step doesn't take, or whose name is taken."""
    if name in old.model.branches:
        raise ExportError(f"{plan} has a branch {name!r}; give another --name, or remove that one first")
    assert model.config.car is not None
    assert model.car is not None
    assert model.car.branch is not None
    new = (model.config.car.fusion, len(model.car.branch.blocks))
    for other in old.model.branches.values():
        if (other.fusion, other.blocks) != new:
            raise ExportError(
                f"{path} has the fusion {new[0]} in {new[1]} blocks, and the plan's branches {other.fusion} in "
                f"{other.blocks}; give a branch of that kind, or export it to a plan of its own"
            )


def check_base(old: schema.Manifest, plan: Path, model: Model, path: Path) -> None:
    """Raise ExportError unless a model's base, stored as the plan's is, is the plan's to the bit.

    Of the tokenizer the codes and φ count, which a branch sees the work of. Positions count as the sum that is stored
    and temperatures as what is multiplied with: an upgraded plan knows no more.
    """
    weights = np.memmap(plan / schema.WEIGHTS, np.uint8, "r")
    assert model.car is not None
    position = model.car.base.position().numpy()
    parts = (("base", model.car.base), ("vqvae.quantizer", model.vqvae.quantizer))
    found = {f"{prefix}.{key}": tensor for prefix, part in parts for key, tensor in part.state_dict().items()}
    table = {name for name in old.parameters if name.startswith(("base.", "vqvae.quantizer."))}
    different = sorted(table ^ found.keys())
    for k, scale in enumerate(old.scales):
        given = _stored(weights, old.tensors[scale.constants["pos"]]).reshape(scale.tokens, -1)
        if not np.array_equal(given, position[scale.start : scale.stop]):
            different.append(f"the position of scale {k}")
    for name in sorted(table & found.keys() - {"base.pos_LC", "base.level_KC"}):
        one = old.parameters[name]
        value = _stored(weights, one).T if one.layout == "transposed" else _stored(weights, one)
        mine = as_array(found[name].to(getattr(torch, one.dtype)))
        if name.endswith("log_scale_H"):
            value, mine = (np.exp(np.minimum(x.astype("f4"), np.float32(MAX_LOG_SCALE))) for x in (value, mine))
        if not np.array_equal(value, mine):
            different.append(name)
    if different:
        raise ExportError(
            f"{path} is on another base than {plan} ({different[0]} differs); "
            "give a branch that was trained on the plan's base"
        )


def _stored(weights: np.ndarray, one: schema.Parameter | schema.Tensor) -> np.ndarray:
    """An array of weights.bin as it is stored."""
    return weights[one.offset : one.offset + one.bytes].view(one.dtype).reshape(one.shape)


def _provenance(old: schema.Manifest, default: str | None) -> dict[str, str]:
    """Of the plan; not the one it was upgraded from, whose receipts name no branch, where the default moves."""
    stays = default in (None, old.model.default_branch)
    return {name: value for name, value in old.provenance.items() if stays or name != UPGRADED}


def _copy(plan: Path, manifest: schema.Manifest, aside: Path) -> None:
    """The plan's files; its manifest and signature are made anew."""
    for name in manifest.files:
        if name != SIGNATURE:
            (aside / name).parent.mkdir(exist_ok=True)
            shutil.copy2(plan / name, aside / name)


def _finish(manifest: schema.Manifest, aside: Path, default: str | None) -> None:
    """Write the manifest, with another default branch if one is named. Raises ExportError."""
    if default is not None:
        if default not in manifest.model.branches:
            known = ", ".join(manifest.model.branches)
            raise ExportError(f"--default {default} is not one of the branches: {known}; name one of them")
        branch = manifest.model.branches[default]
        model = replace(
            manifest.model,
            default_branch=default,
            control_type=branch.control_type,
            control_convention=branch.control_convention,
        )
        manifest = replace(manifest, model=model)
    schema.write_manifest(aside, manifest)


# -- taking out ------------------------------------------------------------------------------------------------------


def remove_branch(
    plan: Path, name: str, *, default: str | None = None, output: Path | None = None, log: Log = lambda _: None
) -> Path:
    """Take a branch out of a plan; returns the plan, in place or at `output`.

    default: the branch of a control that names none, to be given where that one goes. Nothing is changed if anything
    fails. Raises ExportError, PlanError.
    """
    read_plan(plan)  # before a folder is made next to what is none
    with plan_written_aside(output or plan) as aside:
        old = read_plan(plan)  # as the last writer left it
        branches = dict(old.model.branches)
        if name not in branches:
            raise ExportError(f"{plan} has no branch {name!r}; name one of: {', '.join(branches) or 'none'}")
        del branches[name]
        if not branches:
            raise ExportError(f"{name} is the last branch of {plan}; a plan without one is exported from its base")
        if old.model.default_branch == name and default is None:
            raise ExportError(
                f"{name} is the default branch of {plan}; name another, e.g. --default {next(iter(branches))}"
            )
        gone = graphs_of(old, name)
        graphs = {key: graph for key, graph in old.graphs.items() if key not in gone}
        parameters = {key: one for key, one in old.parameters.items() if not key.startswith(f"branches.{name}.")}
        dropped = {schema.WEIGHTS, SIGNATURE, golden_file(name), *(old.graphs[key].file for key in gone)}
        for file in set(old.files) - dropped - {graph.file for graph in graphs.values()}:
            (aside / file).parent.mkdir(exist_ok=True)
            shutil.copy2(plan / file, aside / file)
        protos = {key: onnx.load(plan / graph.file, load_external_data=False) for key, graph in graphs.items()}
        held = [place(tensor) for proto in protos.values() for tensor in _external(proto)]
        held += [(one.offset, one.bytes) for one in old.tensors.values()]
        held += [(one.offset, one.bytes) for one in parameters.values()]
        moved = Moved(held)
        moved.write(plan / schema.WEIGHTS, aside / schema.WEIGHTS)
        for key, proto in protos.items():
            for tensor in _external(proto):
                offset, length = place(tensor)
                refer(tensor, moved.to(offset), length)
            onnx.save(proto, aside / graphs[key].file)
        files = schema.describe_files(aside, sorted(p.name for p in aside.iterdir()))
        manifest = replace(
            old,
            model=_without_default(old.model, branches, default or old.model.default_branch),
            tensors={key: replace(one, offset=moved.to(one.offset)) for key, one in old.tensors.items()},
            parameters={key: replace(one, offset=moved.to(one.offset)) for key, one in parameters.items()},
            parameters_digest=schema.graphs_digest(graphs, files),
            graphs=graphs,
            files=files,
            provenance=_provenance(old, default),
        )
        _finish(manifest, aside, None)
    log(f"{output or plan} has the branches {', '.join(branches)}")
    return output or plan


def _without_default(model: schema.Model, branches: dict[str, schema.Branch], default: str | None) -> schema.Model:
    """The model's facts with these branches. Raises ExportError."""
    if default not in branches:
        raise ExportError(f"--default {default} is not one of the branches: {', '.join(branches)}; name one of them")
    chosen = branches[default]
    return replace(
        model,
        branches=branches,
        default_branch=default,
        control_type=chosen.control_type,
        control_convention=chosen.control_convention,
    )


def _external(proto: onnx.ModelProto) -> Iterable[TensorProto]:
    return (tensor for tensor in proto.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)


class Moved:
    """Pieces of `weights.bin` in a smaller one: what nothing refers to is left out."""

    def __init__(self, held: Iterable[Place]):
        """held: offset and length of what is kept; pieces may overlap and be in one another."""
        self._runs: list[list[int]] = []
        for start, length in sorted(held):
            if self._runs and start <= self._runs[-1][1] + 64:
                self._runs[-1][1] = max(self._runs[-1][1], start + length)
            else:
                self._runs.append([start, start + length])
        self._targets: list[int] = []
        end = 0
        for start, stop in self._runs:
            # Where the largest alignment of what is in it stays what it was.
            step = alignment(stop - start)
            end += (start - end) % step
            self._targets.append(end)
            end += stop - start

    def to(self, offset: int) -> int:
        """Where a piece that began at `offset` begins now."""
        at = next(i for i, (start, stop) in enumerate(self._runs) if start <= offset < max(stop, start + 1))
        return offset - self._runs[at][0] + self._targets[at]

    def write(self, source: Path, target: Path) -> None:
        """Copy what is kept."""
        data = np.memmap(source, np.uint8, "r")
        with target.open("wb") as file:
            for (start, stop), place_in_new in zip(self._runs, self._targets, strict=True):
                file.write(bytes(place_in_new - file.tell()))
                file.write(data[start:stop].data)
