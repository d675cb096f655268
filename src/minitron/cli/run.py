"""`minitron run` runs a recipe from a file; the other commands that run one call its functions."""

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from minitron.cli import options, parse
from minitron.cli.command import Command
from minitron.cli.console import Console, aligned
from minitron.cli.rules import Rules
from minitron.core.effects import Rule

if TYPE_CHECKING:
    from minitron.model.describe import Description
    from minitron.pipeline.estimate import Estimate
    from minitron.recipe import Recipe
    from minitron.report.records import RunRecords

FEW_TOKENS = 10_000  # of held-out text, on which a mean is off by some percent

DRY_RUN: Rules = (
    Rule(("gpus",), lambda args: args.dry_run, "with --dry-run", "add --dry-run"),
    Rule(
        ("gpu_teraflops", "utilisation", "gpu_memory"),
        lambda args: args.dry_run and args.gpus is not None,
        "with --dry-run and --gpus",
        "add both",
    ),
)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        type=parse.named,
        metavar="RECIPE",
        help="a .yaml file, or the name of a recipe that comes with minitron",
    )
    parser.add_argument("--out", type=parse.path, metavar="DIR", help="run directory; default runs/RECIPE")
    add_dry_run(parser)
    options.add_set(parser)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    from minitron.pipeline.estimate import Gpus

    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print shapes, memory and cost, and the time of each stage by that of a few layers; run nothing",
    )
    parser.add_argument(
        "--gpus", type=parse.count, metavar="N", help="with --dry-run: also estimate for this many GPUs"
    )
    parser.add_argument(
        "--gpu-teraflops",
        type=parse.positive,
        default=Gpus.teraflops,
        metavar="N",
        help="peak of each; default %(default)g, an H100 in bfloat16",
    )
    parser.add_argument(
        "--utilisation",
        type=parse.positive,
        default=Gpus.utilisation,
        metavar="SHARE",
        help="share of the peak reached; default %(default)g, an assumption",
    )
    parser.add_argument(
        "--gpu-memory",
        type=parse.size,
        default=Gpus.memory,
        metavar="SIZE",
        help="memory of each, of which a step may take nine tenths; default 80GB",
    )


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron.recipe import find_recipe, load_recipe

    path = find_recipe(args.recipe)
    run_recipe(load_recipe(path, args.set), args.out or Path("runs") / path.stem, args, console)


def run_recipe(recipe: "Recipe", out: Path, args: argparse.Namespace, console: Console) -> None:
    """Run a recipe, or print its shapes and cost with --dry-run."""
    from minitron.gguf.source import model_directory
    from minitron.model.checkpoint import open_config
    from minitron.pipeline.budget import with_budget
    from minitron.pipeline.estimate import Gpus, estimate
    from minitron.pipeline.run import budget_of, run, settle_memory

    if not args.dry_run:
        return show_run(run(recipe, out, console), console)
    gpus = Gpus(args.gpus, args.gpu_teraflops, args.utilisation, args.gpu_memory) if args.gpus else None
    teacher = open_config(model_directory(recipe.model, recipe.revision, config_only=True))
    recipe, settled = settle_memory(recipe, teacher, out, None if gpus is None else gpus.room)
    budget = budget_of(recipe, teacher, out, console)
    if budget is not None:
        recipe = recipe.model_copy(update={"distill": with_budget(recipe.distill, budget)})
    found = estimate(recipe, gpus, timed=gpus is None, settled=settled)
    console.result(found.to_dict(), "\n".join(estimate_lines(found)))


def show_run(records: "RunRecords", console: Console) -> None:
    """Print the table of a finished run."""
    from minitron.core.run_layout import RunLayout
    from minitron.report.records import exported, result_table
    from minitron.report.tables import RESULT_COLUMNS, result_cells

    rows, layout = result_table(records), RunLayout(records.path)
    facts = {"run": str(records.path), "report": str(layout.report), "models": rows}
    cells = [["", *(column.heading for column in RESULT_COLUMNS)], ["", *(column.unit for column in RESULT_COLUMNS)]]
    cells += [[row["model"], *result_cells(row)] for row in rows]
    hidden = {"non_embedding_share", "bits_per_byte"}  # in the report and in --json; a terminal is narrow
    shown = [True, *(column.key not in hidden for column in RESULT_COLUMNS)]
    lines = aligned([list(itertools.compress(row, shown)) for row in cells])
    tokens = records.evaluations["teacher"].tokens
    files = {name: row.files(records.exports[name], layout.stage(name)) for name, row in exported(records)}
    notes = [
        "",
        f"Measured on {tokens:,} tokens of held-out text{_few(tokens)}.",
        f"student: {records.path / 'student'}",
        *(f"{name + ':':8} {layout.stage(name)} ({len(some)} files)" for name, some in files.items() if some),
        f"report:  {layout.report}",
    ]
    console.result(facts, "\n".join(lines + notes))


def _few(tokens: int) -> str:
    """Say what so few tokens mean for the numbers, and how they become more."""
    if tokens >= FEW_TOKENS:
        return ""
    return (
        ", which are few: a difference of some percent may be chance (raise data.heldout_fraction or evaluate.blocks)"
    )


def estimate_lines(found: "Estimate") -> list[str]:
    """Describe both models and the cost of a run."""
    from minitron.core.text import flops

    tokens, forward, step = (
        found.distill_tokens,
        found.teacher_forward_flops_per_token,
        found.student_step_flops_per_token,
    )
    lines = _model_lines("teacher", found.teacher, found.context)
    if found.searched:
        lines.append("student: its shape is chosen once the teacher is calibrated; here the largest that it may have")
    lines += _model_lines("student", found.student, found.context)
    if sampled := found.sampled_tokens:
        lines.append(
            f"text: {sampled:,} training tokens sampled from the teacher, one by one, {flops(sampled * forward)}"
        )
    lines += [
        f"calibration: {found.calibration_tokens:,} tokens at most, {flops(found.calibration_flops)}",
        f"distillation: {f'{tokens:,} tokens' if tokens else 'one pass over the text'}; per token "
        f"{flops(forward)} teacher forward, {flops(step)} student step",
        *_memory_lines(found),
    ]
    return lines + (_cost_lines(found) if tokens else []) + _stage_lines(found)


def _memory_lines(found: "Estimate") -> list[str]:
    """Describe the memory of a training step."""
    from minitron.core.text import size

    settled, gpus = found.settled, found.gpus
    if settled is None:
        return []
    memory, fit = settled.memory, settled.fit
    on = "" if gpus is None else " on one GPU" if gpus.count == 1 else f" on each of {gpus.count} GPUs, fully sharded"
    return [
        f"memory while distilling{on}: {size(memory.peak)} at most: {size(memory.student)} student, "
        f"{size(memory.teacher)} teacher, {size(memory.optimizer)} optimizer, {size(memory.working)} gradients, "
        "activations and gathered weights",
        *([f"to fit: {fit}"] if fit is not None and fit.changes else []),
    ]


def _stage_lines(found: "Estimate") -> list[str]:
    """Describe the seconds of each stage on this machine, and their sum."""
    from minitron.core.text import duration

    if not found.stages:
        return []
    rows = [(one.name, "?" if one.seconds is None else duration(one.seconds), one.why) for one in found.stages]
    unknown = [one.name for one in found.stages if one.seconds is None]
    rows.append(("in all", duration(found.seconds), f"without {', '.join(unknown)}" if unknown else ""))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    told = [f"  {name.ljust(widths[0])}  {took.rjust(widths[1])}  {why}".rstrip() for name, took, why in rows]
    return ["on this machine, by a few seconds of each stage's work on layers of these sizes:", *told]


def _model_lines(name: str, model: "Description", context: int) -> list[str]:
    """Describe the shape, parameters and memory of one model."""
    from minitron.core.text import size

    parameters, cache = model.parameters, model.kv_cache_bytes_per_token
    return [
        f"{name}: {model.family}, " + " ".join(f"{dim}={number}" for dim, number in vars(model.shape).items()),
        f"  {parameters.total:,} parameters, {parameters.non_embedding:,} non-embedding",
        f"  {size(model.weight_bytes)} of {model.dtype} weights, "
        f"KV cache {size(cache)} a token, {size(cache * context)} at {context:,} tokens",
    ]


def _cost_lines(found: "Estimate") -> list[str]:
    """Describe the cost of a distillation of a known number of tokens, here and on GPUs."""
    from minitron.core.text import duration, flops

    here, gpus = found.here, found.gpus
    assert found.distill_flops is not None and here.seconds is not None
    how = "an assumed" if not found.stages else "measured:"
    lines = [f"all of distillation: {flops(found.distill_flops)}"]
    if found.correction_tokens:
        more = flops(found.correction_flops or 0)
        lines.append(f"correction of the teacher: {found.correction_tokens:,} tokens at most, {more} more")
    lines.append(
        f"on this machine: {duration(here.seconds)} at {flops(here.flops_per_second)}/s, {how} "
        f"{here.utilisation:.0%} of what a large matrix product reaches here"
    )
    if gpus is not None:
        seconds = found.seconds_on_gpus or 0.0
        lines.append(
            f"on {gpus.count} GPUs: {duration(seconds)}, {gpus.count * seconds / 3600:,.0f} GPU hours, at an assumed "
            f"{gpus.utilisation:.0%} of {gpus.teraflops:g} TFLOP/s each"
        )
    return lines


COMMAND = Command(
    help="run a recipe; the same command again resumes it",
    example="minitron run llama-3.1-8b-to-4b-width --set model=./Llama-3.1-8B --dry-run --gpus 64",
    add_options=_add_options,
    run=_run,
    rules=DRY_RUN,
)
