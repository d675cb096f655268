"""Directories and files that appear whole or not at all, and digests of their contents.

A directory is filled under another name beside its final one, and then renamed, also over an empty directory. That is
one step, so a killed process leaves only the other name. A mount point, the current directory, and a directory whose
parent cannot be written are not replaced: they are filled in `.partial` inside, and once all entries are on the disk
they are moved out one after the other; the files that readers open first are moved last. If the process is killed in
between, the next command that writes the directory moves the rest.
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
# Names inside a directory that is not replaced: the directory in which it is filled, the file in there that says that
# all entries are on the disk, and the directory of a training's states.
FILLED, WHOLE, WORK = ".partial", ".whole", ".work"
Digests = dict[str, list[int | str]]  # path -> size, mtime and inode of a file, and its sha256
LAST = ("statistics.json", "quantization.json", "config.json")  # moved last: readers open them first


def prove_directory(
    path: Path, *, inputs: Iterable[str | Path | None] = (), holds: bool = False, writes: Collection[str] = ()
) -> None:
    """Prove that a directory can appear at `path`, before the work that fills it begins; nothing is left there.

    Links are followed, and missing parents can be made.

    Args:
        inputs: the inputs of the work as the user named them; names that are no existing path (hub ids) are skipped.
        holds: whether the directory may hold entries already, as a run directory may.
        writes: the entries that the work makes in such a directory: no input may lie in them.

    Raises: RunError if `path` is a file or holds entries, if it would lie in an input or replace one, or if nothing can
        be written there.
    """
    with readable_os_errors(path):
        require_directory(path)
        destination = _destination(path)
        _require_apart(path, destination, inputs, writes)
        if not holds:
            _require_free(path, destination)
            _require_no_file(path, destination.partial)
        at = destination.end if holds and destination.end.exists() else destination.partial.parent
        with _parents(at):
            _probe(at)


def require_free_space(path: Path, num_bytes: int, at: Path) -> None:
    """Raises: RunError if the file system of the existing directory `at`, where `path` is filled, has too few bytes."""
    disk = shutil.disk_usage(at)
    if disk.total and num_bytes > disk.free:  # some file systems do not say
        raise RunError(
            f"cannot write {path}: No space left on device: it takes {num_bytes:,} bytes, and {disk.free:,} are free; "
            f"{ROOM}"
        )


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False, way_out: str | None = None) -> Iterator[Path]:
    """Yield a directory to fill, which becomes `path` if the block succeeds and is removed if it fails.

    Files that a killed process left under the temporary name are removed at the next try. If only the last step fails,
    the directory stays, and the error says where.

    Args:
        replace: whether an existing directory may be replaced; a process killed in between leaves neither of the two.
        way_out: advice to the user if `path` cannot be written.

    Raises: RunError if `path` cannot be written: it is a file, it holds entries and `replace` is not set, another
        process is writing it, the disk is full, ...
    """
    with readable_os_errors(path, way_out=way_out):
        require_directory(path)
        destination = _destination(path)
        if not replace:
            _require_free(path, destination)
        with _parents(destination.partial.parent), _held(path, destination.partial):
            try:
                _clear(destination.partial)
                yield destination.partial
                for file in [*destination.partial.rglob("*"), destination.partial]:
                    _sync(file)
            except BaseException:
                shutil.rmtree(destination.partial, ignore_errors=True)
                raise
            if replace and destination.end.exists():
                shutil.rmtree(destination.end)
            _put(destination.partial, path, destination)


def put_directory(made: Path, path: Path) -> None:
    """Move a finished directory, of the same file system, to `path`, as `atomic_directory` does at its end.

    Raises: RunError if it cannot be moved; it is then still there.
    """
    destination = _destination(path)
    if destination.inside:
        (made / WHOLE).touch()
        _sync(made)
    _put(made, path, destination)


def beside(path: Path, suffix: str) -> Path:
    """`<path>.<suffix>`, for files that belong to an output but lie beside it; for an output that is not replaced,
    `<path>/.<suffix>`, so that they lie on the same file system."""
    destination = _destination(path)
    if destination.inside:
        return path / f".{suffix}"
    named = path if path.name not in ("", "..") and not path.is_symlink() else destination.end
    return named.with_name(f"{named.name}.{suffix}")


@contextmanager
def atomic_file(path: Path, *, way_out: str | None = None) -> Iterator[Path]:
    """Yield a name to write a file under, which is renamed to `path` if the block succeeds, else removed.

    A link stays, and its target is replaced. A device or a pipe is written directly.

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
    """Prove that a file can be written at `path`, before the work begins, and make its parents.

    Args:
        keeps: directories in which no file is overwritten, except for HTML pages.

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
    """Turn a full disk, a missing permission and similar errors into one clear error about `path`.

    An error that names a file of another directory is not about `path`, and is raised as it is.

    Args:
        way_out: advice to the user. Default: to free some space if there is too little, else to choose another --out.
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
    """Yield a directory that is removed after the block, in `at` or in the system's temporary directory.

    Raises: RunError if no temporary directory can be written.
    """
    with scratch_errors(at):
        path = Path(tempfile.mkdtemp(dir=at or temporary_directory(), prefix=prefix))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def scratch_errors(at: Path | None = None) -> AbstractContextManager[None]:
    """A block that writes to a `scratch_directory`: errors about the temporary directory name it, and TMPDIR."""
    if at is not None:
        return nullcontext()  # it belongs to an output, and `atomic_directory` raises the errors of outputs
    way_out = "free some space there, or set TMPDIR to another directory"
    return readable_os_errors(temporary_directory(), way_out=f"this is the temporary directory: {way_out}")


def temporary_directory() -> Path:
    """The directory that TMPDIR names, even if it cannot be written, or the system's if TMPDIR is not set.

    Raises: RunError if TMPDIR names no directory.
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
    write_text(path, json.dumps(value, indent=2))


def write_text(path: Path, text: str, *, way_out: str | None = None) -> None:
    """Write a file so that readers see either the old or the new content, never a part."""
    with atomic_file(path, way_out=way_out) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fsync(file.fileno())


def read_digests(file: Path) -> Digests:
    """Read a cache of digests. If it is missing or damaged, the cache is empty: digests can be computed again."""
    known: Any = {}
    with suppress(OSError, ValueError, RecursionError):
        known = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(known, dict):
        return {}
    return {name: row for name, row in known.items() if isinstance(row, list) and len(row) == 4}


def digest_files(files: Iterable[Path], cache: Digests) -> str:
    """The sha256 of the names and contents of files.

    The cache keeps each file's digest by (size, mtime, inode), as git's index does, so a 16 GB model is read once.
    """
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(os.fsencode(file.name) + f"\0{_cached_digest(file, cache)}\n".encode())
    return total.hexdigest()


def remember_digest(file: Path, digest: str, cache: Digests) -> None:
    """Add the digest of a file as it is now to the cache."""
    cache[str(file)] = [*stamp(file.stat()), digest]


def _cached_digest(file: Path, cache: Digests) -> str:
    if not file.is_file():
        state = "is no file" if file.exists() else "is a link to nothing" if file.is_symlink() else "does not exist"
        raise RunError(f"cannot read {file}, which {state}: put it back, or remove its directory and make that again")
    known = cache.get(str(file))
    if known is None or known[:3] != [*stamp(file.stat())]:
        remember_digest(file, digest_file(file), cache)
    return str(cache[str(file)][3])


@dataclass(frozen=True)
class _Destination:
    """The final path of a directory, with links followed, and the path where it is filled, which may lie inside."""

    end: Path
    partial: Path
    inside: bool


def _destination(path: Path) -> _Destination:
    end = Path(os.path.realpath(path))
    if end.is_dir() and not _is_replaceable(end):
        return _Destination(end, end / FILLED, True)
    return _Destination(end, end.with_name(f"{end.name}.partial"), False)


def _is_replaceable(directory: Path) -> bool:
    """Whether another directory can be renamed over it; if it is the current one, a shell would stay in the old one."""
    here = os.path.samestat(os.stat("."), directory.stat())
    return not here and not _is_mount_point(directory) and os.access(directory.parent, os.W_OK | os.X_OK)


def _is_mount_point(directory: Path) -> bool:
    """Whether it is a mount point, also of a part of the same file system, which os.path.ismount does not see."""
    table = Path("/proc/self/mountinfo")
    if os.path.ismount(directory) or not table.exists():
        return os.path.ismount(directory)
    points = (line.split()[4] for line in table.read_bytes().splitlines())
    plain = (re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), point) for point in points)
    return os.fsencode(directory) in plain


def require_directory(path: Path) -> Path:
    """Follow the links of `path` to a directory, or to a path where none exists yet.

    Raises: RunError if it is a file or lies below a file, or if a link leads back to itself.
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


def _require_free(path: Path, destination: _Destination) -> None:
    """Check that nothing is there except files of a killed process; entries that it had yet to move are moved first."""
    if not destination.end.is_dir():
        return
    if destination.inside and (destination.partial / WHOLE).exists():
        with _held(path, destination.partial):
            _move_out(destination.partial, destination.end)
    own = {FILLED, WORK} if destination.inside else set()
    own |= {"lost+found"} if destination.inside and _is_mount_point(destination.end) else set()
    if {entry.name for entry in destination.end.iterdir()} - own:
        raise RunError(f"{path} exists and is not empty; remove it, or {ELSEWHERE}")


def _require_no_file(path: Path, partial: Path) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(partial.lstat().st_mode):
            raise RunError(f"{partial}, under which {path} is filled, is no directory: remove it, or {ELSEWHERE}")


def _require_apart(
    path: Path, destination: _Destination, inputs: Iterable[str | Path | None], writes: Collection[str]
) -> None:
    for given in inputs:
        if given is None or not os.path.exists(given):
            continue
        source = Path(os.path.realpath(given))
        if destination.end == source:
            raise RunError(f"{path} is the same as {given}, which is read: {ELSEWHERE}")
        if source in destination.end.parents:
            raise RunError(f"{path} lies in {given}, which is read: {ELSEWHERE}, outside of it")
        inner = source.relative_to(destination.end).parts[0] if destination.end in source.parents else None
        if inner in writes or destination.partial in (source, *source.parents):
            raise RunError(f"{given}, which is read, lies where {path} is filled: {ELSEWHERE}")


def _is_device(path: Path) -> bool:
    """Whether it is a device or a pipe; a link such as /dev/stdout leads to a pipe without a name."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _probe(directory: Path) -> None:
    """Write a file into a directory, sync it, and remove it, together with such files of killed processes."""
    for left in directory.glob(f"{PROBE}*"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left)
    with ExitStack() as held:
        probe = held.enter_context(tempfile.TemporaryDirectory(dir=directory, prefix=PROBE, ignore_cleanup_errors=True))
        with suppress(OSError):  # some file systems have no locks
            held.enter_context(_locked(Path(probe)))
        try:
            handle = os.open(Path(probe) / "probe", os.O_WRONLY | os.O_CREAT)
        except FileNotFoundError:  # another process removed it before it was locked
            return _probe(directory)
        try:
            os.write(handle, bytes(PROBE_BYTES))
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _locked(directory: Path) -> Iterator[int]:
    """Lock a directory, as long as the process lives at most; yields its file descriptor.

    Raises: BlockingIOError if another process holds the lock, another OSError if the file system has no locks.
    """
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _parents(directory: Path) -> Iterator[None]:
    """Make a directory and its parents; parents that were missing are removed again if they stay empty."""
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
    """Make the directory in which `path` is filled, and lock it."""
    with ExitStack() as lock:
        while True:
            _require_no_file(path, partial)
            partial.mkdir(exist_ok=True)
            try:
                handle = lock.enter_context(_locked(partial))
            except BlockingIOError:
                raise RunError(f"{path} is in use by another process; wait for it, or {ELSEWHERE}") from None
            if partial.exists() and os.path.samestat(os.fstat(handle), partial.stat()):
                break
            lock.close()  # another process has just ended, and renamed the directory
        yield


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _put(made: Path, path: Path, destination: _Destination) -> None:
    try:
        if destination.inside:
            (made / WHOLE).touch()
            if made != destination.partial:
                made.rename(destination.partial)
            _move_out(destination.partial, destination.end)
        else:
            made.rename(destination.end)  # also over an empty directory
            _sync(destination.end.parent)
    except OSError as error:
        left = made if made.exists() else destination.partial
        raise RunError(
            f"cannot write {path}: {error.strerror}; what was made is whole, and lies in {left}: move it from there"
        ) from error


def _move_out(partial: Path, end: Path) -> None:
    """Move the entries of a filled directory to its final path, those that readers open first at the end."""
    _sync(partial)
    entries = [entry for entry in partial.iterdir() if entry.name != WHOLE]
    for entry in sorted(entries, key=lambda entry: (entry.name in LAST, entry.name)):
        entry.rename(end / entry.name)
    _sync(end)
    shutil.rmtree(partial)


def _is_about(error: OSError, path: Path) -> bool:
    """Whether an error is about a directory or a file that is written for it, as an error without a file name may be.

    The error of a copy names two files: the file that was read and the file that was written.
    """
    named = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return not named or any(_belongs(Path(os.path.abspath(os.fsdecode(name))), path) for name in named)


def _belongs(named: Path, path: Path) -> bool:
    end = Path(os.path.realpath(path))
    within = {each.name.removesuffix(".partial") for each in (named, *named.parents) if each.parent == end.parent}
    own = named in end.parents or end in named.parents or end.name in within  # perhaps a parent cannot be made
    return own or any(part.startswith(PROBE) for part in named.parts)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
