"""`car-run doctor`: what this machine can run, what is missing, and how to install it.

Nothing is an error here because it is absent. The standard library is enough for all of it; what is looked for is
imported only to see whether it works.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from car_runtime import __version__
from car_runtime.backends.openvino.core import openvino_core
from car_runtime.backends.registry import OPENERS
from car_runtime.errors import CarError, one_line

BACKENDS = ("ort-cpu", "openvino", "amx", "amx-fp32", "ort-cuda", "rtx", "trt")
PACKAGES = (
    *("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("cuda-python", "tensorrt-rtx", "tensorrt", "torch"),
)
INSTALL = {
    "ort-cpu": ["pip install 'car-deploy[cpu]'"],
    "openvino": ["pip install 'car-deploy[openvino]'"],
    "amx": ["pip install 'car-deploy[openvino]'"],
    "amx-fp32": ["pip install 'car-deploy[openvino]'"],
    "ort-cuda": ["pip uninstall onnxruntime", "pip install 'car-deploy[gpu]'"],
    "rtx": ["pip install 'car-deploy[rtx]'"],
    "trt": ["pip install 'car-deploy[trt]'  # libraries: from NVIDIA's index, see its TensorRT installation guide"],
}
"""Per backend, what installs its packages. In a checkout, '.' stands for car-deploy."""
COMPUTES = {
    "ort-cpu": ("fp32", "fp16"),
    "openvino": ("fp32",),
    "amx": ("fp32",),
    "amx-fp32": ("fp32",),
    "ort-cuda": ("fp32", "fp16", "bf16"),
}
"""What the backends that need no engines compute in."""
INT8 = ("ort-cpu", "openvino")
"""Those of them that take int8 plans."""
RTX_TARGETS = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that TensorRT for RTX builds for: Turing, Ampere, Ada and Blackwell; Hopper (90) is none."""
DRIVERS = {13: "580", 12: "525"}
"""CUDA's major version → the first NVIDIA driver (on Linux) that runs it."""
CPU_FLAGS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "sve"),
)
SECONDS = 20.0
"""How long nvidia-smi may take."""
# An ONNX model of one node, float32 x [1] → Identity → y, opset 13: what a provider is tried with.
IDENTITY = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a"
    "0a08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)


def examine(plan: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The findings as one JSON object: `machine`, `packages`, `gpu`, `backends`, `works` and, if asked for, `plan`.

    Raises nothing: a plan that can't be read is a finding too.
    """
    found = packages()
    gpu = probe_gpu()
    backends = [_backend(name, found, gpu) for name in BACKENDS]
    report = {
        "version": __version__,
        "works": any(entry["usable"] for entry in backends),
        "machine": machine(gpu),
        "packages": found,
        "gpu": gpu,
        "backends": backends,
    }
    if plan is not None:
        report["plan"] = _plan(Path(plan), gpu, backends)
    return report


# -- the machine -----------------------------------------------------------------------------------------------------


def machine(gpu: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Where this runs. What the system doesn't tell is None; memory is bytes.

    gpu: of `probe_gpu`, if that was asked already. `cores_usable`: those that this process may use. `flags`: of
    `CPU_FLAGS`, those that the processor has.
    """
    gpu = probe_gpu() if gpu is None else gpu
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": cpu_flags(),
        **_memory(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": gpu["name"],
        "driver": gpu["driver"],
        "packages": packages(),
    }


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    return {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}


def _cpu_name() -> str | None:
    found = _cpuinfo()
    name = found.get("model name")
    if name is None:
        return platform.processor() or platform.machine() or None
    # Virtual machines hide the model's name but not its numbers.
    family, model = found.get("cpu family"), found.get("model")
    return name + (f" (family {family}, model {model})" if family and model else "")


def cpu_flags() -> list[str] | None:
    """Of `CPU_FLAGS`, those that the processor has; None where the system doesn't tell."""
    found = _cpuinfo()
    listed = found.get("flags") or found.get("Features")
    return None if listed is None else [flag for flag in CPU_FLAGS if flag in listed.split()]


def _memory() -> dict[str, int | None]:
    total = available = None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        total, available = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    except (OSError, ValueError, KeyError):
        pass
    return {"memory": total, "memory_available": available}


def packages() -> dict[str, str | None]:
    """Installed versions of what a backend may need, by distribution name; None: not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    # Classic TensorRT goes by the CUDA version too.
    names = (name, f"{name}-cu13", f"{name}-cu12") if name == "tensorrt" else (name,)
    found = (distribution.version for candidate in names for distribution in metadata.distributions(name=candidate))
    return next(found, None)


# -- the GPU ---------------------------------------------------------------------------------------------------------


def probe_gpu() -> dict[str, Any]:
    """The GPU that a backend would use, by cuda-python, or else as nvidia-smi has it.

    `usable`: CUDA works here. `why`: what to do, where it does not. `name`, `capability` ("8.9"), `target` ("sm89"),
    `memory`, `driver` (newest CUDA version that it runs), and nvidia-smi's own lines, or None.
    """
    found: dict[str, Any] = {"usable": False, "why": None, "name": None, "capability": None, "target": None}
    found |= {"memory": None, "driver": None, "nvidia_smi": _nvidia_smi()}
    try:
        from car_runtime.backends.cuda.driver import probe

        gpu = probe()
    except CarError as error:
        return found | {"why": str(error), **_by_nvidia_smi(found["nvidia_smi"])}
    except Exception as error:  # a driver that is broken in a way nobody foresaw is a finding, not a crash
        return found | {"why": f"{type(error).__name__}: {one_line(error)}; check that nvidia-smi works"}
    return found | {
        "usable": True,
        "name": gpu.name,
        "capability": ".".join(map(str, gpu.capability)),
        "target": gpu.target,
        "memory": gpu.memory_bytes,
        "driver": f"CUDA {gpu.driver}",
    }


def _nvidia_smi() -> list[str] | None:
    """One line per GPU: name, compute capability, memory, driver; None without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi does not run: {one_line(error)}"]
    lines = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).splitlines()
    return [line.strip() for line in lines if line.strip()]


def _by_nvidia_smi(lines: list[str] | None) -> dict[str, Any]:
    """What nvidia-smi's first line tells; nothing where it is no such line."""
    fields = [part.strip() for part in lines[0].split(",")] if lines else []
    if len(fields) != 4 or not fields[1].replace(".", "").isdigit():
        return {}
    name, capability, _, driver = fields
    return {"name": name, "capability": capability, "target": f"sm{capability.replace('.', '')}", "driver": driver}


# -- backends --------------------------------------------------------------------------------------------------------


def _backend(name: str, found: Mapping[str, str | None], gpu: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a backend can run here at all; engines of a plan are another matter."""
    problem = f"not in this version of car_runtime ({__version__})" if name not in OPENERS else None
    install: list[str] = []
    if problem is None:
        problem, install = _CHECKS[name](found, gpu)
    return {
        "name": name,
        "usable": problem is None,
        "why": problem or _VERSIONS[name](found, gpu),
        "install": install,
    }


Finding = tuple[str | None, list[str]]
"""What is wrong, or None, and the commands that repair it."""


def _conflict(found: Mapping[str, str | None], extra: str) -> Finding | None:
    if found["onnxruntime"] is None or found["onnxruntime-gpu"] is None:
        return None
    return (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
        ["pip uninstall onnxruntime onnxruntime-gpu", f"pip install 'car-deploy[{extra}]'"],
    )


def _check_ort_cpu(found: Mapping[str, str | None], gpu: Mapping[str, Any]) -> Finding:
    if conflict := _conflict(found, "cpu"):
        return conflict
    if found["onnxruntime"] is None and found["onnxruntime-gpu"] is None:
        return "onnxruntime is not installed", INSTALL["ort-cpu"]
    return _try_onnxruntime("CPUExecutionProvider", "ort-cpu")


def _check_openvino(found: Mapping[str, str | None], gpu: Mapping[str, Any]) -> Finding:
    if found["openvino"] is None:
        return "openvino is not installed", INSTALL["openvino"]
    try:
        openvino_core()
    except Exception as error:
        return f"openvino does not start: {one_line(error)}", INSTALL["openvino"]
    return None, []


def _check_amx(found: Mapping[str, str | None], gpu: Mapping[str, Any], parts: int = 1) -> Finding:
    from car_runtime.backends.amx import build
    from car_runtime.backends.amx.backend import check_cpu

    problem, install = _check_openvino(found, gpu)
    if problem is not None:
        return problem, install
    try:
        check_cpu("amx" if parts == 1 else "amx-fp32")
        build.load(parts)
    except CarError as error:
        return str(error).partition(";")[0], ["apt install gcc"] if "compile" in str(error) else []
    return None, []


def _check_ort_cuda(found: Mapping[str, str | None], gpu: Mapping[str, Any]) -> Finding:
    if conflict := _conflict(found, "gpu"):
        return conflict
    if found["onnxruntime-gpu"] is None:
        return "onnxruntime-gpu is not installed", _needed("ort-cuda", found)
    return _no_gpu(gpu) or _try_onnxruntime("CUDAExecutionProvider", "ort-cuda")


def _check_rtx(found: Mapping[str, str | None], gpu: Mapping[str, Any]) -> Finding:
    if found["tensorrt-rtx"] is None:
        return "tensorrt-rtx is not installed", INSTALL["rtx"]
    if (missing := _no_gpu(gpu)) is not None:
        return missing
    if _sm(gpu) not in RTX_TARGETS:
        return (
            f"TensorRT for RTX does not run on compute capability {gpu['capability']}, only on RTX GPUs "
            f"({', '.join(f'sm{sm}' for sm in RTX_TARGETS)}); use trt or ort-cuda",
            INSTALL["trt"],
        )
    return _old_driver("tensorrt-rtx", gpu) or _try_tensorrt("tensorrt_rtx", "rtx")


def _check_trt(found: Mapping[str, str | None], gpu: Mapping[str, Any]) -> Finding:
    if found["tensorrt"] is None:
        return "tensorrt is not installed", INSTALL["trt"]
    return _no_gpu(gpu) or _old_driver("tensorrt", gpu) or _try_tensorrt("tensorrt", "trt")


_CHECKS: dict[str, Callable[[Mapping[str, str | None], Mapping[str, Any]], Finding]] = {
    "ort-cpu": _check_ort_cpu,
    "openvino": _check_openvino,
    "amx": _check_amx,
    "amx-fp32": partial(_check_amx, parts=2),
    "ort-cuda": _check_ort_cuda,
    "rtx": _check_rtx,
    "trt": _check_trt,
}


def _no_gpu(gpu: Mapping[str, Any]) -> Finding | None:
    return None if gpu["usable"] else (str(gpu["why"]), [])


def _old_driver(package: str, gpu: Mapping[str, Any]) -> Finding | None:
    """A driver whose CUDA is older than that of the package's libraries, which says nothing understandable itself."""
    runs = int(str(gpu["driver"]).removeprefix("CUDA ").split(".")[0])
    made_for = [cuda for cuda in DRIVERS if runs < cuda and _version(f"{package}-cu{cuda}") is not None]
    if not made_for:
        return None
    return (
        f"the NVIDIA driver runs {gpu['driver']} at most, but {package} was made for CUDA {made_for[0]}; "
        f"upgrade the driver to {DRIVERS[made_for[0]]} or newer",
        [],
    )


def _needed(name: str, found: Mapping[str, str | None]) -> list[str]:
    """The commands of `INSTALL`, without uninstalling what isn't there."""
    return [c for c in INSTALL[name] if not c.startswith("pip uninstall") or found[c.split()[-1]] is not None]


def _try_onnxruntime(provider: str, name: str) -> Finding:
    """Really open a session: providers are listed where they cannot load, and the CPU silently takes their place."""
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = onnxruntime.InferenceSession(IDENTITY, options, providers=[provider])
        taken = session.get_providers()[0]
    except Exception as error:
        return f"onnxruntime does not start: {one_line(error)}", INSTALL[name]
    if taken != provider:
        return (
            f"onnxruntime {onnxruntime.__version__} cannot load {provider}: CUDA's or cuDNN's libraries are missing",
            ["pip install 'onnxruntime-gpu[cuda,cudnn]'"],
        )
    return None, []


def _try_tensorrt(module: str, name: str) -> Finding:
    """Make the runtime object, which needs the driver."""
    try:
        trt = __import__(module)
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    except Exception as error:
        return f"{module} does not start: {one_line(error)}", INSTALL[name]
    return (None, []) if runtime is not None else (f"{module} makes no runtime on this GPU and driver", INSTALL[name])


def _on_cpu(found: Mapping[str, str | None], gpu: Mapping[str, Any]) -> str:
    return f"onnxruntime {found['onnxruntime'] or found['onnxruntime-gpu']}"


def _with_openvino(found: Mapping[str, str | None], gpu: Mapping[str, Any]) -> str:
    return f"its own code, compiled here, and openvino {found['openvino']}"


_VERSIONS: dict[str, Callable[[Mapping[str, str | None], Mapping[str, Any]], str]] = {
    "ort-cpu": _on_cpu,
    "openvino": lambda found, gpu: f"openvino {found['openvino']}",
    "amx": _with_openvino,
    "amx-fp32": _with_openvino,
    "ort-cuda": lambda found, gpu: f"{_on_cpu(found, gpu)} on {gpu['name']}",
    "rtx": lambda found, gpu: f"tensorrt-rtx {found['tensorrt-rtx']} on {gpu['name']}, engines for {gpu['target']}",
    "trt": lambda found, gpu: f"tensorrt {found['tensorrt']} on {gpu['name']}, engines for {gpu['target']}",
}


def _sm(gpu: Mapping[str, Any]) -> int | None:
    return None if gpu["target"] is None else int(str(gpu["target"]).removeprefix("sm"))


# -- a plan ----------------------------------------------------------------------------------------------------------


def _plan(root: Path, gpu: Mapping[str, Any], backends: list[dict[str, Any]]) -> dict[str, Any]:
    """Which engines of a plan this machine can use, and the commands that build what is missing."""
    from car_runtime.format.manifest import read_manifest, verify_files

    report: dict[str, Any] = {"path": str(root), "name": None, "problem": None, "precision": None}
    report |= {"runs_on": [], "engines": [], "build": []}
    try:
        manifest = read_manifest(root)
        verify_files(root, manifest, hashes=False)
    except CarError as error:
        return report | {"problem": str(error)}
    usable = {entry["name"] for entry in backends if entry["usable"]}
    compute = manifest.precision.compute
    runs_on = [name for name, computes in COMPUTES.items() if name in usable and compute in computes]
    if manifest.precision.weights == "int8":
        runs_on = [name for name in runs_on if name in INT8]
    engines = [_engine(engine, gpu, usable) for engine in manifest.engines]
    build = []
    for flavour in ("rtx", "trt"):
        problem = _engines_problem(root, manifest, flavour, gpu) if flavour in usable else None
        if flavour in usable and problem is None:
            runs_on.append(flavour)
        if flavour in usable and problem is not None:
            build.append({"flavour": flavour, "why": problem, "command": _build_command(flavour, gpu, root)})
    # Engines are built without a driver too: who has an RTX card can do that before the rest is installed.
    if "rtx" not in usable and _sm(gpu) in RTX_TARGETS and not any(e["target"] == gpu["target"] for e in engines):
        why = f"no engine for {gpu['target']}"
        build.append({"flavour": "rtx", "why": why, "command": _build_command("rtx", gpu, root)})
    return report | {
        "name": manifest.name,
        "precision": compute,
        "runs_on": sorted(runs_on, key=BACKENDS.index),
        "engines": engines,
        "build": build,
    }


def _engine(engine: Any, gpu: Mapping[str, Any], usable: set[str]) -> dict[str, Any]:
    graph = engine.details.get("graph")
    why = "for this GPU"
    if engine.target != gpu["target"]:
        why = f"for {engine.target}; this machine has {gpu['target'] or 'no NVIDIA GPU'}"
    elif engine.flavour not in usable:
        why = f"for this GPU, but the backend {engine.flavour} is not usable"
    good = engine.target == gpu["target"] and engine.flavour in usable
    return {"file": engine.file, "graph": graph, "flavour": engine.flavour, "target": engine.target} | {
        "usable": good,
        "why": why,
    }


def _engines_problem(root: Path, manifest: Any, flavour: str, gpu: Mapping[str, Any]) -> str | None:
    """Why the engines of a flavour don't run here: none for this GPU, some missing, or built by another version."""
    from car_runtime.backends.tensorrt.engine_metadata import engines_for

    try:
        version = __import__({"rtx": "tensorrt_rtx", "trt": "tensorrt"}[flavour]).__version__
        engines_for(root, manifest, flavour, str(gpu["target"]), version)
    except CarError as error:
        return str(error)
    return None


def _build_command(flavour: str, gpu: Mapping[str, Any], root: Path) -> str:
    target = f" --sm {_sm(gpu)}" if flavour == "rtx" else ""
    return f"python export/build_engines.py {shlex.quote(str(root))} --target {flavour}{target}"


# -- for people ------------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """The findings as text."""
    here, gpu = report["machine"], report["gpu"]
    cores = f"{here['cores_usable']} of {here['cores']} cores usable"
    memory = "memory unknown" if here["memory"] is None else f"{here['memory'] / 1e9:.1f} GB memory"
    lines = [
        f"car_runtime {report['version']}, Python {here['python']}, {here['os']}",
        f"CPU: {here['cpu']}, {cores}, {memory}, {' '.join(here['flags'] or []) or 'no known vector extensions'}",
        "GPU: " + (_gpu_line(gpu) if gpu["name"] else "none"),
    ]
    if not gpu["usable"]:
        lines.append(f"  {gpu['why']}")
    if gpu["nvidia_smi"] is not None and not gpu["usable"]:
        lines += [f"  nvidia-smi: {line}" for line in gpu["nvidia_smi"]]
    lines += ["", "backends:"]
    for entry in report["backends"]:
        lines.append(f"  {'yes' if entry['usable'] else 'no ':<4} {entry['name']:<9} {entry['why']}")
        lines += [f"{'':>17}{command}" for command in entry["install"]]
    return "\n".join([*lines, *_plan_lines(report.get("plan"))])


def _gpu_line(gpu: Mapping[str, Any]) -> str:
    memory = "" if gpu["memory"] is None else f", {gpu['memory'] / 1e9:.1f} GB"
    target = f"sm{_sm(gpu)}"
    rtx = f"--target rtx --sm {_sm(gpu)}" if _sm(gpu) in RTX_TARGETS else f"TensorRT for RTX has no {target}"
    return f"{gpu['name']}{memory}, compute capability {gpu['capability']} ({rtx}), driver {gpu['driver']}"


def _plan_lines(plan: Mapping[str, Any] | None) -> list[str]:
    if plan is None:
        return []
    if plan["problem"] is not None:
        return ["", f"plan {plan['path']}: {plan['problem']}"]
    lines = ["", f"plan {plan['name']} ({plan['precision']}): runs on {', '.join(plan['runs_on']) or 'nothing here'}"]
    lines += [_engine_line(engine) for engine in plan["engines"]]
    if not plan["engines"]:
        lines.append("  no engines compiled")
    for entry in plan["build"]:
        lines += [f"  {entry['flavour']}: {entry['why']}", f"    {entry['command']}"]
    return lines


def _engine_line(engine: Mapping[str, Any]) -> str:
    return f"  {'yes' if engine['usable'] else 'no ':<4} {engine['file']}: {engine['why']}"
