"""What a run writes about itself: `run.json`, `log.jsonl`, the progress bar, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from car_train.config import ConfigError
from car_train.files import write_text


class RunLogger:
    """The log of one run, open within a `with`; what it has beyond the step that the run starts at is cut off."""

    def __init__(self, output: Path, facts: dict[str, Any], *, step: int, steps: int, tensorboard: bool):
        """output: the run's folder. facts: of `run.json`. step, steps: where the run starts and ends."""
        self.output, self.facts, self.step, self.steps, self.tensorboard = output, facts, step, steps, tensorboard
        self.began, self.before = time.monotonic(), 0.0

    def __enter__(self) -> RunLogger:
        self.board = _tensorboard(self.output / "tensorboard", self.step) if self.tensorboard else None
        write_text(self.output / "run.json", json.dumps(self.facts, indent=2) + "\n")
        self._cut_back(self.output / "log.jsonl")
        self.log = (self.output / "log.jsonl").open("a", encoding="utf-8")
        self.bar = tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.log.close()
        if self.board is not None:
            self.board.close()

    def _cut_back(self, log: Path) -> None:
        """Keep the records up to the step that the run goes on from, and of them the seconds it took so far."""
        if not log.is_file():
            return
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [(line, when) for line in lines if (when := _when(line)) is not None and when[0] <= self.step]
        if kept:
            self.before = kept[-1][1][1]
        write_text(log, "".join(f"{line}\n" for line, _ in kept))

    def write(self, step: int, record: dict[str, float]) -> None:
        """Log the record of one step; a validation is shown in full."""
        seconds = round(self.before + time.monotonic() - self.began, 2)
        self.log.write(json.dumps({"step": step, "seconds": seconds, **record}) + "\n")
        self.log.flush()
        if self.board is not None:
            for name, value in record.items():
                self.board.add_scalar(name.replace("val_", "val/") if name.startswith("val_") else name, value, step)
        shown = {k: v for k, v in record.items() if not k.startswith("codes_used_")}
        self.bar.update()
        brief = {k: f"{shown[k]:.3g}" for k in ("loss", "psnr", "accuracy") if k in shown}
        self.bar.set_postfix(brief, refresh=False)
        if "val_loss" in record:
            line = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
            tqdm.write(f"step {step}: {line}", file=sys.stderr)


def _when(line: str) -> tuple[int, float] | None:
    """(step, seconds) of a line of the log; None if it is torn, as when the machine went down."""
    try:
        record = json.loads(line)
        return int(record["step"]), float(record["seconds"])
    except (ValueError, KeyError, TypeError):
        return None


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"TensorBoard logs need a package ({error}); pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=step + 1)  # type: ignore[no-untyped-call]
