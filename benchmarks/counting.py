"""What an image costs by count: operations, weights, K/V and activations of a plan's own graphs. Nothing is run.

    python -m benchmarks.counting d16.plan            # per stage, by kind of node, and what a GPU could do at best
    python -m benchmarks.counting d16.plan --batch 1,4

An operation is a multiplication or an addition of a matrix product or convolution. All else is given in bytes: what a
node reads and writes if nothing is fused. Guidance is on. How it is counted: `benchmarks.analysis.counting`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.analysis.columns import ROOFLINE
from benchmarks.analysis.counting import FUSED, ImageCount, count_image
from benchmarks.analysis.limits import RTX_4090, roofline
from benchmarks.harness.cli import Log, guarded, make_parser, numbers
from benchmarks.harness.tables import markdown_table, table


def stage_rows(counts: ImageCount) -> list[dict[str, Any]]:
    """One row per stage and their sum: what one batch costs."""
    columns = {
        "GFLOP": lambda c: c.flops / 1e9,
        "weights, MB": lambda c: c.weight_bytes / 1e6,
        "K/V, MB": lambda c: c.kv_bytes / 1e6,
        "inputs and outputs, MB": lambda c: c.io_bytes / 1e6,
        "activations unfused, MB": lambda c: sum(c.activation_bytes.values()) / 1e6,
        "nodes": lambda c: c.nodes,
        "transposes": lambda c: c.ops.get("Transpose", 0),
        "fused nodes": lambda c: sum(c.ops.get(op, 0) for op in FUSED),
    }
    rows = [
        {"stage": s.name} | {name: value(s.count) * s.runs for name, value in columns.items()} for s in counts.stages
    ]
    return [*rows, {"stage": "image"} | {name: sum(row[name] for row in rows) for name in columns}]


def op_rows(counts: ImageCount) -> list[dict[str, Any]]:
    """One row per kind of node, most bytes first."""
    nodes, flops, moved = (counts.per_op(what) for what in ("ops", "flops_by_op", "activation_bytes"))
    return [
        {"node": op, "number": nodes[op], "GFLOP": flops[op] / 1e9, "activations unfused, MB": moved[op] / 1e6}
        for op in sorted(nodes, key=lambda op: -moved[op])
    ]


def product_rows(counts: ImageCount) -> list[dict[str, Any]]:
    """The matrix products of each stage, by size."""
    return [
        {"stage": s.name, "kind": p.kind, "batch": p.batch, "M": p.M, "N": p.N, "K": p.K}
        | {"count": p.count * s.runs, "GFLOP": p.flops * s.runs / 1e9}
        for s in counts.stages
        for p in s.count.gemms
    ]


def run(args: argparse.Namespace, log: Log) -> None:
    for batch in args.batch:
        counts = count_image(args.plan, batch)
        print(f"\n{args.plan.name}, batch {batch}, guided: counted, per batch\n")
        print(markdown_table(stage_rows(counts)))
        print("\nby kind of node\n")
        print(markdown_table(op_rows(counts)))
        if args.products:
            print("\nmatrix products\n")
            print(markdown_table(product_rows(counts)))
        print(f"\n{RTX_4090.name}: computed from the counts, not measured\n")
        print(table(roofline(counts), ROOFLINE))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("counting", __doc__)
    parser.add_argument("plan", type=Path, help="plan directory")
    parser.add_argument("--batch", type=numbers, default=(1,), help="batch sizes, e.g. 1,4 (default: 1)")
    parser.add_argument("--products", action="store_true", help="also every size of matrix product")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("benchmarks.counting", lambda log: run(args, log))


if __name__ == "__main__":
    sys.exit(main())
