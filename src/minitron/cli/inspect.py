"""`minitron inspect` says what a model is."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from minitron.cli import options
from minitron.cli.command import Command
from minitron.cli.console import Console
from minitron.cli.rules import REVISION
from minitron.core.errors import MinitronError

if TYPE_CHECKING:
    from minitron.api import Inspected
    from minitron.gguf.reader import GgufFacts


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron import api
    from minitron.core.errors import UnsupportedArchitecture
    from minitron.gguf.reader import GgufFacts, is_gguf

    if args.revision is not None and is_gguf(args.model):
        raise MinitronError(f"--revision {args.revision} is of a hub id, and {args.model} is a file: leave it out")
    try:
        found = api.inspect(args.model, args.revision)
    except UnsupportedArchitecture:
        draft = api.draft(args.model, args.revision)
        if draft is not None:
            console.result({"draft": asdict(draft)}, draft.text())
        raise
    lines = _file_lines(args.model, found) if isinstance(found, GgufFacts) else _lines(args.model, found)
    console.result(found.to_dict(), "\n".join(lines))


def _lines(model: str, found: "Inspected") -> list[str]:
    from minitron.core.text import size

    facts = found.description
    dtype = facts.dtype + (" (assumed, config.json says none)" if facts.dtype_assumed else "")
    weights = size(facts.weight_bytes) + ("" if found.weights else " of weights, not here")
    counts = vars(facts.parameters) | {"non_embedding": facts.parameters.non_embedding}
    return [
        f"{model}: {facts.family}, {dtype}, {weights}",
        "",
        *(f"  {dim:<14}{number:>16,}" for dim, number in vars(facts.shape).items()),
        "",
        *(f"  {part:<14}{count:>16,}" for part, count in counts.items()),
        "",
        f"  embeddings are {'tied' if facts.tied_embeddings else 'untied'}; "
        f"KV cache {size(facts.kv_cache_bytes_per_token)} per token",
        f"  can be pruned: {', '.join(facts.prunable)}",
    ]


def _file_lines(file: str, facts: "GgufFacts") -> list[str]:
    from minitron.core.text import share, size

    return [
        f"{file}: {facts.family}, {size(facts.bytes)}, {facts.bits_per_weight:.2f} bits per weight",
        "",
        *(f"  {dim:<14}{_spelled(number):>16}" for dim, number in facts.shape.items() if number is not None),
        "",
        f"  {'weights':<14}{facts.weights:>16,}",
        *(f"  {kind:<14}{count:>16,}  {share(count / facts.weights)}" for kind, count in facts.types.items()),
        "",
        f"  cannot be pruned: {facts.obstacle}" if facts.obstacle else f"  can be pruned: {', '.join(facts.prunable)}",
    ]


def _spelled(number: int | list[int]) -> str:
    """Write a size, or the sizes of layers that differ in it."""
    return f"{number:,}" if isinstance(number, int) else ", ".join(f"{each:,}" for each in sorted(set(number)))


COMMAND = Command(
    help="family, shape, exact parameters, bytes, and what can be pruned",
    example="minitron inspect meta-llama/Llama-3.1-8B",
    add_options=_add_options,
    run=_run,
    rules=(REVISION,),
)
