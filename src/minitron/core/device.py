"""The device that this process computes on, its free memory, and the number format that is fast on it."""

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["auto", "bfloat16", "float32"]
DeviceType = Literal["cpu", "cuda"]

_planned: ContextVar[DeviceType] = ContextVar("planned", default="cpu")


def pick_device() -> torch.device:
    """This process's current GPU, or the CPU if there is none."""
    # With its index, because the current GPU differs between threads.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def planning_for(device: DeviceType) -> Iterator[None]:
    """In this block, tensors on the CPU stand for those of a device of this type."""
    token = _planned.set(device)
    try:
        yield
    finally:
        _planned.reset(token)


def on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is worked on by a CPU, or stands for one that would be."""
    return tensor.is_cpu and _planned.get() == "cpu"


def free_bytes(device: torch.device) -> int:
    """The memory that can be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def failed_allocations() -> Iterator[list[str]]:
    """Let an allocation that fails only end the block; its message is then in the list that the block was given.

    The error itself, which holds what the block had allocated, is gone then.
    """
    said: list[str] = []
    try:
        yield said
    except (RuntimeError, MemoryError) as error:
        of_cpu = "can't allocate memory" in str(error)  # which has no class of its own
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not of_cpu:
            raise
        said.append(" ".join(str(error).split()) or "out of memory")


def give_back_memory(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device, so that pieces of other sizes can be allocated."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def sums_device(device: torch.device) -> torch.device:
    """The device for float64 sums of values on `device`: the CPU for Apple's GPUs, which have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def copying_beside(device: torch.device) -> Iterator[None]:
    """In this block, copies to a GPU run while it computes, into memory that no earlier work needs, and are complete at
    the end. On a CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@contextmanager
def helper_thread() -> Iterator[ThreadPoolExecutor]:
    """Yield a second thread for work, whose tensor operations use this thread only.

    With more OpenMP threads than cores, all of them would sleep after every operation instead of spinning, and the
    small operations of the main thread would take several times as long.
    """
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(1) as helper:
        helper.submit(_stay_alone).result()
        torch.set_num_threads(num_threads)  # for threads that start later; the number of this thread has not changed
        yield helper


@contextmanager
def one_core_each() -> Iterator[None]:
    """A block that runs several threads, in which the tensor operations of each use that thread only.

    OpenMP's threads spin after every operation, and would take the cores from the other threads.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _stay_alone() -> None:
    torch.get_num_threads()  # the first call in a thread sets its number to the global one
    torch.set_num_threads(1)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes bfloat16 products; where it does not, they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; `auto` is bfloat16 where `fast_bfloat16` holds, else float32."""
    if precision == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]


def settle_precision(precision: Precision) -> Precision:
    """Replace `auto` by the precision that it means on this machine."""
    return "bfloat16" if compute_dtype(precision, pick_device()) == torch.bfloat16 else "float32"
