"""Several processes that train one model: `torchrun --nproc_per_node=2 script.py`, or plain Python, the same code.

Call `process_group()` inside `main()`, never at import: torchrun starts the script once per process.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.training.signals import Interrupted

# How long a process waits for the others. The main one may tokenise, or measure, for hours meanwhile; one that has
# died is no reason to be impatient: torchrun ends the others then.
PATIENCE = timedelta(hours=24)


class World(NamedTuple):
    """This process's number, how many there are, and its number on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def world() -> World:
    """Where this process stands; alone, unless inside `process_group` under torchrun."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


def is_main() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return world().rank == 0


def pick_device(name: str) -> torch.device:
    """The device called "cpu", "cuda" or "auto" (a GPU where there is one); under torchrun each process has its own."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if index >= count:
        raise ValueError(
            f"process {index} on this machine needs GPU {index}, and torch sees {count}: start at most {count} "
            "processes (torchrun --nproc_per_node) or choose device=cpu"
            if count
            else "device=cuda, but torch sees no GPU (torch.cuda.is_available() is False): choose device=auto or cpu"
        )
    return torch.device("cuda", index)


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[World]:
    """Meet the processes that torchrun started (nccl between GPUs, gloo between CPUs) and part from them at the end.

    Without torchrun (no RANK and WORLD_SIZE in the environment) it does nothing. An error leaves without waiting:
    the others hang in a collective call by then, and torchrun ends them when this process dies.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield World()
        return
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield world()
    except Interrupted:  # orderly: all processes stop after the same step
        _leave()
        raise
    _leave()


def _leave() -> None:
    dist.barrier()
    dist.destroy_process_group()


def sum_over_processes(tensor: Tensor) -> Tensor:
    """`tensor`, in place, summed over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks, on every process."""
    values = [value] * world().size
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def from_main(make: Callable[[], Any]) -> Any:
    """What `make` returns in the main process, in every process; the others wait for it.

    An error there is raised everywhere: in the main process as it was, in the others as a ValueError or (for anything
    that is no ValueError or OSError) RuntimeError with its message, so that all end and none hangs.
    """
    value, failure = None, None
    if is_main():
        try:
            value = make()
        except Exception as error:
            failure = error
    if dist.is_initialized():
        message = None if failure is None else (isinstance(failure, (ValueError, OSError)), str(failure))
        shared = [(value, message)]
        dist.broadcast_object_list(shared, src=0)
        value, message = shared[0]
        if message is not None and failure is None:
            raise (ValueError if message[0] else RuntimeError)(message[1])
    if failure is not None:
        raise failure
    return value
