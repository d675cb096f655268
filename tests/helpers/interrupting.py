"""What happens to a process at its n-th operation on files: between two of them lies every state of a disk."""

import hashlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

# Of each event of Python's audit hooks that changes files: where its path is, and a directory that it is relative to.
OPERATIONS: dict[str, tuple[int, int | None]] = {
    "open": (0, None),
    "os.mkdir": (0, 2),
    "os.remove": (0, 1),
    "os.rename": (0, 2),
    "os.rmdir": (0, 1),
    "os.truncate": (0, None),
    "shutil.rmtree": (0, None),
}
WRITING = os.O_WRONLY | os.O_RDWR
FILLER = "filler"
# What differs between two undisturbed runs, as keys of JSON files.
OF_THE_DAY = ("started", "peak_memory_bytes", "energy_joules", "versions", "hardware", "machine")


def at_each_operation(root: Path, met: Callable[[int], None]) -> None:
    """From now on call `met` before each operation on files below `root`, and each flush, with its number from 0."""
    numbers, below, within = itertools.count(), f"{root.resolve()}{os.sep}", False

    def meet() -> None:
        nonlocal within
        if not within:  # what `met` does itself does not count
            within = True
            try:
                met(next(numbers))
            finally:
                within = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or (event == "open" and not (arguments[2] or 0) & WRITING):
            return
        at, directory = OPERATIONS[event]
        path = arguments[at]
        relative = directory is not None and arguments[directory] != -1
        if not isinstance(path, int) and (relative or os.path.abspath(os.fsdecode(path)).startswith(below)):
            meet()

    sys.addaudithook(hook)
    flush = os.fsync

    def fsync(file: Any) -> None:
        meet()
        flush(file)

    os.fsync = fsync


def signal_at(root: Path, numbers: Collection[int], number: int, only: int, rank: int) -> None:
    """Send this process a signal before the operations of these numbers, if its rank is `only`."""
    if rank == only:
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        at_each_operation(root, lambda met: os.kill(os.getpid(), number) if met in numbers else None)


def count(root: Path, log: Path, rank: int) -> None:
    """Have the first process leave a byte in a file for each operation."""
    if rank == 0:
        file = log.open("wb", buffering=0)
        at_each_operation(root, lambda met: file.write(b"."))


def fill(disk: Path) -> None:
    """Leave no room on a disk."""
    with (disk / FILLER).open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def made(directory: Path) -> dict[str, str]:
    """Every file below a directory, and its digest."""
    files = (file for file in sorted(directory.rglob("*")) if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(directory)): digest_of(file) for file in files}


def digest_of(file: Path) -> str:
    """sha256 of what a file says, without times and the like; of pages, which are full of these, that they are whole.

    Raises: ValueError for one that is cut.
    """
    data = file.read_bytes()
    if file.suffix == ".html" and not data.rstrip().endswith(b"</html>"):
        raise ValueError("no </html>")
    if file.suffix == ".html" or file.name == "README.md":
        return "a page"
    if file.suffix == ".json":
        data = json.dumps(without_day(json.loads(data)), sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def without_day(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in OF_THE_DAY and "seconds" not in key}
        return {key: without_day(item) for key, item in kept.items()}
    return [without_day(item) for item in value] if isinstance(value, list) else value
