"""A first signal to stop is taken as a request, which a long computation answers when its state is saved."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# torchrun and batch systems pass a signal on to processes that had it themselves: within this time it is the same one.
SAME_SIGNAL_SECONDS = 2.0


@dataclass
class StopRequest:
    number: int | None = None  # of the signal that asked
    since: float = 0.0

    @property
    def requested(self) -> bool:
        return self.number is not None


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Make a first signal to stop only ask while the block runs; a later one acts as usual.

    A request that nobody answered takes its effect when the block ends.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]  # as nohup has it

    def ask(number: int, _: Any) -> None:
        if not request.requested:
            request.number, request.since = number, time.monotonic()
        elif time.monotonic() - request.since >= SAME_SIGNAL_SECONDS:
            act_as_usual()
            signal.raise_signal(number)

    def act_as_usual() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        act_as_usual()
    if request.number is not None:
        signal.raise_signal(request.number)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let a signal that comes while the block runs act when it ends.

    torchrun sends SIGTERM to the other processes when one was killed, and the exception that it raises would be printed
    and lost if it came while Python collects garbage.
    """
    held: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in STOPPING if main}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        signal.raise_signal(held[0])
