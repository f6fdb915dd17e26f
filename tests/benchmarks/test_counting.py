"""What is counted in a plan's graphs is what the model does, found by other means."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.analysis.counting import Gemm, ImageCount, count_graph, count_image, stored_weights
from benchmarks.analysis.limits import Card, roofline
from benchmarks.baselines.reference_loop import sample_published
from benchmarks.counting import main
from benchmarks.harness.errors import BenchmarkError
from car_export.graphs import DecoderGraph
from car_runtime.format.manifest import WEIGHTS, Manifest, read_manifest
from car_runtime.plan import default_plan
from car_train.model import Model
from car_train.model.sample import sample
from fixtures.golden import Golden
from fixtures.small import small_model
from fixtures.toy_plan import toy


def step_flops(manifest: Manifest, k: int, batch: int, ratio: int, phis: int) -> int:
    """Operations of one scale by the papers' formulas, guided: 2B rows, half the base's depth in the branch."""
    m, scale, R = manifest.model, manifest.scales[k], 2 * batch
    C, Z, E, n, T = m.width, m.latent_channels, m.latent_size, scale.tokens, scale.next_side
    half = m.depth // 2
    block = R * n * (4 * C * C + 2 * ratio * C * C) + 2 * R * n * scale.stop * C
    branch = half * R * n * 2 * C * C + R * n * 9 * C * C  # fusions, and the 3×3 convolution at its entry
    resize = batch * Z * (E * n + E * scale.side * E) + batch * Z * (T * E * E + T * E * T)
    phi = batch * E * E * 9 * Z * phis * Z
    return 2 * ((m.depth + half) * block + branch + R * n * C * m.vocab + resize + phi + batch * T * T * Z * C)


def by_name(counts: ImageCount) -> dict[str, int]:
    return {stage.name: stage.count.flops * stage.runs for stage in counts.stages}


@pytest.mark.parametrize("batch", [1, 3])  # 3 has no static steps: they are made
def test_operations_of_the_steps_follow_from_the_model_alone(batch: int) -> None:
    counts = by_name(count_image(toy().plan, batch))
    for k in range(3):
        assert counts[f"scale_{k}"] == step_flops(toy().manifest, k, batch, ratio=4, phis=3)


def test_operations_of_the_shipped_plan_follow_from_its_manifest() -> None:
    counts = count_image(default_plan())
    manifest = read_manifest(default_plan())
    for k in range(len(manifest.scales)):
        assert by_name(counts)[f"scale_{k}"] == step_flops(manifest, k, 1, ratio=4, phis=4)


def test_operations_of_the_other_graphs_are_those_that_pytorch_counts() -> None:
    model, counts = toy().reference(), by_name(count_image(toy().plan))
    assert model.car is not None
    branch = model.car.branch
    assert branch is not None
    config = model.config.vqvae
    with torch.no_grad(), FlopCounterMode(display=False) as control:
        for side in config.sides:
            branch.features(torch.zeros(1, 3, side * config.patch, side * config.patch))
    with torch.no_grad(), FlopCounterMode(display=False) as decoder:
        latent = torch.zeros(1, config.latent_channels, config.latent_size, config.latent_size)
        DecoderGraph(model)(latent)
    with torch.no_grad(), FlopCounterMode(display=False) as published:
        model.vqvae.decode_latent(latent)
    with torch.no_grad(), FlopCounterMode(display=False) as condition:
        model.car.modulations(torch.tensor([0, 5]))
    assert counts["control"] == control.get_total_flops()
    assert counts["decoder"] == decoder.get_total_flops() < published.get_total_flops()
    assert counts["condition"] == condition.get_total_flops()


def test_every_byte_of_the_weights_belongs_to_a_graph() -> None:
    for plan in (toy().plan, default_plan()):
        covered, file = stored_weights(plan)
        # The rest fills up to the next cache line or page: at most 63 bytes a small tensor, 4095 a large one.
        assert 0.99 * file <= covered <= file
        assert file == (plan / WEIGHTS).stat().st_size


def test_weights_of_a_step_are_the_transformer_without_adaln() -> None:
    model, counts = toy().reference(), count_image(toy().plan)
    assert model.car is not None
    facts, scale = toy().manifest.model, toy().manifest.scales[2]
    step = next(stage.count for stage in counts.stages if stage.name == "scale_2")
    elsewhere = ("ada_", "class_embedding", "branch.encoder", "pos_", "level_")
    parts = {**dict(model.car.named_parameters()), **dict(model.vqvae.quantizer.named_parameters())}
    expected = [p.numel() for name, p in parts.items() if not any(word in name for word in elsewhere)]
    expected.remove(facts.vocab * facts.latent_channels)  # of the codebook the drawn rows alone are read
    positions = scale.tokens * facts.width  # of the scale, read by the base and by the branch
    expected += [scale.tokens * facts.latent_channels, positions, positions]
    large = sorted(n for n in step.weights.values() if n >= 100)
    assert large == sorted(n for n in expected if n >= 100)
    assert sum(large) > 0.9 * step.weight_elements
    assert step.weight_bytes == 4 * step.weight_elements
    assert step.kv_read == 2 * 3 * scale.start * 2 * facts.width  # k and v, layers, tokens before, rows
    assert step.kv_written == 2 * 3 * scale.tokens * 2 * facts.width
    assert step.kv_bytes == 4 * (step.kv_read + step.kv_written)


def small_graph() -> onnx.ModelProto:
    """y = softmax(x·w + b) with w stored in half and cast; c = conv(z)."""
    h = onnx.helper
    f32, f16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    tensors = [
        onnx.numpy_helper.from_array(np.ones((5, 7), np.float16), "w16"),
        onnx.numpy_helper.from_array(np.ones(7, np.float32), "b"),
        onnx.numpy_helper.from_array(np.ones((6, 2, 3, 3), np.float32), "kernel"),
        onnx.numpy_helper.from_array(np.ones((100, 8), np.float32), "table"),
    ]
    nodes = [
        h.make_node("Cast", ["w16"], ["w"], to=f32),
        h.make_node("MatMul", ["x", "w"], ["xw"]),
        h.make_node("Add", ["xw", "b"], ["xwb"]),
        h.make_node("Softmax", ["xwb"], ["y"]),
        h.make_node("MatMul", ["q", "k"], ["scores"]),
        h.make_node("Conv", ["z", "kernel"], ["c"], group=2, pads=[1, 1, 1, 1], strides=[2, 2]),
        h.make_node("Gather", ["table", "index"], ["rows"]),
    ]
    inputs = [("x", f32, [2, 3, 5]), ("q", f16, [4, 9, 6]), ("k", f16, [4, 6, 11]), ("z", f32, [1, 4, 8, 8])]
    outputs = [("y", f32, [2, 3, 7]), ("scores", f16, [4, 9, 11]), ("c", f32, [1, 6, 4, 4]), ("rows", f32, [3, 8])]
    values = [[h.make_tensor_value_info(*v) for v in side] for side in (inputs, outputs)]
    values[0].append(h.make_tensor_value_info("index", onnx.TensorProto.INT64, [3]))
    return h.make_model(h.make_graph(nodes, "small", *values, tensors), opset_imports=[h.make_opsetid("", 20)])


def test_a_graph_whose_numbers_one_can_work_out_by_hand() -> None:
    found = count_graph(small_graph(), "small")
    assert set(found.gemms) == {
        Gemm("weight", 1, 6, 7, 5),
        Gemm("activation", 4, 9, 11, 6),
        Gemm("conv", 2, 16, 3, 18),
    }
    assert found.flops_by_op == {"MatMul": 2 * 6 * 7 * 5 + 2 * 4 * 9 * 11 * 6, "Conv": 2 * 2 * 16 * 3 * 18}
    assert found.weights == {"w": 35, "b": 7, "kernel": 108, "table": 24}
    assert found.weight_bytes == 4 * (35 + 7 + 108 + 24)  # as computed with, not as stored
    assert found.ops == {"Cast": 1, "MatMul": 2, "Add": 1, "Softmax": 1, "Conv": 1, "Gather": 1}
    assert found.activation_bytes["Softmax"] == found.activation_bytes["Add"] == 2 * 4 * 42
    assert found.activation_bytes["Gather"] == 2 * 4 * 24
    assert "Cast" not in found.activation_bytes  # of a weight
    assert found.io_bytes == 4 * (30 + 256 + 42 + 96 + 24) + 2 * (216 + 264 + 396) + 8 * 3


def test_the_roofline_takes_the_larger_of_arithmetic_and_memory_of_each_stage() -> None:
    counts = count_image(toy().plan)
    rows = roofline(counts, Card(name="a card", flops_per_s=1e9, bytes_per_s=4e8, precision_bytes=2))
    assert [row["stage"] for row in rows] == [
        "control", "condition", "scale_0", "scale_1", "scale_2", "decoder", "image",
    ]  # fmt: skip
    for row, stage in zip(rows, counts.stages, strict=False):
        c = stage.count
        memory = (2 * (c.weight_elements + c.kv_read + c.kv_written) + c.io_bytes) / 4e8
        assert row["floor_s"] == pytest.approx(max(c.flops / 1e9, memory))
        assert row["bound"] == ("compute" if c.flops / 1e9 > memory else "memory")
    assert rows[-1]["floor_s"] == pytest.approx(sum(float(r["floor_s"]) for r in rows[:-1]))
    assert {r["bound"] for r in rows[:-1]} == {"compute", "memory"}


def test_the_command_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(toy().plan), "--products"]) == 0
    out = capsys.readouterr().out
    for word in ("scale_2", "LayerNormalization", "| at best ", "computed from the counts, not measured"):
        assert word in out


def test_what_is_no_plan_is_refused_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no.plan")]) == 2
    assert "; " in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match="batch is 0; give"):
        count_image(toy().plan, 0)
    with pytest.raises(SystemExit):
        main([str(toy().plan), "--batch", "1,1"])
    assert "give e.g. 1,4" in capsys.readouterr().err


def test_a_graph_whose_shapes_are_not_known_is_refused() -> None:
    model = small_graph()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "B"
    with pytest.raises(BenchmarkError, match="export the plan again"):
        count_graph(model, "small")


def published_tokens(model: Model, control: bool, **settings: float) -> None:
    config, noise = model.config.vqvae, torch.Generator().manual_seed(3)
    label, uniforms = torch.tensor([1, 0]), torch.rand(2, config.tokens, generator=noise)
    sizes = [s * config.patch for s in config.sides]
    controls = [torch.rand(2, 3, s, s, generator=noise) * 2 - 1 for s in sizes] if control else None
    assert model.car is not None
    ours, pixels = sample(model.vqvae, model.car, label, uniforms, controls, **settings)  # type: ignore[arg-type]
    stages: list[str] = []
    theirs, drawn = sample_published(
        model, label, uniforms, controls, clock=lambda name, _: stages.append(name), **settings  # type: ignore[arg-type]
    )  # fmt: skip
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(pixels, drawn, rtol=0, atol=1e-5)
    parts = ["control", "scale"] if control else ["scale"]
    assert [name.partition("_")[0] for name in stages] == parts * len(config.sides) + ["decoder"]


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("settings", [{"cfg": 4.0}, {"cfg": 1.5, "top_k": 9, "top_p": 0.9}])
def test_the_published_loop_draws_our_tokens(control: bool, settings: dict[str, float]) -> None:
    published_tokens(small_model(control), control, **settings)


def test_the_published_loop_draws_our_tokens_with_adaln_in_every_block(tiny: Golden, models: object) -> None:
    published_tokens(models(tiny), True, cfg=4.0)  # type: ignore[operator]


def test_the_published_loop_under_autocast_gives_an_image_close_by() -> None:
    model = small_model()
    config, noise = model.config.vqvae, torch.Generator().manual_seed(3)
    uniforms = torch.rand(1, config.tokens, generator=noise)
    controls = [torch.zeros(1, 3, s * config.patch, s * config.patch) for s in config.sides]
    full, _ = sample_published(model, torch.tensor([1]), uniforms, controls)
    tokens, pixels = sample_published(model, torch.tensor([1]), uniforms, controls, dtype=torch.bfloat16)
    assert pixels.isfinite().all()
    assert (tokens == full).float().mean() > 0.5  # chance is 1/48; a token that differs changes all that follow


def test_a_branch_that_was_never_published_is_refused() -> None:
    config = small_model().config
    assert config.car is not None
    other = dataclasses.replace(config, car=dataclasses.replace(config.car, fusion="zero"))
    with pytest.raises(BenchmarkError, match=r"zero.*--no-reference"):
        sample_published(Model(other), torch.tensor([0]), torch.zeros(1, 39))
    with pytest.raises(BenchmarkError, match="give one with a transformer"):
        sample_published(
            Model(dataclasses.replace(config, var=None, car=None)), torch.tensor([0]), torch.zeros(1, 39)
        )


def test_counts_are_numbers_that_json_has() -> None:
    counts = count_image(toy().plan)
    json.dumps({s.name: [s.count.flops, s.count.weight_bytes, s.count.ops, s.count.weights] for s in counts.stages})
