"""`minitron distill` trains a student on a teacher's logits."""

import argparse
from dataclasses import asdict

from minitron.cli import options, parse
from minitron.cli.command import Command
from minitron.cli.console import Console
from minitron.cli.rules import ROWS


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_key(parser, "model", "--teacher", type=parse.named, required=True, metavar="MODEL")
    parser.add_argument(
        "--student", type=parse.named, required=True, metavar="MODEL", help="a model with the teacher's tokenizer"
    )
    options.add_data(parser)
    options.add_key(parser, "distill.tokens", "--tokens", type=parse.count, metavar="N", more="Such as 20M.")
    options.add_key(parser, "distill.minutes", "--minutes", type=parse.positive, metavar="N")
    options.add_key(parser, "distill.learning_rate", "--learning-rate", type=float, metavar="RATE")
    options.add_set(parser, "data", "distill")
    options.add_seed(parser)
    parser.add_argument("--out", type=parse.path, required=True, metavar="DIR", help="directory of the student")


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron import api

    asked, data = args.asked, options.data_config(args, console)
    made = api.distill(args.teacher, args.student, data, asked.distill, seed=asked.seed, out=args.out, listener=console)
    if made is None:
        return  # the first of several processes speaks
    text = f"student after {made.training.tokens:,} tokens: {args.out}"
    budget = {} if made.budget is None else {"budget": made.budget.model_dump()}
    fit = {"fit": made.fit.model_dump()} if made.fit is not None and made.fit.changes else {}
    corrected = {"corrected": str(made.corrected)} if made.corrected else {}
    facts = {"out": str(made.out)} | corrected | made.description.to_dict() | {"training": asdict(made.training)}
    facts |= budget | fit
    console.result(facts, text + (f"\ncorrected teacher: {made.corrected}" if made.corrected else ""))


COMMAND = Command(
    help="train a student on a teacher's logits; the same command again resumes it",
    example="minitron distill --teacher ./my-model --student pruned --data corpus.jsonl --tokens 20M --out student",
    add_options=_add_options,
    run=_run,
    rules=(ROWS,),
)
