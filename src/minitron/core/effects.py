"""Rules about options and recipe keys that have no effect, and the function that refuses them."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from minitron.core.config import Section
from minitron.core.errors import NoEffect

_Facts = TypeVar("_Facts")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Rule(Generic[_Facts]):
    """The condition under which some options or recipe keys have an effect.

    names: the names of the options or keys in `require_effects`.
    has_effect: whether they have an effect, from the facts that `require_effects` is given.
    only: the condition in words, behind "has an effect only": `with --dry-run`.
    way_out: the advice besides leaving the option out: `add --dry-run`; empty if there is none.
    """

    names: tuple[str, ...]
    has_effect: Callable[[_Facts], bool]
    only: str
    way_out: str = ""


def require_effects(
    given: Collection[str], rules: Iterable[Rule[_Facts]], facts: _Facts, *, spelled: Callable[[str], str] = str
) -> None:
    """Check that every option or key that the user set has an effect.

    Args:
        given: the names that the user set.
        spelled: turns a name into the user's spelling.

    Raises: NoEffect that names the first of `given` without an effect.
    """
    for rule in rules:
        for name in rule.names:
            if name in given and not rule.has_effect(facts):
                other = f", or {rule.way_out}" if rule.way_out else ""
                raise NoEffect(f"{spelled(name)} has an effect only {rule.only}; leave it out{other}")


def changed_keys(section: Section) -> set[str]:
    """The keys of a section and of sections in it whose value is not the default, such as `search.window`.

    A key with its default value does not count: the recipe.yaml of a run contains every key.
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
    """The spelling of an option, from its name in argparse or from the recipe key that it sets."""
    return f"--{name.rpartition('.')[2].replace('_', '-')}"


def require_once(pairs: Iterable[tuple[str, _Value]], where: str) -> Mapping[str, _Value]:
    """Turn pairs of names and values into a mapping.

    Raises: NoEffect for a name that occurs twice, as one of its values would have no effect.
    """
    found: dict[str, _Value] = {}
    for name, value in pairs:
        if name in found:
            raise NoEffect(f"{where} names {name} twice, with {found[name]} and with {value}: give it once")
        found[name] = value
    return found
