"""A budget of keys and values: what is kept is what was attended to, and what isn't is as if it were masked."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.analysis.kv_budget import (
    WAYS,
    BudgetCache,
    attention_received,
    changed,
    choose,
    draw,
    kept_share,
    make_request,
)
from benchmarks.attention import attention
from benchmarks.kv import main
from car_train.model.sample import Recording, sample
from car_train.model.var import Attention, KVCache
from car_train.model.vqvae import split_tokens
from car_train.sampling import Sampling
from fixtures.small import SIDES, small_model
from fixtures.small_plans import small_plan

PLAIN = Sampling(cfg=0.0, top_k=0, top_p=0.0)


def test_the_most_attended_places_of_each_scale_are_kept() -> None:
    received = torch.zeros(2, 39)
    received[0, [1, 4, 20, 30]] = 1.0
    received[1, 2] = 1.0
    kept = choose(received, SIDES, 0.1)
    assert kept.sum(1).tolist() == [1 + 1 + 1 + 3] * 2  # ⌈0.1·n⌉ of 1, 4, 9 and 25
    assert kept[:, 0].all()
    assert kept[0, [1, 20, 30]].all()  # 1 and 4 are of one scale: the first of equals
    assert kept[1, 2]
    assert choose(received, SIDES, 1.0).all()
    assert kept_share(kept, SIDES, "all") == pytest.approx(6 / 39)
    assert kept_share(kept, SIDES, "past") == pytest.approx((3 + 25) / 39)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_left_out_is_as_if_it_were_masked(way: str) -> None:
    torch.manual_seed(0)
    layer = Attention(48, 3)
    for parameter in layer.parameters():
        parameter.data.normal_()
    kept = torch.rand(1, 5) < 0.5
    kept[0, [0, 1]] = torch.tensor([True, False])
    cache, whole = (
        BudgetCache(kept, way, 1, 5, 2, 3, 16, like=layer.qkv_weight),
        KVCache(1, 5, 2, 3, 16, torch.ones(1)),
    )
    first, x = torch.randn(1, 2, 48), torch.randn(4, 2, 48)
    for one in (cache, whole):
        layer(first, one, 0, ())
        one.advance(1)
    found = layer(x, cache, 0, ())
    q, k, v = F.linear(x, layer.qkv_weight).split(48, -1)
    q, k = layer.scaled(q, k, (4, 2, 3, 16), torch.float32)
    keys, values = whole.append(0, k, (v + layer.v_bias).view(4, 2, 3, 16))
    mask = kept[0].clone()
    if way == "past":
        mask[1:] = True
    by_torch = F.scaled_dot_product_attention(
        *(t.permute(1, 2, 0, 3) for t in (q, keys, values)), mask[None], scale=1.0
    )
    torch.testing.assert_close(found, layer.proj(by_torch.permute(2, 0, 1, 3).flatten(2)), rtol=1e-4, atol=1e-4)


def test_attention_is_counted_as_teacher_forcing_has_it() -> None:
    model = small_model(control=False)
    assert model.car is not None
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    tokens = torch.cat([grid.flatten(1) for grid in model.vqvae.encode(x)], 1)
    weights = attention(model, pixels, 2)  # of the last scale's 25 tokens
    everywhere, uniforms = torch.ones_like(tokens, dtype=torch.bool), torch.zeros(1, 39)
    with torch.no_grad(), attention_received(model) as (later, own):
        sample(
            model.vqvae, model.car, torch.tensor([2]), uniforms, cfg=0.0, known_BL=tokens, known_mask_BL=everywhere
        )
    for layer, weights_NL in enumerate(weights):
        np.testing.assert_allclose(own[layer, -25:], weights_NL.sum(0)[-25:], rtol=1e-3)
        assert not later[layer, -25:].any()
        assert (later + own)[layer].sum() == pytest.approx(39, rel=1e-5)  # every query gives 1
    np.testing.assert_allclose(own[:, 0], 1, rtol=1e-6)


def test_given_tokens_are_those_of_a_single_step() -> None:
    model = small_model(control=False)
    assert model.car is not None
    request = make_request(model, 0, 4, [], Sampling(cfg=2.0, top_k=20, top_p=0.9))
    greedy, sampled = draw(model, request)
    assert torch.equal(draw(model, request, given_BL=greedy)[0], greedy)
    assert torch.equal(draw(model, request, given_BL=sampled)[1], sampled)
    # By hand: the logits of a pass over whole images, without guidance.
    plain = make_request(model, 0, 4, [], PLAIN)
    tokens = draw(model, plain)[1]
    logits = model.car(plain.labels, model.vqvae.quantizer.decode(split_tokens(tokens, SIDES))[1])
    assert torch.equal(draw(model, plain, given_BL=tokens)[0], logits.argmax(-1))


def test_a_whole_budget_changes_nothing_and_a_small_one_does() -> None:
    model = small_model(control=False)
    request = make_request(model, 0, 6, [], PLAIN)
    rows = changed(model, make_request(model, 100, 4, [], PLAIN), request, (1.0, 0.1))
    names = [f"{kind}, {how}" for kind in ("greedy", "sampled") for how in ("given", "drawn")]
    for row in rows:
        if row["budget"] == 1.0:
            assert [row[name] for name in names] == [0.0] * 4
            assert row["bytes"] == 1.0
        else:
            assert all(0 < row[name] <= 1 for name in names)
    record = Recording()
    cache = partial(BudgetCache, choose(torch.rand(3, 39), SIDES, 0.5), "all")
    assert model.car is not None
    sample(model.vqvae, model.car, request.labels, request.uniforms, cfg=0.0, record=record, make_cache=cache)
    assert isinstance(record.cache, BudgetCache)


def test_the_command_measures_a_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = [str(small_plan("fp16")), "--images", "2", "--budget"]
    assert main([*command, "1"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(row["left out of"], row["sampled, drawn"]) for row in rows] == [("past", 0.0), ("all", 0.0)]
    (tmp_path / "x.png").write_text("no image")
    assert main([*command, "1", "--control", str(tmp_path / "x.png")]) == 2
    assert "give others with --control" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "1.5"])
