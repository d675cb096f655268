"""Which options of a command have an effect only together with others; those that could not have one are refused.

What a `--dry-run` previews is the same command, so its other options may stand beside it.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minitron.core.effects import Rule, option, require_effects
from minitron.core.errors import NoEffect

Args = argparse.Namespace
REPEATED = ("set", "tensor_type")  # options that may be given several times, and add up
# Of each command, the options that say the same as a recipe key.
KEYS: dict[str, dict[str, str]] = {
    "compress": {
        "model": "model",
        "revision": "revision",
        "target_params": "prune.target",
        "data": "data.source",
        "text_field": "data.text_field",
        "separate_documents": "data.separate_documents",
        "tokens": "distill.tokens",
        "seed": "seed",
    },
    "distill": {"tokens": "distill.tokens", "learning_rate": "distill.learning_rate"},
}


class _Tally(argparse.Namespace):
    """Keeps what is set on it, for argparse to parse into: all that is set are options that were given.

    argparse sets a default only where there is nothing yet.
    """

    def __init__(self, names: Iterable[str]):
        self.__dict__.update(dict.fromkeys(names), values={})

    def __setattr__(self, name: str, value: Any) -> None:
        self.values.setdefault(name, []).append(value)
        super().__setattr__(name, value)


def given_options(parser: argparse.ArgumentParser, args: Args, words: Sequence[str]) -> dict[str, list[Any]]:
    """The options that the words give, with each value that they give them, where the defaults are in `args` too.

    Args:
        parser: of the command; the words are those behind its name.
    """
    tally = _Tally(vars(args))
    parser.parse_known_args(words, tally)
    values: dict[str, list[Any]] = tally.values
    return values


def require_options(args: Args) -> None:
    """Raises: NoEffect for an option of `args.given` that could not change anything."""
    for name, values in args.given.items():
        if name not in REPEATED and any(value != values[-1] for value in values):
            raise NoEffect(
                f"{option(name)} is given {len(values)} times, and only the last would be read; give it once"
                + (", with its values behind it" if isinstance(values[-1], list) else "")
            )
    _require_said_once(args)
    require_effects(args.given, RULES.get(args.command, ()), args, spelled=option)


def require_cut_options(args: Args, needs: Any) -> None:
    """The same of `minitron prune`, once it is known what the cut needs: a `CutNeeds`."""
    from minitron.pipeline.rules import OF_CHOICE

    require_effects({f"prune.{name}" for name in args.given}, OF_CHOICE, needs.choice, spelled=option)
    given = set(args.given) - ({"repair"} if args.repair in ("auto", "none") else set())
    require_effects(given, OF_CUT, needs, spelled=option)


def _require_said_once(args: Args) -> None:
    sets = {text.partition("=")[0]: text for text in getattr(args, "set", [])}
    for name, key in KEYS.get(args.command, {}).items():
        if name in args.given and key in sets:
            said = "MODEL" if name == "model" else option(name)
            raise NoEffect(f"{said} and --set {sets[key]} say the same thing, and only --set would be read: give one")


def _benchmarks(args: Args) -> bool:
    return bool(args.tasks or args.suite or args.tasks_dir)


def _measures_text(args: Args) -> bool:
    return not _benchmarks(args) or args.data is not None


def _searches_on_text(args: Args) -> bool:
    return args.statistics is None or args.cut is not None


def _quantizes_on_text(args: Args) -> bool:
    return args.data is not None or args.verify or _mixes(args)


def _mixes(args: Args) -> bool:
    return bool(args.target_bpw or args.target_size)


def _takes_importance(args: Args) -> bool:
    from minitron.gguf.config import UNINFORMED

    return _mixes(args) or any(name.upper() not in UNINFORMED for name in args.types)


def _reads_rows(args: Args) -> bool:
    """Whether the text may be rows; that which `--set` names is not known here."""
    from minitron.data.corpus import BUILTIN, DataConfig
    from minitron.pipeline.rules import reads_rows

    if any(text.startswith(("data.source=", "data.heldout=")) for text in getattr(args, "set", [])):
        return True
    return reads_rows(DataConfig(source=args.data or BUILTIN))


def _is_on_the_hub(args: Args) -> bool:
    from minitron.pipeline.rules import is_local

    return not is_local(args.model)


_ROWS: Rule[Args] = Rule(
    ("text_field",), _reads_rows, "where the text is .jsonl, .parquet or a dataset", "give such text with --data"
)
_REVISION: Rule[Args] = Rule(("revision",), _is_on_the_hub, "with a hub id, and MODEL is here", "give a hub id")
_DRY_RUN: tuple[Rule[Args], ...] = (
    Rule(("gpus",), lambda args: args.dry_run, "with --dry-run", "add --dry-run"),
    Rule(
        ("gpu_teraflops", "utilisation"),
        lambda args: args.dry_run and args.gpus is not None,
        "with --dry-run and --gpus",
        "add both",
    ),
)
RULES: Mapping[str, tuple[Rule[Args], ...]] = {
    "inspect": (_REVISION,),
    "compress": (_REVISION, _ROWS, *_DRY_RUN),
    "run": _DRY_RUN,
    "calibrate": (_ROWS,),
    "search": (
        Rule(
            ("data", "text_field", "separate_documents", "block_tokens"),
            _searches_on_text,
            "where text is read: without --statistics, or with --cut",
            "add --cut",
        ),
        _ROWS,
        Rule(
            ("window",),
            lambda args: args.target_params is not None and args.least is None,
            "with --target-params and without --least",
            "give --target-params and no --least",
        ),
        Rule(("top",), lambda args: not args.json, "without --json, which has all", "leave out --json"),
    ),
    "prune": (_ROWS,),
    "distill": (_ROWS,),
    "evaluate": (
        Rule(
            ("limit", "shots", "allow_code", "chat", "streamed", "batch", "cache"),
            _benchmarks,
            "with benchmarks",
            "give --tasks, --suite or --tasks-dir",
        ),
        Rule(
            ("whole", "blocks", "block_tokens", "text_field", "separate_documents"),
            _measures_text,
            "where text is measured, and benchmarks are alone without --data",
            "give --data",
        ),
        _ROWS,
    ),
    "generate": (
        Rule(("seed",), lambda args: args.temperature != 0, "where tokens are drawn", "give a --temperature above 0"),
    ),
    "quantize": (
        Rule(
            ("text_field", "block_tokens", "samples"),
            _quantizes_on_text,
            "where text is read",
            "give --calibration, or leave out --no-verify",
        ),
        _ROWS,
        Rule(("blocks",), lambda args: args.verify, "where files are run in llama.cpp", "leave out --no-verify"),
        Rule(
            ("samples",),
            lambda args: args.imatrix is None or _mixes(args),
            "where text is read for an importance matrix, and --imatrix is one",
            "leave out --imatrix",
        ),
        Rule(
            ("data",),
            lambda args: args.imatrix is None or args.verify or _mixes(args),
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
    ),
    "speed": (
        Rule(
            ("threads",),
            lambda args: args.engine != "vllm",
            "with transformers and llama.cpp; vLLM takes its own",
            "take another --engine",
        ),
    ),
}
# Of `minitron prune`: of what the cut needs.
OF_CUT: tuple[Rule[Any], ...] = (
    Rule(
        ("data", "text_field", "separate_documents", "samples"),
        lambda needs: needs.text,
        "where the cut reads text to score or to repair, and this one does not",
    ),
    Rule(
        ("statistics",),
        lambda needs: needs.statistics,
        "where units are scored or a repair is fitted, and this cut needs neither",
    ),
    Rule(
        ("repair",),
        lambda needs: bool(needs.choice.repairs),
        "with steps that repair what is cut, and here they do not",
        "name others",
    ),
)
