"""Plans that are opened when they are asked for, and closed for others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")

from car_runtime import GenerationConfig, open_plan
from car_runtime.format.manifest import read_manifest
from car_runtime.request import resolve
from car_serve.capabilities import capabilities
from car_serve.errors import ServeError
from car_serve.forms import PictureForm
from car_serve.jobs import Job, Results, ScaleEvent
from car_serve.service import Service
from fixtures.serving import ROOT, SHIPPED, image64


def copied(folder: Path, name: str) -> Path:
    """The shipped plan under another name."""
    shutil.copytree(SHIPPED, folder / f"{name}.plan")
    file = folder / f"{name}.plan/manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name": name}))
    return folder / f"{name}.plan"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Any]:
    """Two plans, of which one at a time is open."""
    paths = {name: copied(tmp_path, name) for name in ("first", "second")}
    service = Service([], shelf={name: read_manifest(path) for name, path in paths.items()})
    lock = Lock()

    def opener(name: str) -> None:
        with lock:
            if name not in service.batchers:
                for other in list(service.batchers.values()):
                    service.remove(other)
                service.add(open_plan(paths[name], threads=1))

    service.opener = opener
    yield service
    service.close()


def drawn(service: Service, plan: str | None, seed: int) -> Job:
    """A job that has ended."""
    form = {"plan": plan, "control": image64(), "class": 8, "seed": seed}
    job = service.submit(PictureForm.model_validate(form))
    while not job.finished:
        pass
    return job


def test_plans_take_turns_and_their_requests_are_finished_first(service: Service) -> None:
    assert [plan["backend"] for plan in capabilities(service)["plans"]] == [None, None]
    first = drawn(service, None, 3)
    assert list(service.batchers) == ["first"]
    with ThreadPoolExecutor(4) as users:
        jobs = list(users.map(lambda i: drawn(service, ("first", "second")[i % 2], 3), range(8)))
    assert {job.state for job in jobs} == {"done"}
    assert all(np.array_equal(job.images[0], first.images[0]) for job in jobs)
    assert len(service.batchers) == 1
    assert first.plan.manifest.name == "first"


def test_results_are_kept_up_to_a_number_and_a_size_and_for_a_time() -> None:
    with open_plan(SHIPPED, threads=1) as plan:
        config = GenerationConfig(control=ROOT / "examples/heart.png", label=3)
        request, image = resolve(plan.manifest, config), np.zeros((64, 64, 3), np.uint8)

        def kept(results: Results, many: int, *, end: bool = True) -> list[bool]:
            """Which of so many jobs, one after the other, are found at the end."""
            jobs = [Job(request=request, plan=plan) for _ in range(many)]
            for job in jobs:
                results.add(job)
                job.drew(ScaleEvent(image=0, index=5, last=True, pixels=image, seconds=0.0))
                if end or job is not jobs[0]:
                    job.end("done")
            return [job.id in results._jobs for job in jobs]

        assert kept(Results(3, 60, 1 << 30), 5) == [False, False, True, True, True]
        assert kept(Results(99, 60, 2 * image.nbytes), 5) == [False, False, True, True, True]
        assert kept(Results(99, 60, 2 * image.nbytes), 5, end=False) == [True, False, False, True, True]
        assert kept(Results(99, -1, 1 << 30), 5) == [False, False, False, False, True]


def test_a_request_that_names_no_plan_gets_the_preferred_one(service: Service) -> None:
    service.preferred = lambda: "second"
    assert service.batcher(None).name == "second"
    with pytest.raises(ServeError, match="no plan 'third'; choose first, second"):
        service.batcher("third")
