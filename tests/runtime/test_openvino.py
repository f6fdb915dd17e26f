"""The openvino backend on the plan that ships: float32 gives ort-cpu's images, bfloat16 nearly its tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from car_runtime import BackendError, Plan, RunError, open_plan
from car_runtime.backends.openvino.backend import ROWS, OpenVino, descending
from car_runtime.backends.openvino.graphs import multiply_matrices_as_stored, split_products, transpose_in_products
from car_runtime.format.manifest import Port, read_manifest
from fixtures.shipped import shipped_canny
from fixtures.small_plans import small_plan

pytest.importorskip("openvino", reason="OpenVINO is not installed (extra openvino)")
EXAMPLE = Path(__file__).parents[2] / "examples" / "guitar.png"


@pytest.fixture(scope="module")
def expected() -> Iterator[Plan]:
    with open_plan(backend="ort-cpu", threads=1) as plan:
        yield plan


def on_openvino(precision: str) -> Plan:
    root = shipped_canny()
    manifest = read_manifest(root)
    return Plan(root, manifest, OpenVino(root, manifest, 1, precision), "a test")


def test_float32_gives_the_images_of_ort_cpu(expected: Plan) -> None:
    wanted = expected.generate(EXAMPLE, 2, seed=1, n=3, top_k=0, top_p=0)
    with on_openvino("f32") as plan:
        got = plan.generate(EXAMPLE, 2, seed=1, n=3, top_k=0, top_p=0)
        unguided = plan.generate(EXAMPLE, 2, seed=1, cfg=0)
        kept = plan.generate(
            EXAMPLE, 2, seed=9, known_tokens=wanted.tokens[0], known_mask=np.ones(plan.manifest.tokens, bool)
        )
        encoded = plan.encode(wanted.images[0])
    # Sums in another order: a draw may fall on the other side of a border, and what comes after it differs too.
    same = (got.tokens == wanted.tokens).all(1)
    assert same.sum() >= 2
    assert np.abs(got.images[same].astype(int) - wanted.images[same]).max() <= 1
    assert (unguided.tokens == expected.generate(EXAMPLE, 2, seed=1, cfg=0).tokens).mean() > 0.9
    assert np.abs(kept.images[0].astype(int) - wanted.images[0]).max() <= 1
    assert (encoded == expected.encode(wanted.images[0])).mean() > 0.98


def test_bfloat16_picks_nearly_the_same_tokens(expected: Plan) -> None:
    """Scale by scale, the coarser ones given: so one token that differs does not count at all finer scales."""
    wanted = expected.generate(EXAMPLE, 2, top_k=1).tokens[0]
    agreeing = 0
    with on_openvino("bf16") as plan:
        for scale in plan.manifest.scales:
            coarser = np.arange(len(wanted)) < scale.start
            got = plan.generate(EXAMPLE, 2, top_k=1, known_tokens=wanted, known_mask=coarser).tokens[0]
            agreeing += int((got == wanted)[scale.start : scale.stop].sum())
        image = plan.generate(EXAMPLE, 2, known_tokens=wanted, known_mask=np.ones(len(wanted), bool)).images
    assert agreeing >= 0.9 * len(wanted)
    exact = expected.generate(EXAMPLE, 2, known_tokens=wanted, known_mask=np.ones(len(wanted), bool)).images
    assert np.abs(image.astype(int) - exact).mean() < 2


def test_an_output_that_is_not_asked_for_again_is_not_written_again() -> None:
    with on_openvino("f32") as plan:
        manifest, backend = plan.manifest, plan._backend
        rng = np.random.default_rng(0)
        scale, sizes = manifest.scales[1], {"B": 1, "R": 2, "S": 2, "P": 1, "T": 3, "S*S": 4, "m": 1}

        def shape(port: Port) -> tuple[int, ...]:
            return tuple(sizes[d] if isinstance(d, str) else d for d in port.shape)

        step = manifest.graphs["step"]
        inputs = {p.name: rng.random(shape(p)).astype(p.dtype) for p in step.inputs}
        inputs |= {"top_k": np.array([1]), **{name: plan._constants[1][name] for name in scale.constants}}
        outputs = {p.name: np.zeros(shape(p), p.dtype) for p in step.outputs}
        backend.run("step", inputs, outputs)
        assert outputs["logits"].any()
        outputs["logits"][:] = 7
        backend.run("step", inputs, {name: array for name, array in outputs.items() if name != "logits"})
        assert (outputs["logits"] == 7).all()


def test_the_step_is_cut_at_its_sort_and_reads_keys_row_by_row() -> None:
    """What the speed rests on: a plan of another form would be slower without being wrong."""
    import openvino

    with on_openvino("bf16") as plan:
        assert len(plan._backend._models["step"].parts) == 2
        assert plan._backend.cache_dtype == "bfloat16"
        attentions = plan.manifest.model.cache_layers
        model = openvino.Core().read_model(str(plan.path / "step.onnx"))

    def keys_by_row() -> int:
        products = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
        return sum(node.get_attributes()["transpose_b"] for node in products)

    before = keys_by_row()
    transpose_in_products(openvino, model)
    assert keys_by_row() - before == attentions


def kernels(plan: Plan, graph: str) -> Counter[str]:
    """What OpenVINO runs of a graph, by kind."""
    models = [make().model.get_runtime_model() for make in plan._backend._models[graph].parts]
    return Counter(node.get_rt_info()["layerType"].astype(str) for model in models for node in model.get_ops())


def test_lengths_and_norms_are_the_kernels_that_are_fast() -> None:
    with on_openvino("bf16") as plan:
        plan.generate(EXAMPLE, 2)
        step, decoder = kernels(plan, "step"), kernels(plan, "decoder")
        layers = plan.manifest.model.cache_layers
    assert step["RMS"] == 2 * layers  # of queries and of keys
    assert step["ReduceL2"] == 0
    assert (step["MVN"] > 0, decoder["MVN"]) == (True, 0), decoder


def test_matrices_are_read_as_the_plan_stores_them() -> None:
    """[outputs, inputs], which is packed from the mapped file; of a transposed copy two would be kept."""
    import openvino

    model = openvino.Core().read_model(str(small_plan("fp32") / "step.onnx"))

    def transposed() -> int:
        turned = [node for node in model.get_ordered_ops() if node.get_type_name() == "Transpose"]
        sources = [node.input(0).get_source_output().get_node() for node in turned]
        return [source.get_type_name() for source in sources].count("Constant")

    before = transposed()
    multiply_matrices_as_stored(openvino, model)
    assert before > 0
    assert transposed() == 0


def test_queries_keys_and_values_are_products_of_their_own() -> None:
    """Of the rows of one stored matrix, which are not copied."""
    import openvino

    plan = small_plan("fp32")
    attentions = read_manifest(plan).model.cache_layers
    model = openvino.Core().read_model(str(plan / "step.onnx"))
    multiply_matrices_as_stored(openvino, model)

    def products() -> list[tuple[list[int], int]]:
        """Shape and address of each constant matrix."""
        found = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
        matrices = [node.input(1).get_source_output().get_node() for node in found]
        constants = [node for node in matrices if node.get_type_name() == "Constant"]
        return [(list(node.get_output_shape(0)), node.data.ctypes.data) for node in constants]

    before = products()
    owners = split_products(openvino, model)
    wide = [product for product in before if product not in products()]
    assert len(owners) == len(wide) == attentions
    # What is kept is the matrix whose memory the three read, not one of the three.
    kept = [(list(owner.get_output_shape(0)), owner.data.ctypes.data) for owner in owners]
    assert sorted(kept) == sorted(wide)
    for (outputs, inputs), address in wide:
        assert outputs == 3 * inputs
        parts = [([inputs, inputs], address + 4 * i * inputs * inputs) for i in range(3)]
        assert all(part in products() for part in parts)


@pytest.mark.parametrize("tokens", [3, ROWS, 3 * ROWS + 1])
def test_sorting_is_descending_and_leaves_its_input_alone(tokens: int) -> None:
    values = np.random.default_rng(0).standard_normal((2, tokens, 50)).astype(np.float32)
    before = values.copy()
    with ThreadPoolExecutor(2) as pool:
        ranked = descending(values, pool)
    assert (np.diff(ranked) <= 0).all()
    assert (np.sort(values) == ranked[..., ::-1]).all()
    assert (values == before).all()


def test_several_threads_each_get_their_own_image() -> None:
    with on_openvino("f32") as plan:
        alone = [plan.generate(EXAMPLE, 2, seed=seed).tokens for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda seed: plan.generate(EXAMPLE, 2, seed=seed).tokens, range(4)))
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))


def test_it_opens_by_name_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = open_plan(backend="openvino", threads=1)
    report = plan._backend.report()
    assert plan.backend_name == "openvino"
    assert report["precision"] in ("bf16", "f32")
    assert report["engine"].startswith("openvino 20")
    plan.close()
    image = plan._backend.allocate((1, 128, 128, 3), "uint8")
    with pytest.raises(RunError, match="was closed"):
        plan._backend.run("decoder", {}, {"image": image})
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"pip install 'car-deploy\[openvino\]'"):
        open_plan(backend="openvino")


def test_a_half_precision_plan_is_refused_with_the_remedy() -> None:
    manifest = read_manifest(shipped_canny())
    half = replace(manifest, precision=replace(manifest.precision, compute="fp16", weights="fp16"))
    with pytest.raises(BackendError, match=r"computes in fp16, .*; export it with --precision fp32"):
        OpenVino(shipped_canny(), half, 1)


def test_a_wrong_buffer_is_an_error_of_the_engine() -> None:
    with on_openvino("f32") as plan:
        backend = plan._backend
        with pytest.raises(RunError, match="failed in the graph 'decoder'"):
            backend.run(
                "decoder",
                {"f_hat": backend.allocate((1, 3, 8, 8), "float32")},
                {"image": backend.allocate((1,), "uint8")},
            )


SIGNALLED = """
import os, signal, sys, threading
from car_runtime import doctor, open_plan
from car_runtime.backends.openvino.core import openvino_core

make = {"core": openvino_core, "plan": lambda: open_plan(backend="openvino", threads=1)}[sys.argv[1]]
caught = []
signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))

held = [make(), make()]
held.pop(0), held.pop(0)
assert doctor.examine()["works"]
os.kill(os.getpid(), signal.SIGINT)

held.append(make())
thread = threading.Thread(target=held.clear)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGINT)
print(len(caught))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal stacks")
@pytest.mark.parametrize("what", ["core", "plan"])
def test_a_signal_after_openvino_is_gone_does_not_end_the_process(what: str) -> None:
    """Closed first what was opened first, then one on another thread: no plugin leaves its signal stack behind."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED, what], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
