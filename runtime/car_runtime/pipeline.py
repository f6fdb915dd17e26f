"""A plan in the manner of diffusers' pipelines, without diffusers or PyTorch.

    from car_runtime import CARPipeline

    with CARPipeline.from_pretrained() as pipe:  # the shipped plan; a path, or "ORG/NAME" on the hub
        images = pipe("edges.png", "noto-objects", num_images_per_prompt=4, generator=7).images  # PIL images

docs/from-diffusers.md maps the arguments to those of diffusers and to `GenerationConfig`'s.

Shapes: n images made; H, W pixels; K scales.
"""

from __future__ import annotations

import inspect
import os
import re
import reprlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime.config import GenerationConfig, config_of
from car_runtime.editing.edit import Edit
from car_runtime.errors import RequestError
from car_runtime.images import Source
from car_runtime.plan import Plan, Result, ScaleResult, open_plan
from car_runtime.request import MAX_SEED
from car_runtime.schedule import MAX_STRENGTH
from car_runtime.values import integer, number

Control: TypeAlias = "Source | Mapping[str, Source | tuple[Source, float]]"
"""A control image, or branches with one each, as `GenerationConfig.control` has it."""
Label: TypeAlias = "int | str | None"
OnStepEnd: TypeAlias = "Callable[[CARPipeline, int, int, dict[str, ScaleResult]], object]"
_SAME = {
    "cfg": "guidance_scale",
    "stop_after": "num_inference_steps",
    "control_strength": "controlnet_conditioning_scale",
    "control_scales": "control_guidance_start and _end",
}
"""Setting → the argument that it is made of."""
_CALLED = {"control": "image", "label": "class_labels", "seed": "generator", "n": "num_images_per_prompt"}
"""Setting → the argument that is always given in its place."""


@dataclass(frozen=True)
class Theirs:
    """Arguments that diffusers has and we have not; the second table of docs/from-diffusers.md."""

    names: tuple[str, ...]
    neutral: tuple[bool | float | str | None, ...]
    """Values that ask for nothing, which are taken."""
    remedy: str


OF_CALLS = (
    Theirs(
        ("prompt", "prompt_2", "prompt_embeds", "negative_prompt", "negative_prompt_2", "negative_prompt_embeds"),
        (None, ""),
        "give class_labels: the models know classes, no text",
    ),
    Theirs(("height", "width"), (None,), "leave it out: a plan draws images of one size, edits keep the photo's"),
    Theirs(("latents", "timesteps", "sigmas"), (None,), "give generator: tokens are drawn, nothing is denoised"),
    Theirs(("eta", "guidance_rescale"), (None, 0.0), "give top_k or top_p: tokens are drawn, nothing is denoised"),
    Theirs(("strength",), (None, 1.0), "give edit=Edit(image=…, from_scale=K): K coarse scales of the photo stay"),
    Theirs(("guess_mode",), (None, False), "give control_cfg: guidance by the control"),
    Theirs(("return_dict",), (None, True), "leave it out: a call returns a CARPipelineOutput"),
    Theirs(
        ("callback", "callback_steps", "callback_on_step_end_tensor_inputs"),
        (None,),
        "give callback_on_step_end: it gets each scale",
    ),
    Theirs(
        ("ip_adapter_image", "cross_attention_kwargs", "clip_skip", "padding_mask_crop"),
        (None,),
        "leave it out: a plan has nothing of the kind",
    ),
)
"""Of `CARPipeline.__call__`."""
OF_OPENING = (
    Theirs(("torch_dtype", "dtype", "variant"), (None,), "leave it out: a plan has the precision of its export"),
    Theirs(("device", "device_map"), (None,), 'give backend: "ort-cuda" is ONNX Runtime on a GPU'),
    Theirs(("use_safetensors", "low_cpu_mem_usage"), (None, True), "leave it out: a plan holds no pickles"),
    Theirs(
        ("controlnet", "vae", "unet", "transformer", "scheduler", "text_encoder", "tokenizer", "safety_checker"),
        (None,),
        "leave it out: all networks are in the plan",
    ),
    Theirs(
        ("cache_dir", "token", "local_files_only", "force_download", "proxies"),
        (None, False),
        "set HF_HOME, HF_TOKEN, HF_HUB_OFFLINE or HTTPS_PROXY instead",
    ),
)
"""Of `CARPipeline.from_pretrained`."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class CARPipelineOutput:
    """What a call made."""

    images: list[Image.Image] | NDArray[np.float32]
    """n PIL images, or with output_type "np" f32 [n, H, W, 3] in 0…1: all of the first prompt, then of the next."""
    seeds: list[int]
    """The seed of each image; given as `generator`, they make these images again."""
    results: list[Result]
    """A result for each prompt, or for each image where every image was given a seed of its own."""


class CARPipeline:
    """Draws from a plan. Close it, or use it in a `with` statement."""

    def __init__(self, plan: Plan) -> None:
        """`plan` is the pipeline's from now on: it closes it. Raises RequestError for what is no plan."""
        if not isinstance(plan, Plan):
            raise RequestError(f"the plan is {plan!r}; use CARPipeline.from_pretrained, or open_plan first")
        self.plan = plan

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        backend: str = "auto",
        threads: int | None = None,
        **opening: Any,
    ) -> CARPipeline:
        """Open a plan: a directory, "ORG/NAME" or "hf:ORG/NAME" on the hub, or None for the plan in the package.

        A directory of that name comes before the hub. revision: branch, tag or commit there. backend, threads and
        what else `open_plan` takes (`verify`, `require_signature`, `trust_engines`) are as it has them.

        Raises PlanError, BackendError and RequestError, as `open_plan` does.
        """
        opening = _ours(opening, OF_OPENING)
        names = list(inspect.signature(open_plan).parameters)
        for name in opening.keys() - set(names):
            raise RequestError(f"from_pretrained has no argument {name!r}; it takes revision, {', '.join(names)}")
        if revision is not None and not isinstance(revision, str):
            raise RequestError(f"revision is {revision!r}; give a branch, tag or commit, or leave it out")
        if isinstance(path, str) and not os.path.exists(path) and _HUB_NAME.fullmatch(path):
            path = f"hf:{path}"
        if revision is not None:
            if not (isinstance(path, str) and path.startswith("hf:")):
                raise RequestError(f"revision is {revision!r}, but {str(path)!r} is not on the hub; leave it out")
            path = f"{path}@{revision}"
        return cls(open_plan(path, backend, threads=threads, **opening))

    def __enter__(self) -> CARPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the plan."""
        self.plan.close()

    @property
    def labels(self) -> dict[str, int]:
        """Class name → index; empty where the plan has no names."""
        return {name: index for index, name in enumerate(self.plan.class_names or ())}

    def __call__(
        self,
        image: Control | Sequence[Control] | None = None,
        class_labels: Label | Sequence[Label] = None,
        *,
        mask_image: Source | Sequence[Source] | None = None,
        control_image: Control | Sequence[Control] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: int | Sequence[int] | np.random.Generator | None = None,
        controlnet_conditioning_scale: float | None = None,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        output_type: str = "pil",
        callback_on_step_end: OnStepEnd | None = None,
        **settings: Any,
    ) -> CARPipelineOutput:
        """Make images. What may be a list has one entry for each prompt; a single one serves all of them.

        image: the control image (path, PIL image, uint8 array, or a mapping from branches); with mask_image the
            photo to change.
        class_labels: class index or name, None for no class.
        mask_image: grey image of the photo's size, white where it is drawn anew.
        control_image: with mask_image, the control image; else it is `image`.
        num_inference_steps: 1…K, scales that are drawn, coarse first; None for all.
        guidance_scale: 1…1001 as diffusers counts it, where 1 is off: our `cfg` plus 1. None: the plan's.
        num_images_per_prompt: 1…1024.
        generator: seed of the first image, whose successors have the next ones; a list with a seed for each image; a
            numpy Generator that seeds are drawn from; None for a seed by chance. `seeds` of the output has them.
        controlnet_conditioning_scale: 0…2, by what the control's features are multiplied.
        control_guidance_start, control_guidance_end: the share of the scales, 0…1, from which and up to which the
            control is followed.
        output_type: "pil" for PIL images, "np" for f32 [n, H, W, 3] in 0…1.
        callback_on_step_end: called with (pipeline, scale, side in tokens, {"scale": ScaleResult}) after each scale
            of each batch; `ScaleResult.preview()` is the images so far.
        settings: any other field of `GenerationConfig`, such as top_k, top_p or preset. What only diffusers has
            (`OF_CALLS`) is taken where it asks for nothing, such as return_dict=True.

        With a plan of format 2 all images share steps. Raises RequestError, ImageError, and RunError when the engine
        fails.
        """
        if not isinstance(output_type, str) or output_type not in ("pil", "np"):
            raise RequestError(f"output_type is {output_type!r}; choose 'pil' or 'np'")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise RequestError(f"callback_on_step_end is {callback_on_step_end!r}; give a function, or leave it out")
        if mask_image is None and control_image is not None:
            raise RequestError("control_image goes with mask_image; without one, the control is image")
        if mask_image is not None and output_type == "np":
            raise RequestError("photos may have any size, which output_type 'np' can't stack; choose 'pil'")
        size = self.plan.manifest.model.image_size
        settings = _ours(settings, OF_CALLS, {"height": size, "width": size} if mask_image is None else {})
        for name, called in (_CALLED | ({} if mask_image is None else {"edit": "mask_image"})).items():
            if name in settings:
                raise RequestError(f"{name} is given as {called} here; give that alone")
        own = self._schedule(
            guidance_scale,
            num_inference_steps,
            controlnet_conditioning_scale,
            (control_guidance_start, control_guidance_end),
        )
        for name in own.keys() & settings.keys():
            raise RequestError(f"{name} and {_SAME[name]} are the same; give one")
        settings |= own
        prompts = _prompts(image, class_labels, mask_image, control_image)
        configs = _configs(prompts, num_images_per_prompt, generator, settings)
        on_scale = None
        if callback_on_step_end is not None:
            on_scale = _reporting(self, callback_on_step_end)
        results = self.plan.generate_many(configs, on_scale=on_scale)
        made = [one for r in results for one in (r.images if r.edited is None else r.edited)]
        images: Any = [Image.fromarray(one) for one in made]
        if output_type == "np":
            images = np.stack(made).astype(np.float32) / np.float32(255)
        seeds = [seed for result in results for seed in result.request.seeds]
        return CARPipelineOutput(images=images, seeds=seeds, results=results)

    def _schedule(
        self,
        guidance: float | None,
        steps: int | None,
        strength: float | None,
        shares: tuple[float, float],
    ) -> dict[str, Any]:
        """Guidance, number of scales and what holds of the control, as settings; what is None isn't one."""
        K = len(self.plan.manifest.scales)
        settings: dict[str, Any] = {}
        if guidance is not None:
            number("guidance_scale", guidance, 1, 1001, "1 turns guidance off")
            settings["cfg"] = guidance - 1
        if steps is not None:
            integer("num_inference_steps", steps, 1, K, "leave it out to draw all scales")
            settings["stop_after"] = steps - 1
        if strength is not None:
            number("controlnet_conditioning_scale", strength, 0, MAX_STRENGTH, "1 is what the branch was trained on")
            settings["control_strength"] = strength
        for name, share in zip(("control_guidance_start", "control_guidance_end"), shares, strict=True):
            number(name, share, 0, 1, "leave it out to follow the control at all scales")
        start, end = shares
        if (start, end) != (0, 1):
            followed = [k for k in range(K) if k >= start * K and k + 1 <= end * K]
            if not followed:
                raise RequestError(
                    f"no scale of {K} lies between control_guidance_start {start} and control_guidance_end {end}; "
                    "leave more room, or give controlnet_conditioning_scale=0"
                )
            settings["control_scales"] = range(followed[0], followed[-1] + 1)
        return settings


def _ours(
    given: Mapping[str, Any], theirs: Sequence[Theirs], held: Mapping[str, object] = MappingProxyType({})
) -> dict[str, Any]:
    """What is given without arguments of diffusers' that ask for nothing, or for what holds. Raises RequestError."""
    kept = {}
    for name, value in given.items():
        found = [one for one in theirs if name in one.names]
        neutral = found[0].neutral + ((held[name],) if name in held else ()) if found else ()
        if not found:
            kept[name] = value
        elif not isinstance(value, (bool, int, float, str, type(None))) or value not in neutral:
            raise RequestError(f"{name} is {reprlib.repr(value)}, which only diffusers has; {found[0].remedy}")
    return kept


def _prompts(
    image: Any, class_labels: Any, mask_image: Any, control_image: Any
) -> list[tuple[Any, Any, dict[str, Any]]]:
    """Control, class and further settings of each prompt. Raises RequestError for lists of unlike lengths."""
    given = {"image": image, "class_labels": class_labels, "mask_image": mask_image, "control_image": control_image}
    lists = {name: value for name, value in given.items() if isinstance(value, (list, tuple))}
    lengths = {name: len(value) for name, value in lists.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise RequestError(f"the lists have unlike lengths or none: {said}; give each an entry for each prompt")
    count = max(lengths.values(), default=1)
    images, labels, masks, controls = (lists.get(name, [value] * count) for name, value in given.items())
    if mask_image is None:
        return [(one, label, {}) for one, label in zip(images, labels, strict=True)]
    if image is None:
        raise RequestError("mask_image is of a photo, and none is given; give it as image")
    edits = [{"edit": Edit(image=one, mask=mask)} for one, mask in zip(images, masks, strict=True)]
    return list(zip(controls, labels, edits, strict=True))


def _configs(
    prompts: list[tuple[Any, Any, dict[str, Any]]], n: int, generator: object, settings: Mapping[str, Any]
) -> list[GenerationConfig]:
    """A config for each prompt, or for each image where every image has a seed of its own."""
    n = integer("num_images_per_prompt", n, 1, 1024, "ask for fewer and go on with another seed")
    total = len(prompts) * n
    if isinstance(generator, (list, tuple)):
        if len(generator) != total:
            raise RequestError(f"generator has {len(generator)} seeds for {total} images; give each image one")
        repeated = [prompt for prompt in prompts for _ in range(n)]
        return [
            config_of(control, label, seed, **more, **settings)
            for (control, label, more), seed in zip(repeated, generator, strict=True)
        ]
    first = _first_seed(generator, total)
    return [
        config_of(control, label, first + i * n, n, **more, **settings)
        for i, (control, label, more) in enumerate(prompts)
    ]


def _first_seed(generator: object, total: int) -> int:
    """The seed of the first image. Raises RequestError for what no seed can be had of."""
    if generator is None:
        return secrets.randbelow(2**32)
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(2**32))
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool):
        return integer("generator", generator, 0, MAX_SEED + 1 - total, "choose a seed in that range")
    raise RequestError(
        f"generator is a {type(generator).__name__}; give a seed, a list of seeds or a numpy Generator"
    )


def _reporting(pipeline: CARPipeline, call: OnStepEnd) -> Callable[[ScaleResult], None]:
    sides = [scale.side for scale in pipeline.plan.manifest.scales]

    def on_scale(scale: ScaleResult) -> None:
        call(pipeline, scale.index, sides[scale.index], {"scale": scale})

    return on_scale
