"""Training speed vs. a plain implementation of the same step.

    python -m benchmarks.training                                  # width of d16, two blocks, 256×256: minutes
    python -m benchmarks.training --preset demo --precision bf16   # the model that ships

A step is forward, backward and AdamW (fused) on one batch that is in memory already; the base is frozen in both.

The plain one is what the published code does: attention over the masked [L, L] square, the tokenizer run on the
images in every step, one convolution after the other for every scale of the control, PyTorch's products, images and
kernels in NCHW. In bf16 its tokenizer, control encoder and injection stay in float32, as published.

Ours gives every scale its prefix to attend to, takes tokens from a cache, and has the kernels of
`car_train.model.kernels` and channels-last. The rows between show what each is worth alone.

All variants run in turn in one process, so that ratios hold on a busy machine, and must find the same loss; each
one's peak memory is measured once more in a process of its own. Weights are random: the time of a step doesn't depend
on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.analysis.columns import TRAINING
from benchmarks.harness.cli import Log, add_run_options, check_options, make_parser, names_of, run_command
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.measure import in_subprocess, interleaved
from benchmarks.harness.records import Record, Row, record
from benchmarks.harness.tables import table
from car_train.config import SIDES_256, CARConfig, VARConfig, VQVAEConfig
from car_train.model import Model, kernels
from car_train.model.car import ControlBranch, to_maps
from car_train.model.var import Attention
from car_train.model.vqvae import join_tokens
from car_train.training.optimizer import parameter_groups
from car_train.training.stages import LossModule, Stage, TransformerStage, VQVAEStage, add_branch, add_var, new_vqvae

PRESETS: dict[str, tuple[VQVAEConfig, VARConfig, CARConfig]] = {
    "d16": (
        VQVAEConfig(sides=SIDES_256),
        VARConfig(depth=2, width=1024, heads=16),
        CARConfig(),
    ),
    "demo": (
        VQVAEConfig(
            sides=(1, 2, 3, 4, 6, 8),
            vocab=1024,
            latent_channels=16,
            channels=24,
            multipliers=(1, 2, 4, 6),
            res_blocks=1,
        ),
        VARConfig(depth=6, width=192, heads=6, shared_aln=True, classes=27),
        CARConfig(encoder_widths=(16, 32, 64, 96), encoder_strides=(2, 2, 2)),
    ),
}
STAGES = ("vqvae", "var", "car")
TRANSFORMER_VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {"prefix": False, "cached": False, "kernels": False, "float32": True},
    "attention per scale only": {"cached": False, "kernels": False, "float32": True},
    "token cache only": {"prefix": False, "kernels": False, "float32": True},
    "kernels only": {"prefix": False, "cached": False, "float32": True},
    "bf16 throughout only": {"prefix": False, "cached": False, "kernels": False},
    "ours": {},
}
VARIANTS: dict[str, dict[str, dict[str, bool]]] = {
    "vqvae": {"plain": {"kernels": False}, "ours": {}},
    "var": TRANSFORMER_VARIANTS,
    "car": TRANSFORMER_VARIANTS,
}


def variants(stage: str, precision: str) -> dict[str, dict[str, bool]]:
    """Those of a stage that differ in this precision, by name: arguments of `make_step`."""
    chosen = VARIANTS[stage]
    if stage == "car" and precision == "bf16":
        return chosen
    return {name: how for name, how in chosen.items() if name != "bf16 throughout only"}


def masked(q_RNHd: Tensor, k_RNHd: Tensor, v_RNHd: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Block-causal attention as a masked [L, L] square: what `Attention` does without a cache, the plain way."""
    scale = torch.cat([torch.full((s * s,), k) for k, s in enumerate(sides)]).to(q_RNHd.device)
    mask = scale[:, None] >= scale[None, :]
    q, k, v = (t.transpose(1, 2) for t in (q_RNHd, k_RNHd, v_RNHd))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2).flatten(2)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Within, teacher forcing attends over the masked square."""
    with patch.object(Attention, "_teacher_forced", staticmethod(masked)):
        yield


def inject_one_by_one(
    self: ControlBranch,
    start_R1C: Tensor,
    inputs_RlZ: Tensor,
    embedding: nn.Linear,
    controls: Sequence[Tensor],
    sides: Sequence[int],
) -> Tensor:
    """`ControlBranch.inject_all` scale after scale, on embedded inputs."""
    maps = to_maps(torch.cat([start_R1C, embedding(inputs_RlZ)], 1), sides)
    pairs = zip(maps, controls, strict=True)
    return torch.cat([self.inject(m.permute(0, 2, 3, 1), self.features(control)) for m, control in pairs], 1)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Within, products and convolutions are PyTorch's, one by one."""
    with (
        patch.object(kernels, "_float32_on_cpu", lambda *_: False),
        patch.object(ControlBranch, "inject_all", inject_one_by_one),
    ):
        yield


@contextmanager
def float32_injection() -> Iterator[None]:
    """Within, control encoder and injection compute in float32, whatever autocast says."""
    ours = ControlBranch.inject_all

    def published(self: ControlBranch, *args: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return ours(self, *args)

    with patch.object(ControlBranch, "inject_all", published):
        yield


def make_stage(name: str, preset: str, depth: int | None) -> Stage:
    """A new model of the preset's sizes, `depth` blocks deep where it is given."""
    vqvae, var, car = PRESETS[preset]
    # Without stochastic depth, so that all variants find the same loss.
    var = dataclasses.replace(var, depth=depth or var.depth, width=var.C, heads=var.H, drop_path=0.0)
    torch.manual_seed(0)
    model: Model = new_vqvae(vqvae)
    if name == "vqvae":
        return VQVAEStage(model)
    model = add_var(model, var, tuple(str(i) for i in range(var.classes)))
    return TransformerStage(add_branch(model, car) if name == "car" else model)


def make_batch(stage: Stage, size: int) -> dict[str, Tensor]:
    """Images of noise with all that any stage wants to know of them."""
    config, generator = stage.model.config, torch.Generator().manual_seed(1)
    side = config.vqvae.image_size
    batch = {"image": torch.rand(size, 3, side, side, generator=generator) * 2 - 1, "label": torch.zeros(size).long()}
    batch["drop"] = torch.rand(size, generator=generator)
    if config.car is not None:
        batch["control"] = torch.randint(0, 256, (size, side, side, 3), generator=generator, dtype=torch.uint8)
    return batch


def make_step(
    stage: Stage,
    batch: dict[str, Tensor],
    precision: str,
    losses: list[float],
    *,
    prefix: bool = True,
    cached: bool = True,
    kernels: bool = True,
    float32: bool = False,
) -> Callable[[], None]:
    """One training step, which appends its loss to `losses`.

    prefix, cached, kernels: ours, or the plain way of each. float32: what the published code keeps in it. The stage
    must be in the layout that `kernels` asks for (`in_layout`).
    """
    batch = dict(batch)
    if stage.takes_tokens and cached:
        with torch.no_grad():
            batch["tokens"] = join_tokens(stage.model.vqvae.encode(batch.pop("image")))
    if "image" in batch and kernels:
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
    loss_module, vqvae = LossModule(stage), stage.model.vqvae
    optimizer = torch.optim.AdamW(parameter_groups(stage.trainable, 0.05), lr=1e-6, fused=True)
    wanted = [(prefix, plain_attention), (kernels, plain_kernels), (not float32, float32_injection)]

    def step() -> None:
        with ExitStack() as stack:
            for ours, plain in wanted:
                if not ours:
                    stack.enter_context(plain())
            now = batch
            if stage.takes_tokens and not cached:
                with torch.no_grad():
                    now = {**batch, "tokens": join_tokens(vqvae.encode(batch["image"]))}
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _ = loss_module(now)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    stage.trainable.train()
    return step


def in_layout(stage: Stage, kernels: bool) -> Stage:
    """The stage with its kernels in channels-last, or as they were made."""
    if kernels:
        stage.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return stage


def measure_memory(stage: str, preset: str, depth: int | None, batch: int, precision: str, variant: str) -> None:
    """Two steps of one variant, for `in_subprocess`."""
    how = VARIANTS[stage][variant]
    made = in_layout(make_stage(stage, preset, depth), how.get("kernels", True))
    step = make_step(made, make_batch(made, batch), precision, [], **how)
    step()
    step()


def measure(args: argparse.Namespace, log: Log) -> Record:
    """One row per stage and variant, as a record."""
    torch.set_num_threads(args.threads)
    rows = [row for stage in args.stages for row in stage_rows(args, stage, log)]
    vqvae, var, _ = PRESETS[args.preset]
    chosen = {name: getattr(args, name) for name in "preset depth stages batch precision threads warmup runs".split()}
    sizes = {"tokens": vqvae.tokens, "width": var.C, "pixels": vqvae.image_size}
    return record("training", {**chosen, **sizes}, rows)


def stage_rows(args: argparse.Namespace, stage: str, log: Log) -> list[Row]:
    """The variants of one stage, in turn."""
    # Equal weights in both layouts; variants of one layout share them, and a step hardly moves them.
    made = {ours: in_layout(make_stage(stage, args.preset, args.depth), ours) for ours in (False, True)}
    chosen = variants(stage, args.precision)
    losses: dict[str, list[float]] = {variant: [] for variant in chosen}
    steps = {}
    for variant, how in chosen.items():
        model = made[how.get("kernels", True)]
        steps[variant] = make_step(model, make_batch(model, args.batch), args.precision, losses[variant], **how)
    times = interleaved(steps, args.warmup, args.runs)
    check_losses({variant: found[0] for variant, found in losses.items()}, args.precision)
    rows = []
    for variant, t in times.items():
        memory = None
        if args.memory:
            settings = (stage, args.preset, args.depth, args.batch, args.precision, variant)
            memory = in_subprocess("benchmarks.training:measure_memory", *settings)["peak_rss"]
        rows.append(
            {
                "stage": stage,
                "variant": variant,
                "images_per_s": args.batch / t["p50"],
                "speedup": 1 / t["ratio"],
                "speedup_p10": 1 / t["ratio_p90"],
                "speedup_p90": 1 / t["ratio_p10"],
                "peak_rss": memory,
                "step_p50": t["p50"],
                "runs": t["runs"],
            }
        )
        log(f"{stage}, {variant}: {t['p50']:.2f} s a step")
    return rows


def check_losses(losses: dict[str, float], precision: str) -> None:
    """BenchmarkError if any variant's loss isn't the first one's."""
    first, tolerance = next(iter(losses.values())), 1e-2 if precision == "bf16" else 1e-3
    if not all(abs(loss / first - 1) < tolerance for loss in losses.values()):
        raise BenchmarkError(f"losses {losses} differ by more than {tolerance:g}; compare variants of one step only")


def tables(found: Record) -> Iterator[str]:
    yield "How long does a training step take?"
    yield table(found["results"], TRAINING)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("training", __doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="d16", help="sizes (default: d16)")
    parser.add_argument("--depth", type=int, help="blocks of the base (default: 2 of d16's 16; 6 of demo)")
    parser.add_argument("--stages", type=names_of(STAGES), default=STAGES, help="(default: vqvae,var,car)")
    parser.add_argument("--batch", type=int, default=1, help="images a step (default: 1)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(default: fp32)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the memory runs")
    add_run_options(parser, 5, 1)
    args = parser.parse_args(argv)
    check_options(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.training", parse_args(argv), measure, tables)


if __name__ == "__main__":
    sys.exit(main())
