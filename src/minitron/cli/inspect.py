"""`minitron inspect` says what a model is."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitron.cli import options
from minitron.cli.console import Console
from minitron.cli.rules import REVISION, Rules
from minitron.core.errors import MinitronError

HELP = "family, shape, exact parameters, bytes, and what can be pruned"
EXAMPLE = "minitron inspect meta-llama/Llama-3.1-8B"
RULES: Rules = (REVISION,)


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, options.MODEL_OR_FILE)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")


def run(args: argparse.Namespace, console: Console) -> None:
    from minitron import api
    from minitron.core.errors import UnsupportedArchitecture
    from minitron.model.hub import resolve_model

    if options.is_gguf(args.model):
        return _inspect_file(args, console)
    path = resolve_model(args.model, args.revision, config_only=True)
    try:
        facts = api.inspect(path)
    except UnsupportedArchitecture:
        draft = api.draft(path)
        if draft is not None:
            console.result({"draft": asdict(draft)}, draft.text())
        raise
    console.result(facts, "\n".join(_lines(args.model, facts)))


def _lines(model: str, facts: dict[str, Any]) -> list[str]:
    from minitron.core.text import size

    dtype = facts["dtype"] + (" (assumed, config.json says none)" if facts.get("dtype_assumed") else "")
    weights = size(facts["weight_bytes"]) if facts["weights"] else f"{size(facts['weight_bytes'])} of weights, not here"
    return [
        f"{model}: {facts['family']}, {dtype}, {weights}",
        "",
        *(f"  {dim:<14}{number:>16,}" for dim, number in facts["shape"].items()),
        "",
        *(f"  {part:<14}{count:>16,}" for part, count in facts["parameters"].items()),
        "",
        f"  embeddings are {'tied' if facts['tied_embeddings'] else 'untied'}; "
        f"KV cache {size(facts['kv_cache_bytes_per_token'])} per token",
        f"  can be pruned: {', '.join(facts['prunable'])}",
    ]


def _inspect_file(args: argparse.Namespace, console: Console) -> None:
    """Print the facts that a GGUF file states, and the types of its tensors."""
    from minitron.gguf.reader import inspect_gguf

    if args.revision is not None:
        raise MinitronError(f"--revision {args.revision} is of a hub id, and {args.model} is a file: leave it out")
    facts = inspect_gguf(Path(args.model))
    console.result(facts, "\n".join(_file_lines(args.model, facts)))


def _file_lines(file: str, facts: dict[str, Any]) -> list[str]:
    from minitron.core.text import share, size

    total = facts["parameters"]["total"]
    return [
        f"{file}: {facts['family']}, {size(facts['bytes'])}, {facts['bits_per_weight']:.2f} bits per weight",
        "",
        *(f"  {dim:<14}{_spelled(number):>16}" for dim, number in facts["shape"].items() if number is not None),
        "",
        f"  {'weights':<14}{total:>16,}",
        *(f"  {kind:<14}{count:>16,}  {share(count / total)}" for kind, count in facts["types"].items()),
    ]


def _spelled(number: int | list[int]) -> str:
    """Write a size, or the sizes of layers that differ in it."""
    return f"{number:,}" if isinstance(number, int) else ", ".join(f"{each:,}" for each in sorted(set(number)))
