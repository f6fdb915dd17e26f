"""What a plan's graphs launch: kernels, grids and addresses, as data.

A graph of the plan (format 2) with the buffers that it is bound to becomes a list of launches, in order. Nothing is
launched here, and no value on the device is looked at: the same buffers give the same list, which may be recorded.

Shapes: R transformer rows, B images, S side of this scale, N = S·S tokens, P tokens of the scales before it, T side
of the next; M = N·R rows of the residual stream, token-major (row = token · R + r); C width, H heads of width D, F
width of an MLP, Z latent channels, E side of f̂, V vocabulary, m branches that are mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.cuda.buffers import DeviceArray
from car_runtime.backends.cuda.kernels import Launch, kernels, launch, named
from car_runtime.backends.cuda.maps import FILLS, Net, Shapes, decode, encode, encode_control
from car_runtime.backends.cuda.weights import Weights, padded
from car_runtime.errors import RunError
from car_runtime.format.folder import PlanFolder
from car_runtime.format.graph_check import conv_strides
from car_runtime.format.manifest import Manifest
from car_runtime.format.parameters import UnsupportedGraphError, stored_arrays
from car_runtime.format.schema import Branch

FEW = 64
"""Up to so many rows the norm is part of the product that follows: one launch less, and the rows are read from L1."""
LARGEST_VOCAB, LARGEST_SIDE = 16_384, 64
HEAD_WIDTHS = (32, 64)
HALVES = ("fp16", "bf16")
_INDEX = 2**31

Arrays = Mapping[str, DeviceArray]
Scratch = Mapping[str, int]
"""Name → address of what a graph keeps to itself, as large as `LaunchPlan.scratch_bytes` has it."""


def problem(manifest: Manifest) -> str | None:
    """Why these kernels can't run a plan, in words with the remedy; None if they can."""
    model, remedy = manifest.model, "use --backend ort-cuda"
    compute, weights = manifest.precision.compute, manifest.precision.weights
    if compute not in HALVES or weights != compute:
        kind = f"{compute} with {weights} weights"
        return (
            f"the plan is {kind}, but the kernels multiply in half precision; {remedy}, or export it with "
            "--precision fp16"
        )
    if manifest.table_problem is not None:
        return manifest.table_problem
    if model.width % model.heads or model.width // model.heads not in HEAD_WIDTHS:
        return f"the plan's heads are {model.width / model.heads:g} wide, but the kernels' 32 or 64; {remedy}"
    if model.vocab > LARGEST_VOCAB:
        return f"the plan's vocabulary is {model.vocab}, but the kernels draw from at most {LARGEST_VOCAB}; {remedy}"
    if model.latent_size > LARGEST_SIDE:
        return f"the plan's f̂ is {model.latent_size} wide, but the kernels' at most {LARGEST_SIDE}; {remedy}"
    other = next((name for name, branch in model.branches.items() if branch.transformer != "blocks"), None)
    if other is not None:
        return f"the branch {other!r} is made of convolutions, which have no kernels; {remedy}"
    return None


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Addresses of a block's parameters."""

    qkv: int
    q_bias: int
    v_bias: int
    log_scale: int
    proj: int
    proj_bias: int
    fc1: int
    fc1_bias: int
    fc2: int
    fc2_bias: int


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """One scale's rows: N tokens of R rows, behind P tokens of the past."""

    N: int
    R: int
    P: int
    M: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model's sizes that launches depend on."""

    half: str
    """What it multiplies in: "fp16" or "bf16"."""
    depth: int
    width: int
    heads: int
    hidden: int
    """F."""
    vocab: int
    latent_channels: int
    latent_size: int
    phis: int
    """φ that the scales share."""
    largest: int
    """Tokens of the largest scale."""
    branches: Mapping[str, Branch]
    classes: int
    control_sides: tuple[int, ...]
    """Of the control images of all scales."""
    strides: Mapping[str, tuple[int, ...]]
    """Branch → strides of its control encoder's steps, none where it is the tokenizer's encoder."""
    shapes: Shapes


def sizes_of(manifest: Manifest, strides: Mapping[str, tuple[int, ...]] | None = None) -> Sizes:
    """A plan's sizes, with strides as `strides_of` has them.

    UnsupportedGraphError if its table lacks the parameters that have them.
    """
    model = manifest.model
    hidden, phis = (
        manifest.parameters[name].shape[:1] if name in manifest.parameters else ()
        for name in ("base.blocks.0.mlp.fc1.bias", "vqvae.quantizer.phi_bias")
    )
    if not hidden or not phis:
        raise UnsupportedGraphError("the plan's table lacks parameters of the base or the tokenizer")
    return Sizes(
        half=manifest.precision.compute,
        depth=model.depth,
        width=model.width,
        heads=model.heads,
        hidden=hidden[0],
        vocab=model.vocab,
        latent_channels=model.latent_channels,
        latent_size=model.latent_size,
        phis=phis[0] // model.latent_channels,
        largest=max(scale.tokens for scale in manifest.scales),
        branches=model.branches,
        classes=model.classes,
        control_sides=tuple(scale.control_size for scale in manifest.scales),
        strides=strides or {},
        shapes={name: entry.shape for name, entry in manifest.parameters.items()},
    )


@dataclass(frozen=True, kw_only=True)
class ScaleConstants:
    """Of one scale, S tokens a side."""

    up: NDArray[np.float32]
    """[E, S]."""
    down: NDArray[np.float32]
    """[S, E]."""
    phi: NDArray[np.int64]
    """[1], the number of its φ."""


def scale_constants(manifest: Manifest, root: Path) -> list[ScaleConstants]:
    """Of all scales, from the plan's tensors: a scale's constants have the matrix to the size of the next one."""
    names = {scale.constants[port] for scale in manifest.scales for port in ("up", "down", "phi")}
    with PlanFolder(root) as folder:
        stored = stored_arrays(folder, {name: manifest.tensors[name] for name in names})
        arrays: dict[str, NDArray[Any]] = {name: np.array(values) for name, values in stored.items()}
    given = [scale.constants for scale in manifest.scales]
    return [
        ScaleConstants(up=arrays[one["up"]], down=arrays[given[k - 1]["down"]], phi=arrays[one["phi"]])
        for k, one in enumerate(given)
    ]


def strides_of(manifest: Manifest, root: Path) -> dict[str, tuple[int, ...]]:
    """Branch → strides of its control encoder's steps, from its graph, which alone says them. See `Sizes.strides`."""
    found: dict[str, tuple[int, ...]] = {}
    for name in manifest.model.branches:
        if f"branches.{name}.encoder.proj.weight" in manifest.parameters:
            found[name] = ()
            continue
        strides = conv_strides((root / manifest.graphs[f"control.{name}"].file).read_bytes())
        names = [f"branch.encoder.steps.{i}.weight" for i in range(len(strides))]
        steps = tuple(strides[step] for step in names if step in strides)
        if steps and f"branches.{name}.encoder.steps.{len(steps)}.weight" not in manifest.parameters:
            found[name] = steps
    return found


class LaunchPlan:
    """A plan's parameters, and what its graphs launch."""

    def __init__(self, model: Sizes, weights: Weights, scales: Sequence[ScaleConstants] = ()) -> None:
        """Parameters are looked up here, once. UnsupportedGraphError where one is missing or of another shape.

        scales: what the tokenizer's encoder needs of each; without them it is not among `graphs`.
        """
        self._scales = scales
        self._weights = weights  # what the addresses below belong to
        self.C, self.D, self.V, self.N = model.width, model.width // model.heads, model.vocab, padded(model.vocab)
        self.Z, self.E = model.latent_channels, model.latent_size
        self.H, self.depth = model.heads, model.depth
        self._largest, self.F, self._phis = model.largest, model.hidden, model.phis
        self._branches, self._model = model.branches, model
        self._base = [self._block(weights, f"base.blocks.{i}.") for i in range(model.depth)]
        self._steering = {
            name: [self._block(weights, f"branches.{name}.blocks.{i}.") for i in range(branch.blocks)]
            for name, branch in model.branches.items()
        }
        self._inject = {
            name: (
                weights.neighbours(f"branches.{name}.input_conv.weight", self.C),
                weights.vector(f"branches.{name}.input_conv.bias", self.C),
            )
            for name in model.branches
        }
        self._head = weights.matrix("base.head.weight", self.C, self.V), weights.vector("base.head.bias", self.V)
        self._word = (
            weights.matrix("base.word_embedding.weight", self.Z, self.C),
            weights.vector("base.word_embedding.bias", self.C),
        )
        self._embedding = weights.rows("base.class_embedding.weight", model.classes + 1, self.C)
        self._first = weights.vector("base.pos_start", self.C)
        self._shared = None
        if "base.shared_ada_linear.weight" in model.shapes:
            self._shared = self._ada("base.shared_ada_linear", 6)
        self._codes = weights.floats("vqvae.quantizer.embedding", self.V, self.Z)
        self._phi = (
            weights.floats("vqvae.quantizer.phi_weight", self._phis * self.Z, self.Z, 3, 3),
            weights.floats("vqvae.quantizer.phi_bias", self._phis * self.Z),
        )

        if model.shapes:
            self._look_up()

    def _look_up(self) -> None:
        """Find the parameters of all other graphs, by making their launches for nothing."""
        label, nowhere = DeviceArray((1,), "int64", 0, None), DeviceArray((1, 1, 1, self.C), "float32", 0, None)
        rows = {"condition": 6 * self.depth + 2}
        rows |= {f"condition.{name}": 6 * branch.blocks for name, branch in self._branches.items()}
        for graph, M in rows.items():
            modulation = DeviceArray((1, M, self.C), "float32", 0, None)
            self._condition(graph, label, {"modulation": modulation, "start": nowhere})
        f_hat = DeviceArray((1, self.Z, self.E, self.E), "float32", 0, None)
        self._decoder(f_hat, 0, self._net())
        if self._scales:
            self._encoder(0, 0, self._net())
        for name in self._model.strides:
            controls = {f"control_{k}": 0 for k in range(len(self._model.control_sides))}
            self._control(f"control.{name}", controls, 0, self._net())

    def _block(self, weights: Weights, at: str) -> _Block:
        C, F = self.C, self.F
        return _Block(
            qkv=weights.matrix(f"{at}attn.qkv_weight", C, 3 * C),
            q_bias=weights.vector(f"{at}attn.q_bias", C),
            v_bias=weights.vector(f"{at}attn.v_bias", C),
            log_scale=weights.vector(f"{at}attn.log_scale_H", self.H),
            proj=weights.matrix(f"{at}attn.proj.weight", C, C),
            proj_bias=weights.vector(f"{at}attn.proj.bias", C),
            fc1=weights.matrix(f"{at}mlp.fc1.weight", C, F),
            fc1_bias=weights.vector(f"{at}mlp.fc1.bias", F),
            fc2=weights.matrix(f"{at}mlp.fc2.weight", F, C),
            fc2_bias=weights.vector(f"{at}mlp.fc2.bias", C),
        )

    def _ada(self, module: str, rows: int) -> tuple[int, int]:
        """Addresses of a linear layer from the class to rows of modulation."""
        C = self.C
        return self._weights.matrix(f"{module}.weight", C, rows * C), self._weights.vector(f"{module}.bias", rows * C)

    def scratch(self, graph: str, inputs: Arrays) -> dict[str, int]:
        """What `launches` needs to keep to itself: name → bytes. Of steps and branches, for their largest scale."""
        if graph == "decoder":
            return self._decoder(inputs["f_hat"], 0, self._net()).sizes
        if graph == "encoder":
            return self._encoder(0, 0, self._net()).sizes
        if graph.startswith("control."):
            return self._control(graph, dict.fromkeys(inputs, 0), 0, self._net()).sizes
        if "x" not in inputs:
            return {}
        R = inputs["x"].shape[0]
        B = inputs["uniforms"].shape[0] if "uniforms" in inputs else R
        smooth = "smooth" in inputs
        return self.scratch_bytes(R, B, inputs["c"].shape[0] if "c" in inputs else 1, smooth)

    def scratch_bytes(self, R: int, B: int, m: int, smooth: bool = False) -> dict[str, int]:
        """What a step or a branch needs for its largest scale: name → bytes. m: branches at once."""
        M, C = self._largest * R, self.C
        latent = B * self.Z
        return {
            "stream": 4 * M * C,
            "middle": 4 * M * C,
            "normed": 2 * M * C,
            "q": 2 * M * C,
            "mixed": 2 * M * C,
            "hidden": 2 * M * self.F,
            "fused": 2 * m * M * 2 * C if self._branches else 0,
            "logits": 4 * M * self.N,
            "upsampled": 4 * latent * self.E**2,
            "following": 2 * latent * self._largest,
            "guided": 4 * B * self._largest * self.V if smooth else 0,
            "border": 4 * B * self._largest if smooth else 0,
            "smoothed": 4 * latent * self._largest if smooth else 0,
        }

    @property
    def half(self) -> str:
        """The dtype of what is in half precision, keys and values above all."""
        return {"fp16": "float16", "bf16": "bfloat16"}[self._model.half]

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that `launches` knows."""
        own = ("step", "condition", "decoder", *(["encoder"] if self._scales else []))
        branches = [f"{kind}.{name}" for name in self._branches for kind in ("branch", "condition")]
        return (*own, *branches, *(f"control.{name}" for name in self._model.strides))

    def launches(self, graph: str, inputs: Arrays, outputs: Arrays, scratch: Scratch) -> list[Launch]:
        """What a graph on these buffers launches. RunError where they are not as the kernels need them."""
        try:
            if graph == "step":
                return self._step(inputs, outputs, scratch)
            if graph == "decoder":
                image = outputs["image"].address
                return self._decoder(inputs["f_hat"], image, self._net(scratch)).launches
            if graph == "encoder":
                photo = inputs["image"]
                if photo.shape[0] != 1:
                    raise RunError(f"the kernels encode one image at a time, not {photo.shape[0]}; give one")
                return self._encoder(photo.address, outputs["tokens"].address, self._net(scratch)).launches
            if graph.startswith("control."):
                controls = {name: array.address for name, array in inputs.items()}
                features = outputs["features"].address
                return self._control(graph, controls, features, self._net(scratch)).launches
            if graph.startswith("condition"):
                return self._condition(graph, inputs["label"], outputs)
            return self._branch(graph.removeprefix("branch."), inputs, outputs, scratch)
        except KeyError as error:
            raise RunError(
                f"the graph {graph!r} was run without {error.args[0]}; close the plan and open it again"
            ) from error

    # -- the graphs --------------------------------------------------------------------------------------------------

    def _branch(self, name: str, inputs: Arrays, outputs: Arrays, scratch: Scratch) -> list[Launch]:
        """𝒯 of one scale: each block's output to its place in `c`, where the next block reads it."""
        blocks, c = self._steering[name], outputs["c"]
        rows, x = self._rows(inputs, "past_k_0"), inputs["x"]
        S, R = x.shape[1], rows.R
        self._check_indices(rows)
        weight, bias = self._inject[name]
        stream, middle = scratch["stream"], scratch["middle"]
        size = "m" if _tiles(rows.M, self.C, 64, 64) >= FILLS else "s"
        launches = [
            self._product(
                f"inject.{size}", rows.M, self.C,
                x=x.address, w=weight, bias=bias, control=inputs["control"].address, image=inputs["rows"].address,
                pos=inputs["pos"].address, out=stream, S=S, C=self.C, R=R,
            )
        ]  # fmt: skip
        modulation = inputs["modulation"]
        step = 4 * rows.M * self.C
        for i, block in enumerate(blocks):
            out = c.address + (len(blocks) - 1 - i) * step
            launches += self._run_block(
                block, stream, middle, out, self._modulation(modulation, 6 * i), rows,
                self._slot(inputs, outputs, "k", i, rows), self._slot(inputs, outputs, "v", i, rows), scratch,
            )  # fmt: skip
            stream = out
        return launches

    def _step(self, inputs: Arrays, outputs: Arrays, scratch: Scratch) -> list[Launch]:
        """The base's blocks, with branches fused in where there are any; logits, tokens, f̂ and the next input."""
        rows, modulation = self._rows(inputs, "past_k_0"), inputs["modulation"]
        self._check_indices(rows)
        stream = scratch["stream"]
        launches = [
            self._launch(
                "add_position.row", (rows.M,),
                x=inputs["x"].address, pos=inputs["pos"].address, out=stream, tokens=rows.N, C=self.C, R=rows.R,
            )
        ]  # fmt: skip
        fused = next(iter(self._branches.values())).blocks if self._branches else 0
        for i, block in enumerate(self._base):
            at = i - (self.depth - fused)
            if at >= 0:
                launches += self._fuse(stream, at, inputs, rows, scratch)
            launches += self._run_block(
                block, stream, stream, stream, self._modulation(modulation, 6 * i), rows,
                self._slot(inputs, outputs, "k", i, rows), self._slot(inputs, outputs, "v", i, rows), scratch,
            )  # fmt: skip
        launches += self._logits(stream, modulation, rows, scratch)
        return launches + self._sample(inputs, outputs, rows, scratch)

    def _condition(self, graph: str, label: DeviceArray, outputs: Arrays) -> list[Launch]:
        """The class's start tokens, and the modulation of the base's blocks and head, or of a branch's blocks."""
        R, C, out = label.shape[0], self.C, outputs["modulation"]
        stride = out.shape[1] * C
        where = f"branches.{graph.removeprefix('condition.')}." if "." in graph else "base."
        launches = []
        for i in range(out.shape[1] // 6):
            block = f"{where}blocks.{i}"
            offset = 0
            if self._shared is None:
                linear = self._ada(f"{block}.ada_linear", 6)
            else:
                linear, offset = self._shared, self._weights.rows(f"{block}.ada_offset", 6, C)
            launches.append(self._modulate(label, linear, offset, out.address + 24 * i * C, 6 * C, stride))
        if where == "base.":
            head = self._ada("base.head_ada_linear", 2)
            launches.append(self._modulate(label, head, 0, out.address + 4 * (out.shape[1] - 2) * C, 2 * C, stride))
            given = {"label": label.address, "embedding": self._embedding, "first": self._first}
            launches.append(self._launch("start.row", (R,), out=outputs["start"].address, C=C, **given))
        return launches

    def _modulate(
        self, label: DeviceArray, linear: tuple[int, int], offset: int, out: int, N: int, stride: int
    ) -> Launch:
        R = label.shape[0]
        return self._product(
            "condition.s", R, N,
            label=label.address, embedding=self._embedding, w=linear[0], bias=linear[1], offset=offset, out=out, R=R,
            N=N, K=self.C, out_stride=stride, offsets=int(offset != 0),
        )  # fmt: skip

    def _decoder(self, f_hat: DeviceArray, image: int, net: Net) -> Net:
        B, Z, E, _ = f_hat.shape
        decode(net, self._model.shapes, f_hat.address, image, B, Z, E)
        return net

    def _encoder(self, image: int, tokens: int, net: Net) -> Net:
        """Multi-scale residual quantisation of an image's latent (VAR, algorithm 1)."""
        E, Z, scales = self.E, self.Z, self._scales
        latent = encode(net, self._model.shapes, image, self._model.control_sides[-1])
        whole = 4 * Z * E * E
        net.sizes |= {"upsampled": whole, "f_hat": whole, "rest": 4 * self._largest * Z, "grid": 8 * self._largest}
        h, f_hat, rest, grid = (net.scratch(name) for name in ("upsampled", "f_hat", "rest", "grid"))
        before = self._weights.constant("zeros", np.zeros((Z, E, E), np.float32))
        weight, bias = self._phi
        first, L = 0, sum(len(scale.down) ** 2 for scale in scales)
        for k, scale in enumerate(scales):
            S = len(scale.down)
            small, edge = min(_edge(S), _edge(E)), _edge(E)
            up, down, phi = (
                self._weights.constant(f"{name}_{k}", values)
                for name, values in (("up", scale.up), ("down", scale.down), ("phi", scale.phi))
            )
            net.put(
                f"residual.e{edge}", (Z, 1),
                latent=net.address(latent), f_hat=before, down=down, out=rest, T=S, E=E, Z=Z, N=latent.N,
            )  # fmt: skip
            net.put(
                "nearest.z32", (S * S, 1),
                rest=rest, codes=self._codes, grid=grid, tokens=tokens, cells=S * S, first=first, L=L, V=self.V, Z=Z,
            )  # fmt: skip
            first += S * S
            if k + 1 == len(scales):
                break
            net.put(
                f"upsample.s{small}.e{edge}", (Z, 1),
                tokens=grid, codes=self._codes, up=up, smoothed=0, smooth=0, known_mask=0, out=h, S=S, E=E, Z=Z,
                V=self.V, smooths=0,
            )  # fmt: skip
            net.put(
                "accumulate.z32", (-(-E * E // 32), -(-Z // 32), 1),
                h=h, f_hat=before, w=weight, bias=bias, phi=phi, out=f_hat, E=E, Z=Z,
            )  # fmt: skip
            before = f_hat
        return net

    def _control(self, graph: str, controls: Mapping[str, int], features: int, net: Net) -> Net:
        name, sides = graph.removeprefix("control."), self._model.control_sides
        images = [controls[f"control_{k}"] for k in range(len(sides))]
        encode_control(net, self._model.shapes, name, self._model.strides[name], images, sides, features)
        return net

    # -- their parts -------------------------------------------------------------------------------------------------

    def _run_block(
        self,
        block: _Block,
        x: int,
        middle: int,
        out: int,
        modulation: tuple[int, ...],
        rows: _Rows,
        k: tuple[int, int],
        v: tuple[int, int],
        scratch: Scratch,
    ) -> list[Launch]:
        """x → attention → middle → MLP → out, f32 [M, C]; the three may be one. k, v: (past, slot of this scale)."""
        M, C, F, stride = rows.M, self.C, self.F, modulation[-1]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation[:-1]
        q, mixed = scratch["q"], scratch["mixed"]
        hidden = scratch["hidden"]
        heads = {"w": block.qkv, "q_bias": block.q_bias, "v_bias": block.v_bias, "log_scale": block.log_scale}
        heads |= {"q": q, "k_slot": k[1], "v_slot": v[1], "M": M, "C": C}
        first = {"scale": scale1, "shift": shift1, "C": C, "R": rows.R, "mod_stride": stride}
        second = {"scale": scale2, "shift": shift2, "C": C, "R": rows.R, "mod_stride": stride}
        mlp = {"w": block.fc1, "bias": block.fc1_bias, "out": hidden, "M": M, "N": F}
        gated = {"M": M, "C": C, "R": rows.R, "mod_stride": stride}
        if M <= FEW:
            qkv = [self._heads(f"ln_qkv.s.d{self.D}", M, x=x, **(first | heads))]
            fc1 = [self._product("ln_gelu.s", M, F, x=middle, **second, **mlp)]
        else:
            normed = scratch["normed"]
            qkv = [
                self._launch("ln_mod.row", (M,), x=x, out=normed, **first),
                self._heads(f"qkv.{_size(M, 3 * C, self.D)}.d{self.D}", M, a=normed, **heads),
            ]
            fc1 = [
                self._launch("ln_mod.row", (M,), x=middle, out=normed, **second),
                self._product(f"gelu.{_size(M, F)}", M, F, a=normed, K=C, **mlp),
            ]
        attention = self._attend(q, k[0], v[0], mixed, rows)
        size = _size(M, C)
        proj = self._product(
            f"gate.{size}",
            M,
            C,
            a=mixed,
            w=block.proj,
            bias=block.proj_bias,
            gamma=gamma1,
            x=x,
            out=middle,
            K=C,
            **gated,
        )
        fc2 = self._product(
            f"gate.{size}",
            M,
            C,
            a=hidden,
            w=block.fc2,
            bias=block.fc2_bias,
            gamma=gamma2,
            x=middle,
            out=out,
            K=F,
            **gated,
        )
        return [*qkv, attention, proj, *fc1, fc2]

    def _attend(self, q: int, k: int, v: int, out: int, rows: _Rows) -> Launch:
        groups = rows.R * self.H
        size = "m" if groups * -(-rows.N // 64) >= FILLS else "s"
        name = f"attention.{size}.d{self.D}"
        grid = (groups, -(-rows.N // kernels()[name].constants["BM"]))
        return self._launch(name, grid, q=q, k=k, v=v, out=out, tokens=rows.N, past=rows.P, C=self.C, R=rows.R)

    def _fuse(self, x: int, at: int, inputs: Arrays, rows: _Rows, scratch: Scratch) -> list[Launch]:
        """x ← keep·x + Σ mixᵢ·𝓖ᵢ(x, cᵢ) before the block that fuses as number `at`."""
        branch = next(iter(self._branches.values()))
        c, m, M, C = inputs["c"], inputs["c"].shape[0], rows.M, self.C
        strided = {"c": c.address + 4 * at * M * C, "C": C, "c_stride": branch.blocks * M * C}
        shares = {"mix": inputs["mix"].address, "keep": inputs["keep"].address, "R": rows.R, "branches": m}

        def own(name: str) -> int:
            return inputs[f"fusion_{name}_{at}"].address

        if branch.fusion == "cross_norm":
            return [self._launch("cross_norm.row", (M,), x=x, gain=own("gain"), **strided, **shares)]
        K = 2 * C if branch.fusion == "concat" else C
        h = scratch["fused"]
        if branch.fusion == "concat":
            norm = {"x": x, "weight": own("norm_weight"), "bias": own("norm_bias")}
            first = self._launch("fusion_norm.row", (M, m), **norm, out=h, M=M, **strided)
        else:
            first = self._launch("fusion_round.row", (M, m), out=h, M=M, **strided)
        size = "m" if _tiles(M, C, 64, 64) >= FILLS else "s"
        linear = {"w": own("linear_weight"), "bias": own("linear_bias")}
        adds = int(branch.fusion == "zero")
        return [first, self._product(f"fuse.{size}", M, C, h=h, x=x, M=M, C=C, K=K, adds=adds, **linear, **shares)]

    def _logits(self, x: int, modulation: DeviceArray, rows: _Rows, scratch: Scratch) -> list[Launch]:
        """The head's rows of modulation are the last two: scale, shift."""
        M, C, N = rows.M, self.C, self.N
        last, stride = modulation.shape[1] - 2, modulation.shape[1] * C
        scale = modulation.address + 4 * last * C
        normed, logits = scratch["normed"], scratch["logits"]
        weight, bias = self._head
        size = _size(M, N)
        return [
            self._launch(
                "ln_mod.row",
                (M,),
                x=x,
                scale=scale,
                shift=scale + 4 * C,
                out=normed,
                C=C,
                R=rows.R,
                mod_stride=stride,
            ),
            self._product(f"head.{size}", M, N, a=normed, w=weight, bias=bias, out=logits, M=M, N=N, K=C),
        ]

    def _sample(self, inputs: Arrays, outputs: Arrays, rows: _Rows, scratch: Scratch) -> list[Launch]:
        """Guidance, draw, f̂, and the next scale's input."""
        B, E, Z, C = inputs["uniforms"].shape[0], self.E, self.Z, self.C
        S, T = inputs["x"].shape[1], outputs["next_x"].shape[1]
        tokens, guided = outputs["tokens"].address, outputs.get("logits")
        steered = "control_cfg" in inputs
        given = {
            n: inputs[n].address
            for n in ("cfg", "cfg_ratio", "twin", "top_k", "top_p", "uniforms", "known", "known_mask")
        }
        given |= {n: inputs[n].address if steered else 0 for n in ("control_cfg", "plain")}
        smooths = "smooth" in inputs
        stored = scratch["guided"] if guided is None and smooths else 0 if guided is None else guided.address
        given |= {"extra": inputs["bias"].address, "guided": stored, "border": scratch["border"] if smooths else 0}
        vocab = next(size for size in (512, 4096, LARGEST_VOCAB) if size >= self.V)
        side, small, smaller = _edge(E), min(_edge(S), _edge(E)), min(_edge(T), _edge(E))
        h, following = scratch["upsampled"], scratch["following"]
        weight, bias = self._phi
        word, word_bias = self._word
        f_hat, M = outputs["f_hat_out"].address, rows.R * T * T
        mixed = {"smoothed": 0, "smooth": 0, "known_mask": 0}
        launches = [
            self._launch(
                f"draw.v{vocab}", (rows.N, B), logits=scratch["logits"], tokens=tokens, **given,
                cells=rows.N, R=rows.R, V=self.V, N=self.N, steered=int(steered), store=int(stored != 0),
                keeps=int(smooths),
            )
        ]  # fmt: skip
        if smooths:
            shared = {name: given[name] for name in ("guided", "extra", "border", "cfg_ratio")}
            smoothed = scratch["smoothed"]
            launches.append(
                self._launch(
                    f"smooth.v{vocab}", (rows.N, B), noise=inputs["smooth_noise"].address, codes=self._codes,
                    out=smoothed, cells=rows.N, V=self.V, Z=Z, **shared,
                )
            )  # fmt: skip
            mixed = {"smoothed": smoothed, "smooth": inputs["smooth"].address, "known_mask": given["known_mask"]}
        return [
            *launches,
            self._launch(
                f"upsample.s{small}.e{side}", (Z, B), **mixed,
                tokens=tokens, codes=self._codes, up=inputs["up"].address, out=h, S=S, E=E, Z=Z, V=self.V,
                smooths=int(smooths),
            ),
            self._launch(
                "accumulate.z32", (-(-E * E // 32), -(-Z // 32), B),
                h=h, f_hat=inputs["f_hat"].address, w=weight, bias=bias, phi=inputs["phi"].address, out=f_hat,
                E=E, Z=Z,
            ),
            self._launch(
                f"downsample.t{smaller}.e{side}", (Z, B),
                f_hat=f_hat, down=inputs["down"].address, out=following, T=T, E=E, Z=Z,
            ),
            self._product(
                "embed.s", M, C, a=following, w=word, bias=word_bias, image=inputs["rows"].address,
                out=outputs["next_x"].address, M=M, T=T, C=C, Z=Z,
            ),
        ]  # fmt: skip

    # -- addresses ---------------------------------------------------------------------------------------------------

    def _rows(self, inputs: Arrays, past: str) -> _Rows:
        R, S = inputs["x"].shape[:2]
        return _Rows(N=S * S, R=R, P=inputs[past].shape[0] if past in inputs else 0, M=S * S * R)

    def _modulation(self, modulation: DeviceArray, first: int) -> tuple[int, ...]:
        """Addresses of γ1, γ2, scale1, scale2, shift1, shift2 of row 0, and the distance from one row to the next."""
        row = 4 * self.C
        return (*(modulation.address + row * (first + i) for i in range(6)), modulation.shape[1] * self.C)

    def _slot(self, inputs: Arrays, outputs: Arrays, kind: str, layer: int, rows: _Rows) -> tuple[int, int]:
        """(the past's address, that of this scale's slot), which follows right behind it."""
        slot = outputs[f"new_{kind}_{layer}"].address
        past = inputs[f"past_{kind}_{layer}"].address if rows.P else slot
        if past + 2 * rows.P * rows.R * self.C != slot:
            raise RunError(f"new_{kind}_{layer} does not follow past_{kind}_{layer}; give views of one cache")
        return past, slot

    def _check_indices(self, rows: _Rows) -> None:
        """Kernels count elements in 32 bits, those of different branches apart."""
        most = max(rows.M * self.F, rows.M * self.N, (rows.P + rows.N) * rows.R * self.C)
        if most >= _INDEX:
            raise RunError(
                f"a scale of {rows.N} tokens in {rows.R} rows is too large for the kernels; give fewer images at once"
            )

    def _product(self, name: str, M: int, N: int, /, **arguments: int) -> Launch:
        tile = kernels()[name].constants
        return self._launch(name, (-(-N // tile["BN"]), -(-M // tile["BM"])), **arguments)

    def _launch(self, name: str, grid: tuple[int, ...], /, **arguments: int) -> Launch:
        return launch(named(name, self._model.half), grid, **arguments)

    def _net(self, scratch: Scratch | None = None) -> Net:
        return Net(self._weights, self._model.half, scratch)

    def _heads(self, name: str, M: int, /, **arguments: int) -> Launch:
        return self._launch(name, (3 * self.H, -(-M // kernels()[name].constants["BM"])), **arguments)


def _tiles(M: int, N: int, BM: int, BN: int) -> int:
    return -(-M // BM) * -(-N // BN)


def _size(M: int, N: int, BN: int | None = None) -> str:
    """The largest tile whose programs fill a GPU. BN: width of a tile where it is not the tile's own choice."""
    for name, rows, columns in (("l", 128, 128), ("m", 64, 64)):
        if _tiles(M, N, rows, BN or columns) >= FILLS:
            return name
    return "s"


def _edge(size: int) -> int:
    return next(edge for edge in (16, 32, LARGEST_SIDE) if size <= edge)
