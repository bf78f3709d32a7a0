"""Several processes as one: the only place that touches torch.distributed.

The processes are started by torchrun, whose environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) says
who is who. Without it there is one process and every function here is the trivial one. Tensors on the GPU travel over
NCCL; tensors in host memory and Python objects travel over gloo, so that gathering detections takes no GPU memory.
"""

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrcnn.config import ConfigError
from fastrcnn.models import resolve_device

T = TypeVar("T")
# rank 0 evaluates alone while the others wait, so the limit must exceed the longest evaluation
TIMEOUT = timedelta(minutes=60)
_sessions = itertools.count()


def rank() -> int:
    """Number of this process, 0 … world_size() − 1."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes that torchrun started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and messages."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this process is the first one of its machine."""
    return world_size() == 1 or int(os.environ.get("LOCAL_RANK", "0")) == 0


def local_device(name: str) -> torch.device:
    """The device of MODEL.DEVICE for this process: under torchrun, a GPU is the one numbered LOCAL_RANK.

    ConfigError, naming MODEL.DEVICE, for a GPU that is not there; under torchrun in every process of a machine with
    fewer GPUs than processes, so that none waits for the others.
    """
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else device.index
    index = torch.cuda.current_device() if index is None else index
    found = torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1
    if processes > found:
        raise ConfigError(
            f"MODEL.DEVICE is {name!r} and each process needs its own GPU, but {processes} processes run here and "
            f"there are {found} GPUs: start torchrun with --nproc_per_node={found}, or use MODEL.DEVICE cpu"
        )
    if index >= found:
        raise ConfigError(f"MODEL.DEVICE is {name!r} and this process needs GPU {index}, but there are {found}")
    return torch.device("cuda", index)


@contextmanager
def session(device_name: str) -> Iterator[torch.device]:
    """Joins the processes of torchrun for the length of the block and gives this process's device. May be nested.

    Every process enters the same sessions in the same order.
    """
    device = local_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() == 1 or dist.is_initialized():
        yield device
        return
    # torchrun's store outlives the session, so each session keeps its keys apart from those of the one before
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(f"session {next(_sessions)}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    yield device
    dist.destroy_process_group()  # after an error not: NCCL would wait for what the other ranks no longer do


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # a host tensor, so gloo: NCCL's barrier would occupy the GPU


@contextmanager
def main_first() -> Iterator[None]:
    """Lets rank 0 run the block alone and the others after it, for what is made or downloaded once and then read by
    all."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def from_main(function: Callable[[], T]) -> T:
    """Runs the function on rank 0 alone and gives its result, or raises its exception, on every rank."""
    if not dist.is_initialized():
        return function()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = function()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def gather_objects(value: Any) -> list[Any] | None:
    """The values of all ranks in the order of the ranks, on rank 0; None elsewhere. Only rank 0 holds more than its
    own."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * world_size() if is_main() else None
    dist.gather_object(value, gathered, dst=0)
    return gathered


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over the ranks, element by element, on every rank: for losses that are logged, and so that all ranks see
    the same NaN."""
    if not dist.is_initialized():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every rank the buffers of rank 0: each has its own statistics of batch norm, and rank 0 writes the
    checkpoints."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def wrap(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel, which averages gradients over the ranks; the model itself where there is
    one process.

    Shapes are fixed, so every parameter takes part in every step whatever the images hold and no search for unused
    ones is needed.
    """
    if not dist.is_initialized():
        return model
    # weights of 1×1 convolutions have two valid layouts, and their gradients may come in the other: a tiny copy
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    ddp = nn.parallel.DistributedDataParallel
    # torch 2.15 has a new name for the option
    option = "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
    return ddp(model, gradient_as_bucket_view=True, **{option: False})


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
