"""Generated code does no harm, and counts as passed only if its tests did."""

import os
import socket
from pathlib import Path

import pytest

from minitron.core.errors import TaskError
from minitron.evaluation.tasks import sandbox
from minitron.evaluation.tasks.confined import ALLOWED, CHECKED, filter_program
from minitron.evaluation.tasks.sandbox import CodeEval, Limits, pass_at, run_program

# Generous by the clock: the machine may be busy. What runs forever ends by its processor time.
QUICK = Limits(cpu_seconds=1, wall_seconds=20.0, memory_bytes=256 << 20)
RIGHT = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(2) == 4"


def failed(program: str, limits: Limits = QUICK) -> str:
    outcome = run_program(f"{program}\n{TESTS}", limits)
    assert not outcome.passed
    return outcome.reason


@pytest.mark.parametrize(
    "program",
    [
        RIGHT,
        "import json, math, re, collections, itertools, heapq, random, threading, datetime\n" + RIGHT,
        RIGHT + "print('x' * 10**6)\n",
        "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()\n" + RIGHT,
    ],
    ids=["right", "modules", "prints", "thread"],
)
def test_right_code_passes(program: str) -> None:
    assert run_program(f"{program}\n{TESTS}", QUICK).passed


@pytest.mark.parametrize(
    "program",
    [
        "def double(x):\n    return x\n",
        "def double(x:\n",
        "",
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "import atexit, os\natexit.register(os._exit, 0)\nassert False",
        "def double(x):\n    return double(x)\n",
    ],
    ids=["wrong", "syntax", "nothing", "exits", "leaves", "raises", "interrupts", "at exit", "recursion"],
)
def test_code_that_does_not_reach_the_end_of_its_tests_has_failed(program: str) -> None:
    assert failed(program) == "it did not come to its end"


def test_code_changes_no_file(tmp_path: Path) -> None:
    victim, new = tmp_path / "victim", tmp_path / "new"
    victim.write_text("as it was")
    victim.chmod(0o600)
    before = sorted(Path(tmp_path).iterdir())
    for harm in (
        f"open({str(new)!r}, 'w')",
        "open('here', 'w')",
        f"open({str(victim)!r}, 'a').write('x')",
        f"import os; os.open({str(victim)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"import os; os.truncate({str(victim)!r}, 0)",
        f"import os; os.unlink({str(victim)!r})",
        f"import os; os.rename({str(victim)!r}, {str(new)!r})",
        f"import os; os.link({str(victim)!r}, {str(new)!r})",
        f"import os; os.chmod({str(victim)!r}, 0o777)",
        f"import os; os.utime({str(victim)!r}, (0, 0))",
        "import os; os.mkdir('here')",
        f"open({str(victim)!r}).read()",
        "open('/proc/self/environ').read()",
    ):
        caught = (
            f"{RIGHT}\ntry:\n    {harm}\nexcept (PermissionError, MemoryError):\n    refused = True\nassert refused"
        )
        assert run_program(caught, QUICK).passed, harm
        assert failed(f"{harm}\n{RIGHT}") == "it did not come to its end"
    assert victim.read_text() == "as it was" and victim.stat().st_mode & 0o777 == 0o600
    assert sorted(tmp_path.iterdir()) == before


def test_code_reaches_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        assert failed(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))\n{RIGHT}")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert failed(f"import socket\nsocket.socketpair()\n{RIGHT}") and failed(f"import asyncio\nasyncio.run(1)\n{RIGHT}")


def test_code_starts_and_stops_no_process() -> None:
    for harm in (
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.system('true') == 0 or undefined",
        "subprocess.run(['true'])",
        "os.kill(os.getppid(), 9)",
        f"os.kill({os.getpid()}, 0)",
        "os.killpg(0, 9)",
        "os.setsid()",
        "os.nice(1)",
        "multiprocessing.Process(target=print).start()",
        "resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    ):
        reason = failed(f"import fcntl, multiprocessing, os, resource, subprocess\n{harm}\n{RIGHT}")
        assert reason == "it did not come to its end", harm


def test_system_calls_by_number_are_refused_too() -> None:
    calls = (
        "libc.fork() == libc.socket(2, 1, 0) == libc.kill(1, 0) == libc.unlink(b'/tmp') == libc.chmod(b'/', 0) == -1"
    )
    assert run_program(f"import ctypes\nlibc = ctypes.CDLL(None)\nassert {calls}", QUICK).passed


def test_code_that_takes_too_much_is_stopped() -> None:
    assert failed(f"while True: print('x' * 10**6)\n{RIGHT}") == "time limit"
    asleep = Limits(wall_seconds=0.1)
    assert failed(f"import time\ntime.sleep(1000)\n{RIGHT}", asleep) == "time limit"
    caught = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert failed(f"{caught}\n{RIGHT}") == "time limit"
    assert failed(f"x = []\nwhile True: x.append(bytearray(10**7))\n{RIGHT}") == "it did not come to its end"
    assert failed(f"x = bytearray(10**9)\n{RIGHT}") == "it did not come to its end"


def test_success_cannot_be_forged() -> None:
    everywhere = (
        "import os\nfor file in range(64):\n    try: os.write(file, b'+' + b'0' * 32)\n    except OSError: pass\n"
    )
    assert failed(everywhere + "os._exit(0)") == "it wrote where only the sandbox may"
    assert failed("raise SystemExit(0)") and failed("print('passed')\nraise SystemExit(0)")
    found = (
        "import os, sys\nabove = sys._getframe(1).f_locals\nos.write(above['report'], above['job']['token'].encode())\n"
    )
    assert failed(found + "os._exit(0)") == "it reports success also where it cannot succeed"
    hidden = "import builtins\nbuiltins.AssertionError = type('Never', (BaseException,), {})\n"
    assert failed(hidden + "def double(x): return 5")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = children()
    run_program("pass", QUICK)
    failed("import time\ntime.sleep(1000)", Limits(wall_seconds=0.1))
    assert list(tmp_path.iterdir()) == []
    assert children() == before


def children() -> set[str]:
    """Numbers of this process's children, the dead that nothing has waited for included."""
    return {number for file in Path("/proc/self/task").glob("*/children") for number in file.read_text().split()}


def test_what_cannot_be_confined_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = sandbox.CONFINED.read_text()
    for change, reason in (
        (
            ("LANDLOCK_ADD, LANDLOCK_RESTRICT = 444,", "LANDLOCK_ADD, LANDLOCK_RESTRICT = 9999,"),
            "Landlock, of Linux 5.13",
        ),
        (("platform.machine())", "'sparc')"), "system calls is not known for sparc processors"),
        (
            (
                "SECCOMP_MODE_FILTER, PR_SET_DUMPABLE = 38, 22, 2, 4",
                "SECCOMP_MODE_FILTER, PR_SET_DUMPABLE = 38, 22, 9, 4",
            ),
            "secc",
        ),
    ):
        assert change[0] in child
        (tmp_path / "child.py").write_text(child.replace(*change))
        monkeypatch.setattr(sandbox, "CONFINED", tmp_path / "child.py")
        harm = tmp_path / "harm"
        with pytest.raises(TaskError, match=f"only where it can be confined, and this machine cannot: .*{reason}"):
            run_program(f"open({str(harm)!r}, 'w')")
        assert not harm.exists()


def test_the_filter_lists_no_call_that_reaches_out() -> None:
    reaching = ("socket", "connect", "fork", "exec", "kill", "ptrace", "mount", "unlink", "rename", "chmod", "io_uring")
    for machine, calls in ALLOWED.items():
        assert not [name for name in calls if any(word in name for word in reaching)]
        assert len({*calls.values(), *CHECKED[machine].values()}) == len(calls) + len(CHECKED[machine])
        steps = filter_program(machine)
        # Every jump lands inside the program, and the program ends with a refusal.
        assert all(place + 1 + max(step[1:3]) < len(steps) for place, step in enumerate(steps) if step[0] & 7 == 5)
        assert steps[-1] == (0x06, 0, 0, 0x00050001)


def test_pass_at_k_is_the_share_of_draws_with_one_that_passes() -> None:
    assert [pass_at(1, 4, right) for right in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert pass_at(2, 4, 2) == pytest.approx(1 - (2 / 4) * (1 / 3)) and pass_at(3, 4, 2) == 1.0


def test_the_executor_counts_programs_by_task() -> None:
    wrong = "def double(x): return x"
    rates, outcomes = CodeEval(QUICK).compute(
        references=[TESTS, TESTS], predictions=[[RIGHT, wrong], [wrong, wrong]], k=[1, 2]
    )
    assert rates == {"pass@1": 0.25, "pass@2": 0.5}
    assert [[one.passed for one in of_task] for of_task in outcomes.values()] == [[True, False], [False, False]]


def test_programs_wait_for_nothing() -> None:
    """One that reads its input finds it empty."""
    assert run_program("import sys\nassert sys.stdin.read() == ''", QUICK).passed
    assert failed("input()") == "it did not come to its end"
