"""What half precision does to a model: logits, tokens, and how far its values are from overflowing.

    python export/numerics.py CHECKPOINT -o numerics.json

Teacher forcing makes the scales comparable: the float32 PyTorch model draws greedily, and every other computation is
given its tokens, scale after scale, but keeps its own cache, f̂ and inputs. Three things are measured:

- **onnxruntime**: the very graphs of the plan. ONNX Runtime has no half-precision kernels for most operators on a CPU
  and computes chains of them in float32, so this is the kind side.
- **pytorch**: the model in that type, every operator's result rounded to it: the strict side. Engines that fuse lie
  between the two.
- **tensors**: the largest |value| of every half-precision tensor inside the graphs, against the largest that the type
  holds; then once more with all weights that write into the residual stream × `factor`.

Shapes, for one picture: K scales; S side of a scale; N tokens of a scale; L tokens of the picture; V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import car_runtime.errors
from car_export.plan import ExportError, ExportOptions, PlanBuilder
from car_export.verify import scene
from car_runtime.controls import derive
from car_runtime.format import manifest as schema
from car_train import checkpoint
from car_train.config import ConfigError
from car_train.interop import official
from car_train.interop.command import add_official_arguments
from car_train.model import Model
from car_train.model.sample import TOP_P_OFF, Recording, control_pyramid, draw, mix, sample
from car_train.model.vqvae import split_tokens

Log = Callable[[str], None]
Arrays = dict[str, np.ndarray]

FP16_MAX = 65504.0
FACTOR = 10.0
WRITERS = re.compile(r"\.(attn\.proj|proj_out|mlp\.fc2|conv2|fusions\.\d+\.linear)\.(weight|bias)(\.T)?$")
"""Parameters whose products are added to a residual stream, the transformer's or the tokenizer's, or are it."""
SHOWN = 12
"""Tensors that a report lists, largest first."""
EXAMPLES = """examples:
  python export/numerics.py runs/car
  python export/numerics.py --vae vae_ch160v4096z32.pth --var var_d16.pth --car car_depth_d16.pth \\
      --control-type depth -o d16-numerics.json
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One picture's inputs, and what the float32 model makes of them."""

    cfg: float
    top_k: int
    top_p: float
    label: int
    picture: np.ndarray
    """uint8 [s, s, 3]."""
    pyramid: list[Tensor] | None
    controls: list[np.ndarray]
    """uint8 [s, s, 3] per scale; empty without a control branch."""
    uniforms: Tensor
    """f32 [L]."""
    tokens: Tensor
    """int64 [L], greedy."""
    logits: Tensor
    """f32 [L, V], guided."""


@torch.no_grad()
def make_case(reference: Model, cfg: float, top_k: int, top_p: float) -> Case:
    """Canny edges of a made-up picture, the middle class, and a greedy run of the float32 model."""
    car, config = reference.car, reference.config.vqvae
    assert car is not None
    picture = scene(config.image_size, np.random.default_rng(0))
    pyramid, controls = None, []
    if car.branch is not None:
        edges = Image.fromarray(derive(Image.fromarray(picture), "canny", config.image_size))
        sizes = [side * config.patch for side in config.sides]
        pyramid, controls = control_pyramid(edges, sizes), [np.asarray(edges.resize((s, s))) for s in sizes]
    uniforms = torch.from_numpy(np.random.default_rng(0).random((1, config.tokens), dtype=np.float32))
    label, record = car.base.config.classes // 2, Recording()
    tokens, _ = sample(reference.vqvae, car, torch.tensor([label]), uniforms, pyramid, cfg, top_k=1, record=record)
    return Case(
        cfg=cfg,
        top_k=min(top_k, config.vocab) or config.vocab,
        top_p=top_p if 0 < top_p < 1 else TOP_P_OFF,
        label=label,
        picture=picture,
        pyramid=pyramid,
        controls=controls,
        uniforms=uniforms[0],
        tokens=tokens[0],
        logits=torch.cat([scale["logits"] for scale in record.scales], 1)[0],
    )


# -- comparing -----------------------------------------------------------------------------------------------------


def compare(case: Case, logits_LV: Tensor, sides: tuple[int, ...]) -> dict[str, Any]:
    """Logits and what is drawn from them, per scale and over all: the keys are explained in `measure`."""
    scales, start = [], 0
    for side in sides:
        stop = start + side * side
        scales.append({"side": side, **_compared(case, logits_LV, slice(start, stop))})
        start = stop
    return {"scales": scales, "all": _compared(case, logits_LV, slice(0, start))}


def _compared(case: Case, logits_LV: Tensor, part: slice) -> dict[str, Any]:
    want, got = case.logits[part], logits_LV[part]
    span = float(case.logits.abs().max())
    error = (got - want).abs()
    keep = torch.tensor([case.top_k]), torch.tensor([case.top_p])
    drawn = [draw(logits, case.uniforms[part], *keep) for logits in (want, got)]
    flipped = want.argmax(-1) != got.argmax(-1)
    gaps = want.amax(-1) - want.gather(-1, got.argmax(-1, keepdim=True))[:, 0]
    finite = bool(torch.isfinite(got).all())
    return {
        "finite": finite,
        "max": float(error.max()) if finite else None,
        "rms": float(error.square().mean().sqrt()) if finite else None,
        "relative_max": float(error.max()) / span if finite else None,
        "top1": float((~flipped).float().mean()),
        "largest_flipped_gap": float(gaps[flipped].max()) / span if bool(flipped.any()) else 0.0,
        "sampled": float((drawn[0] == drawn[1]).float().mean()),
    }


class Rounding(TorchDispatchMode):
    """Products of half-precision tensors as tensor cores make them: summed in float32, the result rounded.

    On CPUs without such instructions PyTorch's own half-precision kernels are up to a hundred times as slow.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        halves = {a.dtype for a in args if isinstance(a, Tensor) and a.dtype in (torch.float16, torch.bfloat16)}
        if func.overloadpacket not in _PRODUCTS or not halves:
            return func(*args, **given)
        widened = [a.float() if isinstance(a, Tensor) else a for a in args]
        result = func(*widened, **{k: v.float() if isinstance(v, Tensor) else v for k, v in given.items()})
        (dtype,) = halves
        return result.to(dtype) if isinstance(result, Tensor) else (result[0].to(dtype), *result[1:])


_PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.convolution,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
}


@torch.no_grad()
def torch_logits(model: Model, case: Case) -> Tensor:
    """Guided logits [L, V] of a model in any type, teacher-forced in one pass: every operator's result is rounded."""
    car, config = model.car, model.config.vqvae
    assert car is not None
    grids = split_tokens(case.tokens[None], config.sides)
    _, inputs = model.vqvae.quantizer.decode(grids)
    labels = torch.tensor([case.label, car.base.config.classes])
    with Rounding():
        logits_2LV = car(labels, inputs.repeat(2, 1, 1), case.pyramid)
    ratio = torch.cat([torch.full((s * s,), r) for s, r in zip(config.sides, config.ratios, strict=True)])
    return mix(logits_2LV, case.cfg * ratio[:, None], 1)[0]


# -- the graphs ------------------------------------------------------------------------------------------------------


@dataclass
class Graphs:
    """The graphs of a plan in ONNX Runtime. With `probe`, the largest |value| of their inner tensors is kept.

    `factor`: what the parameters that `WRITERS` names are multiplied by.
    """

    directory: Path
    probe: bool = False
    factor: float = 1.0
    largest: dict[tuple[str, str], float] = field(default_factory=dict)
    """(graph, tensor) → largest |value| of a half-precision tensor."""
    stream: float = 0.0
    """The largest |value| of the residual stream, which is float32."""
    scaled: list[str] = field(default_factory=list)
    """The parameters that were multiplied."""

    def __post_init__(self) -> None:
        self.manifest = schema.read_manifest(self.directory)
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._probes: dict[str, list[tuple[str, bool]]] = {}
        self._values: list[ort.OrtValue] = []  # a session reads them from here

    def run(self, graph: str, feed: Mapping[str, np.ndarray]) -> Arrays:
        """The graph's outputs by name. Inputs that it does not have are left out."""
        if graph not in self._sessions:
            self._sessions[graph] = self._open(graph)
        session, probes = self._sessions[graph], self._probes[graph]
        present = {port.name for port in session.get_inputs()}
        names = [port.name for port in session.get_outputs()]
        got = dict(zip(names, session.run(None, {n: a for n, a in feed.items() if n in present}), strict=True))
        for name, is_stream in probes:
            value = float(got.pop(f"largest.{name}"))
            value = np.inf if np.isnan(value) else value
            if is_stream:
                self.stream = max(self.stream, value)
            else:
                self.largest[graph, name] = max(self.largest.get((graph, name), 0.0), value)
        return got

    def _open(self, graph: str) -> ort.InferenceSession:
        model = onnx.load(self.directory / self.manifest.graphs[graph].file, load_external_data=False)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.directory))
        self._probes[graph] = add_probes(model) if self.probe else []
        if self.factor != 1:
            self._scale(model, options)
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _scale(self, model: onnx.ModelProto, options: ort.SessionOptions) -> None:
        """Multiply the writers: those inside the graph there, those in weights.bin as they are loaded."""
        external: Arrays = {}
        for tensor in model.graph.initializer:
            if WRITERS.search(tensor.name) is None:
                continue
            self.scaled.append(tensor.name)
            if tensor.data_location != TensorProto.EXTERNAL:
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array((array * self.factor).astype(array.dtype), tensor.name))
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            weights = self.directory / place["location"]
            array = np.memmap(weights, dtype, "r", int(place["offset"]), tuple(tensor.dims))
            external[tensor.name] = (array.astype(np.float32) * self.factor).astype(dtype)
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in external.values()]
        self._values += values
        if external:
            options.add_external_initializers(list(external), values)

    def logits(self, case: Case) -> Tensor:
        """Guided logits [L, V] of the whole chain of graphs, every one fed by the others, on the case's tokens."""
        model, cfg = self.manifest.model, np.array([case.cfg], np.float32)
        classes = np.array([case.label, model.classes])
        condition = self.run("condition", {"label": classes})
        features = None
        if case.controls:
            images = {f"control_{k}": image for k, image in enumerate(case.controls)}
            features = self.run("control", images)["features"]
        step = self.manifest.graphs["step"]
        cache = {
            port.name.replace("new_", "past_"): np.zeros((0, 2, *map(int, port.shape[2:])), port.dtype)
            for port in step.outputs
            if port.name.startswith("new_")
        }
        x, logits = condition["start"], []
        f_hat = np.zeros((1, model.latent_channels, model.latent_size, model.latent_size), np.float32)
        for scale in self.manifest.scales:
            grid, part = (1, scale.side, scale.side), slice(scale.start, scale.stop)
            feed = {
                "x": x,
                "modulation": condition["modulation"],
                "f_hat": f_hat,
                "uniforms": case.uniforms[part].view(grid).numpy(),
                "cfg": cfg,
                "top_k": np.array([case.top_k]),
                "top_p": np.array([case.top_p], np.float32),
                "known": case.tokens[part].view(grid).numpy(),
                "known_mask": np.ones(grid, bool),
                **{port: self._constant(name) for port, name in scale.constants.items()},
                **cache,
            }
            if features is not None:
                feed["control"] = features[part].reshape(scale.side, scale.side, -1)
            got = self.run("step", feed)
            cache = {name: np.concatenate([past, got[name.replace("past_", "new_")]]) for name, past in cache.items()}
            x, f_hat = got["next_x"], got["f_hat_out"]
            logits.append(torch.from_numpy(got["logits"]).reshape(-1, model.vocab))
        self.run("decoder", {"f_hat": f_hat})
        if "encoder" in self.manifest.graphs:
            self.run("encoder", {"image": case.picture[None]})
        return torch.cat(logits)

    def _constant(self, name: str) -> np.ndarray:
        tensor = self.manifest.tensors[name]
        return np.memmap(self.directory / schema.WEIGHTS, tensor.dtype, "r", tensor.offset, tensor.shape)


def add_probes(model: onnx.ModelProto) -> list[tuple[str, bool]]:
    """Add an output `largest.NAME`, f32 [], for every half-precision tensor that a node makes, and for the stream.

    Returns (tensor name, whether it is the float32 residual stream: what the norms read).
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    read_by_norms = {node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    probes = []
    for node in list(model.graph.node):
        for name in filter(None, node.output):
            kind = kinds.get(name)
            is_stream = kind == TensorProto.FLOAT and name in read_by_norms
            if kind != TensorProto.FLOAT16 and not is_stream:
                continue
            probes.append((name, is_stream))
            model.graph.node.extend(
                [
                    helper.make_node("Cast", [name], [f"{name}.as_f32"], to=TensorProto.FLOAT),
                    helper.make_node("Abs", [f"{name}.as_f32"], [f"{name}.abs"]),
                    helper.make_node("ReduceMax", [f"{name}.abs"], [f"largest.{name}"], keepdims=0),
                ]
            )
            model.graph.output.append(helper.make_tensor_value_info(f"largest.{name}", TensorProto.FLOAT, []))
    return probes


# -- the whole measurement -------------------------------------------------------------------------------------------


def measure(
    model: Model,
    *,
    precision: str = "fp16",
    cfg: float = 4.0,
    top_k: int = 900,
    top_p: float = 0.95,
    factor: float = FACTOR,
    log: Log = lambda _: None,
) -> dict[str, Any]:
    """Measure a model in half precision against float32; its weights are rounded to that type in place.

    Returns one JSON object. `onnxruntime` (null for bf16, which ONNX Runtime has no CPU kernels for) and `pytorch`
    have `scales` and `all`, each with `max`, `rms` (errors of the guided logits), `relative_max` (÷ the largest
    |logit| of all), `top1` and `sampled` (share of tokens that agree given the same past; sampled with top_k, top_p
    and one uniform number a token) and `largest_flipped_gap` (by how much of that range a greedy token that differs
    was the largest in float32: small is a near tie). `tensors` and `scaled` have the largest |values|, `headroom` =
    65504 ÷ the largest, and `overflows`: tensors beyond it.

    Raises ExportError for a model that can't be exported.
    """
    settings = {"cfg": cfg, "top_k": top_k, "top_p": top_p, "factor": factor}
    report: dict[str, Any] = {"format": 1, "precision": precision, "settings": settings}
    with tempfile.TemporaryDirectory(prefix="numerics.") as folder:
        directory = Path(folder)
        options = ExportOptions(output=directory / "numerics.plan", name="numerics", precision=precision)
        builder = PlanBuilder(model, options, directory, log)
        reference = builder.reference
        assert reference.car is not None
        facts = reference.car.base.config
        report["model"] = {
            "depth": facts.depth,
            "width": facts.C,
            "heads": facts.H,
            "control": model.config.car is not None,
        }
        sides = reference.config.vqvae.sides
        case = make_case(reference, cfg, top_k, top_p)
        report["logit_range"] = float(case.logits.abs().max())
        log("reference drawn")
        report["pytorch"] = compare(case, torch_logits(builder.model, case), sides)
        log(f"PyTorch in {precision}: {_line(report['pytorch']['all'])}")
        report |= {"onnxruntime": None, "tensors": None, "scaled": None}
        if precision != "bf16":
            builder.build()
            report["onnxruntime"] = compare(case, Graphs(directory).logits(case), sides)
            log(f"ONNX Runtime in {precision}: {_line(report['onnxruntime']['all'])}")
            for key, times in (("tensors", 1.0), ("scaled", factor)):
                report[key] = _largest(Graphs(directory, probe=True, factor=times), case)
                log(f"weights × {times:g}: {_room(report[key])}")
    return report


def _largest(graphs: Graphs, case: Case) -> dict[str, Any]:
    logits = graphs.logits(case)
    found = sorted(graphs.largest.items(), key=lambda item: -item[1])
    top = found[0][1] if found else 0.0
    return {
        "finite": bool(torch.isfinite(logits).all()),
        "probed": len(found),
        "scaled": len(graphs.scaled),
        "headroom": FP16_MAX / top if found and np.isfinite(top) and top > 0 else None,
        "stream": graphs.stream,
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


def _room(found: Mapping[str, Any]) -> str:
    if found["overflows"] or not found["finite"]:
        names = [f"{entry['graph']}/{entry['tensor']}" for entry in found["overflows"]]
        return f"OVERFLOW in {len(names)} of {found['probed']} tensors: {', '.join(names[:5])}"
    largest = found["largest"][0]
    return (
        f"largest of {found['probed']} tensors {largest['value']:.4g} ({largest['graph']}/{largest['tensor']}), "
        f"room × {found['headroom']:.3g}; residual stream (float32) {found['stream']:.4g}"
    )


def is_safe(report: Mapping[str, Any]) -> bool:
    """No inf, no nan and nothing beyond the type's largest number, with the weights as they are and scaled."""
    parts = [report[key] for key in ("tensors", "scaled") if report[key] is not None]
    runs = [report[key]["all"] for key in ("pytorch", "onnxruntime") if report[key] is not None]
    return all(part["finite"] for part in (*parts, *runs)) and not any(part["overflows"] for part in parts)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="numerics.py",
        description="Measure what half precision does to a model: logits, tokens, largest values.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="checkpoint or run of car_train (else: --vae --var [--car])"
    )
    add_official_arguments(parser)
    parser.add_argument("--precision", choices=["fp16", "bf16"], default="fp16", help="(default: fp16)")
    parser.add_argument("--cfg", type=float, default=4.0, help="guidance (default: 4)")
    parser.add_argument("--top-k", type=int, default=900, help="for the sampled tokens, 0 = off (default: 900)")
    parser.add_argument("--top-p", type=float, default=0.95, help="for the sampled tokens, 0 = off (default: 0.95)")
    parser.add_argument(
        "--factor", type=float, default=FACTOR, help="scale of the weights in the overflow test (default: 10)"
    )
    parser.add_argument("-o", "--output", type=Path, help="write the report there, as JSON (default: stdout)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: nothing overflows; 1: something does; 2: arguments that can't be used."""
    from car_export.cli import load_model

    args, began = parse_args(argv), time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        model, _ = load_model(args)
        report = measure(
            model,
            precision=args.precision,
            cfg=args.cfg,
            top_k=args.top_k,
            top_p=args.top_p,
            factor=args.factor,
            log=log,
        )
        text = json.dumps(report, indent=1, allow_nan=False)
        if args.output is None:
            print(text)
        else:
            aside = args.output.with_name(f".{args.output.name}.{os.getpid()}")
            aside.write_text(text + "\n", encoding="utf-8")
            os.replace(aside, args.output)
            print(args.output)
    except (
        ConfigError,
        ExportError,
        checkpoint.CheckpointError,
        official.OfficialCheckpointError,
        car_runtime.errors.CarError,
        OSError,
    ) as error:
        print(f"numerics: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("numerics: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0 if is_safe(report) else 1
