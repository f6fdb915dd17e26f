"""Plans on a hub: a small one on this machine, asked by the real client in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from car_runtime import PlanError, RequestError, default_plan
from car_runtime import card as card_module
from car_runtime import hub as hub_module
from car_runtime.cli.main import main
from car_runtime.format.manifest import MANIFEST, MANIFEST_BYTES, WEIGHTS, read_manifest
from car_runtime.format.signature import SIGNATURE, SIGNATURE_BYTES
from car_runtime.hub import CARD_FILES, HubName, located, parse_name
from fixtures.hub_server import Hub, answering, running_hub
from fixtures.runtime_plan import SIZE, build_plan, relist
from fixtures.shipped import copy_canny

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[2]
REPO = "someone/tiny"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' plan, its weights long enough for a large file."""
    root = build_plan(tmp_path_factory.mktemp("plan") / "tiny.plan")
    with (root / WEIGHTS).open("ab") as file:
        file.write(bytes(300_000))
    relist(root, read_manifest(root), WEIGHTS)
    return root


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as running:
        yield running


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Any:
    """Python with an empty home folder and that hub."""

    def run(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))},
                "HOME": str(tmp_path / "home"),
                "PYTHONPATH": str(ROOT / "runtime"),
                "HF_ENDPOINT": hub.url,
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_TOKEN": "hf_of_the_tests",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        return done

    return run


@pytest.fixture
def car_run(client: Any, tmp_path: Path) -> Any:
    """`car-run` there, and a control image."""
    edges = np.zeros((SIZE, SIZE, 3), np.uint8)
    edges[8:24, 8:24] = 255
    Image.fromarray(edges).save(tmp_path / "edges.png")
    return lambda *arguments, **more: client("-m", "car_runtime", *arguments, **more)


@pytest.fixture(params=["refuses", "has no address", "is silent", "has failed", "is another server"])
def dead(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Addresses at which no hub answers, and what is said of them."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        here = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if request.param == "refuses":
            yield here, r"can't be reached \(.*refused.*\)"
        elif request.param == "has no address":
            yield "http://no-such-host.invalid", r"can't be reached \(.+\)"
        elif request.param == "is silent":
            listening.listen()
            yield here, r"can't be reached \((no answer in 2 s|.*timed out.*)\)"
        else:
            status = {"has failed": 503, "is another server": 200}[request.param]
            with answering(status) as url:
                yield url, "the hub answers with HTTP 503" if status == 503 else f"what answers at {url} is no hub"


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


DRAW = ("--control", "edges.png", "--class", "cat", "--backend", "ort-cpu", "--threads", "1", "--no-receipt")


def test_a_plan_on_the_hub_draws_what_it_draws_as_a_directory(
    hub: Hub, tiny: Path, car_run: Any, tmp_path: Path
) -> None:
    commit = hub.commit(REPO, {**files_of(tiny), "junk.bin": b"x" * 200_000, "README.md": b"card"})
    done = car_run("-e", f"hf:{REPO}", *DRAW, "-o", "of-hub.png")
    assert f"hf:{REPO} is at commit {commit}; hf:{REPO}@{commit} is always this one" in done.stderr
    car_run("-e", str(tiny), *DRAW, "-o", "of-folder.png")
    assert (tmp_path / "of-hub.png").read_bytes() == (tmp_path / "of-folder.png").read_bytes()
    assert not [name for name in hub.asked if "junk" in name], "only what the manifest lists is fetched"
    hub.asked.clear()
    pinned = car_run("-e", f"hf:{REPO}@{commit}", *DRAW, "-o", "again.png", HF_HUB_OFFLINE="1")
    assert not hub.asked, "offline nothing is asked for"
    assert commit in pinned.stderr
    car_run("plan", "info", f"hf:{REPO}")
    assert not [name for name in hub.asked if name.startswith("GET")], "nothing is fetched twice"
    kept = list((tmp_path / "home/.cache/car/hub").glob("*.plan"))
    assert [path.name.split("-")[0] for path in kept] == ["someone"]
    assert files_of(kept[0]) == files_of(tiny)


def test_python_opens_it_by_its_name(hub: Hub, tiny: Path, client: Any, tmp_path: Path) -> None:
    hub.commit(REPO, files_of(tiny), branch="v1")
    code = (
        "from car_runtime import CARPipeline, open_plan\n"
        f"with open_plan('hf:{REPO}@v1', 'ort-cpu', threads=1) as plan: print(plan.manifest.name)\n"
        f"with CARPipeline.from_pretrained('{REPO}', revision='v1', threads=1) as pipe: print(pipe.plan.path)\n"
    )
    done = client("-c", code, HF_HOME=str(tmp_path / "elsewhere"))
    name, path = done.stdout.splitlines()
    assert name == "tiny"
    assert Path(path).is_relative_to(tmp_path / "home/.cache/car/hub")


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, tiny: Path, car_run: Any, tmp_path: Path) -> None:
    """The client writes 10 MiB at a time; what was written is not asked for again."""
    long = tmp_path / "long.plan"
    shutil.copytree(tiny, long)
    with (long / WEIGHTS).open("ab") as file:
        file.write(bytes(25_000_000))
    relist(long, read_manifest(long), WEIGHTS)
    hub.commit(REPO, files_of(long))
    hub.cut_after = 12_000_000
    car_run("plan", "pull", f"hf:{REPO}")
    assert hub.ranges == [f"bytes={10 * 2**20}-"]


def test_pull_and_push_are_each_others_reverse(hub: Hub, tiny: Path, car_run: Any, tmp_path: Path) -> None:
    source = tmp_path / "mine.plan"
    shutil.copytree(tiny, source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    (source / "notes.txt").write_text("of no plan")
    name = car_run("plan", "push", "mine.plan", f"hf:{REPO}").stdout.strip()
    assert re.fullmatch(rf"hf:{REPO}@[0-9a-f]{{40}}", name)
    assert hub.asked["upload"] == 1, "the weights are a large file"
    assert hub.commits[REPO][name.split("@")[1]] == {
        **files_of(tiny),
        "README.md": (source / "README.md").read_bytes(),
    }
    pulled = car_run("plan", "pull", name, "-o", "theirs.plan", "--json")
    assert json.loads(pulled.stdout) == {"paths": ["theirs.plan"]}
    assert files_of(tmp_path / "theirs.plan") == files_of(tiny)
    assert not [
        path
        for path in (tmp_path / "theirs.plan").rglob("*")
        if path.is_symlink() or (path.stat().st_nlink > 1 and path.is_file())
    ]
    again = car_run("plan", "push", "mine.plan", f"hf:{REPO}").stdout.strip()
    assert again == name
    assert hub.asked["upload"] == 1, "what the hub has is not sent again"


def test_push_sends_weights_by_xet_where_the_client_has_it(
    hub: Hub, tiny: Path, car_run: Any, tmp_path: Path
) -> None:
    """hf-xet comes with the client. It writes into a folder here, and what it wrote is read from there."""
    hf_xet = pytest.importorskip("hf_xet")
    hub.xet = tmp_path / "store"
    hub.xet.mkdir()
    done = car_run("plan", "push", str(tiny), f"hf:{REPO}", HF_HUB_DISABLE_XET="0")
    assert done.stderr == f"car-run: sending 7 files of tiny to hf:{REPO}\n", "bars are for terminals"
    name = done.stdout.strip()
    weights = (tiny / WEIGHTS).read_bytes()
    said = b"sha256 " + hashlib.sha256(weights).hexdigest().encode()
    assert hub.commits[REPO][name.split("@")[1]] == {**files_of(tiny), WEIGHTS: said}
    assert hub.asked["upload"] == 0
    stored = hf_xet.hash_files([str(tiny / WEIGHTS)])[0]
    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{hub.xet}") as group:
        group.start_download_file(hf_xet.XetFileInfo(stored.hash, stored.file_size), str(tmp_path / "read"))
    assert (tmp_path / "read").read_bytes() == weights


@pytest.mark.parametrize("branch", ["v2", "main"])
def test_push_makes_the_branch_that_it_names(hub: Hub, tiny: Path, car_run: Any, branch: str) -> None:
    hub.commit(REPO, {"README.md": b"first"})
    name = car_run("plan", "push", str(tiny), f"hf:{REPO}@{branch}").stdout.strip()
    assert hub.branches[REPO][branch] == name.split("@")[1]
    assert set(hub.branches[REPO]) == {"main", branch}


def test_a_push_to_where_no_hub_answers_ends_at_once(
    tiny: Path, hub: Hub, car_run: Any, dead: tuple[str, str]
) -> None:
    address, reason = dead
    done = car_run("plan", "push", str(tiny), f"hf:{REPO}", code=2, HF_ENDPOINT=address, HF_HUB_ETAG_TIMEOUT="2")
    first, error = done.stderr.splitlines()
    assert first == f"car-run: sending 7 files of tiny to hf:{REPO}"
    remedy = "push again later" if "HTTP 503" in reason else "check the connection, and HF_ENDPOINT if it is set"
    assert re.fullmatch(rf"car-run: error: the hub does not take hf:{REPO} \(.+\); {remedy}.*", error)


@pytest.mark.parametrize(
    ("refused", "xet", "remedy"),
    [
        (403, "1", "check the name, and log in with hf auth login and a token that may write"),
        (None, "0", "push again, which goes on where it stopped, or with HF_HUB_DISABLE_XET=1, by HTTP"),
    ],
)
def test_a_push_that_fails_says_that_the_repository_it_made_is_empty(
    hub: Hub, tiny: Path, car_run: Any, refused: int | None, xet: str, remedy: str
) -> None:
    """The hub takes no commit, or the client would send by Xet, which this hub hasn't."""
    hub.refused = refused
    for left in (", and the repository that was made for it is empty", ""):
        done = car_run("plan", "push", str(tiny), f"hf:{REPO}", code=2, HF_HUB_DISABLE_XET=xet)
        error = done.stderr.splitlines()[-1]
        assert error.startswith(f"car-run: error: the hub does not take hf:{REPO} (")
        assert error.endswith(f"){left}; {remedy}")


def test_a_private_push_sends_nothing_to_a_public_repository(hub: Hub, tiny: Path, car_run: Any) -> None:
    car_run("plan", "push", str(tiny), f"hf:{REPO}", "--private")
    assert hub.private == {REPO}
    car_run("plan", "push", str(tiny), f"hf:{REPO}", "--private")  # it is private

    hub.private.clear()
    asked = dict(hub.asked)
    done = car_run("plan", "push", str(tiny), f"hf:{REPO}", "--private", code=2)
    assert f"error: hf:{REPO} is there already and public, so nothing was sent" in done.stderr
    assert hub.asked == asked


def test_a_push_leaves_an_organizations_repositories_private(hub: Hub, tiny: Path, car_run: Any) -> None:
    hub.visibility = "private"
    car_run("plan", "push", str(tiny), f"hf:{REPO}")
    assert hub.private == {REPO}


def test_a_damaged_plan_is_not_pushed(hub: Hub, tiny: Path, car_run: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "bad.plan")
    with (tmp_path / "bad.plan" / WEIGHTS).open("r+b") as file:
        file.write(b"\xff")
    done = car_run("plan", "push", "bad.plan", f"hf:{REPO}", code=2)
    assert f"{WEIGHTS} was changed after the export" in done.stderr
    assert not hub.asked


@pytest.mark.parametrize("name", [*CARD_FILES, SIGNATURE, WEIGHTS])
def test_no_link_in_a_plan_sends_another_file(
    tiny: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = tmp_path / "theirs.plan"
    shutil.copytree(tiny, theirs)
    (theirs / name).unlink(missing_ok=True)
    (theirs / name).symlink_to(tiny / WEIGHTS)
    assert main(["plan", "push", str(theirs), f"hf:{REPO}"]) == 2
    assert re.search(f"{name} (in .* )?is a link", capsys.readouterr().err)


def test_what_is_not_on_the_hub_is_said_in_one_line(hub: Hub, tiny: Path, client: Any) -> None:
    hub.commit(REPO, files_of(tiny))
    hub.commit("someone/other", {"weights.bin": b"x"})
    names = [f"hf:{REPO}@no-such", f"hf:{REPO}@0a1b2c3", "hf:no/such", "hf:someone/other"]
    code = (
        "from car_runtime import PlanError, open_plan\n"
        f"for name in {names}:\n"
        "    try: open_plan(name)\n"
        "    except PlanError as error: print(error)\n"
    )
    assert client("-c", code).stdout.splitlines() == [
        f"hf:{REPO}@no-such: there is no such branch, tag or commit; check what follows the @",
        f"hf:{REPO}@0a1b2c3: there is no such branch, tag or commit; write all 40 digits of a commit",
        "the hub has no no/such, or it is private; check the name, or hf auth login",
        "hf:someone/other is no plan: it has no manifest.json; give the repository of a plan",
    ]


@pytest.mark.parametrize("name", ["hf:someone", "hf:a/b@c d", "hf:../..", "hf:a/b/c", "hf:", "a/b", "hf:a/b@../c"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="names no plan on the hub; write hf:ORG/NAME or hf:ORG/NAME@REVISION"):
        parse_name(name)


def test_offline_a_plan_that_was_not_fetched_is_said_so(hub: Hub, tiny: Path, car_run: Any) -> None:
    hub.commit(REPO, files_of(tiny))
    done = car_run("-e", f"hf:{REPO}", *DRAW, code=2, HF_HUB_OFFLINE="1")
    assert "is not in the cache, or not whole, and HF_HUB_OFFLINE is set; unset it" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not hub.asked


def test_where_no_hub_answers_the_cache_is_used_at_once(
    hub: Hub, tiny: Path, car_run: Any, client: Any, dead: tuple[str, str]
) -> None:
    """Also for files that the plan doesn't have: each would be asked for again and again."""
    address, reason = dead
    commit = hub.commit(REPO, files_of(tiny))
    car_run("plan", "pull", f"hf:{REPO}")
    code = (
        "import sys, time\n"
        "from car_runtime import PlanError\n"
        "from car_runtime.hub import located\n"
        "began = time.monotonic()\n"
        f"for name in ('hf:{REPO}', 'hf:{REPO}@{commit}', 'hf:someone/other'):\n"
        "    try: located(name, print)\n"
        "    except PlanError as error: print(error)\n"
        "print(time.monotonic() - began)\n"
    )
    done = client("-c", code, HF_ENDPOINT=address, HF_HUB_ETAG_TIMEOUT="2")
    assert not done.stderr
    cached, pinned, lost, seconds = done.stdout.splitlines()
    assert re.fullmatch(f".*{reason}; hf:{REPO} is taken from the cache, commit {commit}", cached)
    assert pinned.startswith(f"hf:{REPO}@{commit} is at commit "), "nothing is asked for"
    assert re.fullmatch(
        f"hf:someone/other is not in the cache, or not whole, and .*{reason}; check the connection, and HF_ENDPOINT "
        "if it is set",
        lost,
    )
    assert float(seconds) < 15


def test_a_plan_that_was_changed_on_the_hub_is_refused_and_nothing_is_kept(
    hub: Hub, tiny: Path, car_run: Any, tmp_path: Path
) -> None:
    files = files_of(tiny)
    hub.commit(REPO, {**files, WEIGHTS: b"\xff" + files[WEIGHTS][1:]})
    done = car_run("plan", "pull", f"hf:{REPO}", code=2)
    assert f"{WEIGHTS} was changed after the export" in done.stderr
    assert not [path for path in (tmp_path / "home/.cache/car/hub").iterdir() if path.name != ".lock"]


def bytes_under(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.mark.parametrize(
    ("name", "how"), [(MANIFEST, "said"), (MANIFEST, "not said"), (WEIGHTS, "said"), (SIGNATURE, "not said")]
)
def test_no_file_is_fetched_beyond_its_length(
    hub: Hub, tiny: Path, car_run: Any, tmp_path: Path, name: str, how: str
) -> None:
    """What the hub says is too long isn't begun; what it sends on and on ends at the file's length."""
    files = {SIGNATURE: b"x" * 88, **files_of(tiny)}
    most = {MANIFEST: MANIFEST_BYTES, WEIGHTS: len(files[WEIGHTS]), SIGNATURE: SIGNATURE_BYTES}[name]
    if how == "said":
        files[name] += b" " * (most + 30_000_000)
    else:
        hub.endless = name
    hub.commit(REPO, files)
    done = car_run("plan", "pull", f"hf:{REPO}", code=2)
    (line,) = [line for line in done.stderr.splitlines() if " error: " in line]
    assert f"{name} has more than its {most} bytes on the hub; fetch another plan" in line
    others = sum(len(content) for other, content in files.items() if other != name)
    kept = most if how == "not said" else 0
    assert bytes_under(tmp_path / "home") <= others + kept + 100_000
    assert not list((tmp_path / "home/.cache/car/hub").glob("*.plan"))


def test_a_plan_that_is_too_large_is_not_begun(hub: Hub, tiny: Path, client: Any) -> None:
    """For anyone, by what its manifest says; for this disk, of which here no byte is to spare."""
    hub.commit(REPO, files_of(tiny), branch="small")
    said = json.loads((tiny / MANIFEST).read_text())
    said["files"][WEIGHTS]["bytes"] = said["chunk_bytes"] = 2**40
    hub.commit(REPO, {**files_of(tiny), MANIFEST: json.dumps(said).encode()}, branch="large")
    code = (
        "from car_runtime import PlanError, hub\n"
        "hub.SPARE_BYTES = 10**18\n"
        "for branch in ('large', 'small'):\n"
        f"    try: hub.located(f'hf:{REPO}@{{branch}}')\n"
        "    except PlanError as error: print(error)\n"
    )
    large, small = client("-c", code).stdout.splitlines()
    assert re.fullmatch(rf"hf:{REPO}@large has 1\d{{12}} bytes, over 50000000000; fetch another plan", large)
    assert re.search("needs 0.0 GB more on the disk of '.*home.*', which has .* GB; make room, or set HF_HOME", small)
    assert [name for name in hub.asked if name.startswith("GET")] == [f"GET {MANIFEST}"]


# -- a folder of the hub's cache, named by its path ------------------------------------------------------------------


@pytest.fixture
def snapshot(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the client leaves: files by their digests, and a folder of links."""
    monkeypatch.setattr(hub_module, "CACHE", tmp_path / "plans")
    repo = tmp_path / "models--someone--tiny"
    folder = repo / "snapshots" / ("0" * 39 + "1")
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, (name, content) in enumerate(files_of(tiny).items()):
        digest = f"{number:064x}"
        (repo / "blobs" / digest).write_bytes(content)
        (folder / name).symlink_to(f"../../blobs/{digest}")
    return folder


def test_a_folder_of_links_opens_as_plain_files_that_take_no_more_room(snapshot: Path, tiny: Path) -> None:
    plan = located(snapshot)
    assert files_of(plan) == files_of(tiny)
    assert not any(path.is_symlink() for path in plan.iterdir())
    assert (plan / WEIGHTS).samefile(snapshot / WEIGHTS), "another name of the same file"
    assert located(snapshot) == plan
    assert located(plan) == plan
    assert located(str(tiny)) == tiny


def test_files_are_copied_where_they_cannot_be_linked(
    snapshot: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", no_link)
    plan = located(snapshot)
    assert files_of(plan) == files_of(tiny)
    assert not (plan / WEIGHTS).samefile(snapshot / WEIGHTS)


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../../secret", "../../blobs/../../secret", "../blobs/" + "0" * 64]
)
@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "step.onnx"])
def test_a_link_to_elsewhere_is_refused(snapshot: Path, tmp_path: Path, name: str, target: str) -> None:
    (tmp_path / "secret").write_bytes((snapshot / name).read_bytes())
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(target)
    with pytest.raises(PlanError, match=f"{name} is a link to elsewhere than the hub's cache; fetch the plan again"):
        located(snapshot)
    assert not list((tmp_path / "plans").glob("*.plan"))


def test_a_blob_that_is_itself_a_link_is_refused(snapshot: Path, tmp_path: Path) -> None:
    blob = (snapshot / WEIGHTS).resolve()
    shutil.move(blob, tmp_path / "secret")
    blob.symlink_to(tmp_path / "secret")
    with pytest.raises(PlanError, match=f"{WEIGHTS} in .* is not a file"):
        located(snapshot)


def test_without_a_home_folder_it_is_said_what_to_set(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "CACHE", Path("~no-user-of-this-name/hub"))
    with pytest.raises(PlanError, match="set HOME"):
        located(snapshot)


def test_a_missing_blob_is_named(snapshot: Path) -> None:
    (snapshot / WEIGHTS).resolve().unlink()
    with pytest.raises(PlanError, match=f"{WEIGHTS} is missing from"):
        located(snapshot)


def test_what_a_killed_process_left_is_removed(snapshot: Path, tmp_path: Path) -> None:
    left = tmp_path / "plans" / ".someone--tiny.plan.car-999999-part00000000"
    left.mkdir(parents=True)
    located(snapshot)
    assert not left.exists()


def test_another_plan_under_the_same_commit_is_another_directory(snapshot: Path, tiny: Path) -> None:
    """What is named by a stranger's folder can't take the place of what the hub has."""
    first = located(snapshot)
    other = json.loads((snapshot / MANIFEST).read_text())
    other["name"] = "other"
    (snapshot / MANIFEST).resolve().write_text(json.dumps(other))
    second = located(snapshot)
    assert first != second
    assert (read_manifest(first).name, read_manifest(second).name) == ("tiny", "other")


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [("hf:a/b", "a/b", None), ("hf:a-1/b.c_d@main", "a-1/b.c_d", "main"), ("hf:a/b@refs/pr/1", "a/b", "refs/pr/1")],
)
def test_names_have_a_repository_and_a_revision(text: str, repo: str, revision: str | None) -> None:
    assert parse_name(text) == HubName(repo=repo, revision=revision)
    assert str(parse_name(text)) == text


def test_without_the_client_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RequestError, match=r"pip install 'car-deploy\[cpu,hub\]'"):
        located("hf:someone/tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pull", "here.plan"], "'here.plan' is not on the hub; write hf:ORG/NAME"),
        (["pull", "hf:a/b", "-o", "."], "'.' is there already; remove it, or choose another -o"),
        (["push", "here.plan"], "push needs hf:ORG/NAME after the plan"),
        (["push", "here.plan", "a/b"], "'a/b' names no plan on the hub"),
        (
            ["push", "here.plan", f"hf:a/b@{'0' * 40}"],
            f"hf:a/b@{'0' * 40} is a commit, which nothing is added to; write",
        ),
        (["info", "here.plan", "--private"], "--private is not for info; leave it out"),
        (["card", "here.plan", "x"], "card takes nothing but the plan; leave out 'x'"),
        (["push", "here.plan", "hf:a/b", "--license", "mit"], "--license is not for push; leave it out"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_card_says_what_the_plan_is_and_whether_it_agrees(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "from").mkdir()
    copy_canny(tmp_path / "from")
    assert (
        main(
            [
                "plan",
                "card",
                str(tmp_path / "from" / "emoji.plan"),
                "--license",
                "cc-by-4.0",
                "--backend",
                "ort-cpu",
                "-o",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == ["README.md", "card.png"]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlicense: cc-by-4.0\nlibrary_name: car-deploy\n")
    assert "| canny (canny) | canny 100, 200 | rgb | light-on-dark | 0, 0, 0 | crop |" in text
    assert "The plan agrees with what PyTorch computed" in text
    assert text.count("| pass |") == 16, "eight with the control, eight without"
    with Image.open(tmp_path / "card.png") as sheet:
        assert sheet.size == (5 * 132 - 4, 128), "a control image and four seeds"


def test_a_card_shows_a_strangers_names_as_plain_text() -> None:
    assert card_module._text("a|b\n# c <img src=x> `d`") == "a\\|b\\\\n\\# c \\<img src=x\\> \\`d\\`"


def test_a_licence_that_is_no_identifier_is_refused() -> None:
    with pytest.raises(RequestError, match="the licence is 'My own"):
        card_module.card(default_plan(), licence="My own\nlicence")
