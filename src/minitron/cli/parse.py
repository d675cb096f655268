"""These functions read the text of options: 20M, 8GB, drop=15-30.

An ArgumentTypeError is told by argparse, with the usage; a MinitronError passes through it.
"""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from minitron.core.config import count_in, expanded, size_in
from minitron.core.effects import require_once
from minitron.core.errors import MinitronError, did_you_mean


def count(text: str) -> int:
    """Read 20M as 20_000_000."""
    try:
        value = count_in(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count such as 500000, 20M or 4.5B") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1")
    return value


def size(text: str) -> float:
    """Read 8GB as 8e9 bytes; units are decimal, as sizes are shown."""
    try:
        return positive(str(size_in(text)))
    except (ValueError, OverflowError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500000, 300MB or 8GB") from None


def positive(text: str) -> float:
    """Read a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def seed(text: str) -> int:
    """Read a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def words(text: str) -> str:
    """Read text as the UTF-8 that it is, whatever encoding the environment names.

    Raises: MinitronError.
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise MinitronError(f"{text!a} is not UTF-8 text: give it in UTF-8") from None


def named(text: str) -> str:
    """Read a path, or a name that may stand in its place such as a hub id.

    Raises: MinitronError.
    """
    return expanded(text)


def path(text: str) -> Path:
    return Path(named(text))


def file(text: str) -> Path:
    """Read the path of a file.

    Raises: MinitronError if it names a directory.
    """
    if text.endswith("/"):
        raise MinitronError(f"{text} names a directory: give a file, such as {text}report.html")
    return path(text)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str) -> list[float]:
    return [positive(number) for number in names(text)]


def counts(text: str) -> list[int]:
    return [count(number) for number in names(text)]


def byte_counts(text: str) -> list[float]:
    return [size(number) for number in names(text)]


def shape(text: str) -> dict[str, int]:
    """Read hidden=3072,ffn=9216 as sizes by dim."""
    try:
        pairs = [(name.strip(), int(number)) for name, number in (part.split("=") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as hidden=3072,ffn=9216") from None
    if len(dict(pairs)) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a size twice: give it once")
    return dict(pairs)


def layers(text: str) -> dict[str, str]:
    """Read drop=15-30 or keep=0-14,31 as the recipe key and its value."""
    kind, _, listed = text.partition("=")
    if kind.strip() not in ("drop", "keep") or not listed:
        raise argparse.ArgumentTypeError(f"{text!r} is neither drop=15-30 nor keep=0-14,31 or the like")
    return {f"prune.{kind.strip()}_layers": listed}


def repair_steps(text: str) -> list[str] | None:
    """Read auto as None, none as no steps, and a list of steps as such.

    Raises: MinitronError for a step that there is not.
    """
    from minitron.pruning.repair import REPAIRS

    if text == "auto":
        return None
    steps = [] if text == "none" else [step.strip() for step in text.split(",")]
    unknown = [step for step in steps if step not in REPAIRS]
    if unknown:
        raise MinitronError(
            f"--repair: unknown step {unknown[0]!r}{did_you_mean(unknown[0], ['auto', 'none', *REPAIRS])}"
        )
    return steps


def dims(texts: Sequence[str]) -> Mapping[str, str]:
    """Read layers=29-32 and further words like it as sizes by dim.

    Raises: MinitronError.
    """
    pairs = [text.partition("=") for text in texts]
    if bad := [dim + equals + sizes for dim, equals, sizes in pairs if not sizes]:
        raise MinitronError(f"--dims {bad[0]!r}: write it as dim=sizes, such as layers=29-32")
    return require_once(((dim, sizes) for dim, _, sizes in pairs), "--dims")


def tensor_types(texts: Sequence[str]) -> Mapping[str, str]:
    """Read output=Q8_0 and further words like it as types by pattern.

    Raises: MinitronError.
    """
    pairs = [(text, *text.rpartition("=")) for text in texts]
    for text, pattern, _, kind in pairs:
        if not pattern or not kind:
            raise MinitronError(f"--tensor-type {text!r} is not PATTERN=TYPE, such as output=Q8_0")
    return require_once(((pattern, kind) for _, pattern, _, kind in pairs), "--tensor-type")
