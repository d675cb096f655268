"""What a piece of work ran on and took: hardware, versions, memory, energy, speed."""

import os
import platform
import resource
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minitron.core.device import pick_device


def versions() -> dict[str, str]:
    """Of all that results depend on."""
    names = ("minitron", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


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


def hardware() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
