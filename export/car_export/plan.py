"""Write a plan (docs/reference/plan-format.md).

Trace the graphs, store the weights once, write the manifest, verify, then rename into place.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from car_export import graphs, verify
from car_export.config import ExportOptions
from car_export.errors import ExportError
from car_export.files import plan_written_aside
from car_export.goldens import write_goldens
from car_export.trace import Names, optimise, specialise, trace
from car_export.weights import HALVED, WeightStore, external, externalise
from car_runtime.conventions import ControlConvention
from car_runtime.format import manifest as schema
from car_train.model import Model

Log = Callable[[str], None]


@torch.no_grad()
def reference_model(model: Model, precision: str, weights: str) -> Model:
    """What the plan must agree with: the model in float32, its weights rounded as they will be stored (in place)."""
    if precision == "bf16":
        for parameter, rounded in zip(model.parameters(), compute_model(model, precision).parameters(), strict=True):
            parameter.data = rounded.data.float()
    elif "fp16" in (precision, weights):
        for parameter in model.parameters():
            if parameter.numel() >= HALVED:
                parameter.data = parameter.data.half().float()
    return model


def compute_model(model: Model, precision: str) -> Model:
    """The model as it is traced: for fp16 and bf16 a copy in that type, with norms and quantizer left in float32."""
    if precision == "fp32":
        return model
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    half = copy.deepcopy(model)
    vqvae = half.vqvae
    for half_module in (vqvae.encoder, vqvae.decoder, vqvae.quant_conv, vqvae.post_quant_conv, half.car):
        if half_module is not None:
            half_module.to(dtype)
    for module in half.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.float()
    return half


class PlanBuilder:
    """One export: a folder aside, a weight store, and the graphs made so far."""

    def __init__(self, model: Model, options: ExportOptions, directory: Path, log: Log):
        if model.car is None:
            raise ExportError(
                "the checkpoint holds a tokenizer only; train a transformer first (python -m car_train var)"
            )
        if not (model.car.base.config.adaln and model.car.base.config.attn_norm):
            raise ExportError(
                "the transformer was trained without AdaLN or attention norm, which no backend computes; train it "
                "without --no-adaln and --no-attn-norm"
            )
        self.reference = self._reference(model, options)
        self.model = compute_model(self.reference, options.precision)
        assert self.model.car is not None
        self.car = self.model.car
        self.options, self.directory, self.log = options, directory, log
        self.config, self.C = model.config.vqvae, model.car.base.config.C
        single = options.precision == "fp32"  # what CPUs compute in; half precision is for GPUs
        self.store = self._open_store(directory, half=options.weights == "fp16" and single, transposed=not single)
        self.graphs: dict[str, schema.Graph] = {}
        self.tensors: dict[str, schema.Tensor] = {}
        self.constants: list[dict[str, ir.ExternalTensor]] = []
        self.table: dict[str, schema.Parameter] = {}
        self.format = 1

    def build(self) -> schema.Manifest:
        self._constants()
        if self.car.branch is not None:
            self._control()
        self._condition()
        self._steps()
        self._autoencoder()
        self.store.close()
        self._goldens()
        manifest = self._manifest()
        schema.write_manifest(self.directory, manifest)
        return manifest

    def _open_store(self, directory: Path, *, half: bool, transposed: bool) -> WeightStore:
        return WeightStore(directory, half=half, transposed=transposed)

    def _reference(self, model: Model, options: ExportOptions) -> Model:
        """What the plan must agree with."""
        return reference_model(model, options.precision, options.weights)

    def _goldens(self) -> None:
        write_goldens(self.directory, self.reference, **asdict(self.options.sampling(self.config.vocab)))

    def _decoder_graph(self) -> graphs.DecoderGraph:
        """As older exports have it, with kernels that are added already."""
        ups = graphs.ups_of(self.model).items()
        return graphs.DecoderGraph(self.model, {name: graphs.phases_of(up.conv.weight.detach()) for name, up in ups})

    # -- graphs ------------------------------------------------------------------------------------------------------

    def _write(self, name: str, model: ir.Model) -> None:
        """Save one graph and describe its inputs and outputs."""
        file = f"{name}.onnx"
        proto = ir.to_proto(model)
        proto.producer_name, proto.producer_version = "car_export", ""
        del proto.graph.value_info[:]  # every engine infers the shapes in between; they are a quarter of the file
        onnx.save(proto, self.directory / file)
        ports = [tuple(_port(v) for v in values) for values in (model.graph.inputs, model.graph.outputs)]
        self.graphs[name] = schema.Graph(file=file, inputs=ports[0], outputs=ports[1])
        self.log(f"{file}: {len(model.graph)} nodes")

    def _trace(
        self, module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], dims: Mapping[str, Names]
    ) -> ir.Model:
        model = trace(module.eval(), list(inputs.values()), list(inputs), outputs, dims)
        externalise(model, self.store)
        return model

    def _constants(self) -> None:
        """The scales' constants: bound as inputs of the named-dimension step, initializers of the static ones."""
        quantizer, config = self.reference.vqvae.quantizer, self.config
        assert self.reference.car is not None
        position = np.ascontiguousarray(self.reference.car.base.position().numpy())
        table = self.store.add_array("pos", position)
        for k, (side, (start, stop)) in enumerate(zip(config.sides, config.ranges, strict=True)):
            last = k + 1 == len(config.sides)
            down = quantizer.down(0 if last else k + 1).numpy()  # the last scale's next input is never read
            row = position.itemsize * self.C
            constants = {
                "pos": external(
                    f"pos.{k}",
                    position.dtype,
                    (side, side, self.C),
                    (table.offset or 0) + start * row,
                    (stop - start) * row,
                    self.directory,
                ),
                "up": self.store.add_array(f"up.{k}", quantizer.up(k).numpy()),
                "down": self.store.add_array(f"down.{k}", np.ascontiguousarray(down)),
                "phi": self.store.add_array(f"phi.{k}", np.array([config.phi_index[k]], np.int64)),
                "cfg_ratio": self.store.add_array(f"cfg_ratio.{k}", np.array([config.ratios[k]], np.float32)),
            }
            self.constants.append(constants)
            for name, tensor in constants.items():
                shape = tuple(int(d) for d in tensor.shape)
                self.tensors[f"{name}.{k}"] = schema.Tensor(
                    dtype=tensor.dtype.numpy().name, shape=shape, offset=tensor.offset or 0, bytes=tensor.length or 0
                )

    def _control(self) -> None:
        sizes = [s * self.config.patch for s in self.config.sides]
        inputs = {f"control_{k}": torch.zeros(s, s, 3, dtype=torch.uint8) for k, s in enumerate(sizes)}
        model = self._trace(graphs.ControlGraph(self.model), inputs, ["features"], {})
        optimise(model)
        self._write("control", model)

    def _condition(self) -> None:
        label = torch.zeros(4, dtype=torch.int64)
        model = self._trace(
            graphs.ConditionGraph(self.model), {"label": label}, ["start", "modulation"], {"label": ("R",)}
        )
        optimise(model)
        self._write("condition", model)

    def _steps(self) -> None:
        module = graphs.StepGraph(self.model, more_smooth=self.options.more_smooth)
        # Sizes that differ from one another and from every constant, so that no dimension is taken for another.
        every = example_step_inputs(self.model, rows=4, images=2, side=3, past=5, next_side=7)
        inputs = {name: every[name] for name in module.input_names}
        dims = STEP_DIMS | dict.fromkeys([n for n in inputs if n.startswith("past_")], PAST_DIMS)
        model = self._trace(module, inputs, module.output_names, dims)
        optimise(model)
        self._write("step", model)
        self.store.flush()  # static steps take in what is small
        for batch in self.options.batches:
            for k, (side, (start, _)) in enumerate(zip(self.config.sides, self.config.ranges, strict=True)):
                sizes = {"R": 2 * batch, "B": batch, "S": side, "P": start, "T": self._next_side(k)}
                self._write(f"step.{k:02d}.b{batch}", specialise(model, sizes, self.constants[k]))

    def _autoencoder(self) -> None:
        E, Z, size = self.config.latent_size, self.config.latent_channels, self.config.image_size
        decoder = self._trace(self._decoder_graph(), {"f_hat": torch.zeros(3, Z, E, E)}, ["image"], {"f_hat": ("B",)})
        optimise(decoder)
        self._write("decoder", decoder)
        image = torch.zeros(3, size, size, 3, dtype=torch.uint8)
        encoder = self._trace(graphs.EncoderGraph(self.model), {"image": image}, ["tokens"], {"image": ("B",)})
        optimise(encoder)
        self._write("encoder", encoder)

    # -- manifest ----------------------------------------------------------------------------------------------------

    def _manifest(self) -> schema.Manifest:
        config = self.config
        names = sorted(p.name for p in self.directory.iterdir())
        files = schema.describe_files(self.directory, names)
        return schema.Manifest(
            format=self.format,
            parameters=self.table,
            parameters_digest=schema.graphs_digest(self.graphs, files) if self.table else "",
            name=self.options.name,
            model=self._model_facts(),
            precision=schema.Precision(
                compute=self.options.precision,
                weights=self.options.weights if self.options.precision == "fp32" else self.options.precision,
            ),
            sampling=schema.SamplingDefaults(**asdict(self.options.sampling(config.vocab))),
            scales=tuple(self._scale(k) for k in range(len(config.sides))),
            tensors=self.tensors,
            graphs=self.graphs,
            files=files,
            provenance={**tool_versions(), **self.options.provenance},
        )

    def _model_facts(self) -> schema.Model:
        config, var, car = self.config, self.car.base.config, self.reference.config.car
        return schema.Model(
            depth=var.depth,
            width=var.C,
            heads=var.H,
            vocab=config.vocab,
            latent_channels=config.latent_channels,
            latent_size=config.latent_size,
            patch=config.patch,
            image_size=config.image_size,
            classes=var.classes,
            class_names=self.options.class_names or self.reference.config.class_names,
            control_type=car.control_type if car else None,
            cache_layers=self.car.layers,
            control_convention=ControlConvention(**asdict(car.control_convention)) if car else None,
        )

    def _next_side(self, k: int) -> int:
        """Side of the scale after k; 1 after the last, whose next input nobody reads."""
        return (*self.config.sides, 1)[k + 1]

    def _scale(self, k: int) -> schema.Scale:
        config, side = self.config, self.config.sides[k]
        start, stop = config.ranges[k]
        return schema.Scale(
            side=side,
            tokens=side * side,
            start=start,
            stop=stop,
            next_side=self._next_side(k),
            cfg_ratio=config.ratios[k],
            control_size=side * config.patch,
            constants={name: f"{name}.{k}" for name in schema.CONSTANTS},
        )


STEP_DIMS: dict[str, Names] = {
    "x": ("R", "S", "S", None),
    "modulation": ("R", None, None),
    "control": ("S", "S", None),
    "f_hat": ("B", None, None, None),
    "uniforms": ("B", "S", "S"),
    "known": ("B", "S", "S"),
    "known_mask": ("B", "S", "S"),
    "smooth_noise": ("B", "S", "S", None),
    "pos": ("S", "S", None),
    "up": (None, "S"),
    "down": ("T", None),
    "next_x": ("R", "T", "T", None),
}
PAST_DIMS: Names = ("P", "R", None, None)


def example_step_inputs(
    model: Model, rows: int, images: int, side: int, past: int, next_side: int
) -> dict[str, Tensor]:
    """All inputs that a step graph can have by name, of the given sizes; their values don't matter to the trace."""
    assert model.car is not None
    base, config = model.car.base, model.config.vqvae
    C, H, E = base.config.C, base.config.H, config.latent_size
    grid = (images, side, side)
    inputs = {
        "x": torch.zeros(rows, side, side, C),
        "modulation": torch.zeros(rows, 6 * model.car.layers + 2, C),
        "control": torch.zeros(side, side, C),
        "f_hat": torch.zeros(images, config.latent_channels, E, E),
        "uniforms": torch.zeros(grid),
        "cfg": torch.ones(1),
        "top_k": torch.ones(1, dtype=torch.int64),
        "top_p": torch.ones(1),
        "known": torch.zeros(grid, dtype=torch.int64),
        "known_mask": torch.zeros(grid, dtype=torch.bool),
        "smooth": torch.zeros(1, dtype=torch.bool),
        "smooth_noise": torch.zeros(*grid, config.vocab),
        "pos": torch.zeros(side, side, C),
        "up": torch.zeros(E, side),
        "down": torch.zeros(next_side, E),
        "phi": torch.zeros(1, dtype=torch.int64),
        "cfg_ratio": torch.ones(1),
    }
    kv = torch.zeros(past, rows, H, C // H, dtype=base.blocks[0].attn.qkv_weight.dtype)
    return inputs | {f"past_{x}_{i}": kv.clone() for i in range(model.car.layers) for x in "kv"}


def _port(value: ir.Value) -> schema.Port:
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return schema.Port(name=str(value.name), dtype=value.dtype.numpy().name, shape=shape)


def tool_versions() -> dict[str, str]:
    import onnxruntime
    import onnxscript

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def build_plan(model: Model, options: ExportOptions, log: Log = lambda _: None) -> Path:
    """As `plan2.build_plan_of_2`, of format 1: for what is held to plans of older exports.

    Raises ExportError or verify.VerificationError.
    """
    with plan_written_aside(options.output) as aside:
        builder = PlanBuilder(model, options, aside, log)
        builder.build()
        verify.verify_plan(aside, builder.reference, log)
    return options.output
