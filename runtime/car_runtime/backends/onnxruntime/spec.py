"""`ort-cpu`, `ort-cuda` and `cuda`."""

from __future__ import annotations

import warnings

from car_runtime.backends.cuda.kernels import targets
from car_runtime.backends.spec import BackendSpec, Finding, MachineFacts
from car_runtime.errors import one_line

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
CUDA_LIBRARIES = "pip install 'onnxruntime-gpu[cuda,cudnn]'"

ORT_CPU = BackendSpec(
    name="ort-cpu",
    device="cpu",
    rank=4,
    rank_bf16=7,
    computes=("fp32", "fp16"),
    int8=True,
    reads_folder=True,
    extra="cpu",
    install=("pip install 'car-deploy[cpu]'",),
    opener="car_runtime.backends.onnxruntime.cpu:OrtCpu",
    probe="car_runtime.backends.onnxruntime.spec:probe_cpu",
    hardware="any CPU",
    status="measured",
)
ORT_CUDA = BackendSpec(
    name="ort-cuda",
    device="gpu",
    rank=3,
    computes=("fp32", "fp16", "bf16"),
    extra="gpu",
    install=("pip uninstall onnxruntime", "pip install 'car-deploy[gpu]'"),
    opener="car_runtime.backends.onnxruntime.cuda:open_ort_cuda",
    probe="car_runtime.backends.onnxruntime.spec:probe_cuda",
    hardware="any NVIDIA GPU, driver 580 or newer; no engines to build",
    status="measured",
)

CUDA = BackendSpec(
    name="cuda",
    device="gpu",
    rank=0,
    computes=("fp16", "bf16"),
    oldest_format=2,
    extra="cuda",
    install=("pip install 'car-deploy[cuda]'",),
    opener="car_runtime.backends.onnxruntime.kernels:open_cuda",
    probe="car_runtime.backends.onnxruntime.spec:probe_kernels",
    hardware="NVIDIA GPUs from Ampere to Blackwell, driver 580 or newer; plans of format 2, no engines to build",
    status="built only",
)

# An ONNX model of one node, float32 x [1] → Identity → y, opset 13: what a provider is tried with.
_IDENTITY = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a"
    "0a08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)


def probe_cpu(spec: BackendSpec, facts: MachineFacts) -> Finding:
    """ONNX Runtime is there and opens a session."""
    if conflict := _conflict(spec, facts):
        return conflict
    if _version(facts) is None:
        return spec.missing("onnxruntime is not installed")
    problem = _try_provider(spec, CPU_PROVIDER)
    return problem or Finding(usable=True, why=f"onnxruntime {_version(facts)}")


def probe_cuda(spec: BackendSpec, facts: MachineFacts) -> Finding:
    """ONNX Runtime for GPUs is there, and a GPU, and it opens a session on it."""
    if conflict := _conflict(spec, facts):
        return conflict
    if facts.packages["onnxruntime-gpu"] is None:
        installed = [c for c in spec.install if not c.startswith("pip uninstall") or facts.packages[c.split()[-1]]]
        return spec.missing("onnxruntime-gpu is not installed", installed)
    if not facts.gpu.usable:
        return spec.missing(str(facts.gpu.why), ())
    problem = _try_provider(spec, CUDA_PROVIDER)
    return problem or Finding(usable=True, why=f"onnxruntime {_version(facts)} on {facts.gpu.name}")


def probe_kernels(spec: BackendSpec, facts: MachineFacts) -> Finding:
    """A GPU that the kernels were compiled for. ONNX Runtime is asked for when a graph needs it."""
    if facts.packages["cuda-python"] is None:
        return spec.missing("cuda-python is not installed")
    if not facts.gpu.usable:
        return spec.missing(str(facts.gpu.why), ())
    if facts.gpu.target not in targets():
        return spec.missing(f"there are no kernels for {facts.gpu.target}, only for {', '.join(targets())}", ())
    return Finding(usable=True, why=f"kernels for {facts.gpu.target} on {facts.gpu.name}")


def _version(facts: MachineFacts) -> str | None:
    return facts.packages["onnxruntime"] or facts.packages["onnxruntime-gpu"]


def _conflict(spec: BackendSpec, facts: MachineFacts) -> Finding | None:
    if facts.packages["onnxruntime"] is None or facts.packages["onnxruntime-gpu"] is None:
        return None
    return spec.missing(
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
        ["pip uninstall onnxruntime onnxruntime-gpu", spec.install[-1]],
    )


def _try_provider(spec: BackendSpec, provider: str) -> Finding | None:
    """Really open a session: providers are listed where they cannot load, and the CPU silently takes their place."""
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = onnxruntime.InferenceSession(_IDENTITY, options, providers=[provider])
        taken = session.get_providers()[0]
    except Exception as error:
        return spec.missing(f"onnxruntime does not start: {one_line(error)}")
    if taken != provider:
        return spec.missing(
            f"onnxruntime {onnxruntime.__version__} cannot load {provider}: CUDA's or cuDNN's libraries are missing",
            [CUDA_LIBRARIES],
        )
    return None
