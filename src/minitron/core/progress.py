"""The listener that work reports its progress to: the command line draws it, a library stays silent."""

import warnings
from collections import deque
from collections.abc import Callable
from typing import Protocol, runtime_checkable

# A speed is that of so many seconds, and of so many reports where they come less often.
RECENT_SECONDS, RECENT_REPORTS = 120.0, 8


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


class Pace:
    """The speed of work by its recent reports.

    The time before the first report does not count: the first step of a training or a pass is slower than the others,
    for it loads, compiles and allocates.
    """

    def __init__(self) -> None:
        self._reports: deque[tuple[float, int]] = deque()  # seconds, what was done by then

    def report(self, done: int, now: float) -> None:
        """Note how much is done at a time, in seconds of any clock; where less is done than before, work began anew."""
        if self._reports and done < self._reports[-1][1]:
            self._reports.clear()
        self._reports.append((now, done))
        while len(self._reports) > RECENT_REPORTS and now - self._reports[1][0] >= RECENT_SECONDS:
            self._reports.popleft()

    @property
    def per_second(self) -> float | None:
        """The speed, in what is counted; None until two reports differ."""
        if len(self._reports) < 2:
            return None
        (start, before), (end, after) = self._reports[0], self._reports[-1]
        return (after - before) / (end - start) if end > start and after > before else None

    def seconds_left(self, total: int) -> float | None:
        """The time until `total` is done at this speed; None where no speed is known yet."""
        speed = self.per_second
        return None if speed is None else max(0, total - self._reports[-1][1]) / speed


def layer_progress(listener: Listener) -> Callable[[int, int], None]:
    """The function that a streamed pass calls with (layers done, layers)."""
    return lambda done, total: listener.progress(done, total, "layers")
