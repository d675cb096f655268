"""`minitron card` writes the card of a run's student again."""

import argparse

from minitron.cli import parse
from minitron.cli.console import Console
from minitron.cli.rules import Rules

HELP = "write the student's model card again"
EXAMPLE = "minitron card runs/half"
RULES: Rules = ()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=parse.path, metavar="RUN", help="directory of a finished run")


def run(args: argparse.Namespace, console: Console) -> None:
    from minitron.report.card import write_card
    from minitron.report.records import read_run

    path = write_card(read_run(args.run))
    console.result({"card": str(path)}, str(path))
