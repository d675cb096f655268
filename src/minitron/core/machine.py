"""The machine that work runs on: hardware, versions, memory, energy and speed."""

import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from minitron.core.device import pick_device


def versions() -> dict[str, str]:
    """The versions of the software that results depend on."""
    names = ("minitron", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: _version_of(name) for name in names}


@cache
def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # as where the sources are on the path


def forget_peak_memory() -> None:
    """Reset the kernel's memory high-water mark where it is allowed; else the peak is that of the whole process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The peak resident memory of this process in bytes, since the last `forget_peak_memory`."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class EnergyCounter:
    """Counts the energy of this machine's processor packages from now on, for all processes (Linux powercap).

    Most systems let only root read the counters. GPUs are not counted.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")):
        packages = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._start: dict[Path, int] = {}
        with suppress(OSError, ValueError):
            self._start = {zone: int((zone / "energy_uj").read_text()) for zone in packages}

    def joules(self) -> float | None:
        """The energy in joules; None where the counters cannot be read."""
        total = 0
        for zone, start in self._start.items():
            used = int((zone / "energy_uj").read_text()) - start
            # The counter wraps around to zero, on a busy server within an hour.
            total += used if used >= 0 else used + int((zone / "max_energy_range_uj").read_text())
        return total / 1e6 if self._start else None


def matmul_flops_per_second(dtype: torch.dtype, size: int = 2048) -> float:
    """The speed of a large square matrix product on this device, as the best of several."""
    matrix = torch.ones(size, size, dtype=dtype, device=pick_device())
    return 2 * size**3 / _best_seconds(lambda: (matrix @ matrix)[0, 0].item())


def bytes_per_second(megabytes: int = 128) -> float:
    """The memory bandwidth of this device in a matrix-vector product, as the best of several."""
    device = pick_device()
    matrix = torch.ones(megabytes << 8, 1024, device=device)
    vector = torch.ones(1024, device=device)
    return matrix.nbytes / _best_seconds(lambda: (matrix @ vector)[0].item())


def _best_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def compiler_command() -> str:
    """Return the command by which torch.compile calls a C++ compiler; it may be missing."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def has_compiler() -> bool:
    """Return whether torch.compile can make code for a CPU here."""
    return shutil.which(compiler_command()) is not None


def hardware() -> dict[str, str | int]:
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
