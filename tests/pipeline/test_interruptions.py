"""What is interrupted between any two operations on files goes on, and ends with what an undisturbed command makes."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
from interrupting import count, made, signal_at
from processes import CONTEXT, PATIENCE_SECONDS, begun, forked

from minitron.core import interrupts
from minitron.core.direct_io import ahead
from minitron.core.interrupts import STOPPING, graceful_stop
from minitron.core.worker import Child
from minitron.evaluation.tasks import sandbox
from minitron.model.checkpoint import open_checkpoint
from minitron.pruning.cut import cut

# Of a run that is interrupted again and again: by what, each time after a part of the operations that are left.
INTERRUPTIONS = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP] * 2
DISTILL = ("minitron", "distill", "--teacher", "../teacher", "--student", "../student", "--data", "../text.jsonl")
DISTILL += ("--block-tokens", "16", "--tokens", "640", "--set", "distill.batch_blocks=4", "--out", "out", "--quiet")
TRAINING = {"tokens": 640, "batch_blocks": 4, "evaluate_blocks": 4}
CORRECTED = ("--set", "distill.correction=before", "--set", "distill.correction_tokens=320")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher, a student cut from it, and text."""
    path = tmp_path_factory.mktemp("desk")
    teacher = open_checkpoint(small.teacher(path / "teacher"))
    (path / "student").mkdir()
    cut(teacher, tiny.plan(teacher.shape, hidden=24, ffn=24, layers=3), path / "student")
    small.text(path / "text.jsonl")
    return path


def recipe_of(desk: Path, **sections: dict[str, Any]) -> Path:
    """Write the recipe of a short run of the desk's teacher and text."""
    recipe = {
        "model": str(desk / "teacher"),
        "data": {"source": str(desk / "text.jsonl"), "heldout_fraction": 0.2, "block_tokens": 16},
        "calibrate": {"samples": 8},
        "prune": {"shape": {"hidden": 24, "ffn": 24, "layers": 3}},
        "distill": TRAINING,
    }
    (desk / "recipe.yaml").write_text(json.dumps(recipe | sections))
    return desk / "recipe.yaml"


def undisturbed(size: int, *command: str, at: Path) -> int:
    """Run a command to its end in a new directory; returns how many operations on files its first process does."""
    at.mkdir()
    log = at.with_suffix(".operations")
    ended(begun(size, *command, cwd=at, prepare=partial(count, at, log)), [0] * size, at)
    return log.stat().st_size


def interrupted(number: int, at: int, *command: str, cwd: Path, size: int = 1, rank: int = 0) -> None:
    """Start a command, and send one of its processes a signal before its operation `at`."""
    prepare = partial(signal_at, cwd, {at}, number, rank)
    codes = [-signal.SIGKILL if number == signal.SIGKILL else 130] + [1] * (size - 1)
    ended(begun(size, *command, cwd=cwd, prepare=prepare), codes, cwd)


def ended(processes: list[multiprocessing.context.ForkServerProcess], codes: list[int], cwd: Path) -> None:
    for process in processes:
        process.join(PATIENCE_SECONDS)
    said = [(cwd / f".stderr{rank}").read_text() for rank in range(len(processes))]
    assert [process.exitcode for process in processes] == codes, said
    assert not any("Traceback" in text for text in said), said


@pytest.mark.slow
def test_a_run_interrupted_between_any_two_operations_ends_with_the_same_files(desk: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        desk,
        distill=TRAINING | {"teacher": "recorded"},
        evaluate={"blocks": 8, "prompts": ["the rain in"], "new_tokens": 8, "speed": False},
        gguf={"types": ["Q8_0"], "verify": False, "samples": 4},
    )
    command = ("minitron", "run", str(recipe), "--out", "out", "--quiet")
    operations, draw = undisturbed(1, *command, at=tmp_path / "undisturbed"), random.Random(0)
    expected, here = made(tmp_path / "undisturbed"), tmp_path / "here"
    here.mkdir()
    for number in INTERRUPTIONS:
        interrupted(number, draw.randrange(operations // len(INTERRUPTIONS)), *command, cwd=here)
        for directory in here.glob("out/*/"):
            resumed_from = directory.suffix == ".partial" or directory.name == "distill"
            assert resumed_from or (directory / "record.json").exists(), f"{directory} is half a stage"
    done = forked(1, *command, cwd=here)
    assert done.returncode == 0, done.stderr
    assert made(here) == expected


def test_a_distillation_killed_while_its_work_is_moved_is_whole_with_the_next_command(
    desk: Path, tmp_path: Path
) -> None:
    path, command = desk / "killed", (*DISTILL, *CORRECTED)
    last = undisturbed(1, *command, at=path) - 1
    expected = made(path)
    # The student's record is there, and the moves follow: of metrics, of the two models, and of what is left.
    for operation in random.Random(0).sample(range(last - 20, last + 1), 3):
        shutil.rmtree(path)
        path.mkdir()
        interrupted(signal.SIGKILL, operation, *command, cwd=path)
        done = forked(1, *command, cwd=path)
        assert done.returncode == 0 or "exists and is not empty" in done.stderr, (operation, done.stderr)
        assert made(path) == expected, operation


@pytest.mark.slow
def test_a_run_of_two_processes_of_which_either_is_killed_goes_on_to_the_same_files(desk: Path) -> None:
    """The first in the shared training, the second while the first measures; the other says so in one line."""
    command = ("minitron", "run", str(recipe_of(desk, evaluate={"blocks": 4, "speed": False})), "--out", "out", "-q")
    path = desk / "two"
    undisturbed(2, *command, at=path)
    expected = made(path)
    shutil.rmtree(path)
    path.mkdir()
    for killed, moment in ((0, "out/distill/state-*"), (1, "out/evaluations.partial")):
        processes = begun(2, *command, cwd=path)
        while not any(path.glob(moment)):
            assert processes[0].is_alive()
            time.sleep(0.002)
        processes[killed].kill()
        ended(processes, [-signal.SIGKILL if rank == killed else 1 for rank in range(2)], path)
        (line,) = (path / f".stderr{1 - killed}").read_text().splitlines()
        assert "another of the 2 processes was ended; run the same command to go on (" in line
    done = forked(2, *command, cwd=path)
    assert done.returncode == 0, done.stderr
    assert made(path) == expected


class Stopped(Exception):
    pass


@pytest.fixture
def stop_raises() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.usefixtures("stop_raises")
def test_a_signal_that_nobody_heeded_in_a_training_comes_after_it(number: int) -> None:
    heard = False
    with pytest.raises(Stopped), graceful_stop() as request:
        os.kill(os.getpid(), number)
        heard = request.requested
    assert heard


@pytest.mark.usefixtures("stop_raises")
def test_a_signal_that_comes_while_processes_part_acts_after_it() -> None:
    """Not in a callback of the garbage collection, where its exception would be printed and lost."""
    heard = False
    with pytest.raises(Stopped), interrupts.signals_held():
        os.kill(os.getpid(), signal.SIGTERM)
        heard = True
    assert heard


@pytest.mark.usefixtures("stop_raises")
def test_a_signal_that_is_passed_on_is_one_and_a_later_one_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped), graceful_stop() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.number == signal.SIGINT
        monkeypatch.setattr(interrupts, "SAME_SIGNAL_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the later signal did nothing")


def test_what_nohup_lets_a_process_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with graceful_stop() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("stop_raises")
def test_nobody_waits_for_a_child_whose_caller_was_interrupted() -> None:
    with pytest.raises(Stopped), Child() as child:
        pid = child.call(os.getpid)
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        child.call(time.sleep, 1000)
    assert not Path(f"/proc/{pid}").exists()


def test_a_caller_that_is_interrupted_twice_leaves_what_is_being_made_ahead_alone() -> None:
    """The second time while it waits for the thread, which is making an item."""
    closed, left = threading.Event(), 2

    def items() -> Generator[int, None, None]:
        try:
            while True:
                time.sleep(0.3)
                yield 0
        finally:
            closed.set()

    def stop(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
        raise Stopped

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    with pytest.raises(Stopped), closing(ahead(items())) as running:
        next(running)
    signal.signal(signal.SIGALRM, before)
    assert left == 0 and closed.wait(PATIENCE_SECONDS)


def _run_asleep() -> None:
    sandbox.run_program("import time\ntime.sleep(1000)", sandbox.Limits(wall_seconds=1000))


def is_confined(process: str) -> bool:
    return "Seccomp:\t2" in Path(f"/proc/{process}/status").read_text()


def test_a_program_in_the_sandbox_ends_with_the_process_that_watches_it() -> None:
    process = CONTEXT.Process(target=_run_asleep)
    process.start()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + PATIENCE_SECONDS
    found: list[str] = []
    while not any(is_confined(program) for program in found):
        assert time.monotonic() < until
        time.sleep(0.01)
        found = children.read_text().split()
    process.kill()
    process.join()
    while Path(f"/proc/{found[0]}").exists():
        assert time.monotonic() < until, "the program lives on"
        time.sleep(0.01)


AT_EXIT = """
import atexit, os, signal, sys
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
from minitron.cli.main import main
sys.argv = ["minitron", "inspect", "teacher"]
sys.exit(main())
"""


def test_a_signal_when_all_is_done_changes_nothing(desk: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", AT_EXIT], cwd=desk, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.startswith("teacher: llama")
