"""Training runs as their folders record them: logs as killed and resumed runs leave them, and summaries.

`run.json` says what the run is (older runs have none: sizes are then taken from the newest checkpoint), `log.jsonl`
has one record a step. A run that was killed leaves a torn last line, and one that was resumed repeats the steps after
its checkpoint, so torn lines are left out and of equal steps the last written counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_train.checkpoint import of_run
from car_train.config import ConfigError, ModelConfig
from car_train.errors import UserError

STAGES = ("vqvae", "var", "car", "cca")
HIGHER_IS_BETTER = ("psnr", "accuracy", "codes_used", "margin", "preferred")

Array = NDArray[np.float64]
Record = dict[str, float]


class ReportError(UserError, ValueError):
    """A folder that no report can be made of, or an output that can't be written; the message has the remedy."""


@dataclass(frozen=True)
class Run:
    """A training run as its folder records it."""

    folder: Path
    stage: str
    records: tuple[Record, ...]
    """One a step, ascending; `seconds` since the run's first start, pauses between resumptions left out."""
    damaged: int
    """Lines of the log that could not be read."""
    config: ModelConfig | None
    options: dict[str, Any]
    images: dict[str, int]
    parameters: dict[str, int]
    processes: int

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        return int(self.records[-1]["step"])

    @property
    def seconds(self) -> float:
        return self.records[-1].get("seconds", math.nan)

    def series(self, metric: str) -> tuple[Array, Array]:
        """(steps, values), both f64 [n], where the log has the metric."""
        found = [(r["step"], r[metric]) for r in self.records if metric in r]
        steps, values = np.array(found, np.float64).reshape(-1, 2).T
        return steps, values

    def metrics(self) -> list[str]:
        """Names of all that was logged, in the log's order."""
        return list(dict.fromkeys(name for record in self.records for name in record))

    def images_per_second(self) -> float | None:
        """Images through a training step per second, by the median step: validation and saving don't count."""
        steps, seconds = self.series("seconds")
        batch = self.options.get("batch")
        forward = np.diff(seconds) > 0
        if not isinstance(batch, int) or not forward.any():
            return None
        return batch / float(np.median(np.diff(seconds)[forward] / np.diff(steps)[forward]))


def read_run(folder: str | Path) -> Run:
    """Everything a report needs from a run's folder; ReportError if it is none."""
    folder = Path(folder).expanduser()
    if not (folder / "log.jsonl").is_file():
        raise ReportError(f"{folder}: no training run there (no log.jsonl); give the folder that training wrote")
    records, damaged = read_log(folder / "log.jsonl")
    about = _read_about(folder / "run.json")
    checkpoint = _newest_checkpoint(folder)
    config = _config(about.get("config"), checkpoint)
    stage = about.get("stage") or _stage_of(config, records)
    if not isinstance(stage, str) or stage not in STAGES:
        raise ReportError(f"{folder / 'run.json'}: no stage {stage!r}; there are: {', '.join(STAGES)}")
    parameters = _numbers(about.get("parameters"))
    if not parameters and checkpoint is not None:
        parameters = _count_parameters(checkpoint, stage)
    options = about.get("options")
    return Run(
        folder=folder,
        stage=stage,
        records=tuple(records),
        damaged=damaged,
        config=config,
        options=options if isinstance(options, dict) else {},
        images=_numbers(about.get("pictures")),
        parameters=parameters,
        processes=_numbers(about).get("processes", 1),
    )


def read_log(path: Path) -> tuple[list[Record], int]:
    """(one record a step, ascending; number of unreadable lines).

    `seconds` starts at 0 in the log whenever a run is resumed; here it goes on from where the run was stopped.
    Raises ReportError if no line can be read.
    """
    by_step: dict[int, Record] = {}
    damaged, before, offset, last_step = 0, 0.0, 0.0, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = _record(line)
        if record is None:
            damaged += bool(line.strip())
            continue
        step, seconds = int(record["step"]), record.get("seconds", before)
        if step <= last_step or seconds < before:
            offset += before
        before, last_step = seconds, step
        by_step[step] = {**record, "seconds": offset + seconds}
    if not by_step:
        raise ReportError(f"{path}: holds no step that can be read; train first, or give another folder")
    return [by_step[step] for step in sorted(by_step)], damaged


def _record(line: str) -> Record | None:
    """One line of the log, numbers only; None if it is torn or something else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    numbers = {k: float(v) for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return numbers if numbers.get("step", math.nan) >= 0 and math.isfinite(numbers["step"]) else None


def _read_about(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: can't be read ({error}); remove it to make a report without it") from error
    if not isinstance(about, dict):
        raise ReportError(f"{path}: is not an object; remove it to make a report without it")
    return about


def _numbers(found: Any) -> dict[str, int]:
    return {k: v for k, v in found.items() if isinstance(v, int)} if isinstance(found, dict) else {}


def _newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(of_run(folder)), None)


def _config(found: Any, checkpoint: Path | None) -> ModelConfig | None:
    """The model's sizes, if anything records them: a report can do without."""
    try:
        if found is not None:
            return ModelConfig.from_json(json.dumps(found))
        if checkpoint is not None:
            return ModelConfig.from_json((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (ConfigError, OSError, UnicodeDecodeError):
        pass
    return None


def _stage_of(config: ModelConfig | None, records: Sequence[Record]) -> str:
    if config is None:
        return "vqvae" if any("psnr" in record for record in records) else "var"
    return "car" if config.car is not None else "var" if config.var is not None else "vqvae"


def _count_parameters(checkpoint: Path, stage: str) -> dict[str, int]:
    """Parameters by the headers of a checkpoint's files; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    counts: dict[str, int] = {}
    try:
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, framework="numpy") as tensors:
                counts[file.stem] = sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError):
        return {}
    return {"total": sum(counts.values()), "trainable": counts.get(stage, 0)}


def summary(run: Run | str | Path) -> dict[str, Any]:
    """What a machine wants to know of a run; every value is JSON's own.

    `last`: the newest validation, its step and figures. `best`: of each validation figure the best value and its
    step. `steps`: how many were planned. Raises ReportError.
    """
    run = run if isinstance(run, Run) else read_run(run)
    validations = [r for r in run.records if any(k.startswith("val_") for k in r)]
    last = {k: v for k, v in validations[-1].items() if k == "step" or k.startswith("val_")} if validations else None
    best: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(k for r in validations for k in r if k.startswith("val_")):
        sign = -1 if name.removeprefix("val_").removeprefix("ema_").startswith(HIGHER_IS_BETTER) else 1
        finite = [r for r in validations if math.isfinite(r.get(name, math.nan))]
        if finite:
            record = min(finite, key=lambda r: sign * r[name])
            best[name] = {"value": record[name], "step": record["step"]}
    found = {
        "run": str(run.folder),
        "stage": run.stage,
        "step": run.step,
        "steps": run.options.get("steps"),
        "batch": run.options.get("batch"),
        "seconds": round(run.seconds, 2),
        "images_per_second": run.images_per_second(),
        "parameters": run.parameters or None,
        "pictures": run.images or None,
        "last": last,
        "best": best,
        "unreadable_lines": run.damaged,
    }
    return _json_values(found)


def _json_values(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, become null; whole floats that count steps become ints."""
    if isinstance(value, dict):
        return {k: int(v) if k == "step" and v is not None else _json_values(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
