"""Int8 plans: a float32 plan whose large products multiply INT8 (W8A8), made from the plan alone.

Each weight matrix becomes int8 with one scale per output, symmetric. Activations become uint8 with one scale and one
zero point, which are fixed here, on images that the plan itself draws: so an image depends on its seed and not on
what else is in its batch, as in every plan. Sums are int32, and results are float32 again; norms, attention, sampling
and f̂ stay as they were. In the graphs these are the standard's QuantizeLinear and DequantizeLinear around a MatMul.

The convolutions of the control encoder and the decoder are quantized too, except where images and latents pass. Their
results are rounded to uint8 as well.

Per product, the choice with the least error on sampled activations is made:

- where a channel is much larger than the others it takes all of the 256 levels. What comes out of a norm can be
  divided by a vector that is multiplied into the matrix (SmoothQuant, arXiv 2211.10438, equation 4), at no cost: the
  division goes into the norm's own weights, or into what a class's AdaLN scales and shifts by;
- values beyond a share of the range are clipped, if the rest gains more by it;
- a product whose relative error exceeds `rewrite.MAX_ERROR` stays in float32.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from car_export.config import Int8Options
from car_export.errors import ExportError, VerificationError
from car_export.files import plan_written_aside
from car_export.observe import load_graph
from car_export.quantize.rewrite import MAX_ERROR, GraphQuantizer
from car_export.quantize.sites import CONV_GRAPHS, GRAPHS, conv_sites, kind_of, matmul_sites
from car_export.quantize.statistics import ActivationStats, Control, Stats, collect, is_static
from car_export.verify import scene
from car_export.weights import FILE, WeightCopier
from car_runtime import agreement as agreements
from car_runtime.controls import derive
from car_runtime.errors import ImageError
from car_runtime.format import manifest as schema
from car_runtime.format.goldens import read_all_goldens
from car_runtime.plan import open_plan

Log = Callable[[str], None]
IMAGES = 8
"""Synthetic images to calibrate on, unless control images are given."""


def to_int8(options: Int8Options, log: Log = lambda _: None) -> Path:
    """Write the int8 form of a float32 plan, compare it with the plan's goldens, and put it in place.

    Nothing is left at `options.output` if anything fails. Raises ExportError, VerificationError, or the runtime's
    CarError for a plan or an image that can't be read.
    """
    manifest = schema.read_manifest(options.source)
    if manifest.precision.compute != "fp32" or manifest.precision.weights == "int8":
        raise ExportError(
            f"{options.source} computes in {manifest.precision.compute} and stores {manifest.precision.weights}; "
            "an int8 plan is made from a float32 one (--precision fp32)"
        )
    if options.controls and manifest.model.control_type is None:
        raise ExportError(f"the plan {manifest.name!r} takes no control image; leave out --calibrate")
    schema.verify_files(options.source, manifest)
    goldens = read_all_goldens(options.source, manifest)
    controls = _controls(manifest, options.controls)
    with plan_written_aside(options.output) as aside:
        stats = collect(options.source, manifest, controls, log)
        provenance = {"int8 calibration": f"{len(controls)} images, {'given' if options.controls else 'synthetic'}"}
        _write(aside, options, manifest, stats, provenance, log)
        with open_plan(aside, "ort-cpu") as plan:
            compared = [agreements.compare(plan, one) for one in goldens]
        for agreement in compared:
            _judge(agreement, log)
    return options.output


def _judge(agreement: Mapping[str, Any], log: Log) -> None:
    """Raises VerificationError where INT8 is too coarse for this model."""
    whole = agreement["teacher_forced"]["all"]
    log(
        f"vs. PyTorch in float32: {100 * whole['top1']:.1f} % of the most probable codes are equal, divergence "
        f"{whole['divergence']:.2g} nats"
    )
    failed = [check for check in agreements.judge(agreement, agreements.LIMITS["int8"]) if not check["passed"]]
    if failed:
        raise VerificationError(
            "INT8 is too coarse for this model:\n  "
            + "\n  ".join(f"{c['name']}: {c['value']:.3g}, {c['bound']} {c['limit']:g}" for c in failed)
            + "\ncalibrate on control images of its kind (--calibrate), or use --weights fp16"
        )


def _controls(manifest: schema.Manifest, given: Sequence[Path]) -> list[Control]:
    """Control images to calibrate on. Raises ExportError for a folder without any."""
    if not given:
        return list(_synthetic(manifest))
    found: list[Control] = []
    for path in given:
        files = [path]
        if path.is_dir():
            known = Image.registered_extensions()
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in known)
        if not files:
            raise ExportError(f"{path}: no image is there; give control images, or the folder that they are in")
        found += files
    return found


def _synthetic(manifest: schema.Manifest) -> Iterator[Image.Image | None]:
    """Controls derived from images with edges, areas and noise; None for each if the plan takes no control."""
    kind, size = manifest.model.convention, manifest.model.image_size
    for i in range(IMAGES):
        image = Image.fromarray(scene(size, np.random.default_rng(i)))
        if i % 2:
            image = image.transpose(Image.Transpose.ROTATE_90)
        try:
            yield None if kind is None else Image.fromarray(derive(image, kind, size))
        except ImageError:  # a kind that isn't derived from an opaque image
            yield image


# -- writing ---------------------------------------------------------------------------------------------------------


def _write(
    directory: Path,
    options: Int8Options,
    manifest: schema.Manifest,
    stats: Stats,
    provenance: Mapping[str, str],
    log: Log,
) -> None:
    """The int8 plan's files. Static steps and engines, which are for GPUs, are left out."""
    kept = {name: graph for name, graph in manifest.graphs.items() if not is_static(name)}
    weights = WeightCopier(options.source / FILE, directory / FILE)
    tensors = {}
    for name, tensor in manifest.tensors.items():
        offset, _ = weights.copy(tensor.offset, tensor.bytes)
        tensors[name] = dataclasses.replace(tensor, offset=offset)
    left: list[str] = []
    for name, graph in kept.items():
        model = load_graph(options.source, manifest, name)
        if kind_of(name) in GRAPHS:
            mine = {value: found for (at, value), found in stats.items() if at == name}
            left += _quantize_graph(name, model, manifest, weights, mine, log)
        weights.move(model.graph.initializer)
        onnx.save(model, directory / graph.file)
    # Of the table the parameters stay that a step takes in; others are in another form, or not there.
    table = {}
    for name, one in manifest.parameters.items():
        if re.fullmatch(r"branches\.[^.]+\.fusions\..*", name):
            table[name] = dataclasses.replace(one, offset=weights.copy(one.offset, one.bytes)[0])
    weights.close()
    for file in [name for name in manifest.files if name.startswith("goldens.")]:
        shutil.copyfile(options.source / file, directory / file)
    if left:
        log(f"still in float32, with errors above {100 * MAX_ERROR:.0f} %: {', '.join(left)}")
        provenance = {**provenance, "int8 leaves": ", ".join(left)}
    files = schema.describe_files(directory, sorted(p.name for p in directory.iterdir()), manifest.chunk_bytes)
    whole = dataclasses.replace(
        manifest,
        parameters=table,
        parameters_digest=schema.graphs_digest(kept, files) if table else "",
        name=options.name or manifest.name,
        precision=schema.Precision(compute="fp32", weights="int8"),
        tensors=tensors,
        graphs=kept,
        engines=(),
        files=files,
        provenance={**manifest.provenance, **provenance},
    )
    schema.write_manifest(directory, whole)


def _quantize_graph(
    name: str,
    model: onnx.ModelProto,
    manifest: schema.Manifest,
    weights: WeightCopier,
    stats: Mapping[str, ActivationStats],
    log: Log,
) -> list[str]:
    """Rewrite one graph in place; returns the weights whose products stay in float32."""
    quantizer = GraphQuantizer(model, weights, stats)
    matmuls = matmul_sites(model, manifest)
    errors = [quantizer.quantize_matmul(site) for site in matmuls]
    convs = conv_sites(model) if kind_of(name) in CONV_GRAPHS else []
    for conv in convs:
        quantizer.quantize_conv(conv)
    quantizer.finish()
    if matmuls:
        log(
            f"{name}: {len(matmuls) - len(quantizer.left)} of {len(matmuls)} products in INT8, "
            f"median relative error {100 * float(np.median(errors)):.1f} %"
        )
    if convs:
        log(f"{name}: {len(convs)} convolutions in INT8")
    return quantizer.left
