"""A person at a terminal sees progress and notes on stderr, and results on stdout."""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from minitron.core.errors import MinitronError
from minitron.core.progress import Pace
from minitron.core.text import duration


def open_streams() -> None:
    """Open the three streams, so that the rest of the program can rely on them.

    A character that an encoding does not have is replaced: a result must not end in an error where it is printed. One
    that is closed leads nowhere, instead of into the next file that is opened and gets its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def write_result(text: str) -> None:
    """Print on stdout; where nobody reads any more, as `| head` does not, nothing is missed.

    Raises: MinitronError if it cannot be written.
    """
    with _writing("the result to standard output"):
        print(text, flush=True)


def complain(text: str) -> None:
    """Print on stderr. Where that cannot be written the work goes on: nobody would hear of it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def flush_result() -> None:
    """Write out the text that a library has printed on stdout.

    Raises: MinitronError if it cannot be written.
    """
    with _writing("to standard output"):
        sys.stdout.flush()


@contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _silence(sys.stdout)
    except OSError as error:
        _silence(sys.stdout)
        raise MinitronError(f"cannot write {what}: {error.strerror}") from None


def _silence(stream: TextIO) -> None:
    """Send the rest of its buffer, and all that follows, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lay the cells out as the lines of a table."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


class Console:
    """A console prints results on stdout, and on stderr progress: a bar on a terminal, plain lines elsewhere.

    Of several processes only the first has one that prints.
    """

    LOG_SECONDS = 20.0

    def __init__(self, args: argparse.Namespace, *, prints: bool = True):
        self.json, self.quiet, self.prints = args.json, args.quiet or not prints, prints
        self._started = time.monotonic()  # of the stage
        self._pace = Pace()  # of what is being counted: a stage may count several things in turn
        self._stage = ""
        self._logged = 0.0
        self._bar: Any = None

    def stage(self, name: str, state: str) -> None:
        self.close()
        if state == "running":
            self._stage, self._pace = name, Pace()
            self._started = self._logged = time.monotonic()
            self.note(f"{name} ...")
        else:
            took = f" ({time.monotonic() - self._started:.1f} s)" if state == "done" else ""
            self.note(f"{name} {state}{took}")

    def progress(self, done: int, total: int, note: str = "") -> None:
        if self.quiet:
            return
        self._pace.report(done, time.monotonic())
        if sys.stderr.isatty():
            self._draw(done, total, note)
        elif time.monotonic() - self._logged >= self.LOG_SECONDS:
            self._logged = time.monotonic()
            counted = f"{done:,} {note}" if total == 0 else f"{done}/{total} {note}"
            left = self._left(total)
            self.note(f"{self._stage}: {counted}" + (f", {left}" if left else ""))

    def _left(self, total: int) -> str:
        """Say how long the rest takes at the recent speed; empty where that is not known yet, or there is no end."""
        seconds = self._pace.seconds_left(total) if total else None
        return "" if seconds is None else f"{duration(seconds)} left"

    def note(self, text: str) -> None:
        if not self.quiet:
            complain(text)

    def warn(self, text: str) -> None:
        """Print a warning even if quiet: it is about the result."""
        self.close()
        if self.prints:
            complain(f"warning: {text}")

    def result(self, value: Any, text: str) -> None:
        if self.prints:
            write_result(json.dumps(value, indent=2) if self.json else text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, done: int, total: int, note: str) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if self._bar is None:
            texts = TextColumn("{task.fields[left]}"), TextColumn("{task.description}")
            columns = (TextColumn(self._stage), BarColumn(), MofNCompleteColumn(), *texts)
            self._bar = Progress(*columns, console=RichConsole(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task("", total=total or None, left="")
        self._bar.update(0, completed=done, total=total or None, description=note, left=self._left(total))
