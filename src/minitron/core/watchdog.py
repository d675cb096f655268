"""A thread that ends a process whose job hangs, with a line that names the process which does not answer.

Processes that compute together wait for each other. When one is stopped, swaps or lost its machine, the others would
wait for as long as their connection allows, and say nothing.
"""

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from minitron.core.errors import RunError

# A process that has given no sign of life for so long is taken for lost.
SILENT_SECONDS = 120.0
# So long may all processes be without an exchange; MINITRON_TIMEOUT in the environment is another number of seconds.
STUCK_SECONDS = 600.0
VARIABLE = "MINITRON_TIMEOUT"
BEATS = 4  # signs of life in SILENT_SECONDS, at least
MOST_NAMED = 8
GONE = "gone"  # of a process that has left the watch


@runtime_checkable
class Store(Protocol):
    """Texts that all processes of a job can read and write, as torch.distributed keeps them."""

    def set(self, key: str, value: str) -> None: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass
class _Seen:
    """The latest sign of life of a process, and when it and the number of exchanges changed last."""

    sign: str = ""
    exchanges: int = -1
    host: str = ""
    sign_at: float = 0.0
    exchanges_at: float = 0.0
    left: bool = False

    def update(self, sign: str) -> None:
        self.left = sign == GONE
        if self.left:
            return
        now, (_, exchanges, host) = time.monotonic(), sign.split(maxsplit=2)
        if sign != self.sign:
            self.sign, self.sign_at, self.host = sign, now, host
        if int(exchanges) != self.exchanges:
            self.exchanges, self.exchanges_at = int(exchanges), now


class Watchdog:
    """Watches the other processes while the block runs: the first process all others, and these the first."""

    def __init__(self, store: Store, rank: int, size: int):
        """Take a process's place in its job.

        Raises: RunError if the variable in the environment is no number of seconds.
        """
        stuck = _stuck_seconds()
        self.store, self.rank = store, rank
        self.stuck, self.silent = stuck, min(SILENT_SECONDS, stuck)
        self._exchanges, self._busy = 0, False
        others = range(1, size) if rank == 0 else (0,)
        self._seen = {number: _Seen() for number in (rank, *others)}
        self._answered = time.monotonic()  # when the store did last
        self._done = threading.Event()
        # One talks to the store, whose answers may never come, and the other judges.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=self.silent)

    def count(self) -> None:
        """Note that the process takes part in a further exchange."""
        self._exchanges += 1

    @contextmanager
    def busy(self) -> Iterator[None]:
        """In this block the process does what the others wait for, however long it takes."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _talk(self) -> None:
        """Give a sign of life, and hear those of others, until the block ends."""
        keys, beat = [_key(rank) for rank in self._seen], 0
        with suppress(RuntimeError):  # the store is gone, and with it the job
            while True:
                ending = self._done.wait(self.silent / BEATS if beat else 0)
                beat += 1
                self._exchanges += self._busy
                sign = GONE if ending else f"{beat} {self._exchanges} {socket.gethostname()}"
                self.store.set(_key(self.rank), sign)
                if ending:
                    return
                # The first answer comes when all have given a sign.
                for known, text in zip(self._seen.values(), self.store.multi_get(keys), strict=True):
                    known.update(bytes(text).decode())
                self._answered = time.monotonic()

    def _judge(self) -> None:
        """End the process when another does not answer, or none gets on."""
        while not self._done.wait(self.silent / BEATS):
            fault = self._fault(time.monotonic())
            if fault:
                print(f"error: {fault}; the same command goes on from the last state", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread waits inside an exchange, where nothing can be raised

    def _fault(self, now: float) -> str | None:
        """Say which process does not answer, or is behind where none gets on."""
        here = {rank: known for rank, known in self._seen.items() if known.sign and not known.left}
        if here and now - self._answered >= self.silent:
            return (
                "the machine where the processes meet, that of process 0 as a rule, has not answered for "
                f"{now - self._answered:.0f} seconds"
            )
        for rank, known in here.items():
            if now - known.sign_at >= self.silent:
                return f"process {rank} on {known.host} has given no sign of life for {now - known.sign_at:.0f} seconds"
        if len(here) < 2 or any(now - known.exchanges_at < self.stuck for known in here.values()):
            return None
        behind = min(known.exchanges for known in here.values())
        late = {rank: known.host for rank, known in here.items() if known.exchanges == behind}
        who = ", ".join(f"process {rank} on {host}" for rank, host in [*late.items()][:MOST_NAMED])
        return f"no process has got on for {self.stuck:.0f} seconds; {who} took part in the fewest exchanges"


def _stuck_seconds() -> float:
    given = os.environ.get(VARIABLE)
    if given is None:
        return STUCK_SECONDS
    with suppress(ValueError):
        if 0 < float(given) < math.inf:
            return float(given)
    raise RunError(f"{VARIABLE} is {given!r}; it must be a number of seconds above 0, such as 600")


def _key(rank: int) -> str:
    return f"minitron/alive/{rank}"
