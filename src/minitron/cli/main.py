"""The command line starts here: it parses the words, runs the command that they name, and ends with its exit code."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from minitron.cli import (
    calibrate,
    card,
    compress,
    demo,
    distill,
    evaluate,
    generate,
    inspect,
    options,
    prune,
    push,
    quantize,
    report,
    run,
    search,
    speed,
)
from minitron.cli.command import Command
from minitron.cli.console import Console, complain, flush_result, open_streams
from minitron.cli.process import keep_freed_memory, quiet_libraries
from minitron.cli.rules import given_options, require_options
from minitron.core.errors import Interrupted, MinitronError

# In the order of `minitron --help`.
COMMANDS: Mapping[str, Command] = {
    "demo": demo.COMMAND,
    "inspect": inspect.COMMAND,
    "compress": compress.COMMAND,
    "run": run.COMMAND,
    "calibrate": calibrate.COMMAND,
    "search": search.COMMAND,
    "prune": prune.COMMAND,
    "distill": distill.COMMAND,
    "evaluate": evaluate.COMMAND,
    "generate": generate.COMMAND,
    "quantize": quantize.COMMAND,
    "speed": speed.COMMAND,
    "report": report.COMMAND,
    "card": card.COMMAND,
    "push": push.COMMAND,
}
SHARED = ("demo", "compress", "run", "calibrate", "distill")  # by several processes
# In what torch says where it gets no memory.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 the user's mistake or the machine's, 130 interrupted.

    argparse itself exits with 2 after wrong usage.
    """
    open_streams()
    words = sys.argv[1:] if argv is None else list(argv)
    _at_signals(_interrupt)
    try:
        _run(_parsed(words), words)
        if argv is None:
            _at_signals(signal.SIG_IGN)  # all is done, and there is nothing to put in order while Python ends
    except Interrupted as error:
        return _interrupted(f"interrupted: {error}")
    except KeyboardInterrupt:
        return _interrupted("interrupted; what was finished is kept, run the same command to go on")
    except MinitronError as error:
        _complain(f"error: {' '.join(str(error).split())}")  # a library's reason may have many lines
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        reason = _of_the_machine(error)
        if reason is None:
            raise
        _complain(f"error: {' '.join(reason.split())}")
        return 1
    return 0


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    try:
        return build_parser(words).parse_args(words)
    except SystemExit:
        flush_result()  # of --help: here, where an error can be told
        raise


def _run(args: argparse.Namespace, words: list[str]) -> None:
    """Run the command that was parsed.

    Args:
        words: the command line; they tell which options are given and which have their default.
    """
    from minitron.core.parallel import ranks  # and torch with it, for which --help does not wait

    keep_freed_memory()
    if not args.verbose:
        quiet_libraries()
    console = Console(args, prints=ranks().rank == 0)
    try:
        if ranks().size > 1 and args.command not in SHARED:
            raise MinitronError(
                f"torchrun started {ranks().size} processes, and this command runs in one: start it without torchrun; "
                f"the commands that several processes share are {', '.join(SHARED)}"
            )
        args.given = given_options(args.parser, args, words[words.index(args.command) + 1 :])
        require_options(args)
        COMMANDS[args.command].run(args, console)
    finally:
        console.close()


def _of_the_machine(error: Exception) -> str | None:
    """Say in a line what the machine cannot do; return None for an error of the program."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    text = str(error).strip().split("\n")[0]
    if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        return f"not enough memory{f' ({text})' if text else ''}: free some, or ask for less: a smaller batch or block"
    if "can't start new thread" in text:
        return f"{text}: raise the limit of processes (ulimit -u), or set OMP_NUM_THREADS to fewer"
    return None


def build_parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Build the parser.

    Args:
        words: the command line; only the command that it names gets its options, because their defaults come from the
            modules that use them, and torch comes with these. Default: every command gets its options.
    """
    parser = argparse.ArgumentParser(
        prog="minitron", description="Make a smaller language model from a pretrained one."
    )
    parser.add_argument("--version", action="version", version=_version())
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    named = None if words is None else next((word for word in words if not word.startswith("-")), "")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name, help=command.help, description=command.help, epilog=f"example: {command.example}"
        )
        # says, preset, sections: see options.add_key, options.add_set and rules.require_options.
        sub.set_defaults(parser=sub, rules=command.rules, says={}, preset={}, sections=None)
        if named in (None, name):
            options.add_common(sub)
            command.add_options(sub)
    return parser


def _complain(text: str) -> None:
    """Print on stderr. An error ends all processes, so the first speaks for them, unless it could not be told."""
    from minitron.core import parallel

    rank = parallel.ranks().rank
    if rank == 0 or parallel.is_alone():
        complain(text if rank == 0 else f"process {rank}: {text}")


def _interrupted(text: str) -> int:
    """Print the text once for all processes, each of which gets the signal. A second signal ends them at once."""
    _at_signals(signal.SIG_DFL)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ["RANK"] == "0":  # torch may not be there yet
        with suppress(OSError):  # the terminal that has hung up
            print(text, file=sys.stderr, flush=True)
    return 130


def _at_signals(act: Callable[..., None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's & have it
            signal.signal(number, act)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _version() -> str:
    from importlib.metadata import version

    return f"minitron {version('minitron')}"


if __name__ == "__main__":
    sys.exit(main())
