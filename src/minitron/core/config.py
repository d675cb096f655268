"""The base of every section of a recipe, and fields whose values are the keys of a table."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, get_args, runtime_checkable

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from minitron.core.errors import MinitronError
from minitron.core.text import either


def expanded(text: str) -> str:
    """Replace `~` and `~user` at the beginning of a path by the home directory.

    A shell does not replace them in `--out=~/x`, in quotes and in files.

    Raises: MinitronError for text that can be no path, and for an unknown home directory.
    """
    if not text:
        raise MinitronError("a path is empty: give one, such as . for the current directory")
    if "\0" in text:
        raise MinitronError(f"the path {text!r} has a NUL character, which no path has: leave it out")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise MinitronError(
            f"{text}: the home directory that {text.split('/')[0]} stands for is not known: write it out, or ./{text} "
            "for a name that begins with ~"
        )
    return path


UserPath = Annotated[str, AfterValidator(expanded)]  # a local path, or a name such as a hub id


def count_in(text: str) -> int:
    """Read 20M as 20_000_000.

    Raises: ValueError for text that is no number with or without a unit.
    """
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    scale = units.get(text[-1:].upper(), 1)
    return round(float((text[:-1] if scale != 1 else text).replace("_", "")) * scale)


def size_in(text: str) -> int:
    """Read 8GB as 8_000_000_000 bytes; units are decimal, as sizes are shown.

    Raises: ValueError for text that is no number with or without a unit.
    """
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    scale = units.get(text[-2:].upper(), 1)
    return round(float(text[:-2] if scale != 1 else text) * scale)


def _read_by(reader: Callable[[str], int]) -> BeforeValidator:
    """Read text that is a number with a unit, and leave everything else to the check of its type."""

    def read(value: Any) -> Any:
        try:
            return reader(value) if isinstance(value, str) and value[-1:].isalpha() else value
        except (ValueError, OverflowError):
            return value

    return BeforeValidator(read)


TokenCount = Annotated[int, _read_by(count_in)]  # may be written with a unit, such as 20M
ByteCount = Annotated[int, _read_by(size_in)]  # may be written with a unit, such as 72GB


@runtime_checkable
class WordedRow(Protocol):
    """A row of a table whose keys are the values of a field."""

    @property
    def doc(self) -> str:
        """A clause about the row for the recipe reference, without a full stop."""


@dataclass(frozen=True, eq=False)
class KeyOf:
    """The metadata of a type whose values are the keys of a table, see `choice`."""

    table: Mapping[str, WordedRow]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def check(self, value: Any) -> str:
        if isinstance(value, str) and value in self.table:
            return value
        expected = either(map(repr, self.table))
        raise PydanticCustomError("choice_error", "Input should be {expected}", {"expected": expected})

    def __str__(self) -> str:
        """Every key with the clause of its row, for the end of a field's description."""
        return "; ".join(f"`{name}`: {row.doc}" for name, row in self.table.items()) + "."


def choice(table: Mapping[str, WordedRow]) -> KeyOf:
    """Metadata that restricts `str` to the keys of a table: `Annotated[str, choice(LOSSES)]`, alone or in another type.

    The table is read when a value is checked, so rows that are added later count.
    """
    return KeyOf(table)


def choices_of(field: FieldInfo) -> list[KeyOf]:
    """The tables whose keys are values of a field, each once."""
    found: list[KeyOf] = []
    for key in _keys_in(Annotated[field.annotation, *field.metadata, None]):
        if not any(key.table is known.table for known in found):
            found.append(key)
    return found


def _keys_in(annotation: Any) -> Iterator[KeyOf]:
    for each in get_args(annotation):
        yield from [each] if isinstance(each, KeyOf) else _keys_in(each)


class Section(BaseModel):
    """A section of a recipe: frozen, strict in its types, and without unknown keys.

    If the values of a field are the keys of a table, its description ends with the clauses of the rows.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        for field in cls.model_fields.values():
            for key in choices_of(field):
                field.description = f"{field.description} {key}"
