"""What images are drawn from: a checkpoint, by the reference loop, or a plan, by the runtime.

The runtime is another program here: `car-run batch`, started in processes of its own, says what a plan is and draws.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from car_train import checkpoint
from car_train.conventions import ControlConvention
from car_train.evaluation.options import EvalOptions, EvaluationError, require
from car_train.sampling import NAMED, Sampling

MANIFEST = "manifest.json"
"""The file that makes a folder a plan."""


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
    command: tuple[str, ...]
    """Takes files of requests, `-o DIR` and `--threads N` (`car_train.evaluation.requests`)."""

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
    about = _about(path)
    try:
        own = Sampling(**about["sampling"]) if options.preset not in NAMED else None
        how = about["control_convention"]
        found = Target(
            kind="plan",
            path=path,
            name=str(about["name"]),
            digests=about["files"],
            image_size=int(about["image_size"]),
            vocab=int(about["vocab"]),
            classes=int(about["classes"]),
            class_names=None if about["class_names"] is None else tuple(about["class_names"]),
            convention=None if how is None else ControlConvention(**{k: _frozen(v) for k, v in how.items()}),
            sampling=_sampling(options, own, int(about["vocab"])),
            command=(),
        )
    except (KeyError, TypeError) as error:
        raise EvaluationError(
            f"{path}: car-run describes it in another way ({error!r}); install runtime and training of one version"
        ) from error
    command = [sys.executable, "-m", "car_runtime", "batch", "-e", str(path), "--backend", options.backend]
    return replace(found, command=(*command, *_flags(found.sampling)))


def _sampling(options: EvalOptions, own: Sampling | None, vocab: int) -> Sampling:
    """The options' settings; where they leave the choice to the plan, its own."""
    if own is None:
        return options.sampling(vocab)
    given = {k: v for k in asdict(own) if (v := getattr(options, k)) is not None}
    chosen = replace(own, **given)
    return replace(chosen, top_k=chosen.top_k if chosen.top_k < vocab else 0)


def _about(path: Path) -> dict[str, Any]:
    """What `car-run batch --json` says of a plan. Raises EvaluationError with its error."""
    command = [sys.executable, "-m", "car_runtime", "batch", "-e", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EvaluationError(last_error(done.stderr))
    about: dict[str, Any] = json.loads(done.stdout)["plan"]
    return about


def last_error(stderr: str) -> str:
    """The message of a program's last line, without its name."""
    line = (stderr.strip().splitlines() or ["it said nothing; run it by hand"])[-1]
    return line.partition(": error: ")[2] or line


def _flags(sampling: Sampling) -> list[str]:
    return ["--cfg", repr(sampling.cfg), "--top-k", str(sampling.top_k), "--top-p", repr(sampling.top_p)]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
