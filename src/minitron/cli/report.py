"""`minitron report` writes the page of a run, or of several."""

import argparse
from pathlib import Path

from minitron.cli import parse
from minitron.cli.command import Command
from minitron.cli.console import Console


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=parse.path, nargs="+", metavar="RUN", help="several: one page that compares them")
    parser.add_argument(
        "--out", type=parse.file, metavar="FILE", help="default report.html in RUN; of several, comparison.html here"
    )


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron.report.comparison import write_comparison
    from minitron.report.page import write_report
    from minitron.report.records import read_run

    runs = [read_run(path) for path in args.runs]
    if len(runs) == 1:
        path = write_report(runs[0], args.out)
    else:
        path = write_comparison(runs, args.out or Path("comparison.html"))
    console.result({"report": str(path)}, str(path))


COMMAND = Command(
    help="write report.html of a finished run again, or one page that compares several runs",
    example="minitron report runs/half runs/third --out comparison.html",
    add_options=_add_options,
    run=_run,
)
