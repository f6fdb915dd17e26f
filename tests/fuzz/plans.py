"""Changed plans through whole commands: each ends with 0 or 2, in one line, in bounded time and memory.

    python tests/fuzz/plans.py --count 10000

What is changed: values and bytes of the manifest; what it says of branches, fusions, static graphs and parameters;
bytes of graphs, weights and goldens with their digests brought up to date; and what lies in the place of a file.
What runs: an image, of one branch, of two and with a watermark, `detect`, `batch`, `--list-classes`, `plan`,
`doctor`, `verify`, and `build_engines.py` on a plan. Sources are the shipped plan and two small ones of random
weights, of formats 1 and 2.

A command is the very function that the program calls, one after the other in a child of this process, which goes on
behind a case that ends it: that takes milliseconds, not seconds. Every 50th is a process of its own. Time is the
CPU's; memory is what a command takes at its peak beyond what it takes on the unchanged plan.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

OWN_FAULT = 70
"""How a child ends that could not try its case."""
ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT / folder) for folder in ("", "export", "runtime", "tests")]
sys.path[:1] = PATHS  # not its own folder: `fuzz` is that one here

from car_runtime.format.manifest import describe_files  # noqa: E402
from car_runtime.plan import DEFAULT_PLAN  # noqa: E402
from fuzz.fuzz import changed  # noqa: E402

CPU_SECONDS = 10
MEGABYTES = 1000
LINE = 300
CONTROL = ROOT / "examples" / "umbrella.png"
SLOW = ("build_engines --target rtx", "build_engines --upgrade")
"""These take their time for what is a plan, and have no limit of seconds."""
WHOLE = 50
"""One in so many is a process of its own."""


# Commands.


def commands(plan: Path, folder: Path, key: Path) -> dict[str, tuple[float, list[str]]]:
    """Name → how often it is tried, and program and arguments."""
    image = ["-e", str(plan), "--control", str(CONTROL), "-o", str(folder / "o.png"), "--threads", "1"]
    two = ["-e", str(plan), "--control", f"sketch={CONTROL}:0.7", "--control", f"other={CONTROL}:0.4"]
    jobs = [str(folder / "jobs.jsonl"), "-e", str(plan), "-o", str(folder / "out"), "--threads", "1"]
    other = [str(plan), "other", "-o", str(folder / "o.plan")]
    return {
        "image": (18, ["car_runtime", *image]),
        "image, hashes not looked at": (5, ["car_runtime", *image, "--no-verify"]),
        "image of two branches": (10, ["car_runtime", *two, *image[4:]]),
        "watermark": (4, ["car_runtime", *image, "--watermark", "a key"]),
        "detect": (5, ["car_runtime", "detect", str(CONTROL), "-e", str(plan), "--key", "a key", "--threads", "1"]),
        "batch": (5, ["car_runtime", "batch", *jobs]),
        "list-classes": (14, ["car_runtime", "-e", str(plan), "--list-classes"]),
        "plan info": (12, ["car_runtime", "plan", "info", str(plan)]),
        "plan remove-branch": (6, ["car_runtime", "plan", "remove-branch", *other]),
        "doctor": (12, ["car_runtime", "doctor", str(plan)]),
        "verify": (10, ["car_runtime", "verify", str(plan), "--runs", "1", "--warmup", "0", "--threads", "1"]),
        "build_engines --sign": (9, ["car_export", str(plan), "--sign", str(key)]),
        SLOW[0]: (0.1, ["car_export", str(plan), "--target", "rtx", "--sm", "89"]),
        SLOW[1]: (0.1, ["car_export", str(plan), "--upgrade", "-o", str(folder / "o.plan")]),
    }


def may_try(name: str, source: Path) -> bool:
    """Whether a command is for a source: the small plan of format 2 has two branches; the shipped one is large."""
    small = source.stem != "source-0"
    return {"image of two branches": source.stem == "source-2", SLOW[1]: small}.get(name, True)


JOBS = """\
{"name": "a", "seed": 3, "cfg": 1.5}
{"name": "b", "control": "%s", "n": 2, "class": 1}
"""


def run_here(command: Sequence[str]) -> int:
    """The function of the program."""
    if command[0] == "car_runtime":
        from car_runtime.cli.main import main
    else:
        from car_export.cli import main
    return main(list(command[1:]))


def program(command: Sequence[str]) -> list[str]:
    """The same as a process of its own."""
    script = ["-m", "car_runtime"] if command[0] == "car_runtime" else [str(ROOT / "export/build_engines.py")]
    return [sys.executable, *script, *command[1:]]


# How a command ends.


@dataclass(frozen=True)
class Outcome:
    """Exit code, or minus the number of a signal; CPU seconds; megabytes at its peak; what it wrote to stderr."""

    code: int
    seconds: float
    megabytes: int
    stderr: str


def called(command: Sequence[str], stderr: Path, most: int) -> Outcome:
    """A command in this process, whose file descriptors 1 and 2 are taken. most: CPU seconds until it is ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(stderr, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
    sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w", errors="backslashreplace")
    Path("/proc/self/clear_refs").write_text("5")  # its peak begins anew
    began, before, code = time.process_time(), resident("VmRSS"), 99
    signal.setitimer(signal.ITIMER_PROF, most)
    try:
        code = run_here(command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    took, megabytes = time.process_time() - began, resident("VmHWM") - before
    for stream in (sys.stdout, sys.stderr):
        stream.close()
    return Outcome(code, took, megabytes, stderr.read_text(errors="replace"))


def resident(what: str) -> int:
    """Megabytes of this process: VmRSS, now; VmHWM, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) // 1024


def spawned(command: Sequence[str], stderr: Path, most: int) -> Outcome:
    """A command as a process of its own."""
    with stderr.open("w") as file:
        process = subprocess.Popen(
            program(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (most, most)),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    took, megabytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024
    return Outcome(process.returncode, took, megabytes, stderr.read_text(errors="replace"))


def problem(name: str, outcome: Outcome, usual: int) -> str | None:
    """What is wrong with an answer; None if nothing. `usual`: megabytes on the unchanged plan."""
    errors = [line for line in outcome.stderr.splitlines() if " error: " in line]
    own_failure = outcome.code == 1 and len(errors) == 1 and "RunError" in errors[0]
    report = outcome.code == 1 and not errors and name in ("verify", "doctor")  # what they found is their answer
    if outcome.code in (-signal.SIGXCPU, -signal.SIGPROF):
        return "hangs"
    if outcome.code < 0:
        return f"ended by {signal.Signals(-outcome.code).name}"
    if "Traceback (most recent call last)" in outcome.stderr:
        return "a traceback"
    if outcome.code not in (0, 2) and not own_failure and not report:
        return f"exit code {outcome.code}"
    if outcome.code == 2 and len(errors) != 1:
        return f"{len(errors)} lines of error"
    if any(len(line) > LINE for line in errors):
        return "a long line of error"
    if any((ord(c) < 32 and c not in "\t\r\n") or c == "\x7f" for c in outcome.stderr):
        return "control characters"
    if outcome.seconds > CPU_SECONDS and name not in SLOW:
        return f"takes {outcome.seconds:.0f} s"
    if outcome.megabytes > usual + MEGABYTES:
        return f"takes {outcome.megabytes} MB, {usual} MB unchanged"
    return None


# Changes.


def copied(source: Path, target: Path) -> None:
    """A plan whose files are the source's until they are replaced."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            os.link(file, target / file.name)


def replace(file: Path, data: bytes) -> None:
    """Other content under a name; the source keeps its own."""
    file.unlink()
    file.write_bytes(data)


def relist(root: Path, name: str) -> None:
    """Bring the manifest's size and digests of a file up to date: whoever changes a plan can do that, too."""
    manifest = json.loads((root / "manifest.json").read_bytes())
    entry = describe_files(root, [name])[name]
    manifest["files"][name] = {"bytes": entry.bytes, "sha256": list(entry.sha256)}
    replace(root / "manifest.json", json.dumps(manifest).encode())


Json = dict[str, Any]


def _at_places(m: Json, rng: random.Random) -> str:
    """Where parameters and constants lie, and as what, to no sum or to another true one."""
    table = m.get("parameters", {})
    names = [*table] * 2 + [name for name in table if ".fusions." in name] * 8
    entries: list[Json] = [table[name] for name in names] + list(m["tensors"].values())
    total, one, other = m["files"]["weights.bin"]["bytes"], rng.choice(entries), rng.choice(entries)
    kind = rng.randrange(8)
    if kind == 0:
        one["offset"] = rng.choice((0, 1, -8, total, total - one["bytes"], total - 1, 2**63, one["offset"] + 4))
    elif kind == 1:
        one["offset"] = 0 if rng.random() < 0.5 else other["offset"]
    elif kind == 2:
        one["bytes"] = rng.choice((0, 1, total, one["bytes"] * 2, -1, 2**62))
    elif kind == 3 and one["shape"]:
        one["shape"][rng.randrange(len(one["shape"]))] = rng.choice((0, 1, 7, -1, 2**24, 2**40))
    elif kind == 4 and one["shape"]:  # as many numbers in another shape
        one["shape"] = rng.choice((one["shape"][::-1], [one["bytes"] // 4], [1, *one["shape"]], []))
    elif kind == 5:
        one["dtype"] = rng.choice(("float16", "bfloat16", "int64", "bool", "object", "<f4"))
        if rng.random() < 0.5:  # of as many bytes as that makes
            item = {"int64": 8, "bool": 1}.get(one["dtype"], 2)
            one["bytes"] = item * math.prod(one["shape"])
    elif kind == 6:
        one["layout"] = rng.choice(("transposed", "plain", "x"))
    else:
        kept = one | {}
        one |= other
        other |= kept
    return "places"


def _branches(m: Json, rng: random.Random) -> str:
    """What branches are called, are made of and belong to."""
    branches = m["model"]["branches"]
    name = rng.choice(list(branches))
    kind = rng.randrange(8)
    if kind == 0:
        key = rng.choice(("fusion", "transformer", "blocks", "cache_layers", "control_type"))
        values = ("concat", "zero", "cross_norm", "blocks", "conv", 0, 1, 2, 3, 512, 2**40, "x\x1b[2J", None)
        for one in branches.values() if rng.random() < 0.5 else (branches[name],):
            one[key] = rng.choice(values)
    elif kind == 1:
        m["model"]["default_branch"] = rng.choice((None, "other", "sketch", "x", "", "\x1b[2J", 5))
    elif kind == 2:  # under a new name, here alone
        branches[rng.choice(("x", "../x", "a.b", "A", "\x1b[2J", "x" * 33, ""))] = branches.pop(name)
    elif kind == 3:  # under a new name, wherever it stands
        text = (
            json.dumps(m).replace(f"{name}.", "x.").replace(f'"{name}"', '"x"').replace('.x.onnx"', f'.{name}.onnx"')
        )
        m.clear()
        m |= json.loads(text)
    elif kind == 4:
        del branches[name]
    elif kind == 5:
        for i in range(rng.choice((1, 63, 64, 70_000))):
            branches[f"b{i}"] = branches[name]
    elif kind == 6:
        m["model"]["branches"] = {}
    else:
        kind_of_graph = rng.choice(("control", "condition", "branch"))
        pair = [f"{kind_of_graph}.{one}" for one in ("other", "sketch")]
        if all(graph in m["graphs"] for graph in pair):  # not renamed by a change before this one
            m["graphs"][pair[0]], m["graphs"][pair[1]] = m["graphs"][pair[1]], m["graphs"][pair[0]]
    return "branches"


def _ports(m: Json, rng: random.Random) -> str:
    """Fusions and other inputs of graphs, by name, type and size."""
    graph = m["graphs"][rng.choice(list(m["graphs"]))]
    ports = graph[rng.choice(("inputs", "outputs"))]
    if "step" in m["graphs"] and rng.random() < 0.6:
        fusions = [port for port in m["graphs"]["step"]["inputs"] if port["name"].startswith("fusion_")]
        ports = fusions or ports
    one = rng.choice(ports)
    kind = rng.randrange(5)
    if kind == 0:
        one["name"] = rng.choice(("fusion_gain_0", "fusion_linear_weight_1", "fusion_", "c", "x", "", "\x1b[2J"))
    elif kind == 1:
        one["dtype"] = rng.choice(("float16", "bfloat16", "int64", "float32", "bool"))
    elif kind == 2 and one["shape"]:
        one["shape"][rng.randrange(len(one["shape"]))] = rng.choice((0, 1, 2**24, "R", "B", -1))
    elif kind == 3:
        ports.append(one | {"name": f"fusion_linear_weight_{rng.randrange(9)}"})
    else:
        one["name"] += "0"
    return "ports"


def _static_graphs(m: Json, rng: random.Random) -> str:
    """Names of graphs, and which file is whose."""
    graphs = m["graphs"]
    name = rng.choice(list(graphs))
    kind = rng.randrange(3)
    if kind == 0:
        new = ("step.x", "step.00.bx", "step.99.b1", "step.00.b0", "step.00.b999999", "step.", "branch.other.0", "x")
        graphs[rng.choice(new)] = graphs[name] if rng.random() < 0.5 else graphs.pop(name)
    elif kind == 1:
        graphs[name]["file"] = graphs[rng.choice(list(graphs))]["file"]
    else:
        other = rng.choice(list(graphs))
        graphs[name], graphs[other] = graphs[other], graphs[name]
    return "static graphs"


def _structure(file: Path, rng: random.Random) -> str:
    """One of a plan's own structures changed, with or without the table's digest brought up to date."""
    m = json.loads(file.read_bytes())
    of_2 = m["format"] == 2 and bool(m["model"]["branches"])
    kinds = (_at_places, _ports, _static_graphs) + ((_branches, _branches, _at_places) if of_2 else ())
    what = rng.choice(kinds)(m, rng)
    if m.get("parameters_digest") and rng.random() < 0.2:
        m["parameters_digest"] = rng.choice(("", "0" * 64, m["parameters_digest"][::-1], 7))
    replace(file, json.dumps(m).encode())
    return f"manifest, {what}"


def spoil(root: Path, rng: random.Random) -> str:
    """Change something of a plan; returns what."""
    graphs = sorted(file.name for file in root.glob("*.onnx"))
    kinds = {"values": 25, "bytes": 6, "structure": 30, "graph": 25, "weights": 5, "goldens": 5, "place": 4}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "structure":
        return _structure(root / "manifest.json", rng)
    if kind in ("values", "bytes"):
        file = root / "manifest.json"
        data = file.read_bytes()
        if kind == "bytes":
            data = b" " + data  # which `changed` takes for no JSON
        replace(file, changed(data, rng))
        return f"manifest, {kind}"
    if kind == "place":
        name = rng.choice([*graphs, "weights.bin", "manifest.json"])
        file = root / name
        file.unlink()
        how = rng.choice(("nothing", "folder", "fifo", "link", "link to a device", "empty", "another file"))
        makers: dict[str, Callable[[], object]] = {
            "nothing": lambda: None,
            "folder": file.mkdir,
            "fifo": lambda: os.mkfifo(file),
            "link": lambda: file.symlink_to(DEFAULT_PLAN / "weights.bin"),
            "link to a device": lambda: file.symlink_to("/dev/zero"),
            "empty": file.touch,
            "another file": lambda: shutil.copyfile(CONTROL, file),
        }
        makers[how]()
        return f"{name} is {how}"
    goldens = rng.choice(sorted(file.name for file in root.glob("goldens*.npz")) or ["goldens.npz"])
    name = {"weights": "weights.bin", "goldens": goldens}.get(kind) or rng.choice(graphs)
    if not (root / name).exists():
        return "nothing"
    data = (root / name).read_bytes()
    if kind == "weights":
        number = bytearray(data)
        for _ in range(rng.choice((1, 10, 1000))):
            number[rng.randrange(len(number))] = rng.choice((0, 127, 128, 255))
        data = bytes(number) if rng.random() < 0.8 else data[: rng.randrange(len(data))]
        replace(root / name, data)
    else:
        replace(root / name, changed(data, rng))
    relist(root, name)
    return f"bytes of {name}"


# Sources.


def export_small(folder: Path) -> list[Path]:
    """Two small plans of random weights, of format 1 and of format 2 with two branches."""
    from car_export.config import ExportOptions
    from car_export.plan import build_plan
    from car_export.plan2 import build_plan_of_2
    from fixtures.small import small_model

    one, two = folder / "one.plan", folder / "two.plan"
    model = small_model(depth=2, sides=(1, 2))
    build_plan(model, ExportOptions(output=one, name="one"))
    build_plan_of_2({"sketch": model, "other": model}, ExportOptions(output=two, name="two"))
    return [one, two]


def warm_up() -> None:
    """Import here what every child would import."""
    import PIL.Image

    import car_export.branches
    import car_export.cli
    import car_export.upgrade  # noqa: F401
    import car_runtime.backends.onnxruntime.cpu
    import car_runtime.cli.main
    import car_runtime.controls
    import car_runtime.doctor
    import car_runtime.format.goldens  # noqa: F401

    PIL.Image.preinit()


def write_key(file: Path) -> None:
    """An Ed25519 key of this run."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file.write_bytes(Ed25519PrivateKey.generate().private_bytes(*pem))
    file.chmod(0o600)


def main() -> int:
    """See the top of the file. Exit code 1: something was answered wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plan", type=Path, action="append", default=[], help="small plans, made already")
    parser.add_argument("--keep", type=Path, help="a folder for the plans that were answered wrong")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as name:
        os.environ["HOME"] = name
        return campaign(arguments, Path(name))


def campaign(arguments: argparse.Namespace, folder: Path) -> int:
    """Try all cases, print what was answered wrong and the sum; returns the exit code."""
    write_key(folder / "key.pem")
    (folder / "jobs.jsonl").write_text(JOBS % CONTROL)
    made = list(arguments.plan)
    if not made:  # elsewhere: a process that has run an engine does not fork well
        subprocess.run([sys.executable, "-c", EXPORT.format(paths=PATHS, folder=str(folder))], check=True)
        made = [folder / "one.plan", folder / "two.plan"]
    warm_up()
    sources = []
    for i, source in enumerate([DEFAULT_PLAN, *made]):  # on one file system, for hard links
        sources.append(shutil.copytree(source, folder / f"source-{i}.plan"))
    began, tried = time.monotonic(), 0
    answers, wrong = Counter[str](), Counter[str]()
    slowest, most = 0.0, 0
    while tried < arguments.count:
        for line in batch(arguments, tried, sources, folder):
            tried += 1
            answers[str(line["code"])] += 1
            slowest, most = max(slowest, line["seconds"]), max(most, line["more"])
            if line["problem"] is not None:
                wrong[line["problem"]] += 1
                print(f"WRONG {tried - 1} {line['what']}: {line['problem']} | {line['said']!r}", flush=True)
            if tried % 100 == 0:
                print(f"{tried}: {dict(answers)}, {sum(wrong.values())} wrong", flush=True)
    codes = ", ".join(f"{count} ended with {code}" for code, count in sorted(answers.items()))
    print(
        f"{tried} plans: {codes}; {sum(wrong.values())} answered wrong; at most {slowest:.1f} s of CPU and "
        f"{most} MB more than unchanged; {time.monotonic() - began:.0f} s"
    )
    return 1 if wrong else 0


def batch(
    arguments: argparse.Namespace, first: int, sources: Sequence[Path], folder: Path
) -> Iterator[dict[str, Any]]:
    """Cases `first` and up to 99 more, in one child; fewer where one of them ends it, which then is the last."""
    lines = folder / "lines"
    lines.write_text("")
    pid = os.fork()
    if pid == 0:
        try:
            with lines.open("w") as file:
                for i in range(first, min(first + 100, arguments.count)):
                    case(arguments, i, sources, folder, file)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(OWN_FAULT)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) == OWN_FAULT:
        raise SystemExit(f"plans.py: the fault above is this program's own, after case {first}")
    answers = [json.loads(line) for line in lines.read_text().splitlines()]
    for begun, ended in zip_longest(answers[::2], answers[1::2]):
        if ended is None:
            code = os.waitstatus_to_exitcode(status)
            outcome = Outcome(code, 0, 0, (folder / "stderr").read_text(errors="replace"))
            ended = answer(begun["what"], begun["command"], outcome, 0)
        yield ended


def case(arguments: argparse.Namespace, i: int, sources: Sequence[Path], folder: Path, file: IO[str]) -> None:
    """Try case `i`: a line of what is tried, and one of how it ended."""
    rng = random.Random(f"{arguments.seed} {i}")
    root, stderr = folder / "a.plan", folder / "stderr"
    source = rng.choices(sources, [1] + [4] * (len(sources) - 1))[0]
    wanted = {k: v for k, v in commands(root, folder, folder / "key.pem").items() if may_try(k, source)}
    name = rng.choices(list(wanted), [often for often, _ in wanted.values()])[0]
    command, most = wanted[name][1], (60 if name in SLOW else 4) * CPU_SECONDS
    run = spawned if i % WHOLE == 0 else called
    usual = folder / f"usual {source.stem} {name} {run.__name__}".replace("/", " ")
    if not usual.exists():
        copied(source, root)
        usual.write_text(str(run(command, stderr, most).megabytes))
    copied(source, root)
    what = f"{source.stem} {name}: {spoil(root, rng)}"
    print(json.dumps({"what": what, "command": name}), file=file, flush=True)
    ended = answer(what, name, run(command, stderr, most), int(usual.read_text()))
    print(json.dumps(ended), file=file, flush=True)
    if ended["problem"] is not None and arguments.keep is not None:
        shutil.copytree(root, arguments.keep / f"{arguments.seed}-{i}.plan", symlinks=True)


def answer(what: str, command: str, outcome: Outcome, usual: int) -> dict[str, Any]:
    """How a case ended, as JSON."""
    return {
        "what": what,
        "code": outcome.code,
        "seconds": 0 if command in SLOW else outcome.seconds,
        "more": outcome.megabytes - usual,
        "problem": problem(command, outcome, usual),
        "said": (outcome.stderr.strip().splitlines() or [""])[-1][:240],
    }


EXPORT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from fuzz.plans import export_small
export_small(Path({folder!r}))
"""

if __name__ == "__main__":
    sys.exit(main())
