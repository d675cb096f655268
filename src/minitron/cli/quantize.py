"""`minitron quantize` writes GGUF files of a model, runs them and measures them."""

import argparse
from typing import TYPE_CHECKING

from minitron.cli import options, parse
from minitron.cli.command import Command
from minitron.cli.console import Console, aligned
from minitron.cli.rules import ROWS, Rules
from minitron.core.effects import Rule

if TYPE_CHECKING:
    from minitron.gguf.layouts import QuantizedModel
    from minitron.gguf.quantize import PlannedFile


def _mixes(args: argparse.Namespace) -> bool:
    return bool(args.asked.gguf.bits_per_weight or args.asked.gguf.sizes)


def _reads_text(args: argparse.Namespace) -> bool:
    return options.names_text(args) or args.asked.gguf.verify or _mixes(args)


def _takes_importance(args: argparse.Namespace) -> bool:
    from minitron.gguf.config import UNINFORMED

    return _mixes(args) or any(name not in UNINFORMED for name in args.asked.gguf.types)


_RULES: Rules = (
    Rule(
        ("data.separate_documents",),
        lambda args: False,
        "where a model is calibrated, trained or evaluated, and llama.cpp's tools see documents together",
    ),
    Rule(("data.*", "gguf.samples"), _reads_text, "where text is read", "give --calibration, or leave out --no-verify"),
    ROWS,
    Rule(
        ("gguf.blocks",),
        lambda args: args.asked.gguf.verify,
        "where files are run in llama.cpp",
        "leave out --no-verify",
    ),
    Rule(
        ("gguf.samples",),
        lambda args: args.imatrix is None or _mixes(args),
        "where text is read for an importance matrix, and --imatrix is one",
        "leave out --imatrix",
    ),
    Rule(
        ("data.source",),
        lambda args: args.imatrix is None or args.asked.gguf.verify or _mixes(args),
        "where text is read for an importance matrix, to mix types or to measure the files, and --imatrix is the "
        "matrix",
        "leave out --no-verify or --imatrix",
    ),
    Rule(
        ("imatrix",),
        _takes_importance,
        "with types that take an importance matrix, as F32, BF16, F16 and Q8_0 do not",
        "name another type",
    ),
)


def _add_options(parser: argparse.ArgumentParser) -> None:
    from minitron.gguf.config import QUANTIZE_TOKENS

    options.add_model(parser)
    _add_files(parser)
    options.add_data(parser, "--calibration", "--data", separable=False, blocks=False)
    options.add_key(
        parser,
        "data.block_tokens",
        "--block-tokens",
        type=parse.count,
        metavar="N",
        help=f"tokens in a block; default the context, at most {QUANTIZE_TOKENS}",
    )
    parser.add_argument(
        "--imatrix", type=parse.path, metavar="FILE", help="an importance matrix to use, of minitron's or llama.cpp's"
    )
    options.add_key(parser, "gguf.pre", "--pre", metavar="NAME")
    options.add_key(parser, "gguf.samples", "--samples", type=parse.count, metavar="N")
    options.add_key(parser, "gguf.blocks", "--blocks", type=parse.count, metavar="N")
    options.add_key(parser, "gguf.threads", "--threads", type=parse.count, metavar="N")
    options.add_key(parser, "gguf.verify", "--verify", action=argparse.BooleanOptionalAction)
    options.add_set(parser, "data", "gguf")
    parser.add_argument("--dry-run", action="store_true", help="print the sizes, and write nothing")
    parser.add_argument(
        "--out", type=parse.path, metavar="DIR", help="directory of the files; needed but with --dry-run"
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which files to write."""
    options.add_key(
        parser,
        "gguf.types",
        "--types",
        type=parse.names,
        metavar="T1,T2",
        help="such as Q8_0,Q4_K_M,IQ4_XS, or F16 for plain files",
    )
    options.add_key(
        parser, "gguf.bits_per_weight", "--target-bpw", type=parse.numbers, metavar="BITS", more="Such as 4.5,3.5."
    )
    options.add_key(
        parser, "gguf.sizes", "--target-size", type=parse.byte_counts, metavar="SIZE", more="Such as 4.5GB."
    )
    options.add_key(
        parser,
        "gguf.tensor_types",
        "--tensor-type",
        action="append",
        default=[],
        says=lambda texts: {"gguf.tensor_types": parse.tensor_types(texts)},
        metavar="PATTERN=TYPE",
        help="type of the tensors whose GGUF name has the pattern, such as output=Q8_0",
    )


def _run(args: argparse.Namespace, console: Console) -> None:
    from minitron import api

    config = args.asked.gguf
    if not config.wanted:
        args.parser.error("one of the arguments --types --target-bpw --target-size is required")
    if args.out is None and not args.dry_run:
        args.parser.error("the following arguments are required: --out")
    with_text = _reads_text(args)
    if args.dry_run:
        planned = api.plan_quantized(args.model, config, informed=with_text or args.imatrix is not None)
        return console.result([file.to_dict() for file in planned], "\n".join(_planned_lines(planned)))
    data = options.data_config(args, console) if with_text else None
    table = api.quantize(args.model, config, data, importance_file=args.imatrix, out=args.out, listener=console)
    console.result(table.to_dict() | {"out": str(args.out)}, "\n".join([*_file_lines(table), f"in {args.out}"]))


def _planned_lines(planned: "list[PlannedFile]") -> list[str]:
    from minitron.core.text import size

    cells = [["type", "size", "bits/weight", "falls back"]]
    for file in planned:
        kinds = [f"{was} -> {now}" for was, now in file.fallbacks.values()]
        fallen = ", ".join(f"{kinds.count(kind)} matrices {kind}" for kind in dict.fromkeys(kinds))
        cells.append([file.name, size(file.bytes), f"{file.bits_per_weight:.2f}", fallen or "-"])
    return aligned(cells)


def _file_lines(table: "QuantizedModel") -> list[str]:
    from minitron.core.text import percent, perplexity, size

    cells = [["type", "size", "bits/weight", "imatrix", "perplexity", "KL", "top-1", "other way"]]
    for file in table.files:
        seen = file.measured
        measured = [perplexity(seen.perplexity), f"{seen.kl:.5f}", percent(seen.top1)] if seen else ["-"] * 3
        other = "-" if file.kl_of_other is None else f"{file.kl_of_other:.5f}"
        own = [file.name, size(file.bytes), f"{file.bits_per_weight:.2f}", "yes" if file.informed else "no"]
        cells.append([*own, *measured, other])
    return aligned(cells)


COMMAND = Command(
    help="write GGUF files for llama.cpp, run them, and print what each costs",
    example="minitron quantize student --types Q4_K_M,IQ4_XS --calibration corpus.jsonl --out gguf",
    add_options=_add_options,
    run=_run,
    rules=_RULES,
)
