"""The verbs of the command line: what each does with its arguments, and what it prints.

Imports stand in the functions: `minitron --help` does not wait for torch.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from minitron.cli.console import Console
from minitron.cli.options import data_config, data_section, pair, repair_section, section
from minitron.cli.results import (
    aligned,
    benchmark_lines,
    candidate_lines,
    estimate_lines,
    ladder_lines,
    planned_lines,
    speed_lines,
)
from minitron.cli.rules import require_cut_options
from minitron.core.effects import require_once
from minitron.core.errors import MinitronError


def demo(args: argparse.Namespace, console: Console) -> None:
    from minitron.pipeline.run import run
    from minitron.recipe import demo_recipe

    console.note("The demo teacher writes Python; half of it is cut away and the rest is taught again.")
    _show_run(run(demo_recipe(args.set), args.out, console), console)


def inspect(args: argparse.Namespace, console: Console) -> None:
    from minitron.core.errors import UnsupportedArchitecture
    from minitron.core.text import size
    from minitron.model.checkpoint import resolve_model
    from minitron.rooms import draft_model, inspect_model

    if _is_gguf(args.model):
        return _inspect_gguf(args, console)
    path = resolve_model(args.model, args.revision, config_only=True)
    try:
        facts = inspect_model(path)
    except UnsupportedArchitecture:
        draft = draft_model(path)
        if draft is not None:
            console.result({"draft": draft.to_dict()}, draft.text())
        raise
    shape, parameters = facts["shape"], facts["parameters"]
    dtype = facts["dtype"] + (" (assumed, config.json says none)" if facts.get("dtype_assumed") else "")
    weights = size(facts["weight_bytes"]) if facts["weights"] else f"{size(facts['weight_bytes'])} of weights, not here"
    lines = [
        f"{args.model}: {facts['family']}, {dtype}, {weights}",
        "",
        *(f"  {dim:<14}{number:>16,}" for dim, number in shape.items()),
        "",
        *(f"  {part:<14}{count:>16,}" for part, count in parameters.items()),
        "",
        f"  embeddings are {'tied' if facts['tied_embeddings'] else 'untied'}; "
        f"KV cache {size(facts['kv_cache_bytes_per_token'])} per token",
        f"  can be pruned: {', '.join(facts['prunable'])}",
    ]
    console.result(facts, "\n".join(lines))


def compress(args: argparse.Namespace, console: Console) -> None:
    from minitron.model.naming import model_name
    from minitron.recipe import build_recipe

    raw: dict[str, Any] = {
        "model": args.model,
        "revision": args.revision,
        "seed": args.seed,
        "data": data_section(args, console),
        "prune": {"target": args.target_params},
        "distill": {"tokens": args.tokens},
    }
    name = f"{model_name(args.model)}-{args.target_params.rstrip('%')}"
    _run_recipe(build_recipe(raw, args.set), args.out or Path("runs") / name, args, console)


def run(args: argparse.Namespace, console: Console) -> None:
    from minitron.recipe import find_recipe, load_recipe

    path = find_recipe(args.recipe)
    _run_recipe(load_recipe(path, args.set), args.out or Path("runs") / path.stem, args, console)


def _run_recipe(recipe: Any, out: Path, args: argparse.Namespace, console: Console) -> None:
    from minitron.pipeline.estimate import Gpus, estimate
    from minitron.pipeline.run import run

    if not args.dry_run:
        return _show_run(run(recipe, out, console), console)
    facts = estimate(recipe, Gpus(args.gpus, args.gpu_teraflops, args.utilisation) if args.gpus else None)
    console.result(facts, "\n".join(estimate_lines(facts)))


def calibrate(args: argparse.Namespace, console: Console) -> None:
    from minitron.calibration.collect import CalibrateConfig
    from minitron.core.parallel import ranks
    from minitron.rooms import calibrate_model

    config = section(CalibrateConfig, samples=args.samples, second_moment=args.second_moment)
    data = data_config(args, console)
    statistics = calibrate_model(args.model, data, config, seed=args.seed, out=args.out, listener=console)
    if ranks().rank > 0:
        return
    facts = {"out": str(args.out), "samples": statistics.samples, "tokens": statistics.tokens}
    console.result(facts, f"statistics of {statistics.samples} samples, {statistics.tokens:,} tokens: {args.out}")


def search(args: argparse.Namespace, console: Console) -> None:
    from minitron.pruning.plan import PruneConfig
    from minitron.rooms import search_model
    from minitron.shapes.space import SearchConfig

    pairs = [part.partition("=") for part in args.dims]
    if bad := [dim + equals + sizes for dim, equals, sizes in pairs if not sizes]:
        raise MinitronError(f"--dims {bad[0]!r}: write it as dim=sizes, such as layers=29-32")
    search = section(
        SearchConfig,
        level="cut" if args.cut else "predicted",
        window=args.window,
        least=args.least,
        max_memory_bytes=args.max_memory,
        bytes_per_parameter=args.bytes_per_parameter,
        max_kv_cache_bytes=args.max_kv_cache,
        max_decode_seconds=args.max_decode_time,
        max_prefill_seconds=args.max_prefill_time,
        context_tokens=args.context,
        batch=args.batch,
        bytes_per_second=args.bytes_per_second,
        flops_per_second=args.flops_per_second,
        dims=require_once(((dim, sizes) for dim, _, sizes in pairs), "--dims"),
        gguf_block=args.gguf_block,
        cut_candidates=args.cut or 1,
    )
    facts = search_model(
        args.model,
        prune=section(PruneConfig, target=args.target_params),
        search=search,
        statistics_dir=args.statistics,
        data_config=None if args.statistics and not args.cut else data_config(args, console),
        listener=console,
    )
    console.result(facts, "\n".join(candidate_lines(facts, args.top)))


def prune(args: argparse.Namespace, console: Console) -> None:
    from minitron.pruning.plan import PruneConfig
    from minitron.rooms import prune_model

    units = [name for name in ("shape", "layers", "plan") if getattr(args, name)]
    if not units and not args.target_params:
        args.parser.error("one of the arguments --target-params --shape --layers --plan is required")
    if units and args.target_params:
        args.parser.error(f"argument --{units[0]}: not allowed with argument --target-params")
    options = {
        name: getattr(args, name) for name in ("shape", "criterion", "layer_criterion", "layer_task", "iterations")
    }
    options |= {"target": args.target_params, **(args.layers or {})}
    plan, facts = prune_model(
        args.model,
        config=section(PruneConfig, **{name: value for name, value in options.items() if value is not None}),
        repair=repair_section(args.repair),
        plan_file=args.plan,
        statistics_dir=args.statistics,
        data_config=lambda: data_config(args, console),
        samples=args.samples,
        check=lambda needs: require_cut_options(args, needs),
        out=args.out,
        listener=console,
    )
    text = f"{plan}\n{facts['parameters']['non_embedding']:,} non-embedding parameters: {args.out}"
    console.result({"out": str(args.out), "plan": str(plan)} | facts, text)


def distill(args: argparse.Namespace, console: Console) -> None:
    from minitron.distillation.config import DistillConfig
    from minitron.recipe import build_distill
    from minitron.rooms import distill_models

    given = section(DistillConfig, tokens=args.tokens, learning_rate=args.learning_rate)
    config = build_distill(given.model_dump(exclude_unset=True, exclude_none=True), args.set)
    data = data_config(args, console)
    facts = distill_models(args.teacher, args.student, data, config, seed=args.seed, out=args.out, listener=console)
    if not facts:
        return  # the first of several processes speaks
    text = f"student after {facts['training']['tokens']:,} tokens: {args.out}"
    console.result(facts, text + (f"\ncorrected teacher: {facts['corrected']}" if "corrected" in facts else ""))


def evaluate(args: argparse.Namespace, console: Console) -> None:
    with_tasks = bool(args.tasks or args.suite or args.tasks_dir)
    facts: dict[str, Any] = {}
    if with_tasks:
        facts = _benchmarks(args, console)
    if not with_tasks or args.data is not None:
        facts = _quality(args, console) | facts
    lines = [
        f"{name:<16}{value:>14,.4f}" if isinstance(value, float) else f"{name:<16}{value:>14,}"
        for name, value in facts.items()
        if isinstance(value, float | int)
    ]
    console.result(facts, "\n".join(lines + (benchmark_lines(facts) if with_tasks else [])))


def _quality(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from minitron.rooms import evaluate_model

    data = data_config(args, console)
    options: dict[str, Any] = {"blocks": args.blocks, "whole": args.whole, "listener": console}
    if _is_gguf(args.model):
        from minitron.gguf_rooms import evaluate_gguf

        return evaluate_gguf(Path(args.model), args.teacher, data, **options)
    return evaluate_model(args.model, args.teacher, data, **options)


def _benchmarks(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from minitron.evaluation.tasks.measure import TaskOptions, cache_directory
    from minitron.rooms import benchmark_models

    for model in (args.model, args.teacher):
        if model is not None and _is_gguf(model):
            raise MinitronError(
                f"{model}: benchmarks are measured on checkpoints, not on GGUF files; measure the checkpoint, and what "
                "the file loses against it with `minitron evaluate FILE --teacher CHECKPOINT --data D`"
            )
    names = ("limit", "shots", "allow_code", "chat", "streamed", "batch")
    options = TaskOptions(**{name: getattr(args, name) for name in names})
    cache = cache_directory() if args.cache else None
    tasks = [*([args.suite] if args.suite else []), *args.tasks]
    return benchmark_models(args.model, args.teacher, tasks, args.tasks_dir, options, cache=cache, listener=console)


def generate(args: argparse.Namespace, console: Console) -> None:
    from minitron.rooms import generate_text

    options = {"new_tokens": args.new_tokens, "temperature": args.temperature, "seed": args.seed}
    if _is_gguf(args.model):
        from minitron.gguf_rooms import generate_gguf

        text = generate_gguf(Path(args.model), args.prompt, **options)
    else:
        text = generate_text(args.model, args.prompt, **options)
    console.result({"prompt": args.prompt, "text": text}, args.prompt + text)


def _is_gguf(model: str) -> bool:
    """Whether MODEL is a GGUF file, for which the packages must be there."""
    from minitron.gguf.config import require_installed
    from minitron.gguf.reader import is_gguf

    if not is_gguf(model):
        return False
    require_installed()
    return True


def _inspect_gguf(args: argparse.Namespace, console: Console) -> None:
    from minitron.core.text import share, size
    from minitron.gguf_rooms import inspect_gguf

    if args.revision is not None:
        raise MinitronError(f"--revision {args.revision} is of a hub id, and {args.model} is a file: leave it out")
    facts = inspect_gguf(Path(args.model))
    total = facts["parameters"]["total"]
    lines = [
        f"{args.model}: {facts['family']}, {size(facts['bytes'])}, {facts['bits_per_weight']:.2f} bits per weight",
        "",
        *(f"  {dim:<14}{_spelled(number):>16}" for dim, number in facts["shape"].items() if number is not None),
        "",
        f"  {'weights':<14}{total:>16,}",
        *(f"  {kind:<14}{count:>16,}  {share(count / total)}" for kind, count in facts["types"].items()),
    ]
    console.result(facts, "\n".join(lines))


def _spelled(number: int | list[int]) -> str:
    """A size, or the sizes of layers that have different ones."""
    return f"{number:,}" if isinstance(number, int) else ", ".join(f"{each:,}" for each in sorted(set(number)))


def quantize(args: argparse.Namespace, console: Console) -> None:
    own = bool(args.target_bpw or args.target_size)
    if not args.types and not own:
        args.parser.error("one of the arguments --types --target-bpw --target-size is required")
    if args.out is None and not args.dry_run:
        args.parser.error("the following arguments are required: --out")
    from minitron.gguf.config import QuantizeConfig, require_installed

    require_installed()
    from minitron.gguf_rooms import plan_quantized, quantize_model

    config = section(
        QuantizeConfig,
        types=args.types,
        bits_per_weight=args.target_bpw,
        sizes=args.target_size,
        tensor_types=require_once((pair("--tensor-type", text) for text in args.tensor_type), "--tensor-type"),
        samples=args.samples,
        blocks=args.blocks,
        verify=args.verify,
        pre=args.pre,
        threads=args.threads,
    )
    with_text = args.data is not None or args.verify or own
    if args.dry_run:
        planned = plan_quantized(args.model, config, informed=with_text or args.imatrix is not None)
        return console.result(planned, "\n".join(planned_lines(planned)))
    data = data_config(args, console) if with_text else None
    table = quantize_model(args.model, config, data, importance_file=args.imatrix, out=args.out, listener=console)
    console.result(table | {"out": str(args.out)}, "\n".join([*ladder_lines(table), f"in {args.out}"]))


def speed(args: argparse.Namespace, console: Console) -> None:
    from minitron.speed_room import measure_models

    facts = measure_models(
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


def report(args: argparse.Namespace, console: Console) -> None:
    from minitron.report.comparison import write_comparison
    from minitron.report.page import write_report
    from minitron.report.records import read_run

    runs = [read_run(path) for path in args.runs]
    if len(runs) == 1:
        path = write_report(runs[0], args.out)
    else:
        path = write_comparison(runs, args.out or Path("comparison.html"))
    console.result({"report": str(path)}, str(path))


def card(args: argparse.Namespace, console: Console) -> None:
    from minitron.report.card import write_card
    from minitron.report.records import read_run

    path = write_card(read_run(args.run))
    console.result({"card": str(path)}, str(path))


def push(args: argparse.Namespace, console: Console) -> None:
    from minitron.core.text import size
    from minitron.report.hub import planned_uploads, push, require_repo_id
    from minitron.report.records import read_run

    require_repo_id(args.repo)
    records = read_run(args.run)
    files: list[dict[str, Any]] = [
        {"file": str(upload.file), "bytes": upload.file.stat().st_size, "to": f"{args.repo}/{upload.destination}"}
        for upload in planned_uploads(records)
    ]
    total = sum(row["bytes"] for row in files)
    facts = {"repo": args.repo, "private": args.private, "bytes": total, "files": files}
    if not args.dry_run:
        url = push(records, args.repo, private=args.private)
        return console.result(facts | {"url": url}, f"{len(files)} files, {size(total)}: {url}")
    lines = [f"{size(row['bytes']):>10}  {row['to']}" for row in files]
    console.result(facts, "\n".join([*lines, f"{len(files)} files, {size(total)}; nothing was sent"]))


def _show_run(records: Any, console: Console) -> None:
    from minitron.report.records import result_table
    from minitron.report.tables import RESULT_COLUMNS, result_cells

    rows = result_table(records)
    facts = {"run": str(records.path), "report": str(records.path / "report.html"), "models": rows}
    cells = [["", *(column.heading for column in RESULT_COLUMNS)], ["", *(column.unit for column in RESULT_COLUMNS)]]
    cells += [[row["model"], *result_cells(row)] for row in rows]
    hidden = {"non_embedding_share", "bits_per_byte"}  # in the report and in --json; a terminal is narrow
    shown = [True, *(column.key not in hidden for column in RESULT_COLUMNS)]
    cells = [list(itertools.compress(row, shown)) for row in cells]
    lines = aligned(cells)
    tokens = records.evaluations["teacher"].tokens
    notes = [
        "",
        f"Measured on {tokens:,} tokens of held-out text.",
        f"student: {records.path / 'student'}",
        f"report:  {records.path / 'report.html'}",
    ]
    console.result(facts, "\n".join(lines + notes))
