"""What images are drawn from: a checkpoint, by the reference loop, or a plan, by the runtime.

The runtime is another program here: `car-run batch`, started in processes of its own, checks a plan and draws. What
an evaluation needs to know of a plan is read from its manifest (docs/reference/plan-format.md).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from car_train import checkpoint
from car_train.conventions import FIRST, ControlConvention, convention
from car_train.errors import UserError
from car_train.evaluation.options import EvalOptions, EvaluationError, require
from car_train.sampling import NAMED, Sampling

MANIFEST = "manifest.json"
"""The file that makes a folder a plan."""
LARGEST = {"vocab": 2**20, "image_size": 4096, "classes": 2**20}
"""Of a plan's model, as the runtime has it (`car_runtime.format.schema`)."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to draw from, what an evaluation needs to know of it, and the command that draws."""

    kind: str
    """ "plan" or "checkpoint"."""
    path: Path
    name: str
    digests: Mapping[str, Any]
    """SHA-256 of its files, by name."""
    image_size: int
    vocab: int
    classes: int
    class_names: tuple[str, ...] | None
    convention: ControlConvention | None
    """How its control maps are made; None without a control branch."""
    sampling: Sampling
    """What the options come to for it."""
    control_key: str = "control"
    """What a request calls its control image."""
    command: tuple[str, ...]
    """Takes a file of requests, `-o DIR` and `--threads N` (`car_train.evaluation.requests`)."""

    @property
    def control_type(self) -> str | None:
        return None if self.convention is None else self.convention.control_type


def is_plan(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def open_target(options: EvalOptions) -> Target:
    """The plan or checkpoint of the options. Raises EvaluationError, CheckpointError."""
    return _plan(options) if is_plan(options.checkpoint) else _checkpoint(options)


def _checkpoint(options: EvalOptions) -> Target:
    path = checkpoint.locate(options.checkpoint)
    config = checkpoint.load(path).config
    require(
        config.var is not None,
        f"{options.checkpoint} holds a tokenizer only, which draws nothing; give a transformer or a branch",
    )
    assert config.var is not None
    sampling = options.sampling(config.vqvae.vocab)
    command = [sys.executable, "-m", "car_train.evaluation.requests", str(path), "--device", options.device]
    return Target(
        kind="checkpoint",
        path=path,
        name=f"{path.parent.name}/{path.name}",
        digests=checkpoint.fingerprint(path),
        image_size=config.vqvae.image_size,
        vocab=config.vqvae.vocab,
        classes=config.var.classes,
        class_names=config.class_names,
        convention=config.car.control_convention if config.car else None,
        sampling=sampling,
        command=(*command, "--batch", str(options.batch), *_flags(sampling)),
    )


def _plan(options: EvalOptions) -> Target:
    path = options.checkpoint
    require(options.device == "cpu", f"device {options.device} is a checkpoint's; choose a plan's with --backend")
    try:
        about = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        model, own = about["model"], Sampling(**about["sampling"])
        vocab, names = _size(model, "vocab"), model["class_names"]
        sampling = options.sampling(vocab) if options.preset in NAMED else _sampling(options, own, vocab)
        flags = ["-e", str(path), "--backend", options.backend, "--no-receipt", *_flags(sampling)]
        return Target(
            kind="plan",
            path=path,
            name=str(about["name"]),
            digests={name: file["sha256"] for name, file in sorted(about["files"].items())},
            image_size=_size(model, "image_size"),
            vocab=vocab,
            classes=_size(model, "classes"),
            class_names=None if names is None else tuple(names),
            convention=_convention(model, options.branch),
            control_key="control" if options.branch is None else f"control:{options.branch}",
            sampling=sampling,
            command=(sys.executable, "-m", "car_runtime", "batch", *flags),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise EvaluationError(
            f"{path}: its {MANIFEST} can't be read ({error!r:.120}); export the plan again"
        ) from error


def _size(model: Mapping[str, Any], name: str) -> int:
    """A size of a plan's model, before images are made for it. Raises ValueError."""
    size = model[name]
    if type(size) is not int or not 1 <= size <= LARGEST[name]:
        raise ValueError(f"{name} is {size!r:.40}, not in 1…{LARGEST[name]}")
    return size


def _convention(model: Mapping[str, Any], name: str | None) -> ControlConvention | None:
    """How the maps of a plan are made; of format 2, of one branch, the default one if None; None without control."""
    branches = model.get("branches") or {}
    require(
        name is None or name in branches,
        f"the plan has no branch {name!r}; choose one of: {', '.join(map(str, branches)) or 'none'}",
    )
    branch = branches[name or model["default_branch"]] if branches else model
    control_type, stated = branch.get("control_type"), branch.get("control_convention")
    if control_type is None:
        return None
    if stated is None or stated["control_type"] != control_type:
        return convention(FIRST[control_type])
    settings: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in stated.items()}
    return ControlConvention(**settings)


def _sampling(options: EvalOptions, own: Sampling, vocab: int) -> Sampling:
    """The options' settings, and where they leave the choice to the plan, its own."""
    given = {k: v for k in asdict(own) if (v := getattr(options, k)) is not None}
    chosen = replace(own, **given)
    return replace(chosen, top_k=chosen.top_k if chosen.top_k < vocab else 0)


def first_error(stderr: str) -> str:
    """The message of the first line in which a program says that something failed."""
    lines = stderr.strip().splitlines() or ["it said nothing; run it by hand"]
    line = next((line for line in lines if ": error: " in line or " failed: " in line), lines[-1])
    return line.partition(": error: ")[2] or line


def _flags(sampling: Sampling) -> list[str]:
    return ["--cfg", repr(sampling.cfg), "--top-k", str(sampling.top_k), "--top-p", repr(sampling.top_p)]
