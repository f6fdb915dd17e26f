"""`openvino`."""

from __future__ import annotations

from car_runtime.backends.openvino.core import openvino_core
from car_runtime.backends.spec import BackendSpec, Finding, MachineFacts
from car_runtime.errors import one_line

OPENVINO = BackendSpec(
    name="openvino",
    device="cpu",
    rank=5,
    rank_bf16=5,
    computes=("fp32",),
    int8=True,
    extra="openvino",
    install=("pip install 'car-deploy[openvino]'",),
    opener="car_runtime.backends.openvino.backend:OpenVino",
    probe="car_runtime.backends.openvino.spec:probe",
    hardware="any CPU; in bf16 where it multiplies that",
    status="measured",
)


def probe(spec: BackendSpec, facts: MachineFacts) -> Finding:
    """OpenVINO is there and loads its CPU plugin."""
    if facts.packages["openvino"] is None:
        return spec.missing("openvino is not installed")
    try:
        openvino_core()
    except Exception as error:
        return spec.missing(f"openvino does not start: {one_line(error)}")
    return Finding(usable=True, why=f"openvino {facts.packages['openvino']}")
