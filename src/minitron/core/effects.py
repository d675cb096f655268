"""Options and recipe keys that could not change anything: a rule each, and the one function that refuses them."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from minitron.core.config import Section
from minitron.core.errors import NoEffect

_Facts = TypeVar("_Facts")


@dataclass(frozen=True)
class Rule(Generic[_Facts]):
    """When some options or keys have an effect.

    names: as they are told to `require_effects`.
    has_effect: whether they do, by what is known where the rule is read.
    only: the same in words, behind "has an effect only": `with --dry-run`.
    way_out: what to do besides leaving the option out: `add --dry-run`. Empty where there is nothing else.
    """

    names: tuple[str, ...]
    has_effect: Callable[[_Facts], bool]
    only: str
    way_out: str = ""


def require_effects(
    given: Collection[str], rules: Iterable[Rule[_Facts]], facts: _Facts, *, spelled: Callable[[str], str] = str
) -> None:
    """
    Args:
        given: what the user asks for.
        spelled: a name as the user writes it.

    Raises: NoEffect that names the first of `given` that could not change anything.
    """
    for rule in rules:
        for name in rule.names:
            if name in given and not rule.has_effect(facts):
                other = f", or {rule.way_out}" if rule.way_out else ""
                raise NoEffect(f"{spelled(name)} has an effect only {rule.only}; leave it out{other}")


def changed_keys(section: Section) -> set[str]:
    """The keys of a section, and of those in it, that have another value than their default: `search.window`.

    A key that states its default asks for nothing that does not happen: the recipe.yaml of a run states every key.
    """
    found = set()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            found |= {f"{name}.{key}" for key in changed_keys(value)}
        elif field.is_required() or value != field.get_default(call_default_factory=True):
            found.add(name)
    return found


def option(name: str) -> str:
    """An option as the user writes it, by the name that argparse keeps it under, or by the recipe key that it sets."""
    return f"--{name.rpartition('.')[2].replace('_', '-')}"


def require_once(pairs: Iterable[tuple[str, Any]], where: str) -> Mapping[str, Any]:
    """The pairs as a mapping.

    Raises: NoEffect for a name that is there twice: of two values, one would not be read.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise NoEffect(f"{where} names {name} twice, with {found[name]} and with {value}: give it once")
        found[name] = value
    return found
