"""A server that has imported everything and runs each command of minitron in a fork of itself: seconds less for each.

    python tests/helpers/forks.py

reads one request a line, as JSON, and answers each with one line: the exit code, negative for a signal, and the seconds
that it took. `Forks` is the other end.
"""

import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

CRASHED = 70  # the exit code of a command that ended in an exception
MEMORY_BYTES, FILE_BYTES = 4 << 30, 256 << 20
HERE = Path(__file__)


@dataclass(frozen=True)
class Ended:
    """A command that ended: its exit code (CRASHED after an exception, negative for a signal) and what it said."""

    code: int
    seconds: float
    timed_out: bool
    stdout: str
    stderr: str


class Forks:
    """Commands of minitron, one after the other, each in a fork of one process."""

    def __init__(self, base: Path):
        """
        Args:
            base: an existing directory; what a command says lies there while it is read.
        """
        self.base = base
        places = {"PYTHONPATH": str(HERE.parents[2] / "src"), "HF_HOME": str(base / "hub"), "HF_HUB_OFFLINE": "1"}
        places |= {"TMPDIR": str(base)}
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._server = subprocess.Popen(
            [sys.executable, str(HERE)],
            env=os.environ | places | threads,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=base,
        )

    def run(
        self, *command: str, cwd: Path, places: dict[str, str], limit_seconds: float = 60, killed_after_saves: int = 0
    ) -> Ended:
        """
        Args:
            places: environment variables that name directories.
            killed_after_saves: the command is killed when it has saved so many states of a training.
        """
        request = {
            "command": command,
            "cwd": str(cwd),
            "places": places,
            "limit_seconds": limit_seconds,
            "said": [str(self.base / name) for name in ("stdout", "stderr")],
            "killed_after_saves": killed_after_saves,
        }
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        said = [(self.base / name).read_bytes().decode(errors="replace") for name in ("stdout", "stderr")]
        return Ended(**answer, stdout=said[0], stderr=said[1])

    def close(self) -> None:
        self._server.communicate()


def serve(requests: TextIO, answers: TextIO) -> None:
    _import_everything()
    gc.freeze()  # collections in a fork leave the shared pages alone
    for line in requests:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _import_everything() -> None:
    import xllamacpp  # noqa: F401


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_run(request))
    watch = os.pidfd_open(child)
    ended, _, _ = select.select([watch], [], [], request["limit_seconds"])
    if not ended:
        os.killpg(child, signal.SIGKILL)
    os.close(watch)
    _, status = os.waitpid(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it left running
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "seconds": round(time.monotonic() - started, 3), "timed_out": not ended}


def _run(request: dict[str, Any]) -> int:
    """The command in this process; returns its exit code."""
    from minitron.cli.main import main

    os.setpgid(0, 0)
    for number, name in ((1, request["said"][0]), (2, request["said"][1])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["places"])
    tempfile.tempdir = None
    for kind, limit in ((resource.RLIMIT_DATA, MEMORY_BYTES), (resource.RLIMIT_FSIZE, FILE_BYTES)):
        resource.setrlimit(kind, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if request["killed_after_saves"]:
        _kill_after(request["killed_after_saves"])
    sys.argv = ["minitron", *request["command"]]
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    try:
        code = main(request["command"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = CRASHED
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _kill_after(saves: int) -> None:
    from minitron.distillation.state import States

    save, done = States.save, []

    def save_and_die(self: States, step: int, tokens: int) -> None:
        save(self, step, tokens)
        done.append(step)
        if len(done) == saves:
            os.kill(os.getpid(), signal.SIGKILL)

    States.save = save_and_die  # type: ignore[method-assign]


if __name__ == "__main__":
    # What a library prints while it is imported is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
