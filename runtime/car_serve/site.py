"""A plan as a static site: the studio, the plan's graphs and weights, and onnxruntime-web, which runs them.

    car-run plan web emoji.plan -o site/
    car-run plan web emoji.plan -o site/ --branches canny,sketch

Any static host serves the folder; nothing is fetched from elsewhere, and nothing is sent (docs/web.md).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime import __version__
from car_runtime.errors import OutputError, PlanError, RequestError
from car_runtime.format.folder import PlanFolder
from car_runtime.format.goldens import Goldens, all_goldens_in, golden_file
from car_runtime.format.graph_check import stored_weights, wide_nodes
from car_runtime.format.hashing import verify_folder
from car_runtime.format.manifest import WEIGHTS, Manifest, manifest_in, open_plan_folder, write_manifest
from car_runtime.plan import DEFAULT_PLAN
from car_runtime.receipt import plan_digest
from car_runtime.system.files import folder_aside, one_writer, read_regular
from car_serve.about import plan_about

STUDIO = Path(__file__).parent / "studio"
SITE = "site.json"
PACKAGE = "onnxruntime-web@1.30.0"
"""The npm package that runs the graphs; MIT."""
PACKAGE_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
ARCHIVE = Path("~/.cache/car/web/onnxruntime-web-1.30.0.tgz")
"""Where `make web` puts it."""
ENGINE = (
    *("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    *("ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm"),
)
"""WebAssembly, and the build that computes with WebGPU. Its other builds for that have 27 MB, or are older."""
GPU_PORTS = 8
"""Arrays that a kernel of WebGPU may read and write on every device; a node with more computes on the CPU."""
ARCHIVE_BYTES = MEMBER_BYTES = 64 * 1024 * 1024
LARGE = 60_000_000
"""Bytes from which on a site takes long to load."""
ALIGNED = 64
"""Bytes between two pieces of weights.bin, up to which they are one."""
CSP = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'"
)


def write_site(plan: Path, output: Path, archive: Path | None = None, branches: Sequence[str] | None = None) -> int:
    """Write the site of a plan, whole or not at all, in place of an older site. Returns its bytes.

    archive: the npm package `PACKAGE` as a .tgz. branches: those of the plan that the page has, the default one among
    them (None: all). Raises PlanError: not of format 2, not float32; RequestError: no such package or branch;
    OutputError: something else is there.
    """
    _check_target(output)
    try:
        with one_writer(output), folder_aside(output) as aside, open_plan_folder(plan) as folder:
            whole = manifest_in(folder)
            _check_plan(whole)
            manifest = _of_page(whole, list(whole.model.branches) if branches is None else branches)
            engine = _engine(archive)
            names = sorted({graph.file for graph in manifest.graphs.values()})
            goldens = [golden_file(branch) for branch in ("", *manifest.model.branches)]
            if not manifest.files.keys() >= set(goldens):
                goldens = []  # an older export
            verify_folder(folder, whole, hashes=True, names=[*names, WEIGHTS, *goldens])
            for name in names:
                _copy(folder, name, aside / "plan" / name)
            pieces = _pieces(aside / "plan", manifest)
            _copy(folder, WEIGHTS, aside / "plan" / WEIGHTS, pieces)
            write_manifest(aside / "plan", manifest)
            for name, content in engine.items():
                _write(aside / "ort" / name, content)
            found = all_goldens_in(folder, manifest) if goldens else []
            _write(aside / "plan" / "goldens.json", json.dumps([_golden(one) for one in reversed(found)]))
            _write_page(aside, whole, manifest, pieces)
            return sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
    except OSError as error:
        raise OutputError(f"cannot write {str(output)!r} ({error.strerror}); choose another place") from error


def _check_target(output: Path) -> None:
    """Refuse what is there and no site, and a place that does not exist."""
    if not output.absolute().parent.is_dir():
        raise OutputError(f"the output's directory {str(output.absolute().parent)!r} does not exist; create it first")
    if (output.exists() or output.is_symlink()) and not (output.is_dir() and not output.is_symlink()):
        raise OutputError(f"{str(output)!r} is no directory; choose another place")
    if output.is_dir() and any(output.iterdir()) and not (output / SITE).is_file():
        raise OutputError(f"{str(output)!r} holds other things than a site; choose a new directory")


def _engine(archive: Path | None) -> dict[str, bytes]:
    """The files of onnxruntime-web that a page loads, by name, and its licence. Raises RequestError."""
    try:
        archive = archive or ARCHIVE.expanduser()
    except RuntimeError as error:
        raise RequestError("this user has no home folder; name onnxruntime-web with --onnxruntime") from error
    remedy = f"fetch it with `npm pack {PACKAGE}` and name it with --onnxruntime, or run make web"
    try:
        data = read_regular(archive, ARCHIVE_BYTES)
    except OSError as error:
        raise RequestError(f"onnxruntime-web is not at {str(archive)!r} ({error.strerror}); {remedy}") from error
    if hashlib.sha256(data).hexdigest() != PACKAGE_SHA256:
        raise RequestError(f"{str(archive)!r} is not {PACKAGE}, as its SHA-256 differs; {remedy}")
    found = {"LICENSE": (STUDIO / "web" / "onnxruntime-web.LICENSE").read_bytes()}
    with tarfile.open(fileobj=io.BytesIO(data)) as package:
        for name in ENGINE:
            member = package.extractfile(f"package/dist/{name}")
            assert member is not None, name
            found[name] = member.read(MEMBER_BYTES)
    return found


def _check_plan(manifest: Manifest) -> None:
    if manifest.format < 2:
        raise PlanError(
            f"the plan {manifest.name!r} is of format 1, and a page runs format 2; upgrade it with "
            "export/build_engines.py PLAN --upgrade -o NEW"
        )
    if manifest.precision.compute != "fp32":
        raise PlanError(
            f"the plan {manifest.name!r} computes in {manifest.precision.compute}, and a page in float32; export it "
            "without --precision, with --weights fp16 for a small one"
        )


def _of_page(manifest: Manifest, names: Sequence[str]) -> Manifest:
    """The manifest of a page that has these branches of the plan. Raises RequestError."""
    model = manifest.model
    for name in names:
        if name not in model.branches:
            known = ", ".join(model.branches) or "none"
            raise RequestError(f"the plan {manifest.name!r} has no branch {name[:120]!r}; name some of: {known}")
    branches = {name: branch for name, branch in model.branches.items() if name in names}
    if model.default_branch not in [None, *branches]:
        raise RequestError(f"the page would lack {model.default_branch!r}, the plan's default branch; name it, too")
    gone = tuple(f"branches.{name}." for name in model.branches if name not in names)
    page = replace(
        manifest,
        model=replace(model, branches=branches),
        parameters={name: one for name, one in manifest.parameters.items() if not name.startswith(gone)},
    )
    return replace(page, graphs={name: manifest.graphs[name] for name in _graphs(page)})


def _graphs(manifest: Manifest) -> list[str]:
    """The graphs that a page runs: those without a fixed batch."""
    branches = manifest.model.branches
    wanted = {"step", "condition", "decoder", "encoder"}
    wanted |= {f"{kind}.{branch}" for kind in ("condition", "control", "branch") for branch in branches}
    return sorted(wanted & manifest.graphs.keys())


def _pieces(root: Path, manifest: Manifest) -> list[tuple[int, int]]:
    """Offset and length of what a page reads of weights.bin, in order: a site has nothing else of it.

    root: where the graphs are that it runs.
    """
    graphs = [(root / graph.file).read_bytes() for graph in manifest.graphs.values()]
    held = [(one.offset, one.bytes) for graph in graphs for one in stored_weights(graph)]
    held += [(one.offset, one.bytes) for one in manifest.tensors.values()]
    held += [(one.offset, one.bytes) for one in manifest.parameters.values()]
    found: list[tuple[int, int]] = []
    for offset, length in sorted(held):
        start, end = (found[-1][0], sum(found[-1])) if found else (0, -ALIGNED - 1)
        if offset <= end + ALIGNED:
            found[-1] = (start, max(end, offset + length) - start)
        else:
            found.append((offset, length))
    return found


def _golden(golden: Goldens) -> dict[str, Any]:
    """What a page compares with what it draws on a GPU."""
    return {
        "branch": golden.branch,
        "control": None if golden.control is None else _png(golden.control),
        "label": golden.label,
        "cfg": golden.cfg,
        "tokens": golden.tokens.tolist(),
        "image": _png(golden.image),
    }


def _png(image: NDArray[np.uint8]) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _wide_nodes(root: Path, manifest: Manifest) -> dict[str, list[str]]:
    """Graph → its nodes that a GPU may not have enough ports for."""
    graphs = {name: (root / "plan" / graph.file).read_bytes() for name, graph in manifest.graphs.items()}
    found = {name: wide_nodes(graph, GPU_PORTS) for name, graph in graphs.items()}
    return {name: nodes for name, nodes in found.items() if nodes}


def _copy(folder: PlanFolder, name: str, target: Path, pieces: Sequence[tuple[int, int]] | None = None) -> None:
    """Copy a file of the plan, or one after the other these of its pieces."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.file(name), "rb", closefd=False) as source, open(target, "xb") as copy:
        for offset, length in [(0, folder.size(name))] if pieces is None else pieces:
            source.seek(offset)
            while length and (block := source.read(min(length, 1 << 20))):
                copy.write(block)
                length -= len(block)


def _write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _write_page(root: Path, whole: Manifest, manifest: Manifest, pieces: list[tuple[int, int]]) -> None:
    """The studio, the list of all files with their digests, and the service worker, whose version is that list's."""
    for path in sorted(STUDIO.rglob("*")):
        if path.is_file() and path.name not in ("index.html", "sw.js", "onnxruntime-web.LICENSE"):
            _write(root / "studio" / path.relative_to(STUDIO), path.read_bytes())
    page = (STUDIO / "index.html").read_text(encoding="utf-8")
    head = f'<meta http-equiv="Content-Security-Policy" content="{CSP}">\n  <meta name="site" content="{SITE}">\n  '
    _write(root / "index.html", page.replace("<title>", f"{head}<title>", 1))
    _write(root / ".nojekyll", "")
    for name, content in _terms().items():
        _write(root / name, content)
    weights = {"bytes": whole.files[WEIGHTS].bytes, "pieces": pieces}
    _write(root / SITE, json.dumps(_about(root, whole, manifest) | {"weights": weights}, ensure_ascii=False))
    version = hashlib.sha256((root / SITE).read_bytes()).hexdigest()[:16]
    paths = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    first = [f"./{path}" for path in paths if path.startswith("studio/") or path == SITE]
    constants = f"const VERSION = {json.dumps(version)};\nconst PAGE = {json.dumps(['./', *first])};\n"
    _write(root / "sw.js", constants + (STUDIO / "web" / "sw.js").read_text(encoding="utf-8"))


def _about(root: Path, whole: Manifest, manifest: Manifest) -> dict[str, Any]:
    """What the page reads first. An image is the plan's, whichever of its branches the page has."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                digest = _sha256(file)
            found[path.relative_to(root).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    about = plan_about(manifest) | {
        "shipped": whole == _shipped(),
        "digest": plan_digest(whole),
        "defaultBranch": manifest.model.default_branch,
        "named": bool(manifest.model.names),
    }
    return {"version": __version__, "plan": about, "on_cpu": _wide_nodes(root, manifest), "files": found}


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _shipped() -> Manifest | None:
    """The manifest of the plan in the package."""
    try:
        with open_plan_folder(DEFAULT_PLAN) as folder:
            return manifest_in(folder)
    except PlanError:
        return None


def _terms() -> dict[str, bytes]:
    """LICENSE and NOTICE of this package, where its installation has them."""
    try:
        listed = files("car-deploy") or []
    except PackageNotFoundError:
        return {}
    found = {path.name: Path(str(path.locate())) for path in listed if path.name in ("LICENSE", "NOTICE")}
    return {f"{name}.txt": path.read_bytes() for name, path in found.items() if path.is_file()}
