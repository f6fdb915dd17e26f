"""Compile every variant for every target and write what the runtime launches: `make kernels`, no GPU needed.

    python -m car_kernels.build                      writes runtime/car_runtime/backends/cuda/cubins/
    python -m car_kernels.build --check              compiles again and compares, byte for byte

For each target `smNN.xz` holds its cubins one after the other, compressed; `kernels.json` says where each lies, what
it is launched with, and what it uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

CUBINS = Path(__file__).parents[2] / "runtime" / "car_runtime" / "backends" / "cuda" / "cubins"
TRITON = "3.8.0"
"""The version whose compiler made the cubins that are in the tree; another makes other bytes."""
_ENVIRONMENT = {
    "TRITON_DISABLE_LINE_INFO": "1",  # no paths of this machine in the cubins
    "TRITON_DEFAULT_FP_FUSION": "1",
    "TRITON_INTERPRET": "0",
}
WAITS_FROM = 90
"""The first target whose kernels may start while the one before ends: programmatic dependent launch."""
_WAIT = "griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;"
"""What such a kernel begins with: the next one may start too, and: wait until all that was before is done."""
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_MEMORY_OR_BRANCH = re.compile(r"(LD|LDG|LDGSTS|ST|STG|REDG?|ATOMG?|UBLKCP|UTMA\w*|BRA|BRX|EXIT)\b")
_OPERATION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+(?:\.[A-Z0-9_x]+)*)")


def compile_variant(name: str, target: int) -> tuple[str, bytes, dict[str, Any]]:
    """(kernel's symbol, cubin, what it uses). Triton must have been imported without its interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from car_kernels.variants import variants

    variant = variants()[name]
    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.arguments[n] for n in names}
    source = ASTSource(
        variant.kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in variant.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in variant.multiples},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    triton.knobs.runtime.add_stages_inspection_hook = _stages
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    metadata = made.metadata
    scratch = (metadata.global_scratch_size, metadata.profile_scratch_size or 0)
    if scratch != (0, 0) or metadata.num_ctas != 1:
        raise RuntimeError(f"{name} on sm{target} wants scratch memory {scratch} or clusters, which no launch gives")
    cubin = bytes(made.asm["cubin"])
    facts = {"shared": metadata.shared, "threads": 32 * metadata.num_warps, **uses(cubin)}
    if facts["waits"] != (target >= WAITS_FROM):
        raise RuntimeError(f"{name} on sm{target} does not wait for the kernel before it first of all")
    return metadata.name, cubin, facts


def _stages(*given: Any) -> tuple[str, str] | None:
    """Triton's hook to change its stages; without arguments: what becomes part of its cache's key."""
    if not given:
        return _WAIT, _WAIT
    stages, target = given[1], given[4]
    if target >= WAITS_FROM:
        make_ptx = stages["ptx"]
        stages["ptx"] = lambda source, metadata: _waiting(make_ptx(source, metadata))
    return None


def _waiting(ptx: str) -> str:
    """A kernel's assembly with `_WAIT` in front of its first instruction."""
    found, count = re.subn(r"^// %bb\.0:.*$", rf"\g<0>\n\t{_WAIT}", ptx, flags=re.MULTILINE)
    assert count == 1, ptx
    return found


def waits(operations: Sequence[str]) -> bool:
    """Whether instructions wait for the kernel before this one ahead of all branches and all of the memory's use."""
    if "ACQBULK" not in operations:
        return False
    early = operations[: operations.index("ACQBULK")]
    return not any(_MEMORY_OR_BRANCH.match(name) for name in early)


def uses(cubin: bytes) -> dict[str, int | bool]:
    """Registers a thread, bytes spilled, and counts of instructions, by the tools that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _output(tools() / "cuobjdump", "--dump-resource-usage", file.name)
        assembly = _output(tools() / "nvdisasm", "-c", file.name)
    found = _RESOURCES.search(resources)
    assert found is not None, resources
    sequence = [m[1] for m in map(_OPERATION.match, assembly.splitlines()) if m]
    operations = Counter(sequence)

    def count(pattern: str) -> int:
        return sum(number for name, number in operations.items() if re.match(pattern, name))

    return {
        "registers": int(found[1]),
        "stack": int(found[2]) + int(found[4]),
        "spills": count(r"(LDL|STL)\b"),
        "tensor": count(r"(HMMA|HGMMA|UTCHMMA)\b"),
        "loads_16": count(r"LDG(STS)?\b.*\b128\b"),
        "loads": count(r"LDG(STS)?\b"),
        "waits": waits(sequence),
    }


def tools() -> Path:
    """The folder of NVIDIA's programs that Triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def _compile(job: tuple[str, int]) -> tuple[str, int, tuple[str, bytes, dict[str, Any]]]:
    return (*job, compile_variant(*job))


def build(targets: list[int], names: list[str], jobs: int) -> tuple[dict[str, Any], dict[int, bytes]]:
    """(the manifest, target → its cubins one after the other)."""
    from car_kernels.variants import SHARED_LIMITS, variants

    known = variants()
    with ProcessPoolExecutor(jobs) as pool:
        done = {(name, t): made for name, t, made in pool.map(_compile, [(n, t) for t in targets for n in names])}
    kernels: dict[str, Any] = {}
    whole: dict[int, bytes] = {target: b"" for target in targets}
    for name in names:
        variant = known[name]
        per_target = {}
        for target in targets:
            symbol, cubin, facts = done[name, target]
            if facts["shared"] > SHARED_LIMITS[target]:
                raise RuntimeError(f"{name} takes {facts['shared']} bytes of shared memory, more than sm{target} has")
            place = {"offset": len(whole[target]), "bytes": len(cubin), "sha256": hashlib.sha256(cubin).hexdigest()}
            whole[target] += cubin
            per_target[f"sm{target}"] = {"symbol": symbol, **place, **facts}
        kernels[name] = {
            "kernel": variant.kernel_name,
            "arguments": variant.arguments,
            "multiples": variant.multiples,
            "constants": variant.constants,
            "product": variant.product,
            "targets": per_target,
        }
    return {"format": 1, "triton": TRITON, "kernels": kernels}, whole


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m car_kernels.build", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the tree's cubins come out")
    parser.add_argument("--only", metavar="KERNEL", help="with --check: variants of one kernel alone")
    parser.add_argument("--targets", default="", metavar="SM,…", help="with --check: some targets alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    options = parser.parse_args(arguments)
    os.environ.update(_ENVIRONMENT)
    import triton

    from car_kernels.variants import TARGETS, variants

    if triton.__version__ != TRITON:
        print(f"triton is {triton.__version__}; run: pip install triton=={TRITON}", file=sys.stderr)
        return 2
    names = [n for n, v in variants().items() if not options.only or v.kernel_name == options.only]
    targets = [int(t) for t in options.targets.split(",") if t] or list(TARGETS)
    with tempfile.TemporaryDirectory() as cache:  # nothing compiled before counts
        os.environ["TRITON_CACHE_DIR"] = cache
        manifest, whole = build(targets, names, options.jobs)
    return check(manifest) if options.check else write(manifest, whole)


def check(manifest: dict[str, Any]) -> int:
    """Compare with what is in the tree, by hash and by facts."""
    there = json.loads((CUBINS / "kernels.json").read_text(encoding="utf-8"))["kernels"]
    bad = 0
    for name, kernel in manifest["kernels"].items():
        old = there.get(name, {"targets": {}})
        for target, facts in kernel["targets"].items():
            same = {k: v for k, v in facts.items() if k != "offset"} == {
                k: v for k, v in old["targets"].get(target, {}).items() if k != "offset"
            }
            if not same or {k: v for k, v in kernel.items() if k != "targets"} != {
                k: v for k, v in old.items() if k != "targets"
            }:
                print(f"{name} on {target} is not what is in {CUBINS.name}", file=sys.stderr)
                bad += 1
    total = sum(len(kernel["targets"]) for kernel in manifest["kernels"].values())
    print(f"{total - bad} of {total} cubins are the ones in the tree")
    return 1 if bad else 0


def write(manifest: dict[str, Any], whole: dict[int, bytes]) -> int:
    """Put everything into the runtime's folder."""
    CUBINS.mkdir(exist_ok=True)
    for target, cubins in whole.items():
        path = CUBINS / f"sm{target}.xz"
        path.write_bytes(lzma.compress(cubins, preset=9 | lzma.PRESET_EXTREME))
        print(f"{path.name}: {len(manifest['kernels'])} cubins, {len(cubins):,} bytes, {path.stat().st_size:,} here")
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (CUBINS / "kernels.json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
