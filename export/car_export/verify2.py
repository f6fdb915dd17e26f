"""Does a plan of format 2 do what its PyTorch models do? As `verify`, with each branch alone and with none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import car_runtime
from car_export.bf16_to_fp32 import runnable
from car_export.errors import VerificationError
from car_export.goldens import greedy_run
from car_export.verify import CFG, GENERAL, Arrays, Greedy, Log, Verifier, check_same_model, scene
from car_runtime.format import manifest as schema
from car_runtime.format.schema import FUSIONS, WEIGHTS, Parameter
from car_train.model import Model
from car_train.model.sample import Recording, control_pyramid, sample


class Verifier2(Verifier):
    """One base with one of its branches, or with none."""

    def __init__(self, directory: Path, reference: Model, branch: str | None, log: Log):
        super().__init__(directory, reference, log)
        self.branch = branch
        self.depth = len(self.car.base.blocks)
        self.fused = next(iter(self.manifest.model.branches.values()), None)

    def check(self, greedy: Greedy, *, shared: bool = True, statics: bool = True) -> None:
        """Compare with PyTorch, but for whole images, which `whole_runs` draws. Fills `problems`.

        greedy: what the model draws of one class, with the branch's control if there is one. shared: also the graphs
        and the sampling that are the same for every branch. statics: also the static forms of the step, which are
        made of the general one, and a branch is of weight 1 or 0 in all of them.
        """
        self.draws, self.cfg = shared, greedy.cfg
        config, classes = self.reference.config.vqvae, self.car.base.config.classes
        rng = np.random.default_rng(0)
        image = scene(config.image_size, rng)
        if self.branch:
            self.control_of_branch(image)
        for batch in sorted({1, *self.manifest.batches} if statics or self.branch else {1}):
            label, record = torch.tensor([greedy.label]), greedy.record
            uniforms = torch.from_numpy(rng.random((batch, config.tokens), dtype=np.float32))
            if batch > 1:
                label, record = torch.from_numpy(rng.integers(0, classes, batch)), Recording()
                pyramid = self.pyramid(image) if self.branch else None
                given = (self.reference.vqvae, self.car, label, uniforms, pyramid, self.cfg)
                sample(*given, top_k=1, record=record, decoded=False)
            rows = torch.cat([label, torch.full_like(label, classes)])
            self.base_condition(rows)
            if self.branch:
                self.run_branch(batch, record, rows)
            self.steps(batch, record, rows, uniforms, statics)
        if shared:
            self.constants()
            self.decoder(greedy.record, greedy.pixels)
            self.encoder(image[None])

    def pyramid(self, image: np.ndarray) -> list[Tensor]:
        """A control image at every scale, as the branch takes it."""
        return control_pyramid(Image.fromarray(image), [s.control_size for s in self.manifest.scales])

    @torch.no_grad()
    def control_of_branch(self, image: np.ndarray) -> None:
        """The control encoder on an image of many colours, uint8 [H, W, 3]."""
        name, branch = f"control.{self.branch}", self.car.branch
        assert branch is not None
        session = self.session(name)
        self.check_ports(name, session)
        sizes = [s.control_size for s in self.manifest.scales]
        images = [np.asarray(Image.fromarray(image).resize((s, s))) for s in sizes]
        (features,) = session.run(None, {f"control_{k}": image for k, image in enumerate(images)})
        expected = torch.cat([branch.features(control)[0] for control in self.pyramid(image)])
        self.compare(name, "features", features, expected)

    @torch.no_grad()
    def base_condition(self, rows: Tensor) -> None:
        session = self.session("condition")
        self.check_ports("condition", session)
        start, modulation = session.run(["start", "modulation"], {"label": rows.numpy()})
        self.compare("condition", "start", start, self.car.base.start(rows)[:, None])
        self.compare("condition", "modulation", modulation, self.car.base.modulations(rows))
        self.modulation = modulation

    @torch.no_grad()
    def run_branch(self, batch: int, record: Recording, rows: Tensor) -> None:
        """The branch's own graphs, and what they hand to the step."""
        modulation = None
        if f"condition.{self.branch}" in self.manifest.graphs:
            name = f"condition.{self.branch}"
            session = self.session(name)
            self.check_ports(name, session)
            (modulation,) = session.run(["modulation"], {"label": rows.numpy()})
            every = self.car.modulations(rows)
            self.compare(name, "modulation", modulation, every[:, 6 * self.depth : -2])
        self.outputs: list[np.ndarray] = []
        general = self.session(f"branch.{self.branch}")
        self.check_ports(f"branch.{self.branch}", general)
        for k in range(len(record.scales)):
            feed = self._branch_feed(k, batch, record, modulation)
            static = f"branch.{self.branch}.{k:02d}.b{batch}"
            forms = {} if k >= GENERAL and static in self.manifest.graphs else {f"branch.{self.branch}": general}
            if static in self.manifest.graphs:
                forms[static] = self.session(static)
                self.check_ports(static, forms[static])
            c, *others = (self._branch_outputs(name, form, k, feed, record) for name, form in forms.items())
            for other in others:
                self.compare(static, "c", other, torch.from_numpy(c))
            self.outputs.append(c)

    def _branch_feed(self, k: int, batch: int, record: Recording, modulation: np.ndarray | None) -> Arrays:
        scale, facts, cache = record.scales[k], self.manifest.scales[k], record.cache
        assert cache is not None
        assert self.branch
        features = scale["control"].reshape(1, facts.side, facts.side, -1).expand(batch, -1, -1, -1)
        feed: Arrays = {
            "x": scale["x"].numpy(),
            "control": np.ascontiguousarray(features.numpy()),
            "rows": np.tile(np.arange(batch), 2),
            "pos": self._constant(k, "pos"),
        }
        if modulation is not None:
            feed["modulation"] = modulation
        dtype = np.float16 if self.manifest.precision.compute == "fp16" else np.float32
        for i in range(self.manifest.model.branches[self.branch].cache_layers):
            feed[f"past_k_{i}"] = cache.k_LTRHd[self.depth + i, : facts.start].numpy().astype(dtype, copy=False)
            feed[f"past_v_{i}"] = cache.v_LTRHd[self.depth + i, : facts.start].numpy().astype(dtype, copy=False)
        return feed

    def _branch_outputs(self, name: str, session, k: int, feed: Arrays, record: Recording) -> np.ndarray:  # type: ignore[no-untyped-def]
        present = {i.name for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs()]
        got = dict(zip(names, session.run(names, {n: a for n, a in feed.items() if n in present}), strict=True))
        cache, facts = record.cache, self.manifest.scales[k]
        assert cache is not None
        assert self.branch
        for i in range(self.manifest.model.branches[self.branch].cache_layers):
            for kind, kept in (("k", cache.k_LTRHd), ("v", cache.v_LTRHd)):
                self.compare(
                    name, f"new_{kind}_{i}", got[f"new_{kind}_{i}"], kept[self.depth + i, facts.start : facts.stop]
                )
        c: np.ndarray = got["c"]
        return c

    def _constant(self, k: int, port: str) -> np.ndarray:
        tensor = self.manifest.tensors[self.manifest.scales[k].constants[port]]
        return np.memmap(self.directory / WEIGHTS, tensor.dtype, "r", tensor.offset, tensor.shape)

    def parameter(self, name: str) -> np.ndarray:
        """A parameter of the table, as stored."""
        one: Parameter = self.manifest.parameters[name]
        return np.memmap(self.directory / WEIGHTS, one.dtype, "r", one.offset, one.shape)

    def _feed(self, k: int, record: Recording, modulation: np.ndarray, uniforms_BL: Tensor) -> Arrays:
        feed = super()._feed(k, record, self.modulation, uniforms_BL)
        feed.pop("control", None)
        B, R = len(feed["uniforms"]), len(feed["x"])
        feed |= {name: np.repeat(feed[name], B) for name in ("cfg", "top_k", "top_p")}
        feed |= {"rows": np.tile(np.arange(B), 2), "twin": np.arange(B, 2 * B)}
        feed["bias"] = np.zeros((*feed["uniforms"].shape, self.manifest.model.vocab), np.float32)
        if self.more_smooth:
            feed["smooth"] = np.repeat(feed["smooth"], B)
        if self.fused is not None:
            feed |= self._mixed(k, B, R)
        return feed

    def _mixed(self, k: int, B: int, R: int) -> Arrays:
        """The branch at weight 1; without one a branch of weight 0, whatever its parameters are."""
        assert self.fused is not None
        side, C, h = self.manifest.scales[k].side, self.manifest.model.width, self.fused.blocks
        weight = 1.0 if self.branch else 0.0
        name = self.branch or next(iter(self.manifest.model.branches))
        dtypes = {port.name: port.dtype for port in self.manifest.graphs["step"].inputs}
        feed: Arrays = {
            "mix": np.full((1, R), weight, np.float32),
            "keep": np.full(R, 1 - weight, np.float32),
            "plain": np.arange(B),
            "control_cfg": np.zeros(B, np.float32),
            "c": self.outputs[k][None] if self.branch else np.zeros((1, h, side, side, R, C), np.float32),
        }
        for i in range(h):
            for kind in FUSIONS[self.fused.fusion]:
                port = f"fusion_{kind}_{i}"
                value = self.parameter(f"branches.{name}.fusions.{i}.{kind.replace('_', '.', 1)}")
                feed[port] = value.astype(dtypes[port], copy=False)[None]
        return feed


def verify_plan_of_2(
    directory: Path,
    base: Model,
    branches: Mapping[str, Model],
    log: Log,
    greedy: Mapping[str, Greedy] = MappingProxyType({}),
) -> None:
    """Raise VerificationError if the plan at `directory` doesn't compute what the models (float32, eval) do.

    base: any of the models, or the one without a branch. branches: name → model. greedy: by branch, and by "" without
    one, what the models draw, where that is known.
    """
    manifest = schema.read_manifest(directory)
    check_same_model(manifest, base, len(base.car.base.blocks) if base.car is not None else 0)
    with runnable(directory) as plan:
        models = {"": base, **branches}
        runs = {name: greedy_run(models[name], CFG, bool(name)) for name in models if name not in greedy}
        _compare(plan, base, branches, log, {**greedy, **runs})


def _compare(
    directory: Path, base: Model, branches: Mapping[str, Model], log: Log, greedy: Mapping[str, Greedy]
) -> None:
    worst: dict[str, float] = {}
    verifiers = {name: Verifier2(directory, model, name, log) for name, model in branches.items()}
    unsteered = Verifier2(directory, base, None, log)
    # With branches the step without one is the same graph, with branches of weight 0: drawing is enough.
    for i, (name, verifier) in enumerate((verifiers or {"": unsteered}).items()):
        verifier.check(greedy[name], shared=i == 0, statics=i == 0)
    verifiers[""] = unsteered
    whole_runs(directory, verifiers, greedy)
    problems = [problem for verifier in verifiers.values() for problem in verifier.problems]
    for verifier in verifiers.values():
        for kind, error in verifier.worst.items():
            worst[kind] = max(worst.get(kind, 0.0), error)
    if problems:
        raise VerificationError(
            f"{len(problems)} differences between the plan and the models:\n  "
            + "\n  ".join(problems)
            + "\ndon't use this plan; export it again with other package versions, and report it"
        )
    log("verified against PyTorch: " + ", ".join(f"{kind} {error:.1e}" for kind, error in worst.items()))


def whole_runs(directory: Path, verifiers: Mapping[str, Verifier2], greedy: Mapping[str, Greedy]) -> None:
    """Draw what each of them has checked on one plan, as users draw. Fills their `problems`."""
    with car_runtime.open_plan(directory, backend="ort-cpu", verify=False) as plan:
        for name, verifier in verifiers.items():
            wanted = greedy[name]
            control = {name: wanted.control} if isinstance(wanted.control, np.ndarray) else None
            # Without a branch the large scales are the same graphs again.
            half = len(plan.manifest.scales) // 2 if plan.manifest.model.branches and not name else None
            verifier.whole_run(plan, wanted._replace(control=control), half)
