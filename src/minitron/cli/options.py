"""What the commands take: options they share, what an option's text means, and the config sections they make."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron.cli.console import Console
from minitron.core.errors import MinitronError, did_you_mean
from minitron.core.paths import expanded


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print shapes, memory and cost from config.json alone, and run nothing"
    )
    parser.add_argument("--gpus", type=count, help="with --dry-run: also estimate for this many GPUs")
    parser.add_argument(
        "--gpu-teraflops", type=positive, default=989.0, help="peak of each; default an H100 in bfloat16"
    )
    parser.add_argument("--utilisation", type=positive, default=0.4, help="share of the peak reached; an assumption")


def add_data(
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
        *names,
        dest="data",
        type=named,
        help=f"file, directory, dataset id, {others}`builtin` (Python source text, the default)",
    )
    parser.add_argument("--text-field", default="text", help="field of .jsonl and .parquet rows")
    parser.set_defaults(separate_documents=False)
    if separable:
        parser.add_argument(
            "--separate-documents",
            action="store_true",
            help="keep the documents of a block apart; see docs/reference/recipe.md",
        )


def add_tasks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmarks, through lm-evaluation-harness (without --data, instead of text)")
    group.add_argument("--suite", choices=["minitron"], help="the nine benchmarks of the papers, with their shots")
    group.add_argument(
        "--tasks", type=names, default=[], metavar="T1,T2", help="tasks of the harness or of --tasks-dir"
    )
    group.add_argument(
        "--tasks-dir", type=path, metavar="DIR", help="local rows, one folder per task; alone, all of its tasks"
    )
    group.add_argument("--limit", type=count, metavar="N", help="the first N items of each task")
    group.add_argument("--shots", type=seed, metavar="N", help="examples in the prompt, instead of each task's own")
    group.add_argument("--allow-code", action="store_true", help="run code that the model writes, in a sandbox")
    group.add_argument("--chat", action="store_true", help="put prompts through the model's chat template")
    group.add_argument(
        "--streamed",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one layer in memory at a time; default where the model does not fit",
    )
    group.add_argument("--batch", type=count, metavar="N", help="rows per forward call; default what memory takes")
    group.add_argument(
        "--cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep results, and take those that are known; default yes",
    )


def add_set(parser: argparse.ArgumentParser, meaning: str = "change a recipe key") -> None:
    parser.add_argument("--set", type=words, action="append", default=[], metavar="KEY=VALUE", help=meaning)


def data_section(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    if args.data is None:
        console.note("no --data given: using the built-in corpus, Python source text, which may not suit this model")
    return {
        "source": "builtin" if args.data is None else args.data,
        "text_field": args.text_field,
        "separate_documents": args.separate_documents,
    }


def data_config(args: argparse.Namespace, console: Console) -> Any:
    from minitron.data.corpus import DataConfig

    values = data_section(args, console) | {"block_tokens": getattr(args, "block_tokens", None)}
    return section(DataConfig, **values)


def repair_section(text: str) -> Any:
    from minitron.pruning.repair.config import REPAIRS, RepairConfig

    if text == "auto":
        return RepairConfig()
    steps = [] if text == "none" else [step.strip() for step in text.split(",")]
    unknown = [step for step in steps if step not in REPAIRS]
    if unknown:
        raise MinitronError(
            f"--repair: unknown step {unknown[0]!r}{did_you_mean(unknown[0], ['auto', 'none', *REPAIRS])}"
        )
    return section(RepairConfig, steps=steps)


def section(kind: Any, **values: Any) -> Any:
    """A recipe section from command-line options of the same names."""
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise MinitronError(f"--{option}: {first['msg']} (got {first['input']!r})") from None


def count(text: str) -> int:
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


def size(text: str) -> float:
    """8GB -> 8e9, for argparse; decimal, as sizes are shown."""
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    scale = units.get(text[-2:].upper(), 1.0)
    try:
        return positive(text[:-2] if scale > 1 else text) * scale
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500000, 300MB or 8GB") from None


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def words(text: str) -> str:
    """Text of the command line as the UTF-8 that it is, whatever encoding the environment names.

    Raises: MinitronError, which argparse lets through.
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise MinitronError(f"{text!a} is not UTF-8 text: give it in UTF-8") from None


def named(text: str) -> str:
    """A path, or a name that may stand in its place such as a hub id.

    Raises: MinitronError, which argparse lets through.
    """
    return expanded(text)


def path(text: str) -> Path:
    return Path(named(text))


def file(text: str) -> Path:
    if text.endswith("/"):
        raise MinitronError(f"{text} names a directory: give a file, such as {text}report.html")
    return path(text)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str) -> list[float]:
    return [positive(number) for number in names(text)]


def counts(text: str) -> list[int]:
    return [count(number) for number in names(text)]


def byte_counts(text: str) -> list[float]:
    return [size(number) for number in names(text)]


def pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")
    if not name or not equals or not value:
        raise MinitronError(f"{option} {text!r} is not PATTERN=TYPE, such as output=Q8_0")
    return name, value


def seed(text: str) -> int:
    """An integer of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def sizes(text: str) -> dict[str, int]:
    """hidden=3072,ffn=9216 -> dict, for argparse."""
    try:
        pairs = [(name.strip(), int(number)) for name, number in (part.split("=") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as hidden=3072,ffn=9216") from None
    if len(dict(pairs)) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a size twice: give it once")
    return dict(pairs)


def layers(text: str) -> dict[str, str]:
    """drop=15-30 or keep=0-14,31 -> the recipe key and its value, for argparse."""
    kind, _, listed = text.partition("=")
    if kind.strip() not in ("drop", "keep") or not listed:
        raise argparse.ArgumentTypeError(f"{text!r} is neither drop=15-30 nor keep=0-14,31 or the like")
    return {f"{kind.strip()}_layers": listed}
