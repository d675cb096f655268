"""Large files, read and written past the page cache where the system allows it (Linux, O_DIRECT).

Weights are read once and written once, so the cache would hold bytes that are not read again, and filling it can cost
more time than the disk. Where there is no O_DIRECT, the same bytes go through the cache.
"""

import errno
import fcntl
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

CHUNK_BYTES = 4 << 20  # of one read or write: larger ones are no faster, and leave the processor's cache
ALIGNED = 4096  # O_DIRECT needs addresses, offsets and lengths in whole blocks of the disk: 512 or 4096 bytes
AHEAD = 2  # items that are made in advance
Item = TypeVar("Item")
_END = object()


def ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """The same items, made in another thread and AHEAD of them in advance.

    An error of an item is raised when the caller asks for it. The thread ends when the caller stops.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, _END) for _ in range(AHEAD))
        try:
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(thread.submit(next, items, _END))
                yield item  # type: ignore[misc]
        finally:
            for future in waiting:
                future.cancel()
            thread.submit(items.close).result()  # in the thread, which may be at work when the caller is interrupted


def buffers() -> Iterator[UInt8[Tensor, " bytes"]]:
    """An endless cycle of a few buffers for the items of one `ahead`; each holds CHUNK_BYTES from anywhere in a file.

    AHEAD items wait or are being made while the caller has one item, which must not be used after the next is taken.
    """
    return cycle([aligned_bytes(CHUNK_BYTES + 2 * ALIGNED) for _ in range(AHEAD + 1)])


def aligned_bytes(num_bytes: int) -> UInt8[Tensor, " bytes"]:
    """Allocate uninitialised memory that O_DIRECT can read into."""
    memory = torch.empty(num_bytes + ALIGNED, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNED
    return memory[start : start + num_bytes]


def read_range(
    file: int, start: int, stop: int, buffer: UInt8[Tensor, " size"] | None = None
) -> UInt8[Tensor, " bytes"]:
    """Read the bytes [start, stop) of an open file, or fewer if it ends before; into `buffer` if they fit."""
    low = start - start % ALIGNED
    size = stop - low + -(stop - low) % ALIGNED
    if buffer is None or len(buffer) < size:
        buffer = aligned_bytes(size)
    view = buffer.numpy().data[:size]
    filled = 0
    while low + filled < stop and (count := _transfer(os.preadv, file, [view[filled:]], low + filled)):
        filled += count
    return buffer[start - low : max(start - low, min(stop - low, filled))]


def write_file(path: Path, parts: Generator[UInt8[Tensor, " _"], None, None]) -> str:
    """Write a file from parts of any length, each of which is used before the next is made; returns its sha256."""
    digest = hashlib.sha256()
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file, closing(ahead(_blocks(parts))) as blocks:
        for block in blocks:
            view = block.numpy().data
            digest.update(view)
            while view:
                view = view[_transfer(os.write, file, view) :]
    return digest.hexdigest()


def digest_file(path: Path) -> str:
    """The sha256 of a file's content."""
    digest = hashlib.sha256()
    with opened(path, os.O_RDONLY) as file, closing(ahead(_read_all(file))) as blocks:
        for block in blocks:
            digest.update(block.numpy().data)
    return digest.hexdigest()


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file whose reads and writes bypass the page cache, where the file system supports it."""
    try:
        file = os.open(path, flags | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the answer of file systems and devices without O_DIRECT
            raise
        file = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Size, modification time and inode: while they are the same, so is the content, as git's index assumes too."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def _transfer(call: Callable[..., int], file: int, *arguments: Any) -> int:
    """Read or write some bytes and return their number; where O_DIRECT cannot, the cache is used from now on."""
    try:
        return call(file, *arguments)
    except OSError as error:
        # The length or offset is no multiple of the disk's blocks: the end of a file, or blocks larger than ALIGNED.
        if error.errno != errno.EINVAL or sys.platform != "linux":
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)
        return call(file, *arguments)


def _read_all(file: int) -> Generator[UInt8[Tensor, " bytes"], None, None]:
    start = 0
    for buffer in buffers():
        block = read_range(file, start, start + CHUNK_BYTES, buffer)
        if not len(block):
            return
        yield block
        start += len(block)


def _blocks(parts: Iterable[UInt8[Tensor, " _"]]) -> Generator[UInt8[Tensor, " bytes"], None, None]:
    """The bytes of all parts, CHUNK_BYTES at a time."""
    room = buffers()
    block, filled = next(room), 0
    for part in parts:
        taken = 0
        while taken < len(part):
            count = min(len(part) - taken, CHUNK_BYTES - filled)
            block[filled : filled + count] = part[taken : taken + count]
            taken, filled = taken + count, filled + count
            if filled == CHUNK_BYTES:
                yield block[:filled]
                block, filled = next(room), 0
    if filled:
        yield block[:filled]
