"""cuda-python's real module of the driver, over a driver that says what it was given (fixtures/libcuda.c)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from car_runtime.backends.cuda.kernels import kernels

FIXTURES = Path(__file__).parents[1] / "fixtures"
RUNTIME = Path(__file__).parents[2] / "runtime"
NAMES = ("qkv.m.d64", "fuse.m", "qkv.s.d64", "fusion_norm.row")
"""Little and much shared memory; numbers of 32 and 64 bits."""
PROGRAM = """
import ctypes, sys, threading
from cuda.bindings import driver
from car_runtime.backends.cuda.driver import CudaDevice, CudaError
from car_runtime.backends.cuda.kernels import kernels, read_cubins
from car_runtime.system.gpu import Gpu

class Device(CudaDevice):
    # The runtime's part is left out: that library is within cuda-python, and wants a real driver.
    def _call(self, name, *arguments):
        if name == "cudaSetDevice":
            driver.cuCtxSetCurrent(driver.CUcontext(0xC0))
        return 7 if name == "cudaStreamCreateWithFlags" else None

import car_runtime.backends.cuda.driver as ours
gpu = Gpu(name="GPU", capability=(9, 0), memory_bytes=1, count=1, driver="13.0", runtime="13.0")
ours.probe = lambda: gpu
library = ctypes.CDLL("libcuda.so.1")
device, names = Device(), sys.argv[1:]
code = read_cubins("sm90")
device.load_kernels({name: code[name] for name in names})

def put(name):
    kinds = list(kernels()[name].arguments.values())
    library.expect("".join("4" if kind == "i32" else "8" for kind in [*kinds, "", ""]).encode())
    values = [2**31 - 1 - i if kind == "i32" else 2**46 * i for i, kind in enumerate(kinds)]
    device.put_kernel(name, (3, 2, 1), values)

for name in names:
    put(name)
other = threading.Thread(target=put, args=names[-1:])
other.start()
other.join()
for status in (2, 209):
    library.fail(status)
    try:
        device.load_kernels({name: code[name] for name in names})
    except CudaError as error:
        print("error", error.out_of_memory, error, flush=True)
device.close()
"""


def said(folder: Path) -> list[str]:
    """What the driver was given, and what failed, in order."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("no gcc to make the driver with")
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    made = ["gcc", "-shared", "-fPIC", str(FIXTURES / "libcuda.c"), "-o", str(folder / "libcuda.so.1")]
    subprocess.run(made, check=True, timeout=60)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(RUNTIME)}
    command = [sys.executable, "-c", PROGRAM, *NAMES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


def test_the_driver_gets_every_launch_as_the_cubin_takes_it(tmp_path: Path) -> None:
    """Also from another thread; what was loaded is let go; what fails names its remedy."""
    lines = said(tmp_path)
    errors = [line for line in lines if line.startswith("error")]
    assert errors == [
        "error True CUDA failed in cuModuleLoadData: in words; close other programs that use the GPU, or use a plan "
        "with smaller batches",
        "error False CUDA failed in cuModuleLoadData: in words; upgrade the driver, or use --backend ort-cuda",
    ]
    described = [kernels()[name] for name in NAMES]
    on_gpu = [kernel.targets["sm90"] for kernel in described]
    assert [line for line in lines if line.startswith("function")] == [
        f"function {i} {kernel.kernel}" for i, kernel in enumerate(described, 1)
    ]
    large = [(i, binary.shared) for i, binary in enumerate(on_gpu, 1) if binary.shared > 48 * 1024]
    assert large
    assert [line for line in lines if line.startswith("attribute")] == [f"attribute {16 + i} 8 {s}" for i, s in large]
    launches = []
    for i, (kernel, binary) in enumerate(zip(described, on_gpu, strict=True), 17):
        kinds = list(kernel.arguments.values())
        values = [2**31 - 1 - at if kind == "i32" else 2**46 * at for at, kind in enumerate(kinds)]
        # Kernels that wait may start early; two addresses of scratch memory follow.
        facts = f"launch {i} 3x2x1 {binary.threads}x1x1 {binary.shared} 0x7 1 early 6 1 :"
        launches.append(" ".join([facts, *map(str, values), "0 0"]))
    assert [line for line in lines if line.startswith("launch")] == [*launches, launches[-1]]
    assert sorted(line for line in lines if line.startswith("unload")) == [f"unload {i}" for i in range(1, 5)]
