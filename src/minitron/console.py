"""What a person at a terminal sees: progress and notes on stderr, results on stdout."""

import argparse
import json
import sys
import time
from typing import Any


class Console:
    """Draws progress: a bar on a terminal, plain lines elsewhere. Results go to stdout, everything else to stderr."""

    LOG_SECONDS = 20.0

    def __init__(self, args: argparse.Namespace):
        self.json, self.quiet = args.json, args.quiet
        self._started = time.monotonic()  # of the stage
        self._since = time.monotonic()  # of what is being counted: a stage may count several things in turn
        self._done = 0
        self._stage = ""
        self._logged = 0.0
        self._bar: Any = None

    def stage(self, name: str, state: str) -> None:
        self.close()
        if state == "running":
            self._stage, self._done = name, 0
            self._started = self._since = self._logged = time.monotonic()
            self.note(f"{name} ...")
        else:
            took = f" ({time.monotonic() - self._started:.1f} s)" if state == "done" else ""
            self.note(f"{name} {state}{took}")

    def progress(self, done: int, total: int, note: str = "") -> None:
        if self.quiet:
            return
        if done < self._done:
            self._since = time.monotonic()
        self._done = done
        if sys.stderr.isatty():
            self._draw(done, total, note)
        elif time.monotonic() - self._logged >= self.LOG_SECONDS:
            self._logged = time.monotonic()
            if total == 0:
                return self.note(f"{self._stage}: {done:,} {note}")
            left = (time.monotonic() - self._since) * (total - done) / done
            self.note(f"{self._stage}: {done}/{total} {note}, {left:.0f} s left")

    def note(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Shown even if quiet: it is about the result."""
        self.close()
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def result(self, value: Any, text: str) -> None:
        print(json.dumps(value, indent=2) if self.json else text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, done: int, total: int, note: str) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            columns = (TextColumn(self._stage), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(
                *columns, TextColumn("{task.description}"), console=RichConsole(stderr=True), transient=True
            )
            self._bar.start()
            self._bar.add_task("", total=total or None)
        self._bar.update(0, completed=done, total=total or None, description=note)
