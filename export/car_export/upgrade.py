"""A plan of format 1 as one of format 2, without its checkpoint: the model is made again from graphs and weights.

Graphs name the model's parameters, and what they hold is taken bit for bit. Small ones are folded into what graphs
compute from them; those are found by the products that they stand next to. Three are known in another form only:

- Positions and levels are stored as their sum. It becomes the position, and levels are zero.
- A head's temperature is stored, not its logarithm: the logarithm is one that has this very exponential.
- Kernels of a doubling in phases (`graphs.PhasedUp`) stay as they are; the 3×3 kernel of the parameters' table is
  what they are sums of, up to rounding.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto
from torch import Tensor

from car_export import graphs, verify2
from car_export.config import ExportOptions
from car_export.errors import ExportError
from car_export.files import plan_written_aside
from car_export.plan import Log, tool_versions
from car_export.plan2 import PlanBuilder2
from car_export.sizes import base_config, encoder_widths
from car_export.weights import place
from car_runtime.format import manifest as schema
from car_runtime.format.goldens import GOLDENS, golden_file
from car_runtime.format.graph_check import Checked, check_graph
from car_runtime.receipt import UPGRADED, plan_digest
from car_train.config import CARConfig, ConfigError, ModelConfig
from car_train.conventions import FIRST, PRESETS
from car_train.model import Model
from car_train.model.var import MAX_LOG_SCALE

REMEDY = "export its checkpoint again"
PARTS = {
    "vqvae.": (("encoder", "vqvae."), ("decoder", "vqvae."), ("step", "quantizer.")),
    "car.base.": (("step", "car.base."), ("condition", "car.base."), ("condition", "base.")),
    "car.branch.": (("step", "car.branch."), ("condition", "car.branch."), ("control", "branch.")),
}
"""Prefix of a parameter's name → graphs that may hold it, and its prefix there."""
FORMS = (("", False), (".f16", False), (".T", True), (".T.f16", True))
"""What an initializer's name ends in, and whether it is transposed."""
NEXT = {"norm1": "conv1", "norm2": "conv2", "norm": "qkv", "norm_out": "conv_out"}
"""A norm of groups → the convolution that reads it."""
NEAR = 64
"""Neighbours of a logarithm, to each side, of which one has the exponential that is looked for."""


class _MissingError(Exception):
    """A parameter isn't where it should be; says which."""


class OldGraph:
    """One graph of a plan, to find the model's parameters in."""

    def __init__(self, file: Path, weights: np.ndarray):
        graph = onnx.load(file, load_external_data=False).graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._weights = weights
        self._producers = {output: node for node in graph.node for output in node.output}
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)

    @property
    def names(self) -> Iterable[str]:
        """Names of the initializers."""
        return self._tensors

    def array(self, name: str) -> np.ndarray | None:
        """An initializer, None if there is none of this name; an external one is a view of weights.bin."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        offset, length = place(tensor)
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return self._weights[offset : offset + length].view(kind).reshape(tuple(tensor.dims))

    def named(self, name: str) -> np.ndarray | None:
        """The parameter that is called so, in whatever form it is stored."""
        for suffix, transposed in FORMS:
            array = self.array(name + suffix)
            if array is not None:
                return array.T if transposed else array
        return None

    def reader(self, name: str, *kinds: str) -> NodeProto | None:
        """The first node of a kind that takes the parameter `name`, past casts and transposes."""
        starts = [name + suffix for suffix, _ in FORMS if name + suffix in self._tensors]
        return next((node for node in self._after(starts) if node.op_type in kinds), None)

    def bias(self, name: str) -> np.ndarray | None:
        """What is added to the product with the matrix or kernel `name`.weight."""
        product = self.reader(f"{name}.weight", "Conv", "MatMul", "Gemm")
        if product is not None and len(product.input) > 2:
            return self._constant(product.input[2])
        added = next(self._after(product.output), None) if product is not None else None
        return self._operand(added) if added is not None and added.op_type == "Add" else None

    def norm(self, conv: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Weight and bias of the norm of groups that the convolution `conv`.weight reads."""
        node = self.reader(f"{conv}.weight", "Conv")
        shifted = self._before(node.input[0], "Add") if node is not None else None
        if shifted is None:
            return None
        bias, scaled = self._operand(shifted), self._before(self._other(shifted), "Mul")
        weight = self._operand(scaled) if scaled is not None else None
        return (weight.reshape(-1), bias.reshape(-1)) if weight is not None and bias is not None else None

    def temperature(self, name: str, heads: int) -> np.ndarray | None:
        """What the queries of the attention with the matrix `name` are multiplied with, [H]."""
        product = self.reader(name, "MatMul", "Gemm")
        for node in self._after(product.output) if product is not None else ():
            value = self._operand(node) if node.op_type == "Mul" else None
            if value is not None and value.shape == (heads, 1):
                return value[:, 0]
        return None

    def stride(self, conv: str) -> int:
        """Of a convolution."""
        node = self.reader(f"{conv}.weight", "Conv")
        strides = [list(a.ints) for a in node.attribute if a.name == "strides"] if node is not None else []
        return int(strides[0][0]) if strides else 1

    def _after(self, names: Iterable[str]) -> Iterator[NodeProto]:
        """The nodes that depend on these values, the nearest first."""
        seen, queue = set(names), deque(names)
        while queue:
            for node in self._readers[queue.popleft()]:
                if node.output[0] not in seen:
                    yield node
                    seen.update(node.output)
                    queue.extend(node.output)

    def _before(self, name: str, kind: str) -> NodeProto | None:
        """The nearest node of a kind, with a constant operand, that this value depends on."""
        queue = deque([name])
        for _ in range(16):
            node = self._producers.get(queue.popleft()) if queue else None
            if node is None:
                continue
            if node.op_type == kind and self._operand(node) is not None:
                return node
            queue.extend(node.input)
        return None

    def _operand(self, node: NodeProto) -> np.ndarray | None:
        """The constant operand of a sum or a product."""
        found = (self._constant(name) for name in node.input)
        return next((value for value in found if value is not None), None)

    def _other(self, node: NodeProto) -> str:
        """The operand that is no constant."""
        return next(name for name in node.input if self._constant(name) is None)

    def _constant(self, name: str) -> np.ndarray | None:
        """A constant, also one that a node casts or reshapes."""
        node = self._producers.get(name)
        if node is not None and node.op_type in ("Cast", "Reshape", "Unsqueeze"):
            return self._constant(node.input[0])
        return self.array(name)


def graphs_of(root: Path, manifest: schema.Manifest, names: Iterable[str]) -> dict[str, OldGraph]:
    """Graphs of a plan by their names in its manifest."""
    weights = np.memmap(root / schema.WEIGHTS, np.uint8, "r")
    return {name: OldGraph(root / manifest.graphs[name].file, weights) for name in names}


@dataclass(frozen=True)
class OldPlan:
    """A plan of format 1, checked, and the graphs that hold its model."""

    root: Path
    manifest: schema.Manifest
    graphs: dict[str, OldGraph]

    @staticmethod
    def read(root: Path) -> OldPlan:
        """Raises ExportError for a plan that can't be upgraded, PlanError for a damaged one."""
        manifest = schema.read_manifest(root)
        precision = manifest.precision
        if manifest.format != 1:
            raise ExportError(f"{root} is of format {manifest.format} already; use it as it is")
        if precision.weights in ("int8", "bf16"):
            exact = "the float32 plan that it was made of" if precision.weights == "int8" else "one in fp16 or fp32"
            raise ExportError(
                f"{root} stores {precision.weights}, of which no model can be made again; upgrade {exact}"
            )
        if "encoder" not in manifest.graphs:
            raise ExportError(f"{root} has no encoder, which is part of its model; {REMEDY}")
        schema.verify_files(root, manifest)
        parts: list[str] = ["control", "condition", "step", "decoder", "encoder"]
        wanted = [name for name in parts if name in manifest.graphs]
        checked, size = Checked(), manifest.files[schema.WEIGHTS].bytes
        for name in wanted:
            check_graph((root / manifest.graphs[name].file).read_bytes(), manifest.graphs[name], size, checked)
        return OldPlan(root, manifest, graphs_of(root, manifest, wanted))

    def constant(self, name: str, k: int) -> np.ndarray:
        """A constant of scale k."""
        tensor = self.manifest.tensors[self.manifest.scales[k].constants[name]]
        return np.memmap(self.root / schema.WEIGHTS, tensor.dtype, "r", tensor.offset, tensor.shape)

    def parameter(self, name: str) -> np.ndarray | None:
        """A parameter by its name in the model, from whichever graph holds it."""
        places = [(graph, old + name.removeprefix(prefix)) for graph, old, prefix in self._places(name)]
        for graph, old in places:
            array = graph.named(old)
            if array is not None:
                return array
        for graph, old in places:
            array = _folded(graph, old)
            if array is not None:
                return array
        return None

    def _places(self, name: str) -> Iterator[tuple[OldGraph, str, str]]:
        prefix = next(prefix for prefix in PARTS if name.startswith(prefix))
        for kind, old in PARTS[prefix]:
            kept = "vqvae.quantizer." if old == "quantizer." else prefix
            if kind in self.graphs and name.startswith(kept):
                yield self.graphs[kind], old, kept

    def has(self, name: str) -> bool:
        """Whether a graph holds the parameter."""
        return self.parameter(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter. Raises _MissingError."""
        array = self.parameter(name)
        if array is None:
            raise _MissingError(name)
        return array.shape

    def count(self, pattern: str) -> int:
        """How many numbers stand in the place of the group of a pattern, in names of the model; 0, 1, …"""
        found = {
            int(match[1])
            for prefix, places in PARTS.items()
            for kind, old in places
            for name in (self.graphs[kind].names if kind in self.graphs else ())
            if name.startswith(old) and (match := re.match(pattern, prefix + name.removeprefix(old)))
        }
        return max(found, default=-1) + 1


def _folded(graph: OldGraph, name: str) -> np.ndarray | None:
    """A small parameter that has no name of its own in a graph."""
    owner, _, kind = name.rpartition(".")
    above, _, last = owner.rpartition(".")
    if last in NEXT:
        both = graph.norm(f"{above}.{NEXT[last]}")
        return None if both is None else both[kind == "bias"]
    return graph.bias(owner) if kind == "bias" else None


# -- the model -------------------------------------------------------------------------------------------------------


def config_of(old: OldPlan) -> ModelConfig:
    """The config that a plan's model was made with, as far as a model shows it. Raises _MissingError, ConfigError."""
    facts = old.manifest.model
    vqvae, var = base_config(old.manifest, old)
    car = _branch_config(old) if facts.control_type is not None else None
    return ModelConfig(vqvae=vqvae, var=var, car=car, class_names=facts.class_names)


def _branch_config(old: OldPlan) -> CARConfig:
    facts = old.manifest.model
    assert facts.control_type is not None
    stated = facts.control_convention
    name = next((key for key, preset in PRESETS.items() if stated and asdict(preset) == asdict(stated)), None)
    encoder: dict[str, Any] = {"encoder": "vqvae"}
    if widths := encoder_widths(old):
        strides = (old.graphs["control"].stride(f"branch.encoder.{one}") for one in list(widths)[1:])
        encoder = {"encoder_widths": tuple(widths.values()), "encoder_strides": tuple(strides)}
    blocks = old.has("car.branch.blocks.0.attn.qkv_weight")
    gain, norm = (old.has(f"car.branch.fusions.0.{one}") for one in ("gain", "norm.weight"))
    return CARConfig(
        control_type=facts.control_type,
        convention=name or (FIRST.get(facts.control_type) if stated is None else None),
        transformer="blocks" if blocks else "conv",
        fusion="cross_norm" if gain else "concat" if norm else "zero",
        **encoder,
    )


@torch.no_grad()
def model_of(old: OldPlan) -> tuple[Model, dict[str, list[Tensor]]]:
    """The model of a plan, float32, and the kernels of the decoder's `Up`s that double in phases, by name.

    Raises ExportError naming what is not to be found.
    """
    try:
        config = config_of(old)
        with torch.device("meta"):
            model = Model(config)
        phases = dict(_phases(old, model))
        values = {name: _value(old, name, config, phases) for name in model.state_dict()}
        model.load_state_dict(values, assign=True)
    except _MissingError as error:
        raise ExportError(f"{old.root}: {error} is in none of its graphs; {REMEDY}") from error
    except (ConfigError, RuntimeError, IndexError, ZeroDivisionError) as error:
        raise ExportError(
            f"{old.root} has no model that is known ({str(error).splitlines()[-1].strip()}); {REMEDY}"
        ) from error
    model.vqvae.quantizer.reset_buffers()
    _take_schedule(old, model)
    return model.requires_grad_(False).eval(), phases


def _value(old: OldPlan, name: str, config: ModelConfig, phases: Mapping[str, list[Tensor]]) -> Tensor:
    """One parameter, float32. Raises _MissingError."""
    owner, _, kind = name.rpartition(".")
    level = owner.removeprefix("vqvae.decoder.").removesuffix(".conv")
    array: np.ndarray | None
    if name == "car.base.pos_LC":
        scales = range(len(config.vqvae.sides))
        array = np.concatenate([old.constant("pos", k).reshape(-1, old.manifest.model.width) for k in scales])
    elif name == "car.base.level_KC":
        array = np.zeros((len(config.vqvae.sides), old.manifest.model.width), np.float32)
    elif kind == "log_scale_H":
        array = _logarithms(old, owner)
    elif level in phases:
        array = _kernel_of(phases[level]) if kind == "weight" else old.parameter(f"vqvae.decoder.{level}.bias")
    else:
        array = old.parameter(name)
    if array is None:
        raise _MissingError(name)
    return torch.from_numpy(np.array(array)).float()


def temperature(old: OldPlan, attention: str) -> np.ndarray | None:
    """Of the heads of an attention, by its name in the model."""
    return old.graphs["step"].temperature(f"{attention}.qkv_weight", old.manifest.model.heads)


def _logarithms(old: OldPlan, attention: str) -> np.ndarray:
    """Numbers whose exponentials are an attention's temperatures, to the bit. Raises _MissingError, ExportError."""
    wanted = temperature(old, attention)
    if wanted is None:
        raise _MissingError(f"{attention}.log_scale_H")
    half = old.manifest.precision.compute == "fp16"  # what it is stored in
    dtype, most = (np.float16 if half else np.float32), np.float32(MAX_LOG_SCALE)
    found = np.log(wanted.astype(np.float64)).astype(dtype)
    up, down = found.copy(), found.copy()
    candidates = [found]
    for _ in range(NEAR):
        up, down = np.nextafter(up, dtype(np.inf)), np.nextafter(down, dtype(-np.inf))
        candidates += [up, down]
    exact = [np.exp(np.minimum(one.astype(np.float32), most)) == wanted for one in candidates]
    if not np.any(exact, 0).all():
        raise ExportError(f"{old.root}: temperatures of {attention} are no exponentials here; {REMEDY}")
    first = np.argmax(exact, 0)
    return np.array([candidates[at][head] for head, at in enumerate(first)], dtype)


def _phases(old: OldPlan, model: Model) -> Iterator[tuple[str, list[Tensor]]]:
    """The kernels of each `Up` that doubles in phases."""
    for name, module in model.vqvae.decoder.named_modules():
        if isinstance(module, graphs.Up):
            kernels = [old.parameter(f"vqvae.decoder.{name}.kernels.{i}") for i in range(4)]
            found = [torch.from_numpy(np.array(kernel)).float() for kernel in kernels if kernel is not None]
            if found:
                yield name, found


def _kernel_of(kernels: list[Tensor]) -> np.ndarray:
    """The 3×3 kernel that four kernels of phases are sums of, by least squares: [O, I, 2, 2] each → [O, I, 3, 3]."""
    basis = graphs.phases_of(torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3))
    sums = torch.cat([kernel.flatten(1) for kernel in basis], 1).T.numpy()
    seen = torch.cat([kernel.double().flatten(0, 1).flatten(1) for kernel in kernels], 1).T.numpy()
    solved = np.linalg.lstsq(sums, seen, rcond=None)[0]
    return solved.T.reshape(*kernels[0].shape[:2], 3, 3).astype(np.float32)


def _take_schedule(old: OldPlan, model: Model) -> None:
    """The scales' resize matrices from the plan, in place. Raises ExportError where its schedule is another one."""
    config, quantizer = model.config.vqvae, model.vqvae.quantizer
    last = len(config.sides) - 1
    for k in range(last + 1):
        stated = (int(old.constant("phi", k)[0]), float(old.constant("cfg_ratio", k)[0]))
        wanted = (config.phi_index[k], float(np.float32(config.ratios[k])))
        if stated != wanted or old.manifest.scales[k].cfg_ratio != config.ratios[k]:
            raise ExportError(f"{old.root}: scale {k} has φ and guidance {stated}, not {wanted}; {REMEDY}")
        quantizer.get_buffer(f"up_{k}").copy_(torch.from_numpy(np.array(old.constant("up", k))))
        if k < last:
            quantizer.get_buffer(f"down_{k + 1}").copy_(torch.from_numpy(np.array(old.constant("down", k))))


# -- the plan --------------------------------------------------------------------------------------------------------


class Upgrade(PlanBuilder2):
    """An export of a model that was made from a plan: what the plan says of it stays."""

    def __init__(self, old: OldPlan, name: str, options: ExportOptions, directory: Path, log: Log):
        model, self.phases = model_of(old)
        self.old, self.branch = old, name
        super().__init__({name: model}, options, directory, log)

    def _reference(self, model: Model, options: ExportOptions) -> Model:
        """As it is: the weights are those that were stored, rounded where they were."""
        return model

    def _decoder_graph(self) -> graphs.DecoderGraph:
        return graphs.DecoderGraph(self.model, self.phases)

    def _constants(self) -> None:
        super()._constants()
        first, width = self.tensors["pos.0"], self.old.manifest.model.width
        shape = (self.config.tokens, width)
        self.placed["base.pos_LC"] = schema.Parameter(
            dtype="float32", shape=shape, offset=first.offset, bytes=4 * shape[0] * width
        )

    def _goldens(self) -> None:
        super()._goldens()
        if GOLDENS in self.old.manifest.files:
            (self.directory / golden_file(self.branch)).write_bytes((self.old.root / GOLDENS).read_bytes())

    def _model_facts(self) -> schema.Model:
        facts, stated = super()._model_facts(), self.old.manifest.model.control_convention
        branches = {name: replace(one, control_convention=stated) for name, one in facts.branches.items()}
        return replace(facts, branches=branches, control_convention=stated)


def upgrade(source: Path, output: Path, name: str | None = None, log: Log = lambda _: None) -> Path:
    """Write a plan of format 1 as one of format 2: weights, tokens, settings and goldens stay.

    name: the model's name in the manifest (None: as before). Nothing is left at `output` if anything fails. Raises
    ExportError, VerificationError, or PlanError for a plan that can't be read.
    """
    old = OldPlan.read(source)
    manifest = old.manifest
    sampling = {field.name: getattr(manifest.sampling, field.name) for field in fields(manifest.sampling)}
    options = ExportOptions(
        output=output,
        name=name or manifest.name,
        precision=manifest.precision.compute,
        weights=manifest.precision.weights if manifest.precision.compute == "fp32" else "fp32",
        batches=manifest.batches or (1,),
        more_smooth=manifest.more_smooth,
        provenance={**manifest.provenance, **tool_versions(), UPGRADED: plan_digest(manifest)},
        **sampling,
    )
    if manifest.engines:
        log(f"{len(manifest.engines)} engines are of format 1, and left out")
    with plan_written_aside(output) as aside:
        builder = Upgrade(old, manifest.model.control_type or "", options, aside, log)
        builder.build()
        _check_temperatures(old, aside, builder)
        verify2.verify_plan_of_2(aside, builder.reference, builder.references, log, builder.greedy)
    return output


def _check_temperatures(old: OldPlan, directory: Path, builder: Upgrade) -> None:
    """Raise ExportError unless the new graphs hold the old temperatures, which are folded, to the bit."""
    manifest = schema.read_manifest(directory)
    parts = [("step", "car.base.", builder.car.base.blocks)]
    if builder.branch:
        parts.append((f"branch.{builder.branch}", "branch.", builder.car.branch_blocks))
    for (_, prefix, blocks), graph in zip(
        parts, graphs_of(directory, manifest, [part[0] for part in parts]).values(), strict=True
    ):
        for i in range(len(blocks)):
            was = temperature(old, f"car.{prefix.removeprefix('car.')}blocks.{i}.attn")
            now = graph.temperature(f"{prefix}blocks.{i}.attn.qkv_weight", manifest.model.heads)
            if was is None or now is None or not np.array_equal(was, now):
                raise ExportError(f"{old.root}: the temperature of {prefix}blocks.{i} came out different; {REMEDY}")
