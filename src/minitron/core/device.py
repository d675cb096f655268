"""Which device, what it has room for, which number format is fast on it, and which software runs there."""

import os
import platform
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "bfloat16", "float32"]


def pick_device() -> torch.device:
    """The GPU that is this process's current one, or the CPU."""
    # With its index: other threads have a current one of their own.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def versions() -> dict[str, str]:
    """Of all that results depend on."""
    names = ("minitron", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def forget_peak_memory() -> None:
    """Start the kernel's high-water mark anew, where it lets us; else the record holds the process's peak so far."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most resident memory of this process, in bytes, since it was last forgotten."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class EnergyCounter:
    """Joules that the processor packages of this machine take from now on, whoever makes them work (Linux powercap).

    Most systems let root alone read the counters. GPUs are not among them.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")):
        packages = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._start: dict[Path, int] = {}
        with suppress(OSError, ValueError):
            self._start = {zone: int((zone / "energy_uj").read_text()) for zone in packages}

    def joules(self) -> float | None:
        """None where the machine does not tell."""
        total = 0
        for zone, start in self._start.items():
            used = int((zone / "energy_uj").read_text()) - start
            # The counter starts again from zero at its end, on a busy server in an hour or less.
            total += used if used >= 0 else used + int((zone / "max_energy_range_uj").read_text())
        return total / 1e6 if self._start else None


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


def matmul_flops_per_second(dtype: torch.dtype, size: int = 2048) -> float:
    """Speed of a large square matrix product on this device: the best of a few."""
    device = pick_device()
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def bytes_per_second(megabytes: int = 128) -> float:
    """Bandwidth of this device's memory, as a matrix-vector product reads it: the best of a few."""
    device = pick_device()
    matrix = torch.ones(megabytes << 8, 1024, device=device)
    vector = torch.ones(1024, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ vector)[0].item()
        best = min(best, time.perf_counter() - start)
    return matrix.nbytes / best
