"""The studio without a server with WebGPU, in a real browser, whose GPU is software and slow."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import car_runtime
from car_runtime.format.goldens import read_goldens
from fixtures.serving import SHIPPED
from fixtures.site import Site, write_shipped_site
from fixtures.studio import CHROMIUM, REQUIRED

pytestmark = pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="no chromium on this machine")
HARDWARE = "Object.defineProperty(GPUAdapterInfo.prototype, 'isFallbackAdapter', { get: () => false })"
"""The browser takes its GPU in software for a real one."""
SLOW_FIRST = """(() => {
  const data = Object.getOwnPropertyDescriptor(MessageEvent.prototype, 'data').get;
  let checks = 0;
  Object.defineProperty(MessageEvent.prototype, 'data', {
    get() {
      const made = data.call(this);
      if (made?.event?.seconds !== undefined) made.event.seconds = checks++ ? 1000 : made.event.seconds;
      return made;
    },
  });
})()"""
"""WebAssembly, which is checked after WebGPU, seems to take 1000 s."""
DRAW = """async (form) => {
  const { client } = await import('/studio/main.js');
  const tokens = [];
  for await (const event of client.stream({ ...form, previews: false })) tokens.push(...(event.tokens ?? []));
  return tokens;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser with WebGPU in software."""
    if not REQUIRED:
        pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--enable-unsafe-webgpu"])
        page = opened.new_page()
        page.goto("chrome://version")  # an address where WebGPU may be
        adapter = page.evaluate("async () => Boolean(await navigator.gpu?.requestAdapter())")
        page.close()
        if not adapter and not REQUIRED:
            pytest.skip("this browser has no WebGPU, not even in software")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def plan() -> Path:
    """A plan of depth 2 and three scales."""
    pytest.importorskip("torch", reason="PyTorch is not installed, which the plan is exported with")
    from fixtures.small_plans import small_plan

    return small_plan("steered")


@pytest.fixture(scope="module")
def folder(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("web") / "site"
    write_shipped_site(made, plan)
    return made


@pytest.fixture(scope="module")
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page of a site: its folder, the query of its address, scripts that come before the page's own."""
    opened: list[tuple[Any, Site]] = []

    def begin(folder: Path, query: str = "", *scripts: str) -> Any:
        site, context = Site(folder), browser.new_context()
        opened.append((context, site))
        for script in scripts:
            context.add_init_script(script)
        page = context.new_page()
        page.set_default_timeout(240_000)  # software compiles a hundred kernels
        page.goto(f"{site.url}/{query}")
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield begin
    for context, site in opened:
        context.close()
        site.close()


@pytest.fixture(scope="module")
def page(visit: Callable[..., Any], folder: Path) -> Any:
    """A page that draws with WebGPU, as it draws the goldens."""
    return visit(folder, "?engine=webgpu")


def engines(page: Any) -> list[Any]:
    """The workers that draw; each has threads of its own."""
    return [worker for worker in page.workers if worker.url.endswith("/worker.js")]


def alone(page: Any) -> bool:
    """Whether one worker draws, now or soon: the browser hears a little later of one that ends."""
    for _ in range(100):
        if len(engines(page)) == 1:
            return True
        page.wait_for_timeout(100)
    return False


def control_of(plan: Path, opened: car_runtime.Plan) -> tuple[Image.Image, str]:
    golden = read_goldens(plan, opened.manifest, "sketch")
    image = Image.fromarray(golden.control)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return image, base64.b64encode(stream.getvalue()).decode()


def test_webgpu_draws_what_python_draws(page: Any, plan: Path) -> None:
    assert page.inner_text("#plan").endswith("in this browser, WebGPU")
    with car_runtime.open_plan(plan, "ort-cpu", threads=1) as opened:
        image, data = control_of(plan, opened)
        for settings in ({"top_k": 1}, {"seed": 1}, {"seed": 2, "cfg": 2.5, "top_p": 0.9}):
            made = page.evaluate(DRAW, {"control": data, "class": "bee", **settings})
            wanted = opened.generate(image, label="bee", **settings).tokens[0]
            assert np.mean(np.array(made) == wanted) >= 0.99


def test_webassembly_goes_on_where_the_gpu_is_lost(page: Any) -> None:
    page.evaluate(
        """async () => {
          const { client } = await import('/studio/main.js');
          const events = client.stream({ n: 64 });
          await events.next();
          window.end = (async () => { for await (const event of events); })().catch(String);
        }"""
    )
    (worker,) = engines(page)
    worker.evaluate(
        """async () => {
          const ort = await import('/ort/ort.jspi.min.mjs');
          (await ort.env.webgpu.device).destroy();
        }"""
    )
    assert "WebGPU failed, and WebAssembly goes on; draw again" in page.evaluate("() => window.end")
    assert page.inner_text("#plan").endswith(", as WebGPU failed")
    assert page.evaluate(DRAW, {"seed": 1})


def test_goldens_that_webgpu_does_not_draw_leave_webassembly(
    visit: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    spoiled = tmp_path / "site"
    shutil.copytree(folder, spoiled)
    goldens = json.loads((spoiled / "plan/goldens.json").read_text())
    goldens[0]["tokens"][0] ^= 1
    about = json.loads((spoiled / "site.json").read_text())
    data = json.dumps(goldens).encode()
    (spoiled / "plan/goldens.json").write_bytes(data)
    about["files"]["plan/goldens.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (spoiled / "site.json").write_text(json.dumps(about))
    page = visit(spoiled, "?engine=webgpu")
    said = page.inner_text("#plan")
    assert "thread" in said
    assert said.endswith(", as WebGPU did not draw the plan's goldens")
    assert page.evaluate(DRAW, {"seed": 1})


def test_a_gpu_in_software_is_not_tried_unasked(visit: Callable[..., Any], folder: Path) -> None:
    page = visit(folder)
    page.evaluate(DRAW, {"seed": 1})
    page.wait_for_selector("#plan[title$='; the GPU is software']")
    assert "thread" in page.inner_text("#plan")
    assert alone(page)


@pytest.mark.slow
def test_webgpu_takes_over_after_the_first_image_where_it_is_faster(visit: Callable[..., Any], folder: Path) -> None:
    page = visit(folder, "", HARDWARE, SLOW_FIRST)
    assert "thread" in page.inner_text("#plan")
    before = page.evaluate(DRAW, {"seed": 1})
    page.wait_for_selector("#plan:has-text('WebGPU')")
    assert page.evaluate(DRAW, {"seed": 1}) == before
    assert alone(page)


@pytest.mark.slow
def test_webassembly_stays_where_it_is_faster(visit: Callable[..., Any], folder: Path) -> None:
    page = visit(folder, "", HARDWARE)
    page.evaluate(DRAW, {"seed": 1})
    page.wait_for_selector("#plan[title$='; WebGPU takes longer here']")
    assert alone(page)
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    page.evaluate(DRAW, {"seed": 1})
    page.wait_for_selector("#plan[title$='; WebGPU did not do here before']")


@pytest.mark.slow
@pytest.mark.skipif(not (SHIPPED / "manifest.json").is_file(), reason="this checkout has no plan")
def test_webgpu_draws_the_shipped_plans_goldens(visit: Callable[..., Any], tmp_path: Path) -> None:
    """Without control and of one branch: minutes each."""
    write_shipped_site(tmp_path / "site", SHIPPED, "--branches", "canny")
    page = visit(tmp_path / "site", "?engine=webgpu")
    assert page.inner_text("#plan").endswith("in this browser, WebGPU")
