"""A process of its own for what may end its process, or whose memory is to be told apart."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from types import TracebackType
from typing import TypeVar

Result = TypeVar("Result")


class ChildEnded(Exception):
    """The process ended instead of answering: it was killed, or ended itself."""


class Child:
    """Calls functions in a process of its own, one after the other. It ends with its parent, however that ends."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        # What ends the process at once: it waits for the other side of the pipe to close.
        followed, self._held = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(followed,))

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._held.close()  # nobody waits for its answer
        self._pool.shutdown()
        self._held.close()

    def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """The function's result, or its exception.

        Raises: ChildEnded; the next call is then made in a new process.
        """
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self._pool.shutdown()
            self._held.close()
            self._start()
            raise ChildEnded from None


def _begin(followed: connection.Connection) -> None:
    """What the process does first: it draws no progress, leaves Ctrl-C to its parent, and follows that to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel, followed])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
