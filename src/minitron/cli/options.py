"""Some options are shared by several commands, and some say the same as a recipe key: both are made here."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from minitron.cli import parse
from minitron.cli.console import Console

if TYPE_CHECKING:
    from minitron.data.config import DataConfig

KeyValues = dict[str, object]  # recipe keys, such as distill.tokens, and their values
Container = argparse._ActionsContainer  # a parser, or a group of its options


@dataclass(frozen=True)
class Said:
    """An option says the values of recipe keys.

    key: the recipe key whose default and help the option has.
    values: a function from the value of the option to recipe keys and their values.
    """

    key: str
    values: Callable[[Any], KeyValues]


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, only the result")
    parser.add_argument("-v", "--verbose", action="store_true", help="also the libraries' own messages")


def add_key(
    parser: Container,
    key: str,
    *flags: str,
    says: Callable[[Any], KeyValues] | None = None,
    more: str = "",
    **settings: Any,
) -> None:
    """Add an option that says the same as a recipe key, and takes its default and its help from there.

    Args:
        key: a recipe key such as distill.tokens.
        says: a function from the value of the option to recipe keys and their values; default `key` with that value.
        more: text behind the help, such as an example.
        settings: arguments of `add_argument`.
    """
    field = recipe_field(key)
    default = parser.get_default("preset").get(key, _default(field))
    settings = {"help": _help(field, default, more)} | settings
    if not settings.get("required") and flags[0].startswith("-"):
        settings = {"default": default} | settings
    action = parser.add_argument(*flags, **settings)
    parser.get_default("says")[action.dest] = Said(key, says or (lambda value: {key: value}))


def recipe_field(key: str) -> Any:
    """Find the pydantic field of a recipe key such as distill.tokens."""
    from minitron.recipe import Recipe  # and torch with it, for which `minitron --help` does not wait

    *sections, name = key.split(".")
    kind: Any = Recipe
    for section in sections:
        kind = kind.model_fields[section].annotation
    return kind.model_fields[name]


def choices(field: Any) -> tuple[Any, ...]:
    """List the values that a field may have besides null; the list is empty where the field does not name them."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def _default(field: Any) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True)


def _help(field: Any, default: Any, more: str) -> str:
    """Write the field's docstring, the values that it may have, and its default where that is a value."""
    text = " ".join((field.description or "").split())
    if listed_choices := choices(field):
        more = f"One of {', '.join(map(str, listed_choices))}. {more}"
    if default is True:
        more = f"{more} Default: yes."
    elif isinstance(default, int | float | str) and default is not False:
        more = f"{more} Default: {default}."
    text = " ".join(f"{text} {more}".split()).removesuffix(".").replace("%", "%%")
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def add_parameter(
    parser: Container, function: Callable[..., Any], flag: str, *, help: str, parameter: str = "", **settings: Any
) -> None:
    """Add an option that takes its default from a function's parameter.

    Args:
        parameter: its name; default the option's.
    """
    name = parameter or flag.removeprefix("--").replace("-", "_")
    default = signature(function).parameters[name].default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    parser.add_argument(flag, default=default, help=f"{help}; default {shown}", **settings)


def add_model(parser: argparse.ArgumentParser) -> None:
    help = "a local directory, a hub id, or a GGUF file"
    parser.add_argument("model", type=parse.named, metavar="MODEL", help=help)
    parser.get_default("says")["model"] = Said("model", lambda value: {"model": value})


def add_target(parser: argparse.ArgumentParser, **settings: Any) -> None:
    add_key(parser, "prune.target", "--target-params", metavar="SIZE", **settings)


def add_seed(parser: argparse.ArgumentParser) -> None:
    add_key(parser, "seed", "--seed", type=parse.seed, metavar="N")


def add_data(
    parser: argparse.ArgumentParser, *flags: str, sampled: bool = True, separable: bool = True, blocks: bool = True
) -> None:
    """Add the options that say what text to read.

    Args:
        flags: names of the option for the text itself; default --data.
        sampled: whether the text can be sampled from the teacher, which is MODEL where nothing else is.
        separable: whether documents can be kept apart.
        blocks: whether there is an option for the length of a block.
    """
    others = "`teacher` (text sampled from it) or " if sampled else "or "
    add_key(
        parser,
        "data.source",
        *(flags or ("--data",)),
        dest="data",
        type=parse.named,
        metavar="TEXT",
        help=f"file, directory, dataset id, {others}`builtin` (Python source text, the default)",
    )
    add_key(parser, "data.text_field", "--text-field", metavar="FIELD")
    if separable:
        add_key(parser, "data.separate_documents", "--separate-documents", action="store_true")
    if blocks:
        add_key(parser, "data.block_tokens", "--block-tokens", type=parse.count, metavar="N")


def add_set(parser: argparse.ArgumentParser, *sections: str) -> None:
    """Add --set for the keys of these sections, which the command reads; for every key where none are named."""
    meaning = f"change a key of the recipe's sections {listed(sections)}" if sections else "change a recipe key"
    parser.add_argument(
        "--set",
        type=parse.words,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"{meaning}; see docs/reference/recipe.md",
    )
    parser.set_defaults(sections=sections)


def listed(names: Sequence[str]) -> str:
    """Join names as a sentence does: a, b and c."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def data_config(args: argparse.Namespace, console: Console) -> "DataConfig":
    """Return the section `data`, after a note where nobody has said what text to read."""
    asked: DataConfig = args.asked.data
    if not names_text(args):
        console.note("no --data given: using the built-in corpus, Python source text, which may not suit this model")
    return asked


def names_text(args: argparse.Namespace) -> bool:
    """Tell whether the user says what text to read."""
    return "data" in args.given or any(text.startswith(("data=", "data.source=")) for text in args.set)
