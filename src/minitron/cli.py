"""The command line: one verb per room. The only module that prints or exits."""

import argparse
import ctypes
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from minitron.console import Console
from minitron.errors import Interrupted, MinitronError, did_you_mean

EXAMPLES = {
    "demo": "minitron demo --out runs/demo",
    "inspect": "minitron inspect meta-llama/Llama-3.1-8B",
    "compress": "minitron compress ./my-model --target-params 50% --data corpus.jsonl --tokens 20M --out runs/half",
    "run": "minitron run llama-3.1-8b-to-4b-width --set model=./Llama-3.1-8B --dry-run --gpus 64",
    "calibrate": "minitron calibrate ./my-model --data corpus.jsonl --out statistics",
    "search": "minitron search ./my-model --statistics statistics --target-params 50%% --dims layers=24-32 ffn=2x,3x",
    "prune": "minitron prune ./my-model --shape hidden=3072,ffn=9216 --data corpus.jsonl --out pruned",
    "distill": "minitron distill --teacher ./my-model --student pruned --data corpus.jsonl --tokens 20M --out student",
    "evaluate": "minitron evaluate student --teacher ./my-model --data heldout.jsonl --whole --json",
    "generate": "minitron generate student --prompt 'Once upon a time'",
    "quantize": "minitron quantize student --types Q4_K_M,IQ4_XS --calibration corpus.jsonl --out gguf",
    "speed": "minitron speed runs/half/student --teacher ./my-model --batch 1,8 --context 128,1024",
    "report": "minitron report runs/half runs/third --out comparison.html",
    "card": "minitron card runs/half",
    "push": "minitron push runs/half me/my-model-4b --private --dry-run",
}
HELP = {
    "demo": "the whole pipeline on the small teacher that ships with minitron, in minutes on two CPU cores",
    "inspect": "family, shape, exact parameters, bytes, and what can be pruned",
    "compress": "the default recipe on any model: prune, distil, measure, report",
    "run": "run a recipe; the same command again resumes it",
    "calibrate": "collect activation statistics in one streamed pass",
    "search": "every shape within the budgets, ranked",
    "prune": "cut a model to a shape, a plan or a parameter target, and repair the cut",
    "distill": "train a student on a teacher's logits; the same command again resumes it",
    "evaluate": "loss, perplexity, bits per byte, KL to a teacher on held-out text; or benchmarks",
    "generate": "continue a prompt",
    "quantize": "write GGUF files for llama.cpp, run them, and print what each costs",
    "speed": "prefill and decode tokens per second and peak memory, teacher and student in turn",
    "report": "write report.html of a finished run again, or one page that compares several runs",
    "card": "write the student's model card again",
    "push": "upload the student, its card and its GGUF files to the Hugging Face hub",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 the user's mistake, 130 interrupted; 2 is argparse's)."""
    args = build_parser().parse_args(argv)
    from minitron.parallel import ranks  # and torch with it, for which --help does not wait

    keep_freed_memory()
    signal.signal(signal.SIGTERM, _interrupt)
    _quiet_libraries()
    args.quiet |= ranks().rank > 0
    console = Console(args)
    try:
        if ranks().size > 1 and args.verb not in (_calibrate, _distill):
            raise MinitronError(
                f"torchrun started {ranks().size} processes, and this command runs in one: start it without torchrun; "
                "`minitron calibrate` and `minitron distill` are the commands that several processes share"
            )
        args.verb(args, console)
    except Interrupted as error:
        _complain(f"interrupted: {error}")
        return 130
    except KeyboardInterrupt:
        _complain("interrupted; what was finished is kept, run the same command to go on")
        return 130
    except MinitronError as error:
        _complain(f"error: {' '.join(str(error).split())}")  # a library's reason may have many lines
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        console.close()
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minitron", description="Make a smaller language model from a pretrained one."
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, verb: Callable[[argparse.Namespace, Console], None]) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=HELP[name], description=HELP[name], epilog=f"example: {EXAMPLES[name]}")
        sub.set_defaults(verb=verb)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("-q", "--quiet", action="store_true", help="no progress, only the result")
        sub.add_argument("-v", "--verbose", action="store_true", help="also the libraries' own messages")
        return sub

    demo = add("demo", _demo)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    _add_set(demo)

    inspect = add("inspect", _inspect)
    inspect.add_argument("model", metavar="MODEL", help="a local directory, a hub id, or a GGUF file")
    inspect.add_argument("--revision")

    smaller = add("compress", _compress)
    smaller.add_argument("model", metavar="MODEL", help="a local directory or a hub id")
    smaller.add_argument("--revision")
    smaller.add_argument(
        "--target-params", required=True, help="50%% of the non-embedding parameters, or a total such as 4.5B"
    )
    _add_data(smaller)
    smaller.add_argument("--tokens", type=_count, help="distillation tokens, such as 20M; default one pass")
    smaller.add_argument("--seed", type=_seed, default=0)
    smaller.add_argument("--out", type=Path, help="run directory; default runs/NAME-TARGET")
    _add_dry_run(smaller)
    _add_set(smaller)

    run = add("run", _run)
    run.add_argument("recipe", metavar="RECIPE", help="a .yaml file, or the name of a recipe that ships with minitron")
    run.add_argument("--out", type=Path, help="run directory; default runs/RECIPE")
    _add_dry_run(run)
    _add_set(run)

    calibrate = add("calibrate", _calibrate)
    calibrate.add_argument("model", metavar="MODEL")
    _add_data(calibrate)
    calibrate.add_argument("--samples", type=_count, default=1024)
    calibrate.add_argument("--block-tokens", type=_count, help="tokens per sample; default the context, at most 2048")
    calibrate.add_argument("--seed", type=_seed, default=0)
    calibrate.add_argument(
        "--second-moment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the residual stream's second moment, which repair by a residual basis needs; default yes",
    )
    calibrate.add_argument("--out", type=Path, required=True)

    search = add("search", _search)
    search.add_argument("model", metavar="MODEL")
    search.add_argument(
        "--target-params", help="most parameters: 50%% of the non-embedding ones, or a total such as 4.5B"
    )
    search.add_argument("--window", type=_positive, default=0.05, help="fewest, as a share below the most")
    search.add_argument("--least", help="fewest parameters, instead of a window")
    search.add_argument("--max-memory", type=_size, help="most bytes of weights, such as 8GB")
    search.add_argument("--bytes-per-parameter", type=_positive, help="such as 0.5625 for a 4.5-bit file")
    search.add_argument("--max-kv-cache", type=_size, help="most bytes of the key-value cache, such as 500MB")
    search.add_argument("--max-decode-time", type=_positive, help="most modelled seconds of a decoding step")
    search.add_argument("--max-prefill-time", type=_positive, help="most modelled seconds of reading the context")
    search.add_argument("--context", type=_count, default=2048, help="tokens of context for cache and times")
    search.add_argument("--batch", type=_count, default=1, help="sequences for cache and times")
    search.add_argument("--bytes-per-second", type=_size, help="memory bandwidth; default measured here")
    search.add_argument("--flops-per-second", type=_positive, help="matrix products; default measured here")
    search.add_argument(
        "--dims", nargs="+", default=[], metavar="DIM=SIZES", help="such as layers=29-32 heads=32,48 ffn=2.5x,3x"
    )
    search.add_argument(
        "--gguf-block", type=int, choices=(32, 256), help="only shapes that llama.cpp loads, in multiples of so many"
    )
    search.add_argument("--statistics", type=Path, help="directory that `minitron calibrate` wrote")
    _add_data(search)
    search.add_argument("--block-tokens", type=_count, help="tokens per block; default the context, at most 2048")
    search.add_argument(
        "--cut", type=_count, metavar="N", help="also cut the best N and measure their loss on the data"
    )
    search.add_argument("--top", type=_count, default=20, help="rows of the table; --json has all")

    prune = add("prune", _prune)
    prune.add_argument("model", metavar="MODEL")
    prune.set_defaults(usage_error=prune.error)
    prune.add_argument("--target-params", help="50%% of the non-embedding parameters, or a total such as 4.5B")
    prune.add_argument("--shape", type=_sizes, help="such as hidden=3072,ffn=9216; dims not named stay")
    prune.add_argument("--layers", type=_layers, help="drop=15-30 or keep=0-14,31, numbered from 0")
    prune.add_argument(
        "--plan", type=Path, help='a plan.json, or one that lists units of some dims, such as {"layers": [0, 1, 3]}'
    )
    prune.add_argument("--criterion", help="how units are scored: activation (default), magnitude or random")
    prune.add_argument(
        "--layer-criterion", help="how layers are scored: block_influence (default), loss, contiguous or task"
    )
    prune.add_argument("--layer-task", metavar="TASK", help="for --layer-criterion task: a .jsonl file of questions")
    prune.add_argument("--iterations", type=_count, help="cut in so many steps, each on new scores; default 1")
    prune.add_argument(
        "--repair", default="auto", help="auto, none, or a list such as basis,ffn_obs,heads_obs; see docs/recipe.md"
    )
    prune.add_argument("--statistics", type=Path, help="directory that `minitron calibrate` wrote")
    _add_data(prune)
    prune.add_argument("--out", type=Path, required=True)

    distill = add("distill", _distill)
    distill.add_argument("--teacher", required=True)
    distill.add_argument("--student", required=True)
    _add_data(distill)
    distill.add_argument("--tokens", type=_count, help="such as 20M; default one pass over the text")
    distill.add_argument("--block-tokens", type=_count, help="tokens per block; default the context, at most 2048")
    distill.add_argument("--learning-rate", type=float)
    _add_set(distill, "any key of the recipe section distill, such as distill.loss=reverse_kl")
    distill.add_argument("--seed", type=_seed, default=0)
    distill.add_argument("--out", type=Path, required=True)

    evaluate = add("evaluate", _evaluate)
    evaluate.add_argument("model", metavar="MODEL", help="a local directory, a hub id, or a GGUF file")
    evaluate.add_argument("--teacher")
    _add_data(evaluate, sampled=False)
    evaluate.add_argument("--whole", action="store_true", help="measure on all of the data, not on its held-out part")
    evaluate.add_argument("--blocks", type=_count, default=512, help="blocks to measure on, at most")
    evaluate.add_argument("--block-tokens", type=_count, help="tokens per block; default the context, at most 2048")
    _add_tasks(evaluate)

    generate = add("generate", _generate)
    generate.add_argument("model", metavar="MODEL", help="a local directory, a hub id, or a GGUF file")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--new-tokens", type=_count, default=200)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--seed", type=_seed, default=0)

    quantize = add("quantize", _quantize)
    quantize.add_argument("model", metavar="MODEL")
    quantize.set_defaults(usage_error=quantize.error)
    quantize.add_argument("--types", type=_names, default=[], help="such as Q8_0,Q4_K_M,IQ4_XS, or F16 for plain files")
    quantize.add_argument(
        "--target-bpw",
        type=_numbers,
        default=[],
        metavar="BITS",
        help="also mixtures of minitron's own at so many bits per weight, such as 4.5,3.5",
    )
    quantize.add_argument(
        "--target-size",
        type=_byte_counts,
        default=[],
        metavar="SIZE",
        help="the same, for files of so many bytes: 4.5GB",
    )
    _add_data(quantize, separable=False, names=("--calibration", "--data"))
    quantize.add_argument("--imatrix", type=Path, help="an importance matrix to use, of minitron's or llama.cpp's")
    quantize.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="PATTERN=TYPE",
        help="type of the tensors whose GGUF name has the pattern, such as output=Q8_0",
    )
    quantize.add_argument("--pre", help="llama.cpp's name of the tokenizer's splitting rule, where it is not known")
    quantize.add_argument("--samples", type=_count, default=256, help="calibration blocks")
    quantize.add_argument("--blocks", type=_count, default=32, help="held-out blocks each file is measured on")
    quantize.add_argument("--block-tokens", type=_count, help="tokens per block; default the context, at most 512")
    quantize.add_argument("--threads", type=_count, help="default all cores")
    quantize.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run each file in llama.cpp and hold it against the model; default yes",
    )
    quantize.add_argument("--dry-run", action="store_true", help="print the sizes, and write nothing")
    quantize.add_argument("--out", type=Path, help="directory of the files; needed but with --dry-run")

    speed = add("speed", _speed)
    speed.add_argument("model", metavar="MODEL", help="a local directory, a hub id, or a GGUF file")
    speed.add_argument("--teacher", help="measured in turn with MODEL: of the same kind")
    speed.add_argument(
        "--engine", choices=("transformers", "llama.cpp", "vllm"), help="default llama.cpp for GGUF, else transformers"
    )
    speed.add_argument("--batch", type=_counts, default=[1, 8], metavar="N,N", help="sequences at a time; default 1,8")
    speed.add_argument("--context", type=_counts, metavar="N,N", help="tokens read; default those of 128,1024 that fit")
    speed.add_argument("--new-tokens", type=_count, default=32, help="tokens decoded after them")
    speed.add_argument("--rounds", type=_count, default=5, help="each visits every model; one more warms up")
    speed.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the weights; default as stored"
    )
    speed.add_argument("--threads", type=_count, help="of the CPU; default as many as torch takes")

    report = add("report", _report)
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="several: one page that compares them")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="default report.html in RUN; of several, comparison.html here"
    )
    add("card", _card).add_argument("run", type=Path, metavar="RUN")

    push = add("push", _push)
    push.add_argument("run", type=Path, metavar="RUN")
    push.add_argument("repo", metavar="REPO", help="a name on the hub, such as me/my-model-4b; made if it is not there")
    push.add_argument("--private", action="store_true", help="seen by nobody else, where REPO is made")
    push.add_argument("--dry-run", action="store_true", help="print what would go, and send nothing")
    return parser


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of returning them to the system.

    Training on a CPU allocates the same activations at every step; without this each step pays for them again in page
    faults, and takes up to twice as long. Blocks above 256 MB are still returned, and so does nothing else care.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # not glibc: nothing to tune
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 256 << 20)
    libc.mallopt(trim_threshold, 2**31 - 1)


def _demo(args: argparse.Namespace, console: Console) -> None:
    from minitron.demo import demo_recipe
    from minitron.run import run

    console.note("The demo teacher writes Python; half of it is cut away and the rest is taught again.")
    _show_run(run(demo_recipe(args.set), args.out, console), console)


def _inspect(args: argparse.Namespace, console: Console) -> None:
    from minitron.errors import UnsupportedArchitecture
    from minitron.model.checkpoint import resolve_model
    from minitron.publish.formats import size
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
    weights = size(facts["weight_bytes"]) if facts["weights"] else f"{size(facts['weight_bytes'])} of weights, not here"
    lines = [
        f"{args.model}: {facts['family']}, {facts['dtype']}, {weights}",
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


def _compress(args: argparse.Namespace, console: Console) -> None:
    from minitron.recipe import build_recipe

    raw: dict[str, Any] = {
        "model": args.model,
        "revision": args.revision,
        "seed": args.seed,
        "data": _data_section(args, console),
        "prune": {"target": args.target_params},
        "distill": {"tokens": args.tokens},
    }
    name = f"{Path(args.model).name}-{args.target_params.rstrip('%')}"
    _run_recipe(build_recipe(raw, args.set), args.out or Path("runs") / name, args, console)


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron.recipe import find_recipe, load_recipe

    path = find_recipe(args.recipe)
    _run_recipe(load_recipe(path, args.set), args.out or Path("runs") / path.stem, args, console)


def _run_recipe(recipe: Any, out: Path, args: argparse.Namespace, console: Console) -> None:
    from minitron.estimate import Gpus, estimate
    from minitron.run import run

    if not args.dry_run:
        return _show_run(run(recipe, out, console), console)
    facts = estimate(recipe, Gpus(args.gpus, args.gpu_teraflops, args.utilisation) if args.gpus else None)
    console.result(facts, "\n".join(_estimate_lines(facts)))


def _calibrate(args: argparse.Namespace, console: Console) -> None:
    from minitron.parallel import ranks
    from minitron.prune.calibrate import CalibrateConfig
    from minitron.rooms import calibrate_model

    config = _section(CalibrateConfig, samples=args.samples, second_moment=args.second_moment)
    data = _data_config(args, console)
    statistics = calibrate_model(args.model, data, config, seed=args.seed, out=args.out, listener=console)
    if ranks().rank > 0:
        return
    facts = {"out": str(args.out), "samples": statistics.samples, "tokens": statistics.tokens}
    console.result(facts, f"statistics of {statistics.samples} samples, {statistics.tokens:,} tokens: {args.out}")


def _search(args: argparse.Namespace, console: Console) -> None:
    from minitron.prune.plan import PruneConfig
    from minitron.prune.shapes import SearchConfig
    from minitron.rooms import search_model

    pairs = [part.partition("=") for part in args.dims]
    if bad := [dim + equals + sizes for dim, equals, sizes in pairs if not sizes]:
        raise MinitronError(f"--dims {bad[0]!r}: write it as dim=sizes, such as layers=29-32")
    search = _section(
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
        dims={dim: sizes for dim, _, sizes in pairs},
        gguf_block=args.gguf_block,
        cut_candidates=args.cut or 1,
    )
    facts = search_model(
        args.model,
        prune=_section(PruneConfig, target=args.target_params),
        search=search,
        statistics_dir=args.statistics,
        data_config=None if args.statistics and not args.cut else _data_config(args, console),
        listener=console,
    )
    console.result(facts, "\n".join(_candidate_lines(facts, args.top)))


def _candidate_lines(facts: dict[str, Any], top: int) -> list[str]:
    from minitron.publish.formats import candidate_cells, candidate_columns

    found, speeds = facts["candidates"], facts["machine"]
    columns = candidate_columns(found)
    cells = [[column.heading for column in columns], [column.unit for column in columns]]
    lines = _aligned(cells + [candidate_cells(one, columns) for one in found[:top]])
    if len(found) > top:
        lines.append(f"and {len(found) - top:,} more; --top or --json shows them")
    return [
        *lines,
        "",
        f"{len(found):,} shapes fit. Cache and times are of {facts['batch']} x {facts['context_tokens']:,} tokens; "
        f"times are modelled from {speeds['bytes_per_second'] / 1e9:,.1f} GB/s and "
        f"{speeds['flops_per_second'] / 1e12:,.3g} TFLOP/s.",
    ]


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _prune(args: argparse.Namespace, console: Console) -> None:
    from minitron.prune.plan import PruneConfig
    from minitron.rooms import prune_model

    units = [name for name in ("shape", "layers", "plan") if getattr(args, name)]
    if not units and not args.target_params:
        args.usage_error("one of the arguments --target-params --shape --layers --plan is required")
    if units and args.target_params:
        args.usage_error(f"argument --{units[0]}: not allowed with argument --target-params")
    options = {
        name: getattr(args, name) for name in ("shape", "criterion", "layer_criterion", "layer_task", "iterations")
    }
    options |= {"target": args.target_params, **(args.layers or {})}
    plan, facts = prune_model(
        args.model,
        config=_section(PruneConfig, **{name: value for name, value in options.items() if value is not None}),
        repair=_repair_section(args.repair),
        plan_file=args.plan,
        statistics_dir=args.statistics,
        data_config=lambda: _data_config(args, console),
        out=args.out,
        listener=console,
    )
    text = f"{plan}\n{facts['parameters']['non_embedding']:,} non-embedding parameters: {args.out}"
    console.result({"out": str(args.out), "plan": str(plan)} | facts, text)


def _distill(args: argparse.Namespace, console: Console) -> None:
    from minitron.distill.settings import DistillConfig
    from minitron.recipe import build_distill
    from minitron.rooms import distill_models

    given = _section(DistillConfig, tokens=args.tokens, learning_rate=args.learning_rate)
    config = build_distill(given.model_dump(exclude_unset=True, exclude_none=True), args.set)
    data = _data_config(args, console)
    facts = distill_models(args.teacher, args.student, data, config, seed=args.seed, out=args.out, listener=console)
    if not facts:
        return  # the first of several processes speaks
    text = f"student after {facts['training']['tokens']:,} tokens: {args.out}"
    console.result(facts, text + (f"\ncorrected teacher: {facts['corrected']}" if "corrected" in facts else ""))


def _evaluate(args: argparse.Namespace, console: Console) -> None:
    with_tasks = bool(args.tasks or args.suite or args.tasks_dir)
    facts: dict[str, Any] = {}
    if not with_tasks and (option := _stray_option(args)):
        raise MinitronError(f"{option} is of benchmarks, and none is named: give --tasks, --suite or --tasks-dir")
    if with_tasks:
        facts = _benchmarks(args, console)
    if not with_tasks or args.data is not None:
        facts = _quality(args, console) | facts
    lines = [
        f"{name:<16}{value:>14,.4f}" if isinstance(value, float) else f"{name:<16}{value:>14,}"
        for name, value in facts.items()
        if isinstance(value, float | int)
    ]
    console.result(facts, "\n".join(lines + (_benchmark_lines(facts) if with_tasks else [])))


def _quality(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from minitron.rooms import evaluate_model

    data = _data_config(args, console)
    options: dict[str, Any] = {"blocks": args.blocks, "whole": args.whole, "listener": console}
    if _is_gguf(args.model):
        from minitron.gguf_rooms import evaluate_gguf

        return evaluate_gguf(Path(args.model), args.teacher, data, **options)
    return evaluate_model(args.model, args.teacher, data, **options)


def _stray_option(args: argparse.Namespace) -> str | None:
    """An option of benchmarks that has been given."""
    given = {name: getattr(args, name) for name in ("limit", "shots", "allow_code", "chat", "streamed", "batch")}
    found = next((name for name, value in given.items() if value not in (None, False)), None)
    return found and f"--{found.replace('_', '-')}"


def _benchmarks(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from minitron.evaluate.tasks import TaskOptions, cache_directory
    from minitron.rooms import benchmark_models

    for model in (args.model, args.teacher):
        if model is not None and model.endswith(".gguf"):
            raise MinitronError(
                f"{model}: benchmarks are measured on checkpoints, not on GGUF files; measure the checkpoint, and what "
                "the file loses against it with `minitron evaluate FILE --teacher CHECKPOINT --data D`"
            )
    names = ("limit", "shots", "allow_code", "chat", "streamed", "batch")
    options = TaskOptions(**{name: getattr(args, name) for name in names})
    cache = cache_directory() if args.cache else None
    tasks = [*([args.suite] if args.suite else []), *args.tasks]
    return benchmark_models(args.model, args.teacher, tasks, args.tasks_dir, options, cache=cache, listener=console)


def _benchmark_lines(facts: dict[str, Any]) -> list[str]:
    from minitron.publish.formats import BENCHMARK_NOTE, percent, score, shown

    teacher = facts.get("teacher_tasks", {})
    cells = [["benchmark", "metric", "shots", "items", *(["teacher"] if teacher else []), "model"]]
    cells[0] += ["kept"] if teacher else []
    for name, row in facts["tasks"].items():
        own = [name, row["metric"], str(row["shots"]), f"{row['n']:,}"]
        pair = [score(teacher[name])] if teacher else []
        cells.append([*own, *pair, score(row), *([shown(facts["kept"][name], percent)] if teacher else [])])
    return [*_aligned(cells), "", BENCHMARK_NOTE]


def _generate(args: argparse.Namespace, console: Console) -> None:
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
    if not model.endswith(".gguf"):
        return False
    from minitron.publish.ladder import require_installed

    if not Path(model).is_file():
        raise MinitronError(f"{model} does not exist")
    require_installed()
    return True


def _inspect_gguf(args: argparse.Namespace, console: Console) -> None:
    from minitron.gguf_rooms import inspect_gguf
    from minitron.publish.formats import share, size

    facts = inspect_gguf(Path(args.model))
    total = facts["parameters"]["total"]
    lines = [
        f"{args.model}: {facts['family']}, {size(facts['bytes'])}, {facts['bits_per_weight']:.2f} bits per weight",
        "",
        *(f"  {dim:<14}{number:>16,}" for dim, number in facts["shape"].items() if number is not None),
        "",
        f"  {'weights':<14}{total:>16,}",
        *(f"  {kind:<14}{count:>16,}  {share(count / total)}" for kind, count in facts["types"].items()),
    ]
    console.result(facts, "\n".join(lines))


def _quantize(args: argparse.Namespace, console: Console) -> None:
    own = bool(args.target_bpw or args.target_size)
    if not args.types and not own:
        args.usage_error("one of the arguments --types --target-bpw --target-size is required")
    if args.out is None and not args.dry_run:
        args.usage_error("the following arguments are required: --out")
    from minitron.publish.ladder import QuantizeConfig, require_installed

    require_installed()
    from minitron.gguf_rooms import plan_quantized, quantize_model

    config = _section(
        QuantizeConfig,
        types=args.types,
        bits_per_weight=args.target_bpw,
        sizes=args.target_size,
        tensor_types=dict(_pair("--tensor-type", text) for text in args.tensor_type),
        samples=args.samples,
        blocks=args.blocks,
        verify=args.verify,
        pre=args.pre,
        threads=args.threads,
    )
    with_text = args.data is not None or args.verify or own
    if args.dry_run:
        planned = plan_quantized(args.model, config, informed=with_text or args.imatrix is not None)
        return console.result(planned, "\n".join(_planned_lines(planned)))
    data = _data_config(args, console) if with_text else None
    table = quantize_model(args.model, config, data, importance_file=args.imatrix, out=args.out, listener=console)
    console.result(table | {"out": str(args.out)}, "\n".join([*_ladder_lines(table), f"in {args.out}"]))


def _planned_lines(planned: list[dict[str, Any]]) -> list[str]:
    from minitron.publish.formats import size

    cells = [["type", "size", "bits/weight", "falls back"]]
    for row in planned:
        kinds = [f"{was} -> {now}" for was, now in row["fallbacks"].values()]
        fallen = ", ".join(f"{kinds.count(kind)} matrices {kind}" for kind in dict.fromkeys(kinds))
        cells.append([row["name"], size(row["bytes"]), f"{row['bits_per_weight']:.2f}", fallen or "-"])
    return _aligned(cells)


def _ladder_lines(table: dict[str, Any]) -> list[str]:
    from minitron.publish.formats import percent, perplexity, size

    cells = [["type", "size", "bits/weight", "imatrix", "perplexity", "KL", "top-1", "other way"]]
    for row in table["files"]:
        seen = row["measured"]
        measured = [perplexity(seen["perplexity"]), f"{seen['kl']:.5f}", percent(seen["top1"])] if seen else ["-"] * 3
        other = "-" if row["kl_of_other"] is None else f"{row['kl_of_other']:.5f}"
        own = [row["name"], size(row["bytes"]), f"{row['bits_per_weight']:.2f}", "yes" if row["informed"] else "no"]
        cells.append([*own, *measured, other])
    return _aligned(cells)


def _speed(args: argparse.Namespace, console: Console) -> None:
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
    console.result(facts, "\n".join(_speed_lines(facts)))


def _speed_lines(facts: dict[str, Any]) -> list[str]:
    from minitron.publish.formats import rate, shown, size, with_range

    names = [*facts["models"], *(["ratio"] if "ratio" in facts["rows"][0] else [])]
    cells = [["batch", "context", "", "prefill, tokens/s", "decode, tokens/s", "peak memory"]]
    for row in facts["rows"]:
        for name in names:
            form, speed = ("{:.2f}".format if name == "ratio" else rate), row[name]
            rates = [with_range(speed[kind], speed[f"{kind}_range"], form) for kind in ("prefill", "decode")]
            memory = shown(speed.get("peak_memory_bytes"), size)
            cells.append([str(row["batch"]), str(row["context"]), name, *rates, memory])
    busiest = max(facts["load_average"])
    busy = f"; the load average was up to {busiest:.1f}: other work had its share" * (busiest > facts["threads"] + 0.5)
    return [
        *_aligned(cells),
        "",
        f"{facts['engine']} on {facts['device']}, CPU threads: {facts['threads']}; median of {facts['rounds']} rounds, "
        f"slowest to fastest in brackets; {facts['new_tokens']} new tokens{busy}",
    ]


def _report(args: argparse.Namespace, console: Console) -> None:
    from minitron.publish.comparison import write_comparison
    from minitron.publish.records import read_run
    from minitron.publish.report import write_report

    runs = [read_run(path) for path in args.runs]
    if len(runs) == 1:
        path = write_report(runs[0], args.out)
    else:
        path = write_comparison(runs, args.out or Path("comparison.html"))
    console.result({"report": str(path)}, str(path))


def _card(args: argparse.Namespace, console: Console) -> None:
    from minitron.publish.card import write_card
    from minitron.publish.records import read_run

    path = write_card(read_run(args.run))
    console.result({"card": str(path)}, str(path))


def _push(args: argparse.Namespace, console: Console) -> None:
    from minitron.publish.formats import size
    from minitron.publish.push import planned_uploads, push, require_repo_id
    from minitron.publish.records import read_run

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
    from minitron.publish.formats import RESULT_COLUMNS, result_cells
    from minitron.publish.records import result_table

    rows = result_table(records)
    facts = {"run": str(records.path), "report": str(records.path / "report.html"), "models": rows}
    cells = [["", *(column.heading for column in RESULT_COLUMNS)], ["", *(column.unit for column in RESULT_COLUMNS)]]
    cells += [[row["model"], *result_cells(row)] for row in rows]
    hidden = {"non_embedding_share", "bits_per_byte"}  # in the report and in --json; a terminal is narrow
    shown = [True, *(column.key not in hidden for column in RESULT_COLUMNS)]
    cells = [list(compress(row, shown)) for row in cells]
    lines = _aligned(cells)
    tokens = records.evaluations["teacher"]["tokens"]
    notes = [
        "",
        f"Measured on {tokens:,} tokens of held-out text.",
        f"student: {records.path / 'student'}",
        f"report:  {records.path / 'report.html'}",
    ]
    console.result(facts, "\n".join(lines + notes))


def _estimate_lines(facts: dict[str, Any]) -> list[str]:
    from minitron.publish.formats import duration, flops, size

    lines, context, tokens = [], facts["context"], facts["distill_tokens"]
    for name in ("teacher", "student"):
        model = facts[name]
        parameters, cache = model["parameters"], model["kv_cache_bytes_per_token"]
        lines += [
            f"{name}: {model['family']}, " + " ".join(f"{dim}={number}" for dim, number in model["shape"].items()),
            f"  {parameters['total']:,} parameters, {parameters['non_embedding']:,} non-embedding",
            f"  {size(model['weight_bytes'])} of {model['dtype']} weights, "
            f"KV cache {size(cache)} a token, {size(cache * context)} at {context:,} tokens",
        ]
    forward, step = facts["teacher_forward_flops_per_token"], facts["student_step_flops_per_token"]
    if sampled := facts["sampled_tokens"]:
        lines.append(
            f"text: {sampled:,} training tokens sampled from the teacher, one by one, {flops(sampled * forward)}"
        )
    lines += [
        f"calibration: {facts['calibration_tokens']:,} tokens at most, {flops(facts['calibration_flops'])}",
        f"distillation: {f'{tokens:,} tokens' if tokens else 'one pass over the text'}; per token "
        f"{flops(forward)} teacher forward, {flops(step)} student step",
        f"memory while distilling: {size(facts['training_bytes'])} for weights, gradients and optimizer, "
        "and activations on top",
    ]
    if tokens:
        here = facts["here"]
        lines.append(f"all of distillation: {flops(facts['distill_flops'])}")
        if corrected := facts["correction_tokens"]:
            lines.append(
                f"correction of the teacher: {corrected:,} tokens at most, {flops(facts['correction_flops'])} more"
            )
        lines.append(
            f"on this machine: {duration(here['seconds'])} at {flops(here['flops_per_second'])}/s, an assumed "
            f"{here['utilisation']:.0%} of what a large matrix product reaches here"
        )
    if tokens and "gpus" in facts:
        gpus = facts["gpus"]
        lines.append(
            f"on {gpus['count']} GPUs: {duration(gpus['seconds'])}, "
            f"{gpus['count'] * gpus['seconds'] / 3600:,.0f} GPU hours, at an assumed {gpus['utilisation']:.0%} of "
            f"{gpus['teraflops']:g} TFLOP/s each; {size(gpus['bytes_per_gpu'])} on each, fully sharded"
        )
    return lines


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print shapes, memory and cost from config.json alone, and run nothing"
    )
    parser.add_argument("--gpus", type=_count, help="with --dry-run: also estimate for this many GPUs")
    parser.add_argument(
        "--gpu-teraflops", type=_positive, default=989.0, help="peak of each; default an H100 in bfloat16"
    )
    parser.add_argument("--utilisation", type=_positive, default=0.4, help="share of the peak reached; an assumption")


def _add_data(
    parser: argparse.ArgumentParser,
    *,
    sampled: bool = True,
    separable: bool = True,
    names: Sequence[str] = ("--data",),
) -> None:
    """What text to read.

    Args:
        sampled: whether it can be sampled from the teacher, which is MODEL where nothing else is.
        separable: whether documents can be kept apart.
    """
    others = "`teacher` (text sampled from it) or " if sampled else "or "
    parser.add_argument(
        *names, dest="data", help=f"file, directory, dataset id, {others}`builtin` (Python source text, the default)"
    )
    parser.add_argument("--text-field", default="text", help="field of .jsonl and .parquet rows")
    parser.set_defaults(separate_documents=False)
    if separable:
        parser.add_argument(
            "--separate-documents", action="store_true", help="keep the documents of a block apart; see docs/recipe.md"
        )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmarks, through lm-evaluation-harness (without --data, instead of text)")
    group.add_argument("--suite", choices=["minitron"], help="the nine benchmarks of the papers, with their shots")
    group.add_argument(
        "--tasks", type=_names, default=[], metavar="T1,T2", help="tasks of the harness or of --tasks-dir"
    )
    group.add_argument(
        "--tasks-dir", type=Path, metavar="DIR", help="local rows, one folder per task; alone, all of its tasks"
    )
    group.add_argument("--limit", type=_count, metavar="N", help="the first N items of each task")
    group.add_argument("--shots", type=_seed, metavar="N", help="examples in the prompt, instead of each task's own")
    group.add_argument("--allow-code", action="store_true", help="run code that the model writes, in a sandbox")
    group.add_argument("--chat", action="store_true", help="put prompts through the model's chat template")
    group.add_argument(
        "--streamed",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one layer in memory at a time; default where the model does not fit",
    )
    group.add_argument("--batch", type=_count, metavar="N", help="rows per forward call; default what memory takes")
    group.add_argument(
        "--cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep results, and take those that are known; default yes",
    )


def _add_set(parser: argparse.ArgumentParser, meaning: str = "change a recipe key") -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=meaning)


def _data_section(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    if args.data is None:
        console.note("no --data given: using the built-in corpus, Python source text, which may not suit this model")
    return {
        "source": args.data or "builtin",
        "text_field": args.text_field,
        "separate_documents": args.separate_documents,
    }


def _data_config(args: argparse.Namespace, console: Console) -> Any:
    from minitron.data import DataConfig

    values = _data_section(args, console) | {"block_tokens": getattr(args, "block_tokens", None)}
    return _section(DataConfig, **values)


def _repair_section(text: str) -> Any:
    from minitron.prune.repair import REPAIRS, RepairConfig

    if text == "auto":
        return RepairConfig()
    steps = [] if text == "none" else [step.strip() for step in text.split(",")]
    unknown = [step for step in steps if step not in REPAIRS]
    if unknown:
        raise MinitronError(
            f"--repair: unknown step {unknown[0]!r}{did_you_mean(unknown[0], ['auto', 'none', *REPAIRS])}"
        )
    return _section(RepairConfig, steps=steps)


def _section(kind: Any, **values: Any) -> Any:
    """A recipe section from command-line options of the same names."""
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise MinitronError(f"--{option}: {first['msg']} (got {first['input']!r})") from None


def _count(text: str) -> int:
    """20M -> 20_000_000, for argparse."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    scale = units.get(text[-1:].upper(), 1)
    number = text[:-1] if scale != 1 else text
    try:
        value = round(float(number.replace("_", "")) * scale)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count such as 500000, 20M or 4.5B") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1")
    return value


def _size(text: str) -> float:
    """8GB -> 8e9, for argparse; decimal, as sizes are shown."""
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    scale = units.get(text[-2:].upper(), 1.0)
    try:
        return _positive(text[:-2] if scale > 1 else text) * scale
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500000, 300MB or 8GB") from None


def _positive(text: str) -> float:
    """A number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[float]:
    return [_positive(number) for number in _names(text)]


def _counts(text: str) -> list[int]:
    return [_count(number) for number in _names(text)]


def _byte_counts(text: str) -> list[float]:
    return [_size(number) for number in _names(text)]


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")
    if not name or not equals or not value:
        raise MinitronError(f"{option} {text!r} is not PATTERN=TYPE, such as output=Q8_0")
    return name, value


def _seed(text: str) -> int:
    """An integer of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _sizes(text: str) -> dict[str, int]:
    """hidden=3072,ffn=9216 -> dict, for argparse."""
    try:
        return {name.strip(): int(number) for name, number in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as hidden=3072,ffn=9216") from None


def _layers(text: str) -> dict[str, str]:
    """drop=15-30 or keep=0-14,31 -> the recipe key and its value, for argparse."""
    kind, _, listed = text.partition("=")
    if kind.strip() not in ("drop", "keep") or not listed:
        raise argparse.ArgumentTypeError(f"{text!r} is neither drop=15-30 nor keep=0-14,31 or the like")
    return {f"{kind.strip()}_layers": listed}


def _complain(text: str) -> None:
    """On stderr. What ends one process ends them all, so the first speaks for them, unless it could not be told."""
    from minitron import parallel

    rank = parallel.ranks().rank
    if rank == 0 or parallel.is_computing():
        print(text if rank == 0 else f"process {rank}: {text}", file=sys.stderr)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _quiet_libraries() -> None:
    if "-v" in sys.argv or "--verbose" in sys.argv:
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _version() -> str:
    from importlib.metadata import version

    return f"minitron {version('minitron')}"


if __name__ == "__main__":
    sys.exit(main())
