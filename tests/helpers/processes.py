"""Processes as torchrun starts them, but forks of one that has imported everything: seconds less for each."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "minitron.cli.main",
        "minitron.distillation.train",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
    ]
)
PATIENCE_SECONDS = 120


def forked(size: int, script: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What `torchrun --nproc-per-node SIZE SCRIPT WORDS...` does and says, or with size 1 `python SCRIPT WORDS...`.

    Args:
        script: a file in `cwd`, or the name of a module.
    """
    arguments, processes = [script, *words], begun(size, script, *words, cwd=cwd)
    waiting = [process.sentinel for process in processes]
    while waiting and not any(process.exitcode for process in processes):
        ended = wait(waiting, timeout=PATIENCE_SECONDS)
        assert ended, f"{arguments} did not end in {PATIENCE_SECONDS} s"
        waiting = [sentinel for sentinel in waiting if sentinel not in ended]
    for process in processes:  # as torchrun ends the others of one that failed, if they do not hear of it
        process.join(timeout=10)
        process.terminate()
        process.join()
    said = [
        "".join(output.read_text(encoding="utf-8") for output in (_output(cwd, rank, name) for rank in range(size)))
        for name in ("stdout", "stderr")
    ]
    return subprocess.CompletedProcess(arguments, max(abs(process.exitcode) for process in processes), *said)


def begun(
    size: int, script: str, *words: object, cwd: Path, prepare: Callable[[int], None] | None = None
) -> list[ForkServerProcess]:
    """The processes of `forked`, that do their work while this one goes on.

    Args:
        prepare: called in each with its rank, before the script; can be pickled.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [script, *(str(word) for word in words)]
    processes = [CONTEXT.Process(target=_run, args=(rank, size, port, arguments, cwd, prepare)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def _output(cwd: Path, rank: int, name: str) -> Path:
    return cwd / f".{name}{rank}"


def _run(
    rank: int, size: int, port: int, arguments: list[str], cwd: Path, prepare: Callable[[int], None] | None
) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        with _output(cwd, rank, name).open("w") as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    sys.argv = arguments
    if prepare is not None:
        prepare(rank)
    if arguments[0].endswith(".py"):
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
