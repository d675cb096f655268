"""Calls in a separate process, for work that may end its process or whose memory is measured alone."""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from minitron.core.files import scratch_errors, temporary_directory

_Result = TypeVar("_Result")

_last_words: int | None = None  # in a child process: the file that its parent reads after it has ended


class ChildEnded(Exception):
    """The process was killed or ended itself before it returned a result. The message holds its last words."""


def say_last(text: str) -> None:
    """Record a library's message before it ends the process, for the error that the parent raises."""
    if _last_words is not None:
        os.write(_last_words, text.encode())


class Child:
    """Calls functions one after the other in a child process, which ends with its parent in any case."""

    def __init__(self) -> None:
        with scratch_errors():
            self._last_words = tempfile.NamedTemporaryFile(dir=temporary_directory())
        self._start()

    def _start(self) -> None:
        # The child ends at once when the other end of the pipe is closed.
        followed, self._held = multiprocessing.Pipe(duplex=False)
        context, told = multiprocessing.get_context("spawn"), (followed, self._last_words.name)
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=told)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._held.close()  # nobody waits for its answer
        try:
            self._pool.shutdown()
        finally:  # also where a second signal comes while this waits
            self._held.close()
            self._last_words.close()

    def call(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Return the function's result, or raise its exception.

        Raises: ChildEnded; the next call then starts a new process.
        """
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self._pool.shutdown()
            self._held.close()
            said = " ".join(Path(self._last_words.name).read_text(errors="replace").split())
            self._last_words.truncate(0)
            self._start()
            raise ChildEnded(said or "it said nothing") from None


def _begin(followed: connection.Connection, last_words: str) -> None:
    """Prepare a child process: it draws no progress, leaves Ctrl-C to its parent, and ends when the parent ends."""
    global _last_words
    _last_words = os.open(last_words, os.O_WRONLY | os.O_APPEND)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel, followed])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
