"""The base of every recipe section: strict, frozen, and unknown keys are errors."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from minitron.core.paths import expanded

UserPath = Annotated[str, AfterValidator(expanded)]  # a local path, or a name that stands in its place


class Section(BaseModel):
    """One section of a recipe. Each room defines its own beside the code that reads it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)
