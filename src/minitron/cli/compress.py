"""`minitron compress` runs the default recipe on any model."""

import argparse
from pathlib import Path

from minitron.cli import options, parse
from minitron.cli.command import Command
from minitron.cli.console import Console
from minitron.cli.rules import REVISION, ROWS
from minitron.cli.run import DRY_RUN, add_dry_run, run_recipe


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_key(parser, "revision", "--revision", metavar="NAME")
    options.add_target(parser, required=True)
    options.add_data(parser, blocks=False)
    options.add_key(parser, "distill.tokens", "--tokens", type=parse.count, metavar="N", more="Such as 20M.")
    options.add_key(parser, "distill.minutes", "--minutes", type=parse.positive, metavar="N")
    options.add_seed(parser)
    parser.add_argument("--out", type=parse.path, metavar="DIR", help="run directory; default runs/NAME-TARGET")
    add_dry_run(parser)
    options.add_set(parser)


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron.model.naming import model_name

    options.data_config(args, console)
    name = f"{model_name(args.model)}-{args.target_params.rstrip('%')}"
    run_recipe(args.asked, args.out or Path("runs") / name, args, console)


COMMAND = Command(
    help="the default recipe on any model: prune, distil, measure, report",
    example="minitron compress ./my-model --target-params 50% --data corpus.jsonl --tokens 20M --out runs/half",
    add_options=_add_options,
    run=_run,
    rules=(REVISION, ROWS, *DRY_RUN),
)
