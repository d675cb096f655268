"""Directories and files that appear whole or not at all, and digests of what is in them."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minitron.errors import RunError
from minitron.large_files import digest_file, stamp

_UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
)
ROOM = "free some space or choose another --out"


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False, way_out: str = ROOM) -> Iterator[Path]:
    """A directory to fill, renamed to `path` when the block ends well and removed when it does not.

    What a killed process left under the temporary name is cleared at the next try.

    Args:
        way_out: what the user can do when `path` cannot be written.

    Raises: RunError if `path` cannot be written (it is a file, it holds something and `replace` is not set, the disk
        is full, ...).
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; the output must be a directory: choose another --out")
    if path.is_dir() and any(path.iterdir()) and not replace:
        raise RunError(f"{path} exists and is not empty; remove it, or choose another --out")
    partial = path.with_name(f"{path.name}.partial")
    with readable_os_errors(path, way_out=way_out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in [*partial.rglob("*"), partial]:
                _sync(file)
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def atomic_file(path: Path, *, way_out: str = ROOM) -> Iterator[Path]:
    """A name to write a file under, renamed to `path` when the block ends well and removed when it does not.

    Raises: RunError if `path` cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    with readable_os_errors(path, way_out=way_out):
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def readable_os_errors(path: Path, *, way_out: str = ROOM) -> Iterator[None]:
    """Turn a full disk, a missing permission and their like into one clear error about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise RunError(f"cannot write {path}: {error.strerror}; {way_out}") from error
    except SafetensorError as error:
        # Its errors have no errno, only the number in the text.
        if not any(f"(os error {number})" in str(error) for number in _UNWRITABLE):
            raise
        raise RunError(f"cannot write {path}: {error}; {way_out}") from error


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, indent=2))


def write_text(path: Path, text: str, *, way_out: str = ROOM) -> None:
    """Write a file so that readers see the old one or the new one, never a part."""
    with atomic_file(path, way_out=way_out) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def digest_files(files: Iterable[Path], cache: dict[str, Any]) -> str:
    """sha256 over the names and contents of files.

    `cache` remembers each file's digest by (size, mtime, inode), as git's index does: a 16 GB model is read once.
    """
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.name}\0{_cached_digest(file, cache)}\n".encode())
    return total.hexdigest()


def remember_digest(file: Path, digest: str, cache: dict[str, Any]) -> None:
    """Put into a cache of digests what is known of a file as it is now."""
    cache[str(file)] = [*stamp(file.stat()), digest]


def _cached_digest(file: Path, cache: dict[str, Any]) -> str:
    known = cache.get(str(file))
    if known is None or known[:3] != [*stamp(file.stat())]:
        remember_digest(file, digest_file(file), cache)
    return cache[str(file)][3]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
