"""`car-run doctor`: what this machine can run, what is missing, and how to install it.

Nothing is an error here because it is absent. The standard library is enough for all of it; what is looked for is
imported only to see whether it works.
"""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from car_runtime import __version__
from car_runtime.backends.registry import BACKENDS
from car_runtime.backends.spec import Finding, MachineFacts
from car_runtime.backends.tensorrt.engine_metadata import engines_for
from car_runtime.backends.tensorrt.spec import FLAVOURS, RTX_TARGETS
from car_runtime.errors import CarError
from car_runtime.format.manifest import Engine, Manifest, read_manifest, verify_files
from car_runtime.system.gpu import GpuFacts, gpu_facts
from car_runtime.system.machine import machine


def examine(plan: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The findings as one JSON object: `machine`, `packages`, `gpu`, `backends`, `works` and, if asked for, `plan`.

    Raises nothing: a plan that can't be read is a finding too.
    """
    gpu = gpu_facts()
    here = machine(gpu)
    facts = MachineFacts(packages=here["packages"], gpu=gpu)
    findings = {name: spec.examine(facts) for name, spec in BACKENDS.items()}
    usable = [name for name, finding in findings.items() if finding.usable]
    report = {
        "version": __version__,
        "works": bool(usable),
        "machine": here,
        "packages": here["packages"],
        "gpu": asdict(gpu),
        "backends": [_entry(name, finding) for name, finding in findings.items()],
    }
    if plan is not None:
        report["plan"] = _plan(Path(plan), gpu, usable)
    return report


def _entry(name: str, finding: Finding) -> dict[str, Any]:
    return {"name": name, "usable": finding.usable, "why": finding.why, "install": list(finding.install)}


# -- a plan ----------------------------------------------------------------------------------------------------------


def _plan(root: Path, gpu: GpuFacts, usable: Sequence[str]) -> dict[str, Any]:
    """Which engines of a plan this machine can use, and the commands that build what is missing.

    usable: the backends that can run here.
    """
    report: dict[str, Any] = {"path": str(root), "name": None, "problem": None, "precision": None}
    report |= {"runs_on": [], "engines": [], "build": []}
    try:
        manifest = read_manifest(root)
        verify_files(root, manifest, hashes=False)
    except CarError as error:
        return report | {"problem": str(error)}
    engines = [_engine(engine, gpu, usable) for engine in manifest.engines]
    problems = {flavour: _engines_problem(root, manifest, flavour, gpu) for flavour in FLAVOURS if flavour in usable}
    build = {flavour: problem for flavour, problem in problems.items() if problem is not None}
    # Engines are built without a driver too: who has an RTX card can do that before the rest is installed.
    if "rtx" not in usable and gpu.sm in RTX_TARGETS and not any(e["target"] == gpu.target for e in engines):
        build["rtx"] = f"no engine for {gpu.target}"
    runs_on = [
        name
        for name in BACKENDS
        if name in usable and (name not in build if name in FLAVOURS else BACKENDS[name].runs(manifest))
    ]
    return report | {
        "name": manifest.name,
        "precision": manifest.precision.compute,
        "runs_on": runs_on,
        "engines": engines,
        "build": [
            {"flavour": flavour, "why": why, "command": _build_command(flavour, gpu, root)}
            for flavour, why in build.items()
        ],
    }


def _engine(engine: Engine, gpu: GpuFacts, usable: Sequence[str]) -> dict[str, Any]:
    why = "for this GPU"
    if engine.target != gpu.target:
        why = f"for {engine.target}; this machine has {gpu.target or 'no NVIDIA GPU'}"
    elif engine.flavour not in usable:
        why = f"for this GPU, but the backend {engine.flavour} is not usable"
    return {
        "file": engine.file,
        "graph": engine.details.get("graph"),
        "flavour": engine.flavour,
        "target": engine.target,
        "usable": engine.target == gpu.target and engine.flavour in usable,
        "why": why,
    }


def _engines_problem(root: Path, manifest: Manifest, flavour: str, gpu: GpuFacts) -> str | None:
    """Why the engines of a flavour don't run here: none for this GPU, some missing, or built by another version."""
    try:
        version = importlib.import_module(FLAVOURS[flavour].module).__version__
        engines_for(root, manifest, flavour, str(gpu.target), version)
    except CarError as error:
        return str(error)
    return None


def _build_command(flavour: str, gpu: GpuFacts, root: Path) -> str:
    target = f" --sm {gpu.sm}" if flavour == "rtx" else ""
    return f"python export/build_engines.py {shlex.quote(str(root))} --target {flavour}{target}"


# -- for people ------------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """The findings as text."""
    here, gpu = report["machine"], GpuFacts(**report["gpu"])
    cores = f"{here['cores_usable']} of {here['cores']} cores usable"
    memory = "memory unknown" if here["memory"] is None else f"{here['memory'] / 1e9:.1f} GB memory"
    lines = [
        f"car_runtime {report['version']}, Python {here['python']}, {here['os']}",
        f"CPU: {here['cpu']}, {cores}, {memory}, {' '.join(here['flags'] or []) or 'no known vector extensions'}",
        "GPU: " + (_gpu_line(gpu) if gpu.name else "none"),
    ]
    if not gpu.usable:
        lines += [f"  {gpu.why}", *(f"  nvidia-smi: {line}" for line in gpu.nvidia_smi or [])]
    lines += ["", "backends:"]
    for entry in report["backends"]:
        lines.append(f"  {'yes' if entry['usable'] else 'no ':<4} {entry['name']:<9} {entry['why']}")
        lines += [f"{'':>17}{command}" for command in entry["install"]]
    return "\n".join([*lines, *_plan_lines(report.get("plan"))])


def _gpu_line(gpu: GpuFacts) -> str:
    memory = "" if gpu.memory is None else f", {gpu.memory / 1e9:.1f} GB"
    rtx = f"--target rtx --sm {gpu.sm}" if gpu.sm in RTX_TARGETS else f"TensorRT for RTX has no {gpu.target}"
    return f"{gpu.name}{memory}, compute capability {gpu.capability} ({rtx}), driver {gpu.driver}"


def _plan_lines(plan: Mapping[str, Any] | None) -> list[str]:
    if plan is None:
        return []
    if plan["problem"] is not None:
        return ["", f"plan {plan['path']}: {plan['problem']}"]
    lines = ["", f"plan {plan['name']} ({plan['precision']}): runs on {', '.join(plan['runs_on']) or 'nothing here'}"]
    lines += [f"  {'yes' if e['usable'] else 'no ':<4} {e['file']}: {e['why']}" for e in plan["engines"]]
    if not plan["engines"]:
        lines.append("  no engines compiled")
    for entry in plan["build"]:
        lines += [f"  {entry['flavour']}: {entry['why']}", f"    {entry['command']}"]
    return lines
