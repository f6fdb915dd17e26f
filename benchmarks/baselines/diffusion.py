"""The methods that ours is compared with: ControlNet, T2I-Adapter and LCM on Stable Diffusion 1.5, by `diffusers`.

Every network is diffusers' or transformers' own class, built from the sizes below with random weights: nothing is
fetched. The sizes are those of the published models, which their numbers of parameters prove. Zero-initialised
convolutions get small weights, so that activations are ordinary; the time of an image doesn't depend on what it
shows, and nothing can be said about its quality.

`draw` makes one image the way diffusers' pipelines do, and a test holds it to their latents: `ControlNet` and `LCM`
to StableDiffusionControlNetPipeline, `T2I-Adapter` to StableDiffusionAdapterPipeline. It differs where the pipelines
lose time: both prompts are encoded in one batch, and there is no safety checker.

B images (1 here); R rows, B or 2B (guided: without the prompt first); N tokens of a prompt; C their width; H, W
pixels; h, w latents (H / 8 in Stable Diffusion); 1 a single time step.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from benchmarks.harness.errors import BenchmarkError
from car_runtime.backends.openvino.core import openvino_core

try:
    import diffusers
    import transformers
except ImportError as error:
    raise BenchmarkError(
        f"what is compared with is in diffusers and transformers ({error}); run: pip install 'car-deploy[bench]'"
    ) from error

SEED = 0
ZERO_CONV_STD = 0.1
"""Spread of convolutions that training starts from zero, in units of the other weights'."""
TRAINING_STEPS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""The noise that Stable Diffusion was trained with."""

# ---- Sizes ----


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The configs of all networks, as their classes take them."""

    name: str
    unet: Mapping[str, Any]
    controlnet: Mapping[str, Any]
    adapter: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    guidance_width: int
    """Width of the embedding by which LCM's UNet takes the guidance."""
    parameters: Mapping[str, int]
    """How many each network must have; empty if it is nobody's published model."""

    def config(self, part: str) -> dict[str, Any]:
        if part == "lcm_unet":
            return {**self.unet, "time_cond_proj_dim": self.guidance_width}
        return dict(getattr(self, part))

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, each way."""
        return 1 << (len(self.vae["block_out_channels"]) - 1)


PARTS = ("text", "unet", "lcm_unet", "controlnet", "adapter", "vae")
_WIDTHS = (320, 640, 1280, 1280)

SD15 = Architecture(
    name="Stable Diffusion 1.5",
    unet={"sample_size": 64, "block_out_channels": _WIDTHS, "cross_attention_dim": 768, "attention_head_dim": 8},
    controlnet={"block_out_channels": _WIDTHS, "cross_attention_dim": 768, "attention_head_dim": 8},
    adapter={
        "in_channels": 3,
        "channels": _WIDTHS,
        "num_res_blocks": 2,
        "downscale_factor": 8,
        "adapter_type": "full_adapter",
    },
    vae={
        "sample_size": 512,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    text={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    guidance_width=256,
    parameters={
        "text": 123_060_480,
        "unet": 859_520_964,
        "lcm_unet": 859_602_884,
        "controlnet": 361_279_120,
        "adapter": 77_369_280,
        "vae": 83_653_863,
    },
)

_SMALL_WIDTHS = (16, 32)
_SMALL_UNET = {
    "block_out_channels": _SMALL_WIDTHS,
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}
SMALL = Architecture(
    name="small, not Stable Diffusion 1.5",
    unet={**_SMALL_UNET, "sample_size": 8, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    controlnet={**_SMALL_UNET, "conditioning_embedding_out_channels": (8, 16)},
    adapter={
        "in_channels": 3,
        "channels": _SMALL_WIDTHS,
        "num_res_blocks": 1,
        "downscale_factor": 2,
        "adapter_type": "full_adapter",
    },
    vae={
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    text={
        "vocab_size": 100,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 10,
        "bos_token_id": 98,
        "eos_token_id": 99,
    },
    guidance_width=16,
    parameters={},
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One published way to an image that follows a control image."""

    name: str
    steps: tuple[int, ...]
    """Numbers of denoising steps to report the time of."""
    guidance: float
    distilled: bool = False
    """LCM: the UNet takes the guidance as an input and needs no second row for it."""
    adapter: bool = False
    """T2I-Adapter: the control is encoded once an image. Otherwise ControlNet runs in every step."""

    @property
    def rows(self) -> int:
        return 1 if self.distilled else 2

    @property
    def unet(self) -> str:
        return "lcm_unet" if self.distilled else "unet"

    @property
    def branch(self) -> str:
        return "adapter" if self.adapter else "controlnet"


METHODS = {
    "controlnet": Method(name="ControlNet", steps=(20, 50), guidance=7.5),
    "t2i": Method(name="T2I-Adapter", steps=(20,), guidance=7.5, adapter=True),
    "lcm": Method(name="LCM + ControlNet", steps=(4,), guidance=8.0, distilled=True),
}


def scheduler_of(method: Method) -> Any:
    """UniPC of order 2, or LCM's; both with the noise of Stable Diffusion's training."""
    if method.distilled:
        return diffusers.LCMScheduler(**TRAINING_STEPS)
    return diffusers.UniPCMultistepScheduler(**TRAINING_STEPS)


# ---- Networks with random weights ----


def skeleton(architecture: Architecture, part: str) -> nn.Module:
    """A network without memory for its weights. BenchmarkError if it hasn't the published number of parameters."""
    config = architecture.config(part)
    with torch.device("meta"):
        module: nn.Module = {
            "text": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)),
            "unet": lambda: diffusers.UNet2DConditionModel(**config),
            "lcm_unet": lambda: diffusers.UNet2DConditionModel(**config),
            "controlnet": lambda: diffusers.ControlNetModel(**config),
            "adapter": lambda: diffusers.T2IAdapter(**{**config, "channels": list(config["channels"])}),
            "vae": lambda: diffusers.AutoencoderKL(**config),
        }[part]()
    count, expected = parameters(module), architecture.parameters.get(part)
    if expected is not None and count != expected:
        raise BenchmarkError(
            f"{part} of {architecture.name} has {count:,} parameters where the published one has {expected:,}; "
            "give it the published sizes, or take a version of diffusers that reads them so"
        )
    return module.eval().requires_grad_(False)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def build(architecture: Architecture, part: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A network with weights of ordinary size from a fixed seed, frozen, on `device` in `dtype`.

    With channels last, as diffusers' guide to faster inference has it for GPUs; on CPUs it is faster too.
    """
    module = skeleton(architecture, part).to_empty(device=device)
    torch.manual_seed(SEED)
    for name, p in module.named_parameters():
        if p.ndim >= 2:
            p.normal_(std=(ZERO_CONV_STD if _starts_from_zero(name) else 1.0) * p[0].numel() ** -0.5)
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)  # of normalisations, and biases
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids"), f"{part} holds {name}, which is neither a weight nor a position"
        buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
    # Through nn.Module: diffusers' own warns about parts to keep in float32, of which these have none.
    module = nn.Module.to(module, dtype=dtype)
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _starts_from_zero(name: str) -> bool:
    return name.startswith(("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out"))


class Text(nn.Module):
    """Prompts int64 [R, N] → states [R, N, C]."""

    def __init__(self, text: nn.Module):
        super().__init__()
        self.text = text

    def forward(self, ids_RN: Tensor) -> Tensor:
        return cast(Tensor, self.text(ids_RN).last_hidden_state)


class ControlNet(nn.Module):
    """Latents [R, 4, h, w], time [1], states [R, N, C], control [R, 3, H, W] in [0, 1] → the UNet's residuals."""

    def __init__(self, controlnet: nn.Module):
        super().__init__()
        self.controlnet = controlnet

    def forward(self, x_R4hw: Tensor, t_1: Tensor, states_RNC: Tensor, control_R3HW: Tensor) -> tuple[Tensor, ...]:
        down, middle = self.controlnet(x_R4hw, t_1, states_RNC, control_R3HW, return_dict=False)
        return *down, middle


class Adapter(nn.Module):
    """Control [R, 3, H, W] in [0, 1] → features, one for each resolution of the UNet."""

    def __init__(self, adapter: nn.Module):
        super().__init__()
        self.adapter = adapter

    def forward(self, control_R3HW: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.adapter(control_R3HW))


class Denoiser(nn.Module):
    """Latents [R, 4, h, w], time [1], states, then LCM's guidance embedding if it is distilled, then what ControlNet
    or the adapter gave → noise [R, 4, h, w]."""

    def __init__(self, unet: nn.Module, method: Method):
        super().__init__()
        self.unet, self.method = unet, method

    def forward(self, x_R4hw: Tensor, t_1: Tensor, states_RNC: Tensor, *rest: Tensor) -> Tensor:
        count = int(self.method.distilled)
        given: dict[str, Any] = {"timestep_cond": rest[0]} if count else {}
        control = list(rest[count:])
        if self.method.adapter:
            given["down_intrablock_additional_residuals"] = control
        else:
            given["down_block_additional_residuals"] = control[:-1]
            given["mid_block_additional_residual"] = control[-1]
        return cast(Tensor, self.unet(x_R4hw, t_1, states_RNC, return_dict=False, **given)[0])


class Decoder(nn.Module):
    """Latents [B, 4, h, w] → RGB uint8 [B, H, W, 3]."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        self.scale = 1 / float(cast(Any, vae).config.scaling_factor)

    def forward(self, x_B4hw: Tensor) -> Tensor:
        pixels_B3HW = cast(Any, self.vae).decode(x_B4hw * self.scale, return_dict=False)[0].float()
        pixels_B3HW = (pixels_B3HW / 2 + 0.5).clamp(0, 1) * 255
        return pixels_B3HW.round().permute(0, 2, 3, 1).to(torch.uint8)


class Step(nn.Module):
    """All networks of one denoising step and the guidance: latents [1, 4, h, w] → noise [1, 4, h, w].

    `branch` and `denoiser` are modules, or what an engine made of them. control: what T2I-Adapter gave, or for
    ControlNet the image.
    """

    def __init__(self, method: Method, denoiser: Callable[..., Tensor], branch: Callable[..., Any] | None):
        super().__init__()
        self.method, self.denoiser, self.branch = method, denoiser, branch

    def forward(
        self, x_14hw: Tensor, t_1: Tensor, states_RNC: Tensor, guidance_1E: Tensor | None, control: Sequence[Tensor]
    ) -> Tensor:
        x_R4hw = torch.cat([x_14hw] * self.method.rows)
        if self.branch is not None:
            control = self.branch(x_R4hw, t_1, states_RNC, *control)
        given = control if guidance_1E is None else (guidance_1E, *control)
        noise_R4hw = self.denoiser(x_R4hw, t_1, states_RNC, *given)
        if self.method.distilled:
            return noise_R4hw
        without, prompted = noise_R4hw.chunk(2)
        return without + self.method.guidance * (prompted - without)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What one method runs: modules, compiled modules or engines, all called alike."""

    architecture: Architecture
    method: Method
    text: Callable[..., Tensor]
    adapter: Callable[..., Any] | None
    step: Callable[..., Tensor]
    decoder: Callable[..., Tensor]
    dtype: torch.dtype
    device: str
    scheduler: Any


Maker = Callable[[str], nn.Module]
"""A part's name → its network."""


def assemble(architecture: Architecture, method: Method, make: Maker, dtype: torch.dtype, device: str) -> Networks:
    """The networks of a method in eager PyTorch."""
    branch = make(method.branch)
    return Networks(
        architecture=architecture,
        method=method,
        text=Text(make("text")),
        adapter=Adapter(branch) if method.adapter else None,
        step=Step(method, Denoiser(make(method.unet), method), None if method.adapter else ControlNet(branch)),
        decoder=Decoder(make("vae")),
        dtype=dtype,
        device=device,
        scheduler=scheduler_of(method),
    )


class NetworkCache:
    """Builds networks when they are asked for and keeps them, but never two UNets at once."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, device: str):
        self.dtype = dtype
        self._architecture, self._device = architecture, device
        self._parts: dict[str, nn.Module] = {}

    def __call__(self, part: str) -> nn.Module:
        if part not in self._parts:
            if part.endswith("unet"):
                self._parts = {name: kept for name, kept in self._parts.items() if not name.endswith("unet")}
            self._parts[part] = build(self._architecture, part, self.dtype, self._device)
        return self._parts[part]


# ---- An image ----


class Clock:
    """Seconds of the parts of an image; a GPU is waited for at the end of each."""

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - began


@dataclass(frozen=True)
class Drawn:
    """An image and the seconds that it took."""

    pixels: NDArray[np.uint8]
    """[1, H, W, 3]."""
    latents: Tensor
    """[1, 4, h, w], what it was decoded from."""
    seconds: dict[str, float]
    """Seconds of text, control, steps and decode."""


def prompt_ids(architecture: Architecture, rows: int) -> Tensor:
    """A tokenised prompt of ten words or so, int64 [R, N]; of two rows the first is the empty prompt."""
    text = architecture.text
    length, first, end = text["max_position_embeddings"], text["bos_token_id"], text["eos_token_id"]
    words = range(1, min(12, length - 1))
    prompt = [first, *words, *[end] * (length - 1 - len(words))]
    return torch.tensor([[first, *[end] * (length - 1)], prompt][-rows:])


def prepare(control_HW3: NDArray[np.uint8], size: int) -> Tensor:
    """A control image as the pipelines want it: f32 [1, 3, size, size] in [0, 1], resized by Lanczos."""
    image = Image.fromarray(control_HW3).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]


def guidance_embedding(guidance: float, width: int) -> Tensor:
    """The guidance as LCM's UNet takes it, f32 [1, width]: sines and cosines of 1000·(guidance − 1)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(np.log(10000.0) / (half - 1)))
    angles_1E = (1000.0 * (guidance - 1) * frequencies)[None]
    return torch.cat((angles_1E.sin(), angles_1E.cos()), dim=1)


@torch.inference_mode()
def draw(
    networks: Networks, control_HW3: NDArray[np.uint8], seed: int, size: int, steps: int, timed_steps: int
) -> Drawn:
    """Control image in host memory and a tokenised prompt → RGB in host memory, by the first of `steps` steps.

    control_HW3: uint8. All `steps` are in the schedule, `timed_steps` of them are taken. `seconds["steps"]` is the
    time of those, the scheduler's arithmetic included.
    """
    architecture, method, clock = networks.architecture, networks.method, Clock(networks.device)
    scheduler, dtype, device = networks.scheduler, networks.dtype, networks.device
    with clock.part("text"):
        states_RNC = networks.text(prompt_ids(architecture, method.rows).to(device))
    with clock.part("control"):
        control_R3HW = prepare(control_HW3, size).to(device, dtype).expand(method.rows, -1, -1, -1)
        control: tuple[Tensor, ...] = (control_R3HW,)
        if networks.adapter is not None:
            control = tuple(torch.cat([f] * method.rows) for f in networks.adapter(control_R3HW[:1]))
    with clock.part("steps"):
        side = size // architecture.latent_factor
        noise = torch.Generator().manual_seed(seed)
        scheduler.set_timesteps(steps, device=device)
        x = torch.randn(1, 4, side, side, generator=noise).to(device, dtype) * scheduler.init_noise_sigma
        embedded, chance = None, {}
        if method.distilled:
            embedded = guidance_embedding(method.guidance, architecture.guidance_width).to(device, dtype)
            chance = {"generator": noise}
        for t in scheduler.timesteps[:timed_steps]:
            predicted = networks.step(scheduler.scale_model_input(x, t), t[None], states_RNC, embedded, control)
            x = scheduler.step(predicted, t, x, **chance, return_dict=False)[0]
    with clock.part("decode"):
        pixels = networks.decoder(x).cpu().numpy()
    return Drawn(pixels, x, clock.seconds)


# ---- Operations by count ----


def count_flops(architecture: Architecture, method: Method, size: int) -> dict[str, int]:
    """Operations of text, control, one step and decode, by PyTorch's counter on networks without weights.

    Products and convolutions only: 2 for each multiplication and addition, as in `benchmarks.analysis.counting`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    dtype, rows, side = torch.float32, method.rows, size // architecture.latent_factor
    networks = assemble(architecture, method, lambda part: skeleton(architecture, part), dtype, "meta")
    found: dict[str, int] = {}

    def counted(name: str, function: Callable[..., Any], *inputs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = function(*inputs)
        found[name] = counter.get_total_flops()
        return result

    with torch.device("meta"), torch.no_grad():
        states = counted("text", networks.text, prompt_ids(architecture, rows).to("meta"))
        control: Sequence[Tensor] = (torch.empty(rows, 3, size, size),)
        found["control"] = 0
        if networks.adapter is not None:
            features = counted("control", networks.adapter, control[0][:1])
            control = tuple(f.expand(rows, -1, -1, -1) for f in features)
        embedded = torch.empty(1, architecture.guidance_width) if method.distilled else None
        x = torch.empty(1, 4, side, side)
        counted("step", networks.step, x, torch.zeros(1, dtype=torch.int64), states, embedded, control)
        counted("decode", networks.decoder, x)
    return found


# ---- Compiled ----


def compiled(networks: Networks) -> Networks:
    """The networks under `torch.compile`: all of a step is one function, on a GPU replayed as a CUDA graph."""
    torch.compiler.reset()
    mode = "reduce-overhead" if networks.device.startswith("cuda") else "default"
    step = torch.compile(networks.step, mode=mode)

    def one_step(*inputs: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step returned has been used up
        return step(*inputs)

    return dataclasses.replace(
        networks,
        text=torch.compile(networks.text),
        adapter=None if networks.adapter is None else torch.compile(networks.adapter),
        step=one_step,
        decoder=torch.compile(networks.decoder),
    )


# ---- OpenVINO ----


class Engine:
    """A network compiled by OpenVINO for one shape of each input. Inputs and outputs are float32 or integers.

    What a call returns is the engine's own memory, and lasts until the next call.
    """

    def __init__(self, make: Callable[[], nn.Module], example: Sequence[Tensor], precision: str, threads: int):
        """make: gives the network, which is let go of before it is compiled. precision: "f32" or "bf16", what is
        multiplied in."""
        import openvino

        self._type = openvino.Tensor
        # An engine keeps the weights that it was compiled from alongside those it has packed. From a file they are
        # mapped and cost no memory; from a module ControlNet's 1.44 GB were held twice.
        self._folder = tempfile.TemporaryDirectory(prefix="openvino-")
        file = Path(self._folder.name) / "model.xml"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's of its own exporter
            exported = torch.export.export(make(), tuple(example))
            openvino.save_model(openvino.convert_model(exported), file, compress_to_fp16=False)
        del exported
        gc.collect()  # exported programs refer to themselves
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
        }
        compiled = openvino_core().compile_model(file, "CPU", settings)
        self._request, self._outputs = compiled.create_infer_request(), len(compiled.outputs)

    def __call__(self, *inputs: Tensor) -> Any:
        kept = [tensor.contiguous() for tensor in inputs]
        for index, tensor in enumerate(kept):
            self._request.set_input_tensor(index, self._type(tensor.numpy(), shared_memory=True))
        self._request.infer()
        outputs = tuple(torch.from_numpy(self._request.get_output_tensor(i).data) for i in range(self._outputs))
        return outputs if self._outputs > 1 else outputs[0]


def openvino_networks(
    architecture: Architecture, method: Method, size: int, precision: str, threads: int
) -> Networks:
    """The networks of a method as OpenVINO engines for one size; each is built and let go before the next."""
    rows, side, text = method.rows, size // architecture.latent_factor, architecture.text
    x, t = torch.randn(rows, 4, side, side), torch.ones(1, dtype=torch.int64)
    states = torch.randn(rows, text["max_position_embeddings"], text["hidden_size"])
    image = torch.rand(rows, 3, size, size)

    def engine(part: str, wrap: Callable[[nn.Module], nn.Module], *example: Tensor) -> Engine:
        return Engine(lambda: wrap(build(architecture, part, torch.float32, "cpu")), example, precision, threads)

    with torch.no_grad():
        branch: Engine
        if method.adapter:
            branch = engine("adapter", Adapter, image[:1])
            control = tuple(torch.cat([f] * rows) for f in branch(image[:1]))
        else:
            branch = engine("controlnet", ControlNet, x, t, states, image)
            control = branch(x, t, states, image)
        embedded = (guidance_embedding(method.guidance, architecture.guidance_width),) if method.distilled else ()
        denoiser = engine(method.unet, lambda unet: Denoiser(unet, method), x, t, states, *embedded, *control)
        return Networks(
            architecture=architecture,
            method=method,
            text=engine("text", Text, prompt_ids(architecture, rows)),
            adapter=branch if method.adapter else None,
            step=Step(method, denoiser, None if method.adapter else branch),
            decoder=engine("vae", Decoder, x[:1]),
            dtype=torch.float32,
            device="cpu",
            scheduler=scheduler_of(method),
        )
