"""How the cost of a picture grows with its size, the model's depth and the batch: on paper for a GPU, measured here.

    python -m benchmarks.growth                                  # counted and computed, nothing is run: minutes
    python -m benchmarks.growth --sizes 256 --depths 16,30 --batch 1
    python -m benchmarks.growth --measure -o results.jsonl       # and what fits on this machine, end to end

On paper: the plan's graphs of every size and depth are traced and counted (`benchmarks.counting`), and each stage
takes at least its operations or its bytes at an RTX 4090's rates, whichever is longer. So a floor is what no
implementation of these graphs can beat on that card, and nothing that was measured. Weights take no part: the graphs
are traced with empty ones. At a fixed width all counts are linear in the depth, so graphs of 2 and 4 blocks at full
width tell exactly of any even depth. Guidance is on; control image, class and decoder are counted in.

256×256 and 512×512 have the scales of VAR's published models (512×512 is published for another depth: 36). For
1024×1024 none is published: its scales are assumed to go on in the same way, with 14 of them. The tokenizer is the
published one at every size, so its convolutions grow with the pixels, and its attention with their square.

Beside them stand figures that others published for that card, as quoted: measured elsewhere, in other settings, some
without encoder and decoder. They say what order a floor has to be seen in, not who is faster.

Tables go to stdout, then one line of JSON (`benchmarks.harness.machine`) whose results are flat rows, each with
"question":

    size        image_size, sides, tokens, published (whether a model with these scales is): computed
    floor       image_size, depth, precision, batch, stage, gflop, weight_bytes, kv_bytes, io_bytes, compute_s,
                memory_s, floor_s, bound, card; one row a stage, then "image", their sum: computed. Of one batch
    memory      image_size, depth, precision, batch, parameters, weight_bytes (all of them), kv_bytes (the whole K/V
                cache), score_bytes (attention of the largest scale of one block; none where it is fused): computed
    quoted      method, card, image_size, precision, steps, seconds, source: as published
    measured    model, image_size, depth, backend, precision, batch, p50, p95, min, runs, images_per_s, gflop,
                limit_s, of_limit (as in `benchmarks.latency`), memory_bytes (peak beyond what the process had before
                the plan was opened); each in a process of its own

Times are seconds, per batch; null is what isn't known.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from benchmarks.counting import (
    RTX_4090,
    RTX_4090_FP32,
    Card,
    GraphCount,
    ImageCount,
    Stage,
    count_graph,
    count_image,
    extrapolate,
    parse_batches,
    roofline,
)
from benchmarks.harness import workload as subjects
from benchmarks.harness.cli import Log, run_command
from benchmarks.harness.machine import BenchmarkError, cores, in_subprocess, markdown_table, quantiles, record
from benchmarks.harness.workload import CACHE
from car_export import graphs
from car_export.plan import ExportOptions, PlanBuilder
from car_export.trace import optimise, specialise
from car_export.weights import INLINE, WeightStore, external
from car_runtime.backends.registry import check_name
from car_runtime.errors import BackendError
from car_train.config import SIDES_256, SIDES_512, ModelConfig
from car_train.model import Model

SIDES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
SIDES = {256: SIDES_256, 512: SIDES_512, 1024: SIDES_1024}
PUBLISHED = (256, 512)
DEPTHS = (16, 20, 24, 30)
TRACED = (2, 4)
"""Depths whose graphs are traced; even ones, because the branch has half as many blocks."""
CARDS = {"fp32": RTX_4090_FP32, "fp16": RTX_4090}
ON_THIS_MACHINE = {"d16": (1, 2, 4), "d16-512": (1,), "tiny": (1, 2)}
"""Batch sizes that are measured of each model: what fits into 16 GB."""

PAPER = "CAR, arXiv 2410.04671: its table of inference times"
STABLE_FAST = "README of github.com/chengzeyi/stable-fast at 04c680229274; batch 1, PyTorch 2.1.0+cu118, tcmalloc"
LOOP_ALONE = "20 steps at the reported iterations a second, text encoder and decoder not counted"
QUOTED: tuple[dict[str, Any], ...] = tuple(
    {
        "question": "quoted",
        "method": method,
        "card": "RTX 4090",
        "image_size": size,
        "precision": precision,
        "steps": steps,
        "seconds": seconds,
        "source": source,
    }
    for method, size, precision, steps, seconds, source in (
        ("CAR", None, None, None, 0.3, PAPER),
        ("ControlNet", None, None, None, 1.7, PAPER),
        ("T2I-Adapter", None, None, None, 2.3, PAPER),
        *(
            (f"SD 1.5 ControlNet, {how}", 512, "fp16", 20, 20 / rate, f"{rate} it/s; {LOOP_ALONE}; {STABLE_FAST}")
            for how, rate in (("eager PyTorch", 18.9), ("torch.compile", 22.7), ("stable-fast", 42.3))
        ),
    )
)

Row = dict[str, Any]


# ---- Graphs without weights ----


class EmptyStore(WeightStore):
    """A weights.bin with a place for every weight and nothing in it: a hole in the file, whatever their size."""

    def add(self, name: str, tensor: Tensor, transpose: bool = False) -> ir.ExternalTensor:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, transpose)
        if key not in self._known:
            self._keep.append(tensor)
            shape = tuple(reversed(tensor.shape)) if transpose else tuple(tensor.shape)
            dtype, length = torch.empty(0, dtype=tensor.dtype).numpy().dtype, tensor.numel() * tensor.element_size()
            self._known[key] = external(name, dtype, shape, self.offset, length, self.directory)
            self.offset += length
            self.file.truncate(self.offset)
            self.file.seek(self.offset)
        return self._known[key]


class Outline(PlanBuilder):
    """A plan's graphs for counting, of a model that is never computed with: its memory is reserved, not touched."""

    def __init__(self, config: ModelConfig, batches: tuple[int, ...], directory: Path, log: Log) -> None:
        options = ExportOptions(output=directory / "outline.plan", name="outline", batches=batches)
        super().__init__(empty_model(config), options, directory, log)
        self.store.close()
        self.store = EmptyStore(directory)
        self._constants()

    def control(self) -> GraphCount:
        if "control" not in self.graphs:
            self._control()
        return self._count("control", {})

    def condition(self, batch: int) -> GraphCount:
        if "condition" not in self.graphs:
            self._condition()
        return self._count("condition", {"R": 2 * batch})

    def steps(self, batch: int) -> list[GraphCount]:
        if "step" not in self.graphs:
            self._steps()
        return [self._count(f"step.{k:02d}.b{batch}", {}) for k in range(len(self.config.sides))]

    def decoder(self) -> GraphCount:
        """Of one picture, as it is run."""
        E, Z = self.config.latent_size, self.config.latent_channels
        if "decoder" not in self.graphs:
            inputs = {"f_hat": torch.zeros(3, Z, E, E)}
            model = self._trace(graphs.DecoderGraph(self.model), inputs, ["image"], {"f_hat": ("B",)})
            optimise(model)
            self._write("decoder", model)
        return self._count("decoder", {"B": 1})

    def _count(self, name: str, sizes: Mapping[str, int]) -> GraphCount:
        model = onnx.load(self.directory / self.graphs[name].file, load_external_data=False)
        if sizes:
            model = ir.to_proto(specialise(ir.from_proto(model), sizes, {}))
        return count_graph(model, name)


def empty_model(config: ModelConfig) -> Model:
    """A model whose large weights are untouched memory; small ones, which the exporter reads, differ all over."""
    with torch.device("meta"):
        model = Model(config)
    model = model.to_empty(device="cpu").requires_grad_(False).eval()
    model.vqvae.quantizer.reset_buffers()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.numel() < INLINE:
            p.uniform_(0.1, 0.9, generator=generator)
    return model


def with_blocks(config: ModelConfig, blocks: int) -> ModelConfig:
    """A model cut, or grown, to so many blocks; its width stays."""
    var = config.var
    assert var is not None
    return dataclasses.replace(config, var=dataclasses.replace(var, depth=blocks, width=var.C, heads=var.H))


def count_blocks(
    config: ModelConfig, batches: tuple[int, ...], known: Mapping[str, GraphCount], log: Log
) -> dict[int, ImageCount]:
    """Trace and count a model as it is, by batch size. `known`: "control" and "decoder", if they were counted before.

    The control graph knows no batch: a control image serves all pictures.
    """
    with tempfile.TemporaryDirectory() as folder:
        outline = Outline(config, batches, Path(folder), log)
        found = {}
        for batch in batches:
            steps = {f"scale_{k}": count for k, count in enumerate(outline.steps(batch))}
            counts = {
                "condition": outline.condition(batch),
                **steps,
                "decoder": known.get("decoder") or outline.decoder(),
            }
            if config.car is not None:
                counts = {"control": known.get("control") or outline.control(), **counts}
            runs = {"decoder": batch}
            stages = (Stage(name=name, count=count, runs=runs.get(name, 1)) for name, count in counts.items())
            found[batch] = ImageCount(batch=batch, stages=tuple(stages))
        outline.store.close()
    return found


def grow(few: ImageCount, more: ImageCount, depth: int) -> ImageCount:
    """What a model of `depth` counts, by those of the depths of `TRACED`."""
    low, high = TRACED
    if depth < low or (depth - low) % (high - low):
        raise BenchmarkError(f"depth is {depth}; give an even number from {low}")
    further = (depth - low) // (high - low)
    pairs = zip(few.stages, more.stages, strict=True)
    stages = (dataclasses.replace(a, count=extrapolate(a.count, b.count, further)) for a, b in pairs)
    return dataclasses.replace(few, stages=tuple(stages))


# ---- On paper ----


def floor_rows(counts: ImageCount, card: Card, **which: Any) -> list[Row]:
    """The least time of each stage on a card, and of the whole, with what it follows from."""
    floors = roofline(counts, card.flops_per_s, card.bytes_per_s, card.precision_bytes)
    costs = [stage_cost(stage, card.precision_bytes) for stage in counts.stages]
    costs.append({key: sum(cost[key] for cost in costs) for key in costs[0]})
    rows = []
    for floor, cost in zip(floors, costs, strict=True):
        rows.append({"question": "floor", **which, "batch": counts.batch, **cost, **floor, "card": card.name})
    return rows


def stage_cost(stage: Stage, precision_bytes: int) -> dict[str, float]:
    """What `roofline` divides by a card's rates."""
    c, runs = stage.count, stage.runs
    return {
        "gflop": runs * c.flops / 1e9,
        "weight_bytes": runs * c.weight_elements * precision_bytes,
        "kv_bytes": runs * (c.kv_read + c.kv_written) * precision_bytes,
        "io_bytes": runs * c.io_bytes,
    }


def memory_row(config: ModelConfig, precision_bytes: int, batch: int) -> dict[str, int]:
    """What a guided batch keeps in memory: weights, the K/V cache, one block's attention scores at the last scale."""
    var, vqvae = config.var, config.vqvae
    assert var is not None
    with torch.device("meta"):
        model = Model(config)
    assert model.car is not None
    rows, (start, stop) = 2 * batch, vqvae.ranges[-1]
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters,
        "weight_bytes": parameters * precision_bytes,
        "kv_bytes": 2 * model.car.layers * vqvae.tokens * rows * var.C * precision_bytes,
        "score_bytes": rows * var.H * (stop - start) * stop * precision_bytes,
    }


def on_paper(args: argparse.Namespace, log: Log) -> list[Row]:
    """All computed rows: sizes, floors and memory."""
    rows: list[Row] = []
    for size in args.sizes:
        sides, known = SIDES[size], dict[str, GraphCount]()
        rows.append(
            {
                "question": "size",
                "image_size": size,
                "sides": ",".join(map(str, sides)),
                "tokens": sum(s * s for s in sides),
                "published": size in PUBLISHED,
            }
        )
        for depth in args.depths:
            log(f"counting {size}×{size}, d{depth}")
            config = subjects.published(depth, sides)
            known.pop("control", None)  # it ends in the transformer's width; the decoder is the same for every depth
            traced = []
            for blocks in TRACED:
                traced.append(count_blocks(with_blocks(config, blocks), args.batch, known, lambda _: None))
                stages = {stage.name: stage.count for stage in traced[-1][args.batch[0]].stages}
                known |= {name: stages[name] for name in ("control", "decoder")}
            counts = {batch: grow(traced[0][batch], traced[1][batch], depth) for batch in args.batch}
            rows += depth_rows(config, counts, args.precisions, {"image_size": size, "depth": depth})
    return rows


def depth_rows(
    config: ModelConfig, counts: Mapping[int, ImageCount], precisions: Sequence[str], which: Mapping[str, int]
) -> list[Row]:
    """Floors and memory of one model, in every precision and batch size."""
    rows: list[Row] = []
    for precision in precisions:
        card, here = CARDS[precision], {**which, "precision": precision}
        for batch, count in counts.items():
            memory = memory_row(config, card.precision_bytes, batch)
            rows += [*floor_rows(count, card, **here), {"question": "memory", **here, "batch": batch, **memory}]
    return rows


# ---- Measured ----


def pictures(plan: str, backend: str, batch: int, threads: int, warmup: int, runs: int) -> Row:
    """Seconds of batches on a newly opened plan, and the type it multiplies in; for `in_subprocess`."""
    from benchmarks.latency import runtime_candidates
    from car_runtime.backends.registry import open_backend

    path = Path(plan)
    subject = subjects.Subject(plan=path, manifest=subjects.read(path), source=None)
    opened, _ = open_backend(backend, path, subject.manifest, threads)
    try:
        candidate = runtime_candidates(subject, backend, opened, (batch,))[0]
        for _ in range(warmup + runs):
            candidate()
    finally:
        opened.close()
    return {"precision": candidate.precision, "seconds": candidate.seconds[warmup:]}


def measured_rows(args: argparse.Namespace, log: Log) -> list[Row]:
    """One row per model, backend and batch size."""
    from benchmarks.latency import Limits

    rows: list[Row] = []
    for model in args.models:
        subject = subjects.made_up(model, None, "fp32", (1,), args.cache, log)
        facts = subject.manifest.model
        counts = {batch: count_image(subject.plan, batch) for batch in ON_THIS_MACHINE[model]}
        new: list[Row] = []
        for backend in args.backends:
            for batch, count in counts.items():
                log(f"measuring {model}, {backend}, {batch} at once: {args.warmup} + {args.runs} rounds")
                settings = (str(subject.plan), backend, batch, args.threads, args.warmup, args.runs)
                alone = in_subprocess("benchmarks.growth:pictures", *settings)
                t = quantiles(alone["result"]["seconds"])
                new.append(
                    {
                        "question": "measured",
                        "model": model,
                        "image_size": facts.image_size,
                        "depth": facts.depth,
                        "backend": backend,
                        "precision": alone["result"]["precision"],
                        "batch": batch,
                        **t,
                        "images_per_s": batch / t["p50"],
                        "gflop": count.total("flops") / 1e9,
                        "memory_bytes": alone["peak_rss"] - alone["rss_before"],
                    }
                )
        log("measuring the machine's limit")
        limits = Limits(args.threads, list(counts.values()), [row["precision"] for row in new], "cpu")
        for row in new:
            limit = limits.image(counts[row["batch"]], row["precision"])
            rows.append({**row, "limit_s": limit, "of_limit": limit / row["p50"]})
    return rows


# ---- The command ----


def measure(args: argparse.Namespace, log: Log) -> Row:
    """Everything as one record, measured if asked for. Raises BenchmarkError and the runtime's errors."""
    rows = [*on_paper(args, log), *QUOTED, *(measured_rows(args, log) if args.measure else [])]
    return record("growth", settings_of(args), rows)


def settings_of(args: argparse.Namespace) -> Row:
    cards = {precision: dataclasses.asdict(CARDS[precision]) for precision in args.precisions}
    measured = {name: getattr(args, name) for name in ("models", "backends", "threads", "warmup", "runs")}
    return {
        "sizes": list(args.sizes),
        "depths": list(args.depths),
        "batch": list(args.batch),
        "precisions": list(args.precisions),
        "cards": cards,
        "traced_depths": list(TRACED),
        "guided": True,
        "measure": args.measure,
        **(measured if args.measure else dict.fromkeys(measured)),
    }


def tables(found: Mapping[str, Any]) -> Iterator[str]:
    """A heading and a table per question."""
    rows = {q: [r for r in found["results"] if r["question"] == q] for q in ("size", "floor", "memory", "quoted")}
    yield "Which sizes? Scales from coarse to fine, in tokens per edge; 1024×1024 is assumed"
    yield markdown_table([{k: v for k, v in row.items() if k != "question"} for row in rows["size"]])
    yield "What could a picture cost at best on an RTX 4090? Computed from counts, not measured; times of a batch"
    yield markdown_table([picture_shown(row, rows["floor"]) for row in rows["floor"] if row["stage"] == "image"])
    yield "Which stages? Computed likewise"
    settings = found["settings"]
    which = {"depth": settings["depths"][0], "batch": settings["batch"][0], "precision": settings["precisions"][-1]}
    yield markdown_table([stage_shown(row) for row in rows["floor"] if which.items() <= row.items()])
    yield "What does a batch hold in memory? Computed; attention scores where nothing is fused"
    yield markdown_table([memory_shown(row) for row in rows["memory"]])
    yield "What have others published? Quoted, not measured here"
    yield markdown_table([{k: v for k, v in row.items() if k != "question"} for row in rows["quoted"]])
    measured = [row for row in found["results"] if row["question"] == "measured"]
    if measured:
        yield "What does a picture take on this machine? Control image in host memory → RGB, guided, measured"
        yield markdown_table([measured_shown(row) for row in measured])


def picture_shown(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Row:
    """A picture's floor, and the share of it that reading memory bounds."""
    key = ("image_size", "depth", "precision", "batch")
    stages = [r for r in rows if r["stage"] != "image" and all(r[k] == row[k] for k in key)]
    reading = sum(r["floor_s"] for r in stages if r["bound"] == "memory")
    return {
        "pixels": f"{row['image_size']}²",
        "model": f"d{row['depth']}",
        "precision": row["precision"],
        "batch": row["batch"],
        "TFLOP": row["gflop"] / 1e3,
        "weights read, GB": row["weight_bytes"] / 1e9,
        "K/V moved, GB": row["kv_bytes"] / 1e9,
        "at best, ms": 1e3 * row["floor_s"],
        "ms a picture": 1e3 * row["floor_s"] / row["batch"],
        "bound by memory": f"{reading / row['floor_s']:.0%}",
    }


def stage_shown(row: Mapping[str, Any]) -> Row:
    return {
        "pixels": f"{row['image_size']}²",
        "model": f"d{row['depth']}, {row['precision']}, batch {row['batch']}",
        "stage": row["stage"],
        "GFLOP": row["gflop"],
        "arithmetic, ms": 1e3 * row["compute_s"],
        "memory, ms": 1e3 * row["memory_s"],
        "at best, ms": 1e3 * row["floor_s"],
        "bound by": row["bound"],
    }


def memory_shown(row: Mapping[str, Any]) -> Row:
    return {
        "pixels": f"{row['image_size']}²",
        "model": f"d{row['depth']}",
        "precision": row["precision"],
        "batch": row["batch"],
        "parameters, M": row["parameters"] / 1e6,
        "weights, GB": row["weight_bytes"] / 1e9,
        "K/V, GB": row["kv_bytes"] / 1e9,
        "scores, GB": row["score_bytes"] / 1e9,
    }


def measured_shown(row: Mapping[str, Any]) -> Row:
    return {
        "model": row["model"],
        "pixels": f"{row['image_size']}²",
        "backend": row["backend"],
        "precision": row["precision"],
        "batch": row["batch"],
        "p50, s": row["p50"],
        "p95, s": row["p95"],
        "s a picture": 1 / row["images_per_s"],
        "TFLOP": row["gflop"] / 1e3,
        "of the limit": row["of_limit"],
        "memory, GB": row["memory_bytes"] / 1e9,
    }


def parse_choices(known: Sequence[Any], example: str) -> Callable[[str], tuple[Any, ...]]:
    """A list of different ones of the known, for argparse."""

    def parse(text: str) -> tuple[Any, ...]:
        by_text = {str(value): value for value in known}
        parts = text.split(",")
        if len(set(parts)) != len(parts) or not set(parts) <= by_text.keys():
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {', '.join(by_text)}; give e.g. {example}")
        return tuple(by_text[part] for part in parts)

    return parse


def parse_depths(text: str) -> tuple[int, ...]:
    """Even numbers, for argparse: a branch has half as many blocks."""
    found = parse_batches(text)
    odd = [depth for depth in found if depth % 2]
    if odd:
        raise argparse.ArgumentTypeError(
            f"depth {odd[0]} is odd, and a branch has half as many blocks; give e.g. 16,30"
        )
    return found


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sizes, precisions = parse_choices(list(SIDES), "256,512"), parse_choices(list(CARDS), "fp32,fp16")
    models = parse_choices(list(ON_THIS_MACHINE), "d16,d16-512")
    parser.add_argument("--sizes", type=sizes, default=tuple(SIDES), help="pixels (default: 256,512,1024)")
    parser.add_argument("--depths", type=parse_depths, default=DEPTHS, help="even ones (default: 16,20,24,30)")
    parser.add_argument("--batch", type=parse_batches, default=(1, 4), help="pictures at once (default: 1,4)")
    parser.add_argument("--precisions", type=precisions, default=tuple(CARDS), help="(default: fp32,fp16)")
    parser.add_argument("--measure", action="store_true", help="also measure --models on this machine")
    parser.add_argument("--models", type=models, default=("d16", "d16-512"), help="(default: d16,d16-512)")
    parser.add_argument("--backends", default="ort-cpu", help="e.g. ort-cpu,openvino (default: ort-cpu)")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help=f"where --models' plans are kept (default: {CACHE})"
    )
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads (default: all cores)")
    parser.add_argument("--runs", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (default: 1)")
    parser.add_argument("-o", "--output", type=Path, help="append the line of JSON to this file")
    args = parser.parse_args(argv)
    if args.runs < 1 or args.warmup < 0:
        parser.error(f"runs {args.runs}, warmup {args.warmup}: give at least 1 and 0")
    if not 1 <= args.threads <= 1024:
        parser.error(f"threads is {args.threads}; give 1…1024")
    args.backends = args.backends.split(",")
    try:
        for name in args.backends:
            check_name(name)
    except BackendError as error:
        parser.error(str(error))
    if "auto" in args.backends:
        parser.error("auto is no backend to compare; name them, e.g. --backends ort-cpu,openvino")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.growth", parse_args(argv), measure, tables)


if __name__ == "__main__":
    sys.exit(main())
