"""What an image costs stays where it is: nodes, fused nodes, operations, weights and allocations, all counted.

Nothing is timed, so nothing here depends on the machine. A number that goes up is a loss of speed that no other test
sees; one that goes down is a gain to be kept. When a change is meant (or the shipped plan is another), renew the
numbers with

    PYTHONPATH=.:export:runtime:tests python tests/benchmarks/test_guard.py

and say in the commit why they changed.
"""

from __future__ import annotations

import pprint
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.analysis.counting import FUSED, count_image, stored_weights
from benchmarks.harness.workload import draw_control
from car_runtime.backends.onnxruntime.cpu import OrtCpu
from car_runtime.format.manifest import read_manifest
from car_runtime.plan import Plan, default_plan
from fixtures.counting_backend import Counting
from fixtures.toy_plan import toy

WATCHED = (*FUSED, "Transpose", "Concat", "Cast")

# Operations and bytes are those of one image with guidance, bytes in the type computed in (stored_bytes: in
# weights.bin); allocations are buffers, on ort-cpu; "transposes" are the last step's, per block.
SHIPPED: dict[str, Any] = {
    "allocations": {"first image": 56, "next seed": 0, "open": 0, "other class": 5, "other control": 8},
    "flops": 16672426496,
    "kv_bytes": 19464192,
    "nodes": {
        "branch": 181,
        "condition": 43,
        "control": 226,
        "decoder": 491,  # with the sums of its kernels, which engines fold as they open it
        "step": 481,
        "step.00.b1": 440,
        "step.06.b1": 453,
    },
    "stored_bytes": 42558328,
    "transposes": 4.833333333333333,
    "watched": {
        "decoder": {"Cast": 39, "Concat": 21, "InstanceNormalization": 24, "Softmax": 3, "Transpose": 7},
        "step.06.b1": {
            "Cast": 36,
            "Concat": 15,
            "CumSum": 2,
            "Gelu": 6,
            "LayerNormalization": 16,
            "Softmax": 8,
            "TopK": 1,
            "Transpose": 29,
        },
    },
    "weight_bytes": 150874096,
    "weight_bytes_of_a_step": 19066808,
}
# Nodes of the toy depend on the versions of torch and onnxscript that exported it, those of CI and `make test`.
TOY: dict[str, Any] = {
    "allocations": {"first image": 40, "next seed": 0, "open": 0, "other class": 5, "other control": 4},
    "flops": 6_465_088,
    "kv_bytes": 41_472,
    "nodes": {
        "branch": 68,
        "condition": 18,
        "control": 58,
        "decoder": 239,
        "step": 226,
        "step.00.b1": 192,
        "step.02.b1": 198,
    },
    "stored_bytes": 527_784,
    "transposes": 6.5,
    "watched": {
        "decoder": {"Cast": 1, "Concat": 7, "InstanceNormalization": 16, "Softmax": 3, "Transpose": 7},
        "step.02.b1": {
            "Cast": 1,
            "Concat": 5,
            "CumSum": 2,
            "Gelu": 2,
            "LayerNormalization": 6,
            "Softmax": 4,
            "TopK": 1,
            "Transpose": 13,
        },
    },
    "weight_bytes": 879_288,
    "weight_bytes_of_a_step": 212_752,
}
PLANS = {"shipped": SHIPPED, "toy": TOY}


def path_of(name: str) -> Path:
    return default_plan() if name == "shipped" else toy().plan


@cache
def allocations(plan: Path) -> dict[str, int]:
    """Buffers asked for by opening and by images one after the other."""
    manifest = read_manifest(plan)
    backend = Counting(OrtCpu(plan, manifest, 1))
    found: dict[str, int] = {}

    def since(name: str) -> None:
        found[name], backend.allocated = backend.allocated, 0

    control = draw_control(manifest.model.image_size)
    with Plan(plan, manifest, backend, "test") as opened:
        since("open")
        opened.generate(control, 0, seed=0)
        since("first image")
        opened.generate(control, 0, seed=1)
        since("next seed")
        opened.generate(control, 1, seed=1)
        since("other class")
        opened.generate(np.ascontiguousarray(control[::-1]), 0, seed=0)
        since("other control")
    return found


def _ops(graph: Path) -> Counter[str]:
    """Nodes of each kind, without what engines do once, when they open the graph: transposing stored matrices."""
    nodes, made = onnx.load(graph, load_external_data=False).graph, set[str]()
    made |= {tensor.name for tensor in nodes.initializer}
    made |= {name for node in nodes.node if node.op_type == "Cast" and node.input[0] in made for name in node.output}
    return Counter(node.op_type for node in nodes.node if node.op_type != "Transpose" or node.input[0] not in made)


def measured(plan: Path) -> dict[str, Any]:
    """All the numbers of a plan."""
    manifest, counts = read_manifest(plan), count_image(plan)
    ops = {name: _ops(plan / graph.file) for name, graph in manifest.graphs.items()}
    last, branch = f"step.{len(manifest.scales) - 1:02d}.b1", manifest.model.default_branch
    shown = ("control", "condition", "branch", "step", "step.00.b1", last, "decoder")
    step = next(stage.count for stage in counts.stages if stage.name == "scale_0")
    return {
        "nodes": {name: sum(ops[one].total() for one in (name, f"{name}.{branch}") if one in ops) for name in shown},
        "watched": {name: {op: ops[name][op] for op in WATCHED if ops[name][op]} for name in (last, "decoder")},
        "transposes": ops[last]["Transpose"] / manifest.model.depth,
        "flops": counts.total("flops"),
        "weight_bytes": counts.total("weight_bytes"),
        "weight_bytes_of_a_step": step.weight_bytes,
        "kv_bytes": counts.total("kv_bytes"),
        "stored_bytes": stored_weights(plan)[0],
        "allocations": allocations(plan),
    }


@pytest.mark.parametrize("name", list(PLANS))
def test_an_image_costs_what_it_cost_before(name: str) -> None:
    found = measured(path_of(name))
    changed = {key: (value, found[key]) for key, value in PLANS[name].items() if found[key] != value}
    assert not changed, (
        f"{name}, (before, now): {pprint.pformat(changed)}; renew them as this file says if it is meant"
    )
    assert found.keys() == PLANS[name].keys()


@pytest.mark.parametrize("name", list(PLANS))
def test_a_second_image_allocates_nothing(name: str) -> None:
    found, scales = allocations(path_of(name)), len(read_manifest(path_of(name)).scales)
    assert found["next seed"] == 0
    assert found["other class"] == 5  # the label, start tokens and modulation; of the branch the label and modulation
    assert found["other control"] == scales + 1  # a control image per scale, and the features


@pytest.mark.parametrize("name", list(PLANS))
def test_what_engines_fuse_is_one_node_each(name: str) -> None:
    manifest = read_manifest(path_of(name))
    branch, depth = str(manifest.model.default_branch), manifest.model.depth
    layers = depth + manifest.model.branches[branch].cache_layers
    ops: Counter[str] = Counter()
    for graph in ("step", f"branch.{branch}"):
        model = onnx.load(path_of(name) / manifest.graphs[graph].file, load_external_data=False)
        ops.update(node.op_type for node in model.graph.node)
    assert ops["Gelu"] == layers
    assert ops["LayerNormalization"] == 2 * layers + 1 + depth // 2  # two a block, the head's, one a fusion
    assert ops["Softmax"] == layers + 2  # attention, and two when a token is drawn
    assert ops["TopK"] == 1
    assert ops["Conv"] == 2  # at the branch's entry, and φ


if __name__ == "__main__":
    for shown in PLANS:
        print(f"{shown.upper()}: dict[str, Any] = {pprint.pformat(measured(path_of(shown)), width=110)}")
