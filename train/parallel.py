"""The processes of a run: what torchrun started, or this one alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """One process among those of the run."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The element-wise sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all of them ask, and get the same answer."""
        if self.world == 1:
            return flag
        raised = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model under DDP; the model itself where there is one process.

        Every trained parameter takes part in every step (media may be absent, modules are not), so that DDP need not
        look for unused ones. Buffers are those of frozen backbones, equal everywhere, and are not sent around.
        """
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # Its successor, from torch 2.13 on, still sends them once, and is missing in older versions.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            return DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )


def without_synchronisation(model: nn.Module, skip: bool) -> AbstractContextManager[None]:
    """Within it DDP keeps gradients to itself: for all micro-batches of a step but the last."""
    return model.no_sync() if skip and isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the process group of torchrun (NCCL on GPUs, Gloo on CPUs) and leave it at the end."""
    world, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Processes(device=device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()
