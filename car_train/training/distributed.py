"""The processes that train together: alone, or started by `torchrun`."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among those that train together. Alone, unless `torchrun` started it."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def join(device: str) -> tuple[World, str]:
        """The world, and this process's device.

        Reads what `torchrun` sets: WORLD_SIZE, RANK, LOCAL_RANK. Collectives by nccl on GPUs, gloo on CPUs.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return World(), device
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return World(dist.get_rank(), size), device

    @staticmethod
    def is_first() -> bool:
        """Whether this process is rank 0, also before it has joined."""
        return os.environ.get("RANK", "0") == "0"

    @staticmethod
    def may_restart() -> bool:
        """Whether `torchrun` starts the processes again when one fails (its --max-restarts)."""
        return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"

    def wrap(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module itself, or what averages its gradients over the processes."""
        if self.size == 1:
            return module
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)

    def mean(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """The mean of every value over the processes."""
        if self.size == 1:
            return values
        summed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        return dict(zip(values, (summed / self.size).tolist(), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in the order of their ranks, on all of them."""
        everyone = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, value)
        return everyone

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def without_exchange(module: nn.Module | None, last: bool) -> AbstractContextManager[None]:
    """Within, gradients of a wrapped module are only summed up here, unless this is the `last` microbatch."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of one tensor over the processes that train together, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def any_of_processes(x: Tensor) -> Tensor:
    """Whether it is true on any process, bool like `x`."""
    if not dist.is_initialized():
        return x
    found = x.to(torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool()


def all_batches(x_B: Tensor) -> Tensor:
    """The batches of all processes as one, in the order of the undivided batch."""
    if not dist.is_initialized():
        return x_B
    x_B = x_B.contiguous()
    each = [torch.empty_like(x_B) for _ in range(dist.get_world_size())]
    dist.all_gather(each, x_B)
    return torch.cat(each)


def broadcast(x: Tensor) -> None:
    """Give every process the first one's values, in place."""
    if dist.is_initialized():
        dist.broadcast(x, 0)
