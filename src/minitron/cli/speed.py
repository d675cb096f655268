"""`minitron speed` measures how fast models run, and in how much memory."""

import argparse
from typing import TYPE_CHECKING, get_args

from minitron.cli import options, parse
from minitron.cli.command import Command
from minitron.cli.console import Console, aligned
from minitron.cli.rules import Rules
from minitron.core.effects import Rule

if TYPE_CHECKING:
    from minitron.evaluation.engines import SpeedResult

_RULES: Rules = (
    Rule(
        ("threads",),
        lambda args: args.engine != "vllm",
        "with transformers and llama.cpp; vLLM takes its own",
        "take another --engine",
    ),
)


def _add_options(parser: argparse.ArgumentParser) -> None:
    from minitron.core.device import Precision
    from minitron.evaluation.engines import DEFAULT_CONTEXTS, Engine, SpeedOptions

    options.add_model(parser)
    parser.add_argument(
        "--teacher", type=parse.named, metavar="MODEL", help="measured in turn with MODEL: of the same kind"
    )
    parser.add_argument("--engine", choices=get_args(Engine), help="default llama.cpp for GGUF, else transformers")
    options.add_parameter(
        parser,
        SpeedOptions,
        "--batch",
        parameter="batches",
        type=parse.counts,
        metavar="N,N",
        help="sequences at a time",
    )
    parser.add_argument(
        "--context",
        type=parse.counts,
        metavar="N,N",
        help=f"tokens read; default those of {','.join(map(str, DEFAULT_CONTEXTS))} that fit",
    )
    options.add_parameter(
        parser, SpeedOptions, "--new-tokens", type=parse.count, metavar="N", help="tokens decoded after them"
    )
    options.add_parameter(
        parser,
        SpeedOptions,
        "--rounds",
        type=parse.count,
        metavar="N",
        help="each visits every model; one more warms up",
    )
    options.add_parameter(
        parser, SpeedOptions, "--dtype", choices=get_args(Precision), help="of the weights; auto: as stored"
    )
    parser.add_argument("--threads", type=parse.count, metavar="N", help="of the CPU; default as many as torch takes")


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron import api
    from minitron.evaluation.engines import SpeedOptions

    grid = SpeedOptions(args.engine, args.batch, args.context, args.new_tokens, args.rounds, args.dtype, args.threads)
    result = api.measure_speed(args.model, args.teacher, grid, listener=console)
    console.result(result.to_dict(), "\n".join(speed_lines(result)))


def speed_lines(result: "SpeedResult") -> list[str]:
    """Write the table of speeds and memory, and a line on how they were measured."""
    from minitron.core.text import MISSING, rate, shown, size, with_range

    cells = [["batch", "context", "", "prefill, tokens/s", "decode, tokens/s", "peak memory"]]
    for row in result.rows:
        load = [str(row.load.batch), str(row.load.context)]
        for name, speed in row.speeds.items():
            prefill = with_range(speed.prefill, speed.prefill_range, rate)
            decode = with_range(speed.decode, speed.decode_range, rate)
            cells.append([*load, name, prefill, decode, shown(speed.peak_memory_bytes, size)])
        if row.ratio is not None:
            form = "{:.2f}".format
            prefill = with_range(row.ratio.prefill, row.ratio.prefill_range, form)
            cells.append([*load, "ratio", prefill, with_range(row.ratio.decode, row.ratio.decode_range, form), MISSING])
    busy, busiest = "", max(result.load_average)
    if busiest > result.threads + 0.5:
        busy = f"; the load average was up to {busiest:.1f}: other work had its share"
    return [
        *aligned(cells),
        "",
        f"{result.engine} on {result.device}, CPU threads: {result.threads}; median of {result.rounds} rounds, "
        f"slowest to fastest in brackets; {result.new_tokens} new tokens{busy}",
    ]


COMMAND = Command(
    help="prefill and decode tokens per second and peak memory, teacher and student in turn",
    example="minitron speed runs/half/student --teacher ./my-model --batch 1,8 --context 128,1024",
    add_options=_add_options,
    run=_run,
    rules=_RULES,
)
