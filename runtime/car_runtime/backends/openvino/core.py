"""OpenVINO's core, and whether this CPU multiplies bf16 values."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any


def openvino_core() -> Any:
    """A new `openvino.Core` that has loaded its CPU plugin. Raises what OpenVINO raises.

    The plugin is loaded on a thread that ends at once. On Linux it gives the thread that loads it a signal stack
    (sigaltstack), unmaps that when it is unloaded, and puts the earlier one back only on the same thread and if the
    plugins go in reverse order. A thread that lives on is left with a stack that is gone, and as Python's signal
    handlers run on it, the next Ctrl-C is a segmentation fault (OpenVINO 2026.4).
    """
    import openvino

    def load() -> Any:
        core = openvino.Core()
        # Of the CPU alone: to list all devices it would load its plugins for GPUs and NPUs too.
        core.get_property("CPU", "FULL_DEVICE_NAME")
        return core

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(load).result()


def has_bfloat16() -> bool:
    """Whether OpenVINO is installed and would multiply in bfloat16 on this CPU."""
    try:
        return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except Exception:
        return False
