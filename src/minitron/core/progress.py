"""The listener that work reports its progress to: the command line draws it, a library stays silent."""

import warnings
from collections.abc import Callable
from typing import Protocol, runtime_checkable


@runtime_checkable
class Listener(Protocol):
    """Receives the stages, the progress and the warnings of a run."""

    def stage(self, name: str, state: str) -> None: ...

    def progress(self, done: int, total: int, note: str = "") -> None: ...

    def warn(self, text: str) -> None: ...


class Silent:
    """Draws nothing, and raises warnings as Python's own."""

    def stage(self, name: str, state: str) -> None:
        pass

    def progress(self, done: int, total: int, note: str = "") -> None:
        pass

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=2)


SILENT = Silent()


def layer_progress(listener: Listener) -> Callable[[int, int], None]:
    """The function that a streamed pass calls with (layers done, layers)."""
    return lambda done, total: listener.progress(done, total, "layers")
