"""Int8 plans: a float32 plan whose large products multiply eight-bit numbers (W8A8), made from the plan alone.

Each matrix becomes int8 with one step size per output, symmetric. What it is multiplied with becomes uint8 with one
step size and one zero point, which are fixed here, from pictures that the plan itself draws: so a picture depends on
its seed and not on what else is in its batch, as in every plan. Sums are int32, and what comes out is float32 again;
norms, attention, sampling and f̂ stay as they were. In the graphs these are the standard's QuantizeLinear and
DequantizeLinear around a MatMul, which ONNX Runtime and OpenVINO make one kernel of (VNNI, AMX).

So are the convolutions of the control encoder and the decoder, where pictures and latents don't come in or go out.
What comes out of them is rounded to uint8 too, which is the form that ONNX Runtime has a kernel for.

Per product, on rows that the plan met, the choice is made that errs least:

- where a channel is much larger than the others it takes all of the 256 steps. What comes out of a norm can be
  divided by a vector that is multiplied into the matrix (SmoothQuant, arXiv 2211.10438, equation 4): for nothing,
  since the division goes into the norm's own weights, or into what a class's AdaLN scales and shifts by;
- values beyond a share of the range are clipped, if the rest gains more by it;
- a product that still errs by more than `WORST` of its result stays in float32.

Shapes: n rows, K inputs, N outputs; R, S, C as in docs/plan-format.md.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from car_export.errors import ExportError
from car_export.plan import written_aside
from car_export.verify import VerificationError, scene
from car_export.weights import FILE, INLINE, Moved
from car_runtime import verify as acceptance
from car_runtime.backends.base import Buffer
from car_runtime.backends.onnxruntime.cpu import OrtCpu
from car_runtime.controls import derive
from car_runtime.errors import ImageError
from car_runtime.format import manifest as schema
from car_runtime.plan import Plan, open_plan
from car_runtime.system.cpu import engine_threads

Log = Callable[[str], None]
Floats = NDArray[np.float32]
_ONE = np.float32(1)

GRAPHS = ("step", "condition", "control", "decoder")
"""What is rewritten; the encoder, which serves editing alone, is not."""
MAPS = ("control", "decoder")
"""Where convolutions are; those of the step add to f̂, which keeps its digits."""
PICTURES = 8
"""Drawn to see what products are given, unless control images are."""
ROWS = 12
"""Kept of what a product is given in one run of its graph."""
RUNS = 96
"""Of which rows are kept: at d16 a thousand, 0.7 GB for all products. After more runs, of these at random."""
LABELS = 32
"""Classes whose conditions are looked at in one run, all of them in turn."""
OUTPUTS = 512
"""Columns of a product by which a choice is judged."""
POWERS = (0.5, 0.7, 0.85, 1.0)
"""How much of a channel's size goes over into the matrix."""
CLIPS = (1.0, 0.9, 0.8)
"""Shares of the range that are kept."""
FEW = 32
"""Channels up to which a convolution stays in float32: pictures and latents come in and go out so."""
WORST = 0.02
"""Error of a product, ÷ the length of its result, from which it stays in float32."""


@dataclass(frozen=True, kw_only=True)
class Int8Options:
    """What to make, besides the plan that it is made from."""

    source: Path
    output: Path
    name: str | None = None
    """The model's name in the manifest; None: that of the plan."""
    controls: tuple[Path, ...] = ()
    """Control images to draw after, files or folders; none: pictures made here."""

    def __post_init__(self) -> None:
        if not self.output.name.endswith(".plan"):
            raise ExportError(f"{self.output}: a plan's name ends in .plan; write e.g. -o {self.output.name}.plan")
        if self.output.resolve() == self.source.resolve():
            raise ExportError(f"{self.output} is the plan to read; choose another name for the int8 one")


@dataclass(frozen=True, kw_only=True)
class Product:
    """A MatMul or Gemm with a matrix of the model."""

    node: onnx.NodeProto
    x: str
    """What is multiplied, [..., K]."""
    weight: TensorProto
    turned: bool
    """Whether the matrix is stored [N, K], as PyTorch has it."""

    @property
    def inputs(self) -> int:
        """K."""
        return int(self.weight.dims[1 if self.turned else 0])


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A Conv with kernels of the model, [N, K, h, w]."""

    node: onnx.NodeProto
    weight: TensorProto
    bias: TensorProto | None


@dataclass
class Seen:
    """What a value was: what a product was given, or a convolution was given or came to."""

    low: Floats
    """[K]; of a convolution, whose values have one range for all channels, []."""
    high: Floats
    rows: list[Floats] = field(default_factory=list)
    """Each [n, K]."""
    runs: int = 0

    def keep(self, rows: Floats, rng: np.random.Generator) -> None:
        """Rows of one run, or in place of an earlier one's: each run is as likely to be kept as any other."""
        self.runs += 1
        if len(self.rows) < RUNS:
            self.rows.append(rows)
        elif (place := int(rng.integers(self.runs))) < RUNS:
            self.rows[place] = rows

    def range(self, by: Floats | np.float32 = _ONE) -> tuple[float, float]:
        """Least and most, divided by a vector; 0 is always between them, as zeros have to stay zeros."""
        return min(float((self.low / by).min()), 0.0), max(float((self.high / by).max()), 0.0)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a product is written in eight bits."""

    scale: np.float32
    """Of x: x ≈ scale · (x8 − zero)."""
    zero: np.uint8
    smoothing: Floats | None
    """[K], what x is divided by and the matrix multiplied with; None: nothing."""
    error: float
    """‖result − exact‖ ÷ ‖exact‖ on the rows that were kept."""


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
    goldens = acceptance.read_goldens(options.source, manifest)
    controls = _controls(manifest, options.controls)
    with written_aside(options.output) as aside:
        seen = observe(options.source, manifest, controls, log)
        provenance = {"int8 calibration": f"{len(controls)} pictures, {'given' if options.controls else 'made up'}"}
        write(aside, options, manifest, seen, provenance, log)
        with open_plan(aside, "ort-cpu") as plan:
            agreement = acceptance.compare(plan, goldens)
        _judge(agreement, log)
    return options.output


def _judge(agreement: Mapping[str, Any], log: Log) -> None:
    """Raises VerificationError where eight bits are too few for this model."""
    whole = agreement["teacher_forced"]["all"]
    log(
        f"beside PyTorch in float32: likeliest codes {100 * whole['top1']:.1f} % equal, divergence "
        f"{whole['divergence']:.2g} nats"
    )
    failed = [check for check in acceptance.judge(agreement, acceptance.LIMITS["int8"]) if not check["passed"]]
    if failed:
        raise VerificationError(
            "eight bits are too few for this model:\n  "
            + "\n  ".join(f"{c['name']}: {c['value']:.3g}, {c['bound']} {c['limit']:g}" for c in failed)
            + "\ncalibrate on control images of its kind (--calibrate), or use --weights fp16"
        )


Control = Image.Image | Path | None


def _controls(manifest: schema.Manifest, given: Sequence[Path]) -> list[Control]:
    """Control images to draw after. Raises ExportError for a folder without any."""
    if not given:
        return list(_made_up(manifest))
    found: list[Control] = []
    for path in given:
        files = [path]
        if path.is_dir():
            known = Image.registered_extensions()
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in known)
        if not files:
            raise ExportError(f"{path}: no picture is there; give control images, or the folder that they are in")
        found += files
    return found


def _made_up(manifest: schema.Manifest) -> Iterator[Image.Image | None]:
    """Pictures with edges, areas and noise, and what controls are made of them; None for a plan that takes none."""
    kind, size = manifest.model.control_type, manifest.model.image_size
    for i in range(PICTURES):
        picture = Image.fromarray(scene(size, np.random.default_rng(i)))
        if i % 2:
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        try:
            yield None if kind is None else Image.fromarray(derive(picture, kind, size))
        except ImageError:  # a kind that isn't derived from an opaque picture
            yield picture


# ---- What products are given ----


def observe(
    source: Path, manifest: schema.Manifest, controls: Sequence[Control], log: Log
) -> dict[tuple[str, str], Seen]:
    """Draw a picture after each control image, with classes at random, and all classes' conditions.

    Returns (graph, value) → what was there, for everything that a matrix is multiplied with.
    """
    rng = np.random.default_rng(0)
    backend = _Observer(source, manifest, rng)
    classes = manifest.model.classes
    with Plan(source, manifest, backend, "calibration") as plan:
        labels = np.arange(classes + 1)
        for part in np.array_split(labels, -(-len(labels) // LABELS)):
            outputs = {
                port.name: backend.allocate(
                    tuple(len(part) if dim == "R" else int(dim) for dim in port.shape), port.dtype
                )
                for port in manifest.graphs["condition"].outputs
            }
            backend.run("condition", {"label": part}, outputs)
        for i, control in enumerate(controls):
            plan.generate(control, label=int(rng.integers(classes)), seed=i)
            log(f"calibration: {i + 1} of {len(controls)} pictures")
    return backend.seen


class _Observer(OrtCpu):
    """ONNX Runtime with graphs that also tell what their matrices are multiplied with."""

    def __init__(self, root: Path, manifest: schema.Manifest, rng: np.random.Generator) -> None:
        self.seen: dict[tuple[str, str], Seen] = {}
        self._rng = rng
        self._watched = {
            graph: watched(graph, load_graph(root, manifest, graph), manifest)
            for graph in GRAPHS
            if graph in manifest.graphs
        }
        super().__init__(root, manifest, engine_threads())
        for graph in self._watched:
            self._inputs[graph] |= {"observed_rows"}

    def _source(self, graph: str) -> bytes | str:
        """The graph with three more outputs for each value: the least and the most per channel, and some rows."""
        if graph not in self._watched:
            return super()._source(graph)
        model = load_graph(self._root, self._manifest, graph)
        g = model.graph
        g.input.append(helper.make_tensor_value_info("observed_rows", TensorProto.INT64, [ROWS]))
        g.initializer.append(numpy_helper.from_array(np.array([0]), "observed_first"))
        for i, (x, K) in enumerate(self._watched[graph].items()):
            low, high, some = (f"observed_{what}_{i}" for what in ("low", "high", "some"))
            shape = [] if K is None else [K]
            if K is None:
                ends = [x]
            else:
                flat, rows = f"observed_flat_{i}", f"observed_rows_{i}"
                g.initializer.append(numpy_helper.from_array(np.array([-1, K]), f"{flat}_shape"))
                g.node.extend(
                    [
                        helper.make_node("Reshape", [x, f"{flat}_shape"], [flat]),
                        helper.make_node("Shape", [flat], [f"{flat}_rows"], start=0, end=1),
                        helper.make_node("Mod", ["observed_rows", f"{flat}_rows"], [rows]),
                        helper.make_node("Gather", [flat, rows], [some], axis=0),
                    ]
                )
                g.output.append(helper.make_tensor_value_info(some, TensorProto.FLOAT, [ROWS, K]))
                ends = [flat, "observed_first"]
            for kind, end in (("ReduceMin", low), ("ReduceMax", high)):
                g.node.append(helper.make_node(kind, ends, [end], keepdims=0))
                g.output.append(helper.make_tensor_value_info(end, TensorProto.FLOAT, shape))
        content: bytes = model.SerializeToString()
        return content

    def _options(self, graph: str) -> Any:
        options = super()._options(graph)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._root))
        return options

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run a graph and remember what it tells."""
        values = self._watched.get(graph)
        if values is None:
            super().run(graph, inputs, outputs)
            return
        numbers = self._rng.integers(1 << 31, size=ROWS)
        told: dict[str, Floats] = {}
        for i, K in enumerate(values.values()):
            shape = () if K is None else (K,)
            told |= {f"observed_{what}_{i}": np.empty(shape, np.float32) for what in ("low", "high")}
            if K is not None:
                told[f"observed_some_{i}"] = np.empty((ROWS, K), np.float32)
        super().run(graph, {**inputs, "observed_rows": numbers}, {**outputs, **told})
        for i, (x, K) in enumerate(values.items()):
            low, high = told[f"observed_low_{i}"], told[f"observed_high_{i}"]
            seen = self.seen.setdefault((graph, x), Seen(low, high))
            seen.low, seen.high = np.minimum(seen.low, low), np.maximum(seen.high, high)
            if K is not None:
                seen.keep(told[f"observed_some_{i}"], self._rng)


def watched(graph: str, model: onnx.ModelProto, manifest: schema.Manifest) -> dict[str, int | None]:
    """Values whose ranges are needed: what goes into products, with the number of channels, and into and out of
    convolutions, with None."""
    values: dict[str, int | None] = {product.x: product.inputs for product in products(model, manifest)}
    for convolution in convolutions(model) if graph in MAPS else ():
        values |= dict.fromkeys((convolution.node.input[0], convolution.node.output[0]))
    return values


def load_graph(root: Path, manifest: schema.Manifest, graph: str) -> onnx.ModelProto:
    """A graph of a plan, its weights left where they are."""
    return onnx.load(root / manifest.graphs[graph].file, load_external_data=False)


def products(model: onnx.ModelProto, manifest: schema.Manifest) -> list[Product]:
    """Products with a matrix of the model, but for those of f̂'s few channels, which cost nothing."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    found = []
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        name, turned = node.input[1], node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1
        while name in makers and makers[name].op_type in ("Transpose", "Cast"):
            turned ^= makers[name].op_type == "Transpose"
            name = makers[name].input[0]
        weight = weights.get(name)
        if weight is None or len(weight.dims) != 2 or node.input[0] in weights:
            continue
        product = Product(node=node, x=node.input[0], weight=weight, turned=turned)
        if product.inputs > manifest.model.latent_channels:
            found.append(product)
    return found


def convolutions(model: onnx.ModelProto) -> list[Convolution]:
    """Convolutions with kernels of the model, but for those of few channels: few operations, and what a picture comes
    in or goes out by."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}

    def stored(name: str) -> TensorProto | None:
        while name in makers and makers[name].op_type == "Cast":
            name = makers[name].input[0]
        return weights.get(name)

    found = []
    for node in graph.node:
        if node.op_type != "Conv" or (weight := stored(node.input[1])) is None:
            continue
        bias = stored(node.input[2]) if len(node.input) > 2 else None
        if min(weight.dims[:2]) > FEW and (bias is not None or len(node.input) < 3):
            found.append(Convolution(node=node, weight=weight, bias=bias))
    return found


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


# ---- Choosing ----


def _plain(weight: TensorProto) -> str:
    """A weight's own name."""
    return weight.name.removesuffix(".f16").removesuffix(".T")


def fit(matrix_NK: Floats, seen: Seen, foldable: bool) -> Form:
    """The form of a product that errs least on the rows that were kept.

    foldable: whether x may be divided channel by channel.
    """
    judge = _Judge(matrix_NK, seen)
    best: Form | None = None
    for power in (None, *POWERS) if foldable else (None,):
        smoothing = None if power is None else _smoothing(matrix_NK, seen, power)
        low, high = seen.range(_ONE if smoothing is None else smoothing)
        errs = judge.of(smoothing)
        for clip in CLIPS:
            scale, zero = steps_of(low * clip, high * clip)
            error = errs(scale, zero)
            if best is None or error < best.error:
                best = Form(scale=scale, zero=zero, smoothing=smoothing, error=error)
    assert best is not None
    return best


class _Judge:
    """How much a product errs in eight bits, on the rows that were kept and some of its outputs."""

    def __init__(self, matrix_NK: Floats, seen: Seen) -> None:
        self._rows_nK = np.concatenate(seen.rows)
        self._some_NK = matrix_NK[:: -(-len(matrix_NK) // OUTPUTS)]
        self._exact_nN = self._rows_nK @ self._some_NK.T
        self._size = max(float(np.linalg.norm(self._exact_nN)), 1e-30)

    def of(self, smoothing: Floats | None) -> Callable[[np.float32, np.uint8], float]:
        """From step size and zero point of x to the error, ÷ the length of the result."""
        by = _ONE if smoothing is None else smoothing
        weights, steps = eight_bits(self._some_NK * by)
        rounded_KN = (weights * steps[:, None]).T
        rows_nK = self._rows_nK / by

        def error(scale: np.float32, zero: np.uint8) -> float:
            x8 = np.clip(np.round(rows_nK / scale) + np.float32(zero), 0, 255) - np.float32(zero)
            return float(np.linalg.norm((x8 * scale) @ rounded_KN - self._exact_nN)) / self._size

        return error


def steps_of(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Step size and zero point of uint8 numbers for this range, which 0 is in."""
    scale = np.float32(max((high - low) / 255, 1e-30))
    return scale, np.uint8(np.clip(np.round(-low / scale), 0, 255))


def _smoothing(matrix_NK: Floats, seen: Seen, power: float) -> Floats:
    """SmoothQuant's vector, [K], of geometric mean 1."""
    largest_x = np.maximum(np.maximum(-seen.low, seen.high), 1e-5)
    largest_w = np.maximum(np.abs(matrix_NK).max(0), 1e-5)
    logs = power * np.log(largest_x) - (1 - power) * np.log(largest_w)
    smoothing: Floats = np.exp(logs - logs.mean()).astype(np.float32)
    return smoothing


def eight_bits(matrix_N: Floats) -> tuple[NDArray[np.int8], Floats]:
    """A matrix [N, K], or kernels [N, K, h, w], as int8 in −127…127, and the step size of each output, f32 [N]."""
    steps = (np.abs(matrix_N).reshape(len(matrix_N), -1).max(1) / 127).astype(np.float32)
    steps[steps == 0] = 1
    each = steps.reshape(-1, *[1] * (matrix_N.ndim - 1))
    return np.clip(np.round(matrix_N / each), -127, 127).astype(np.int8), steps


# ---- Writing ----


def write(
    directory: Path,
    options: Int8Options,
    manifest: schema.Manifest,
    seen: Mapping[tuple[str, str], Seen],
    provenance: Mapping[str, str],
    log: Log,
) -> None:
    """The int8 plan's files. Static steps and engines, which are for GPUs, are left out."""
    kept = {name: graph for name, graph in manifest.graphs.items() if not name.startswith("step.")}
    weights = Moved(options.source / FILE, directory / FILE)
    tensors = {}
    for name, tensor in manifest.tensors.items():
        offset, _ = weights.piece(tensor.offset, tensor.bytes)
        tensors[name] = dataclasses.replace(tensor, offset=offset)
    left: list[str] = []
    for name, graph in kept.items():
        model = load_graph(options.source, manifest, name)
        if name in GRAPHS:
            rewriter = _Rewriter(model, weights, {value: s for (at, value), s in seen.items() if at == name})
            found = products(model, manifest)
            errors = [rewriter.rewrite(product) for product in found]
            maps = convolutions(model) if name in MAPS else []
            for convolution in maps:
                rewriter.rewrite_convolution(convolution)
            rewriter.finish()
            left += rewriter.left
            if found:
                log(
                    f"{name}: {len(found) - len(rewriter.left)} of {len(found)} products in int8, "
                    f"off by {100 * float(np.median(errors)):.1f} % of their results (median)"
                )
            if maps:
                log(f"{name}: {len(maps)} convolutions in int8")
        weights.move(model.graph.initializer)
        onnx.save(model, directory / graph.file)
    weights.close()
    shutil.copyfile(options.source / acceptance.GOLDENS, directory / acceptance.GOLDENS)
    if left:
        log(f"in float32 still, being off by more than {100 * WORST:.0f} %: {', '.join(left)}")
        provenance = {**provenance, "int8 leaves": ", ".join(left)}
    whole = dataclasses.replace(
        manifest,
        name=options.name or manifest.name,
        precision=schema.Precision(compute="fp32", weights="int8"),
        tensors=tensors,
        graphs=kept,
        engines=(),
        files=schema.describe_files(directory, sorted(p.name for p in directory.iterdir()), manifest.chunk_bytes),
        provenance={**manifest.provenance, **provenance},
    )
    schema.write_manifest(directory, whole)


class _Rewriter:
    """One graph: products become int8 where that does little harm."""

    def __init__(self, model: onnx.ModelProto, weights: Moved, seen: Mapping[str, Seen]) -> None:
        self.graph, self.weights, self.seen = model.graph, weights, seen
        self.left: list[str] = []
        """Matrices that stay in float32."""
        self._initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self._makers = {output: node for node in self.graph.node for output in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._forms: dict[str, Form] = {}
        self._before: dict[str, list[onnx.NodeProto]] = {}
        self._after: dict[str, list[onnx.NodeProto]] = {}
        """First output of a node → what goes before it, and after it."""

    def rewrite(self, product: Product) -> float:
        """Rewrite a product, or leave it; returns its error in int8."""
        node, x, name = product.node, product.x, _plain(product.weight)
        stored = self.weights.array(product.weight)
        matrix_NK = np.asarray(stored if product.turned else stored.T, np.float32)
        fold = self._fold(x) if len(self._readers[x]) == 1 else None
        form = self._forms.get(x)
        if form is None:
            form = fit(matrix_NK, self.seen[x], fold is not None)
            error = form.error
        else:  # x is rounded already, for another matrix
            error = _Judge(matrix_NK, self.seen[x]).of(form.smoothing)(form.scale, form.zero)
        if error > WORST:
            self.left.append(name)
            return error
        output, *_ = node.output
        before = self._before.setdefault(output, [])
        if x not in self._forms:
            self._forms[x] = form
            if fold is not None and form.smoothing is not None:
                fold(form.smoothing)
            before += self._rounded(x, f"{x}.int8", form.scale, form.zero)
        matrix, steps = eight_bits(matrix_NK if form.smoothing is None else matrix_NK * form.smoothing)
        before.append(self._widened(name, np.ascontiguousarray(matrix.T), steps, axis=1))
        bias = list(node.input[2:])
        last = helper.make_node("MatMul", [f"{x}.int8", f"{name}.int8"], [output], name=node.name)
        if bias:  # a Gemm's; they have no factors, and no transposes but of the matrix
            last.output[0] = f"{output}.product"
            before.append(last)
            last = helper.make_node("Add", [last.output[0], *bias], [output], name=f"{node.name}_bias")
        node.CopyFrom(last)
        return error

    def rewrite_convolution(self, convolution: Convolution) -> None:
        """Let a convolution take uint8 and give uint8."""
        node, name = convolution.node, _plain(convolution.weight)
        (x, *_), (output,) = node.input, node.output
        before = self._before.setdefault(output, [])
        scale, zero = steps_of(*self.seen[x].range())
        if f"{x}.int8" not in self._makers:
            before += self._rounded(x, f"{x}.int8", scale, zero)
            self._makers[f"{x}.int8"] = before[-1]
        kernels, steps = eight_bits(np.asarray(self.weights.array(convolution.weight), np.float32))
        if f"{name}.numbers" in self._initializers:
            # Another convolution has them too. Each gets names of its own for the same bytes: ONNX Runtime rewrites
            # the kernels of each on CPUs without VNNI, and fails where it finds that done.
            for part in ("numbers", "steps", "zeros"):
                old, new = f"{name}.{part}", f"{output}.kernels.{part}"
                self._initializers[new] = self.weights.again(self._initializers[old], new)
            name = f"{output}.kernels"
            parts = [f"{name}.{part}" for part in ("numbers", "steps", "zeros")]
            before.append(helper.make_node("DequantizeLinear", parts, [f"{name}.int8"], axis=0, name=f"{name}.widen"))
        else:
            before.append(self._widened(name, kernels, steps, axis=0))
        inputs = [f"{x}.int8", f"{name}.int8"]
        if convolution.bias is not None:
            bias = np.asarray(self.weights.array(convolution.bias), np.float64)
            whole = np.clip(np.round(bias / (np.float64(scale) * steps)), -(2**31), 2**31 - 1).astype(np.int32)
            before.append(self._widened(f"{output}.bias", whole, (scale * steps).astype(np.float32), axis=0))
            inputs.append(f"{output}.bias.int8")
        del node.input[:]
        node.input.extend(inputs)
        node.output[0] = f"{output}.sum"
        self._before[node.output[0]] = self._before.pop(output)
        self._after[node.output[0]] = self._rounded(f"{output}.sum", output, *steps_of(*self.seen[output].range()))

    def _rounded(self, x: str, result: str, scale: np.float32, zero: np.uint8) -> list[onnx.NodeProto]:
        """Nodes that make `result` of x, which it is to the next of 256 steps."""
        step = [self._add(f"{x}.scale", scale), self._add(f"{x}.zero", zero)]
        return [
            helper.make_node("QuantizeLinear", [x, *step], [f"{x}.uint8"], name=f"{x}.round"),
            helper.make_node("DequantizeLinear", [f"{x}.uint8", *step], [result], name=f"{x}.widen"),
        ]

    def _widened(self, name: str, numbers: np.ndarray, steps: Floats, axis: int) -> onnx.NodeProto:
        """A node that makes NAME.int8 of whole numbers and their step sizes."""
        parts = [self._add(f"{name}.numbers", numbers), self._add(f"{name}.steps", steps)]
        if numbers.dtype == np.int8:  # where they have to become uint8, ONNX Runtime would else give them one for all
            parts.append(self._add(f"{name}.zeros", np.zeros(len(steps), np.int8)))
        return helper.make_node("DequantizeLinear", parts, [f"{name}.int8"], axis=axis, name=f"{name}.widen")

    def finish(self) -> None:
        """Put the new nodes where they belong, and drop what nobody reads any more."""
        nodes: list[onnx.NodeProto] = []
        for node in self.graph.node:
            (first, *_) = node.output
            nodes += [*self._before.get(first, []), copy.deepcopy(node), *self._after.get(first, [])]
        wanted = {output.name for output in self.graph.output}
        used = []
        for node in reversed(nodes):  # in the order of the graph: readers come after what they read
            if wanted.intersection(node.output):
                used.append(node)
                wanted.update(node.input)
        del self.graph.node[:]
        self.graph.node.extend(reversed(used))
        tensors = [tensor for tensor in self._initializers.values() if tensor.name in wanted]
        del self.graph.initializer[:]
        self.graph.initializer.extend(tensors)

    def _fold(self, x: str) -> Callable[[Floats], None] | None:
        """What divides x by a vector, channel by channel, without touching x itself; None where nothing can.

        A norm's own weights, or LN(h)·(1 + scale) + shift, as AdaLN has it (DiT, arXiv 2212.09748).
        """
        maker = self._makers.get(x)
        if maker is None:
            return None
        if maker.op_type == "LayerNormalization":
            own = [(i, self._constant(name)) for i, name in enumerate(maker.input) if i and name]
            if not own or any(array is None for _, array in own):
                return None

            def divide_weights(by: Floats) -> None:
                for i, array in own:
                    assert array is not None
                    maker.input[i] = self._add(f"{x}.norm{i}", (array / by).astype(np.float32))

            return divide_weights
        scaled = self._makers.get(maker.input[0]) if maker.op_type == "Add" else None
        factor = self._makers.get(scaled.input[1]) if scaled is not None and scaled.op_type == "Mul" else None
        if scaled is None or factor is None or factor.op_type != "Add" or self._readers[maker.input[0]] != [maker]:
            return None
        if not all(self._is_modulation(name) for name in (maker.input[1], factor.input[0])):
            return None

        def divide_modulation(by: Floats) -> None:
            inverse = self._add(f"{x}.smoothing", (1 / by).astype(np.float32))
            for reader in (maker, scaled):
                divided = f"{reader.input[1]}.smooth"
                divide = helper.make_node("Mul", [reader.input[1], inverse], [divided], name=f"{divided}.divide")
                self._before.setdefault(reader.output[0], []).append(divide)
                reader.input[1] = divided

        return divide_modulation

    def _is_modulation(self, name: str) -> bool:
        """Whether this is a part of the modulation: a row for each picture, not for each token."""
        maker = self._makers.get(name)
        while maker is not None and maker.op_type in ("Split", "Transpose", "Slice", "Unsqueeze", "Reshape"):
            name, maker = maker.input[0], self._makers.get(maker.input[0])
        return maker is None and name == "modulation"

    def _constant(self, name: str) -> Floats | None:
        while name in self._makers and self._makers[name].op_type == "Cast":
            name = self._makers[name].input[0]
        tensor = self._initializers.get(name)
        return None if tensor is None else np.asarray(self.weights.array(tensor), np.float32)

    def _add(self, name: str, value: np.ndarray | np.generic) -> str:
        """A new initializer, in `weights.bin` unless it is small; returns its name."""
        array = np.asarray(value)
        assert name not in self._initializers, name
        if array.size < INLINE:
            tensor = numpy_helper.from_array(array, name)
        else:
            tensor = self.weights.add(name, array)
        self._initializers[name] = tensor
        return name
