"""`minitron evaluate` measures a model on held-out text, or in benchmarks."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from minitron.cli import options, parse
from minitron.cli.command import Command
from minitron.cli.console import Console, aligned
from minitron.cli.rules import ROWS, Rules
from minitron.core.effects import Rule

if TYPE_CHECKING:
    from minitron.evaluation.tasks.suite import BenchmarkResult


def _has_benchmarks(args: argparse.Namespace) -> bool:
    return bool(args.asked.evaluate.benchmarks)


def _measures_text(args: argparse.Namespace) -> bool:
    return not _has_benchmarks(args) or options.names_text(args)


def _is_checkpoint(args: argparse.Namespace) -> bool:
    from minitron.gguf.reader import is_gguf

    return not is_gguf(args.model)


_RULES: Rules = (
    Rule(
        ("evaluate.prompts", "evaluate.new_tokens", "evaluate.speed"),
        lambda args: False,
        "in a run, and `minitron evaluate` measures text and benchmarks alone",
    ),
    Rule(
        ("evaluate.limit", "shots", "evaluate.allow_code", "chat", "streamed", "batch", "cache"),
        _has_benchmarks,
        "with benchmarks",
        "give --tasks, --suite or --tasks-dir",
    ),
    Rule(
        ("whole", "evaluate.blocks", "evaluate.batch", "data.*"),
        _measures_text,
        "where text is measured, and benchmarks are alone without --data",
        "give --data",
    ),
    Rule(("evaluate.batch",), _is_checkpoint, "where a checkpoint is measured, and llama.cpp reads block by block"),
    Rule(("data.heldout", "data.heldout_fraction"), lambda args: not args.whole, "without --whole", "leave that out"),
    Rule(
        ("data.max_tokens",),
        lambda args: not args.whole and args.asked.data.heldout is None,
        "where a part of the text is held out, without --whole and data.heldout",
    ),
    ROWS,
)


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--teacher", type=parse.named, metavar="MODEL", help="a model with the same tokenizer to compare with"
    )
    options.add_data(parser, sampled=False)
    parser.add_argument("--whole", action="store_true", help="measure on all of the data, not on its held-out part")
    options.add_key(
        parser,
        "evaluate.blocks",
        "--blocks",
        type=parse.count,
        metavar="N",
        help="blocks to measure on, at most; default all with --whole, else as many as hold 65,536 tokens",
    )
    options.add_set(parser, "data", "evaluate")
    _add_benchmarks(
        parser.add_argument_group("benchmarks, through lm-evaluation-harness (without --data, instead of text)")
    )


def _add_benchmarks(group: options.Container) -> None:
    options.add_key(
        group,
        "evaluate.tasks",
        "--suite",
        choices=["minitron"],
        default=None,
        says=lambda name: {"evaluate.tasks": [name]},
        help="the nine benchmarks of the papers, with their shots",
    )
    options.add_key(group, "evaluate.tasks", "--tasks", type=parse.names, metavar="T1,T2")
    options.add_key(group, "evaluate.tasks_dir", "--tasks-dir", type=parse.named, metavar="DIR")
    options.add_key(group, "evaluate.limit", "--limit", type=parse.count, metavar="N")
    group.add_argument(
        "--shots", type=parse.seed, metavar="N", help="examples in the prompt, instead of each task's own"
    )
    options.add_key(group, "evaluate.allow_code", "--allow-code", action="store_true")
    group.add_argument("--chat", action="store_true", help="put prompts through the model's chat template")
    group.add_argument(
        "--streamed",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one layer in memory at a time; default where the model does not fit",
    )
    group.add_argument(
        "--batch", type=parse.count, metavar="N", help="rows per forward call; default what memory takes"
    )
    group.add_argument(
        "--cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep results, and take those that are known; default yes",
    )


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron import api

    asked, facts, lines = args.asked.evaluate, dict[str, object](), list[str]()
    if _has_benchmarks(args):
        benchmarks = _benchmarks(args, console)
        facts, lines = benchmarks.to_dict(), _benchmark_lines(benchmarks)
    if _measures_text(args):
        data = options.data_config(args, console)
        measured = api.evaluate(
            args.model,
            data,
            teacher=args.teacher,
            blocks=asked.blocks,
            batch=asked.batch,
            whole=args.whole,
            listener=console,
        ).to_dict()
        facts, lines = {**measured, **facts}, [*_quality_lines(measured), *lines]
    console.result(facts, "\n".join(lines))


def _quality_lines(measured: Mapping[str, float | int | None]) -> list[str]:
    return [
        f"{name:<16}{value:>14,.4f}" if isinstance(value, float) else f"{name:<16}{value:>14,}"
        for name, value in measured.items()
        if value is not None
    ]


def _benchmarks(args: argparse.Namespace, console: Console) -> "BenchmarkResult":
    """Measure the model in benchmarks."""
    from minitron import api
    from minitron.evaluation.tasks.measure import TaskOptions, cache_directory

    asked = args.asked.evaluate
    how = TaskOptions(
        limit=asked.limit,
        shots=args.shots,
        allow_code=asked.allow_code,
        chat=args.chat,
        streamed=args.streamed,
        batch=args.batch,
    )
    directory = None if asked.tasks_dir is None else Path(asked.tasks_dir)
    cache = cache_directory() if args.cache else None
    return api.benchmark(
        args.model, asked.tasks, how, teacher=args.teacher, directory=directory, cache=cache, listener=console
    )


def _benchmark_lines(result: "BenchmarkResult") -> list[str]:
    from minitron.core.text import percent, shown
    from minitron.report.tables import BENCHMARK_NOTE, score

    teacher = result.teacher_tasks
    head = ["benchmark", "metric", "shots", "items"]
    cells = [[*head, "model"] if teacher is None else [*head, "teacher", "model", "kept"]]
    for name, row in result.tasks.items():
        own = [name, row.metric, str(row.shots), f"{row.n:,}"]
        kept = [] if teacher is None else [shown(result.kept[name], percent)]
        cells.append([*own, *([] if teacher is None else [score(teacher[name])]), score(row), *kept])
    return [*aligned(cells), "", BENCHMARK_NOTE]


COMMAND = Command(
    help="loss, perplexity, bits per byte, KL to a teacher on held-out text; or benchmarks",
    example="minitron evaluate student --teacher ./my-model --data heldout.jsonl --whole --json",
    add_options=_add_options,
    run=_run,
    rules=_RULES,
)
