"""These functions find the options that were given, make a recipe of them, and refuse those without an effect.

A rule names an option as argparse keeps it, or a recipe key, which an option or `--set` may say; `data.*` stands for
every key of that section. A `--dry-run` previews the same command, so the other options may stand beside it.
"""

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from minitron.core.effects import Rule, changed_keys, option, require_effects
from minitron.core.errors import NoEffect, RecipeError, did_you_mean

Args = argparse.Namespace
Rules = tuple[Rule[Args], ...]
REPEATED = ("set", "tensor_type")  # options that may be given several times, and add up


class _Tally(argparse.Namespace):
    """A tally is a namespace that keeps all that argparse sets on it, which is the options that were given.

    argparse sets a default only where there is nothing yet.
    """

    def __init__(self, names: Iterable[str]):
        self.__dict__.update(dict.fromkeys(names), values={})

    def __setattr__(self, name: str, value: Any) -> None:
        self.values.setdefault(name, []).append(value)
        super().__setattr__(name, value)


def given_options(parser: argparse.ArgumentParser, args: Args, words: Sequence[str]) -> dict[str, list[Any]]:
    """Find the options that the words give, each with all its values; `args` has the defaults too.

    Args:
        parser: the command's own.
        words: the words behind the name of the command.
    """
    tally = _Tally(vars(args))
    parser.parse_known_args(words, tally)
    values: dict[str, list[Any]] = tally.values
    return values


def require_options(args: Args) -> None:
    """Refuse options that could not change anything; set `args.asked`, the recipe that options and --set make.

    Args:
        args: has `given`, which `given_options` finds.

    Raises: NoEffect; RecipeError for a value that a key cannot have.
    """
    for name, values in args.given.items():
        if name not in REPEATED and any(value != values[-1] for value in values):
            raise NoEffect(
                f"{option(name)} is given {len(values)} times, and only the last would be read; give it once"
                + (", with its values behind it" if isinstance(values[-1], list) else "")
            )
    if _makes_recipe(args):
        said = _said(args)
        _require_said_once(args, said)
        _require_read(args)
        args.asked = _asked(args, said)
    require_rules(args, args.rules, args)
    if args.sections:
        _require_key_effects(args)


def require_rules(args: Args, rules: Iterable[Rule[Any]], facts: Any, *, besides: Collection[str] = ()) -> None:
    """Refuse options and keys by rules.

    Args:
        facts: the argument of the rules' `has_effect`.
        besides: options and keys that are let through.

    Raises: NoEffect.
    """
    spelled = {name: text for name, text in given_names(args).items() if name not in besides}
    named = (
        replace(rule, names=tuple(name for name in spelled if any(fnmatchcase(name, one) for one in rule.names)))
        for rule in rules
    )
    require_effects(spelled, named, facts, spelled=spelled.__getitem__)


def given_names(args: Args) -> dict[str, str]:
    """Map each option and key that was given, as rules name it, to its spelling on the command line."""
    names: dict[str, str] = {}
    for dest in args.given:
        names |= dict.fromkeys(_keys(args, dest), option(dest))
    return names | {key: key for key in set_keys(args)}


def set_keys(args: Args) -> list[str]:
    """List the recipe keys to which `--set` gives another value than their default."""
    paths = [text.partition("=")[0] for text in args.set] if _makes_recipe(args) else []
    return sorted(
        key for key in (changed_keys(args.asked) if paths else ()) if any(_overlap(key, one) for one in paths)
    )


def _makes_recipe(args: Args) -> bool:
    """Tell whether options and --set together make a recipe; a recipe in a file is read by its command."""
    return bool(args.says) and args.sections is not None


def _keys(args: Args, dest: str) -> Iterable[str]:
    """List the recipe keys that an option says, or else its own name."""
    return args.says[dest].values(getattr(args, dest)) if dest in args.says else (dest,)


def _said(args: Args) -> dict[str, dict[str, object]]:
    """Map each option that says recipe keys to these keys and their values."""
    return {dest: args.says[dest].values(getattr(args, dest)) for dest in args.given if dest in args.says}


def _overlap(one: str, other: str) -> bool:
    """Tell whether two recipe keys are the same, or one holds the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _require_said_once(args: Args, said: Mapping[str, Mapping[str, Any]]) -> None:
    for dest, keys in said.items():
        for text in args.set:
            path, equals, _ = text.partition("=")
            if equals and any(_overlap(key, path) for key in keys):
                name = "MODEL" if dest == "model" else option(dest)
                raise NoEffect(f"{name} and --set {text} say the same thing, and only --set would be read: give one")


def _require_read(args: Args) -> None:
    """Refuse a `--set` of a section that the command does not read.

    Raises: RecipeError.
    """
    for text in args.set if args.sections else ():
        name = text.partition("=")[0].partition(".")[0]
        if name not in args.sections:
            raise RecipeError(
                f"--set {text!r}: `minitron {args.command}` does not read {name!r}{did_you_mean(name, args.sections)}"
            )


def _asked(args: Args, said: Mapping[str, Mapping[str, Any]]) -> Any:
    """Make the recipe that options and `--set` say, with defaults for the rest."""
    from minitron.recipe import build_asked

    values = dict(args.preset)
    spelled: dict[str, str] = {}
    for dest, keys in said.items():
        for key, value in keys.items():  # two options that list tasks add up
            before = values.get(key)
            if key in spelled and isinstance(before, list) and isinstance(value, list):
                value = [*before, *value]
            values[key] = value
            spelled[key] = option(dest)
    return build_asked(values, args.set, spelled)


def _require_key_effects(args: Args) -> None:
    """Apply the rules of a run to the keys that `--set` gives to a command that makes no run."""
    from minitron.pipeline.rules import OF_RECIPE

    keys = [key for key in set_keys(args) if not key.startswith("distill.")]  # whose rules distillation has itself
    require_effects(keys, OF_RECIPE, args.asked)


def _reads_rows(args: Args) -> bool:
    from minitron.pipeline.rules import reads_rows

    return reads_rows(args.asked.data)


def _is_on_the_hub(args: Args) -> bool:
    from minitron.pipeline.rules import is_local

    return not is_local(args.model)


ROWS: Rule[Args] = Rule(
    ("data.text_field",), _reads_rows, "where the text is .jsonl, .parquet or a dataset", "give such text with --data"
)
REVISION: Rule[Args] = Rule(("revision",), _is_on_the_hub, "with a hub id, and MODEL is here", "give a hub id")
NOT_KEPT: Rule[Args] = Rule(
    ("calibrate.second_moment",),
    lambda args: False,
    "where statistics are kept; a repair that needs the second moment collects it",
)
