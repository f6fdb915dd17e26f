"""What half precision does to a model: logits, tokens, and how far its values are from overflowing.

    python export/numerics.py CHECKPOINT -o numerics.json

Teacher forcing makes the scales comparable: the float32 PyTorch model draws greedily, and every other computation is
given its tokens, scale after scale, but keeps its own cache, f̂ and inputs. Three things are measured:

- **onnxruntime**: the very graphs of the plan. ONNX Runtime has no half-precision kernels for most operators on a CPU
  and computes chains of them in float32, so this is the lenient side.
- **pytorch**: the model in that type, every operator's result rounded to it: the strict side. Engines that fuse lie
  between the two.
- **tensors**: the largest |value| of every half-precision tensor inside the graphs, against the largest that the type
  holds; then once more with all weights that write into the residual stream × `factor`.

Shapes, for one image: K scales; S side of a scale; N tokens of a scale; L tokens of the image; V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from car_export.command import add_model_arguments, load_model, run_command
from car_export.config import ExportOptions, NumericsOptions
from car_export.files import write_file
from car_export.plan import PlanBuilder
from car_export.precision.case import Case, compare, make_case
from car_export.precision.probe import ProbedOrtCpu
from car_export.precision.rounding import torch_logits
from car_train.flags import add_flags, given
from car_train.model import Model

Log = Callable[[str], None]

FP16_MAX = 65504.0
SHOWN = 12
"""Tensors that a report lists, largest first."""
EXAMPLES = """examples:
  python export/numerics.py runs/car
  python export/numerics.py --vae vae_ch160v4096z32.pth --var var_d16.pth --car car_depth_d16.pth \\
      --control-type depth -o d16-numerics.json
"""


def measure(model: Model, options: NumericsOptions, log: Log = lambda _: None) -> dict[str, Any]:
    """Measure a model in half precision against float32; its weights are rounded to that type in place.

    Returns one JSON object. `onnxruntime` (null for bf16, which ONNX Runtime has no CPU kernels for) and `pytorch`
    have `scales` and `all`, each with `max`, `rms` (errors of the guided logits), `relative_max` (÷ the largest
    |logit| of all), `top1` and `sampled` (share of tokens that agree given the same past; sampled with top_k, top_p
    and one uniform number a token) and `largest_flipped_gap` (by how much of that range a greedy token that differs
    was the largest in float32: small is a near tie). `tensors` and `scaled` have the largest |values|, `headroom` =
    65504 ÷ the largest, and `overflows`: tensors beyond it.

    Raises ExportError for a model that can't be exported.
    """
    o = options
    settings = {"cfg": o.cfg, "top_k": o.top_k, "top_p": o.top_p, "factor": o.factor}
    report: dict[str, Any] = {"format": 1, "precision": o.precision, "settings": settings}
    with tempfile.TemporaryDirectory(prefix="numerics.") as folder:
        plan = Path(folder)
        export = ExportOptions(output=plan / "numerics.plan", name="numerics", precision=o.precision)
        builder = PlanBuilder(model, export, plan, log)
        reference = builder.reference
        report["model"] = _model_facts(reference)
        sides = reference.config.vqvae.sides
        case = make_case(reference, o.cfg, o.top_k, o.top_p)
        report["logit_range"] = float(case.logits.abs().max())
        log("reference drawn")
        report["pytorch"] = compare(case, torch_logits(builder.model, case), sides)
        log(f"PyTorch in {o.precision}: {_line(report['pytorch']['all'])}")
        report |= {"onnxruntime": None, "tensors": None, "scaled": None}
        if o.precision != "bf16":
            builder.build()
            report["onnxruntime"] = compare(case, ProbedOrtCpu(plan).logits(case), sides)
            log(f"ONNX Runtime in {o.precision}: {_line(report['onnxruntime']['all'])}")
            for key, factor in (("tensors", 1.0), ("scaled", o.factor)):
                report[key] = largest_values(ProbedOrtCpu(plan, probe=True, factor=factor), case)
                log(f"weights × {factor:g}: {_headroom(report[key])}")
    return report


def _model_facts(model: Model) -> dict[str, Any]:
    assert model.car is not None
    base = model.car.base.config
    return {"depth": base.depth, "width": base.C, "heads": base.H, "control": model.config.car is not None}


def largest_values(backend: ProbedOrtCpu, case: Case) -> dict[str, Any]:
    """Run a case on a probed plan; what `tensors` and `scaled` of the report hold (see `measure`)."""
    logits = backend.logits(case)
    found = sorted(backend.largest.items(), key=lambda item: -item[1])
    top = found[0][1] if found else 0.0
    return {
        "finite": bool(torch.isfinite(logits).all()),
        "probed": len(found),
        "scaled": len(backend.scaled),
        "headroom": FP16_MAX / top if found and np.isfinite(top) and top > 0 else None,
        "stream": backend.stream,
        "largest": [{"graph": g, "tensor": t, "value": v if np.isfinite(v) else None} for (g, t), v in found[:SHOWN]],
        "overflows": [{"graph": g, "tensor": t} for (g, t), v in found if not v <= FP16_MAX],
    }


def _line(found: Mapping[str, Any]) -> str:
    if not found["finite"]:
        return "logits are not finite"
    return (
        f"logits off by {found['relative_max']:.1e} of their range at most, {found['rms']:.1e} rms; "
        f"greedy tokens agree {found['top1']:.2%}, sampled {found['sampled']:.2%}"
    )


def _headroom(found: Mapping[str, Any]) -> str:
    if found["overflows"] or not found["finite"]:
        names = [f"{entry['graph']}/{entry['tensor']}" for entry in found["overflows"]]
        return f"OVERFLOW in {len(names)} of {found['probed']} tensors: {', '.join(names[:5])}"
    largest = found["largest"][0]
    return (
        f"largest of {found['probed']} tensors {largest['value']:.4g} ({largest['graph']}/{largest['tensor']}), "
        f"headroom {found['headroom']:,.3g}×; residual stream (float32) {found['stream']:.4g}"
    )


def is_safe(report: Mapping[str, Any]) -> bool:
    """No inf, no nan and nothing beyond the type's largest number, with the weights as they are and scaled."""
    tensors = [report[key] for key in ("tensors", "scaled") if report[key] is not None]
    runs = [report[key]["all"] for key in ("pytorch", "onnxruntime") if report[key] is not None]
    return all(found["finite"] for found in (*tensors, *runs)) and not any(found["overflows"] for found in tensors)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments; exits with code 2 on misuse."""
    parser = argparse.ArgumentParser(
        prog="numerics.py",
        description="Measure what half precision does to a model: logits, tokens, largest values.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser, "checkpoint or run of car_train (else: --vae --var [--car])")
    add_flags(parser, NumericsOptions)
    parser.add_argument("-o", "--output", type=Path, help="write the report there, as JSON (default: stdout)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: nothing overflows; 1: something does; 2: arguments that can't be used."""
    args = parse_args(argv)

    def command(log: Log) -> int:
        options = NumericsOptions(**given(args, NumericsOptions))
        model, _ = load_model(args)
        report = measure(model, options, log)
        text = json.dumps(report, indent=1, allow_nan=False)
        if args.output is None:
            print(text)
        else:
            write_file(args.output, f"{text}\n".encode())
            print(args.output)
        return 0 if is_safe(report) else 1

    return run_command("numerics", command)
