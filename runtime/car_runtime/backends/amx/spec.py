"""`amx` and `amx-fp32`."""

from __future__ import annotations

from dataclasses import replace

from car_runtime.backends.openvino.spec import probe as probe_openvino
from car_runtime.backends.spec import BackendSpec, Finding, MachineFacts
from car_runtime.errors import CarError

BF16_TERMS = {"amx": 1, "amx-fp32": 2}
"""How many bf16 values stand for a number."""

AMX = BackendSpec(
    name="amx",
    device="cpu",
    rank=6,
    rank_bf16=4,
    computes=("fp32",),
    oldest_format=2,
    extra="openvino",
    install=("pip install 'car-deploy[openvino]'",),
    opener="car_runtime.backends.amx.backend:Amx",
    probe="car_runtime.backends.amx.spec:probe",
    hardware="Xeons with AMX (4th generation, 2023), Linux, gcc; in bf16",
    status="measured",
)
AMX_FP32 = replace(
    AMX,
    name="amx-fp32",
    rank=7,
    rank_bf16=6,
    opener="car_runtime.backends.amx.backend:AmxFp32",
    hardware="the same, in float32",
)


def probe(spec: BackendSpec, facts: MachineFacts) -> Finding:
    """OpenVINO is there, the CPU has the tiles, and a C compiler makes the kernels."""
    from car_runtime.backends.amx import build

    openvino = probe_openvino(spec, facts)
    if not openvino.usable:
        return openvino
    try:
        build.check_cpu(spec.name)
        build.load(BF16_TERMS[spec.name])
    except CarError as error:
        return spec.missing(str(error).partition(";")[0], ["apt install gcc"] if "compile" in str(error) else [])
    return Finding(usable=True, why=f"its own code, compiled here, and openvino {facts.packages['openvino']}")
