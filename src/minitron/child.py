"""A process of its own for what may end its process, or whose memory is to be told apart."""

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from minitron.files import scratch_errors, temporary_directory

Result = TypeVar("Result")


_last_words: int | None = None  # in a child: the file that its parent reads when it has ended


class ChildEnded(Exception):
    """The process ended instead of answering: it was killed, or ended itself. The message is what it said last."""


def say_last(text: str) -> None:
    """What a library says before it ends the process, for the error that its parent raises."""
    if _last_words is not None:
        os.write(_last_words, text.encode())


class Child:
    """Calls functions in a process of its own, one after the other. It ends with its parent, however that ends."""

    def __init__(self) -> None:
        with scratch_errors():
            self._last_words = tempfile.NamedTemporaryFile(dir=temporary_directory())
        self._pool = _new_pool(self._last_words.name)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        self._last_words.close()

    def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """The function's result, or its exception.

        Raises: ChildEnded; the next call is then made in a new process.
        """
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self._pool.shutdown()
            said = " ".join(Path(self._last_words.name).read_text(errors="replace").split())
            self._last_words.truncate(0)
            self._pool = _new_pool(self._last_words.name)
            raise ChildEnded(said or "it said nothing") from None


def _new_pool(last_words: str) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(last_words,))


def _begin(last_words: str) -> None:
    """What the process does first: it draws no progress, and follows its parent, even if that is killed."""
    global _last_words
    _last_words = os.open(last_words, os.O_WRONLY | os.O_APPEND)
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
