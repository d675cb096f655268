"""`minitron speed` measures how fast models run, and in how much memory."""

import argparse
from typing import Any, get_args

from minitron.cli import options, parse
from minitron.cli.console import Console, aligned
from minitron.cli.rules import Rules
from minitron.core.effects import Rule

HELP = "prefill and decode tokens per second and peak memory, teacher and student in turn"
EXAMPLE = "minitron speed runs/half/student --teacher ./my-model --batch 1,8 --context 128,1024"
RULES: Rules = (
    Rule(
        ("threads",),
        lambda args: args.engine != "vllm",
        "with transformers and llama.cpp; vLLM takes its own",
        "take another --engine",
    ),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    from minitron.core.device import Precision
    from minitron.evaluation.engines import DEFAULT_CONTEXTS, Engine, measure_speed

    options.add_model(parser, options.MODEL_OR_FILE)
    parser.add_argument(
        "--teacher", type=parse.named, metavar="MODEL", help="measured in turn with MODEL: of the same kind"
    )
    parser.add_argument("--engine", choices=get_args(Engine), help="default llama.cpp for GGUF, else transformers")
    options.add_parameter(
        parser,
        measure_speed,
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
        parser, measure_speed, "--new-tokens", type=parse.count, metavar="N", help="tokens decoded after them"
    )
    options.add_parameter(
        parser,
        measure_speed,
        "--rounds",
        type=parse.count,
        metavar="N",
        help="each visits every model; one more warms up",
    )
    options.add_parameter(
        parser, measure_speed, "--dtype", choices=get_args(Precision), help="of the weights; auto: as stored"
    )
    parser.add_argument("--threads", type=parse.count, metavar="N", help="of the CPU; default as many as torch takes")


def run(args: argparse.Namespace, console: Console) -> None:
    from minitron.evaluation.engines import measure_speed

    facts = measure_speed(
        args.model,
        args.teacher,
        engine=args.engine,
        batches=args.batch,
        contexts=args.context,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        dtype=args.dtype,
        threads=args.threads,
        listener=console,
    )
    console.result(facts, "\n".join(speed_lines(facts)))


def speed_lines(facts: dict[str, Any]) -> list[str]:
    """Write the table of speeds and memory, and a line on how they were measured."""
    from minitron.core.text import rate, shown, size, with_range

    names = [*facts["models"], *(["ratio"] if "ratio" in facts["rows"][0] else [])]
    cells = [["batch", "context", "", "prefill, tokens/s", "decode, tokens/s", "peak memory"]]
    for row in facts["rows"]:
        for name in names:
            form, speed = ("{:.2f}".format if name == "ratio" else rate), row[name]
            rates = [with_range(speed[kind], speed[f"{kind}_range"], form) for kind in ("prefill", "decode")]
            memory = shown(speed.get("peak_memory_bytes"), size)
            cells.append([str(row["batch"]), str(row["context"]), name, *rates, memory])
    busy, busiest = "", max(facts["load_average"])
    if busiest > facts["threads"] + 0.5:
        busy = f"; the load average was up to {busiest:.1f}: other work had its share"
    return [
        *aligned(cells),
        "",
        f"{facts['engine']} on {facts['device']}, CPU threads: {facts['threads']}; median of {facts['rounds']} rounds, "
        f"slowest to fastest in brackets; {facts['new_tokens']} new tokens{busy}",
    ]
