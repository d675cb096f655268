"""A process of its own for what may end its process, or whose memory is to be told apart."""

import multiprocessing
import os
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
        self._pool = _new_pool()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()

    def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """The function's result, or its exception.

        Raises: ChildEnded; the next call is then made in a new process.
        """
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self._pool.shutdown()
            self._pool = _new_pool()
            raise ChildEnded from None


def _new_pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    """What the process does first: it draws no progress, and follows its parent, even if that is killed."""
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
