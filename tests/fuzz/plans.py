"""Changed plans through whole commands: each ends with 0 or 2, in one line, in bounded time and memory.

    python tests/fuzz/plans.py --count 10000

What is changed: values and bytes of the manifest, bytes of graphs, weights and goldens with their digests brought up
to date, and what lies in the place of a file. What runs: an image, `--list-classes`, `doctor`, `verify`, and
`build_engines.py` on a plan. Sources are the shipped plan and two small ones of random weights, of formats 1 and 2.

A command is the very function that the program calls, one after the other in a child of this process, which goes on
behind a case that ends it: that takes milliseconds, not seconds. Every 50th is a process of its own. Time is the
CPU's; memory is what a command takes at its peak beyond what it takes on the unchanged plan.
"""

from __future__ import annotations

import argparse
import json
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
COMPILING = "build_engines --target rtx"
"""It takes its time for what is a plan, and has no limit of seconds."""
WHOLE = 50
"""One in so many is a process of its own."""


# Commands.


def commands(plan: Path, folder: Path, key: Path) -> dict[str, list[str]]:
    """Name → program and arguments."""
    image = ["-e", str(plan), "--control", str(CONTROL), "-o", str(folder / "o.png"), "--threads", "1"]
    return {
        "image": ["car_runtime", *image],
        "image, hashes not looked at": ["car_runtime", *image, "--no-verify"],
        "list-classes": ["car_runtime", "-e", str(plan), "--list-classes"],
        "doctor": ["car_runtime", "doctor", str(plan)],
        "verify": ["car_runtime", "verify", str(plan), "--runs", "1", "--warmup", "0", "--threads", "1"],
        "build_engines --sign": ["car_export", str(plan), "--sign", str(key)],
        COMPILING: ["car_export", str(plan), "--target", "rtx", "--sm", "89"],
    }


WEIGHTS_OF_COMMANDS = (30, 5, 20, 12, 22, 10, 0.3)


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


def called(command: Sequence[str], stderr: Path) -> Outcome:
    """A command in this process, whose file descriptors 1 and 2 are taken."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(stderr, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
    sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w", errors="backslashreplace")
    Path("/proc/self/clear_refs").write_text("5")  # its peak begins anew
    began, before, code = time.process_time(), resident("VmRSS"), 99
    signal.setitimer(signal.ITIMER_PROF, 4 * CPU_SECONDS)
    try:
        code = run_here(command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, megabytes = time.process_time() - began, resident("VmHWM") - before
    for stream in (sys.stdout, sys.stderr):
        stream.close()
    return Outcome(code, seconds, megabytes, stderr.read_text(errors="replace"))


def resident(what: str) -> int:
    """Megabytes of this process: VmRSS, now; VmHWM, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) // 1024


def spawned(command: Sequence[str], stderr: Path) -> Outcome:
    """A command as a process of its own."""
    with stderr.open("w") as file:
        process = subprocess.Popen(
            program(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (4 * CPU_SECONDS, 4 * CPU_SECONDS)),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds, megabytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024
    return Outcome(process.returncode, seconds, megabytes, stderr.read_text(errors="replace"))


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
    if (
        outcome.seconds > CPU_SECONDS and name != "build_engines --target rtx"
    ):  # compiling what it was given takes long
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


def spoil(root: Path, rng: random.Random) -> str:
    """Change something of a plan; returns what."""
    graphs = sorted(file.name for file in root.glob("*.onnx"))
    kind = rng.choices(("values", "bytes", "graph", "weights", "goldens", "place"), (45, 8, 30, 7, 5, 5))[0]
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
    name = {"weights": "weights.bin", "goldens": "goldens.npz"}.get(kind) or rng.choice(graphs)
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

    import car_export.cli  # noqa: F401
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
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
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
    wanted = commands(root, folder, folder / "key.pem")
    name = rng.choices(list(wanted), WEIGHTS_OF_COMMANDS)[0]
    run = spawned if i % WHOLE == 0 else called
    usual = folder / f"usual {source.stem} {name} {run.__name__}".replace("/", " ")
    if not usual.exists():
        copied(source, root)
        usual.write_text(str(run(wanted[name], stderr).megabytes))
    copied(source, root)
    what = f"{source.stem} {name}: {spoil(root, rng)}"
    print(json.dumps({"what": what, "command": name}), file=file, flush=True)
    ended = answer(what, name, run(wanted[name], stderr), int(usual.read_text()))
    print(json.dumps(ended), file=file, flush=True)
    if ended["problem"] is not None and arguments.keep is not None:
        shutil.copytree(root, arguments.keep / f"{arguments.seed}-{i}.plan", symlinks=True)


def answer(what: str, command: str, outcome: Outcome, usual: int) -> dict[str, Any]:
    """How a case ended, as JSON."""
    return {
        "what": what,
        "code": outcome.code,
        "seconds": 0 if command == COMPILING else outcome.seconds,
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
