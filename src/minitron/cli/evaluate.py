"""`minitron evaluate` measures a model on held-out text, or in benchmarks."""

import argparse
from pathlib import Path
from typing import Any

from minitron.cli import options, parse
from minitron.cli.console import Console, aligned
from minitron.cli.rules import ROWS, Rules
from minitron.core.effects import Rule
from minitron.core.errors import MinitronError

HELP = "loss, perplexity, bits per byte, KL to a teacher on held-out text; or benchmarks"
EXAMPLE = "minitron evaluate student --teacher ./my-model --data heldout.jsonl --whole --json"


def _has_benchmarks(args: argparse.Namespace) -> bool:
    return bool(args.asked.evaluate.benchmarks)


def _measures_text(args: argparse.Namespace) -> bool:
    return not _has_benchmarks(args) or options.names_text(args)


def _is_checkpoint(args: argparse.Namespace) -> bool:
    return not options.is_gguf(args.model)


RULES: Rules = (
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


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, options.MODEL_OR_FILE)
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
        help="blocks to measure on, at most; default %(default)s",
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
    options.add_key(
        group,
        "evaluate.tasks",
        "--tasks",
        type=parse.names,
        metavar="T1,T2",
    )
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


def run(args: argparse.Namespace, console: Console) -> None:
    with_tasks = _has_benchmarks(args)
    facts: dict[str, Any] = {}
    if with_tasks:
        facts = _benchmarks(args, console)
    if _measures_text(args):
        facts = _quality(args, console) | facts
    lines = [
        f"{name:<16}{value:>14,.4f}" if isinstance(value, float) else f"{name:<16}{value:>14,}"
        for name, value in facts.items()
        if isinstance(value, float | int)
    ]
    console.result(facts, "\n".join(lines + (_benchmark_lines(facts) if with_tasks else [])))


def _quality(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure the model on text."""
    from minitron import api

    data, asked = options.data_config(args, console), args.asked.evaluate
    how: dict[str, Any] = {"blocks": asked.blocks, "whole": args.whole, "listener": console}
    if options.is_gguf(args.model):
        from minitron.evaluation.gguf_files import evaluate_gguf

        return evaluate_gguf(Path(args.model), args.teacher, data, **how)
    return api.evaluate(args.model, args.teacher, data, batch=asked.batch, **how)


def _benchmarks(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure the model in benchmarks."""
    from minitron import api
    from minitron.evaluation.tasks.measure import TaskOptions, cache_directory

    for model in (args.model, args.teacher):
        if model is not None and options.is_gguf(model):
            raise MinitronError(
                f"{model}: benchmarks are measured on checkpoints, not on GGUF files; measure the checkpoint, and what "
                "the file loses against it with `minitron evaluate FILE --teacher CHECKPOINT --data D`"
            )
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
    return api.benchmark(args.model, args.teacher, asked.tasks, directory, how, cache=cache, listener=console)


def _benchmark_lines(facts: dict[str, Any]) -> list[str]:
    from minitron.core.text import percent, shown
    from minitron.report.tables import BENCHMARK_NOTE, score

    teacher = facts.get("teacher_tasks", {})
    cells = [["benchmark", "metric", "shots", "items", *(["teacher"] if teacher else []), "model"]]
    cells[0] += ["kept"] if teacher else []
    for name, row in facts["tasks"].items():
        own = [name, row["metric"], str(row["shots"]), f"{row['n']:,}"]
        pair = [score(teacher[name])] if teacher else []
        cells.append([*own, *pair, score(row), *([shown(facts["kept"][name], percent)] if teacher else [])])
    return [*aligned(cells), "", BENCHMARK_NOTE]
