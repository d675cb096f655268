"""JSON and YAML files with known keys, checked against a type as they are read, so that later code can rely on it.

The types are pydantic models in the layouts.py of each package. A value is an instance of its type, without the keys
that the type does not name.
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
    """The part of pydantic's TypeAdapter that is used here."""

    def validate_python(self, value: Any, /, *, strict: bool) -> Checked: ...


@dataclass(frozen=True)
class FileKind(Generic[Value]):
    """The kind of a file or of a line: its name, as in `it is not <name>`, and its type."""

    name: str
    type: Adapter[Value]


def read_typed(path: Path, kind: FileKind[Value], error: Kind, *, way_out: str) -> Value:
    """Read a JSON file of a kind.

    Args:
        way_out: advice to the user if the file is of no such kind.

    Raises: `error` that names the file, the key in it and its value.
    """
    try:
        return as_typed(read_json(path, error), kind, str(path), error)
    except error as problem:
        raise error(f"{problem}; {way_out}") from None


def read_typed_lines(path: Path, kind: FileKind[Value], error: Kind, *, way_out: str) -> list[Value]:
    """Read a file of JSON lines of a kind.

    Raises: `error` that names the line, the key in it and its value.
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
    """Check that a value from a file is of a kind.

    Raises: `error` that names the first key with a wrong value.
    """
    try:
        return kind.type.validate_python(value, strict=True)
    except ValidationError as problem:
        raise error(f"{where} is not {kind.name}: {_explain(problem)}") from None


def read_yaml(path: Path, loader: type[yaml.SafeLoader], error: Kind) -> Any:
    """Read a YAML file.

    Raises: `error` if the file cannot be read, or holds no YAML.
    """
    return parse_yaml(read_text(path, error), str(path), loader, error)


def parse_yaml(text: str, where: str, loader: type[yaml.SafeLoader], error: Kind) -> Any:
    """Parse YAML.

    Raises: `error` for text that is no YAML, that is nested too deeply, or that holds an impossible date or number, and
        for aliases that contain themselves or stand for more than `MOST_VALUES` values.
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
    """Count the values of a node with its aliases written out.

    Args:
        known: the counts of nodes that were visited, each counted once; 0 for nodes that are being counted.

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
    """Read every tensor of a safetensors file.

    Raises: `error` if the file cannot be read.
    """
    try:
        return load_file(path)
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror or problem}") from None
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as problem:
        raise error(f"{path} is no safetensors file, or a damaged one: {problem}") from None


def short(value: Any) -> str:
    """A value for a message, shortened to a line if it is large or nested."""
    return _SHORT.repr(value)


def key_of(location: Iterable[int | str]) -> str:
    """The key that an error of pydantic is about, such as `distill.loss`.

    In a union, pydantic adds the type that was tried, such as literal['a','b'], which is left out.
    """
    return ".".join(
        part for part in map(str, location) if not part.startswith(("literal[", "dict[", "function-plain["))
    )


def _explain(problem: ValidationError) -> str:
    first = problem.errors(include_url=False)[0]
    key = key_of(first["loc"])
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "value_error":  # from a validator in a layouts.py, which names its key
        return str(first["msg"]).removeprefix("Value error, ")
    return f"{key + ': ' if key else ''}{first['msg']} (got {short(first['input'])})"
