"""The compiled engines of a plan: which there are, and the metadata that each one's sidecar records.

A sidecar is the JSON file next to an engine, written from the network definition when it was built: an engine itself
can be asked nothing without the GPU that it is for. docs/reference/plan-format.md describes both. Only the standard
library is imported here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from car_runtime.errors import BackendError, PlanError
from car_runtime.format.manifest import Engine, Manifest
from car_runtime.format.typed_json import parse_json

FORMAT = 1
STATIC = re.compile(r".+\.\d+\.b\d+")
"""Names of static forms, NAME.KK.bB."""
FLAVOURS = {"rtx": "TensorRT for RTX", "trt": "TensorRT"}
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "bool", "uint8")

REMEDY = "build the engines again"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One set of static shapes that an engine runs."""

    name: str
    """Name of the graph, as the static ones are named: `step.00.b1`, `decoder.b1`, `control`."""
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    activation_bytes: int | None = None
    """Memory for intermediate results, or None where the builder did not say."""


@dataclass(frozen=True, kw_only=True)
class EngineMetadata:
    """What one engine is, by its sidecar, and where the engine lies."""

    engine: Path
    graph: str
    flavour: str
    version: str
    """TensorRT's version that built it, and that it needs."""
    target: str
    precision: str
    key: str
    """Hash of what it was built from."""
    inputs: dict[str, str]
    """Name → dtype, in the engine's order."""
    outputs: dict[str, str]
    profiles: tuple[Profile, ...]
    """In the order of the engine's profile indices."""
    weight_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class _Port:
    name: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class _Sidecar:
    """What the JSON file next to an engine holds."""

    format: int
    graph: str
    flavour: str
    version: str
    target: str
    precision: str
    key: str
    inputs: tuple[_Port, ...]
    outputs: tuple[_Port, ...]
    profiles: tuple[Profile, ...]
    weight_bytes: int | None = None


def engines_of(root: Path, manifest: Manifest, flavour: str) -> list[EngineMetadata]:
    """All engines of a flavour in a plan. Raises PlanError where a sidecar breaks a rule."""
    return [_read(root, engine) for engine in manifest.engines if engine.flavour == flavour]


def engines_for(root: Path, manifest: Manifest, flavour: str, target: str, version: str) -> dict[str, EngineMetadata]:
    """The engines that this GPU (`target`, such as "sm89") and this TensorRT (`version`) can run: graph → metadata.

    Raises BackendError, naming the command that builds what is missing, and PlanError.
    """
    every = engines_of(root, manifest, flavour)
    command = build_command(root, flavour, target)
    title = FLAVOURS[flavour]
    here = [engine for engine in every if engine.target == target]
    if not here:
        others = ", ".join(sorted({engine.target for engine in every}))
        have = f"only for {others}" if others else "none at all"
        raise BackendError(
            f"the plan {manifest.name!r} has no {title} engines for this GPU ({target}), {have}; "
            f"build them: {command}"
        )
    fitting = {engine.graph: engine for engine in here if engine.version == version}
    # Without the encoder a plan draws; static forms are profiles of the engine of their graph.
    wanted = [name for name in manifest.graphs if name != "encoder" and not STATIC.fullmatch(name)]
    missing = [graph for graph in wanted if graph not in fitting]
    if missing:
        versions = sorted({engine.version for engine in here if engine.graph in missing} - {version})
        if versions:
            raise BackendError(
                f"the plan's {title} engines were built with version {', '.join(versions)} and run on no other, "
                f"but {version} is installed; install that version, or build them again: {command}"
            )
        raise BackendError(
            f"the plan {manifest.name!r} lacks the {title} engine of {', '.join(missing)} for {target}; "
            f"build it: {command}"
        )
    return fitting


def build_command(root: Path, flavour: str, target: str) -> str:
    """The command line that builds the engines of a plan for a flavour and a target."""
    capability = f" --sm {target.removeprefix('sm')}" if flavour == "rtx" else ""
    plan = os.path.realpath(root)  # a directory that is held open has a path of this process alone
    return f"python export/build_engines.py {plan} --target {flavour}{capability}"


def _read(root: Path, engine: Engine) -> EngineMetadata:
    name = engine.details.get("sidecar")
    if not isinstance(name, str):
        raise PlanError(f"the engine {engine.file} has no sidecar in the manifest; {REMEDY}")
    if name not in engine_files(engine):
        raise PlanError(f"the sidecar {name!r} does not lie next to {engine.file}; {REMEDY}")
    try:
        whole = parse_json((root / name).read_bytes(), name, REMEDY)
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the sidecar {name} ({error}); {REMEDY}") from error
    version = whole.field("format").read(int)
    if version != FORMAT:
        raise PlanError(f"{name}: format is {version}, but this car_runtime reads {FORMAT}; {REMEDY}")
    sidecar = whole.read(_Sidecar)
    for field in ("flavour", "target", "key"):
        found, listed = getattr(sidecar, field), getattr(engine, field)
        if found != listed:
            raise PlanError(f"{name}: {field} is {found!r}, but the manifest has {listed!r}; {REMEDY}")
    _check_sizes(sidecar, name)
    _check_profiles(sidecar, name)
    return EngineMetadata(
        engine=root / engine.file,
        graph=sidecar.graph,
        flavour=sidecar.flavour,
        version=sidecar.version,
        target=sidecar.target,
        precision=sidecar.precision,
        key=sidecar.key,
        inputs=_dtypes(sidecar.inputs, name),
        outputs=_dtypes(sidecar.outputs, name),
        profiles=sidecar.profiles,
        weight_bytes=sidecar.weight_bytes,
    )


def engine_files(engine: Engine) -> tuple[str, str]:
    """The names of an engine and of its sidecar: the same stem, two endings."""
    return engine.file, engine.file.removesuffix(".engine") + ".json"


def _dtypes(ports: tuple[_Port, ...], file: str) -> dict[str, str]:
    for port in ports:
        if port.dtype not in DTYPES:
            raise PlanError(
                f"{file}: {port.name} has dtype {port.dtype!r}, not one of {', '.join(DTYPES)}; upgrade car_runtime"
            )
    return {port.name: port.dtype for port in ports}


def _check_profiles(sidecar: _Sidecar, file: str) -> None:
    if not sidecar.profiles:
        raise PlanError(f"{file}: there are no profiles; {REMEDY}")
    for profile in sidecar.profiles:
        for side, shapes, ports in (
            ("inputs", profile.inputs, sidecar.inputs),
            ("outputs", profile.outputs, sidecar.outputs),
        ):
            different = set(shapes) ^ {port.name for port in ports}
            if different:
                raise PlanError(
                    f"{file}: profile {profile.name} and the engine disagree about the {side} "
                    f"{', '.join(sorted(different))}; {REMEDY}"
                )


def _check_sizes(sidecar: _Sidecar, file: str) -> None:
    shapes = [
        item for profile in sidecar.profiles for side in (profile.inputs, profile.outputs) for item in side.items()
    ]
    for name, shape in shapes:
        if any(size < 0 for size in shape):
            raise PlanError(f"{file}: {name} has the dimension {min(shape)}, but it must be a size; {REMEDY}")
    counts = [sidecar.weight_bytes, *(profile.activation_bytes for profile in sidecar.profiles)]
    for count in counts:
        if count is not None and count < 0:
            raise PlanError(f"{file}: a size in bytes is {count}, but must be at least 0; {REMEDY}")
