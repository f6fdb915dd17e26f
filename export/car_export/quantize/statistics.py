"""Activation statistics: what products and convolutions of a float32 plan are given while it draws images.

The runtime's own loop draws; the backend below adds outputs to each graph and keeps what they report.

Shapes: n sampled rows, K channels; R as in docs/reference/plan-format.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from car_export.observe import ObservedOrtCpu, load_graph
from car_export.quantize.sites import GRAPHS, kind_of, observed_values
from car_runtime.backends.base import Buffer
from car_runtime.backends.numpy_buffers import array_of
from car_runtime.config import GenerationConfig
from car_runtime.format import manifest as schema
from car_runtime.plan import Plan

Log = Callable[[str], None]
Floats = NDArray[np.float32]
Control = Image.Image | Path | None
_ONE = np.float32(1)

ROWS = 12
"""Rows of an activation that are sampled in one run of its graph."""
RUNS = 96
"""Runs whose rows are kept: at d16 a thousand rows, 0.7 GB for all products. Later runs replace earlier ones."""
LABELS = 32
"""Classes whose conditions are computed in one run; every class gets its turn."""


@dataclass
class ActivationStats:
    """The range of an activation, and a sample of its rows."""

    low: Floats
    """f32 [K]; [] for a convolution, whose activations have one range for all channels."""
    high: Floats
    rows: list[Floats] = field(default_factory=list)
    """Each f32 [n, K]."""
    runs: int = 0

    def sample(self, rows: Floats, rng: np.random.Generator) -> None:
        """Keep the rows of one run (reservoir sampling: every run is equally likely to be kept)."""
        self.runs += 1
        if len(self.rows) < RUNS:
            self.rows.append(rows)
        elif (place := int(rng.integers(self.runs))) < RUNS:
            self.rows[place] = rows

    def range(self, divisor: Floats | np.float32 = _ONE) -> tuple[float, float]:
        """Minimum and maximum after division by a vector [K]; 0 is always included, as zeros have to stay zeros."""
        return min(float((self.low / divisor).min()), 0.0), max(float((self.high / divisor).max()), 0.0)


Stats = dict[tuple[str, str], ActivationStats]
"""(graph, value) → statistics."""


def collect(source: Path, manifest: schema.Manifest, controls: Sequence[Control], log: Log) -> Stats:
    """Compute all classes' conditions, then draw one image per control, of a random class; returns the statistics of
    every activation that a weight of the model is multiplied with."""
    rng = np.random.default_rng(0)
    backend = _RangeObserver(source, manifest, rng)
    classes = manifest.model.classes
    with Plan(source, manifest, backend, "calibration") as plan:
        labels = np.arange(classes + 1)
        for condition in [graph for graph in rewritten(manifest) if kind_of(graph) == "condition"]:
            for some in np.array_split(labels, -(-len(labels) // LABELS)):
                outputs = {
                    port.name: backend.allocate(
                        tuple(len(some) if dim == "R" else int(dim) for dim in port.shape), port.dtype
                    )
                    for port in manifest.graphs[condition].outputs
                }
                backend.run(condition, {"label": some}, outputs)
        for i, control in enumerate(controls):
            label = int(rng.integers(classes))
            for branch in manifest.model.branches or ("",):
                given = {branch: control} if branch and control is not None else control
                plan.generate(GenerationConfig(control=given, label=label, seed=i))
            log(f"calibration: {i + 1} of {len(controls)} images")
    return backend.stats


def rewritten(manifest: schema.Manifest) -> list[str]:
    """The graphs that an int8 plan has in another form: of a kind in `GRAPHS`, and no static form of one."""
    return [name for name in manifest.graphs if kind_of(name) in GRAPHS and not is_static(name)]


def is_static(graph: str) -> bool:
    """Whether a graph is the static form NAME.KK.bB of another."""
    return re.fullmatch(r".+\.\d+\.b\d+", graph) is not None


class _RangeObserver(ObservedOrtCpu):
    """Reports ranges and sampled rows of the activations in `observed_values`."""

    def __init__(self, root: Path, manifest: schema.Manifest, rng: np.random.Generator) -> None:
        self.stats: Stats = {}
        self._rng = rng
        models = {graph: load_graph(root, manifest, graph) for graph in rewritten(manifest)}
        self._values = {graph: observed_values(graph, model, manifest) for graph, model in models.items()}
        super().__init__(root, manifest, models)

    def edit(self, graph: str, model: onnx.ModelProto) -> None:
        """Outputs `observed_low_I`, `observed_high_I` and `observed_some_I` for the Ith activation."""
        model.graph.input.append(helper.make_tensor_value_info("observed_rows", TensorProto.INT64, [ROWS]))
        model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "observed_first"))
        for i, (x, K) in enumerate(self._values[graph].items()):
            _add_observer(model.graph, i, x, K)

    def buffers(self, graph: str, inputs: Mapping[str, Buffer]) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
        """Random row numbers, and arrays for what is observed."""
        rows: Buffer = self._rng.integers(1 << 31, size=ROWS)
        outputs: dict[str, Buffer] = {}
        for i, K in enumerate(self._values[graph].values()):
            shape = () if K is None else (K,)
            outputs |= {f"observed_{what}_{i}": np.empty(shape, np.float32) for what in ("low", "high")}
            if K is not None:
                outputs[f"observed_some_{i}"] = np.empty((ROWS, K), np.float32)
        return {"observed_rows": rows}, outputs

    def record(self, graph: str, outputs: Mapping[str, Buffer]) -> None:
        """Widen the ranges and sample the rows."""
        for i, (x, K) in enumerate(self._values[graph].items()):
            low, high = (array_of(outputs[f"observed_{what}_{i}"]) for what in ("low", "high"))
            stats = self.stats.setdefault((graph, x), ActivationStats(low, high))
            stats.low, stats.high = np.minimum(stats.low, low), np.maximum(stats.high, high)
            if K is not None:
                stats.sample(array_of(outputs[f"observed_some_{i}"]), self._rng)


def _add_observer(graph: onnx.GraphProto, i: int, x: str, K: int | None) -> None:
    """Add outputs: minimum and maximum of x; unless K is None, per channel, and with them some rows, [ROWS, K]."""
    low, high, some = (f"observed_{what}_{i}" for what in ("low", "high", "some"))
    reduced = [x]
    if K is not None:
        flat, rows = f"observed_flat_{i}", f"observed_rows_{i}"
        graph.initializer.append(numpy_helper.from_array(np.array([-1, K]), f"{flat}_shape"))
        graph.node.extend(
            [
                helper.make_node("Reshape", [x, f"{flat}_shape"], [flat]),
                helper.make_node("Shape", [flat], [f"{flat}_rows"], start=0, end=1),
                helper.make_node("Mod", ["observed_rows", f"{flat}_rows"], [rows]),
                helper.make_node("Gather", [flat, rows], [some], axis=0),
            ]
        )
        graph.output.append(helper.make_tensor_value_info(some, TensorProto.FLOAT, [ROWS, K]))
        reduced = [flat, "observed_first"]
    for kind, output in (("ReduceMin", low), ("ReduceMax", high)):
        graph.node.append(helper.make_node(kind, reduced, [output], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, [] if K is None else [K]))
