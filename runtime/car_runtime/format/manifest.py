"""The plan's manifest: its schema as frozen dataclasses, reading, writing, and the checks made when a plan is opened.

`docs/plan-format.md` describes the format. Only the standard library is imported here: the exporter writes its
manifests through these classes, so that both sides hold one definition and a manifest that breaks a rule is refused
before it is written.

Reading is strict about what is there (every key, type, range and file name is checked) and ignores keys that it does
not know, so that a later version may add some without a new format number.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from car_runtime.errors import PlanError

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
CHUNK_BYTES = 64 * 1024 * 1024
ITEM_BYTES = {"float32": 4, "float16": 2, "int64": 8, "bool": 1, "uint8": 1}
DTYPES = (*ITEM_BYTES, "bfloat16")
"""Types of ports. numpy has no bfloat16, so named tensors, which a runtime reads itself, have none either."""
PRECISIONS = ("fp32", "fp16", "bf16")
STORED = (*PRECISIONS, "int8")
CONSTANTS = ("pos", "up", "down", "phi", "cfg_ratio")

_AGAIN = "export the plan again"
_READ_BYTES = 1024 * 1024
_FILE_NAME = re.compile(r"(engines/)?[A-Za-z0-9_][A-Za-z0-9_.+-]*", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)

T = TypeVar("T")


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
    """Side of a picture in pixels, E·F."""
    classes: int
    """Number of classes; this index itself means "no class"."""
    class_names: tuple[str, ...] | None
    control_type: str | None
    """The kind of control image ("canny", "depth", …); None in a VAR plan."""
    cache_layers: int
    """Number of K/V pairs: base blocks first, then the control branch's."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int):
                _require(value >= 1, f"model.{name} is {value}, but must be at least 1")
        product = self.latent_size * self.patch
        _require(
            self.image_size == product,
            f"model.image_size is {self.image_size}, but latent_size × patch is {product}",
        )
        if self.class_names is not None:
            count = len(self.class_names)
            _require(count == self.classes, f"model.class_names has {count} names for {self.classes} classes")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What the transformer computes in, and what its weights are stored in."""

    compute: str
    weights: str

    def __post_init__(self) -> None:
        for name, value, known in (("compute", self.compute, PRECISIONS), ("weights", self.weights, STORED)):
            _require(value in known, f"precision.{name} is {value!r}, not one of {', '.join(known)}")


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
class Port:
    """An input or output of a graph; a dimension is a number or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, f"{self.name} has dtype {self.dtype!r}, not one of {', '.join(DTYPES)}")
        for dim in self.shape:
            good = dim >= 0 if isinstance(dim, int) else bool(dim.strip())
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
    details: dict[str, Any] = field(default_factory=dict)
    """Whatever else its flavour records; in JSON these keys stand beside the others."""


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
    format: int = FORMAT

    @property
    def tokens(self) -> int:
        """L, the tokens of one picture over all scales."""
        return self.scales[-1].stop

    def __post_init__(self) -> None:
        _require(self.format == FORMAT, f"format is {self.format}, but this version writes {FORMAT}")
        _require(bool(self.name.strip()), f"name is {self.name!r}, but must not be empty")
        _require(self.chunk_bytes >= 1, f"chunk_bytes is {self.chunk_bytes}, but must be at least 1")
        _check_scales(self.scales, self.model)
        _check_files(self)
        _check_tensors(self)
        _check_graphs(self)

    def to_json(self) -> str:
        """The manifest as the text of manifest.json."""
        whole = asdict(self)
        for engine in whole["engines"]:
            engine.update(engine.pop("details"))
        order = ("format", "name", "model", "precision", "sampling", "scales", "tensors", "graphs", "files")
        ordered = {key: whole.pop(key) for key in order} | whole
        return json.dumps(ordered, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _require(good: bool, problem: str) -> None:
    if not good:
        raise PlanError(f"{MANIFEST}: {problem}; {_AGAIN}")


def _check_scales(scales: tuple[Scale, ...], model: Model) -> None:
    _require(bool(scales), "scales is empty")
    following = [*(scale.side for scale in scales[1:]), 1]
    start = 0
    for k, (scale, next_side) in enumerate(zip(scales, following, strict=True)):
        at = f"scales[{k}]"
        _require(scale.side >= 1, f"{at}.side is {scale.side}, but must be at least 1")
        _require(scale.tokens == scale.side**2, f"{at}.tokens is {scale.tokens}, but side² is {scale.side**2}")
        _require(scale.start == start, f"{at}.start is {scale.start}, but the scales before it end at {start}")
        stop = start + scale.tokens
        _require(scale.stop == stop, f"{at}.stop is {scale.stop}, but start + tokens is {stop}")
        _require(scale.next_side == next_side, f"{at}.next_side is {scale.next_side}, but must be {next_side}")
        _require(0 <= scale.cfg_ratio <= 1, f"{at}.cfg_ratio is {scale.cfg_ratio}, but must be in 0…1")
        _require(scale.control_size >= 1, f"{at}.control_size is {scale.control_size}, but must be at least 1")
        start = stop
    side = scales[-1].side
    _require(side == model.latent_size, f"the last scale's side is {side}, but latent_size is {model.latent_size}")


def _check_files(manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        good = _FILE_NAME.fullmatch(name) is not None and name != MANIFEST
        _require(good, f"files names {name!r}, which is not a plain name inside the plan or engines/")
        _require(entry.bytes >= 0, f"files[{name!r}].bytes is {entry.bytes}, but must be at least 0")
        chunks = -(-entry.bytes // manifest.chunk_bytes)
        found = len(entry.sha256)
        _require(found == chunks, f"files[{name!r}].sha256 has {found} digests for {chunks} chunks")
        for digest in entry.sha256:
            _require(_DIGEST.fullmatch(digest) is not None, f"files[{name!r}].sha256 has the digest {digest[:70]!r}")
    named = [WEIGHTS, *(g.file for g in manifest.graphs.values()), *(e.file for e in manifest.engines)]
    for name in named:
        _require(name in manifest.files, f"the file {name!r} is used but not listed in files")


def _check_tensors(manifest: Manifest) -> None:
    limit = manifest.files[WEIGHTS].bytes
    for name, tensor in manifest.tensors.items():
        at = f"tensors[{name!r}]"
        _require(tensor.dtype in ITEM_BYTES, f"{at}.dtype is {tensor.dtype!r}, not one of {', '.join(ITEM_BYTES)}")
        _require(all(dim >= 0 for dim in tensor.shape), f"{at}.shape is {list(tensor.shape)}")
        size = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        _require(tensor.bytes == size, f"{at}.bytes is {tensor.bytes}, but its shape and dtype make {size}")
        inside = 0 <= tensor.offset <= limit - tensor.bytes
        _require(inside, f"{at} ends at byte {tensor.offset + tensor.bytes} of {WEIGHTS}, which has {limit}")
    for k, scale in enumerate(manifest.scales):
        for port, name in scale.constants.items():
            _require(name in manifest.tensors, f"scales[{k}].constants.{port} names the unknown tensor {name!r}")


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
    for graph_name, (inputs, outputs) in wanted.items():
        _require(graph_name in manifest.graphs, f"graphs.{graph_name} is missing")
        graph = manifest.graphs[graph_name]
        for side, names, ports in (("inputs", inputs, graph.inputs), ("outputs", outputs, graph.outputs)):
            missing = set(names) - {port.name for port in ports}
            _require(not missing, f"graphs.{graph_name}.{side} lacks {', '.join(sorted(missing))}")
    # The buffers of the cache and of the modulation are made by these sizes.
    sized = [(f"step.outputs.new_{name}", manifest.graphs["step"].output(f"new_{name}"), (2, 3)) for name in cache]
    sized.append(("condition.outputs.modulation", manifest.graphs["condition"].output("modulation"), (1, 2)))
    for at, port, dims in sized:
        good = len(port.shape) == dims[-1] + 1 and all(isinstance(port.shape[i], int) for i in dims)
        _require(good, f"graphs.{at} has the shape {list(port.shape)}, but dimensions {dims} must be numbers")
    for k, scale in enumerate(manifest.scales):
        missing = set(CONSTANTS) - set(scale.constants)
        _require(not missing, f"scales[{k}].constants lacks {', '.join(sorted(missing))}")


# Reading. Each reader takes the JSON value and where it stands, for the error.


def read_manifest(root: str | os.PathLike[str]) -> Manifest:
    """Read and check `root/manifest.json`; no other file is touched.

    Raises PlanError: no such directory, not a plan, not JSON, a newer format, or a broken rule.
    """
    root = Path(root)
    path = root / MANIFEST
    try:
        if path.is_file():
            return parse_manifest(path.read_bytes())
        kind = "directory" if root.is_dir() else "file" if root.exists() else "missing"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise PlanError(f"cannot read {str(path)!r} ({why}); check the path and its permissions") from error
    raise PlanError(
        {
            "directory": f"{str(root)!r} is not a plan: it has no {MANIFEST}; give the directory that holds it",
            "file": f"{str(root)!r} is a file, but a plan is a directory; give the directory, NAME.plan",
            "missing": f"no plan at {str(root)!r}; check the path, or make one with export/build_engines.py",
        }[kind]
    )


def parse_manifest(text: str | bytes) -> Manifest:
    """Read a manifest from its JSON text (UTF-8 when bytes). Raises PlanError."""
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{MANIFEST} is not JSON ({error}); copy the plan again, or {_AGAIN}") from error
    whole = _typed(value, dict, "the whole")
    version = _take(whole, "format", int, "")
    if version > FORMAT:
        raise PlanError(
            f"{MANIFEST}: format is {version}, but this car_runtime reads up to {FORMAT}; upgrade car_runtime"
        )
    return Manifest(
        format=version,
        name=_take(whole, "name", str, ""),
        model=_model(_take(whole, "model", dict, "")),
        precision=_precision(_take(whole, "precision", dict, "")),
        sampling=_sampling(_take(whole, "sampling", dict, "")),
        scales=_list(whole, "scales", _scale, ""),
        tensors=_dict(whole, "tensors", _tensor),
        graphs=_dict(whole, "graphs", _graph),
        files=_dict(whole, "files", _file_entry),
        provenance=_dict(whole, "provenance", lambda value, where: _typed(value, str, where)),
        engines=_list(whole, "engines", _engine, ""),
        chunk_bytes=_take(whole, "chunk_bytes", int, ""),
    )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it has the number {name}")


_KINDS: dict[type, str] = {
    int: "an integer",
    float: "a finite number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _typed(value: Any, kind: type[T], where: str) -> T:
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        shown = repr(value)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        raise PlanError(f"{MANIFEST}: {where} is {shown}, but must be {_KINDS[kind]}; {_AGAIN}")
    return value


def _take(mapping: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    _require(key in mapping, f"{where}{key} is missing")
    return _typed(mapping[key], kind, f"{where}{key}")


def _take_or_null(mapping: Mapping[str, Any], key: str, kind: type[T], where: str) -> T | None:
    _require(key in mapping, f"{where}{key} is missing")
    return None if mapping[key] is None else _typed(mapping[key], kind, f"{where}{key}")


def _list(mapping: Mapping[str, Any], key: str, read: Callable[[Any, str], T], where: str) -> tuple[T, ...]:
    values = _take(mapping, key, list, where)
    return tuple(read(value, f"{where}{key}[{i}]") for i, value in enumerate(values))


def _dict(mapping: Mapping[str, Any], key: str, read: Callable[[Any, str], T]) -> dict[str, T]:
    return {name: read(value, f"{key}[{name!r}]") for name, value in _take(mapping, key, dict, "").items()}


def _integer(value: Any, where: str) -> int:
    return _typed(value, int, where)


def _string(value: Any, where: str) -> str:
    return _typed(value, str, where)


def _model(value: dict[str, Any]) -> Model:
    at = "model."
    names = _take_or_null(value, "class_names", list, at)
    return Model(
        depth=_take(value, "depth", int, at),
        width=_take(value, "width", int, at),
        heads=_take(value, "heads", int, at),
        vocab=_take(value, "vocab", int, at),
        latent_channels=_take(value, "latent_channels", int, at),
        latent_size=_take(value, "latent_size", int, at),
        patch=_take(value, "patch", int, at),
        image_size=_take(value, "image_size", int, at),
        classes=_take(value, "classes", int, at),
        class_names=None if names is None else _list(value, "class_names", _string, at),
        control_type=_take_or_null(value, "control_type", str, at),
        cache_layers=_take(value, "cache_layers", int, at),
    )


def _precision(value: dict[str, Any]) -> Precision:
    at = "precision."
    return Precision(compute=_take(value, "compute", str, at), weights=_take(value, "weights", str, at))


def _sampling(value: dict[str, Any]) -> SamplingDefaults:
    at = "sampling."
    return SamplingDefaults(
        cfg=_take(value, "cfg", float, at),
        top_k=_take(value, "top_k", int, at),
        top_p=_take(value, "top_p", float, at),
    )


def _scale(value: Any, where: str) -> Scale:
    scale, at = _typed(value, dict, where), f"{where}."
    constants = _take(scale, "constants", dict, at)
    return Scale(
        side=_take(scale, "side", int, at),
        tokens=_take(scale, "tokens", int, at),
        start=_take(scale, "start", int, at),
        stop=_take(scale, "stop", int, at),
        next_side=_take(scale, "next_side", int, at),
        cfg_ratio=_take(scale, "cfg_ratio", float, at),
        control_size=_take(scale, "control_size", int, at),
        constants={port: _typed(name, str, f"{at}constants.{port}") for port, name in constants.items()},
    )


def _tensor(value: Any, where: str) -> Tensor:
    tensor, at = _typed(value, dict, where), f"{where}."
    return Tensor(
        dtype=_take(tensor, "dtype", str, at),
        shape=_list(tensor, "shape", _integer, at),
        offset=_take(tensor, "offset", int, at),
        bytes=_take(tensor, "bytes", int, at),
    )


def _dimension(value: Any, where: str) -> int | str:
    return value if isinstance(value, str) else _typed(value, int, where)


def _port(value: Any, where: str) -> Port:
    port, at = _typed(value, dict, where), f"{where}."
    return Port(
        name=_take(port, "name", str, at),
        dtype=_take(port, "dtype", str, at),
        shape=_list(port, "shape", _dimension, at),
    )


def _graph(value: Any, where: str) -> Graph:
    graph, at = _typed(value, dict, where), f"{where}."
    return Graph(
        file=_take(graph, "file", str, at),
        inputs=_list(graph, "inputs", _port, at),
        outputs=_list(graph, "outputs", _port, at),
    )


def _file_entry(value: Any, where: str) -> FileEntry:
    entry, at = _typed(value, dict, where), f"{where}."
    return FileEntry(bytes=_take(entry, "bytes", int, at), sha256=_list(entry, "sha256", _string, at))


def _engine(value: Any, where: str) -> Engine:
    engine, at = _typed(value, dict, where), f"{where}."
    known = {key: _take(engine, key, str, at) for key in ("file", "flavour", "target", "key")}
    return Engine(**known, details={key: item for key, item in engine.items() if key not in known})


# Writing and hashing.


def write_manifest(root: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `root/manifest.json`, aside first, so that no reader ever sees half of it."""
    path = Path(root) / MANIFEST
    aside = path.with_name(f".{MANIFEST}.{os.getpid()}")
    aside.write_text(manifest.to_json(), encoding="utf-8")
    os.replace(aside, path)


def describe_files(
    root: str | os.PathLike[str], names: Iterable[str], chunk_bytes: int = CHUNK_BYTES
) -> dict[str, FileEntry]:
    """The `files` table of a manifest for files that exist under `root`."""
    return {
        name: FileEntry(
            bytes=(Path(root) / name).stat().st_size,
            sha256=tuple(hash_file(Path(root) / name, chunk_bytes)),
        )
        for name in names
    }


def hash_file(path: str | os.PathLike[str], chunk_bytes: int = CHUNK_BYTES) -> list[str]:
    """SHA-256 of each `chunk_bytes` of a file, as hex; none for an empty file. Chunks are hashed on all cores."""
    chunks = -(-os.stat(path).st_size // chunk_bytes)
    with ThreadPoolExecutor(_hash_threads()) as pool:
        return list(pool.map(lambda i: _hash_chunk(path, i, chunk_bytes), range(chunks)))


def verify_files(
    root: str | os.PathLike[str], manifest: Manifest, *, hashes: bool = True, names: Iterable[str] | None = None
) -> None:
    """Check that every file of the plan is there, inside it, of its size and, with `hashes`, of its content.

    `names`: these files alone. hashlib lets go of the interpreter's lock, so the chunks of all files are hashed at
    once: 2.5 GB take about a second on 2 cores with SHA instructions. Raises PlanError, which tells a truncated file
    from an edited one.
    """
    paths = {name: _inside(Path(root), name) for name in (manifest.files if names is None else names)}
    for name, path in paths.items():
        expected, found = manifest.files[name].bytes, path.stat().st_size
        if found != expected:
            what = "is truncated: it" if found < expected else "has grown: it"
            raise PlanError(f"{name} {what} has {found} bytes of {expected}; copy the plan again")
    if not hashes:
        return
    work = [(name, i) for name in paths for i in range(len(manifest.files[name].sha256))]
    with ThreadPoolExecutor(_hash_threads()) as pool:
        digests = pool.map(lambda item: _hash_chunk(paths[item[0]], item[1], manifest.chunk_bytes), work)
        for (name, i), digest in zip(work, digests, strict=True):
            if digest != manifest.files[name].sha256[i]:
                raise PlanError(
                    f"{name} was changed after the export: the SHA-256 of its chunk {i} is {digest[:12]}…, "
                    f"not {manifest.files[name].sha256[i][:12]}…; copy the plan again"
                )


def _inside(root: Path, name: str) -> Path:
    """The real path of a plan's file. A link may point elsewhere in the plan, not out of it."""
    try:
        path = (root / name).resolve(strict=True)
        mode = path.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise PlanError(f"{name} is missing from {str(root)!r}; copy the plan again") from error
    if not path.is_relative_to(root.resolve()):
        raise PlanError(f"{name} is a link that leads out of the plan, to {str(path)!r}; replace it by the file")
    if not stat.S_ISREG(mode):
        raise PlanError(f"{name} in {str(root)!r} is not a file; copy the plan again")
    return path


def _hash_threads() -> int:
    return min(os.cpu_count() or 1, 8)


def _hash_chunk(path: str | os.PathLike[str], index: int, chunk_bytes: int) -> str:
    """One chunk, through a buffer of 1 MiB: resident memory stays small however large the file is."""
    digest, left, buffer = hashlib.sha256(), chunk_bytes, memoryview(bytearray(min(_READ_BYTES, chunk_bytes)))
    with open(path, "rb", buffering=0) as file:
        file.seek(index * chunk_bytes)
        while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()
