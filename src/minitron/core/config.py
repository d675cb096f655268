"""The base of every recipe section: strict, frozen, and unknown keys are errors. Fields that choose from a table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, get_args, runtime_checkable

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from minitron.core.paths import expanded
from minitron.core.text import either

UserPath = Annotated[str, AfterValidator(expanded)]  # a local path, or a name that stands in its place


@runtime_checkable
class WordedRow(Protocol):
    """A row of a table that a field chooses from."""

    @property
    def doc(self) -> str:
        """The row in words, for the reference of the recipe: a clause without a full stop."""


@dataclass(frozen=True, eq=False)
class KeyOf:
    """Metadata of a type whose values are the keys of a table, see `choice`."""

    table: Mapping[str, WordedRow]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def check(self, value: Any) -> str:
        if isinstance(value, str) and value in self.table:
            return value
        expected = either(map(repr, self.table))
        raise PydanticCustomError("choice_error", "Input should be {expected}", {"expected": expected})

    def __str__(self) -> str:
        """Every key with its row's words, as the description of a field ends."""
        return "; ".join(f"`{name}`: {row.doc}" for name, row in self.table.items()) + "."


def choice(table: Mapping[str, WordedRow]) -> KeyOf:
    """Metadata that makes of `str` a choice from a table: `Annotated[str, choice(LOSSES)]`, alone or in another type.

    The table is asked when a value is checked, so a row that is added later is a value too.
    """
    return KeyOf(table)


def choices_of(field: FieldInfo) -> list[KeyOf]:
    """The tables that a field chooses from, each once."""
    found: list[KeyOf] = []
    for key in _keys_in(Annotated[field.annotation, *field.metadata, None]):
        if not any(key.table is known.table for known in found):
            found.append(key)
    return found


def _keys_in(annotation: Any) -> Iterator[KeyOf]:
    for each in get_args(annotation):
        yield from [each] if isinstance(each, KeyOf) else _keys_in(each)


class Section(BaseModel):
    """One section of a recipe. Each room defines its own beside the code that reads it.

    The description of a field that chooses from a table ends with the words of the table's rows.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        for field in cls.model_fields.values():
            for key in choices_of(field):
                field.description = f"{field.description} {key}"
