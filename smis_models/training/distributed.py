"""One process or several: torchrun's environment, and modules wrapped for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those that train together."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` with its gradients averaged over the processes."""
        if self.count == 1:
            return module
        # Some published networks hold parameters that no forward uses. Buffers agree without
        # help: statistics are all-reduced, and equal weights give equal spectral norms.
        return DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the processes."""
        if self.count == 1:
            return values
        dist.all_reduce(values)
        return values / self.count

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            dist.barrier()


def unsynchronized(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Keep gradients apart until the ``last`` micro-batch of a step."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that torchrun started, each with its own device; alone without torchrun.

    A process group that the program has already initialised is used as it is.
    """
    started = not dist.is_initialized() and "LOCAL_RANK" in os.environ
    if started:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size()), device
        else:
            yield Processes(), device
    finally:
        if started:
            dist.destroy_process_group()
