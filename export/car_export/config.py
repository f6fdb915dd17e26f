"""What an export, an int8 plan and a measurement of half precision can be asked for.

Each option is described once, here: the commands make their flags from these fields.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from car_export.errors import ExportError
from car_train.flags import option
from car_train.sampling import CAR, NAMED, Sampling, settings_of

PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to build, besides the model. Raises ExportError."""

    output: Path
    """The plan, a folder NAME.plan."""
    name: str
    """The model's name in the manifest."""
    precision: str = option(
        "fp32", "compute type; fp16 and bf16 keep norms, softmax, logits and f̂ in float32", choices=PRECISIONS
    )
    weights: str = option(
        "fp32",
        "storage type for fp32 compute; int8: large products multiply INT8, for CPUs",
        choices=("fp32", "fp16", "int8"),
    )
    """fp32 or fp16; an int8 plan is made of an exported one, by `quantize.int8`."""
    batches: tuple[int, ...] = option(
        (1,), "batch sizes that get static steps, e.g. 1,4", flag="--batch", dest="batch", metavar="SIZES"
    )
    preset: str = option("car", "default guidance, top-k, top-p of the plan", choices=NAMED)
    cfg: float | None = option(None, "default guidance of the plan (default: the preset's)")
    top_k: int | None = option(None, "default top-k of the plan, 0 = off (default: the preset's)")
    top_p: float | None = option(None, "default top-p of the plan, 0 = off (default: the preset's)")
    more_smooth: bool = option(False, "let requests ask for smoother images: codes mixed by Gumbel noise")
    """The step can mix codes by `smooth_noise` where its input `smooth` says so."""
    class_names: tuple[str, ...] | None = None
    """Instead of the checkpoint's own, if any."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Fact → value, for the manifest: where the model came from."""

    def __post_init__(self) -> None:
        for name, known in (("precision", PRECISIONS), ("weights", ("fp32", "fp16"))):
            if getattr(self, name) not in known:
                raise ExportError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(known)}")
        if not self.batches or min(self.batches) < 1:
            raise ExportError(f"batch is {list(self.batches)}; give positive numbers, e.g. 1,4")
        if self.preset not in NAMED:
            raise ExportError(f"preset is {self.preset!r}; choose {' or '.join(NAMED)}")
        own = self.sampling(sys.maxsize)
        if not 0 <= own.cfg < math.inf:
            raise ExportError(f"cfg is {own.cfg}; give a number from 0")
        if own.top_k < 0 or not 0 <= own.top_p <= 1:
            raise ExportError(f"top-k {own.top_k}, top-p {own.top_p}; give top-k from 0 and top-p in 0…1 (0 = off)")
        _check_plan_name(self.output)

    def sampling(self, vocab: int) -> Sampling:
        """What the plan draws with by default; top-k is cut to the vocabulary."""
        chosen = settings_of(self.preset, self.cfg, self.top_k, self.top_p, vocab)
        return replace(chosen, top_k=min(chosen.top_k, vocab))


@dataclass(frozen=True, kw_only=True)
class Int8Options:
    """What to make, besides the plan that it is made from. Raises ExportError."""

    source: Path
    """A float32 plan."""
    output: Path
    """The int8 plan, a folder NAME.plan."""
    name: str | None = None
    """The model's name in the manifest; None: that of the plan."""
    controls: tuple[Path, ...] = ()
    """Control images to calibrate on, files or folders; none: synthetic ones."""

    def __post_init__(self) -> None:
        _check_plan_name(self.output)
        if self.output.resolve() == self.source.resolve():
            raise ExportError(f"{self.output} is the plan to read; choose another name for the int8 one")


@dataclass(frozen=True, kw_only=True)
class NumericsOptions:
    """How half precision is measured. Raises ExportError."""

    precision: str = option("fp16", choices=("fp16", "bf16"))
    cfg: float = option(CAR.cfg, "guidance")
    top_k: int = option(CAR.top_k, "for the sampled tokens, 0 = off")
    top_p: float = option(CAR.top_p, "for the sampled tokens, 0 = off")
    factor: float = option(10.0, "scale of the weights in the overflow test")

    def __post_init__(self) -> None:
        if self.precision not in ("fp16", "bf16"):
            raise ExportError(f"precision is {self.precision!r}; choose fp16 or bf16")


def _check_plan_name(output: Path) -> None:
    if not output.name.endswith(".plan"):
        raise ExportError(f"{output}: a plan's name ends in .plan; write e.g. -o {output.name}.plan")
