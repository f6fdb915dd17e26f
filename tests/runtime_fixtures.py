"""A tiny plan with real ONNX graphs, and the same model again in numpy, to hold the runtime to.

The model is no transformer: it is just enough arithmetic for every input of the contract to matter (the control, each
scale's past, both guidance rows, every setting), so that a wrong slot, row or order changes tokens.

Shapes as in docs/plan-format.md: B, R, S, T, P, C, Z, H, d, E, L, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from car_runtime.manifest import (
    WEIGHTS,
    FileEntry,
    Graph,
    Manifest,
    Model,
    Port,
    Precision,
    SamplingDefaults,
    Scale,
    Tensor,
    describe_files,
    write_manifest,
)

SIDES = (1, 2, 4)
V, C, H, D, Z, E, F, CLASSES, M, LAYERS = 16, 8, 2, 4, 4, 4, 8, 3, 2, 2
SIZE, L = E * F, sum(side * side for side in SIDES)
NAMES = ("cat", "Golden Retriever, goldie", "lion")
ALIGN = 4096
FLOAT, UINT8, INT32, INT64 = 1, 2, 6, 7  # ONNX's numbers for the types


def weights() -> dict[str, np.ndarray]:
    """Every tensor of the model by name; the same each time."""
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    tensors = {
        "embedding": normal(CLASSES + 1, C),
        "control_to_width": 3 * normal(3, C),
        "latent_to_width": normal(Z, C),
        "head": normal(C, V),
        "codebook": normal(V, Z),
    }
    following = [*SIDES[1:], 1]
    for k, (side, next_side) in enumerate(zip(SIDES, following, strict=True)):
        tensors |= {
            f"pos.{k}": 0.5 * normal(side, side, C),
            f"up.{k}": normal(E, side) / np.float32(2),
            f"down.{k}": normal(next_side, E) / np.float32(2),
            f"phi.{k}": 1 + 0.1 * normal(1),
            f"cfg_ratio.{k}": np.array([k / (len(SIDES) - 1)], np.float32),
        }
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


def build_plan(root: Path, *, control: bool = True, names: bool = True, **changes: Any) -> Path:
    """Write the plan; `changes` are fields of the manifest to replace. CAR with a control branch, VAR without."""
    root.mkdir(parents=True, exist_ok=True)
    tensors, table, offset = weights(), {}, 0
    with (root / WEIGHTS).open("wb") as file:
        for name, value in tensors.items():
            file.seek(offset)
            file.write(value.tobytes())
            table[name] = Tensor(dtype="float32", shape=value.shape, offset=offset, bytes=value.nbytes)
            offset += -(-value.nbytes // ALIGN) * ALIGN
    graphs = {name: _write_graph(root, name, table, control) for name in ("condition", "step", "decoder", "encoder")}
    if control:
        graphs["control"] = _write_graph(root, "control", table, control)
    constants = {name: tensor for name, tensor in table.items() if "." in name}
    manifest = Manifest(
        name="tiny" if control else "tiny-var",
        model=Model(
            depth=LAYERS,
            width=C,
            heads=H,
            vocab=V,
            latent_channels=Z,
            latent_size=E,
            patch=F,
            image_size=SIZE,
            classes=CLASSES,
            class_names=NAMES if names else None,
            control_type="canny" if control else None,
            cache_layers=LAYERS,
        ),
        precision=Precision(compute="fp32", weights="fp32"),
        sampling=SamplingDefaults(cfg=1.5, top_k=900, top_p=0.95),
        scales=_scales(),
        tensors=constants,
        graphs=graphs,
        files=describe_files(root, [WEIGHTS, *(graph.file for graph in graphs.values())]),
        provenance={"made by": "the tests"},
    )
    write_manifest(root, replace(manifest, **changes))
    return root


def relist(root: Path, manifest: Manifest, name: str) -> None:
    """Let the manifest agree with a file that a test changed on purpose."""
    entry: FileEntry = describe_files(root, [name])[name]
    write_manifest(root, replace(manifest, files={**manifest.files, name: entry}))


def _scales() -> tuple[Scale, ...]:
    scales, start = [], 0
    for k, side in enumerate(SIDES):
        stop = start + side * side
        scales.append(
            Scale(
                side=side,
                tokens=side * side,
                start=start,
                stop=stop,
                next_side=[*SIDES[1:], 1][k],
                cfg_ratio=k / (len(SIDES) - 1),
                control_size=side * F,
                constants={name: f"{name}.{k}" for name in ("pos", "up", "down", "phi", "cfg_ratio")},
            )
        )
        start = stop
    return tuple(scales)


# The graphs.


class _Builder:
    """ONNX nodes, one call each; small constants are inside, weights are external data."""

    def __init__(self, table: dict[str, Tensor]) -> None:
        self.onnx = pytest.importorskip("onnx")
        self.table, self.nodes, self.initializers, self.count = table, [], {}, 0

    def __call__(self, op: str, *inputs: Any, out: str = "", **attributes: Any) -> str:
        self.count += 1
        out = out or f"t{self.count}"
        names = [name if isinstance(name, str) else self.constant(name) for name in inputs]
        self.nodes.append(self.onnx.helper.make_node(op, names, [out], **attributes))
        return out

    def two(self, op: str, *inputs: Any, **attributes: Any) -> str:
        """A node with a second output that nobody reads; the name of the first."""
        out = self(op, *inputs, **attributes)
        self.nodes[-1].output.append(f"{out}_second")
        return out

    def constant(self, value: Any) -> str:
        array = np.asarray(value, np.int64 if np.asarray(value).dtype.kind == "i" else np.float32)
        name = f"c{len(self.initializers)}"
        self.initializers[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str) -> str:
        tensor, stored = self.onnx.TensorProto(), self.table[name]
        tensor.name, tensor.data_type = name, self.onnx.TensorProto.FLOAT
        tensor.dims.extend(stored.shape)
        tensor.data_location = self.onnx.TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", stored.offset), ("length", stored.bytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[name] = tensor
        return name

    def save(self, path: Path, inputs: list[Port], outputs: list[Port]) -> Graph:
        make, kind = self.onnx.helper.make_tensor_value_info, self.onnx.helper.np_dtype_to_tensor_dtype
        infos = [[make(p.name, kind(np.dtype(p.dtype)), list(p.shape)) for p in ports] for ports in (inputs, outputs)]
        graph = self.onnx.helper.make_graph(self.nodes, path.stem, *infos, list(self.initializers.values()))
        opset = [self.onnx.helper.make_opsetid("", 18)]
        path.write_bytes(self.onnx.helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString())
        return Graph(file=path.name, inputs=tuple(inputs), outputs=tuple(outputs))


def _port(name: str, dtype: str, *shape: int | str) -> Port:
    return Port(name=name, dtype=dtype, shape=shape)


def _write_graph(root: Path, name: str, table: dict[str, Tensor], control: bool) -> Graph:
    build = _Builder(table)
    inputs, outputs = {
        "control": _control_graph,
        "condition": _condition_graph,
        "step": lambda b: _step_graph(b, control),
        "decoder": _decoder_graph,
        "encoder": _encoder_graph,
    }[name](build)
    return build.save(root / f"{name}.onnx", inputs, outputs)


def _control_graph(b: _Builder) -> tuple[list[Port], list[Port]]:
    inputs, parts = [], []
    weight = b.weight("control_to_width")
    for k, side in enumerate(SIDES):
        inputs.append(_port(f"control_{k}", "uint8", side * F, side * F, 3))
        pixels = b("Div", b("Cast", f"control_{k}", to=FLOAT), 255.0)
        cells = b("ReduceMean", b("Reshape", pixels, [side, F, side, F, 3]), [1, 3], keepdims=0)
        parts.append(b("Reshape", b("MatMul", cells, weight), [side * side, C]))
    b("Concat", *parts, out="features", axis=0)
    return inputs, [_port("features", "float32", L, C)]


def _condition_graph(b: _Builder) -> tuple[list[Port], list[Port]]:
    row = b("Gather", b.weight("embedding"), "label", axis=0)
    b("Reshape", row, [-1, 1, 1, C], out="start")
    one = b("Reshape", row, [-1, 1, C])
    b("Concat", b("Mul", one, 0.1), b("Mul", one, 0.2), out="modulation", axis=1)
    outputs = [_port("start", "float32", "R", 1, 1, C), _port("modulation", "float32", "R", M, C)]
    return [_port("label", "int64", "R")], outputs


def _step_graph(b: _Builder, control: bool) -> tuple[list[Port], list[Port]]:
    h_RSSC = b("Add", "x", b("Unsqueeze", b("Gather", "modulation", [0], axis=1), [1]))
    h_RSSC = b("Add", h_RSSC, "pos")
    if control:
        h_RSSC = b("Add", h_RSSC, "control")
    rows = b("Slice", b("Shape", "x"), [0], [1])
    flat = b("Transpose", b("Reshape", h_RSSC, b("Concat", rows, [-1, C], axis=0)), perm=[1, 0, 2])
    kv = b("Reshape", flat, b("Concat", [-1], rows, [H, D], axis=0))
    for i in range(LAYERS):
        b("Tanh", b("Mul", kv, 0.5 * (i + 1)), out=f"new_k_{i}")
        b("Mul", kv, 0.1 * (i + 1), out=f"new_v_{i}")
        # The running sum makes the order of the past matter, not only what is in it.
        for name, share in ((f"past_k_{i}", 0.02), (f"past_v_{i}", 0.1)):
            total = b("ReduceSum", b("CumSum", name, 0), [0], keepdims=0)
            h_RSSC = b("Add", h_RSSC, b("Mul", b("Reshape", total, [-1, 1, 1, C]), share))
    _sample(b, b("MatMul", h_RSSC, b.weight("head")))
    h_BZSS = b("Transpose", b("Gather", b.weight("codebook"), "tokens", axis=0), perm=[0, 3, 1, 2])
    grown = b("MatMul", "up", b("MatMul", h_BZSS, b("Transpose", "up", perm=[1, 0])))
    b("Add", "f_hat", b("Mul", grown, "phi"), out="f_hat_out")
    shrunk = b("MatMul", "down", b("MatMul", "f_hat_out", b("Transpose", "down", perm=[1, 0])))
    tokens_in = b("MatMul", b("Transpose", shrunk, perm=[0, 2, 3, 1]), b.weight("latent_to_width"))
    copies = b("Div", rows, b("Slice", b("Shape", "uniforms"), [0], [1]))
    b("Tile", tokens_in, b("Concat", copies, [1, 1, 1], axis=0), out="next_x")
    return _step_inputs(control), _step_outputs()


def _sample(b: _Builder, logits_RSSV: str) -> None:
    """Guidance, top-k, top-p and the draw of docs/plan-format.md."""
    batch = b("Slice", b("Shape", "uniforms"), [0], [1])
    conditional = b("Slice", logits_RSSV, [0], batch, [0])
    unconditional = b("Slice", logits_RSSV, b("Neg", batch), [2**62], [0])
    t = b("Mul", "cfg", "cfg_ratio")
    logits = b("Sub", b("Mul", conditional, b("Add", t, 1.0)), b("Mul", unconditional, t))
    values = b.two("TopK", logits, "top_k", axis=-1)
    kth = b("ReduceMin", values, [-1], keepdims=1)
    probabilities = b("Softmax", b("Where", b("GreaterOrEqual", logits, kth), logits, -1e30), axis=-1)
    ordered = b.two("TopK", probabilities, [V], axis=-1)
    kept = b("Less", b("CumSum", ordered, -1, exclusive=1), "top_p")
    least = b("ReduceMin", b("Where", kept, ordered, 2.0), [-1], keepdims=1)
    probabilities = b("Where", b("GreaterOrEqual", probabilities, least), probabilities, 0.0)
    total = b("ReduceSum", probabilities, [-1], keepdims=1)
    reached = b("Greater", b("CumSum", probabilities, -1), b("Mul", b("Unsqueeze", "uniforms", [-1]), total))
    drawn = b("ArgMax", b("Cast", reached, to=INT32), axis=-1, keepdims=0)
    b("Where", "known_mask", "known", drawn, out="tokens")


def _step_inputs(control: bool) -> list[Port]:
    ports = [_port("x", "float32", "R", "S", "S", C), _port("modulation", "float32", "R", M, C)]
    if control:
        ports.append(_port("control", "float32", "S", "S", C))
    ports += [
        _port("f_hat", "float32", "B", Z, E, E),
        _port("uniforms", "float32", "B", "S", "S"),
        _port("cfg", "float32", 1),
        _port("top_k", "int64", 1),
        _port("top_p", "float32", 1),
        _port("known", "int64", "B", "S", "S"),
        _port("known_mask", "bool", "B", "S", "S"),
        _port("pos", "float32", "S", "S", C),
        _port("up", "float32", E, "S"),
        _port("down", "float32", "T", E),
        _port("phi", "float32", 1),
        _port("cfg_ratio", "float32", 1),
    ]
    cache = [f"past_{kind}_{i}" for i in range(LAYERS) for kind in "kv"]
    return ports + [_port(name, "float32", "P", "R", H, D) for name in cache]


def _step_outputs() -> list[Port]:
    cache = [f"new_{kind}_{i}" for i in range(LAYERS) for kind in "kv"]
    return [
        _port("tokens", "int64", "B", "S", "S"),
        _port("f_hat_out", "float32", "B", Z, E, E),
        _port("next_x", "float32", "R", "T", "T", C),
        *(_port(name, "float32", "S*S", "R", H, D) for name in cache),
    ]


def _decoder_graph(b: _Builder) -> tuple[list[Port], list[Port]]:
    rgb = b("Mul", b("Sigmoid", b("Slice", "f_hat", [0], [3], [1])), 255.0)
    blocks = b("Expand", b("Reshape", rgb, [-1, 3, E, 1, E, 1]), [1, 3, E, F, E, F])
    pixels = b("Transpose", b("Reshape", blocks, [-1, 3, SIZE, SIZE]), perm=[0, 2, 3, 1])
    b("Cast", b("Round", pixels), out="image", to=UINT8)
    return [_port("f_hat", "float32", "B", Z, E, E)], [_port("image", "uint8", "B", SIZE, SIZE, 3)]


def _encoder_graph(b: _Builder) -> tuple[list[Port], list[Port]]:
    pixels, parts = b("Div", b("Cast", "image", to=FLOAT), 16.0), []
    for side in SIDES:
        cells = b("Reshape", pixels, [-1, side, SIZE // side, side, SIZE // side, 3])
        mean = b("ReduceMean", cells, [2, 4, 5], keepdims=0)
        parts.append(b("Reshape", b("Cast", b("Floor", mean), to=INT64), [-1, side * side]))
    b("Concat", *parts, out="tokens", axis=1)
    return [_port("image", "uint8", "B", SIZE, SIZE, 3)], [_port("tokens", "int64", "B", L)]


# The same model in numpy, written the slow and obvious way.


def draw(logits_V: np.ndarray, top_k: int, top_p: float, uniform: float) -> int:
    """One token by the sampling definition of docs/plan-format.md (`top_p` ≥ 1 is off)."""
    kept = logits_V >= np.sort(logits_V)[-top_k]
    probability = np.where(kept, np.exp(logits_V - logits_V.max()), 0)
    probability /= probability.sum()
    gone, nucleus = 0.0, np.zeros_like(kept)
    for token in np.argsort(-probability, kind="stable"):
        if gone < top_p:
            nucleus[token] = True
        gone += probability[token]
    running = np.cumsum(np.where(nucleus & kept, probability, 0))
    return int(np.argmax(running > uniform * running[-1]))


def generate(
    pyramid: list[np.ndarray] | None,
    label: int,
    seed: int,
    *,
    cfg: float = 1.5,
    top_k: int = V,
    top_p: float = 0.95,
    known: np.ndarray | None = None,
    known_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One picture: tokens [L] and the image uint8 [SIZE, SIZE, 3]. Both guidance rows are always computed."""
    w = weights()
    uniform = np.random.default_rng(seed).random(L, dtype=np.float32)
    embedding_RC = w["embedding"][[label, CLASSES]]
    x_RSSC = embedding_RC[:, None, None]
    f_hat = np.zeros((Z, E, E), np.float32)
    past: list[np.ndarray] = []  # one [R, C] per token made so far
    tokens: list[int] = []
    for k, side in enumerate(SIDES):
        h = x_RSSC + 0.1 * embedding_RC[:, None, None] + w[f"pos.{k}"]
        if pyramid is not None:
            cells = (pyramid[k] / np.float32(255)).reshape(side, F, side, F, 3).mean((1, 3))
            h = h + cells @ w["control_to_width"]
        kv = [row for row in h.reshape(2, side * side, C).transpose(1, 0, 2)]
        for i in range(LAYERS):
            for j, row in enumerate(past):
                older = len(past) - j
                h = h + older * (0.02 * np.tanh(row * 0.5 * (i + 1)) + 0.1 * row * 0.1 * (i + 1))[:, None, None]
        past += kv
        logits = h @ w["head"]
        t = cfg * k / (len(SIDES) - 1)
        mixed = ((1 + t) * logits[0] - t * logits[1]).reshape(-1, V)
        for logits_V in mixed:
            at = len(tokens)
            fixed = known_mask is not None and known is not None and known_mask[at]
            tokens.append(int(known[at]) if fixed else draw(logits_V, top_k, top_p, uniform[at]))
        codes = w["codebook"][tokens[-side * side :]].reshape(side, side, Z).transpose(2, 0, 1)
        f_hat = f_hat + w[f"phi.{k}"] * (w[f"up.{k}"] @ codes @ w[f"up.{k}"].T)
        next_ZTT = w[f"down.{k}"] @ f_hat @ w[f"down.{k}"].T
        x_RSSC = np.repeat((next_ZTT.transpose(1, 2, 0) @ w["latent_to_width"])[None], 2, axis=0)
    return np.array(tokens), picture(f_hat)


def picture(f_hat: np.ndarray) -> np.ndarray:
    """The decoder: f̂ [Z, E, E] → uint8 [SIZE, SIZE, 3]."""
    rgb = np.rint(255 / (1 + np.exp(-f_hat[:3])))
    return rgb.repeat(F, 1).repeat(F, 2).transpose(1, 2, 0).astype(np.uint8)
