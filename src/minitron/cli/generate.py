"""`minitron generate` continues a prompt."""

import argparse

from minitron.cli import options, parse
from minitron.cli.command import Command
from minitron.cli.console import Console
from minitron.cli.rules import Rules
from minitron.core.effects import Rule

_RULES: Rules = (
    Rule(("seed",), lambda args: args.temperature != 0, "where tokens are drawn", "give a --temperature above 0"),
)


def _add_options(parser: argparse.ArgumentParser) -> None:
    from minitron.evaluation.generate import USUAL_NEW_TOKENS, generate_text

    options.add_model(parser)
    parser.add_argument("--prompt", type=parse.words, required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "--new-tokens",
        type=parse.count,
        metavar="N",
        help=f"default {USUAL_NEW_TOKENS}, or as many as the model's context has room for",
    )
    options.add_parameter(parser, generate_text, "--temperature", type=float, metavar="T", help="0 is greedy")
    options.add_parameter(parser, generate_text, "--seed", type=parse.seed, metavar="N", help="of the draw")


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron import api

    text = api.generate(
        args.model, args.prompt, new_tokens=args.new_tokens, temperature=args.temperature, seed=args.seed
    )
    console.result({"prompt": args.prompt, "text": text}, args.prompt + text)


COMMAND = Command(
    help="continue a prompt",
    example="minitron generate student --prompt 'Once upon a time'",
    add_options=_add_options,
    run=_run,
    rules=_RULES,
)
