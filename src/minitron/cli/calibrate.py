"""`minitron calibrate` collects the statistics of a model's activations."""

import argparse

from minitron.cli import options, parse
from minitron.cli.command import Command
from minitron.cli.console import Console
from minitron.cli.rules import ROWS

# A run knows whether its repair needs the second moment; statistics by themselves may be for any repair.
_PRESET = {"calibrate.second_moment": True}


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(preset=_PRESET)
    options.add_model(parser)
    options.add_data(parser)
    options.add_key(parser, "calibrate.samples", "--samples", type=parse.count, metavar="N")
    options.add_seed(parser)
    options.add_key(
        parser,
        "calibrate.second_moment",
        "--second-moment",
        action=argparse.BooleanOptionalAction,
        more="Repair by a residual basis needs it.",
    )
    options.add_set(parser, "data", "calibrate")
    parser.add_argument("--out", type=parse.path, required=True, metavar="DIR", help="directory of the statistics")


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron import api

    asked, data = args.asked, options.data_config(args, console)
    statistics = api.calibrate(args.model, data, asked.calibrate, seed=asked.seed, out=args.out, listener=console)
    facts = {"out": str(args.out), "samples": statistics.samples, "tokens": statistics.tokens}
    console.result(facts, f"statistics of {statistics.samples} samples, {statistics.tokens:,} tokens: {args.out}")


COMMAND = Command(
    help="collect activation statistics in one streamed pass",
    example="minitron calibrate ./my-model --data corpus.jsonl --out statistics",
    add_options=_add_options,
    run=_run,
    rules=(ROWS,),
)
