"""Files with known keys, read as a type: what a file holds is checked here, and the code behind can rely on it.

The types are pydantic's: each room's layouts.py has those of its files. A value comes back as an instance of its type,
without the keys that the type does not name.
"""

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minitron.core.reading import Kind, parse_json, read_json, read_lines, read_text

MOST_VALUES = 100_000  # of a YAML file, with its aliases written out

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


Value = TypeVar("Value")
Checked = TypeVar("Checked", covariant=True)


@runtime_checkable
class Adapter(Protocol[Checked]):
    """What is used of pydantic's TypeAdapter."""

    def validate_python(self, value: Any, /, *, strict: bool) -> Checked: ...


@dataclass(frozen=True)
class FileKind(Generic[Value]):
    """What a file or a line of it holds: in words, as in `it is not ...`, and its type."""

    name: str
    type: Adapter[Value]


def read_typed(path: Path, kind: FileKind[Value], error: Kind, *, way_out: str) -> Value:
    """The value in a JSON file, which must be of a kind.

    Args:
        way_out: what the user can do when it is not.

    Raises: `error` naming the file, the place in it and the value there.
    """
    try:
        return as_typed(read_json(path, error), kind, str(path), error)
    except error as problem:
        raise error(f"{problem}; {way_out}") from None


def read_typed_lines(path: Path, kind: FileKind[Value], error: Kind, *, way_out: str) -> list[Value]:
    """The values in a file of JSON lines, each of which must be of a kind.

    Raises: `error` naming the line, the place in it and the value there.
    """
    try:
        return [
            as_typed(parse_json(line, where, error), kind, where, error)
            for number, line in read_lines(path, error)
            for where in [f"{path}, line {number},"]
        ]
    except error as problem:
        raise error(f"{problem}; {way_out}") from None


def as_typed(value: Any, kind: FileKind[Value], where: str, error: Kind) -> Value:
    """A value out of a file, which must be of a kind.

    Raises: `error` naming the first place that is not.
    """
    try:
        return kind.type.validate_python(value, strict=True)
    except ValidationError as problem:
        raise error(f"{where} is not {kind.name}: {_explain(problem)}") from None


def read_yaml(path: Path, loader: type[yaml.SafeLoader], error: Kind) -> Any:
    """The value in a YAML file.

    Raises: `error` if the file cannot be read, or holds no YAML.
    """
    return parse_yaml(read_text(path, error), str(path), loader, error)


def parse_yaml(text: str, where: str, loader: type[yaml.SafeLoader], error: Kind) -> Any:
    """The value that a text spells in YAML.

    Raises: `error` for text that is no YAML, nested too deeply, or with a date or a number that there is not, and for
        aliases that lead back to themselves or stand for more than `MOST_VALUES` values.
    """
    try:
        reader = loader(text)
        try:
            node = reader.get_single_node()
            if node is not None:
                _count_values(node, {})
            return None if node is None else reader.construct_document(node)
        finally:
            reader.dispose()
    except (yaml.YAMLError, ValueError) as problem:
        raise error(f"{where} is not YAML: {problem}") from None
    except RecursionError:
        raise error(f"{where} is no YAML that can be read: its brackets are nested too deeply") from None


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node holds when its aliases are written out.

    Args:
        known: the counts of nodes that were seen, which is what makes this fast where they are many; 0 for those that
            are being counted.

    Raises: yaml.YAMLError.
    """
    if id(node) in known:
        if known[id(node)] == 0:
            raise yaml.YAMLError(f"the alias at line {node.start_mark.line + 1} leads back to itself")
        return known[id(node)]
    known[id(node)] = 0
    inner: Iterable[yaml.Node] = ()
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = chain.from_iterable(node.value)
    count = 1 + sum(_count_values(each, known) for each in inner)
    if count > MOST_VALUES:
        raise yaml.YAMLError(f"at line {node.start_mark.line + 1} it holds more than {MOST_VALUES:,} values")
    known[id(node)] = count
    return count


def read_tensors(path: Path, error: Kind) -> dict[str, Tensor]:
    """Every tensor of a safetensors file.

    Raises: `error` if it cannot be read.
    """
    try:
        return load_file(path)
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror or problem}") from None
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as problem:
        raise error(f"{path} is no safetensors file, or a damaged one: {problem}") from None


def short(value: Any) -> str:
    """A value in a message: not more of it than fits into a line, however large or nested it is."""
    return _SHORT.repr(value)


def place_of(location: Iterable[int | str]) -> str:
    """Where an error of pydantic is, such as `distill.loss`.

    In a union the place is followed by the type that was tried, such as literal['a','b'], which is left out.
    """
    return ".".join(
        part for part in map(str, location) if not part.startswith(("literal[", "dict[", "function-plain["))
    )


def _explain(problem: ValidationError) -> str:
    first = problem.errors(include_url=False)[0]
    place = place_of(first["loc"])
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "value_error":  # of a validator of ours, which names its place
        return str(first["msg"]).removeprefix("Value error, ")
    return f"{place + ': ' if place else ''}{first['msg']} (got {short(first['input'])})"
