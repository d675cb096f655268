"""`minitron search` ranks every shape within budgets."""

import argparse
from typing import TYPE_CHECKING

from minitron.cli import options, parse
from minitron.cli.command import Command
from minitron.cli.console import Console, aligned
from minitron.cli.rules import NOT_KEPT, ROWS, Rules, require_rules
from minitron.core.effects import Rule
from minitron.core.errors import MinitronError

if TYPE_CHECKING:
    from minitron.shapes.rank import Ranking


def _cuts(args: argparse.Namespace) -> bool:
    return bool(args.asked.search.level == "cut")


def _reads_text(args: argparse.Namespace) -> bool:
    return args.statistics is None or _cuts(args)


_RULES: Rules = (
    NOT_KEPT,
    Rule(
        ("data.*", "calibrate.*"),
        _reads_text,
        "where text is read: without --statistics, or with --cut",
        "add --cut",
    ),
    ROWS,
    Rule(
        ("prune.layer_criterion", "prune.layer_task", "prune.layer_samples", "prune.iterations"),
        _cuts,
        "where candidates are cut",
        "add --cut",
    ),
    Rule(
        ("search.window",),
        lambda args: args.asked.prune.target is not None and args.asked.search.least is None,
        "with --target-params and without --least",
        "give --target-params and no --least",
    ),
    Rule(("top",), lambda args: not args.json, "without --json, which has all", "leave out --json"),
)


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_target(parser, help="most parameters: 50%% of the non-embedding ones, or a total such as 4.5B")
    _add_budgets(parser)
    _add_machine(parser)
    options.add_key(
        parser,
        "search.dims",
        "--dims",
        nargs="+",
        says=lambda texts: {"search.dims": parse.dims(texts)},
        metavar="DIM=SIZES",
        help="sizes to search, such as layers=29-32 heads=32,48 ffn=2.5x,3x; default as for search.dims",
    )
    options.add_key(
        parser,
        "search.gguf_block",
        "--gguf-block",
        type=int,
        choices=options.choices(options.recipe_field("search.gguf_block")),
    )
    parser.add_argument(
        "--statistics", type=parse.path, metavar="DIR", help="directory that `minitron calibrate` wrote"
    )
    options.add_data(parser)
    options.add_key(
        parser,
        "search.cut_candidates",
        "--cut",
        type=parse.count,
        default=None,
        says=lambda number: {"search.level": "cut", "search.cut_candidates": number},
        metavar="N",
        help="also cut the best N and measure their loss on the data",
    )
    options.add_set(parser, "data", "prune", "search", "calibrate", "repair")
    parser.add_argument(
        "--top",
        type=parse.count,
        default=20,
        metavar="N",
        help="rows of the table, default %(default)s; --json has all",
    )


def _add_budgets(parser: argparse.ArgumentParser) -> None:
    """Add the budgets, which leave shapes out."""
    for key, flag, kind, metavar, example in (
        ("window", "--window", parse.positive, "SHARE", ""),
        ("least", "--least", str, "SIZE", ""),
        ("max_memory_bytes", "--max-memory", parse.size, "SIZE", "Such as 8GB."),
        ("bytes_per_parameter", "--bytes-per-parameter", parse.positive, "BYTES", ""),
        ("max_kv_cache_bytes", "--max-kv-cache", parse.size, "SIZE", "Such as 500MB."),
        ("max_decode_seconds", "--max-decode-time", parse.positive, "SECONDS", ""),
        ("max_prefill_seconds", "--max-prefill-time", parse.positive, "SECONDS", ""),
    ):
        options.add_key(parser, f"search.{key}", flag, type=kind, metavar=metavar, more=example)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the load and the machine that cache and times are computed for."""
    options.add_key(parser, "search.context_tokens", "--context", type=parse.count, metavar="N")
    options.add_key(
        parser, "search.batch", "--batch", type=parse.count, metavar="N", help="sequences at once; default %(default)s"
    )
    options.add_key(parser, "search.bytes_per_second", "--bytes-per-second", type=parse.size, metavar="SIZE")
    options.add_key(
        parser,
        "search.flops_per_second",
        "--flops-per-second",
        type=parse.positive,
        metavar="N",
        help="speed of matrix products of that machine; default measured on this one",
    )


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron import api
    from minitron.pipeline.rules import OF_CHOICE

    asked = args.asked
    if asked.search.level not in ("predicted", "cut"):
        raise MinitronError(
            f"search.level={asked.search.level} is of a run: `minitron search` predicts, and cuts with --cut; give "
            "that, or search in a run with `minitron run`"
        )
    require_rules(args, OF_CHOICE, api.choice_of_search(args.model, asked.prune, asked.repair))
    ranking = api.search(
        args.model,
        prune=asked.prune,
        search=asked.search,
        calibration=asked.calibrate,
        repair=asked.repair,
        statistics_dir=args.statistics,
        data=options.data_config(args, console) if _reads_text(args) else None,
        listener=console,
    )
    console.result(ranking.to_dict(), "\n".join(_lines(ranking, args.top)))


def _lines(ranking: "Ranking", top: int) -> list[str]:
    from minitron.report.tables import candidate_cells, candidate_columns

    found, machine = [one.to_dict() for one in ranking.candidates], ranking.machine
    columns = candidate_columns(found)
    cells = [[column.heading for column in columns], [column.unit for column in columns]]
    lines = aligned(cells + [candidate_cells(one, columns) for one in found[:top]])
    if len(found) > top:
        lines.append(f"and {len(found) - top:,} more; --top or --json shows them")
    return [
        *lines,
        "",
        f"{len(found):,} shapes fit. Cache and times are of {ranking.batch} x {ranking.context_tokens:,} tokens; "
        f"times are modelled from {machine.bytes_per_second / 1e9:,.1f} GB/s and "
        f"{machine.flops_per_second / 1e12:,.3g} TFLOP/s.",
    ]


COMMAND = Command(
    help="every shape within the budgets, ranked",
    example="minitron search ./my-model --statistics statistics --target-params 50% --dims layers=24-32 ffn=2x,3x",
    add_options=_add_options,
    run=_run,
    rules=_RULES,
)
