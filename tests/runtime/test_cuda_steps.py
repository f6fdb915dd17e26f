"""Whole images by the `cuda` backend's kernels on the fake GPU, step by step alongside the plan's graphs.

The launch plan's kernels run in Triton's interpreter, each access checked (fixtures/kernel_device.py). Both run
freely: each goes on from its own keys and values, f̂ and tokens. A small model is compared with the modules that the
graphs are traced from, in PyTorch and in fp16; exported plans, in the slow tests, with ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import local
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from car_export import graphs
from car_export.plan import compute_model
from car_runtime.backends.cuda.buffers import DeviceArray, Memory
from car_runtime.backends.cuda.driver import CudaDevice, CudaError
from car_runtime.backends.cuda.kernels import kernels as described
from car_runtime.backends.cuda.kernels import named, read_cubins
from car_runtime.backends.cuda.launch_plan import LaunchPlan, problem, sizes_of, strides_of
from car_runtime.backends.cuda.steps import StepKernels, open_steps
from car_runtime.backends.cuda.weights import DeviceWeights
from car_runtime.errors import BackendError, RunError
from car_runtime.format import schema
from car_runtime.format.manifest import WEIGHTS, read_manifest
from car_runtime.format.parameters import Parameters, UnsupportedGraphError, plan_parameters
from car_runtime.format.schema import FUSIONS
from car_train.model import Model
from fixtures.fake_device import GPU
from fixtures.golden import Golden
from fixtures.kernel_device import KernelDevice
from fixtures.kernel_models import export, narrow, sibling
from fixtures.parameter_table import Entry
from fixtures.runtime_plan import build_plan

TOLERANCE = 1e-2
"""Largest difference of logits, as a share of their range: fp16's rounding (4.9e-4) through all blocks. ONNX Runtime
rounds each product to fp16 before a bias or a gate, the kernels once."""
BF16 = np.dtype(ml_dtypes.bfloat16)
Arrays = dict[str, np.ndarray]


@dataclass
class Request:
    """What an image is made from. The default: guided, the first branch at weight 1."""

    labels: list[int] = field(default_factory=lambda: [3])
    mix: list[float] = field(default_factory=lambda: [1.0])
    """Of each branch of the plan; empty: no control."""
    cfg: list[float] = field(default_factory=lambda: [3.0])
    control_cfg: float = 0.0
    top_k: int = 1
    top_p: float = 2.0
    guided: bool = True
    known: float = 0.0
    """Share of each scale's tokens that is given; with 1 both sides follow the same tokens."""


class Plan:
    """An exported plan: its graphs in ONNX Runtime on the CPU."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = read_manifest(root)
        assert problem(self.manifest) is None
        self.parameters = plan_parameters(self.manifest, root)
        self._sessions: dict[str, Any] = {}

    def constants(self, k: int) -> Arrays:
        found = {}
        for port, name in self.manifest.scales[k].constants.items():
            tensor = self.manifest.tensors[name]
            found[port] = np.array(np.memmap(self.root / WEIGHTS, tensor.dtype, "r", tensor.offset, tensor.shape))
        return found

    def __call__(self, graph: str, feed: Arrays) -> Arrays:
        if graph not in self._sessions:
            path = str(self.root / self.manifest.graphs[graph].file)
            self._sessions[graph] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        session = self._sessions[graph]
        names = [port.name for port in session.get_outputs()]
        return dict(zip(names, session.run(names, feed), strict=True))


class Eager:
    """Branches on one base without a plan: the modules that graphs are traced from, in fp16 or bf16, and a table."""

    def __init__(self, models: dict[str, Model], folder: Path, half: str = "fp16") -> None:
        made = {name: compute_model(model, half) for name, model in models.items()}
        first = next(iter(made.values()))
        assert first.car is not None
        self.base, self.quantizer, config = first.car.base, first.vqvae.quantizer, first.config
        var, vqvae, parts = config.var, config.vqvae, {"vqvae": first.vqvae, "base": first.car.base}
        assert var is not None
        self.modules: dict[str, Any] = {"condition": graphs.BaseConditionGraph(first)}
        self.modules["step"] = graphs.BaseStepGraph(first)
        self.modules["decoder"] = graphs.DecoderGraph(first)
        branches = {}
        for name, one in made.items():
            assert one.car is not None
            assert one.car.branch is not None
            assert one.config.car is not None
            one.car.base = self.base
            h, car = len(one.car.branch.blocks), one.config.car
            kind = {"fusion": car.fusion, "transformer": car.transformer, "blocks": h, "cache_layers": h}
            branches[name] = schema.Branch(control_type="sketch", **kind)
            parts[f"branches.{name}"] = one.car.branch
            self.modules[f"condition.{name}"] = graphs.BranchConditionGraph(one)
            self.modules[f"control.{name}"] = graphs.ControlGraph(one)
            self.modules[f"branch.{name}"] = graphs.BranchGraph(one)
        E, patch = vqvae.latent_size, vqvae.patch
        facts = schema.Model(
            **{"depth": var.depth, "width": var.width, "heads": var.heads, "vocab": vqvae.vocab},
            **{"latent_channels": vqvae.latent_channels, "latent_size": E, "patch": patch, "image_size": E * patch},
            **{"classes": var.classes, "class_names": None, "control_type": "sketch", "cache_layers": var.depth},
            **{"branches": branches, "default_branch": next(iter(branches))},
        )
        sides = zip(vqvae.sides, vqvae.ranges, [*vqvae.sides[1:], 1], strict=True)
        scales = [
            SimpleNamespace(side=s, tokens=s * s, start=a, stop=b, next_side=t, control_size=s * patch)
            for s, (a, b), t in sides
        ]
        self.table = _table(parts, folder / "weights.bin")
        self.parameters = Parameters(self.table, folder / "weights.bin")
        precision = SimpleNamespace(compute=half)
        facts_of = {"model": facts, "scales": scales, "parameters": self.table, "precision": precision}
        self.manifest: Any = SimpleNamespace(**facts_of)
        self._config = vqvae

    def constants(self, k: int) -> Arrays:
        config, side = self._config, self._config.sides[k]
        last = k + 1 == len(config.sides)
        start, stop = config.ranges[k]
        return {
            "pos": self.base.position()[start:stop].reshape(side, side, -1).numpy(),
            "up": self.quantizer.up(k).numpy(),
            "down": self.quantizer.down(0 if last else k + 1).numpy(),
            "phi": np.array([config.phi_index[k]]),
            "cfg_ratio": np.array([config.ratios[k]], np.float32),
        }

    @torch.no_grad()
    def __call__(self, graph: str, feed: Arrays) -> Arrays:
        module = self.modules[graph]
        names = getattr(module, "input_names", list(feed))
        outputs = {"condition": ["start", "modulation"], "control": ["features"], "decoder": ["image"]}.get(
            graph.partition(".")[0]
        )
        outputs = ["modulation"] if graph.startswith("condition.") else outputs or module.output_names
        result = module(*(_tensor(feed[name]) for name in names))
        result = result if isinstance(result, tuple) else (result,)
        return {name: _array(tensor) for name, tensor in zip(outputs, result, strict=True)}


def _tensor(array: np.ndarray) -> torch.Tensor:
    """What PyTorch computes with; numpy has bf16 from ml_dtypes."""
    copied = np.array(array)
    if copied.dtype != BF16:
        return torch.from_numpy(copied)
    return torch.from_numpy(copied.view(np.int16)).view(torch.bfloat16)


def _array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.contiguous().view(torch.int16).numpy().view(BF16)


def _table(parts: dict[str, Any], weights: Path) -> dict[str, Entry]:
    """Write all parameters as a plan in half precision does: matrices with inputs first."""
    table, content = {}, bytearray()
    for part, module in parts.items():
        for name, tensor in module.state_dict().items():
            turned = tensor.ndim == 2 and name.endswith("weight")
            array = np.ascontiguousarray(_array(tensor).T if turned else _array(tensor))
            content += bytes(-len(content) % 64)
            place = {"dtype": array.dtype.name, "shape": array.shape, "offset": len(content), "bytes": array.nbytes}
            table[f"{part}.{name}"] = Entry(**place, layout="transposed" if turned else "plain")
            content += array.tobytes()
    weights.write_bytes(content)
    return table


class Loop:
    """The scale loop of format 2, on whatever runs graphs."""

    def __init__(self, source: Plan | Eager, run: Callable[[str, Arrays], Arrays]) -> None:
        self.source, self.manifest, self.run = source, source.manifest, run

    def parameter(self, name: str) -> np.ndarray:
        """Of a fusion, as the step takes it: matrices with inputs first."""
        entry = self.manifest.parameters[name]
        bf16, sizes = entry.dtype == "bfloat16", [None] * len(entry.shape)
        parameters = self.source.parameters
        values = np.array(parameters.bits(name, *sizes) if bf16 else parameters.view(name, *sizes))
        values = values.view(BF16) if bf16 else values
        return values.T if values.ndim == 2 else values

    def image(self, request: Request, control: np.ndarray | None) -> list[Arrays]:
        """What each scale's step gave. control: uint8 [size, size, 3]."""
        model, B = self.manifest.model, len(request.labels)
        R, C = (2 if request.guided else 1) * B, model.width
        labels = np.array(request.labels + [model.classes] * (R - B))
        rows = np.arange(R) % B
        names = [name for name, weight in zip(model.branches, request.mix, strict=False) if weight]
        mix = np.array([weight for weight in request.mix if weight], np.float32)
        condition = self.run("condition", {"label": labels})
        own = {name: self.run(f"condition.{name}", {"label": labels})["modulation"] for name in names}
        features = {}
        for name in names:
            assert control is not None
            sizes = {f"control_{k}": s.control_size for k, s in enumerate(self.manifest.scales)}
            maps = {port: np.asarray(Image.fromarray(control).resize((s, s))) for port, s in sizes.items()}
            features[name] = self.run(f"control.{name}", maps)["features"]
        rng = np.random.default_rng(5)
        x, latent = condition["start"], (B, model.latent_channels, model.latent_size, model.latent_size)
        f_hat, caches, steps = np.zeros(latent, np.float32), {}, []
        for k, scale in enumerate(self.manifest.scales):
            S, grid = scale.side, (B, scale.side, scale.side)
            constants = self.source.constants(k)
            past = {name: caches.get(name, {}) for name in ("step", *names)}
            outputs = []
            for name in names:
                feed = {"x": x, "modulation": own[name], "rows": rows, "pos": constants["pos"]}
                feed["control"] = features[name][scale.start : scale.stop].reshape(1, S, S, C).repeat(B, 0)
                got = self.run(f"branch.{name}", feed | self._past(past[name], model.branches[name].cache_layers, R))
                outputs.append(got["c"])
                caches[name] = self._append(past[name], got)
            known_mask = np.zeros(grid, bool)
            if request.known:
                known_mask.reshape(B, -1)[:, : math.ceil(scale.tokens * request.known)] = True
            feed = {
                **{"x": x, "modulation": condition["modulation"], "rows": rows, "f_hat": f_hat, **constants},
                "twin": np.arange(B) + R - B,
                "uniforms": rng.random(grid, dtype=np.float32),
                "cfg": np.array(request.cfg * B if request.guided else [0] * B, np.float32)[:B],
                "top_k": np.full(B, request.top_k),
                "top_p": np.full(B, request.top_p, np.float32),
                "bias": 3 * rng.standard_normal((*grid, model.vocab), dtype=np.float32),
                "known": rng.integers(0, model.vocab, grid),
                "known_mask": known_mask,
            }
            if model.branches:
                feed |= self._mixed(names or [next(iter(model.branches))], outputs, mix, S, R, B)
                feed["control_cfg"] = np.full(B, request.control_cfg, np.float32)
                feed["plain"] = np.arange(B)[::-1].copy()  # another image's row, so that it counts
            got = self.run("step", feed | self._past(past["step"], model.cache_layers, R))
            caches["step"] = self._append(past["step"], got)
            x, f_hat = got["next_x"], got["f_hat_out"]
            steps.append(got)
        return steps

    def _mixed(
        self, names: Sequence[str], outputs: list[np.ndarray], mix: np.ndarray, S: int, R: int, B: int
    ) -> Arrays:
        """Branches and their fusions' parameters; without control one of weight 0."""
        model = self.manifest.model
        branch, m = model.branches[names[0]], len(names)
        weights = mix if len(mix) else np.zeros(1, np.float32)
        nothing = np.zeros((1, branch.blocks, S, S, R, model.width), np.float32)
        feed = {
            "c": np.stack(outputs) if outputs else nothing,
            "mix": weights[:, None].repeat(R, 1),
            "keep": np.full(R, 1 - weights.sum(), np.float32),
        }
        for i in range(branch.blocks):
            for port in FUSIONS[branch.fusion]:
                key = f"fusions.{i}.{port.replace('_', '.', 1)}"
                feed[f"fusion_{port}_{i}"] = np.stack([self.parameter(f"branches.{name}.{key}") for name in names])
        assert len(feed["mix"]) == m
        return feed

    def _past(self, past: Arrays, layers: int, R: int) -> Arrays:
        model = self.manifest.model
        half = BF16 if self.manifest.precision.compute == "bf16" else np.float16
        nothing = np.zeros((0, R, model.heads, model.width // model.heads), half)
        return {f"past_{kind}_{i}": past.get(f"{kind}_{i}", nothing) for i in range(layers) for kind in "kv"}

    @staticmethod
    def _append(past: Arrays, got: Arrays) -> Arrays:
        new = {name.removeprefix("new_"): values for name, values in got.items() if name.startswith("new_")}
        return {name: np.concatenate([past[name], values]) if past else values for name, values in new.items()}


class Kernels:
    """The launch plan's graphs on the fake GPU, recorded; the others as `source` runs them."""

    def __init__(self, source: Plan | Eager, strides: dict[str, tuple[int, ...]] | None = None) -> None:
        self.source, self.device = source, KernelDevice()
        self.memory = Memory(self.device)
        sizes = sizes_of(source.manifest, strides)
        self.plan = LaunchPlan(sizes, DeviceWeights(source.parameters, self.memory, sizes.half))
        self.launched: dict[str, list[int]] = {}

    def __call__(self, graph: str, feed: Arrays) -> Arrays:
        if graph not in self.plan.graphs:
            return self.source(graph, feed)
        inputs = {name: self._up(values) for name, values in feed.items() if not name.startswith("past_")}
        outputs, sizes = self._outputs(graph, feed, inputs), self.plan.scratch(graph, inputs)
        scratch = {name: self.memory.allocate((size,), "uint8") for name, size in sizes.items() if size}
        launches = self.plan.launches(graph, inputs, outputs, {name: a.address for name, a in scratch.items()})
        self.launched.setdefault(graph, []).append(len(launches))
        self.device.begin_capture()
        for launch in launches:
            self.device.put_kernel(launch.kernel, launch.grid, launch.arguments)
        self.device.launch(self.device.end_capture())
        return {name: self._down(array) for name, array in outputs.items()}

    def _outputs(self, graph: str, feed: Arrays, inputs: dict[str, DeviceArray]) -> dict[str, DeviceArray]:
        """Buffers for what a graph gives; those of K and V lie behind their past."""
        model, half = self.source.manifest.model, self.plan.half
        if graph == "decoder":
            size = model.image_size
            return {"image": self.memory.allocate((len(feed["f_hat"]), size, size, 3), "uint8")}
        if graph.startswith("control."):
            tokens = sum(scale.tokens for scale in self.source.manifest.scales)
            return {"features": self.memory.allocate((tokens, model.width), "float32")}
        if graph.startswith("condition"):
            R, C, name = len(feed["label"]), model.width, graph.partition(".")[2]
            M = 6 * model.branches[name].blocks if name else 6 * model.depth + 2
            modulation = {"modulation": self.memory.allocate((R, M, C), "float32")}
            return modulation if name else modulation | {"start": self.memory.allocate((R, 1, 1, C), "float32")}
        R, S, _, C = feed["x"].shape
        B = len(feed["uniforms"] if "uniforms" in feed else feed["control"])
        if graph == "step":
            T, latent = len(feed["down"]), feed["f_hat"].shape
            wanted = {"tokens": ((B, S, S), "int64"), "f_hat_out": (latent, "float32")}
            wanted |= {"next_x": ((R, T, T, C), "float32"), "logits": ((B, S, S, model.vocab), "float32")}
        else:
            h = model.branches[graph.removeprefix("branch.")].blocks
            wanted = {"c": ((h, S, S, R, C), "float32")}
        outputs = {name: self.memory.allocate(*kind) for name, kind in wanted.items()}
        for name in [
            name for name in feed if name.startswith("past_")
        ]:  # one cache: the past, and its slot behind it
            P, *rest = feed[name].shape
            cache = self.memory.allocate((P + S * S, *rest), half)
            inputs[name], outputs[name.replace("past_", "new_")] = cache[:P], cache[P:]
            self.memory.write(cache[:P], _bits(feed[name]))
        return outputs

    def _up(self, values: np.ndarray) -> DeviceArray:
        array = self.memory.allocate(values.shape, values.dtype.name)
        self.memory.write(array, _bits(values))
        return array

    def _down(self, array: DeviceArray) -> np.ndarray:
        values = self.memory.read(array)
        return values.view(BF16) if array.dtype == "bfloat16" else values


def _bits(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values)
    return values.view(np.uint16) if values.dtype == BF16 else values


def compare(source: Plan | Eager, request: Request, tolerance: float = TOLERANCE) -> Kernels:
    """Make the image both ways and compare scale by scale; the kernels' side comes back."""
    gpu = Kernels(source)
    control = np.random.default_rng(1).integers(0, 256, (source.manifest.model.image_size,) * 2 + (3,), np.uint8)
    want = Loop(source, source).image(request, control)
    got = Loop(source, gpu).image(request, control)
    for k, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        spread = np.ptp(theirs["logits"])
        error = np.abs(mine["logits"] - theirs["logits"]).max() / spread
        assert error < tolerance, f"scale {k}: logits differ by {error:.1e} of their range"
        np.testing.assert_array_equal(mine["tokens"], theirs["tokens"], err_msg=f"scale {k}")
        for name, values in theirs.items():
            if name not in ("logits", "tokens") and values.size:
                largest = np.abs(values).max()
                error = np.abs(mine[name].astype(np.float64) - values).max()
                assert error < tolerance * largest, f"{name}, scale {k}: {error:.1e} of {largest:.2g}"
    return gpu


@pytest.mark.parametrize(
    "request_",
    [
        Request(labels=[1, 4], mix=[0.6, 0.7], cfg=[2.0, 4.0], control_cfg=0.5, top_k=20, top_p=0.9),
        Request(mix=[], guided=False, top_k=50, known=0.6),
    ],
    ids=["two branches, two images", "no control, no guidance, an edit"],
)
def test_mixes_samples_and_edits_are_the_fp16_graphs(request_: Request, tmp_path: Path) -> None:
    model = narrow()
    compare(Eager({"one": model, "two": sibling(model)}, tmp_path), request_)


@pytest.mark.parametrize("fusion", ["zero", "cross_norm"])
def test_other_fusions_are_the_fp16_graphs(fusion: str, tmp_path: Path) -> None:
    gpu = compare(Eager({"one": narrow(fusion)}, tmp_path), Request())
    few = 2 * 5 + (2 if fusion == "zero" else 1) + 1 + 7  # blocks, a fusion, positions, head to next input
    once = {"condition": [4], "condition.one": [1]}  # blocks, the head, start tokens
    assert gpu.launched == {**once, "branch.one": [6] * 3, "step": [few] * 3}


def test_features_of_the_tokenizers_encoder_are_the_fp16_graphs(tmp_path: Path) -> None:
    """𝓕 as a copy of it and a projection: each scale by itself, the first with one pixel at the lowest level."""
    source = Eager({"one": narrow(encoder="vqvae")}, tmp_path)
    rng, sides = np.random.default_rng(1), [scale.control_size for scale in source.manifest.scales]
    maps = {f"control_{k}": rng.integers(0, 256, (side, side, 3), np.uint8) for k, side in enumerate(sides)}
    found = Kernels(source, strides_of(source.manifest, tmp_path))("control.one", maps)["features"]
    want = source("control.one", maps)["features"]
    assert found.shape == want.shape == (1 + 4 + 16, 64)
    assert np.abs(found - want).max() < TOLERANCE * np.ptp(want)


def test_an_image_in_bf16_is_the_bf16_graphs(tmp_path: Path) -> None:
    """Class, branches, steps and decoder. On the same tokens, since 8 bits leave near ties undecided."""
    model = narrow()
    source = Eager({"one": model, "two": sibling(model)}, tmp_path, "bf16")
    gpu = compare(source, Request(mix=[0.6, 0.7], top_k=20, known=1.0), 8 * TOLERANCE)
    f_hat = {"f_hat": np.random.default_rng(4).normal(size=(1, 8, 3, 3)).astype(np.float32)}
    mine, theirs = gpu("decoder", f_hat)["image"].astype(int), source("decoder", f_hat)["image"]
    assert np.abs(mine - theirs).mean() < 1
    assert np.ptp(theirs) > 20
    assert {"ln_qkv.s.d32.bf16", "conv.s.bf16"} < gpu.device.launched.keys()
    assert all(named(name, "bf16") == name for name in gpu.device.launched)


@pytest.mark.slow
def test_an_image_of_tiny_is_the_fp16_plans(models: Callable[..., Model]) -> None:
    """An exported plan of the published layout in ONNX Runtime, two branches at once."""
    model = models(Golden("tiny"))
    compare(Plan(export({"canny": model, "other": sibling(model)}, "tiny")), Request(mix=[0.8, 0.3], top_k=20))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_saln", "ten"])
def test_logits_of_the_published_layouts_are_the_fp16_plans(models: Callable[..., Model], name: str) -> None:
    """Shared AdaLN; the ten scales of 256 pixels. On the same tokens: among 680 there may be a near tie."""
    compare(Plan(export({"canny": models(Golden(name))}, name)), Request(top_k=20, known=1.0))


def test_a_cache_with_a_gap_is_refused(tmp_path: Path) -> None:
    gpu = Kernels(Eager({"one": narrow()}, tmp_path))
    x = gpu.memory.allocate((2, 2, 2, 64), "float32")
    cache = gpu.memory.allocate((6, 2, 2, 32), "float16")
    inputs = {"x": x, "past_k_0": cache[:1], "past_v_0": cache[:1], "control": x, "rows": x}
    outputs = {"c": x, "new_k_0": cache[2:], "new_v_0": cache[2:]}
    scratch = dict.fromkeys(gpu.plan.scratch_bytes(2, 1, 1), x.address)
    with pytest.raises(RunError, match="was run without pos"):
        gpu.plan.launches("branch.one", inputs, outputs, scratch)
    with pytest.raises(RunError, match="does not follow past_k_0"):
        gpu.plan.launches("branch.one", inputs | {"pos": x, "modulation": x}, outputs, scratch)


def test_parameters_of_another_type_or_shape_are_refused(tmp_path: Path) -> None:
    source = Eager({"one": narrow()}, tmp_path)
    name = "base.blocks.1.attn.proj.weight"
    for change in ({"dtype": "float32", "bytes": 4 * 64 * 64, "offset": 0}, {"shape": (32, 64), "bytes": 4096}):
        table = source.table | {name: replace(source.table[name], **change)}
        parameters = Parameters(table, tmp_path / "weights.bin")
        with pytest.raises(UnsupportedGraphError, match=name.replace(".", r"\.")):
            LaunchPlan(sizes_of(source.manifest), DeviceWeights(parameters, Memory(KernelDevice())))


class BranchWork:
    """One scale of a branch, on buffers of its own for R rows."""

    def __init__(self, tmp_path: Path) -> None:
        source = Eager({"one": narrow()}, tmp_path)
        self.device = KernelDevice()
        self.memory = Memory(self.device)
        plan = LaunchPlan(sizes_of(source.manifest), DeviceWeights(source.parameters, self.memory))
        self.kernels, self.rng = StepKernels(plan, self.memory), np.random.default_rng(2)

    def buffers(self, R: int) -> tuple[dict[str, DeviceArray], dict[str, DeviceArray]]:
        rng, memory = self.rng, self.memory
        feed: Arrays = {"x": rng.normal(size=(R, 1, 1, 64)).astype(np.float32), "rows": np.arange(R) % (R // 2)}
        feed["modulation"] = rng.normal(size=(R, 6, 64)).astype(np.float32)
        feed["control"] = rng.normal(size=(R // 2, 1, 1, 64)).astype(np.float32)
        feed["pos"] = rng.normal(size=(1, 1, 64)).astype(np.float32)
        inputs = {name: memory.allocate(values.shape, values.dtype.name) for name, values in feed.items()}
        for name, array in inputs.items():
            memory.write(array, feed[name])
        outputs = {f"new_{kind}_0": memory.allocate((1, R, 2, 32), "float16") for kind in "kv"}
        inputs |= {name.replace("new", "past"): array[:0] for name, array in outputs.items()}
        return inputs, outputs | {"c": memory.allocate((1, 1, 1, R, 64), "float32")}


def test_a_graph_is_recorded_the_second_time_and_launched_from_then_on(tmp_path: Path) -> None:
    """On the same buffers; a larger batch in between takes scratch memory of its own and disturbs no recording."""
    one = BranchWork(tmp_path)
    small, large = one.buffers(2), one.buffers(4)
    results = []
    for inputs, outputs in (small, large, small, small, large):
        one.kernels.run("branch.one", inputs, outputs)
        results.append(one.memory.read(outputs["c"]))
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[0], results[3])
    np.testing.assert_array_equal(results[1], results[4])
    assert [graph.launches for graph in one.device.graphs] == [2, 1]
    assert one.kernels.report() == {"graphs_captured": 2, "not_captured": {}, "launches": 6}
    one.kernels.close()
    one.memory.close()


class Owner:
    """Stands for the buffers of a loop."""


def test_work_that_is_repeated_becomes_one_recording_which_goes_with_its_owner(tmp_path: Path) -> None:
    one = BranchWork(tmp_path)
    inputs, outputs = one.buffers(2)
    calls, owner = [], Owner()

    def work() -> tuple[Any, Any]:
        calls.append(1)
        began = one.memory.mark()
        for _ in range(2):
            one.kernels.run("branch.one", inputs, outputs)
        return began, one.memory.mark()

    results = []
    for seed in range(4):
        values = np.random.default_rng(seed % 2).normal(size=(2, 1, 1, 64)).astype(np.float32)
        one.memory.write(inputs["x"], values)
        marks = one.kernels.repeated(owner, "key", work)
        results.append(one.memory.read(outputs["c"]))
        assert one.memory.seconds(*marks) > 0
    assert len(calls) == 2
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], results[3])
    assert (results[0] != results[1]).any()
    (graph,) = [graph for graph in one.device.graphs if len(graph.works) == 14]  # two branches, two marks
    assert (graph.launches, graph.freed) == (3, False)
    del owner
    one.device.refuse_capture = True
    other = Owner()
    for _ in range(3):
        one.kernels.repeated(other, "key", work)
    assert graph.freed
    assert len(calls) == 2 + 4  # recorded in vain once
    np.testing.assert_array_equal(one.memory.read(outputs["c"]), results[1])
    assert list(one.kernels.report()["not_captured"]) == ["images"]
    one.kernels.close()
    one.memory.close()


def test_plans_that_the_kernels_cannot_run_are_refused_in_one_line(tmp_path: Path) -> None:
    manifest = read_manifest(build_plan(tmp_path / "toy.plan", control=False))
    memory = Memory(KernelDevice())
    half = replace(manifest, precision=schema.Precision(compute="fp16", weights="fp16"))
    with pytest.raises(
        BackendError, match=r"the plan is fp32 with fp32 weights, .*; use --backend ort-cuda, or export"
    ):
        open_steps(tmp_path, manifest, memory)
    with pytest.raises(BackendError, match="no table of parameters; export the plan again, or upgrade it"):
        open_steps(tmp_path, half, memory)


def test_the_driver_is_given_what_the_cubins_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """CudaDevice with a driver that only writes down its calls; the names are cuda-python's."""
    real = pytest.importorskip("cuda.bindings.driver")
    calls: list[tuple[Any, ...]] = []

    class Driver:
        CUfunction_attribute, CUlaunchConfig, CUstream = real.CUfunction_attribute, real.CUlaunchConfig, real.CUstream
        CUlaunchAttribute, CUlaunchAttributeID = real.CUlaunchAttribute, real.CUlaunchAttributeID
        fails: str | None = None

        def __getattr__(self, name: str) -> Any:
            assert hasattr(real, name)

            def call(*arguments: Any) -> tuple[Any, ...]:
                calls.append((name, *arguments))
                if name == "cuGetErrorString":
                    return 0, b"no kernel image is available"
                return (int(name == self.fails), name)

            return call

    device, driver = object.__new__(CudaDevice), Driver()
    monkeypatch.setattr(device, "gpu", GPU, raising=False)
    monkeypatch.setattr(device, "stream", 7, raising=False)
    monkeypatch.setattr(device, "_kernels", {}, raising=False)
    monkeypatch.setattr(device, "_modules", [], raising=False)
    monkeypatch.setattr(device, "_bound", local(), raising=False)
    monkeypatch.setitem(device.__dict__, "_driver", driver)
    code = read_cubins("sm89")
    device.load_kernels(code)
    assert [call[1] for call in calls if call[0] == "cuModuleLoadData"] == list(code.values())
    large = [call for call in calls if call[0] == "cuFuncSetAttribute"]
    wanted = [k.targets["sm89"].shared for k in described().values() if k.targets["sm89"].shared > 48 * 1024]
    assert [call[3] for call in large] == wanted
    values = tuple(range(16, 16 + len(described()["gate.s"].arguments)))
    device.put_kernel("gate.s", (3, 2, 1), values)
    name, config, function, (given, types), extra = calls[-1]
    assert (name, function, extra) == ("cuLaunchKernelEx", "cuModuleGetFunction", 0)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (3, 2, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (128, 1, 1)
    assert (config.sharedMemBytes, int(config.hStream), config.numAttrs) == (49152, 7, 0)
    assert given == (*values, 0, 0)
    assert [t.__name__ for t in types] == ["c_void_p"] * 6 + ["c_int"] * 5 + ["c_void_p"] * 2
    monkeypatch.setattr(device, "gpu", replace(GPU, capability=(9, 0)))
    device.load_kernels(read_cubins("sm90"))
    device.put_kernel("gate.s", (3, 2, 1), values)
    (attribute,) = calls[-1][1].attrs
    assert attribute.id == real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert attribute.value.programmaticStreamSerializationAllowed == 1
    driver.fails = "cuModuleLoadData"
    with pytest.raises(
        CudaError, match="no kernel image is available; upgrade the driver, or use --backend ort-cuda"
    ):
        device.load_kernels(code)
