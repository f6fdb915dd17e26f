"""The nodes of integrations/comfyui in ComfyUI: its loader, its executor, its server. `make test-comfyui` has it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

import car_runtime
from car_runtime.editing.edit import Edit
from car_runtime.photo import control_of_photo

ROOT = Path(__file__).parents[2]
NODES = ROOT / "integrations/comfyui"
COMFYUI = Path(sys.prefix) / "ComfyUI"
EXAMPLE = json.loads((NODES / "example.json").read_text(encoding="utf-8"))

pytestmark = pytest.mark.skipif(not COMFYUI.is_dir(), reason="ComfyUI is not here; make test-comfyui has it")


@dataclass(frozen=True)
class Server:
    """A running ComfyUI."""

    address: str
    base: Path
    said: list[str] = field(default_factory=list)
    """What was shown as text, each with its node before it."""

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", data)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def run(self, prompt: dict[str, Any], on_preview: Any = None) -> tuple[dict[str, Any], list[bytes]]:
        """What ComfyUI's history has of a workflow after it ran, and the previews that came on the way."""
        return asyncio.run(self._run(prompt, on_preview))

    async def _run(self, prompt: dict[str, Any], on_preview: Any) -> tuple[dict[str, Any], list[bytes]]:
        import aiohttp

        client, previews = uuid.uuid4().hex, []
        url = f"http://{self.address}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as messages:
            queued = self.ask("/prompt", {"prompt": prompt, "client_id": client})["prompt_id"]
            async for message in messages:
                if message.type is aiohttp.WSMsgType.BINARY and message.data[:4] == TEXT:
                    self.said.append(message.data[4:].decode(errors="replace"))
                elif message.type is aiohttp.WSMsgType.BINARY:
                    previews.append(message.data)
                    if on_preview is not None:
                        on_preview()
                elif json.loads(message.data)["type"] in ENDINGS:
                    break
        for _ in range(100):
            if history := self.ask(f"/history/{queued}"):
                return history[queued], previews
            time.sleep(0.1)
        raise AssertionError("the workflow ended and is not in the history")

    def saved(self, history: dict[str, Any], node: str) -> np.ndarray:
        """The images that a node saved, uint8 [n, H, W, 3]."""
        names = [image["filename"] for image in history["outputs"][node]["images"]]
        return np.stack([np.asarray(Image.open(self.base / "output" / name).convert("RGB")) for name in names])


TEXT = (3).to_bytes(4, "big")
"""What a message begins with that shows text on a node."""
ENDINGS = {"execution_success", "execution_error", "execution_interrupted"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ComfyUI with the nodes in its `custom_nodes`, as the documents say, and two images in its `input`."""
    base = tmp_path_factory.mktemp("comfyui")
    shutil.copytree(NODES, base / "custom_nodes/car", ignore=shutil.ignore_patterns("__pycache__"))
    (base / "input").mkdir()
    with Image.open(ROOT / "examples/umbrella.png") as grey:  # as RGB: ComfyUI reads grey a little differently
        grey.convert("RGB").save(base / "input/umbrella.png")
    Image.fromarray(photo_with_hole()).save(base / "input/hole.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--cpu", "--port", str(port), "--base-directory", str(base), "--disable-api-nodes"]
    arguments += ["--database-url", "sqlite:///:memory:"]
    starter = Path(__file__).with_name("comfyui_on_cpu.py")
    with (base / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, starter, COMFYUI, *arguments], stdout=log, stderr=subprocess.STDOUT
        )
        server = Server(f"127.0.0.1:{port}", base)
        try:
            deadline = time.monotonic() + 600
            while not is_up(server):
                ended = process.poll() is not None or time.monotonic() > deadline
                assert not ended, (base / "log").read_text()
                time.sleep(0.5)
            yield server
        finally:
            process.terminate()
            process.wait(30)


def is_up(server: Server) -> bool:
    try:
        server.ask("/system_stats")
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


def photo_with_hole() -> np.ndarray:
    """A photo as RGBA, transparent where ComfyUI's mask is to be, beyond its middle square: uint8 [96, 160, 4]."""
    with Image.open(ROOT / "examples/photos/mouse.png") as image:
        photo = image.convert("RGB").resize((160, 96))
    alpha = Image.new("L", photo.size, 255)
    ImageDraw.Draw(alpha).rectangle((100, 30, 135, 65), fill=0)
    photo.putalpha(alpha)
    return np.asarray(photo)


def changed(**inputs: dict[str, Any]) -> dict[str, Any]:
    """The example with other inputs of its nodes, by number: `changed(n4={"seed": 3})`."""
    return {
        number: node | {"inputs": node["inputs"] | inputs.get(f"n{number}", {})} for number, node in EXAMPLE.items()
    }


def test_the_loader_knows_the_nodes(server: Server) -> None:
    found = server.ask("/object_info")
    for node in ("CARPlan", "CARControl", "CARDraw", "CAREdit"):
        assert found[node]["python_module"] == "custom_nodes.car"
    assert found["CARDraw"]["output"] == ["IMAGE"]
    used = {(node["class_type"], name) for node in EXAMPLE.values() for name in node["inputs"]}
    known = {
        (node, name) for node, about in found.items() for kind in about["input"].values() for name in kind
    }  # fmt: skip
    assert used <= known


def test_the_example_draws_what_the_runtime_draws_and_edits_it_with_previews(server: Server) -> None:
    # Load Image gives an empty mask of 64×64 for an image without one; and who pastes a name pastes a space, too.
    history, previews = server.run(changed(n1={"backend": "ort-cpu", "plan": " "}, n7={"mask": ["2", 1]}))
    assert history["status"]["status_str"] == "success", history["status"]
    with car_runtime.open_plan(backend="ort-cpu") as plan:
        scales = len(plan.manifest.scales)
        drawn = plan.generate(ROOT / "examples/umbrella.png", "fluent-travel-places", 7, 4)
        edit = Edit(image=drawn.images[0], from_scale=3)
        edited = plan.generate(ROOT / "examples/umbrella.png", "noto-travel-places", 9, edit=edit)
    # ComfyUI saves what 255 × (v / 255) is cut off to, in float32.
    assert np.abs(server.saved(history, "5").astype(int) - drawn.images).max() <= 1
    assert edited.edited is not None
    assert np.abs(server.saved(history, "8").astype(int) - edited.edited[0]).max() <= 1
    assert len(previews) >= 2 * scales
    assert all(b"PNG" in one[:32] for one in previews)
    (shown,) = history["outputs"]["3"]["images"]
    assert shown["type"] == "temp"


def test_a_mask_is_drawn_anew_and_the_rest_of_the_photo_stays(server: Server) -> None:
    prompt = changed(n1={"backend": "ort-cpu"}, n2={"image": "hole.png"}, n3={"image_is": "photo"})
    prompt["7"]["inputs"] |= {"image": ["2", 0], "mask": ["2", 1], "keep_scales": 0}
    del prompt["4"], prompt["5"], prompt["6"]
    history, _ = server.run(prompt)
    assert history["status"]["status_str"] == "success", history["status"]
    (edited,) = server.saved(history, "8").astype(int)
    photo = photo_with_hole()[..., :3].astype(int)
    apart = np.abs(edited - photo).max(-1)
    far = np.ones_like(apart, bool)
    far[20:76, 90:146] = False
    assert apart[far].max() <= 1
    assert apart[30:66, 100:136].mean() > 10
    # The control is made of what the model sees of the photo, as car-run makes it, not of the photo's middle.
    rgba = photo_with_hole()
    edit = Edit(image=rgba[..., :3], mask=255 - rgba[..., 3])
    with car_runtime.open_plan(backend="ort-cpu") as plan:
        control, _ = control_of_photo(rgba[..., :3], plan.manifest, edit=edit)
        inputs = prompt["7"]["inputs"]
        drawn = plan.generate(control, inputs["class_name"], inputs["seed"], edit=edit)
    assert drawn.edited is not None
    assert np.abs(edited - drawn.edited[0]).max() <= 1


def test_two_controls_of_one_branch_are_refused_by_the_second(server: Server) -> None:
    prompt = changed()
    prompt["9"] = prompt["3"] | {"inputs": prompt["3"]["inputs"] | {"more": ["3", 0]}}
    prompt["4"]["inputs"]["control"] = ["9", 0]
    history, _ = server.run(prompt)
    (error,) = [content for kind, content in history["status"]["messages"] if kind == "execution_error"]
    assert error["node_id"] == "9"
    assert "the CAR Control nodes 3 and 9 are both for the branch 'canny'; name another" in error["exception_message"]


def test_a_warning_is_shown_on_its_node(server: Server) -> None:
    history, _ = server.run(changed(n2={"image": "hole.png"}, n3={"image_is": "map"}))
    assert history["status"]["status_str"] == "success", history["status"]
    shown = [text for text in server.said if "looks like a photo" in text or "is coloured" in text]
    assert any(text[4:].startswith("3the control") for text in shown), server.said


def test_a_plan_is_opened_again_when_its_files_change(server: Server, tmp_path: Path) -> None:
    """Also one whose name was pasted with a space: its drawing is of the plan that is there now."""
    shutil.copytree(car_runtime.default_plan(), tmp_path / "my.plan")
    prompt = changed(n1={"plan": f" {tmp_path / 'my.plan'} ", "backend": "ort-cpu"})
    del prompt["6"], prompt["7"], prompt["8"]
    cached = []
    for changed_at in (1, 2, 2):
        os.utime(tmp_path / "my.plan/manifest.json", (changed_at, changed_at))
        history, _ = server.run(prompt)
        assert history["status"]["status_str"] == "success", history["status"]
        (nodes,) = [content["nodes"] for kind, content in history["status"]["messages"] if kind == "execution_cached"]
        cached.append("1" in nodes)
    assert cached == [False, False, True]


def test_what_cannot_be_drawn_is_said_by_its_node(server: Server) -> None:
    history, _ = server.run(changed(n4={"class_name": "no such class"}))
    assert history["status"]["status_str"] == "error"
    (error,) = [content for kind, content in history["status"]["messages"] if kind == "execution_error"]
    assert error["node_type"] == "CARDraw"
    assert "no such class" in error["exception_message"]


def test_a_cancelled_drawing_ends_between_scales_and_the_plan_draws_on(server: Server) -> None:
    history, previews = server.run(
        changed(n4={"images": 64, "seed": 100}), on_preview=lambda: server.ask("/interrupt", {})
    )
    assert [kind for kind, _ in history["status"]["messages"]][-1] == "execution_interrupted"
    assert 1 <= len(previews) < 64
    history, _ = server.run(changed(n4={"seed": 3}))
    assert history["status"]["status_str"] == "success"
