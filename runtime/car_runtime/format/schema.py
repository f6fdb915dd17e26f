"""What a plan's manifest says, as frozen dataclasses that check themselves: a broken rule is a PlanError.

`docs/reference/plan-format.md` describes the format. The exporter writes its manifests through these classes, so that
both sides hold one definition and a manifest that breaks a rule is refused before it is written. Only the standard
library is imported here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from car_runtime.conventions import ControlConvention, stated_or_first
from car_runtime.errors import PlanError
from car_runtime.format.imagenet import CLASSES, imagenet_names
from car_runtime.format.typed_json import OPTIONAL, REST

FORMAT = 2
"""The newest format that is read. Format 1 has one branch inside its step; 2 has a base and branches on it."""
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
CHUNK_BYTES = 64 * 1024 * 1024
ITEM_BYTES = {"float32": 4, "float16": 2, "int64": 8, "bool": 1, "uint8": 1}
DTYPES = (*ITEM_BYTES, "bfloat16")
"""Types of ports. numpy has no bfloat16, so named tensors, which a runtime reads itself, have none either."""
PRECISIONS = ("fp32", "fp16", "bf16")
STORED = (*PRECISIONS, "int8")
CONSTANTS = ("pos", "up", "down", "phi", "cfg_ratio")
REMEDY = "export the plan again"

LIMITS = {
    "depth": 512,
    "width": 16_384,
    "heads": 1024,
    "vocab": 2**20,
    "latent_channels": 4096,
    "latent_size": 512,
    "patch": 512,
    "image_size": 4096,
    "classes": 2**20,
    "cache_layers": 1024,
}
"""The largest values of a model's sizes. Published models stay far below: d30 has a width of 1920 and 512 pixels."""
SCALES = 64
DIMENSION = 2**24
"""No dimension of a port is larger."""
NAME = 200
"""Characters of a plan's, a class's or a dimension's name."""
FILE_BYTES = 2**44
_FILE_NAME = re.compile(r"(engines/)?[A-Za-z0-9_][A-Za-z0-9_.+-]*", re.ASCII)
BRANCHES = 64
BRANCH_NAME = re.compile(r"[a-z0-9_-]{1,32}", re.ASCII)
_STATIC_GRAPH = re.compile(
    rf"(?P<graph>step|branch\.{BRANCH_NAME.pattern})\.(?P<scale>\d\d)\.b(?P<batch>[1-9]\d{{0,2}})", re.ASCII
)
"""A graph for one scale and one batch size."""
FUSIONS = {
    "concat": ("norm_weight", "norm_bias", "linear_weight", "linear_bias"),
    "zero": ("linear_weight", "linear_bias"),
    "cross_norm": ("gain",),
}
"""Fusion kind → its parameters, inputs `fusion_NAME_i` of the step for fused block i."""
LAYOUTS = ("plain", "transposed")
PARAMETERS = 65_536
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One control branch of a plan of format 2."""

    control_type: str
    fusion: str
    """"concat", "zero" or "cross_norm": how 𝓖 takes in what 𝒯 computes."""
    transformer: str
    """What 𝒯 is made of: "blocks" or "conv"."""
    blocks: int
    """Blocks of 𝒯, and fusions: the base's last `blocks` blocks take them in."""
    cache_layers: int
    """Number of K/V pairs: `blocks`, or 0 where 𝒯 is convolutional."""
    control_convention: ControlConvention | None = None
    """How the branch's maps are made."""

    @property
    def convention(self) -> ControlConvention | None:
        """How control maps are made; None of an unknown type that states nothing."""
        return stated_or_first(self.control_type, self.control_convention)

    def __post_init__(self) -> None:
        _require(self.fusion in FUSIONS, f"a branch's fusion is {self.fusion!r}, not one of {', '.join(FUSIONS)}")
        kinds = ("blocks", "conv")
        good = self.transformer in kinds
        _require(good, f"a branch's transformer is {self.transformer!r}, not one of {', '.join(kinds)}")
        _require(0 < len(self.control_type) <= NAME, "a branch's control_type must have 1 to 200 characters")
        _require(1 <= self.blocks <= LIMITS["depth"], f"a branch's blocks are {self.blocks}, not 1…{LIMITS['depth']}")
        layers = self.blocks if self.transformer == "blocks" else 0
        _require(
            self.cache_layers == layers, f"a branch's cache_layers are {self.cache_layers}, but must be {layers}"
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """Facts of the model. Sides and sizes are in the unit that each field names."""

    depth: int
    width: int
    heads: int
    vocab: int
    latent_channels: int
    latent_size: int
    """Side of f̂ in tokens (E)."""
    patch: int
    """Pixels per latent edge (F)."""
    image_size: int
    """Side of an image in pixels, E·F."""
    classes: int
    """Number of classes; this index itself means "no class"."""
    class_names: tuple[str, ...] | None
    control_type: str | None
    """The kind of control image ("canny", "depth", …), in format 2 the default branch's; None in a VAR plan."""
    cache_layers: int
    """Number of K/V pairs of the step: base blocks first, then, in format 1, the control branch's."""
    control_convention: ControlConvention | None = None
    """How the branch's maps are made; None in a VAR plan and in plans of version 0.1.0."""
    branches: dict[str, Branch] = field(default_factory=dict, metadata=OPTIONAL)
    """Name → branch; empty in format 1 and in a VAR plan."""
    default_branch: str | None = None
    """The branch of a control that names none; None without branches."""

    @property
    def convention(self) -> ControlConvention | None:
        """How control maps are made; None where there is no branch, or one of an unknown type that states nothing."""
        return stated_or_first(self.control_type, self.control_convention)

    @property
    def conventions(self) -> dict[str, ControlConvention | None]:
        """Branch → how its maps are made; the one branch of format 1 goes by its type. Empty in a VAR plan."""
        if self.branches:
            return {name: branch.convention for name, branch in self.branches.items()}
        return {} if self.control_type is None else {self.control_type: self.convention}

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the classes: `class_names` or, of a plan with 1,000 classes and no names, ImageNet's."""
        return imagenet_names() if self.class_names is None and self.classes == CLASSES else self.class_names

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int):
                _require(value >= 1, f"model.{name} is {value}, but must be at least 1")
                most = LIMITS.get(name, DIMENSION)
                _require(value <= most, f"model.{name} is {value}, but must be at most {most}")
        product = self.latent_size * self.patch
        _require(
            self.image_size == product,
            f"model.image_size is {self.image_size}, but latent_size × patch is {product}",
        )
        _check_branches(self)
        if self.class_names is not None:
            count = len(self.class_names)
            _require(count == self.classes, f"model.class_names has {count} names for {self.classes} classes")
            longest = max(map(len, self.class_names))
            _require(longest <= NAME, f"model.class_names has a name of {longest} characters, not at most {NAME}")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What the transformer computes in, and what its weights are stored in."""

    compute: str
    weights: str

    def __post_init__(self) -> None:
        for name, value, known in (("compute", self.compute, PRECISIONS), ("weights", self.weights, STORED)):
            _require(value in known, f"precision.{name} is {value[:40]!r}, not one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request that leaves them out gets."""

    cfg: float
    top_k: int
    """0 = off."""
    top_p: float
    """0 = off."""

    def __post_init__(self) -> None:
        _require(0 <= self.cfg < math.inf, f"sampling.cfg is {self.cfg}, but must be finite and at least 0")
        _require(self.top_k >= 0, f"sampling.top_k is {self.top_k}, but must be at least 0")
        _require(0 <= self.top_p <= 1, f"sampling.top_p is {self.top_p}, but must be in 0…1")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One step of next-scale prediction (VAR section 3.2), every number worked out."""

    side: int
    tokens: int
    start: int
    stop: int
    next_side: int
    """1 at the last scale, whose next_x nobody reads."""
    cfg_ratio: float
    """k/(K−1): the guidance of scale k is cfg times this."""
    control_size: int
    """Side in pixels of this scale's control image."""
    constants: dict[str, str]
    """Step input name → tensor name."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A named constant inside weights.bin, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Where a parameter of the model lies in weights.bin, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    """As stored."""
    offset: int
    bytes: int
    layout: str = "plain"
    """"plain": as the model has it; "transposed": a matrix [inputs, outputs]."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of a graph; a dimension is a number or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, f"{self.name} has dtype {self.dtype!r}, not one of {', '.join(DTYPES)}")
        for dim in self.shape:
            good = 0 <= dim <= DIMENSION if isinstance(dim, int) else bool(dim.strip()) and len(dim) <= NAME
            _require(good, f"{self.name} has the dimension {dim!r}, but it must be a size or a name")


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One ONNX file and what goes in and out of it."""

    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def input(self, name: str) -> Port:
        """The input called `name`. Raises KeyError."""
        return next(port for port in self.inputs if port.name == name)

    def output(self, name: str) -> Port:
        """The output called `name`."""
        return next(port for port in self.outputs if port.name == name)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size in bytes, and a SHA-256 per chunk."""

    bytes: int
    sha256: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A graph compiled for one kind of machine."""

    file: str
    flavour: str
    target: str
    key: str
    """Hash of what it was built from."""
    details: dict[str, Any] = field(default_factory=dict, metadata=REST)
    """Whatever else its flavour records; in JSON these keys stand among the others."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole manifest. Making one checks it: PlanError says which rule is broken."""

    name: str
    model: Model
    precision: Precision
    sampling: SamplingDefaults
    scales: tuple[Scale, ...]
    tensors: dict[str, Tensor]
    graphs: dict[str, Graph]
    files: dict[str, FileEntry]
    provenance: dict[str, str] = field(default_factory=dict)
    engines: tuple[Engine, ...] = ()
    chunk_bytes: int = CHUNK_BYTES
    format: int = 1
    parameters: dict[str, Parameter] = field(default_factory=dict, metadata=OPTIONAL)
    """The model's parameters by name: "vqvae.…", "base.…", "branches.NAME.…". Empty in format 1."""
    parameters_digest: str = field(default="", metadata=OPTIONAL)
    """`graphs_digest` of the graphs that the table was written with."""

    @property
    def tokens(self) -> int:
        """L, the tokens of one image over all scales."""
        return self.scales[-1].stop

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that static steps are for, ascending."""
        statics = [_STATIC_GRAPH.fullmatch(name) for name in self.graphs]
        return tuple(sorted({int(one["batch"]) for one in statics if one is not None and one["graph"] == "step"}))

    @property
    def more_smooth(self) -> bool:
        """Whether the step can mix codes by noise: it then has the inputs `smooth` and `smooth_noise`."""
        return any(port.name == "smooth" for port in self.graphs["step"].inputs)

    def __post_init__(self) -> None:
        _require(1 <= self.format <= FORMAT, f"format is {self.format}, but this version knows 1 to {FORMAT}")
        _require(bool(self.name.strip()), f"name is {self.name!r}, but must not be empty")
        _require(len(self.name) <= NAME, f"name has {len(self.name)} characters, but at most {NAME} are read")
        _require(self.chunk_bytes >= 1, f"chunk_bytes is {self.chunk_bytes}, but must be at least 1")
        _check_scales(self.scales, self.model)
        _check_files(self)
        _check_tensors(self)
        if self.format == 1:
            one = not self.model.branches and not self.parameters
            _require(one, "format is 1, but branches and parameters belong to format 2")
            _check_graphs(self)
        else:
            _check_parameters(self)
            _check_graphs_of_2(self)
        _check_static_names(self)
        _check_ports(self)

    @property
    def table_problem(self) -> str | None:
        """Why the table of parameters can't be read, in words with the remedy; None if it can."""
        if not self.parameters:
            return f"the plan {self.name!r} has no table of parameters; {REMEDY}, or upgrade it (--upgrade)"
        if graphs_digest(self.graphs, self.files) != self.parameters_digest:
            return f"the table of parameters of {self.name!r} belongs to other graphs than the plan's; {REMEDY}"
        return None

    def to_json(self) -> str:
        """The manifest as the text of manifest.json."""
        whole = asdict(self)
        for engine in whole["engines"]:
            engine.update(engine.pop("details"))
        if whole["model"]["control_convention"] is None:
            del whole["model"]["control_convention"]
        if self.format == 1:
            for owner, keys in (
                (whole, ("parameters", "parameters_digest")),
                (whole["model"], ("branches", "default_branch")),
            ):
                for key in keys:
                    del owner[key]
        else:
            for branch in whole["model"]["branches"].values():
                if branch["control_convention"] is None:
                    del branch["control_convention"]
        order = ("format", "name", "model", "precision", "sampling", "scales", "tensors", "graphs", "files")
        ordered = {key: whole.pop(key) for key in order} | whole
        return json.dumps(ordered, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _require(good: bool, problem: str) -> None:
    if not good:
        raise PlanError(f"{MANIFEST}: {problem}; {REMEDY}")


def graphs_digest(graphs: dict[str, Graph], files: dict[str, FileEntry]) -> str:
    """SHA-256, hex, over the digests of all graphs' files, by name."""
    total = hashlib.sha256()
    for name in sorted(graphs):
        total.update(f"{name} {' '.join(files[graphs[name].file].sha256)}\n".encode())
    return total.hexdigest()


def _check_branches(model: Model) -> None:
    names = list(model.branches)
    _require(len(names) <= BRANCHES, f"model.branches has {len(names)} entries, but at most {BRANCHES} are read")
    for name, branch in model.branches.items():
        good = BRANCH_NAME.fullmatch(name) is not None
        _require(good, f"model.branches has the name {name[:NAME]!r}; a name is 1 to 32 of a-z, 0-9, _ and -")
        good = branch.blocks <= model.depth
        _require(good, f"the branch {name!r} has {branch.blocks} blocks, but its base {model.depth}")
    if not names:
        _require(model.default_branch is None, "model.default_branch is given, but there are no branches")
        return
    default = model.branches.get(model.default_branch or "")
    if default is None:
        _require(False, f"model.default_branch is {model.default_branch!r}, not one of {', '.join(names)}"[:NAME])
        return
    good = model.control_type == default.control_type
    _require(good, f"model.control_type is {model.control_type!r}, but the default branch's {default.control_type!r}")
    shapes = {(branch.fusion, branch.blocks) for branch in model.branches.values()}
    _require(len(shapes) == 1, "the branches differ in fusion or blocks, but one step takes one kind")


def _check_scales(scales: tuple[Scale, ...], model: Model) -> None:
    _require(bool(scales), "scales is empty")
    _require(len(scales) <= SCALES, f"scales has {len(scales)} entries, but at most {SCALES} are read")
    following = [*(scale.side for scale in scales[1:]), 1]
    start = 0
    for k, (scale, next_side) in enumerate(zip(scales, following, strict=True)):
        at = f"scales[{k}]"
        _require(scale.side >= 1, f"{at}.side is {scale.side}, but must be at least 1")
        _require(scale.side <= LIMITS["latent_size"], f"{at}.side is {scale.side}, more than {LIMITS['latent_size']}")
        _require(scale.tokens == scale.side**2, f"{at}.tokens is {scale.tokens}, but side² is {scale.side**2}")
        _require(scale.start == start, f"{at}.start is {scale.start}, but the scales before it end at {start}")
        stop = start + scale.tokens
        _require(scale.stop == stop, f"{at}.stop is {scale.stop}, but start + tokens is {stop}")
        _require(scale.next_side == next_side, f"{at}.next_side is {scale.next_side}, but must be {next_side}")
        _require(0 <= scale.cfg_ratio <= 1, f"{at}.cfg_ratio is {scale.cfg_ratio}, but must be in 0…1")
        _require(scale.control_size >= 1, f"{at}.control_size is {scale.control_size}, but must be at least 1")
        _require(
            scale.control_size <= LIMITS["image_size"],
            f"{at}.control_size is {scale.control_size}, more than {LIMITS['image_size']}",
        )
        start = stop
    side = scales[-1].side
    _require(side == model.latent_size, f"the last scale's side is {side}, but latent_size is {model.latent_size}")


def _check_files(manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        good = _FILE_NAME.fullmatch(name) is not None and name != MANIFEST
        _require(good, f"files names {name!r}, which is not a plain name inside the plan or engines/")
        _require(entry.bytes >= 0, f"files[{name!r}].bytes is {entry.bytes}, but must be at least 0")
        _require(entry.bytes <= FILE_BYTES, f"files[{name!r}].bytes is {entry.bytes}, more than {FILE_BYTES}")
        chunks = -(-entry.bytes // manifest.chunk_bytes)
        found = len(entry.sha256)
        _require(found == chunks, f"files[{name!r}].sha256 has {found} digests for {chunks} chunks")
        for digest in entry.sha256:
            _require(_DIGEST.fullmatch(digest) is not None, f"files[{name!r}].sha256 has the digest {digest[:70]!r}")
    named = [WEIGHTS, *(g.file for g in manifest.graphs.values()), *(e.file for e in manifest.engines)]
    for name in named:
        _require(name in manifest.files, f"the file {name!r} is used but not listed in files")
    for name, graph in manifest.graphs.items():
        good = graph.file.endswith(".onnx")
        _require(good, f"graphs[{name!r}].file is {graph.file!r}, but a graph is stored as ONNX, NAME.onnx")


def _check_tensors(manifest: Manifest) -> None:
    limit = manifest.files[WEIGHTS].bytes
    for name, tensor in manifest.tensors.items():
        at = f"tensors[{name!r}]"
        _require(tensor.dtype in ITEM_BYTES, f"{at}.dtype is {tensor.dtype!r}, not one of {', '.join(ITEM_BYTES)}")
        good = len(tensor.shape) <= 8 and all(0 <= dim <= DIMENSION for dim in tensor.shape)
        _require(good, f"{at}.shape is {list(tensor.shape)}")
        size = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        _require(tensor.bytes == size, f"{at}.bytes is {tensor.bytes}, but its shape and dtype make {size}")
        inside = 0 <= tensor.offset <= limit - tensor.bytes
        _require(inside, f"{at} ends at byte {tensor.offset + tensor.bytes} of {WEIGHTS}, which has {limit}")
    for k, scale in enumerate(manifest.scales):
        for port, name in scale.constants.items():
            _require(name in manifest.tensors, f"scales[{k}].constants.{port} names the unknown tensor {name!r}")


def _check_parameters(manifest: Manifest) -> None:
    """Each lies within weights.bin, and its name belongs to a part of the model."""
    limit, count = manifest.files[WEIGHTS].bytes, len(manifest.parameters)
    _require(count <= PARAMETERS, f"parameters has {count} entries, but at most {PARAMETERS} are read")
    good = _DIGEST.fullmatch(manifest.parameters_digest) is not None or not count
    _require(good, f"parameters_digest is {manifest.parameters_digest[:70]!r}, no SHA-256")
    for name, one in manifest.parameters.items():
        at = f"parameters[{name[:NAME]!r}]"
        part, _, rest = name.partition(".")
        owner = part in ("vqvae", "base") or rest.partition(".")[0] in manifest.model.branches
        _require(part in ("vqvae", "base", "branches") and owner and len(name) <= NAME, f"{at} is of no known part")
        _require(one.dtype in DTYPES, f"{at}.dtype is {one.dtype!r}, not one of {', '.join(DTYPES)}")
        _require(one.layout in LAYOUTS, f"{at}.layout is {one.layout!r}, not one of {', '.join(LAYOUTS)}")
        good = len(one.shape) <= 8 and all(0 <= dim <= DIMENSION for dim in one.shape)
        _require(good, f"{at}.shape is {list(one.shape)}")
        _require(one.layout == "plain" or len(one.shape) == 2, f"{at} is transposed, but no matrix")
        item = 2 if one.dtype == "bfloat16" else ITEM_BYTES[one.dtype]
        size = math.prod(one.shape) * item
        _require(one.bytes == size, f"{at}.bytes is {one.bytes}, but its shape and dtype make {size}")
        inside = 0 <= one.offset <= limit - one.bytes and one.offset % item == 0
        _require(inside, f"{at} ends at byte {one.offset + one.bytes} of {WEIGHTS}, which has {limit}")


def _check_graphs(manifest: Manifest) -> None:
    """The graphs that every plan has, with the ports that the loop binds."""
    cache = [f"{kind}_{i}" for i in range(manifest.model.cache_layers) for kind in ("k", "v")]
    step = ["x", "modulation", "f_hat", "uniforms", "cfg", "top_k", "top_p", "known", "known_mask"]
    wanted = {
        "condition": (["label"], ["start", "modulation"]),
        "step": (
            [*step, *CONSTANTS, *(f"past_{name}" for name in cache)],
            ["tokens", "f_hat_out", "next_x", *(f"new_{name}" for name in cache)],
        ),
        "decoder": (["f_hat"], ["image"]),
    }
    if "encoder" in manifest.graphs:
        wanted["encoder"] = (["image"], ["tokens"])
    if manifest.model.control_type is not None:
        wanted["control"] = ([f"control_{k}" for k in range(len(manifest.scales))], ["features"])
        wanted["step"][0].append("control")
    _require_ports(manifest, wanted)
    _require_sized(manifest, cache)


def _check_graphs_of_2(manifest: Manifest) -> None:
    """The graphs of a base and its branches, with the ports that the loop binds."""
    model = manifest.model
    _require(
        model.cache_layers == model.depth, f"model.cache_layers is {model.cache_layers}, not depth {model.depth}"
    )
    cache = [f"{kind}_{i}" for i in range(model.cache_layers) for kind in ("k", "v")]
    step = ["x", "modulation", "rows", "twin", "f_hat", "uniforms", "cfg", "top_k", "top_p", "bias"]
    step += ["known", "known_mask", *CONSTANTS, *(f"past_{name}" for name in cache)]
    for branch in list(model.branches.values())[:1]:
        step += ["c", "mix", "keep", "plain", "control_cfg"]
        step += [f"fusion_{name}_{i}" for i in range(branch.blocks) for name in FUSIONS[branch.fusion]]
    wanted = {
        "condition": (["label"], ["start", "modulation"]),
        "step": (step, ["tokens", "f_hat_out", "next_x", "logits", *(f"new_{name}" for name in cache)]),
        "decoder": (["f_hat"], ["image"]),
    }
    if "encoder" in manifest.graphs:
        wanted["encoder"] = (["image"], ["tokens"])
    for name, branch in model.branches.items():
        own = [f"{kind}_{i}" for i in range(branch.cache_layers) for kind in ("k", "v")]
        inputs = ["x", "control", "rows", "pos", *(f"past_{port}" for port in own)]
        wanted[f"control.{name}"] = ([f"control_{k}" for k in range(len(manifest.scales))], ["features"])
        if own:
            wanted[f"condition.{name}"] = (["label"], ["modulation"])
            inputs.append("modulation")
        wanted[f"branch.{name}"] = (inputs, ["c", *(f"new_{port}" for port in own)])
    _require_ports(manifest, wanted)
    _require_sized(manifest, cache)
    for name, branch in model.branches.items():
        _check_branch_sizes(manifest, name, branch)


def _check_branch_sizes(manifest: Manifest, name: str, branch: Branch) -> None:
    """What the loop makes buffers by: K/V, modulation, and the parameters that the step takes in."""
    graphs = manifest.graphs
    sized = [(f"branch.{name}", f"new_{kind}_{i}", (2, 3)) for i in range(branch.cache_layers) for kind in ("k", "v")]
    sized += [(f"condition.{name}", "modulation", (1, 2))] if branch.cache_layers else []
    for graph, output, dims in sized:
        _require_numbers(f"{graph}.outputs.{output}", graphs[graph].output(output), dims)
    for i in range(branch.blocks):
        for kind in FUSIONS[branch.fusion]:
            key = f"branches.{name}.fusions.{i}.{kind.replace('_', '.', 1)}"
            port, one = graphs["step"].input(f"fusion_{kind}_{i}"), manifest.parameters.get(key)
            _require(one is not None, f"parameters.{key[:NAME]} is missing")
            assert one is not None
            halved = port.dtype == "float32" and one.dtype == "float16"
            good = (one.dtype == port.dtype or halved) and one.shape == port.shape[1:]
            _require(good, f"parameters.{key[:NAME]} is {one.dtype} {list(one.shape)}, unlike the step's {port.name}")


def _require_numbers(at: str, port: Port, dims: tuple[int, ...]) -> None:
    good = len(port.shape) == dims[-1] + 1 and all(isinstance(port.shape[i], int) for i in dims)
    _require(good, f"graphs.{at} has the shape {list(port.shape)}, but dimensions {dims} must be numbers")


def _check_static_names(manifest: Manifest) -> None:
    """Whatever is called as a part of a step or of a branch is a graph of one scale and batch size."""
    for name in manifest.graphs:
        if name.startswith("step.") or (name.startswith("branch.") and name.count(".") > 1):
            static = _STATIC_GRAPH.fullmatch(name)
            known = static is not None and static["graph"] in manifest.graphs
            good = known and static is not None and int(static["scale"]) < len(manifest.scales)
            _require(good, f"graphs has the name {name[:NAME]!r}; a static graph of this plan is e.g. 'step.00.b1'")


def _require_ports(manifest: Manifest, wanted: dict[str, tuple[list[str], list[str]]]) -> None:
    """Graph → names of inputs and outputs: all of them are there."""
    for graph_name, (inputs, outputs) in wanted.items():
        _require(graph_name in manifest.graphs, f"graphs.{graph_name} is missing")
        graph = manifest.graphs[graph_name]
        for side, names, ports in (("inputs", inputs, graph.inputs), ("outputs", outputs, graph.outputs)):
            missing = set(names) - {port.name for port in ports}
            _require(not missing, f"graphs.{graph_name}.{side} lacks {', '.join(sorted(missing))}")


def _require_sized(manifest: Manifest, cache: list[str]) -> None:
    # The buffers of the cache and of the modulation are made by these sizes.
    sized = [(f"step.outputs.new_{name}", manifest.graphs["step"].output(f"new_{name}"), (2, 3)) for name in cache]
    sized.append(("condition.outputs.modulation", manifest.graphs["condition"].output("modulation"), (1, 2)))
    for at, port, dims in sized:
        _require_numbers(at, port, dims)


def _check_ports(manifest: Manifest) -> None:
    for k, scale in enumerate(manifest.scales):
        missing = set(CONSTANTS) - set(scale.constants)
        _require(not missing, f"scales[{k}].constants lacks {', '.join(sorted(missing))}")
    for name, graph in manifest.graphs.items():
        for ports in (graph.inputs, graph.outputs):
            _require(len({port.name for port in ports}) == len(ports), f"graphs[{name!r}] has a port twice")
