"""The compiled engines of a plan: which there are, and what each one's sidecar says.

A sidecar is the JSON file beside an engine, written from the network definition when it was built: an engine itself
can be asked nothing without the GPU that it is for. docs/plan-format.md describes both. Only the standard library is
imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from car_runtime.errors import BackendError, PlanError
from car_runtime.format.manifest import Engine, Manifest

FORMAT = 1
FLAVOURS = {"rtx": "TensorRT for RTX", "trt": "TensorRT"}
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "bool", "uint8")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One set of static shapes that an engine runs."""

    name: str
    """As the static graphs are named: `step.00.b1`, `decoder.b1`, `control`."""
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    activation_bytes: int | None
    """Memory for intermediate results, or None where the builder did not say."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What one engine is: the sidecar, and where the engine lies."""

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


def engines_of(root: Path, manifest: Manifest, flavour: str) -> list[Sidecar]:
    """All engines of a flavour in a plan. Raises PlanError where a sidecar breaks a rule."""
    return [_read(root, engine) for engine in manifest.engines if engine.flavour == flavour]


def engines_for(root: Path, manifest: Manifest, flavour: str, target: str, version: str) -> dict[str, Sidecar]:
    """The engines that this GPU (`target`, such as "sm89") and this TensorRT (`version`) can run: graph → sidecar.

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
    wanted = ["step", "condition", "decoder", *(["control"] if manifest.model.control_type is not None else [])]
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
    return f"python export/build_engines.py {root} --target {flavour}{capability}"


def _read(root: Path, engine: Engine) -> Sidecar:
    name = engine.details.get("sidecar")
    if not isinstance(name, str):
        raise PlanError(f"the engine {engine.file} has no sidecar in the manifest; build the engines again")
    if name not in engine_files(engine):
        raise PlanError(f"the sidecar {name!r} does not lie beside {engine.file}; build the engines again")
    where = name
    try:
        whole = json.loads((root / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"cannot read the sidecar {name} ({error}); build the engines again") from error
    value = _typed(whole, dict, where)
    version = _take(value, "format", int, where)
    if version != FORMAT:
        raise PlanError(f"{name}: format is {version}, but this car_runtime reads {FORMAT}; build the engines again")
    sidecar = Sidecar(
        engine=root / engine.file,
        graph=_take(value, "graph", str, where),
        flavour=_take(value, "flavour", str, where),
        version=_take(value, "version", str, where),
        target=_take(value, "target", str, where),
        precision=_take(value, "precision", str, where),
        key=_take(value, "key", str, where),
        inputs=_ports(value, "inputs", where),
        outputs=_ports(value, "outputs", where),
        profiles=tuple(_profile(p, where) for p in _take(value, "profiles", list, where)),
        weight_bytes=_number_or_null(value, "weight_bytes", where),
    )
    for field, found, listed in (
        ("flavour", sidecar.flavour, engine.flavour),
        ("target", sidecar.target, engine.target),
        ("key", sidecar.key, engine.key),
    ):
        if found != listed:
            raise PlanError(f"{name}: {field} is {found!r}, but the manifest has {listed!r}; build the engines again")
    _check_profiles(sidecar, where)
    return sidecar


def engine_files(engine: Engine) -> tuple[str, str]:
    """The names of an engine and of its sidecar: the same stem, two endings."""
    return engine.file, engine.file.removesuffix(".engine") + ".json"


def _check_profiles(sidecar: Sidecar, where: str) -> None:
    if not sidecar.profiles:
        raise PlanError(f"{where}: there are no profiles; build the engines again")
    for profile in sidecar.profiles:
        for side, shapes, ports in (
            ("inputs", profile.inputs, sidecar.inputs),
            ("outputs", profile.outputs, sidecar.outputs),
        ):
            different = set(shapes) ^ set(ports)
            if different:
                raise PlanError(
                    f"{where}: profile {profile.name} and the engine disagree about the {side} "
                    f"{', '.join(sorted(different))}; build the engines again"
                )


def _ports(value: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    ports = {}
    for item in _take(value, key, list, where):
        port = _typed(item, dict, f"{where}: {key}")
        name, dtype = _take(port, "name", str, where), _take(port, "dtype", str, where)
        if dtype not in DTYPES:
            raise PlanError(
                f"{where}: {name} has dtype {dtype!r}, not one of {', '.join(DTYPES)}; upgrade car_runtime"
            )
        ports[name] = dtype
    return ports


def _profile(item: Any, where: str) -> Profile:
    value = _typed(item, dict, f"{where}: profiles")
    return Profile(
        name=_take(value, "name", str, where),
        inputs=_shapes(value, "inputs", where),
        outputs=_shapes(value, "outputs", where),
        activation_bytes=_number_or_null(value, "activation_bytes", where),
    )


def _shapes(value: Mapping[str, Any], key: str, where: str) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(_size(dim, f"{where}: {name}") for dim in _typed(shape, list, f"{where}: {name}"))
        for name, shape in _take(value, key, dict, where).items()
    }


def _size(value: Any, where: str) -> int:
    size = _typed(value, int, where)
    if size < 0:
        raise PlanError(f"{where} has the dimension {size}, but it must be a size; build the engines again")
    return size


def _number_or_null(value: Mapping[str, Any], key: str, where: str) -> int | None:
    return None if value.get(key) is None else _size(value[key], f"{where}: {key}")


def _take(value: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    if key not in value:
        raise PlanError(f"{where}: {key} is missing; build the engines again")
    return _typed(value[key], kind, f"{where}: {key}")


def _typed(value: Any, kind: type[T], where: str) -> T:
    if type(value) is not kind:
        raise PlanError(
            f"{where} is {str(value)[:40]!r}, but must be of type {kind.__name__}; build the engines again"
        )
    return value
