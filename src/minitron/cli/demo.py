"""`minitron demo` runs the whole pipeline on the teacher that comes with minitron."""

import argparse
from pathlib import Path

from minitron.cli import options, parse
from minitron.cli.command import Command
from minitron.cli.console import Console
from minitron.cli.run import show_run


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=parse.path, default=Path("runs/demo"), metavar="DIR", help="run directory; default %(default)s"
    )
    options.add_set(parser)


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron.pipeline.run import run
    from minitron.recipe import demo_recipe

    console.note("The demo teacher writes Python; half of it is cut away and the rest is taught again.")
    show_run(run(demo_recipe(args.set), args.out, console), console)


COMMAND = Command(
    help="the whole pipeline on the small teacher that comes with minitron, in minutes on two CPU cores",
    example="minitron demo --out runs/demo",
    add_options=_add_options,
    run=_run,
)
