"""One builder for both flavours of TensorRT: ONNX in, engine out.

TensorRT for RTX (`rtx`, module `tensorrt_rtx`) compiles on any machine for a chosen compute capability. Classic
TensorRT (`trt`, module `tensorrt`) compiles for the GPU in this machine. Both have the same Python API; their calls
return None, False or −1 when they fail and log the reason, which is collected here and raised.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx

from car_export.errors import (
    CompileError,
    CompilerMissingError,
    EngineError,
    GraphError,
    MixedTypesError,
    NoGpuError,
    ProfileError,
    TargetError,
    TopKError,
)
from car_export.files import write_file

MODULES = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}
INSTALL = {"rtx": "pip install 'car-deploy[rtx]'", "trt": "pip install 'car-deploy[trt]'"}
SETTINGS = {"strongly_typed": True, "tf32": False, "extra_memory_target": 0.0}
"""What the builder is given, and part of every engine's key.

No TF32: what the graph keeps in float32 (norms, softmax, f̂, logits) is there for its digits.
`extra_memory_target` 0 keeps one copy of the weights for all profiles.
"""
Dims = tuple["int | str", ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One set of static shapes (min = opt = max) that an engine runs."""

    name: str
    sizes: Mapping[str, int]
    """Dimension name → size."""

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """Dimensions as numbers; `S*S` is a product. Raises ProfileError."""
        return tuple(d if isinstance(d, int) else prod(self._size(factor) for factor in d.split("*")) for d in dims)

    def _size(self, name: str) -> int:
        if name not in self.sizes:
            raise ProfileError(
                f"the profile {self.name} has no size for the dimension {name!r}, only {dict(self.sizes)}; "
                "export the plan again, so that graph and manifest belong together"
            )
        return self.sizes[name]


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of an engine: numpy dtype name or "bfloat16", dimensions as numbers or names."""

    name: str
    dtype: str
    shape: Dims


@dataclass(frozen=True, kw_only=True)
class Built:
    """A finished engine, described from its network definition and the compiler's log."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    activation_bytes: tuple[int | None, ...]
    """Device memory for activations and scratch, per profile."""
    weight_bytes: int | None
    bytes: int
    seconds: float


class Compiler:
    """One flavour of TensorRT, loaded. Raises CompilerMissingError."""

    def __init__(self, flavour: str):
        if flavour not in MODULES:
            raise TargetError(f"there is no target {flavour!r}; choose one of {', '.join(MODULES)}")
        self.flavour = flavour
        try:
            self.trt: Any = importlib.import_module(MODULES[flavour])
        except Exception as error:  # a missing module, or a library inside it that can't be loaded
            why = " ".join(str(error).split())
            raise CompilerMissingError(
                f"--target {flavour} needs {MODULES[flavour]} ({why}); {INSTALL[flavour]}"
            ) from error
        self.version = str(self.trt.__version__)

    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that can be compiled for: sm75, sm80, …; none for a flavour that takes the GPU's."""
        if self.flavour != "rtx":
            return ()
        names = (name for name in dir(self.trt.ComputeCapability) if re.fullmatch(r"SM\d+", name))
        return tuple(name.lower() for name in sorted(names, key=lambda name: int(name[2:])))

    def check_target(self, target: str) -> None:
        """Raise TargetError unless this flavour compiles for `target`."""
        if self.flavour == "rtx" and target not in self.targets():
            have = ", ".join(name[2:] for name in self.targets()[:-1]) + f" or {self.targets()[-1][2:]}"
            raise TargetError(
                f"--sm {target.removeprefix('sm')} is no target of TensorRT for RTX {self.version}; choose {have}"
            )

    def build(self, graph: bytes, sibling: Path, profiles: Sequence[Profile], target: str, output: Path) -> Built:
        """Compile ONNX bytes into the file `output`, which is whole or not there.

        `sibling`: a file in the folder that the graph's external data lies in. `profiles`: with none of the graph's
        dimensions named, one profile is only a name. Raises an EngineError.
        """
        self.check_target(target)
        began = time.monotonic()
        logger = _new_logger(self.trt)
        builder = self.trt.Builder(logger)
        if builder is None:
            raise self._failure(logger, target, "no builder could be made")
        network = builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = self.trt.OnnxParser(network, logger)
        if not parser.parse(graph, path=str(sibling)):
            raise self._parse_failure(parser, logger, target)
        inputs, outputs = self._ports(network, graph)
        config = self._config(builder, target, logger)
        if any(isinstance(d, str) for port in inputs for d in port.shape):
            for profile in profiles:
                self._add_profile(builder, config, inputs, profile, logger)
        with _interrupts() as stop:
            config.progress_monitor = _new_monitor(self.trt, stop)
            blob = builder.build_serialized_network(network, config)
        if stop:
            raise KeyboardInterrupt
        if blob is None:
            raise self._failure(logger, target, "the engine could not be built")
        size = int(blob.nbytes)
        write_file(output, memoryview(blob))
        activations = logger.numbers("Total Activation Memory")
        return Built(
            inputs=inputs,
            outputs=outputs,
            activation_bytes=tuple(activations) if len(activations) == len(profiles) else (None,) * len(profiles),
            weight_bytes=next(iter(logger.numbers("Total Weights Memory")), None),
            bytes=size,
            seconds=time.monotonic() - began,
        )

    def _config(self, builder: Any, target: str, logger: Any) -> Any:
        config = builder.create_builder_config()
        config.clear_flag(self.trt.BuilderFlag.TF32)
        if self.flavour == "rtx":
            config.num_compute_capabilities = 1
            capability = getattr(self.trt.ComputeCapability, target.upper())
            if not config.set_compute_capability(capability, 0):
                raise self._failure(logger, target, "the target was refused")
        return config

    def _add_profile(self, builder: Any, config: Any, inputs: Sequence[Port], profile: Profile, logger: Any) -> None:
        made = builder.create_optimization_profile()
        for port in inputs:
            if any(isinstance(d, str) for d in port.shape):
                shape = profile.shape(port.shape)
                try:
                    made.set_shape(port.name, shape, shape, shape)
                except (RuntimeError, ValueError) as error:
                    raise ProfileError(
                        f"the profile {profile.name} can't give {port.name} the shape {list(shape)} ({error}); "
                        "export the plan again"
                    ) from error
        made.extra_memory_target = SETTINGS["extra_memory_target"]
        if config.add_optimization_profile(made) < 0:
            raise ProfileError(f"the profile {profile.name} was refused: {logger.complaint()}; export the plan again")

    def _ports(self, network: Any, graph: bytes) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
        """Inputs and outputs of the network; free dimensions have the names that the ONNX graph gives them."""
        dtypes = {getattr(self.trt.DataType, ours): name for ours, name in _DTYPES.items()}
        declared = onnx.load_model_from_string(graph).graph
        named = {v.name: _dims(v) for v in (*declared.input, *declared.output)}
        found = (
            [network.get_input(i) for i in range(network.num_inputs)],
            [network.get_output(i) for i in range(network.num_outputs)],
        )
        sides = []
        for tensors in found:
            ports = []
            for tensor in tensors:
                dims, shape = named[tensor.name], tuple(tensor.shape)
                if tensor.dtype not in dtypes:
                    raise GraphError(
                        f"{tensor.name} has the type {tensor.dtype}, which no plan uses; export the plan again",
                        tensor.name,
                    )
                if len(shape) != len(dims) or any(a not in (-1, b) for a, b in zip(shape, dims, strict=True)):
                    raise GraphError(
                        f"{tensor.name} has the shape {list(shape)} in the network and {list(dims)} in the graph; "
                        "export the plan again",
                        tensor.name,
                    )
                ports.append(Port(name=tensor.name, dtype=dtypes[tensor.dtype], shape=dims))
            sides.append(tuple(ports))
        return sides[0], sides[1]

    def _parse_failure(self, parser: Any, logger: Any, target: str) -> EngineError:
        """The typed error for the first node that the parser refuses."""
        if not parser.num_errors:
            return self._failure(logger, target, "the graph could not be read")
        error = parser.get_error(0)
        node, operator = str(error.node_name()), str(error.node_operator())
        words = next((line for line in str(error.desc()).splitlines() if "Error Code" in line), str(error.desc()))
        if not node:
            return GraphError(f"the graph can't be read: {error.code()}: {_tidy(words)}; export the plan again")
        where = f"node {node!r} ({operator})"
        if re.search(_MIXED, words):
            return MixedTypesError(f"{where}: {_tidy(words)}; cast one of the inputs in the traced module", node)
        return GraphError(
            f"{where} is refused by {MODULES[self.flavour]} {self.version}: {error.code()}: {_tidy(words)}; "
            "use operators and types that TensorRT's ONNX parser lists",
            node,
        )

    def _failure(self, logger: Any, target: str, what: str) -> EngineError:
        """The typed error for what the compiler complained about."""
        message = logger.complaint()
        for pattern, kind, remedy in _FAILURES:
            if re.search(pattern, message):
                return kind(f"{self.flavour} {target}: {what}: {message}; {remedy}", _node(message))
        return CompileError(
            f"{self.flavour} {target}: {what}: {message}; try another --precision, or another version of "
            f"{MODULES[self.flavour]} than {self.version}",
            _node(message),
        )


_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
    "UINT8": "uint8",
}
_MIXED = r"must have (the )?same (input )?types?"
_FAILURES: tuple[tuple[str, type[EngineError], str], ...] = (
    (r"K exceeds the maximum", TopKError, "split this TopK, or use a vocabulary of at most 7680 codes"),
    (_MIXED, MixedTypesError, "cast one of the inputs in the traced module"),
    (
        r"IOptimizationProfile|optimization profile|in profile \d|but profile \d|must be conformable",
        ProfileError,
        "the profile's sizes don't fit the graph; export the plan again, so that graph and manifest belong together",
    ),
    (
        r"FP32 GEMM is not supported",
        TargetError,
        "this target multiplies no float32 matrices; export with --precision fp16, or choose a newer --sm",
    ),
    (
        r"HW-specific datatypes",
        TargetError,
        "this target has no such type; export with --precision fp16, or choose a newer --sm",
    ),
    (
        r"driver version is insufficient|no CUDA-capable device",
        NoGpuError,
        "use --target rtx with --sm, which needs no GPU",
    ),
    (r"[Oo]ut of memory|bad_alloc|OutOfMemory", CompileError, "free some memory, or build fewer batch sizes"),
)
"""What the compilers' words mean: pattern, kind of error, remedy."""


def _dims(value: onnx.ValueInfoProto) -> Dims:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def _node(message: str) -> str | None:
    """The node that a complaint names: "(ITopKLayer NAME: …", "(NAME: …"."""
    found = re.search(r"\((?:I\w+Layer )?([^\s:()]+): ", message)
    return found.group(1) if found else None


def _tidy(words: str) -> str:
    """One line, without the compiler's own source files."""
    words = re.sub(r"\s*In \w+ at \S+?:\d+(?=[\s)]|$)", "", words)
    return " ".join(words.split())


def _new_logger(trt: Any) -> Any:
    """A logger that keeps what matters: complaints, and the lines with numbers of bytes."""

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.memory: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.INFO and message.startswith("Total "):
                self.memory.append(message)

        def complaint(self) -> str:
            """The first error of the compiler itself: what follows are its consequences."""
            own = [m for m in self.errors if "catchCudaError" not in m] or self.errors or ["it gave no reason"]
            return _tidy(own[0])

        def numbers(self, what: str) -> list[int]:
            """The bytes of each "WHAT: N bytes", in order."""
            found = (re.match(rf"{what}: (\d+) bytes", line) for line in self.memory)
            return [int(match.group(1)) for match in found if match]

    return Collector()


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C while the compiler runs fills the list: raised inside one of its callbacks it would be swallowed."""
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda number, _: stop.append(number))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _new_monitor(trt: Any, stop: list[int]) -> Any:
    """What makes the compiler give up when `stop` is filled."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return not stop

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


def gpu_here() -> str | None:
    """Compute capability of the first GPU, "sm89"; None without a GPU or its driver.

    Nothing is loaded but the driver.
    """
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
            return None
        for number, attribute in ((major, _MAJOR), (minor, _MINOR)):
            if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
                return None
    except (OSError, AttributeError):
        return None
    return f"sm{major.value}{minor.value}"
