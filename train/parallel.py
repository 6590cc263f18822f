"""The processes of a run, and how they share the work: one process, DDP or FSDP2, as the recipe says.

`prepare` makes the model ready before the optimizer is built; `state.model` stays what it was, a Flamingo, and what the
loop calls is what `prepare` returns. What is done is the same in all kinds, so losses differ by rounding alone:

| part | one process, ddp | fsdp |
|---|---|---|
| frozen decoder layers | whole | shared out, gathered one at a time |
| gated blocks | whole | shared out, gathered one at a time |
| resampler, and the blocks' projections of media | whole | shared out, gathered as one |
| embeddings, head, norms, new tokens (tied ones lie together) | whole | shared out, gathered for the whole step |
| trained vision tower | whole | as these: it is there without a call |
| frozen vision tower | whole | whole |

A frozen tower has no gradient and no optimizer state to share out; and a process without images, which does not call
it, would miss a collective that others wait in.

Matrix products in bfloat16 are torch.autocast's in every kind: parameters that train, their gradients, the sums over
processes and the optimizer's state stay float32.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from flamingo import FlamingoForConditionalGeneration
from flamingo.cross_attention import GatedCrossAttention
from flamingo.errors import FlamingoError
from flamingo.modeling import decoder_layers
from train.recipe import ParallelRecipe

_LETTING_GO = 0.3
"""Seconds."""


@dataclass(frozen=True)
class Processes:
    """One process among those of the run."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: timedelta | None = None
    """how long one waits for another that does not answer; None: torch's own limit, half an hour"""

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
        return bool(self.most(float(flag)))

    def most(self, number: float) -> float:
        """The largest of what the processes give; all of them ask."""
        if self.world == 1:
            return number
        largest = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def gather(self, thing: Any) -> list[Any]:
        """What every process gives, by ranks: plain data, pickled and slow."""
        if self.world == 1:
            return [thing]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, thing)
        return everyone

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


def meeting_place(timeout: timedelta) -> dist.Store:
    """torchrun's store, with a room of its own for each restart: addresses of the dead stay in it (pytorch#135712).

    Several hosts do not count restarts alike: there `train/recipes/multinode.sh` turns the sharing off.
    """
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return dist.PrefixStore(f"restart-{restarts}", store)


@contextmanager
def processes(timeout: float = ParallelRecipe.timeout) -> Iterator[Processes]:
    """Join the process group of torchrun (NCCL on GPUs, and Gloo beside it for what lies on CPUs) and leave it at last.

    Args:
        timeout: seconds after which waiting for a process that does not answer is an error.
    """
    world, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Processes(device=device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    place = meeting_place(limit)
    dist.init_process_group(backend, store=place, rank=int(os.environ["RANK"]), world_size=world, timeout=limit)
    try:
        yield Processes(dist.get_rank(), world, device, limit)
    finally:
        dist.destroy_process_group()
        # DDP and FSDP2 keep Gloo's threads alive past this. One that still holds a tensor when Python is taken down
        # aborts the process, one time in ten, after all is done; asleep, this thread lets them go.
        time.sleep(_LETTING_GO)


def prepare(model: FlamingoForConditionalGeneration, recipe: ParallelRecipe, processes: Processes) -> nn.Module:
    """Place the model, share it out as the recipe says, and return what the loop calls.

    Call it before the optimizer is built: fsdp exchanges the model's parameters for shards of them. Afterwards the
    model is on `processes.device` (with `cpu_offload`, shards are not).

    Raises:
        FlamingoError: where the recipe asks for what cannot be.
    """
    recipe.check()
    if recipe.frozen_in_bfloat16:
        store_frozen_in_bfloat16(model)
    if recipe.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    sharded = recipe.kind == "fsdp" and processes.world > 1
    if sharded:
        shard(model, processes, offload=recipe.cpu_offload)
    else:
        model.to(processes.device)
    plain = recipe.precision == "float32" and not recipe.compile
    forward = model if plain else Forward(model, recipe, processes.device)
    return forward if sharded else replicate(forward, processes)


class Forward(nn.Module):
    """A Flamingo's forward pass in the precision of the recipe, compiled where it says so."""

    def __init__(self, model: FlamingoForConditionalGeneration, recipe: ParallelRecipe, device: torch.device):
        super().__init__()
        self.model = torch.compile(model, dynamic=True) if recipe.compile else model
        self.compiled = recipe.compile
        self.device, self.autocast = device.type, recipe.precision == "bfloat16"

    def forward(self, **inputs: Any) -> Any:
        """As the Flamingo's own.

        Raises:
            FlamingoError: where it cannot be compiled.
        """
        if self.compiled and "media_per_sample" in inputs:  # the graph may not ask
            inputs["media_slots"] = int(inputs["media_per_sample"].max())
        try:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                return self.model(**inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            first = next(iter(str(error).splitlines()), "")
            raise FlamingoError(
                f"parallel.compile: this model cannot be compiled here ({type(error).__name__}: {first}); "
                "expected parallel.compile=false"
            ) from error


def replicate(model: nn.Module, processes: Processes) -> nn.Module:
    """The model under DDP; the model itself where there is one process.

    Every trained parameter takes part in every step (media may be absent, modules are not), so that DDP need not look
    for unused ones. Buffers are those of frozen backbones, equal everywhere, and are not sent around.
    """
    if processes.world == 1:
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Its successor, from torch 2.13 on, still sends them once, and is missing in older versions.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(model: FlamingoForConditionalGeneration, processes: Processes, *, offload: bool = False) -> None:
    """Share the model's parameters out over the processes, in place, with FSDP2; the table above says which how.

    A gated block's projection of media lies with the resampler and not with its block: it is called before the LM, so
    that the block would be gathered twice.
    """
    # OPT's layers do; nothing is written into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    tower = set(model.vision_tower.parameters())
    ignored = tower if not any(parameter.requires_grad for parameter in tower) else set()
    options: dict[str, Any] = {
        "mesh": init_device_mesh(processes.device.type, (processes.world,)),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
    }
    blocks = cast(list[GatedCrossAttention], list(model.cross_attention))
    fully_shard([model.resampler, *(block.attn.to_kv for block in blocks)], **options)
    for module in (*blocks, *decoder_layers(model.language_model, model.config.decoder_layers)):
        fully_shard(module, **options)
    if not ignored:  # FSDP2 takes no convolutions that are channels last
        model.vision_tower.to(memory_format=torch.contiguous_format)
    fully_shard(model, ignored_params=ignored, **options)
    if ignored:
        model.vision_tower.to(processes.device)


def store_frozen_in_bfloat16(model: FlamingoForConditionalGeneration) -> None:
    """Store the frozen parameters of the backbones in bfloat16, those of 4 bits excepted.

    Their buffers stay as they are (rotary frequencies lose positions in bfloat16), and so do batch norms.
    """
    for backbone in model.backbones().values():
        for module in backbone.modules():
            if not isinstance(module, _NormBase):
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad and parameter.is_floating_point():
                        parameter.data = parameter.data.to(torch.bfloat16)


def sharded_root(model: nn.Module) -> FSDPModule | None:
    """The outermost module that FSDP2 shares out; None where there is none."""
    return next((module for module in model.modules() if isinstance(module, FSDPModule)), None)


@contextmanager
def without_synchronisation(model: nn.Module, skip: bool) -> Iterator[None]:
    """Within it processes keep gradients to themselves: for all micro-batches of a step but the last.

    Under FSDP2 gradients then lie whole in every process until the last micro-batch.
    """
    if (root := sharded_root(model)) is not None:
        root.set_requires_gradient_sync(not skip)
    apart: AbstractContextManager[None] = nullcontext()
    if skip and isinstance(model, DistributedDataParallel):
        apart = model.no_sync()
    with apart:
        yield


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it every process holds all parameters, and may call any method of the model without the others.

    For evaluation; without gradients. All processes enter and leave together. Without FSDP2 it does nothing.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def hold(held: bool) -> None:
        for number, module in enumerate(shards):
            module.set_reshard_after_forward(not held and number > 0, recurse=False)
            if held:
                module.unshard()
            else:
                module.reshard()
            # By this mark transformers' `generate` would go on until the slowest process is done.
            cast(Any, module)._is_fsdp_managed_module = not held

    hold(True)
    try:
        yield
    finally:
        hold(False)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: all of it, where it is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is shared out; all processes ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
