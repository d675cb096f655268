"""Text and JSON files that a user gives, read by one rule.

UTF-8, a byte order mark in front is no text, and whatever cannot be read ends in one error that names the file and the
place in it.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron.errors import MinitronError

Kind = type[MinitronError]


def read_text(path: Path, error: Kind) -> str:
    """The text of a file, without a byte order mark.

    Raises: `error` if the file cannot be read, or is not UTF-8.
    """
    return decode(_read_bytes(path, error), str(path), error)


def decode(data: bytes, where: str, error: Kind) -> str:
    """UTF-8 bytes as text, without a byte order mark.

    Raises: `error` for other bytes.
    """
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not UTF-8 text (byte {problem.start}): convert it, or check that it is text") from None


def read_lines(path: Path, error: Kind) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1; blank ones are left out, line ends are cut off.

    Raises: `error` if the file cannot be read, or a line is not UTF-8.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                data = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                text = decode(data, f"{path}, line {number},", error).rstrip("\r\n")
                if text.strip():
                    yield number, text
    except OSError as problem:
        raise error(_unreadable(path, problem)) from None


def read_json(path: Path, error: Kind, *, keys_once: bool = False) -> Any:
    """The value in a JSON file.

    Raises: `error` if the file cannot be read, or holds no JSON.
    """
    return parse_json(read_text(path, error), str(path), error, keys_once=keys_once)


def parse_json(text: str, where: str, error: Kind, *, keys_once: bool = False) -> Any:
    """The value that a text spells in JSON.

    Args:
        keys_once: a key that stands twice in an object is an error; else its last value holds.

    Raises: `error` for text that is no JSON, nested too deeply, or with an integer of too many digits.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise error(f"{where} says {key!r} twice: remove the one that is not meant")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=table if keys_once else None)
    except json.JSONDecodeError as problem:
        place = f"line {problem.lineno}, column {problem.colno}" if "\n" in text else f"column {problem.colno}"
        raise error(f"{where} is not JSON: {problem.msg} at {place}") from None
    except ValueError as problem:  # an integer of more digits than Python converts
        raise error(f"{where} is no JSON that can be read: {str(problem).split(';')[0]}") from None
    except RecursionError:
        raise error(f"{where} is no JSON that can be read: its brackets are nested too deeply") from None


def _read_bytes(path: Path, error: Kind) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise error(_unreadable(path, problem)) from None


def _unreadable(path: Path, problem: OSError) -> str:
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {path.readlink()}, which does not exist"
    return f"cannot read {path}: {problem.strerror or problem}"
