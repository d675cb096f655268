"""Directories and files that appear whole or not at all, where they can appear, and digests of what is in them.

A directory is filled under another name beside its own and renamed, over an empty directory too: that is one step, and
what a kill leaves has the other name. A mount point, the current directory, and a directory whose parent cannot be
written are not replaced: they are filled in `.partial` inside, and the entries are moved out one after the other when
all of them are on the disk, with what a reader looks for first at the end. A kill in the middle of that leaves a part,
and the next command that wants the directory moves the rest.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minitron.core.direct_io import digest_file, stamp
from minitron.core.errors import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (
    *_FULL,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EBUSY,
    errno.EXDEV,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
ROOM, ELSEWHERE = "free some space or choose another --out", "choose another --out"
PROBE, PROBE_BYTES = ".minitron-probe-", 4096
# In a directory that is not replaced: where it is filled, and in there the sign that all of it is on the disk. Beside
# the first, what a training goes on from.
FILLED, WHOLE, WORK = ".partial", ".whole", ".work"
LAST = ("statistics.json", "quantization.json", "config.json")  # moved last: what is read first


def prove_directory(
    path: Path, *, inputs: Iterable[str | Path | None] = (), holds: bool = False, writes: Collection[str] = ()
) -> None:
    """Show that a directory can appear at `path`, before the work that fills it begins; nothing is left there.

    Links are followed, and parents that are missing can be made.

    Args:
        inputs: what the work reads, as the user named it; what is no path that exists (a hub id) is passed over.
        holds: whether it may hold something already, as a run directory may.
        writes: the entries that are made in one that holds something: no input may lie in them.

    Raises: RunError if it is a file or holds something, if it would lie in an input or replace one, and if nothing can
        be written there.
    """
    with readable_os_errors(path):
        require_directory(path)
        place = _place(path)
        _require_apart(path, place, inputs, writes)
        if not holds:
            _require_free(path, place)
            _require_no_file(path, place.partial)
        at = place.end if holds and place.end.exists() else place.partial.parent
        with _parents(at):
            _probe(at)


def require_free_space(path: Path, num_bytes: int, at: Path) -> None:
    """Raises: RunError if the file system of the existing directory `at`, where `path` is filled, has fewer bytes."""
    disk = shutil.disk_usage(at)
    if disk.total and num_bytes > disk.free:  # some file systems do not say
        raise RunError(
            f"cannot write {path}: No space left on device: it takes {num_bytes:,} bytes, and {disk.free:,} are free; "
            f"{ROOM}"
        )


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False, way_out: str | None = None) -> Iterator[Path]:
    """A directory to fill, which becomes `path` when the block ends well and is removed when it does not.

    What a killed process left under the temporary name is cleared at the next try. Where only the last step fails, what
    was made stays, and the error says where.

    Args:
        replace: whether what is there may be replaced; a kill between the two leaves neither.
        way_out: what the user can do when `path` cannot be written.

    Raises: RunError if `path` cannot be written (it is a file, it holds something and `replace` is not set, another
        process is writing it, the disk is full, ...).
    """
    with readable_os_errors(path, way_out=way_out):
        require_directory(path)
        place = _place(path)
        if not replace:
            _require_free(path, place)
        with _parents(place.partial.parent), _held(path, place.partial):
            try:
                _clear(place.partial)
                yield place.partial
                for file in [*place.partial.rglob("*"), place.partial]:
                    _sync(file)
            except BaseException:
                shutil.rmtree(place.partial, ignore_errors=True)
                raise
            if replace and place.end.exists():
                shutil.rmtree(place.end)
            _put(place.partial, path, place)


def put_directory(made: Path, path: Path) -> None:
    """Move a finished directory, of the same file system, to `path`, as `atomic_directory` does at its end.

    Raises: RunError if it cannot be moved; it is then still there.
    """
    place = _place(path)
    if place.inside:
        (made / WHOLE).touch()
        _sync(made)
    _put(made, path, place)


def beside(path: Path, suffix: str) -> Path:
    """`<path>.<suffix>`, for what belongs to an output and is not in it; in an output that is not replaced,
    `.<suffix>`, so that it lies on the same file system."""
    place = _place(path)
    if place.inside:
        return path / f".{suffix}"
    named = path if path.name not in ("", "..") and not path.is_symlink() else place.end
    return named.with_name(f"{named.name}.{suffix}")


@contextmanager
def atomic_file(path: Path, *, way_out: str | None = None) -> Iterator[Path]:
    """A name to write a file under, renamed to `path` when the block ends well and removed when it does not.

    A link stays, and what it leads to is replaced. A device or a pipe is written to as it is.

    Raises: RunError if `path` cannot be written.
    """
    with readable_os_errors(path, way_out=way_out):
        end = Path(os.path.realpath(path))
        if _is_device(path):
            yield path
            return
        if end.is_dir():
            raise RunError(f"{path} is a directory; the output must be a file: {way_out or ELSEWHERE}")
        partial = end.with_name(f"{end.name}.partial")
        try:
            yield partial
            partial.replace(end)
        finally:
            partial.unlink(missing_ok=True)


def prove_file(path: Path, *, keeps: Iterable[Path] = ()) -> None:
    """Show that a file can be written at `path`, before the work; makes its parents.

    Args:
        keeps: directories of which no file but a page is written over.

    Raises: RunError.
    """
    with readable_os_errors(path):
        end = Path(os.path.realpath(path))
        if end.is_dir():
            raise RunError(f"{path} is a directory; the output must be a file: {ELSEWHERE}")
        kept = next((each for each in keeps if Path(os.path.realpath(each)) in end.parents), None)
        if kept is not None and end.exists() and end.suffix != ".html":
            raise RunError(f"{path} is a file of {kept}, which is read: {ELSEWHERE}")
        if not _is_device(path):
            end.parent.mkdir(parents=True, exist_ok=True)
            _probe(end.parent)


@contextmanager
def readable_os_errors(path: Path, *, way_out: str | None = None) -> Iterator[None]:
    """Turn a full disk, a missing permission and their like into one clear error about `path`.

    An error that names a file of another directory is not about `path`, and stays what it is.

    Args:
        way_out: what the user can do; default to free some space where that is missing, and another --out.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE or not _is_about(error, path):
            raise
        way_out = way_out or (ROOM if error.errno in _FULL else ELSEWHERE)
        raise RunError(f"cannot write {path}: {error.strerror}; {way_out}") from error
    except SafetensorError as error:
        # Its errors have no errno, only the number in the text.
        if not any(f"(os error {number})" in str(error) for number in _UNWRITABLE):
            raise
        raise RunError(f"cannot write {path}: {error}; {way_out or ROOM}") from error


@contextmanager
def scratch_directory(at: Path | None = None, *, prefix: str = "minitron-") -> Iterator[Path]:
    """A directory that is gone after the block: in `at`, or in the system's temporary directory.

    Raises: RunError if there is no temporary directory that can be written.
    """
    with scratch_errors(at):
        path = Path(tempfile.mkdtemp(dir=at or temporary_directory(), prefix=prefix))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def scratch_errors(at: Path | None = None) -> AbstractContextManager[None]:
    """While something is written to a `scratch_directory`: errors about the temporary directory name it, and TMPDIR."""
    if at is not None:
        return nullcontext()  # it belongs to an output, whose errors are told where that is made
    way_out = "free some space there, or set TMPDIR to another directory"
    return readable_os_errors(temporary_directory(), way_out=f"this is the temporary directory: {way_out}")


def temporary_directory() -> Path:
    """The one that TMPDIR names, and no other where that cannot be written; the system's where it names none.

    Raises: RunError if it is no directory.
    """
    if named := os.environ.get("TMPDIR"):
        if not Path(named).is_dir():
            raise RunError(f"TMPDIR={named} is no directory: make it, or set TMPDIR to another")
        return Path(named)
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise RunError("no temporary directory can be written here: set TMPDIR to a directory that can") from None


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, indent=2))


def write_text(path: Path, text: str, *, way_out: str | None = None) -> None:
    """Write a file so that readers see the old one or the new one, never a part."""
    with atomic_file(path, way_out=way_out) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fsync(file.fileno())


def read_digests(file: Path) -> dict[str, Any]:
    """A cache of digests; what is not there, or is damaged, is as nothing, for digests can be made again."""
    known: Any = {}
    with suppress(OSError, ValueError, RecursionError):
        known = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(known, dict):
        return {}
    return {name: row for name, row in known.items() if isinstance(row, list) and len(row) == 4}


def digest_files(files: Iterable[Path], cache: dict[str, Any]) -> str:
    """sha256 over the names and contents of files.

    `cache` remembers each file's digest by (size, mtime, inode), as git's index does: a 16 GB model is read once.
    """
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(os.fsencode(file.name) + f"\0{_cached_digest(file, cache)}\n".encode())
    return total.hexdigest()


def remember_digest(file: Path, digest: str, cache: dict[str, Any]) -> None:
    """Put into a cache of digests what is known of a file as it is now."""
    cache[str(file)] = [*stamp(file.stat()), digest]


def _cached_digest(file: Path, cache: dict[str, Any]) -> str:
    if not file.is_file():
        state = "is no file" if file.exists() else "is a link to nothing" if file.is_symlink() else "does not exist"
        raise RunError(f"cannot read {file}, which {state}: put it back, or remove its directory and make that again")
    known = cache.get(str(file))
    if known is None or known[:3] != [*stamp(file.stat())]:
        remember_digest(file, digest_file(file), cache)
    return cache[str(file)][3]


@dataclass(frozen=True)
class _Place:
    """Where a directory ends, links followed, where it is filled before, and whether that is inside of it."""

    end: Path
    partial: Path
    inside: bool


def _place(path: Path) -> _Place:
    end = Path(os.path.realpath(path))
    if end.is_dir() and not _is_replaceable(end):
        return _Place(end, end / FILLED, True)
    return _Place(end, end.with_name(f"{end.name}.partial"), False)


def _is_replaceable(directory: Path) -> bool:
    """Whether another one can be renamed over it; where this process stands, a shell would stay in the old one."""
    here = os.path.samestat(os.stat("."), directory.stat())
    return not here and not _is_mount_point(directory) and os.access(directory.parent, os.W_OK | os.X_OK)


def _is_mount_point(directory: Path) -> bool:
    """Also of a part of the same file system, which os.path.ismount does not see."""
    table = Path("/proc/self/mountinfo")
    if os.path.ismount(directory) or not table.exists():
        return os.path.ismount(directory)
    points = (line.split()[4] for line in table.read_bytes().splitlines())
    plain = (re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), point) for point in points)
    return os.fsencode(directory) in plain


def require_directory(path: Path) -> Path:
    """Where `path` leads, links followed: a directory, or nothing yet.

    Raises: RunError for a file, also above it, and for a link that leads nowhere.
    """
    end = Path(os.path.realpath(path))
    if end.is_symlink():
        raise RunError(f"cannot write {path}: it is a link that leads back to itself; {ELSEWHERE}")
    if end.exists() and not end.is_dir():
        raise RunError(f"{path} is a file; the output must be a directory: {ELSEWHERE}")
    above = next(parent for parent in (end, *end.parents) if parent.exists())
    if not above.is_dir():
        raise RunError(f"cannot write {path}: {above} is a file, and no directory can be made in it; {ELSEWHERE}")
    return end


def _require_free(path: Path, place: _Place) -> None:
    """Nothing is there but what a killed process left; what it had only to move is moved first."""
    if not place.end.is_dir():
        return
    if place.inside and (place.partial / WHOLE).exists():
        with _held(path, place.partial):
            _move_out(place.partial, place.end)
    own = {FILLED, WORK} if place.inside else set()
    own |= {"lost+found"} if place.inside and _is_mount_point(place.end) else set()
    if {entry.name for entry in place.end.iterdir()} - own:
        raise RunError(f"{path} exists and is not empty; remove it, or {ELSEWHERE}")


def _require_no_file(path: Path, partial: Path) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(partial.lstat().st_mode):
            raise RunError(f"{partial}, under which {path} is filled, is no directory: remove it, or {ELSEWHERE}")


def _require_apart(path: Path, place: _Place, inputs: Iterable[str | Path | None], writes: Collection[str]) -> None:
    for given in inputs:
        if given is None or not os.path.exists(given):
            continue
        source = Path(os.path.realpath(given))
        if place.end == source:
            raise RunError(f"{path} is the same as {given}, which is read: {ELSEWHERE}")
        if source in place.end.parents:
            raise RunError(f"{path} lies in {given}, which is read: {ELSEWHERE}, outside of it")
        inner = source.relative_to(place.end).parts[0] if place.end in source.parents else None
        if inner in writes or place.partial in (source, *source.parents):
            raise RunError(f"{given}, which is read, lies where {path} is filled: {ELSEWHERE}")


def _is_device(path: Path) -> bool:
    """Or a pipe, which a link such as /dev/stdout leads to under no name."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _probe(directory: Path) -> None:
    """Write something into a directory, to the disk, and take it away, with what a killed process left of this."""
    for left in directory.glob(f"{PROBE}*"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left)
    with ExitStack() as held:
        probe = held.enter_context(tempfile.TemporaryDirectory(dir=directory, prefix=PROBE, ignore_cleanup_errors=True))
        with suppress(OSError):  # some file systems have no locks
            held.enter_context(_locked(Path(probe)))
        try:
            handle = os.open(Path(probe) / "probe", os.O_WRONLY | os.O_CREAT)
        except FileNotFoundError:  # another process took it for left over, before it was locked
            return _probe(directory)
        try:
            os.write(handle, bytes(PROBE_BYTES))
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Raises: OSError if another process holds it."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def _parents(directory: Path) -> Iterator[None]:
    """Make a directory and its parents; those that were missing go again where nothing came to lie in them."""
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for each in missing:
            with suppress(OSError):
                each.rmdir()


@contextmanager
def _held(path: Path, partial: Path) -> Iterator[None]:
    """Make the directory that is filled, and keep other processes out of it; the lock goes with the process."""
    while True:
        _require_no_file(path, partial)
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if not isinstance(error, BlockingIOError):
                raise
            raise RunError(f"{path} is in use by another process; wait for it, or {ELSEWHERE}") from None
        if partial.exists() and os.path.samestat(os.fstat(handle), partial.stat()):
            break
        os.close(handle)  # its process has just ended, and renamed it
    try:
        yield
    finally:
        os.close(handle)


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _put(made: Path, path: Path, place: _Place) -> None:
    try:
        if place.inside:
            (made / WHOLE).touch()
            if made != place.partial:
                made.rename(place.partial)
            _move_out(place.partial, place.end)
        else:
            made.rename(place.end)  # also over an empty directory
            _sync(place.end.parent)
    except OSError as error:
        left = made if made.exists() else place.partial
        raise RunError(
            f"cannot write {path}: {error.strerror}; what was made is whole, and lies in {left}: move it from there"
        ) from error


def _move_out(partial: Path, end: Path) -> None:
    """Move what is filled to where it is read, and so that nothing is taken for whole before it is."""
    _sync(partial)
    entries = [entry for entry in partial.iterdir() if entry.name != WHOLE]
    for entry in sorted(entries, key=lambda entry: (entry.name in LAST, entry.name)):
        entry.rename(end / entry.name)
    _sync(end)
    shutil.rmtree(partial)


def _is_about(error: OSError, path: Path) -> bool:
    """Whether an error is about a directory or what is written for it. One that names no file is taken for that.

    An error of a copy names two files: what was read and what was written.
    """
    named = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return not named or any(_belongs(Path(os.path.abspath(os.fsdecode(name))), path) for name in named)


def _belongs(named: Path, path: Path) -> bool:
    end = Path(os.path.realpath(path))
    within = {each.name.removesuffix(".partial") for each in (named, *named.parents) if each.parent == end.parent}
    own = named in end.parents or end in named.parents or end.name in within  # a parent may be what cannot be made
    return own or any(part.startswith(PROBE) for part in named.parts)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
