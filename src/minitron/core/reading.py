"""Text and JSON files of the user, and folders of them, all read by the same rules.

Files are UTF-8, without a byte order mark in the text. A file that cannot be read ends in an error that names the file
and the line. In a folder, every file with a wanted suffix is read or ends in such an error, and the other entries are
reported.
"""

import codecs
import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.errors import MinitronError

Kind = type[MinitronError]
Json = dict[str, Any]  # a JSON object whose keys are not known before it is read: a config.json, a user's row

MARK = "\ufeff"  # a byte order mark, decoded
# The first bytes of formats that are mistaken for text.
_FORMATS = (
    (codecs.BOM_UTF32_LE, "UTF-32 text, by its byte order mark"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "UTF-32 text, by its byte order mark"),
    (codecs.BOM_UTF16_LE, "UTF-16 text, by its byte order mark"),
    (codecs.BOM_UTF16_BE, "UTF-16 text, by its byte order mark"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"\xfd7zXZ\x00", "compressed with xz"),
    (b"BZh", "compressed with bzip2"),
    (b"\x04\x22\x4d\x18", "compressed with lz4"),
    (b"PK\x03\x04", "a ZIP archive, or a document that is one"),
    (b"PAR1", "a Parquet file"),
    (b"%PDF-", "a PDF file"),
    (b"ARROW1", "an Arrow file"),
)
_NO_FILES = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
LARGEST_KINDS = 8  # kinds of unread entries of a folder that a message names


def read_text(path: Path, error: Kind) -> str:
    """Read a text file, without a byte order mark.

    Raises: `error` if the file cannot be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise error(_unreadable(path, problem)) from None
    return decode(data, str(path), error)


def decode(data: bytes, where: str, error: Kind) -> str:
    """Decode UTF-8 bytes, without a byte order mark.

    Raises: `error` for bytes that are not UTF-8.
    """
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as problem:
        kind = next((f"is {words}, and" for head, words in _FORMATS if data.startswith(head)), "is")
        raise error(
            f"{where} {kind} not UTF-8 text (byte {problem.start}): convert it, or check that it is text"
        ) from None


def require_text(text: str, where: str, error: Kind) -> str:
    """Return the text.

    Raises: `error` for a NUL character or half of a surrogate pair, which are no text.
    """
    if "\0" in text:
        raise error(
            f"{where} is binary: it holds a NUL character at position {text.index(chr(0))}; take it out, "
            "or check that this is UTF-8 text"
        )
    try:
        text.encode()  # JSON can spell half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as problem:
        raise error(f"{where} is no Unicode text: {problem.reason} at position {problem.start}") from None
    return text


def require_texts(value: Any, where: str, error: Kind) -> None:
    """Apply `require_text` to every string in a JSON value."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            require_text(item, where, error)
        elif isinstance(item, dict):
            rest += [*item, *item.values()]
        elif isinstance(item, list):
            rest += item


def read_lines(path: Path, error: Kind) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1, without blank lines and line ends.

    Raises: `error` if the file cannot be read, or a line is not UTF-8.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = decode(line, f"{path}, line {number},", error).rstrip("\r\n")
                if text.strip():
                    yield number, text
    except OSError as problem:
        raise error(_unreadable(path, problem)) from None


def read_json(path: Path, error: Kind, *, keys_once: bool = False) -> Any:
    """Read a JSON file.

    Raises: `error` if the file cannot be read, or holds no JSON.
    """
    return parse_json(read_text(path, error), str(path), error, keys_once=keys_once)


def read_rows(path: Path, error: Kind) -> Iterator[tuple[int, Json]]:
    """The objects of a .jsonl file with the numbers of their lines, from 1.

    Raises: `error` if the file cannot be read, or a line is no JSON object or names a key twice.
    """
    for number, line in read_lines(path, error):
        where = f"{path}, line {number},"
        if "\0" in line:
            require_text(line, where, error)
        try:
            row = parse_json(line, where, error, keys_once=True)
        except error as problem:
            array = line.lstrip().startswith("[")
            reason = f"{where} begins a JSON array" if array else str(problem)
            raise error(f"{reason}; a .jsonl file holds one JSON object a line, and nothing around them") from None
        if not isinstance(row, dict):
            raise error(
                f"{path}, line {number}: a row must be a JSON object, not {json_name(row)}; "
                "a .jsonl file holds one JSON object a line, and nothing around them"
            )
        yield number, row


def json_name(value: Any) -> str:
    """The JSON type of a value in words."""
    if value is None:
        return "null"
    names = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


def parse_json(text: str, where: str, error: Kind, *, keys_once: bool = False) -> Any:
    """Parse JSON.

    Args:
        keys_once: whether a key that occurs twice in an object is an error; else its last value counts.

    Raises: `error` for text that is no JSON, that is nested too deeply, or that holds an integer of too many digits.
    """

    def table(pairs: list[tuple[str, Any]]) -> Json:
        found: Json = {}
        for key, value in pairs:
            if key in found:
                raise error(f"{where} says {key!r} twice: remove the one that is not meant")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=table if keys_once else None)
    except json.JSONDecodeError as problem:
        position = f"line {problem.lineno}, column {problem.colno}" if "\n" in text else f"column {problem.colno}"
        raise error(f"{where} is not JSON: {problem.msg} at {position}") from None
    except ValueError as problem:  # an integer of more digits than Python converts
        raise error(f"{where} is no JSON that can be read: {str(problem).split(';')[0]}") from None
    except RecursionError:
        raise error(f"{where} is no JSON that can be read: its brackets are nested too deeply") from None


@dataclass(frozen=True)
class Folder:
    """The files of a folder that are read, in order of their paths, and a sentence about the entries that are not."""

    files: list[Path]
    left_out: str | None = None


def find_files(folder: Path, suffixes: Sequence[str], error: Kind) -> Folder:
    """Find the files with these suffixes, in upper or lower case, in a folder and its subfolders.

    Names that begin with a dot and links to folders are skipped. A file with two names is read once.

    Raises: `error` for a file with such a suffix that cannot be read, such as a dangling link or a pipe.
    """
    files: list[Path] = []
    others: dict[str, list[Path]] = {}
    folders = [folder]
    while folders:
        here = folders.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as problem:
            if here == folder:
                raise error(f"cannot read {_printable(here)}: {problem.strerror}") from None
            others.setdefault(f"in a folder that cannot be opened ({problem.strerror})", []).append(here)
            continue
        for entry in entries:
            path = here / entry.name
            if entry.name.startswith("."):
                others.setdefault("hidden", []).append(path)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif path.suffix.lower() in suffixes and not os.path.isdir(path):
                require_file(path, error)
                files.append(path)
            else:
                kind = "linked folders" if os.path.isdir(path) else path.suffix.lower() or "without a suffix"
                others.setdefault(kind, []).append(path)
    files.sort()
    known: dict[tuple[int, int], Path] = {}
    for path in sorted(files, key=lambda path: path.is_symlink()):  # stable: of two names, the first that is no link
        status = path.stat()
        if known.setdefault((status.st_dev, status.st_ino), path) != path:
            others.setdefault("once more under another name", []).append(path)
    kept = set(known.values())
    return Folder([path for path in files if path in kept], _left_out(folder, len(kept), others, suffixes))


def require_file(path: Path, error: Kind) -> None:
    """Raises: `error` for a dangling link, a pipe, a device, or a file that may not be read."""
    try:
        mode = path.stat().st_mode
    except OSError as problem:
        raise error(_unreadable(path, problem)) from None
    kind = next((words for test, words in _NO_FILES if test(mode)), None)
    if kind is not None:
        raise error(f"{_printable(path)} is {kind}, and no file: text is read more than once, so write it into a file")
    if not os.access(path, os.R_OK):
        raise error(f"cannot read {_printable(path)}: Permission denied")


def _left_out(folder: Path, count: int, others: dict[str, list[Path]], suffixes: Sequence[str]) -> str | None:
    if not others:
        return None
    number = sum(map(len, others.values()))
    kinds = sorted(others.items(), key=lambda item: -len(item[1]))
    said = [
        f"{len(paths)} {kind} ({_printable(paths[0].relative_to(folder))}{', ...' if len(paths) > 1 else ''})"
        for kind, paths in kinds[:LARGEST_KINDS]
    ]
    if len(kinds) > LARGEST_KINDS:
        said.append(f"{sum(len(paths) for _, paths in kinds[LARGEST_KINDS:])} of other kinds")
    return (
        f"{_printable(folder)}: {number} of {number + count} entries are not read: {'; '.join(said)}. "
        f"Files are read that end in {', '.join(suffixes)}"
    )


def _printable(path: Path) -> str:
    """A path as printable text in one line."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def _unreadable(path: Path, problem: OSError) -> str:
    if os.path.islink(path) and problem.errno == errno.ENOENT:
        return f"{_printable(path)} is a link to {_printable(path.readlink())}, which does not exist"
    return f"cannot read {_printable(path)}: {problem.strerror or problem}"
