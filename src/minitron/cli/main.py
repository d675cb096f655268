"""The command line: its commands and their options, and how it starts and ends."""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from minitron.cli import options, verbs
from minitron.cli.console import Console, complain, flush_result, open_streams
from minitron.cli.rules import given_options, require_options
from minitron.core.errors import Interrupted, MinitronError

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

# In what torch says where it gets no memory.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 the user's mistake or the machine's, 130 interrupted; 2 is
    argparse's)."""
    open_streams()
    words = sys.argv[1:] if argv is None else list(argv)
    _at_signals(_interrupt)
    try:
        _run(_parsed(words), words)
        if argv is None:
            _at_signals(signal.SIG_IGN)  # all is done, and there is nothing to put in order while Python ends
    except Interrupted as error:
        return _interrupted(f"interrupted: {error}")
    except KeyboardInterrupt:
        return _interrupted("interrupted; what was finished is kept, run the same command to go on")
    except MinitronError as error:
        _complain(f"error: {' '.join(str(error).split())}")  # a library's reason may have many lines
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        reason = _of_the_machine(error)
        if reason is None:
            raise
        _complain(f"error: {' '.join(reason.split())}")
        return 1
    return 0


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    try:
        return build_parser().parse_args(words)
    except SystemExit:
        flush_result()  # of --help: here, where an error can be told
        raise


def _run(args: argparse.Namespace, words: list[str]) -> None:
    """
    Args:
        words: of the command line, which tell the options that are given from those that are not.
    """
    from minitron.core.parallel import ranks  # and torch with it, for which --help does not wait

    keep_freed_memory()
    if not args.verbose:
        _quiet_libraries()
    args.quiet |= ranks().rank > 0
    console = Console(args)
    try:
        if ranks().size > 1 and args.verb not in (verbs.calibrate, verbs.distill):
            raise MinitronError(
                f"torchrun started {ranks().size} processes, and this command runs in one: start it without torchrun; "
                "`minitron calibrate` and `minitron distill` are the commands that several processes share"
            )
        args.given = given_options(args.parser, args, words[words.index(args.command) + 1 :])
        require_options(args)
        args.verb(args, console)
    finally:
        console.close()


def _of_the_machine(error: Exception) -> str | None:
    """What the machine cannot do, in a line; None for an error of the program."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    text = str(error).strip().split("\n")[0]
    if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        return f"not enough memory{f' ({text})' if text else ''}: free some, or ask for less: a smaller batch or block"
    if "can't start new thread" in text:
        return f"{text}: raise the limit of processes (ulimit -u), or set OMP_NUM_THREADS to fewer"
    return None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minitron", description="Make a smaller language model from a pretrained one."
    )
    parser.add_argument("--version", action="version", version=_version())
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")

    def add(name: str, verb: Callable[[argparse.Namespace, Console], None]) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=HELP[name], description=HELP[name], epilog=f"example: {EXAMPLES[name]}")
        sub.set_defaults(verb=verb, parser=sub)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("-q", "--quiet", action="store_true", help="no progress, only the result")
        sub.add_argument("-v", "--verbose", action="store_true", help="also the libraries' own messages")
        return sub

    demo = add("demo", verbs.demo)
    demo.add_argument("--out", type=options.path, default=Path("runs/demo"))
    options.add_set(demo)

    inspect = add("inspect", verbs.inspect)
    inspect.add_argument(
        "model", type=options.named, metavar="MODEL", help="a local directory, a hub id, or a GGUF file"
    )
    inspect.add_argument("--revision")

    smaller = add("compress", verbs.compress)
    smaller.add_argument("model", type=options.named, metavar="MODEL", help="a local directory or a hub id")
    smaller.add_argument("--revision")
    smaller.add_argument(
        "--target-params", required=True, help="50%% of the non-embedding parameters, or a total such as 4.5B"
    )
    options.add_data(smaller)
    smaller.add_argument("--tokens", type=options.count, help="distillation tokens, such as 20M; default one pass")
    smaller.add_argument("--seed", type=options.seed, default=0)
    smaller.add_argument("--out", type=options.path, help="run directory; default runs/NAME-TARGET")
    options.add_dry_run(smaller)
    options.add_set(smaller)

    run = add("run", verbs.run)
    run.add_argument(
        "recipe",
        type=options.named,
        metavar="RECIPE",
        help="a .yaml file, or the name of a recipe that ships with minitron",
    )
    run.add_argument("--out", type=options.path, help="run directory; default runs/RECIPE")
    options.add_dry_run(run)
    options.add_set(run)

    calibrate = add("calibrate", verbs.calibrate)
    calibrate.add_argument("model", type=options.named, metavar="MODEL")
    options.add_data(calibrate)
    calibrate.add_argument("--samples", type=options.count, default=1024)
    calibrate.add_argument(
        "--block-tokens", type=options.count, help="tokens per sample; default the context, at most 2048"
    )
    calibrate.add_argument("--seed", type=options.seed, default=0)
    calibrate.add_argument(
        "--second-moment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the residual stream's second moment, which repair by a residual basis needs; default yes",
    )
    calibrate.add_argument("--out", type=options.path, required=True)

    search = add("search", verbs.search)
    search.add_argument("model", type=options.named, metavar="MODEL")
    search.add_argument(
        "--target-params", help="most parameters: 50%% of the non-embedding ones, or a total such as 4.5B"
    )
    search.add_argument("--window", type=options.positive, default=0.05, help="fewest, as a share below the most")
    search.add_argument("--least", help="fewest parameters, instead of a window")
    search.add_argument("--max-memory", type=options.size, help="most bytes of weights, such as 8GB")
    search.add_argument("--bytes-per-parameter", type=options.positive, help="such as 0.5625 for a 4.5-bit file")
    search.add_argument("--max-kv-cache", type=options.size, help="most bytes of the key-value cache, such as 500MB")
    search.add_argument("--max-decode-time", type=options.positive, help="most modelled seconds of a decoding step")
    search.add_argument(
        "--max-prefill-time", type=options.positive, help="most modelled seconds of reading the context"
    )
    search.add_argument("--context", type=options.count, default=2048, help="tokens of context for cache and times")
    search.add_argument("--batch", type=options.count, default=1, help="sequences for cache and times")
    search.add_argument("--bytes-per-second", type=options.size, help="memory bandwidth; default measured here")
    search.add_argument("--flops-per-second", type=options.positive, help="matrix products; default measured here")
    search.add_argument(
        "--dims", nargs="+", default=[], metavar="DIM=SIZES", help="such as layers=29-32 heads=32,48 ffn=2.5x,3x"
    )
    search.add_argument(
        "--gguf-block", type=int, choices=(32, 256), help="only shapes that llama.cpp loads, in multiples of so many"
    )
    search.add_argument("--statistics", type=options.path, help="directory that `minitron calibrate` wrote")
    options.add_data(search)
    search.add_argument(
        "--block-tokens", type=options.count, help="tokens per block; default the context, at most 2048"
    )
    search.add_argument(
        "--cut", type=options.count, metavar="N", help="also cut the best N and measure their loss on the data"
    )
    search.add_argument("--top", type=options.count, default=20, help="rows of the table; --json has all")

    prune = add("prune", verbs.prune)
    prune.add_argument("model", type=options.named, metavar="MODEL")
    prune.add_argument("--target-params", help="50%% of the non-embedding parameters, or a total such as 4.5B")
    prune.add_argument("--shape", type=options.sizes, help="such as hidden=3072,ffn=9216; dims not named stay")
    prune.add_argument("--layers", type=options.layers, help="drop=15-30 or keep=0-14,31, numbered from 0")
    prune.add_argument(
        "--plan",
        type=options.path,
        help='a plan.json, or one that lists units of some dims, such as {"layers": [0, 1, 3]}',
    )
    prune.add_argument("--criterion", help="how units are scored: activation (default), magnitude or random")
    prune.add_argument(
        "--layer-criterion", help="how layers are scored: block_influence (default), loss, contiguous or task"
    )
    prune.add_argument(
        "--layer-task",
        type=options.named,
        metavar="TASK",
        help="for --layer-criterion task: a .jsonl file of questions",
    )
    prune.add_argument("--iterations", type=options.count, help="cut in so many steps, each on new scores; default 1")
    prune.add_argument(
        "--repair",
        default="auto",
        help="auto, none, or a list such as basis,ffn_obs,heads_obs; see docs/reference/recipe.md",
    )
    prune.add_argument("--statistics", type=options.path, help="directory that `minitron calibrate` wrote")
    options.add_data(prune)
    prune.add_argument(
        "--samples", type=options.count, default=1024, help="blocks of text for statistics and repair; default 1024"
    )
    prune.add_argument("--out", type=options.path, required=True)

    distill = add("distill", verbs.distill)
    distill.add_argument("--teacher", type=options.named, required=True)
    distill.add_argument("--student", type=options.named, required=True)
    options.add_data(distill)
    distill.add_argument("--tokens", type=options.count, help="such as 20M; default one pass over the text")
    distill.add_argument(
        "--block-tokens", type=options.count, help="tokens per block; default the context, at most 2048"
    )
    distill.add_argument("--learning-rate", type=float)
    options.add_set(distill, "any key of the recipe section distill, such as distill.loss=reverse_kl")
    distill.add_argument("--seed", type=options.seed, default=0)
    distill.add_argument("--out", type=options.path, required=True)

    evaluate = add("evaluate", verbs.evaluate)
    evaluate.add_argument(
        "model", type=options.named, metavar="MODEL", help="a local directory, a hub id, or a GGUF file"
    )
    evaluate.add_argument("--teacher", type=options.named)
    options.add_data(evaluate, sampled=False)
    evaluate.add_argument("--whole", action="store_true", help="measure on all of the data, not on its held-out part")
    evaluate.add_argument("--blocks", type=options.count, default=512, help="blocks to measure on, at most")
    evaluate.add_argument(
        "--block-tokens", type=options.count, help="tokens per block; default the context, at most 2048"
    )
    options.add_tasks(evaluate)

    generate = add("generate", verbs.generate)
    generate.add_argument(
        "model", type=options.named, metavar="MODEL", help="a local directory, a hub id, or a GGUF file"
    )
    generate.add_argument("--prompt", type=options.words, required=True)
    generate.add_argument(
        "--new-tokens", type=options.count, help="default 200, or as many as the model's context has room for"
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--seed", type=options.seed, default=0)

    quantize = add("quantize", verbs.quantize)
    quantize.add_argument("model", type=options.named, metavar="MODEL")
    quantize.add_argument(
        "--types", type=options.names, default=[], help="such as Q8_0,Q4_K_M,IQ4_XS, or F16 for plain files"
    )
    quantize.add_argument(
        "--target-bpw",
        type=options.numbers,
        default=[],
        metavar="BITS",
        help="also mixtures of minitron's own at so many bits per weight, such as 4.5,3.5",
    )
    quantize.add_argument(
        "--target-size",
        type=options.byte_counts,
        default=[],
        metavar="SIZE",
        help="the same, for files of so many bytes: 4.5GB",
    )
    options.add_data(quantize, separable=False, names=("--calibration", "--data"))
    quantize.add_argument(
        "--imatrix", type=options.path, help="an importance matrix to use, of minitron's or llama.cpp's"
    )
    quantize.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="PATTERN=TYPE",
        help="type of the tensors whose GGUF name has the pattern, such as output=Q8_0",
    )
    quantize.add_argument("--pre", help="llama.cpp's name of the tokenizer's splitting rule, where it is not known")
    quantize.add_argument("--samples", type=options.count, default=256, help="calibration blocks")
    quantize.add_argument("--blocks", type=options.count, default=32, help="held-out blocks each file is measured on")
    quantize.add_argument(
        "--block-tokens", type=options.count, help="tokens per block; default the context, at most 512"
    )
    quantize.add_argument("--threads", type=options.count, help="default all cores")
    quantize.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run each file in llama.cpp and hold it against the model; default yes",
    )
    quantize.add_argument("--dry-run", action="store_true", help="print the sizes, and write nothing")
    quantize.add_argument("--out", type=options.path, help="directory of the files; needed but with --dry-run")

    speed = add("speed", verbs.speed)
    speed.add_argument("model", type=options.named, metavar="MODEL", help="a local directory, a hub id, or a GGUF file")
    speed.add_argument("--teacher", type=options.named, help="measured in turn with MODEL: of the same kind")
    speed.add_argument(
        "--engine", choices=("transformers", "llama.cpp", "vllm"), help="default llama.cpp for GGUF, else transformers"
    )
    speed.add_argument(
        "--batch", type=options.counts, default=[1, 8], metavar="N,N", help="sequences at a time; default 1,8"
    )
    speed.add_argument(
        "--context", type=options.counts, metavar="N,N", help="tokens read; default those of 128,1024 that fit"
    )
    speed.add_argument("--new-tokens", type=options.count, default=32, help="tokens decoded after them")
    speed.add_argument("--rounds", type=options.count, default=5, help="each visits every model; one more warms up")
    speed.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the weights; default as stored"
    )
    speed.add_argument("--threads", type=options.count, help="of the CPU; default as many as torch takes")

    report = add("report", verbs.report)
    report.add_argument(
        "runs", type=options.path, nargs="+", metavar="RUN", help="several: one page that compares them"
    )
    report.add_argument(
        "--out",
        type=options.file,
        metavar="FILE",
        help="default report.html in RUN; of several, comparison.html here",
    )
    add("card", verbs.card).add_argument("run", type=options.path, metavar="RUN")

    push = add("push", verbs.push)
    push.add_argument("run", type=options.path, metavar="RUN")
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


def _complain(text: str) -> None:
    """On stderr. What ends one process ends them all, so the first speaks for them, unless it could not be told."""
    from minitron.core import parallel

    rank = parallel.ranks().rank
    if rank == 0 or parallel.is_alone():
        complain(text if rank == 0 else f"process {rank}: {text}")


def _interrupted(text: str) -> int:
    """Say so, for all processes: a signal goes to each of them. What it ends has been put in order; another ends it."""
    _at_signals(signal.SIG_DFL)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ["RANK"] == "0":  # torch may not be there yet
        with suppress(OSError):  # the terminal that has hung up
            print(text, file=sys.stderr, flush=True)
    return 130


def _at_signals(act: Callable[..., None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's & have it
            signal.signal(number, act)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _version() -> str:
    from importlib.metadata import version

    return f"minitron {version('minitron')}"


if __name__ == "__main__":
    sys.exit(main())
