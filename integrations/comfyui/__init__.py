"""Nodes for ComfyUI: a CAR plan, a control with its map, drawing with previews, editing.

    pip install 'car-deploy[cpu]'                            # in ComfyUI's environment
    cp -r integrations/comfyui ComfyUI/custom_nodes/car

`example.json` is a workflow: open it in ComfyUI, or post it to /prompt. docs/from-comfyui.md maps ComfyUI's own nodes
to these.

Shapes: B images of a batch; H, W pixels; n images that are drawn; K scales; S side of the plan's image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy.utils import ProgressBar
from nodes import PreviewImage
from numpy.typing import NDArray
from PIL import Image
from server import PromptServer

import car_runtime
from car_runtime import GenerationConfig, Plan, ScaleResult
from car_runtime.backends.registry import by_rank
from car_runtime.config import PRESETS
from car_runtime.control_checks import prepare_control
from car_runtime.editing.edit import Edit
from car_runtime.images import open_image
from car_runtime.photo import control_of_photo

NO_MASK = (1, 64, 64)
"""Shape of the empty mask that Load Image gives for an image without one."""
LARGEST_SEED = 2**53 - 1024  # JavaScript's numbers are exact up to 2⁵³
PREVIEW_SIDE = 512


@dataclass(frozen=True, kw_only=True)
class Control:
    """What is followed on one branch."""

    node: str
    """The node that it is from."""
    given: Image.Image
    """The photo or map as it came."""
    is_photo: bool
    square: Image.Image
    """The map as the plan takes it, S × S."""
    weight: float

    def image(self, plan: Plan, branch: str, edit: Edit | None) -> tuple[Image.Image, tuple[str, ...]]:
        """What the plan is given, and warnings. Of a part of an image it is what lies there, whatever the fit."""
        if edit is None or not edit.is_part:
            return self.square, ()
        if not self.is_photo:
            return self.given, ()
        made, warnings = control_of_photo(self.given, plan.manifest, branch=branch, edit=edit)
        return Image.fromarray(made), warnings


Controls = dict[str, Control]


class CARPlan:
    """Opens a plan. It stays open while the node's inputs, and the plan's files, stay as they are."""

    CATEGORY, FUNCTION = "CAR", "open"
    RETURN_TYPES, RETURN_NAMES = ("CAR_PLAN",), ("plan",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        about = "directory of a plan, or hf:ORG/NAME on the hub; empty: the small plan of the package"
        return {
            "required": {
                "plan": ("STRING", {"default": "", "tooltip": about}),
                "backend": (["auto", *by_rank()],),
            }
        }

    @classmethod
    def IS_CHANGED(cls, plan: str | None, backend: str) -> object:  # noqa: N802
        plan = (plan or "").strip()  # None: it comes from another node
        manifest = Path(plan) / "manifest.json"
        return manifest.stat().st_mtime_ns if plan and manifest.is_file() else plan

    def open(self, plan: str, backend: str) -> tuple[Plan]:
        return (car_runtime.open_plan(plan.strip() or None, backend),)


class CARControl:
    """The control map of one image, as the plan takes it, shown on the node."""

    CATEGORY, FUNCTION = "CAR", "prepare"
    RETURN_TYPES, RETURN_NAMES = ("CAR_CONTROL", "IMAGE"), ("control", "map")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        branch = "which of the plan's control branches; empty: its default one"
        return {
            "required": {
                "plan": ("CAR_PLAN",),
                "image": ("IMAGE",),
                "image_is": (["photo", "map"], {"tooltip": "photo: the map is made of it; map: taken as it is"}),
                "fit": (["plan's own", "crop", "pad", "stretch"], {"tooltip": "what becomes of other aspects"}),
                "branch": ("STRING", {"default": "", "tooltip": branch}),
                "weight": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05}),
            },
            "optional": {"more": ("CAR_CONTROL", {"tooltip": "controls of other branches"})},
            "hidden": {"node": "UNIQUE_ID"},
        }

    def prepare(
        self, plan: Plan, image: torch.Tensor, image_is: str, fit: str, branch: str, weight: float,
        more: Controls | None = None, node: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        model = plan.manifest.model
        name = branch.strip() or model.default_branch or model.control_type or ""
        if more and name in more:
            raise car_runtime.RequestError(
                f"the CAR Control nodes {more[name].node} and {node} are both for the branch {name!r}; name another "
                "branch in one of them, or take one out"
            )
        given = _image(image)
        chosen = None if fit == "plan's own" else fit
        if image_is == "photo":
            made, warnings = control_of_photo(given, plan.manifest, branch=name, fit=chosen)
            square = Image.fromarray(made)
        else:
            square, warnings = prepare_control(
                open_image(given), model.conventions.get(name), model.image_size, chosen
            )
        _warn(node, warnings)
        control_map = _tensor([np.asarray(square)])
        shown = PreviewImage().save_images(control_map)
        control = Control(node=node, given=given, is_photo=image_is == "photo", square=square, weight=weight)
        return {"ui": shown["ui"], "result": ((more or {}) | {name: control}, control_map)}


def _drawing_inputs() -> dict[str, Any]:
    """What Draw and Edit have in common: the fields of `GenerationConfig`, -1 where a value is the plan's own."""

    def number(kind: str, low: float, high: float, tooltip: str, default: float = -1, **more: Any) -> Any:
        return (kind, {"default": default, "min": low, "max": high, "tooltip": tooltip, **more})

    scales = "A-B, A-, -B or one number; empty: all scales"
    return {
        "required": {
            "plan": ("CAR_PLAN",),
            "class_name": ("STRING", {"default": "", "tooltip": "name or index; empty: no class"}),
            "seed": number("INT", 0, LARGEST_SEED, "of the first image", 0, control_after_generate=True),
            "images": number("INT", 1, 64, "seeds follow one another", 1),
            "preset": (list(PRESETS), {"tooltip": "where guidance, top-k and top-p come from that are -1"}),
            "guidance": number("FLOAT", -1, 1000, "0: off, twice as fast", step=0.1),
            "top_k": number("INT", -1, 2**20, "0: all codes"),
            "top_p": number("FLOAT", -1, 1, "0: all codes", step=0.01),
            "guidance_scales": ("STRING", {"default": "", "tooltip": f"guidance at {scales}"}),
            "stop_after": number("INT", -1, 64, "last scale to draw: a coarser image"),
            "control_strength": number("FLOAT", 0, 2, "times the control's features", 1.0, step=0.05),
            "control_guidance": number("FLOAT", 0, 1000, "guidance by the control; 0: off", 0.0, step=0.1),
            "control_scales": ("STRING", {"default": "", "tooltip": f"control at {scales}"}),
        },
        "optional": {"control": ("CAR_CONTROL",)},
        "hidden": {"node": "UNIQUE_ID"},
    }


class CARDraw:
    """Draws images, and shows the first one after each scale."""

    CATEGORY, FUNCTION = "CAR", "draw"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return _drawing_inputs()

    def draw(self, plan: Plan, node: str = "", **given: Any) -> tuple[torch.Tensor]:
        config, warnings = _config(plan, **given)
        result = plan.generate(config, on_scale=_progress(plan, config))
        _warn(node, warnings + result.warnings)
        return (_tensor(list(result.images)),)


class CAREdit:
    """Draws a part of an image anew, what lies beyond its edges, or all of it on its own coarse scales."""

    CATEGORY, FUNCTION = "CAR", "edit"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        inputs = _drawing_inputs()
        side = ("INT", {"default": 0, "min": 0, "max": 8192, "tooltip": "pixels that the frame grows by"})
        kept = "coarse scales that are kept everywhere: more for the same composition"
        again = "coarse scales of a second pass, for seams and colours; 0: one pass"
        inputs["required"] |= {
            "image": ("IMAGE",),
            **dict.fromkeys(("left", "top", "right", "bottom"), side),
            "keep_scales": ("INT", {"default": 0, "min": 0, "max": 64, "tooltip": kept}),
            "harmonise": ("INT", {"default": 0, "min": 0, "max": 64, "tooltip": again}),
        }
        inputs["optional"]["mask"] = ("MASK", {"tooltip": "where the image is drawn anew; without one: everywhere"})
        return inputs

    def edit(
        self, plan: Plan, image: torch.Tensor, left: int, top: int, right: int, bottom: int, keep_scales: int,
        harmonise: int, mask: torch.Tensor | None = None, node: str = "", **given: Any,
    ) -> tuple[torch.Tensor]:  # fmt: skip
        margins = (left, top, right, bottom)
        if mask is not None and mask.shape == NO_MASK and not mask.any():
            mask = None
        edit = Edit(
            image=_image(image),
            mask=None if mask is None else Image.fromarray(_levels(_single(mask, "mask"))),
            extend=margins if any(margins) else None,
            from_scale=keep_scales,
            harmonise=harmonise,
        )
        config, warnings = _config(plan, edit=edit, **given)
        result = plan.generate(config, on_scale=_progress(plan, config))
        _warn(node, warnings + result.warnings)
        assert result.edited is not None
        return (_tensor([one[..., :3] for one in result.edited]),)


def _config(
    plan: Plan, class_name: str, images: int, guidance: float, top_k: int, top_p: float, guidance_scales: str,
    stop_after: int, control_strength: float, control_guidance: float, control_scales: str,
    control: Controls | None = None, edit: Edit | None = None, **same: Any,
) -> tuple[GenerationConfig, tuple[str, ...]]:  # fmt: skip
    """The config of a node's inputs, and warnings."""
    label = class_name.strip()
    made = {branch: one.image(plan, branch, edit) for branch, one in (control or {}).items()}
    config = GenerationConfig(
        control={branch: (image, control[branch].weight) for branch, (image, _) in made.items()} if control else None,
        edit=edit,
        label=int(label) if label.isdecimal() else label or None,
        n=images,
        cfg=None if guidance < 0 else guidance,
        top_k=None if top_k < 0 else top_k,
        top_p=None if top_p < 0 else top_p,
        cfg_scales=guidance_scales.strip() or None,
        stop_after=None if stop_after < 0 else stop_after,
        control_strength=None if control_strength == 1 else control_strength,
        control_cfg=control_guidance,
        control_scales=control_scales.strip() or None,
        **same,
    )
    return config, tuple(warning for _, said in made.values() for warning in said)


def _progress(plan: Plan, config: GenerationConfig) -> Callable[[ScaleResult], None]:
    """A call after each scale that moves ComfyUI's progress bar and shows the first image; it raises on a cancel."""
    last = len(plan.manifest.scales) - 1
    drawn = 1 + (last if config.stop_after is None else min(config.stop_after, last))
    bar = ProgressBar(drawn * config.n)
    done = 0

    def on_scale(scale: ScaleResult) -> None:
        nonlocal done
        done += len(scale.images)
        shown = Image.fromarray(scale.preview([0])[0])
        bar.update_absolute(done, preview=("PNG", shown, PREVIEW_SIDE))

    return on_scale


def _single(batch: torch.Tensor, what: str) -> torch.Tensor:
    """The one image of a batch, [H, W] or [H, W, C]."""
    if len(batch) != 1:
        raise car_runtime.RequestError(f"the {what} is a batch of {len(batch)}; choose one of them")
    return batch[0]


def _levels(image: torch.Tensor) -> NDArray[np.uint8]:
    """0…1 as 0…255."""
    return np.asarray((image.cpu() * 255).round().clamp(0, 255)).astype(np.uint8)


def _image(batch: torch.Tensor) -> Image.Image:
    """IMAGE, f32 [1, H, W, 3 or 4], as Pillow has it."""
    return Image.fromarray(_levels(_single(batch, "image")))


def _tensor(images: list[NDArray[np.uint8]]) -> torch.Tensor:
    """Images [H, W, 3] of one size as IMAGE, f32 [B, H, W, 3] in 0…1."""
    return torch.from_numpy(np.stack(images)).float() / 255


def _warn(node: str, warnings: tuple[str, ...]) -> None:
    """Warnings go to the log and onto the node."""
    for warning in warnings:
        logging.warning("CAR: %s", warning)
    if warnings and node:
        PromptServer.instance.send_progress_text("\n".join(warnings), node)


NODE_CLASS_MAPPINGS = {"CARPlan": CARPlan, "CARControl": CARControl, "CARDraw": CARDraw, "CAREdit": CAREdit}
NODE_DISPLAY_NAME_MAPPINGS = {
    "CARPlan": "CAR Plan",
    "CARControl": "CAR Control",
    "CARDraw": "CAR Draw",
    "CAREdit": "CAR Edit",
}
