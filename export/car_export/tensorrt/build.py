"""The engines of a plan: which there are, what they are made from, how they are replaced.

docs/reference/plan-format.md has the format.

An engine's key is a hash of all that it is made from: the graph in its form, the weights that the graph refers to,
the compiler and its version, the target, the profiles, the settings. An engine in the plan that has the wanted key is
left as it is. Compilers give other bytes each time, so the engine's own bytes say nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from car_export.errors import EngineError, NoGpuError, TargetError
from car_export.files import write_file
from car_export.tensorrt import rewrites
from car_export.tensorrt.compiler import MODULES, SETTINGS, Built, Compiler, Port, Profile, gpu_here
from car_runtime.backends.tensorrt import trust
from car_runtime.backends.tensorrt.engine_metadata import engines_of
from car_runtime.errors import PlanError
from car_runtime.format import manifest as schema
from car_train.files import new_folder, sha256

Log = Callable[[str], None]
FORMAT = 1
FOLDER = "engines"
_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to compile with, and for which machine."""

    flavour: str
    name: str
    """Compute capability, e.g. "sm89"."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that an engine is made from, but the compiler."""

    graph: str
    onnx: bytes
    """The graph in its form; its weights are references into `weights.bin`."""
    profiles: tuple[Profile, ...]
    weights: str
    """SHA-256 of the bytes that those references point to."""

    def key(self, flavour: str, version: str, target: str) -> str:
        """The engine's key, SHA-256 in hex."""
        facts = {
            "format": FORMAT,
            "flavour": flavour,
            "version": version,
            "target": target,
            "profiles": [[p.name, dict(sorted(p.sizes.items()))] for p in self.profiles],
            "builder": SETTINGS,
            "onnx": hashlib.sha256(self.onnx).hexdigest(),
            "weights": self.weights,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def choose_targets(flavour: str, capabilities: Sequence[int] | None) -> list[Target]:
    """The targets of a command line's `--target` and `--sm`. Raises TargetError or NoGpuError.

    `rtx` without a capability, and `trt` always, mean the GPU in this machine.
    """
    if flavour not in MODULES:
        raise TargetError(f"there is no target {flavour!r}; choose one of {', '.join(MODULES)}")
    if flavour == "rtx" and capabilities:
        return [Target(flavour=flavour, name=f"sm{number}") for number in dict.fromkeys(capabilities)]
    here = gpu_here()
    if here is None:
        raise NoGpuError(
            "--target trt compiles on the GPU that will run the engines, and this machine has none, or no driver; "
            "use --target rtx --sm 89, which needs no GPU"
            if flavour == "trt"
            else "--target rtx without --sm compiles for the GPU in this machine, and there is none; "
            "name one, e.g. --sm 89 for an RTX 4090"
        )
    if capabilities and [f"sm{number}" for number in capabilities] != [here]:
        raise TargetError(
            f"--target trt compiles for the GPU in this machine, {here}, not for --sm "
            f"{','.join(map(str, capabilities))}; leave out --sm"
        )
    return [Target(flavour=flavour, name=here)]


# -- recipes -----------------------------------------------------------------------------------------------------


def recipes(plan: Path, manifest: schema.Manifest, target: str = "sm89") -> list[Recipe]:
    """What each engine of a plan is made from, the longest to build last."""
    found = []
    for graph, profiles in _profiles(manifest).items():
        model = rewrites.load_graph(plan / manifest.graphs[graph].file)
        if graph == "step":
            rewrites.engine_step(model, manifest.model.vocab)
        elif graph.startswith("branch."):
            rewrites.engine_branch(model)
        else:
            rewrites.engine_form(model)
        if target == "sm75" and manifest.precision.compute != "fp32":
            rewrites.sum_float_products(model)
        data = rewrites.to_bytes(model)
        found.append(Recipe(graph=graph, onnx=data, profiles=profiles, weights=_hash_weights(plan, data)))
    return found


def batches(manifest: schema.Manifest) -> list[int]:
    """Batch sizes that a plan has static steps for, ascending."""
    names = (re.fullmatch(r"step\.\d+\.b(\d+)", name) for name in manifest.graphs)
    return sorted({int(match.group(1)) for match in names if match})


def _profiles(manifest: schema.Manifest) -> dict[str, tuple[Profile, ...]]:
    """Graph → profiles, by the manifest's scales and batch sizes."""
    sizes = batches(manifest)
    if not sizes:
        raise EngineError(
            "the plan has no static steps, so no batch sizes to build for; export it again with --batch"
        )
    found: dict[str, tuple[Profile, ...]] = {}
    branches = list(manifest.model.branches)
    mixed = {"m": 1} if branches else {}
    for graph in ["control", *(f"control.{name}" for name in branches)]:
        if graph in manifest.graphs:
            found[graph] = (Profile(name=graph, sizes={}),)
    for graph in ["condition", *(f"condition.{name}" for name in branches)]:
        if graph in manifest.graphs:
            found[graph] = tuple(Profile(name=f"{graph}.b{b}", sizes={"R": 2 * b}) for b in sizes)
    found["decoder"] = tuple(Profile(name=f"decoder.b{b}", sizes={"B": b}) for b in sizes)
    if "encoder" in manifest.graphs:
        found["encoder"] = (Profile(name="encoder.b1", sizes={"B": 1}),)
    for graph in [*(f"branch.{name}" for name in branches), "step"]:
        found[graph] = tuple(
            Profile(name=f"{graph}.{k:02d}.b{b}", sizes=step_sizes(scale, b) | mixed)
            for b in sizes
            for k, scale in enumerate(manifest.scales)
        )
    return found


def step_sizes(scale: schema.Scale, batch: int) -> dict[str, int]:
    """Sizes of the step's dimensions at one scale; the first has one dummy token as its past."""
    past = max(scale.start, 1)
    return {
        "R": 2 * batch,
        "B": batch,
        "S": scale.side,
        "T": scale.next_side,
        "P": past,
        "N": past + scale.tokens,
    }


def _hash_weights(plan: Path, data: bytes) -> str:
    """SHA-256 of the external data of a graph, each piece once, in file order."""
    pieces = set()
    for tensor in onnx.load_model_from_string(data).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in tensor.external_data}
            pieces.add((entry["location"], int(entry.get("offset", 0)), int(entry["length"])))
    digest = hashlib.sha256()
    files: dict[str, np.memmap[Any, Any]] = {}
    for location, offset, length in sorted(pieces):
        if location not in files:
            files[location] = np.memmap(plan / location, np.uint8, "r")
        for start in range(offset, offset + length, _CHUNK):
            digest.update(files[location][start : min(start + _CHUNK, offset + length)].data)
    return digest.hexdigest()


# -- building ----------------------------------------------------------------------------------------------------


def build_engines(plan: Path, targets: Sequence[Target], log: Log = lambda _: None) -> list[Path]:
    """Build what is missing of a plan's engines, in place, and return their files, all targets'.

    The manifest is rewritten after each engine, so that an interrupted build leaves a whole plan, and the next one
    goes on from there. An engine of the same graph, flavour and target with another key is removed. Raises an
    EngineError, or car_runtime's PlanError.
    """
    manifest = schema.read_manifest(plan)
    graphs = [graph.file for graph in manifest.graphs.values()]
    schema.verify_files(plan, manifest, hashes=False, names=[schema.WEIGHTS, *graphs])  # their structure
    if manifest.precision.weights == "int8":
        raise TargetError(
            f"{plan} is an int8 plan, which is for CPUs; compile the engines of one exported with --precision fp16"
        )
    compilers = {flavour: Compiler(flavour) for flavour in {t.flavour for t in targets}}
    for target in targets:
        compilers[target.flavour].check_target(target.name)
    files = []
    for target in targets:
        compiler = compilers[target.flavour]
        for recipe in recipes(plan, manifest, target.name):
            key = recipe.key(target.flavour, compiler.version, target.name)
            found = _existing(plan, manifest, key)
            if found is not None and trust.is_built_here(sha256(plan / found.file)):
                log(f"{found.file}: up to date")
                files.append(plan / found.file)
                continue
            name = f"{FOLDER}/{recipe.graph}.{target.flavour}.{target.name}.{key[:16]}"
            sibling = plan / manifest.graphs[recipe.graph].file
            built = compiler.build(recipe.onnx, sibling, recipe.profiles, target.name, plan / f"{name}.engine")
            trust.remember(sha256(plan / f"{name}.engine"))
            engine = schema.Engine(
                file=f"{name}.engine",
                flavour=target.flavour,
                target=target.name,
                key=key,
                details={
                    "graph": recipe.graph,
                    "sidecar": f"{name}.json",
                    "precision": manifest.precision.compute,
                },
            )
            metadata = _engine_metadata(engine, compiler.version, recipe, built)
            write_file(plan / f"{name}.json", (json.dumps(metadata, indent=1) + "\n").encode())
            manifest = _enter(plan, manifest, engine)
            files.append(plan / engine.file)
            log(_summary(engine, built))
    return files


def _engine_metadata(engine: schema.Engine, version: str, recipe: Recipe, built: Built) -> dict[str, Any]:
    """What a runtime must know of an engine that it can't ask without loading it, as JSON."""

    def ports(side: Sequence[Port]) -> list[dict[str, Any]]:
        return [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in side]

    return {
        "format": FORMAT,
        "graph": recipe.graph,
        "flavour": engine.flavour,
        "version": version,
        "target": engine.target,
        "precision": engine.details["precision"],
        "key": engine.key,
        "file": engine.file,
        "bytes": built.bytes,
        "inputs": ports(built.inputs),
        "outputs": ports(built.outputs),
        "profiles": [
            {
                "name": profile.name,
                "inputs": {p.name: list(profile.shape(p.shape)) for p in built.inputs},
                "outputs": {p.name: list(profile.shape(p.shape)) for p in built.outputs},
                "activation_bytes": activation,
            }
            for profile, activation in zip(recipe.profiles, built.activation_bytes, strict=True)
        ],
        "weight_bytes": built.weight_bytes,
        "build_seconds": round(built.seconds, 3),
        "builder": SETTINGS,
    }


def _summary(engine: schema.Engine, built: Built) -> str:
    known = [a for a in built.activation_bytes if a is not None]
    activation = (
        " … ".join(f"{a / 1e6:.1f}" for a in sorted({min(known), max(known)})) + " MB" if known else "unknown"
    )
    weights = f"{built.weight_bytes / 1e6:.1f} MB" if built.weight_bytes is not None else "unknown"
    return (
        f"{engine.file}: {built.bytes / 1e6:.1f} MB in {built.seconds:.1f} s; weights {weights}; "
        f"activations {activation} in {len(built.activation_bytes)} profile(s)"
    )


# -- the plan's list of engines ----------------------------------------------------------------------------------


def _files_of(engine: schema.Engine) -> list[str]:
    return [name for name in (engine.file, engine.details.get("sidecar")) if isinstance(name, str)]


def _existing(plan: Path, manifest: schema.Manifest, key: str) -> schema.Engine | None:
    """The plan's engine of this key, if its files are whole."""
    for engine in manifest.engines:
        if engine.key == key and _whole(plan, manifest, _files_of(engine)):
            return engine
    return None


def _whole(plan: Path, manifest: schema.Manifest, names: Sequence[str]) -> bool:
    try:
        return schema.describe_files(plan, names, manifest.chunk_bytes) == {n: manifest.files[n] for n in names}
    except (OSError, KeyError):
        return False


def _enter(plan: Path, manifest: schema.Manifest, engine: schema.Engine) -> schema.Manifest:
    """Rewrite the manifest with a new engine, then remove those of the same graph and target that it replaces."""

    def place(entry: schema.Engine) -> tuple[object, ...]:
        return entry.flavour, entry.target, entry.details.get("graph")

    stale = [entry for entry in manifest.engines if place(entry) == place(engine)]
    kept = [entry for entry in manifest.engines if entry not in stale]
    wanted = _files_of(engine)
    gone = {name for entry in stale for name in _files_of(entry)} - set(wanted)
    files = {name: entry for name, entry in manifest.files.items() if name not in gone}
    files |= schema.describe_files(plan, wanted, manifest.chunk_bytes)
    manifest = dataclasses.replace(manifest, files=files, engines=(*kept, engine))
    schema.write_manifest(plan, manifest)
    for name in gone:
        with contextlib.suppress(OSError):
            (plan / name).unlink()
    return manifest


# -- engines outlive an export -----------------------------------------------------------------------------------


@contextlib.contextmanager
def keeping_engines(plan: Path, log: Log = lambda _: None) -> Iterator[None]:
    """Around the export of a plan: engines of the plan that it replaces are carried over if they are still right.

    They are held aside as links, so that nothing is lost when the export fails.
    """
    aside = _set_aside(plan)
    try:
        yield
        if aside is not None:
            _carry_over(plan, aside, log)
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _set_aside(plan: Path) -> Path | None:
    """Links to a plan's engines and its manifest, in a folder next to it; None if there are none."""
    try:
        manifest = schema.read_manifest(plan)
    except PlanError:
        return None
    names = [name for engine in manifest.engines for name in _files_of(engine)]
    if not names or not _whole(plan, manifest, names):
        return None
    aside = new_folder(plan)
    (aside / FOLDER).mkdir()
    for name in [schema.MANIFEST, *names]:
        _link(plan / name, aside / name)
    return aside


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _carry_over(plan: Path, before: Path, log: Log) -> None:
    manifest, former = schema.read_manifest(plan), schema.read_manifest(before)
    made = {t: {r.graph: r for r in recipes(plan, manifest, t)} for t in {e.target for e in former.engines}}
    for engine in former.engines:
        version = _version(before, former, engine)
        recipe = made[engine.target].get(str(engine.details.get("graph")))
        if version is None or recipe is None or recipe.key(engine.flavour, version, engine.target) != engine.key:
            log(f"{engine.file}: of other weights or another form; left out")
            continue
        (plan / FOLDER).mkdir(exist_ok=True)
        for name in _files_of(engine):
            os.replace(before / name, plan / name)
        manifest = _enter(plan, manifest, engine)
        log(f"{engine.file}: carried over")


def _version(folder: Path, manifest: schema.Manifest, engine: schema.Engine) -> str | None:
    """The version of the compiler that built an engine, by its metadata; None where that can't be read."""
    try:
        (metadata,) = engines_of(folder, dataclasses.replace(manifest, engines=(engine,)), engine.flavour)
    except PlanError:
        return None
    return metadata.version
