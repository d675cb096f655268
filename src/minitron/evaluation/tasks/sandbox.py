"""Programs that a model wrote, run where they can do no harm, to see whether they work.

Each runs in a process of its own that confines itself before it reads the program (confined.py): no network, no other
process, no signal, no file written or changed, only Python readable; bounded memory and time. Where the kernel cannot
enforce one of these, nothing is run.

Success is a random token that the process writes at the program's end, so neither an exit code nor output counts. A
program could still look for the token in its own process. Therefore a program that succeeds runs once more with a last
line that fails: if it succeeds again, its report is false, and it has failed.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron.core.errors import TaskError
from minitron.core.files import scratch_directory
from minitron.evaluation.tasks.confined import READY, REFUSED

CONFINED = Path(__file__).with_name("confined.py")
START_SECONDS = 60.0  # for Python to start on a busy machine
MOST_WORKERS = 4


@dataclass(frozen=True)
class Limits:
    """The limits of one program. Processor time, unlike the 3 seconds of the harness's executor by the clock, does not
    depend on the load of the machine.
    """

    cpu_seconds: int = 3
    wall_seconds: float = 15.0
    memory_bytes: int = 1 << 30


LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """Whether a program came to its end, and if not, the reason as seen from outside."""

    passed: bool
    reason: str


def run_program(program: str, limits: Limits = LIMITS) -> Outcome:
    """Run a program to its end.

    Raises: TaskError if this machine cannot confine it.
    """
    first = _run(program, limits)
    if first.passed and _run(f"{program}\nraise AssertionError", limits).passed:
        return Outcome(False, "it reports success also where it cannot succeed")
    return first


def require_sandbox() -> None:
    """Raises: TaskError if this machine cannot confine programs."""
    outcome = _run("pass", LIMITS)
    if not outcome.passed:
        raise TaskError(f"the sandbox for generated code does not work on this machine: {outcome.reason}")


def _run(program: str, limits: Limits) -> Outcome:
    if not sys.platform.startswith("linux"):
        raise TaskError(f"generated code runs only in a sandbox, which needs Linux and is not there on {sys.platform}")
    token = secrets.token_hex(16)
    job = json.dumps({"program": program, "token": token, "parent": os.getpid()} | asdict(limits)).encode()
    with scratch_directory(prefix="minitron-sandbox-") as empty:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CONFINED)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            return _watched(process, job, token.encode(), limits)
        finally:
            _kill(process)


def _watched(process: subprocess.Popen[bytes], job: bytes, token: bytes, limits: Limits) -> Outcome:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(job)
    source = process.stdout.fileno()
    said = b"".join(_said(source, 1, START_SECONDS))
    if said != READY:
        reason = b"".join(_said(source, 1000, START_SECONDS)) if said == REFUSED else b"its process did not start"
        raise TaskError(
            "generated code runs only where it can be confined, and this machine cannot: "
            f"{reason.decode(errors='replace')}"
        )
    # One byte more than the token is read, so that a longer text is not taken for it.
    said = b"".join(_said(source, len(token) + 1, limits.wall_seconds))
    if said == token:
        return Outcome(True, "passed")
    if said:
        return Outcome(False, "it wrote where only the sandbox may")
    return Outcome(False, _why_silent(process))


def _why_silent(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=0.5)  # the process may be ending right now
    except subprocess.TimeoutExpired:
        return "time limit"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "time limit"
    return "killed" if code < 0 else "it did not come to its end"


def _said(source: int, most: int, seconds: float) -> Iterator[bytes]:
    """Yield the bytes of a pipe until it ends, `most` bytes came or the time is over."""
    end = time.monotonic() + seconds
    while most > 0 and select.select([source], [], [], max(0.0, end - time.monotonic()))[0]:
        piece = os.read(source, most)
        if not piece:
            return
        most -= len(piece)
        yield piece


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@dataclass(frozen=True)
class CodeEval:
    """A substitute for the hub's metric `code_eval`, through which the harness's tasks run programs."""

    limits: Limits = LIMITS

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], dict[int, list[Outcome]]]:
        """Run all programs; returns pass@k over tasks, and the outcomes by the task's number.

        Args:
            references: the tests of each task.
            predictions: the programs written for each task.
        """
        programs = [
            (number, f"{candidate}\n{tests}")
            for number, (candidates, tests) in enumerate(zip(predictions, references, strict=True))
            for candidate in candidates
        ]
        with ThreadPoolExecutor(min(MOST_WORKERS, os.cpu_count() or 1)) as workers:
            outcomes = list(workers.map(lambda one: run_program(one[1], self.limits), programs))
        of_task: dict[int, list[Outcome]] = {number: [] for number in range(len(references))}
        for (number, _), outcome in zip(programs, outcomes, strict=True):
            of_task[number].append(outcome)
        right = [(len(found), sum(one.passed for one in found)) for found in of_task.values()]
        rates = {f"pass@{size}": [pass_at(size, *counts) for counts in right if counts[0] >= size] for size in k}
        return {name: sum(values) / len(values) for name, values in rates.items() if values}, of_task


def pass_at(size: int, num_programs: int, num_passed: int) -> float:
    """The probability that at least one of `size` programs drawn from `num_programs` passes.

    Paper: Chen et al. 2021 (Evaluating Large Language Models Trained on Code), equation 1.
    """
    none = 1.0
    for missing in range(num_programs - num_passed + 1, num_programs + 1):
        none *= 1 - size / missing
    return 1.0 if num_programs - num_passed < size else 1 - none


def code_eval() -> Any:
    """Raises: TaskError if programs cannot be confined here."""
    require_sandbox()
    return CodeEval()
