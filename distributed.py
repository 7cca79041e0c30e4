"""Processes: what several of them have to agree on (with one, each function does the plain thing), and their memory."""

import fcntl
import os
import re
import resource
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from config import UserError


def setup_distributed(minutes: float = 30) -> tuple[int, int, torch.device]:
    """Join the process group that torchrun set up, if any; returns rank, world size and device.

    minutes: how long to wait for the other processes, here and whenever they have to agree later.

    Raises:
        UserError: more processes than GPUs, or some that do not come.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"more processes than GPUs: there are {torch.cuda.device_count()}; lower --nproc_per_node")
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "RANK" not in os.environ:
        return 0, 1, device
    try:
        dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=minutes))
    except RuntimeError as error:  # of the store, or of the backend
        raise UserError(f"process {os.environ['RANK']} did not meet all {os.environ['WORLD_SIZE']} processes; it waits for "
                        f"{minutes:g} minutes at most (train.timeout): {str(error).splitlines()[0][:120]}; see that each is "
                        f"started and reaches {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, then start anew; with "
                        f"--max-restarts set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") from error
    return dist.get_rank(), dist.get_world_size(), device


def all_reduce(tensors: list[torch.Tensor], average: bool) -> None:
    """Sum or average tensors over all processes, in place, as one message."""
    if dist.is_initialized() and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        if average:
            flat /= dist.get_world_size()
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))


def gather(value) -> list:
    """The values of all processes, in the order of their ranks; on the CPU, so that no GPU is waited for."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first_process(compute: Callable):
    """What `compute()` gives in the first process, in all of them."""
    return gather(compute() if not dist.is_initialized() or dist.get_rank() == 0 else None)[0]


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, GiB: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss starts at the parent's peak
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 30


def hold(path: Path, wait: bool = False) -> TextIO:
    """Lock a file until what is returned is closed, by the end of this process at the latest.

    wait: for another process that holds it. Raises UserError: another one does, and it is not to be waited for.
    """
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise UserError(f"{path.parent}: another process trains it; wait for its end, or choose another name=...") from None
    return file
