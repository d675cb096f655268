"""`minitron card` writes the card of a run's student again."""

import argparse

from minitron.cli import parse
from minitron.cli.command import Command
from minitron.cli.console import Console


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=parse.path, metavar="RUN", help="directory of a finished run")


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron.report.card import write_card
    from minitron.report.records import read_run

    path = write_card(read_run(args.run))
    console.result({"card": str(path)}, str(path))


COMMAND = Command(
    help="write the student's model card again",
    example="minitron card runs/half",
    add_options=_add_options,
    run=_run,
)
