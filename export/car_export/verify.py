"""Does a plan do what the PyTorch model does?

Names, then shapes, then values of every graph, then a whole greedy run token by token. Every graph runs in ONNX
Runtime on the CPU with the inputs that PyTorch had, so an error shows in the graph that makes it. All findings are
collected before anything is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
from PIL import Image
from torch import Tensor

import car_runtime
from car_export.bf16_to_fp32 import runnable
from car_export.errors import VerificationError
from car_runtime import GenerationConfig
from car_runtime.backends.onnxruntime.session import needless_optimizers
from car_runtime.format import manifest as schema
from car_train.model import Model
from car_train.model.sample import Recording, control_pyramid, draw, gumbel_noise, keep_top, sample, smooth_codes
from car_train.model.vqvae import split_tokens

Log = Callable[[str], None]
Arrays = dict[str, np.ndarray]
Control = np.ndarray | dict[str, np.ndarray] | None
"""An image, or one for a branch by name."""

TOLERANCE = {"fp32": 2e-4, "fp16": 3e-2}
"""Largest |graph − PyTorch| over largest |PyTorch|, per output.

fp32: sums in another order. fp16: 11 bits through all blocks, times guidance.
"""
LEVELS = {"fp32": 1, "fp16": 12}
"""Largest difference of a decoded pixel, of 255. fp32: a value may fall on the other side of a rounding border."""
DRAWN = 0.995
"""Share of sampled tokens that must agree given the same logits.

A uniform number may fall on a border of the running sum.
"""
CFG = 4.0
GENERAL = 6
"""Scales at which graphs with named dimensions are compared; at further ones their static forms alone.

A graph of named dimensions knows of no scale: a size that was fixed by mistake shows at the first other one. The last
four of ten scales are seven eighths of the work.
"""


class Greedy(NamedTuple):
    """What PyTorch draws of one class and control greedily."""

    control: Control
    label: int
    cfg: float
    tokens: Tensor
    """int64 [1, L]"""
    pixels: Tensor
    """f32 [1, 3, H, W] in [-1, 1]"""
    record: Recording


class Verifier:
    def __init__(self, directory: Path, reference: Model, log: Log):
        assert reference.car is not None
        self.directory, self.reference, self.car, self.log = directory, reference, reference.car, log
        self.manifest = schema.read_manifest(directory)
        self.tolerance = TOLERANCE[self.manifest.precision.compute]
        self.more_smooth = any(port.name == "smooth" for port in self.manifest.graphs["step"].inputs)
        self.cfg = CFG
        self.draws = True
        """Whether sampling within the step is compared."""
        self.problems: list[str] = []
        self.worst: dict[str, float] = {}

    # -- running graphs ----------------------------------------------------------------------------------------------

    def session(self, name: str, extra_outputs: tuple[str, ...] = ()) -> ort.InferenceSession:
        """A session of one graph, with inner values exposed as outputs if asked for."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # A session that runs once: weights that are packed for speed, or converted once for all runs, would cost more
        # time, and a second copy.
        options.add_session_config_entry("session.disable_prepacking", "1")
        path = self.directory / self.manifest.graphs[name].file
        there = {port.name for port in self.manifest.graphs[name].outputs}
        extra_outputs = tuple(output for output in extra_outputs if output not in there)
        skipped = ["ConstantFolding", *needless_optimizers(self.manifest.precision, name)]
        if not extra_outputs:
            return ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=skipped
            )
        model = onnx.load(path, load_external_data=False)
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(o) for o in extra_outputs)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.directory))
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=skipped
        )

    def check_ports(self, name: str, session: ort.InferenceSession) -> None:
        """Names, dtypes and shapes of a graph, as the manifest has them."""
        graph = self.manifest.graphs[name]
        for kind, declared, found in (
            ("input", graph.inputs, session.get_inputs()),
            ("output", graph.outputs, session.get_outputs()),
        ):
            actual = {p.name: (_NUMPY[p.type], tuple(p.shape)) for p in found}
            if name == "step" or name.startswith("step."):  # plans of earlier exports keep their logits inside
                actual = {n: port for n, port in actual.items() if n != "logits" or n in {p.name for p in declared}}
            for port in declared:
                if port.name not in actual:
                    self.problems.append(f"{name}: {kind} {port.name} is missing")
                elif actual[port.name] != (port.dtype, port.shape):
                    self.problems.append(
                        f"{name}: {kind} {port.name} is {actual[port.name]}, "
                        f"the manifest says {(port.dtype, port.shape)}"
                    )
            extra = sorted(set(actual) - {p.name for p in declared})
            self.problems += [f"{name}: {kind} {e} is not in the manifest" for e in extra]

    def compare(self, name: str, output: str, got: np.ndarray, expected: Tensor) -> None:
        want = expected.detach().float().numpy()
        if got.shape != want.shape:
            self.problems.append(f"{name}: {output} has shape {got.shape}, expected {want.shape}")
            return
        error = float(np.abs(got.astype(np.float32) - want).max() / max(float(np.abs(want).max()), 1e-30))
        kind = name.split(".")[0]
        self.worst[kind] = max(self.worst.get(kind, 0.0), error)
        if not error <= self.tolerance:
            self.problems.append(
                f"{name}: {output} is off by {error:.2e} of its range, more than {self.tolerance:.0e}"
            )

    # -- one graph after the other -----------------------------------------------------------------------------------

    @torch.no_grad()
    def control(self, images: list[np.ndarray], record: Recording) -> None:
        session = self.session("control")
        self.check_ports("control", session)
        (features,) = session.run(None, {f"control_{k}": image for k, image in enumerate(images)})
        self.compare("control", "features", features, torch.cat([s["control"][0] for s in record.scales]))

    @torch.no_grad()
    def condition(self, rows: Tensor) -> None:
        session = self.session("condition")
        self.check_ports("condition", session)
        start, modulation = session.run(["start", "modulation"], {"label": rows.numpy()})
        self.compare("condition", "start", start, self.car.base.start(rows)[:, None])
        self.compare("condition", "modulation", modulation, self.car.modulations(rows))

    def step(self, name: str, session: ort.InferenceSession, k: int, feed: Arrays, record: Recording) -> None:
        """One scale with PyTorch's inputs: every output, and the mixed logits inside."""
        wanted = [o.name for o in self.manifest.graphs[name].outputs if o.name != "logits"]
        present = {i.name for i in session.get_inputs()}
        got = dict(
            zip(
                [*wanted, "logits"],
                session.run([*wanted, "logits"], {n: a for n, a in feed.items() if n in present}),
                strict=True,
            )
        )
        scale, cache = record.scales[k], record.cache
        assert cache is not None
        self.compare(name, "logits", got["logits"].reshape(scale["logits"].shape), scale["logits"])
        start, stop = self.manifest.scales[k].start, self.manifest.scales[k].stop
        for i in range(self.manifest.model.cache_layers):
            self.compare(name, f"new_k_{i}", got[f"new_k_{i}"], cache.k_LTRHd[i, start:stop])
            self.compare(name, f"new_v_{i}", got[f"new_v_{i}"], cache.v_LTRHd[i, start:stop])
        if self.tokens_agree(
            name, got["tokens"].reshape(len(got["tokens"]), -1), scale["tokens"].flatten(1), scale["logits"]
        ):
            self.compare(name, "f_hat_out", got["f_hat_out"], scale["f_hat_out"])
            if k + 1 < len(record.scales):
                self.compare(name, "next_x", got["next_x"], record.scales[k + 1]["x"])
        # The sampling is the same at every scale, and a small part of what a step costs, so three are enough.
        if name == "step" and self.draws and k < 3:
            self.drawn(session, k, feed, torch.from_numpy(got["logits"]))
            if self.more_smooth:
                self.smoothed(session, k, feed, torch.from_numpy(got["logits"]))

    def drawn(self, session: ort.InferenceSession, k: int, feed: Arrays, logits_BSSV: Tensor) -> None:
        """Sampling inside the graph against the same definition in PyTorch, on the graph's own logits."""
        top_k, top_p = max(2, self.manifest.model.vocab // 5), 0.9
        feed = {**feed, "top_k": np.array([top_k]), "top_p": np.array([top_p], np.float32)}
        (tokens,) = session.run(["tokens"], feed)
        expected = draw(logits_BSSV, torch.from_numpy(feed["uniforms"]), torch.tensor([top_k]), torch.tensor([top_p]))
        # A draw on a border moves to another token: one token of a small grid may always differ.
        differing = int((tokens != expected.numpy()).sum())
        if differing > max(1, round((1 - DRAWN) * tokens.size)):
            self.problems.append(
                f"step: {differing} of {tokens.size} tokens drawn at scale {k} differ from PyTorch's"
            )

    def smoothed(self, session: ort.InferenceSession, k: int, feed: Arrays, logits_BSSV: Tensor) -> None:
        """f̂ of mixed codes against the same definition in PyTorch, on the graph's own logits."""
        top_k, top_p = max(2, self.manifest.model.vocab // 5), 0.9
        noise_BSSV = gumbel_noise([k], logits_BSSV[..., 0].numel(), logits_BSSV.shape[-1]).view(logits_BSSV.shape)
        feed = {**feed, "top_k": np.array([top_k]), "top_p": np.array([top_p], np.float32)}
        feed |= {"smooth": np.array([True]), "smooth_noise": noise_BSSV.numpy()}
        (f_hat,) = session.run(["f_hat_out"], feed)
        quantizer = self.reference.vqvae.quantizer
        kept_BSSV = keep_top(logits_BSSV, torch.tensor([top_k]), torch.tensor([top_p]))
        ratio = torch.from_numpy(np.array(feed["cfg_ratio"]))
        codes_BSSZ = smooth_codes(kept_BSSV, noise_BSSV, ratio, quantizer.embedding)
        expected = torch.from_numpy(feed["f_hat"]) + quantizer.contribution(codes_BSSZ, k)
        self.compare("step", "f_hat_out of mixed codes", f_hat, expected)

    def tokens_agree(self, name: str, got_BN: np.ndarray, expected_BN: Tensor, logits_BNV: Tensor) -> bool:
        """Equal, or different only where the two tokens' logits are equal to within the tolerance."""
        differs = torch.from_numpy(got_BN) != expected_BN
        if not differs.any():
            return True
        chosen = logits_BNV.gather(-1, torch.from_numpy(got_BN)[..., None])[..., 0]
        gap = ((logits_BNV.amax(-1) - chosen)[differs].max() / logits_BNV.abs().max()).item()
        share = f"{name}: {int(differs.sum())} of {got_BN.size} greedy tokens"
        if gap > self.tolerance:
            self.problems.append(f"{share} differ, by {gap:.2e} of the logits' range")
        else:
            self.log(f"{share} are near ties ({gap:.1e}) and fall the other way")
        return False

    @torch.no_grad()
    def steps(self, batch: int, record: Recording, rows: Tensor, uniforms_BL: Tensor, statics: bool = True) -> None:
        modulation = self.car.modulations(rows).numpy()
        feeds = [self._feed(k, record, modulation, uniforms_BL) for k in range(len(record.scales))]
        if batch == 1:
            session = self.session("step", ("logits",))
            self.check_ports("step", session)
            for k, feed in enumerate(feeds):
                if k < GENERAL or not (statics and f"step.{k:02d}.b1" in self.manifest.graphs):
                    self.step("step", session, k, feed, record)
            del session
        for k, feed in enumerate(feeds):
            name = f"step.{k:02d}.b{batch}"
            if statics and name in self.manifest.graphs:
                session = self.session(name, ("logits",))
                self.check_ports(name, session)
                self.step(name, session, k, feed, record)
                del session  # before the next one: each holds all weights

    def _feed(self, k: int, record: Recording, modulation: np.ndarray, uniforms_BL: Tensor) -> Arrays:
        scale, facts, cache = record.scales[k], self.manifest.scales[k], record.cache
        assert cache is not None
        grid = (scale["f_hat"].shape[0], facts.side, facts.side)
        feed: Arrays = {
            "x": scale["x"].numpy(),
            "modulation": modulation,
            "f_hat": scale["f_hat"].numpy(),
            "uniforms": uniforms_BL[:, facts.start : facts.stop].reshape(grid).numpy(),
            "cfg": np.array([self.cfg], np.float32),
            "top_k": np.array([1]),
            "top_p": np.array([2], np.float32),
            "known": np.zeros(grid, np.int64),
            "known_mask": np.zeros(grid, bool),
        }
        if self.more_smooth:
            feed |= {"smooth": np.array([False]), "smooth_noise": np.zeros((*grid, self.manifest.model.vocab), "f4")}
        if "control" in scale:
            feed["control"] = scale["control"].reshape(facts.side, facts.side, -1).numpy()
        for port, tensor in facts.constants.items():
            feed[port] = _read(self.directory, self.manifest.tensors[tensor])
        dtype = np.float16 if self.manifest.precision.compute == "fp16" else np.float32
        for i in range(self.manifest.model.cache_layers):
            feed[f"past_k_{i}"] = cache.k_LTRHd[i, : facts.start].numpy().astype(dtype, copy=False)
            feed[f"past_v_{i}"] = cache.v_LTRHd[i, : facts.start].numpy().astype(dtype, copy=False)
        return feed

    @torch.no_grad()
    def constants(self) -> None:
        """The scales' constants, which graphs with named dimensions are given."""
        quantizer, config = self.reference.vqvae.quantizer, self.reference.config.vqvae
        position = self.car.base.position()
        for k, scale in enumerate(self.manifest.scales):
            wanted = {
                "pos": position[scale.start : scale.stop].view(scale.side, scale.side, -1),
                "up": quantizer.up(k),
                "down": quantizer.down(0 if k + 1 == len(config.sides) else k + 1),
                "phi": torch.tensor([config.phi_index[k]]),
                "cfg_ratio": torch.tensor([config.ratios[k]]),
            }
            for port, value in wanted.items():
                got = _read(self.directory, self.manifest.tensors[scale.constants[port]])
                self.compare(f"constants.{k}", port, got, value)

    @torch.no_grad()
    def decoder(self, record: Recording, pixels: Tensor) -> None:
        session = self.session("decoder")
        self.check_ports("decoder", session)
        (image,) = session.run(None, {"f_hat": record.scales[-1]["f_hat_out"].numpy()})
        self.levels("decoder", image, pixels)

    def levels(self, name: str, image: np.ndarray, pixels: Tensor) -> None:
        expected = ((pixels + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        worst = int(np.abs(image.astype(np.int32) - expected).max())
        if worst > (limit := LEVELS[self.manifest.precision.compute]):
            self.problems.append(f"{name}: a pixel is off by {worst} levels of 255, more than {limit}")

    @torch.no_grad()
    def encoder(self, images_BHW3: np.ndarray) -> None:
        """Every token the graph chose must be as near as the nearest code, to within the tolerance.

        Its own coarser tokens are given.
        """
        session = self.session("encoder")
        self.check_ports("encoder", session)
        (tokens,) = session.run(None, {"image": images_BHW3})
        vqvae = self.reference.vqvae
        quantizer = vqvae.quantizer
        rest = vqvae.latent(torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float() / 255 * 2 - 1)
        for k, grid in enumerate(split_tokens(torch.from_numpy(tokens), vqvae.config.sides)):
            z = (quantizer.down(k) @ rest @ quantizer.down(k).T).permute(0, 2, 3, 1)
            distance = torch.cdist(z.flatten(0, 2), quantizer.embedding).square()
            chosen = distance.gather(1, grid.reshape(-1, 1))[:, 0]
            excess = ((chosen - distance.amin(1)).max() / distance.mean()).item()
            if excess > 5 * self.tolerance:  # a squared distance doubles an error, and the latent brings its own
                self.problems.append(
                    f"encoder: a token of scale {k} is further than the nearest code "
                    f"by {excess:.2e} of the mean distance"
                )
            rest = rest - quantizer.contribution(quantizer.embedding[grid], k)

    @torch.no_grad()
    def whole_run(self, plan: car_runtime.Plan, wanted: Greedy, stop_after: int | None = None) -> None:
        """The plan as users run it: greedy, free-running, through car_runtime; up to a scale if one is given."""
        # Greedily the mixture of the kept codes is the one code that is kept: smooth or not, the tokens are the same.
        for more_smooth in (False, True) if self.more_smooth else (False,):
            config = GenerationConfig(control=wanted.control, label=wanted.label, cfg=wanted.cfg, top_k=1, top_p=0)
            result = plan.generate(config, more_smooth=more_smooth, stop_after=stop_after)
            self._whole_run_agrees(result, wanted)

    def _whole_run_agrees(self, result: car_runtime.Result, wanted: Greedy) -> None:
        tokens = torch.from_numpy(result.tokens)[0]
        drawn = tokens >= 0
        differs = (drawn & (tokens != wanted.tokens[0])).nonzero().flatten()
        count = int(drawn.sum())
        if len(differs) == 0:
            if drawn.all():
                self.levels("whole run", result.images, wanted.pixels)
            self.log(f"whole greedy run: all {count} tokens equal PyTorch's")
            return
        first = int(differs[0])
        logits_V = torch.cat([s["logits"] for s in wanted.record.scales], 1)[0, first]
        gap = ((logits_V.max() - logits_V[int(result.tokens[0, first])]) / logits_V.abs().max()).item()
        text = f"whole greedy run: token {first} of {count} is the first to differ, by {gap:.2e} of the logits' range"
        if gap > self.tolerance:
            self.problems.append(text)
        else:
            self.log(f"{text}: a near tie")

    def run(self) -> None:
        config, classes = self.reference.config.vqvae, self.car.base.config.classes
        rng = np.random.default_rng(0)
        image = scene(config.image_size, rng)
        controls = pyramid = None
        if self.car.branch is not None:
            sizes = [s.control_size for s in self.manifest.scales]
            controls = [np.asarray(Image.fromarray(image).resize((s, s))) for s in sizes]
            pyramid = control_pyramid(Image.fromarray(image), sizes)
        for batch in sorted({1, *self.manifest.batches}):
            label = torch.from_numpy(rng.integers(0, classes, batch))
            rows = torch.cat([label, torch.full_like(label, classes)])
            uniforms = torch.from_numpy(rng.random((batch, config.tokens), dtype=np.float32))
            record = Recording()
            tokens, pixels = sample(
                self.reference.vqvae, self.car, label, uniforms, pyramid, CFG, top_k=1, record=record
            )
            self.steps(batch, record, rows, uniforms)
            if batch == 1:
                if controls is not None:
                    self.control(controls, record)
                self.condition(rows)
                self.constants()
                self.decoder(record, pixels)
                self.encoder(image[None])
                greedy = Greedy(image if controls else None, int(label[0]), CFG, tokens, pixels, record)
                with car_runtime.open_plan(self.directory, backend="ort-cpu", verify=False) as plan:
                    self.whole_run(plan, greedy)
        if self.problems:
            raise VerificationError(
                f"{len(self.problems)} differences between the plan and the model:\n  "
                + "\n  ".join(self.problems)
                + "\ndon't use this plan; export it again with other package versions, and report it"
            )
        self.log(
            "verified against PyTorch: "
            + ", ".join(f"{k} {v:.1e}" for k, v in self.worst.items())
            + f" (limit {self.tolerance:.0e})"
        )


def verify_plan(directory: Path, reference: Model, log: Log) -> None:
    """Raise VerificationError if the plan at `directory` does not compute what `reference` (float32, eval) does."""
    manifest = schema.read_manifest(directory)
    check_same_model(manifest, reference, reference.car.layers if reference.car is not None else 0)
    made = manifest.model
    if (made.control_type is not None) != (reference.car is not None and reference.car.branch is not None):
        raise VerificationError(
            "one of plan and checkpoint has no control branch; give the one that the plan was made from"
        )
    with runnable(directory) as plan:
        Verifier(plan, reference, log).run()


def check_same_model(manifest: schema.Manifest, reference: Model, layers: int) -> None:
    """Raise VerificationError where a plan is of another model. layers: of K/V that its step has."""
    if reference.car is None:
        raise VerificationError("the checkpoint holds a tokenizer only; give the one that the plan was made from")
    made = manifest.model
    facts = (made.depth, made.width, made.heads, made.vocab, made.latent_channels, made.image_size, made.classes)
    config, base = reference.config.vqvae, reference.car.base.config
    wanted = (base.depth, base.C, base.H, config.vocab, config.latent_channels, config.image_size, base.classes)
    sides = tuple(s.side for s in manifest.scales)
    if facts != wanted or sides != config.sides or made.cache_layers != layers:
        raise VerificationError(
            f"the plan is of another model: depth, width, heads, codes, channels, pixels, classes are {facts}, "
            f"the checkpoint's {wanted}, K/V pairs {made.cache_layers} and {layers}; give the one that the plan was "
            "made from"
        )


_NUMPY: Mapping[str, str] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
    "tensor(uint8)": "uint8",
}


def _read(directory: Path, tensor: schema.Tensor) -> np.ndarray:
    return np.memmap(directory / schema.WEIGHTS, tensor.dtype, "r", tensor.offset, tensor.shape)


def scene(size: int, rng: np.random.Generator) -> np.ndarray:
    """A test image, uint8 [size, size, 3]: smooth colours, a disc with an edge, and some noise."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y), np.sin(9 * x * y)], -1) * 90 + 128
    disc = (x - 0.45) ** 2 + (y - 0.55) ** 2 < 0.09
    waves[disc] = 255 - waves[disc]
    return (waves + rng.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8)
