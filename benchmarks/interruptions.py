"""Does an interrupted command end with the bits of an undisturbed one, and is no half-written file taken as whole?

    python benchmarks/interruptions.py [--trials 510] [--jobs NAME ...] [--found NOTES.md] [--out FILE]

Runs of a tiny model with every stage, and the commands that write, are killed, sent signals, and robbed of the room on
their disk: at the n-th operation on files, n drawn from all of the run, or at a time drawn from its length. The files
that are left are compared with those of an undisturbed run, the same command is given again, and its results are
compared with the undisturbed run's, by sha256, except for times, memory and the names of machines.

Each command is a fork of one process that has imported everything, so that a trial costs only the work. The full disk
is a tmpfs in a namespace of the trial's own, filled to the last page at that moment and emptied before the command is
given again. The job "run, 2 processes" is started by torchrun's own agent, one of its two processes is killed, and all
of them must be over within a minute.
"""

import argparse
import atexit
import ctypes
import fcntl
import importlib
import json
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
from interrupting import FILLER, at_each_operation, count, digest_of, fill, made, signal_at

TRIALS = 600
PATIENCE_SECONDS = 180.0  # for a command; one of two processes whose other is gone has less
ALONE_SECONDS = (
    20.0  # then the launcher ends it, as torchrun does: with SIGTERM, and with SIGKILL after 30 seconds more
)
ORPHAN_SECONDS = 10.0  # for the processes that a command started, once it is gone
OVER_SECONDS = 60.0  # under torchrun, from the death of one process to the end of all
DISK = "32m"
# Stages that keep what they go on from, and are no results.
UNFINISHED = ("distill", "distill-corrected", "distill-scratch", "search-state", "data-state")
CLOSENESS = 2e-5  # of weights trained by another number of processes: what tests/core/test_parallel.py holds


@dataclass(frozen=True)
class Job:
    """A command, and what an undisturbed one took and made."""

    name: str
    words: tuple[str, ...]
    share: int  # of the trials
    processes: int = 1
    torchrun: bool = False  # whether torchrun's own agent starts the processes, and ends the other when one is gone
    seconds: float = 0.0
    operations: int = 0  # on files, of the first process
    made: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    number: int
    job: Job
    kind: str  # kill, INT, TERM, HUP, INT twice, disk, or what is done to states
    by: str  # operation or time
    at: float  # the number of the operation, or seconds
    rank: int | None = None  # of several processes the one that is met; None: all
    resumed_with: int = 1


@dataclass
class Outcome:
    stage: str  # that was going on
    codes: list[int]
    said: str = ""  # the last line
    ended_before: bool = False
    by_launcher: bool = False  # one that was left alone did not end by itself
    over_seconds: float | None = None  # under torchrun: from the death of one process to the end of all
    violations: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="*", help="only these; default all")
    parser.add_argument("--kinds", nargs="*", help="only these; default all")
    parser.add_argument("--found", type=Path, help="a Markdown file: what the campaign found on the way")
    parser.add_argument("--keep", type=Path, help="directory to work in, where trials with violations stay")
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minitron-bench-") as directory:
        work = (args.keep or Path(directory)).resolve()
        started = time.monotonic()
        jobs = [undisturbed(job, work) for job in given(work) if not args.jobs or job.name in args.jobs]
        trials = [one for one in drawn(jobs, args.trials, args.seed) if not args.kinds or one.kind in args.kinds]
        outcomes = []
        for trial in trials:
            outcomes.append(in_a_fork(partial(tried, trial, work), work))
            show(trial, outcomes[-1])
        from lib.measure import publish

        publish(report(jobs, trials, outcomes, time.monotonic() - started, args.found), args.out)


def show(trial: Trial, outcome: Outcome) -> None:
    met = f"{trial.kind} at {trial.by} {trial.at:.5g}" + (f" of rank {trial.rank}" if trial.rank is not None else "")
    print(f"{trial.number:4} {trial.job.name}: {met}: {outcome.stage}, {outcome.codes}", file=sys.stderr, flush=True)
    for violation in outcome.violations:
        print(f"     VIOLATION: {violation}", file=sys.stderr, flush=True)


# What is run.


def given(work: Path) -> list[Job]:
    """The jobs, with their models, text and recipes in `work / "desk"`."""
    desk = work / "desk"
    shutil.rmtree(desk, ignore_errors=True)
    desk.mkdir(parents=True)
    recipes = in_a_fork(lambda: furnish(desk), work)
    for name, recipe in recipes.items():
        (desk / f"{name}.yaml").write_text(json.dumps(recipe))
    teacher, text = ("--teacher", str(desk / "teacher")), ("--data", str(desk / "text.jsonl"), "--block-tokens", "16")
    distill = ("distill", *teacher, "--student", str(desk / "student"), *text, "--tokens", "1280")
    distill += ("--set", "distill.batch_blocks=4", "--set", "distill.evaluate_blocks=4")
    corrected = ("--set", "distill.correction=before", "--set", "distill.correction_tokens=640")
    calibrate = ("calibrate", str(desk / "teacher"), *text, "--samples", "24", "--second-moment")
    prune = ("prune", str(desk / "teacher"), "--target-params", "70%", *text[:2], "--samples", "8")
    quantize = ("quantize", str(desk / "student"), "--types", "Q8_0,Q4_0", "--calibration", *text[1:], "--no-verify")
    return [
        Job("run, with search", ("run", str(desk / "search.yaml")), 22),
        Job("run, lessons", ("run", str(desk / "lessons.yaml")), 14),
        Job("run, sampled text", ("run", str(desk / "sampled.yaml")), 12),
        Job("run, llama.cpp and code", ("run", str(desk / "verified.yaml")), 4),
        Job("distill", (*distill, *corrected), 16),
        Job("calibrate", calibrate, 4),
        Job("prune", prune, 6),
        Job("quantize", quantize, 6),
        Job("distill, 2 processes", (*distill, *corrected, "--set", "distill.precision=float32"), 12, processes=2),
        Job("calibrate, 2 processes", calibrate, 4, processes=2),
        Job("run, 2 processes", ("run", str(desk / "shared.yaml")), 8, processes=2, torchrun=True),
    ]


def furnish(desk: Path) -> dict[str, Any]:
    """Make a teacher, a student cut from it, text and rows of benchmarks; returns the recipes."""
    import bench
    import small
    import tiny

    from minitron.model.checkpoint import open_checkpoint
    from minitron.pruning.cut import cut

    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 8, "num_hidden_layers": 4}
    teacher = open_checkpoint(small.teacher(desk / "teacher", **sizes))
    (desk / "student").mkdir()
    cut(teacher, tiny.plan(teacher.shape, hidden=32, ffn=64, layers=3), desk / "student")
    small.text(desk / "text.jsonl")
    bench.write(desk / "tasks", ("piqa", "gsm8k"), 3)
    bench.write(desk / "code", ("mbpp",), 2)
    base: dict[str, Any] = {
        "model": str(desk / "teacher"),
        "data": {"source": str(desk / "text.jsonl"), "heldout_fraction": 0.2, "block_tokens": 16},
        "calibrate": {"samples": 8},
        "prune": {"shape": {"hidden": 32, "ffn": 64, "layers": 3}},
        "distill": {"tokens": 1600, "batch_blocks": 4, "evaluate_blocks": 4},
        "evaluate": {"blocks": 8, "prompts": [small.WORDS[:11]], "new_tokens": 8, "speed": False},
        "gguf": {"types": ["Q8_0", "Q4_0"], "verify": False, "samples": 4},
    }
    tasks = {"tasks_dir": str(desk / "tasks"), "limit": 1}
    search = {"level": "distilled", "cut_candidates": 3, "distill_candidates": 3, "first_rung": 0.1, "judge_blocks": 4}
    search |= {"window": 0.3, "dims": {"layers": "3-4", "hidden": "32-64/32"}}
    sampled = base["data"] | {"source": "teacher", "max_tokens": 1600, "sample_batch": 8}
    parallel = {"correction": "parallel", "correction_tokens": 640}
    before = {"teacher": "recorded", "correction": "before", "correction_tokens": 640}
    lessons = base | {"evaluate": base["evaluate"] | tasks, "distill": base["distill"] | before}
    lessons["prune"] = base["prune"] | {"iterations": 2}
    shared = base | {"scratch_baseline": True, "prune": {"target": "70%"}}
    shared["distill"] = base["distill"] | before | {"tokens": 640, "correction_tokens": 320, "precision": "float32"}
    shared["search"] = search | {"cut_candidates": 2, "distill_candidates": 2}
    return {
        "shared": shared,
        "search": base | {"prune": {"target": "70%"}, "search": search},
        "lessons": lessons,
        "sampled": base | {"data": sampled, "scratch_baseline": True},
        "verified": base
        | {
            "gguf": base["gguf"] | {"types": ["Q8_0"], "verify": True, "blocks": 2},
            "evaluate": base["evaluate"] | {"tasks_dir": str(desk / "code"), "allow_code": True},
            "distill": base["distill"] | parallel,
        },
    }


def undisturbed(job: Job, work: Path) -> Job:
    """Run a job, twice: what it imports is imported here, for all that follow, and its second run is timed."""
    for last in (False, True):
        place = Place.new((work / job_directory(job)).parent)
        facts = in_a_fork(partial(measured, job, place), work)
        for name in sorted(facts["modules"]):
            with suppress(ImportError):
                importlib.import_module(name)
        if last:
            job = replace(job, seconds=facts["seconds"], operations=facts["operations"], made=facts["made"])
    print(f"{job.name}: {job.seconds:.1f} s, {job.operations} operations, {len(job.made)} files", file=sys.stderr)
    return job


def measured(job: Job, place: "Place") -> dict[str, Any]:
    def leave_behind() -> None:
        (place.said / "modules").write_text(json.dumps([name for name in sys.modules if name.startswith(IMPORTED)]))

    counted = place.said / "operations"

    def prepare(rank: int) -> None:
        atexit.register(leave_behind)
        count(place.here, counted, rank)

    started = time.monotonic()
    run = Running.begin(job, place, job.processes, prepare)
    codes = run.codes(PATIENCE_SECONDS)
    seconds = time.monotonic() - started
    assert not any(codes), (job.name, codes, place.texts("stderr"))
    facts = {"seconds": seconds, "operations": counted.stat().st_size, "made": made(place.here)}
    return facts | {"modules": json.loads((place.said / "modules").read_text())}


IMPORTED = ("minitron", "torch.", "transformers", "safetensors", "lm_eval", "gguf", "tokenizers", "numpy", "accelerate")


def drawn(jobs: Sequence[Job], count: int, seed: int) -> list[Trial]:
    """Of twenty trials twelve are kills, five signals and three a full disk; a few damage states."""
    draw, trials = random.Random(seed), []
    kinds = ["kill"] * 12 + ["INT", "TERM", "TERM", "HUP", "INT twice"] + ["disk"] * 3
    total = sum(job.share for job in jobs)
    for job in jobs:
        for number in range(round(count * job.share / total)):
            kind = "kill" if job.torchrun else kinds[(len(trials) * 7) % len(kinds)]
            by = "operation" if draw.random() < 0.55 else "time"
            rank = None
            if job.processes > 1:
                rank = draw.randrange(job.processes) if kind == "kill" else 0 if kind == "disk" else None
                # Another process than the first does other operations, and a signal meets all at the same time.
                by = "time" if rank == 1 or kind not in ("kill", "disk") else by
            at = draw.randrange(job.operations) if by == "operation" else draw.uniform(0.02, job.seconds)
            resumed_with = 1 if job.processes > 1 and number % 3 == 2 and not job.torchrun else job.processes
            trials.append(Trial(len(trials), job, kind, by, at, rank, resumed_with))
        if job.name == "distill":
            trials += [Trial(len(trials) + n, job, kind, "time", n) for n, kind in enumerate(DAMAGES)]
    return trials


# One trial.


@dataclass(frozen=True)
class Place:
    """Where a command runs."""

    here: Path  # its working directory
    tmp: Path
    said: Path

    @classmethod
    def new(cls, path: Path) -> "Place":
        shutil.rmtree(path, ignore_errors=True)
        place = cls(*(path / name for name in ("here", "tmp", "said")))
        for directory in (place.here, place.tmp, place.said):
            directory.mkdir(parents=True)
        return place

    def texts(self, name: str) -> list[str]:
        return [file.read_text(errors="replace") for file in sorted(self.said.glob(f"{name}*"))]


@dataclass
class Running:
    """The processes of a command."""

    processes: dict[int, int | None]  # pid -> exit code, negative for a signal
    ready: int  # a pipe that says when they begin
    started: float = 0.0

    @classmethod
    def begin(cls, job: Job, place: Place, size: int, prepare: Callable[[int], None] = lambda rank: None) -> "Running":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        reading, writing = os.pipe()
        begun: dict[int, int | None] = {}
        if job.torchrun:
            pid = forked()
            if pid == 0:
                os.close(writing)
                launch(job, place, size, prepare)
            begun[pid] = None
        for rank in range(0 if job.torchrun else size):
            pid = forked()
            if pid == 0:
                os.close(reading)
                group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
                group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if size > 1 else {}
                os._exit(become(job, place, group, lambda rank=rank: (prepare(rank), os.close(writing))))
            begun[pid] = None
        os.close(writing)
        os.read(reading, 1)  # ends when every process has closed its side
        os.close(reading)
        while job.torchrun and not all((place.said / f"pid{rank}").is_symlink() for rank in range(size)):
            time.sleep(0.003)
        return cls(begun, reading, time.monotonic())

    def pids(self, rank: int | None) -> list[int]:
        """Of the processes that still run, those of a rank."""
        return [pid for place, pid in enumerate(self.processes) if rank in (None, place)]

    def send(self, number: int, rank: int | None) -> None:
        for pid in self.pids(rank):
            if self.processes[pid] is None:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def poll(self) -> bool:
        """Whether all have ended."""
        for pid, code in self.processes.items():
            if code is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.processes[pid] = os.waitstatus_to_exitcode(status)
        return None not in self.processes.values()

    def wait(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() >= until:
                return False
            time.sleep(0.003)
        return True

    def codes(self, seconds: float) -> list[Any]:
        """Exit codes; `slow` for a process that had to be ended."""
        if self.wait(seconds):
            return [*self.processes.values()]
        slow = [pid for pid, code in self.processes.items() if code is None]
        self.send(signal.SIGKILL, None)
        self.wait(10)
        return ["slow" if pid in slow else code for pid, code in self.processes.items()]


def launch(job: Job, place: Place, size: int, prepare: Callable[[int], object]) -> NoReturn:
    """Be `torchrun --standalone`: its agent, but for workers that are forks of this process."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def work() -> None:
        rank = int(os.environ["RANK"])
        code = become(job, place, {"RANK": rank}, lambda: (prepare(rank), note(place, rank)))
        if code:
            os._exit(code)

    code = 1
    (place.said / "agent").touch()
    for number in (1, 2):
        os.dup2(os.open(place.said / "agent", os.O_WRONLY | os.O_APPEND), number)
    config = LaunchConfig(1, 1, size, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    config.start_method = "fork"
    with suppress(BaseException):
        elastic_launch(config, work)()
        code = 0
    os._exit(code)


def become(job: Job, place: Place, group: Mapping[str, object], prepare: Callable[[], object]) -> int:
    """Be the command, as if Python had been started for it; returns its exit code.

    Args:
        group: the environment variables that say which process of how many this is.
    """
    code: Any = 70
    rank = group["RANK"]
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place.said / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
        os.chdir(place.here)
        os.environ["TMPDIR"], tempfile.tempdir = str(place.tmp), None
        os.environ |= {name: str(value) for name, value in group.items()}
        sys.argv = ["minitron", *job.words, "--out", "out"]
        # Of a command that is started in the background a shell has the first ignored, and nohup the second.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        atexit._clear()  # what this process has to clean up is not the child's
        prepare()
        runpy.run_module("minitron", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 71
    with suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return code if isinstance(code, int) else 0 if code is None else 72


def tried(trial: Trial, work: Path) -> Outcome:
    """Meet a command with an interruption, look at what is left, and give it again."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what commands leave behind is seen here
    path = work / f"trial-{trial.number}"
    place = Place.new(path)
    over_seconds = None
    if trial.kind == "disk":
        with_own_disk(place.here)
    run = Running.begin(trial.job, place, trial.job.processes, lambda rank: meeting(trial, place, rank))
    if trial.by == "time":
        meet_in_time(trial, place, run)
    if trial.job.torchrun:
        over_seconds = seconds_to_the_end(trial, place, run)
    elif trial.rank is not None and trial.kind == "kill":
        while not run.poll() and all(code is None for code in run.processes.values()):
            time.sleep(0.003)
    alone = trial.rank is not None and any(code not in (None, 0) for code in run.processes.values())
    outcome = Outcome("", [], over_seconds=over_seconds)
    if alone and not run.wait(ALONE_SECONDS):
        outcome.by_launcher = True
        run.send(signal.SIGTERM, None)
        if not run.wait(30):
            run.send(signal.SIGKILL, None)
    outcome.codes = run.codes(PATIENCE_SECONDS)
    outcome.stage, outcome.ended_before = stage_of(place), set(outcome.codes) == {0}
    outcome.violations += ended_wrongly(trial, place, outcome) + orphans() + left_wrongly(trial, place)
    if trial.kind in DAMAGES:
        for act, state in zip(DAMAGES[trial.kind], states(place.here)[-2:], strict=True):
            if act is not None:
                act(state)
    for file in place.here.glob(FILLER):
        file.unlink()
    outcome.violations += resumed_wrongly(trial, place)
    if not outcome.violations:
        shutil.rmtree(path, ignore_errors=True)
    elif trial.kind == "disk":
        shutil.copytree(place.here, path / "kept")
    return outcome


def number_of(kind: str) -> signal.Signals:
    return signal.Signals[f"SIG{kind.split()[0].upper()}"]


def meeting(trial: Trial, place: Place, rank: int) -> None:
    """In the process that is met: be so at the operation of that number."""
    at = int(trial.at)
    if trial.by != "operation" or (trial.kind == "disk" and rank > 0):
        return
    if trial.kind == "disk":
        at_each_operation(place.here, lambda number: fill(place.here) if number == at else None)
    else:
        numbers = {at, at + 2} if "twice" in trial.kind else {at}
        signal_at(place.here, numbers, number_of(trial.kind), rank if trial.rank is None else trial.rank, rank)


def meet_in_time(trial: Trial, place: Place, run: Running) -> None:
    if trial.kind in DAMAGES:
        while not run.poll() and len(states(place.here)) < 2:
            time.sleep(0.001)
        return run.send(signal.SIGKILL, None)
    run.wait(trial.at)
    if trial.kind == "disk":
        return fill(place.here)
    if trial.job.torchrun:
        with suppress(ProcessLookupError):
            os.kill(pid_of(place, trial.rank or 0), signal.SIGKILL)
        return
    run.send(number_of(trial.kind), trial.rank)
    if "twice" in trial.kind:
        run.wait(0.02)
        run.send(signal.SIGINT, trial.rank)


def note(place: Place, rank: int) -> None:
    """Keep the number of this process: a link, which is there at once and has no file's operations."""
    os.symlink(str(os.getpid()), place.said / f"pid{rank}")


def pid_of(place: Place, rank: int) -> int:
    return int(os.readlink(place.said / f"pid{rank}"))


def seconds_to_the_end(trial: Trial, place: Place, run: Running) -> float:
    """How long torchrun, and with it every process, lives on after one process was killed."""
    worker, gone = Path(f"/proc/{pid_of(place, trial.rank or 0)}/stat"), time.monotonic()
    while not run.poll() and time.monotonic() - gone < PATIENCE_SECONDS:
        with suppress(OSError):  # it is gone altogether
            if worker.read_text().rpartition(") ")[2][0] != "Z":
                gone = time.monotonic()
        time.sleep(0.01)
    return time.monotonic() - gone


def with_own_disk(path: Path) -> None:
    """From now on this process sees a small disk of its own at `path`, which goes when it ends."""
    libc, user = ctypes.CDLL(None, use_errno=True), os.geteuid()
    new_user, new_mounts, private, recursive = 0x10000000, 0x20000, 1 << 18, 1 << 14
    if libc.unshare((new_user if user else 0) | new_mounts):
        raise OSError(ctypes.get_errno(), "a namespace of its own, with a small disk, is not allowed here")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    libc.mount(b"none", b"/", None, private | recursive, None)
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={DISK}".encode()):
        raise OSError(ctypes.get_errno(), f"no small disk can be mounted at {path}")


def states(here: Path) -> list[Path]:
    return [path for path in sorted(here.glob("out.work/distill/state-*")) if path.suffix != ".partial"]


def truncate(state: Path) -> None:
    file = state / "optimizer.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip(state: Path) -> None:
    data = bytearray((state / "student.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (state / "student.safetensors").write_bytes(data)


# What is done to the older and to the newer of two states, after a kill.
DAMAGES: dict[str, list[Callable[[Path], None] | None]] = {
    "newer state truncated": [None, truncate],
    "one bit of the newer state flipped": [None, flip],
    "both states damaged": [flip, truncate],
}


# What must hold.


def stage_of(place: Place) -> str:
    """The stage that the first process said it was at, or was behind."""
    words = [line.split() for line in place.texts("stderr")[0].splitlines()]
    seen = [line for line in words if line[1:] in (["..."], ["unchanged"]) or line[1:2] == ["done"]]
    if not seen:
        return "start"
    name, state = seen[-1][0], seen[-1][1]
    return name if state == "..." else f"behind {name}"


def ended_wrongly(trial: Trial, place: Place, outcome: Outcome) -> list[str]:
    """How the command may not have ended."""
    found, said = [], place.texts("stderr")
    last = [line for text in said for line in text.splitlines() if line.startswith(("error: ", "interrupted", "proc"))]
    if trial.kind == "disk":
        last = [line for line in last if "another of the" not in line]  # the other says that it is left alone
    outcome.said = last[-1] if last else ""
    if any("Traceback" in text for text in said):
        found.append(f"a traceback: {[text.splitlines()[-1] for text in said if 'Traceback' in text]}")
    if outcome.ended_before:
        return found
    if trial.job.torchrun:
        if outcome.codes != [1]:
            found.append(f"torchrun ends with {outcome.codes}")
        if (outcome.over_seconds or 0) > OVER_SECONDS:
            found.append(f"ends {outcome.over_seconds:.0f} s after a process was killed")
        return found
    expected: dict[str, set[Any]] = {"kill": {-9}, "disk": {1}} | {name: {-9} for name in DAMAGES}
    codes = outcome.codes if trial.rank is None else [outcome.codes[trial.rank]]
    if not set(codes) <= expected.get(trial.kind, {130}):
        found.append(f"exit codes {outcome.codes}")
    if trial.rank is not None and not outcome.by_launcher and not set(outcome.codes) <= {*expected[trial.kind], 1, 0}:
        found.append(f"exit codes {outcome.codes}")
    if trial.kind != "kill" and trial.kind not in DAMAGES and len(last) != 1:
        found.append(f"not one line: {last}")
    if trial.kind == "kill" and 1 in outcome.codes and len(last) != 1:
        found.append(f"the other process does not say one line: {last}")
    if trial.kind == "disk" and ("No space left" not in outcome.said or "out" not in outcome.said):
        found.append(f"does not say that the disk is full: {outcome.said!r}")
    if trial.kind != "kill" and trial.kind not in DAMAGES and any(place.tmp.iterdir()):
        found.append(f"left in TMPDIR: {[path.name for path in place.tmp.iterdir()]}")
    return found


def orphans() -> list[str]:
    """Processes that the command started and that live on."""
    until = time.monotonic() + ORPHAN_SECONDS
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return []
        if pid == 0 and time.monotonic() > until:
            break
        time.sleep(0 if pid else 0.02)
    left = [int(word) for word in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200] for pid in left]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [f"still running: {lines}"]


def left_wrongly(trial: Trial, place: Place) -> list[str]:
    """What may not be on the disk after an interruption."""
    found, whole = [], {}
    for file in sorted(place.here.rglob("*")):
        parts = file.relative_to(place.here).parts
        if not file.is_file() or any(part.endswith(".partial") or part in UNFINISHED for part in parts):
            continue
        name = "/".join(parts).replace("out.work/student/", "out/").replace("out.work/corrected/", "out.corrected/")
        if name in trial.job.made and name != "out/recipe.yaml":
            try:
                whole[name] = digest_of(file)
            except ValueError as error:
                found.append(f"{name} is cut: {error}")
    found += [f"{name} is not what it becomes" for name, seen in whole.items() if seen != trial.job.made[name]]
    records = [name.removesuffix("record.json") for name in trial.job.made if name.endswith("/record.json")]
    for name in records:
        directory = place.here / name
        if directory.is_dir() and directory.name != "out" and not (directory / "record.json").exists():
            found.append(f"{name} has no record")
    for lock in place.here.glob("*/.lock"):
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                found.append("the lock is held")
    return found


def resumed_wrongly(trial: Trial, place: Place) -> list[str]:
    """Give the command again; how it may not end, and what may not differ."""
    job = trial.job
    if job.words[0] != "run" and made(place.here) == job.made:
        return []  # it was done: the directory is not written again
    shutil.rmtree(place.said)
    place.said.mkdir()
    codes = Running.begin(job, place, trial.resumed_with).codes(PATIENCE_SECONDS)
    said = "".join(place.texts("stderr"))
    if "exists and is not empty" in said and made(place.here) == job.made:
        return []  # it was done but for clearing up, which the command did first
    if any(codes):
        return [f"the same command ends with {codes}: {said.splitlines()[-1:]}"]
    warned = said.count("cannot be used")
    wanted = len([act for act in DAMAGES.get(trial.kind, []) if act])
    found = [] if warned == wanted else [f"{warned} states cannot be used: {said}"]
    again = made(place.here)
    if trial.resumed_with != job.processes:
        return found + differing_much(trial, place, again)
    names = {*again, *job.made}
    return found + [f"{name} differs" for name in sorted(names) if again.get(name) != job.made.get(name)]


def differing_much(trial: Trial, place: Place, again: dict[str, str]) -> list[str]:
    """The same, where another number of processes added up in another order."""
    from safetensors.torch import load_file

    if again.keys() != trial.job.made.keys():
        return [f"other files: {sorted(again.keys() ^ trial.job.made.keys())}"]
    found = []
    for name in (name for name in again if name.endswith(".safetensors")):
        one, other = (load_file(path / name) for path in (place.here, place.here.parents[1] / job_directory(trial.job)))
        worst = max((one[key].double() - other[key].double()).abs().max().item() for key in one)
        scale = max(1.0, *(value.double().abs().max().item() for value in other.values()))
        if not worst <= CLOSENESS * scale:
            found.append(f"{name} differs by {worst:.2g}")
    return found


def job_directory(job: Job) -> str:
    return f"undisturbed {job.name}/here"


def forked() -> int:
    """`os.fork`, on a machine that has no room for another process at the moment."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return os.fork()
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def in_a_fork(work: Callable[[], Any], directory: Path) -> Any:
    """The result of a function that is called in a fork of this process, so that this one starts no thread."""
    import pickle

    file = directory / "answer"
    file.unlink(missing_ok=True)
    pid = forked()
    if pid == 0:
        code = 1
        try:
            file.write_bytes(pickle.dumps(work()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(1)
    return pickle.loads(file.read_bytes())


# What is said of it.


def report(
    jobs: Sequence[Job], trials: Sequence[Trial], outcomes: Sequence[Outcome], seconds: float, found: Path | None
) -> str:
    from lib.measure import header, table

    met = [(trial, outcome) for trial, outcome in zip(trials, outcomes, strict=True) if not outcome.ended_before]
    bad = [(trial, outcome) for trial, outcome in zip(trials, outcomes, strict=True) if outcome.violations]
    signals = ("INT", "TERM", "HUP", "INT twice")
    kinds = {"`kill -9`": ("kill",), "signals": signals, "full disk": ("disk",), "damaged states": tuple(DAMAGES)}

    def counts(some: Sequence[tuple[Trial, Outcome]]) -> list[str]:
        of = Counter(trial.kind for trial, _ in some)
        return [str(sum(of[kind] for kind in group)) for group in kinds.values()] + [str(len(some))]

    by_job = [
        [
            job.name,
            f"{job.seconds:.1f}",
            str(job.operations),
            *counts([one for one in met if one[0].job.name == job.name]),
        ]
        for job in jobs
    ]
    stages = sorted({outcome.stage for _, outcome in met})
    by_stage = [[stage, *counts([one for one in met if one[1].stage == stage])] for stage in stages]
    by_moment = [
        [name, *counts([one for one in met if one[0].by == by])]
        for name, by in (("at an operation on files", "operation"), ("at a time", "time"))
    ]
    disk = Counter(outcome.said.partition("cannot write ")[2] for trial, outcome in met if trial.kind == "disk")
    heads = [*kinds, "all"]
    lines = [
        header("Interrupted commands against undisturbed ones"),
        f"{len(trials)} commands were met by an interruption; {len(trials) - len(met)} had ended before it came. Each "
        "was then looked at and given again, and what it made in the end was compared with what an undisturbed one "
        f"makes, file by file. {len(trials) - len(bad)} of {len(trials)} were as they should. In "
        f"{sum(outcome.by_launcher for outcome in outcomes)} a process that was left alone was ended as torchrun ends "
        f"it, since the other was killed before the two had met. It took {seconds / 60:.0f} minutes.",
        "",
        *spread(met),
        "By command, with the seconds and the operations on files of an undisturbed one:",
        "",
        table(["command", "seconds", "operations", *heads], by_job),
        "",
        "By what was going on:",
        "",
        table(["stage", *heads], by_stage),
        "",
        "By how the moment was drawn:",
        "",
        table(["moment", *heads], by_moment),
        "",
        *(
            ["On the full disk commands said that they cannot write these, where the disk was `DIR`:", ""]
            if disk
            else []
        ),
        *(f"- {count}x {text}" for text, count in sorted(plain(disk).items(), key=lambda item: -item[1])[:12]),
        *([""] if disk else []),
        "## Violations",
        "",
        *(
            [
                f"- {trial.job.name}, {trial.kind} at {trial.by} {trial.at:.4g}, in {outcome.stage}: "
                f"{'; '.join(outcome.violations)}"
                for trial, outcome in bad
            ]
            or ["None."]
        ),
        "",
        *(["## What it found", "", found.read_text(encoding="utf-8").strip(), ""] if found else []),
    ]
    return "\n".join(lines)


def spread(met: Sequence[tuple[Trial, Outcome]]) -> list[str]:
    """The seconds from the death of a process under torchrun to the end of all."""
    lines = []
    for rank in sorted({trial.rank or 0 for trial, outcome in met if outcome.over_seconds is not None}):
        over = [outcome.over_seconds or 0 for trial, outcome in met if trial.job.torchrun and trial.rank == rank]
        seconds = f"{min(over):.1f} to {max(over):.1f} s, median {median(over):.1f} s"
        lines.append(f"- process {rank} killed, {len(over)} times: {seconds}")
    return ["Under torchrun, from the death of a process to the end of all processes:", "", *lines, ""] if lines else []


def plain(said: Counter[str]) -> Counter[str]:
    """Without what differs from run to run."""
    import re

    counts: Counter[str] = Counter()
    for text, times in said.items():
        counts[re.sub(r"\S*/here", "DIR", re.sub(r"\d{6,}|step \d+", "N", text))] += times
    return counts


if __name__ == "__main__":
    main()
