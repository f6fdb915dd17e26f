"""Settings of sampling, by name: what `sample`, `eval`, the sheets of training and an export begin with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. 0 turns each of them off."""

    cfg: float
    """Guidance."""
    top_k: int
    top_p: float


CAR = Sampling(cfg=4.0, top_k=900, top_p=0.95)
PRESETS = {"car": CAR, "var-fid": Sampling(cfg=1.5, top_k=900, top_p=0.96), "plan": CAR}
"""car: of the published CAR. var-fid: with which VAR's FID is measured. plan: a plan's, unless its export was given
others; from PyTorch `plan` and `car` are the same."""
NAMED = ("car", "var-fid")
"""Those that mean the same everywhere."""


def settings_of(preset: str, cfg: float | None, top_k: int | None, top_p: float | None, vocab: int) -> Sampling:
    """A preset with what is given instead of its own values; a preset's top-k is cut to the vocabulary."""
    own = PRESETS[preset]
    return Sampling(
        cfg=own.cfg if cfg is None else cfg,
        top_k=min(own.top_k, vocab) if top_k is None else top_k,
        top_p=own.top_p if top_p is None else top_p,
    )
