"""What the routes answer: images equal to `Plan.generate`'s, events, edits, OpenAI's client, errors, security."""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.serving import User, wave
from car_runtime import open_plan
from car_runtime.format.manifest import read_manifest
from fixtures.serving import ROOT, SHIPPED, body, image64, metric, pixels


def events(url: str, request: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """All events of a stream."""
    with httpx.stream(
        "POST", f"{url}/v1/pictures", json=request, headers={"Accept": "text/event-stream"}, timeout=60
    ) as answer:
        assert answer.status_code == 200
        return parse(answer.read().decode())


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))) for lines in blocks]


def draw(url: str, **changes: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/pictures", json=body(**changes), timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.fixture(scope="module")
def expected() -> Any:
    """The images of `body()` with seeds 5 and 6, by the runtime itself."""
    with open_plan(SHIPPED, threads=1) as plan:
        return plan.generate(ROOT / "examples/umbrella.png", "fluent-travel-places", 5, 2)


def test_an_image_is_the_one_that_generate_makes(url: str, expected: Any) -> None:
    answer = draw(url, n=2)
    assert [image["seed"] for image in answer["images"]] == [5, 6]
    for image, wanted in zip(answer["images"], expected.images, strict=True):
        assert np.array_equal(pixels(image["png"]), wanted)
    assert answer["state"] == "done"
    assert answer["images"][0]["receipt"]["class"] == {"index": 17, "name": "fluent-travel-places"}


def test_a_branch_has_a_weight_and_guidance_by_the_control(url: str) -> None:
    with open_plan(SHIPPED, threads=1) as plan:
        wanted = plan.generate(
            {"canny": (ROOT / "examples/umbrella.png", 0.4)}, "fluent-travel-places", 5, control_cfg=1.5
        )
    image = draw(url, control={"canny": [image64(), 0.4]}, control_cfg=1.5)["images"][0]
    assert np.array_equal(pixels(image["png"]), wanted.images[0])
    assert image["receipt"]["control_cfg"] == 1.5
    assert image["receipt"]["branches"] == {"canny": 0.4}
    assert "branches" not in draw(url, control={"canny": image64()})["images"][0]["receipt"]


def test_a_form_sends_the_file_of_a_branch_by_its_name(url: str) -> None:
    control = (ROOT / "examples/controls/hed.png").read_bytes()
    settings = {"class": "noto-animals-nature", "seed": "5"}
    answer = httpx.post(f"{url}/v1/pictures", data=settings, files={"control.hed": control}, timeout=60)
    assert answer.status_code == 200, answer.text
    wanted = draw(
        url, control={"hed": base64.b64encode(control).decode()}, **{"class": "noto-animals-nature", "seed": 5}
    )
    assert np.array_equal(pixels(answer.json()["images"][0]["png"]), pixels(wanted["images"][0]["png"]))
    both = {"control": control, "control.hed": control}
    refused = httpx.post(f"{url}/v1/pictures", data=settings, files=both, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_request")


def test_events_are_the_scales_in_order_and_then_the_image(url: str, expected: Any) -> None:
    got = events(url, body())
    assert [name for name, _ in got] == ["queued", *["scale"] * 7, "picture", "done"]
    scales = [data for name, data in got if name == "scale"]
    assert [scale["index"] for scale in scales] == list(range(7))
    assert [token for scale in scales for token in scale["tokens"]] == expected.tokens[0].tolist()
    previews = [Image.open(io.BytesIO(base64.b64decode(scale["preview"]))) for scale in scales]
    assert {(preview.format, preview.size) for preview in previews} == {("WEBP", (128, 128))}
    assert len({preview.tobytes() for preview in previews}) == 7
    assert np.array_equal(pixels(got[-2][1]["png"]), expected.images[0])


def test_a_png_carries_its_receipt_and_control(url: str) -> None:
    image = draw(url)["images"][0]
    text = Image.open(io.BytesIO(base64.b64decode(image["png"]))).text  # type: ignore[attr-defined]
    receipt = json.loads(text["receipt"])
    assert receipt == image["receipt"]
    again = draw(
        url,
        control=text["car-control"],
        seed=receipt["seed"],
        cfg=receipt["cfg"],
        top_k=receipt["top_k"],
        top_p=receipt["top_p"],
        **{"class": receipt["class"]["index"]},
    )
    assert np.array_equal(pixels(again["images"][0]["png"]), pixels(image["png"]))


def test_the_command_makes_an_image_of_the_server_again(url: str, tmp_path: Path) -> None:
    from car_runtime.cli.main import main

    served = tmp_path / "served.png"
    served.write_bytes(base64.b64decode(draw(url)["images"][0]["png"]))
    assert main(["again", str(served), "-o", str(tmp_path / "again.png"), "--threads", "1"]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(Image.open(served)))


def test_a_result_is_found_by_its_id_and_streams_again(url: str) -> None:
    answer = draw(url)
    found = httpx.get(f"{url}/v1/pictures/{answer['id']}").json()
    assert found["images"] == answer["images"]
    again = httpx.get(f"{url}/v1/pictures/{answer['id']}", headers={"Accept": "text/event-stream"})
    assert [name for name, _ in parse(again.text)][-2:] == ["picture", "done"]
    assert httpx.get(f"{url}/v1/pictures/nothing").status_code == 404


def test_a_branch_keeps_the_coarse_scales_and_draws_the_others(url: str) -> None:
    first = events(url, body())
    branch = events(url, body(seed=99, edit={"id": first[0][1]["id"], "scale": 2}))
    of = [[data["tokens"] for name, data in got if name == "scale"] for got in (first, branch)]
    assert of[0][:3] == of[1][:3]
    assert of[0][3:] != of[1][3:]


def test_in_painting_keeps_the_tokens_outside_the_mask(url: str) -> None:
    first = draw(url)
    mask = np.zeros((128, 128), np.uint8)
    mask[:64, :64] = 255
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "PNG")
    edit = {"id": first["id"], "mask": base64.b64encode(stream.getvalue()).decode()}
    second = draw(url, seed=77, edit=edit)
    before, after = (pixels(answer["images"][0]["png"]).astype(int) for answer in (first, second))
    assert np.abs(before - after)[:48, :48].mean() > 0
    assert np.abs(before - after)[96:, 96:].mean() < np.abs(before - after)[:64, :64].mean()
    nothing = httpx.post(
        f"{url}/v1/pictures", json=body(edit={"id": first["id"], "mask": image64("heart.png"), "scale": 1})
    )
    assert nothing.status_code == 400


@pytest.mark.parametrize("how", [{"scale": 1}, {"frame": [0.25, 0.25, 0.75, 0.75]}])
def test_an_edit_of_an_image_that_a_result_has_not_is_refused(url: str, how: dict[str, Any]) -> None:
    edit = {"id": draw(url)["id"], "index": 7, **how}
    answer = httpx.post(f"{url}/v1/pictures", json=body(edit=edit), timeout=60)
    assert answer.status_code == 400
    assert "edit.index is 7; the result has images 0…0" in answer.json()["error"]["message"]


def test_extending_puts_the_image_into_the_frame(url: str) -> None:
    first = draw(url)
    edit = {"image": first["images"][0]["png"], "frame": [0.25, 0.25, 0.75, 0.75]}
    assert draw(url, edit=edit)["state"] == "done"


def test_a_photo_becomes_the_control_that_the_command_makes(url: str) -> None:
    photo = next((ROOT / "examples/photos").glob("*.jpg"), None) or next((ROOT / "examples/photos").iterdir())
    answer = httpx.post(f"{url}/v1/controls", files={"photo": photo.read_bytes()})
    assert answer.status_code == 200, answer.text
    from car_runtime.photo import control_of_photo

    made, warnings = control_of_photo(photo, read_manifest(SHIPPED))
    assert np.array_equal(pixels(answer.json()["control"]), made)
    text = base64.b64encode(photo.read_bytes()).decode()
    named = httpx.post(f"{url}/v1/controls", json={"photo": {"canny": text}}).json()
    assert named == answer.json()
    by_photo = draw(url, control=None, photo={"canny": [text, 0.5]})
    by_map = draw(url, control={"canny": [named["control"], 0.5]})
    assert by_photo["images"][0]["png"][-200:] == by_map["images"][0]["png"][-200:]
    assert set(warnings) <= set(answer.json()["warnings"])


def test_an_inverted_map_is_noticed_and_mended(url: str) -> None:
    light = 255 - np.asarray(Image.open(ROOT / "examples/umbrella.png").convert("L"))
    stream = io.BytesIO()
    Image.fromarray(light).save(stream, "PNG")
    control = base64.b64encode(stream.getvalue()).decode()
    noticed = httpx.post(f"{url}/v1/controls", json={"control": control}).json()
    assert noticed["warnings"]
    assert not httpx.post(f"{url}/v1/controls", json={"control": control, "invert": True}).json()["warnings"]


def test_the_openai_client_generates_edits_and_streams(url: str, expected: Any) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [read_manifest(SHIPPED).name]
    control = (ROOT / "examples/umbrella.png").read_bytes()
    edited = client.images.edit(
        image=("umbrella.png", control), prompt="fluent-travel-places", n=2, extra_body={"seed": 5}
    )
    assert [
        np.array_equal(pixels(d.b64_json), wanted) for d, wanted in zip(edited.data, expected.images, strict=True)
    ]
    assert np.array_equal(pixels(edited.data[0].b64_json), expected.images[0])
    larger = client.images.generate(prompt="4", size="256x256", extra_body={"seed": 5, "control": image64()})
    assert pixels(larger.data[0].b64_json).shape == (256, 256, 3)
    assert client.images.generate(prompt="4").data[0].b64_json
    stream = client.images.generate(
        prompt="17", stream=True, partial_images=3, extra_body={"seed": 5, "control": image64()}
    )
    got = list(stream)
    assert [event.type for event in got] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in got[:3]] == [0, 1, 2]
    assert len({event.b64_json for event in got}) == 4
    assert np.array_equal(pixels(got[-1].b64_json), expected.images[0])
    with pytest.raises(openai.BadRequestError, match="no class"):
        client.images.generate(prompt="no such class")


def test_an_openai_mask_is_transparent_where_the_image_is_drawn_anew(url: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    image = base64.b64decode(draw(url)["images"][0]["png"])
    alpha = np.full((128, 128, 4), 255, np.uint8)
    alpha[:64, :64, 3] = 0
    stream = io.BytesIO()
    Image.fromarray(alpha).save(stream, "PNG")
    made = client.images.edit(
        image=("a.png", image), mask=("m.png", stream.getvalue()), prompt="8", extra_body={"seed": 9}
    )
    assert pixels(made.data[0].b64_json).shape == (128, 128, 3)


def white64(width: int, height: int) -> str:
    stream = io.BytesIO()
    Image.new("L", (width, height), 255).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"class": "no such class"}, 400, "bad_request"),
        ({"control": "!"}, 400, "bad_request"),
        ({"control": base64.b64encode(b"no image").decode()}, 400, "bad_request"),
        ({"n": 17}, 400, "bad_request"),
        ({"cfg": -1}, 400, "bad_request"),
        ({"colour": "red"}, 422, "bad_field"),
        ({"plan": "/etc/passwd"}, 404, "no_plan"),
        ({"control": {"canny": image64(), "lines": image64()}}, 400, "bad_request"),
        ({"control": {"canny": [image64(), 2.5]}}, 400, "bad_request"),
        ({"control": {"canny": [image64()]}}, 422, "bad_field"),
        ({"control_cfg": -1}, 400, "bad_request"),
        ({"control": None, "photo": {"lines": image64()}}, 400, "bad_request"),
        ({"edit": {"id": "gone", "scale": 1}}, 404, "not_found"),
        ({"edit": {"image": image64(), "scale": 9}}, 400, "bad_request"),
        ({"edit": {"image": white64(200_000, 8), "mask": image64()}}, 400, "bad_request"),
        ({"edit": {"image": white64(3000, 3000), "frame": [0, 0, 0.6, 0.6]}}, 400, "bad_request"),
        ({"class": "x" * 1_000_000}, 400, "bad_request"),
    ],
)
def test_what_cannot_be_used_is_named_with_a_remedy(
    url: str, changes: dict[str, Any], status: int, code: str
) -> None:
    answer = httpx.post(f"{url}/v1/pictures", json=body(**changes), timeout=30)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert error["what"]
    assert error["remedy"]
    assert len(error["message"]) <= 300
    assert str(ROOT) not in answer.text
    assert "--" not in answer.text  # a flag is no remedy here
    assert "input stream" not in answer.text


def test_a_body_or_an_image_too_large_is_refused_before_it_is_decoded(url: str) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/v1/pictures")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()
    assert connection.getresponse().status == 413  # on the header alone: nothing was sent
    stream = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(stream, "PNG")  # 112 kB as a file, 2.7 GB decoded
    began, large = time.perf_counter(), base64.b64encode(stream.getvalue()).decode()
    answer = httpx.post(f"{url}/v1/pictures", json=body(control=large))
    assert answer.status_code == 413
    assert time.perf_counter() - began < 1
    stream = io.BytesIO()
    Image.new("1", (5000, 5000)).save(stream, "PNG")  # an image's receipt is read before the image itself
    large = base64.b64encode(stream.getvalue()).decode()
    answer = httpx.post(f"{url}/v1/pictures", json=body(edit={"image": large, "scale": 1}))
    assert answer.status_code == 413


def test_of_many_controls_none_is_decoded_before_their_branches_are_known(url: str) -> None:
    """A megabyte of text can hold hundreds of images of 16 Mpixel."""
    stream = io.BytesIO()
    Image.new("1", (4000, 4000)).save(stream, "PNG")
    large = base64.b64encode(stream.getvalue()).decode()
    began = time.perf_counter()
    answer = httpx.post(f"{url}/v1/pictures", json=body(control={f"b{i}": large for i in range(300)}), timeout=60)
    assert answer.status_code == 400
    assert "there is no branch 'b0'" in answer.text
    assert time.perf_counter() - began < 5


def test_other_hosts_and_other_sites_are_refused(url: str) -> None:
    assert httpx.get(f"{url}/v1/capabilities", headers={"Host": "evil.example"}).status_code == 403
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://["):
        assert httpx.post(f"{url}/v1/pictures", json=body(), headers={"Origin": origin}).status_code == 403
    assert httpx.get(f"{url}/v1/capabilities", headers={"Origin": url}).status_code == 200


def test_every_answer_carries_the_policy(url: str) -> None:
    for path in ("/v1/capabilities", "/health/live", "/nothing"):
        headers = httpx.get(f"{url}{path}").headers
        assert "default-src 'self'; img-src 'self' blob: data:" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_metrics_count_what_was_drawn(url: str) -> None:
    draw(url)
    text = httpx.get(f"{url}/metrics").text
    for name in ("car_images_total", "car_queue_depth", "car_batch_images_bucket", "car_first_preview_seconds_sum"):
        assert name in text


def test_the_benchmarks_users_get_images_and_hear_of_errors(url: str) -> None:
    before = metric(url, "car_images_total")
    found = wave(url, image64(), users=3, seconds=0.3)
    assert found["failed"] == 0
    assert found["images"] == metric(url, "car_images_total") - before >= 3
    with User(url, "no base64!") as user:
        assert [user.ask(1), user.ask(2)] == [400, 400]


def test_capabilities_name_what_requests_take(url: str) -> None:
    found = httpx.get(f"{url}/v1/capabilities").json()
    plan = found["plans"][0]
    manifest = read_manifest(SHIPPED)
    assert (plan["name"], plan["image_size"]) == (manifest.name, manifest.model.image_size)
    assert plan["scales"] == [scale.side for scale in manifest.scales]
    assert [control["type"] for control in plan["controls"]] == list(manifest.model.branches)
    assert plan["controls"][0]["convention"]["polarity"] == "light-on-dark"
    assert draw(url, **{k: plan["defaults"][k] for k in ("cfg", "top_k", "top_p")})["state"] == "done"


def test_requests_made_of_the_openapi_document_never_break_the_server(url: str) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    document = httpx.get(f"{url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    checked = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=8,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def call(case: Any) -> None:
            answer = case.call(base_url=url, timeout=30)
            assert answer.status_code < 500 or answer.status_code == 503, (case.method, case.path, answer.text)

        call()
        checked += 1
    assert checked >= 8
