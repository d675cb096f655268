"""Which device, what it has room for, and which number format is fast on it."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "bfloat16", "float32"]


def pick_device() -> torch.device:
    """The GPU that is this process's current one, or the CPU."""
    # With its index: other threads have a current one of their own.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def sums_device(device: torch.device) -> torch.device:
    """Where float64 sums of what `device` computes are kept: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def copying_beside(device: torch.device) -> Iterator[None]:
    """What is copied to a GPU in this block is copied while that computes, into memory that nothing it was given before
    still needs, and is there at the end. A CPU copies as always."""
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
    """A thread to which work can be handed, and whose tensor operations stay in it.

    With OpenMP threads of its own there would be more of them than cores, and then all of them sleep after every
    operation instead of waiting awake: the small operations of the main thread take several times as long.
    """
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(1) as helper:
        helper.submit(_stay_alone).result()
        torch.set_num_threads(num_threads)  # of threads that are yet to come; this one's is what it was
        yield helper


@contextmanager
def one_core_each() -> Iterator[None]:
    """A block with threads of its own, whose tensor operations each stay in their thread.

    OpenMP's threads wait awake after every operation, and so take the cores that other threads could use.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _stay_alone() -> None:
    torch.get_num_threads()  # the first call sets a thread's number to that of all
    torch.set_num_threads(1)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products have hardware of their own; where they do not, they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; `auto` is bfloat16 where `fast_bfloat16`, else float32."""
    if precision == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]


def settle_precision(precision: Precision) -> Precision:
    """What `auto` means on this machine."""
    return "bfloat16" if compute_dtype(precision, pick_device()) == torch.bfloat16 else "float32"
