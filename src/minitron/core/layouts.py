"""The base types of JSON files; the layouts.py of each package has the types of the files that it writes.

Keys that older versions did not write have a default; keys that nothing reads have no field.
"""

import math
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _positive_or_unknown(value: float) -> float:
    if not (value > 0 or math.isnan(value)):
        raise ValueError("must be above 0")
    return value


# Numbers beyond these limits are no counts or measurements.
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
Finite = Annotated[float, Field(ge=-1e30, le=1e30)]
Unbounded = Annotated[float, Field(ge=-1e30)]  # infinite for a layer that always stays
Amount = Annotated[float, Field(ge=0, le=1e30)]
Rate = Annotated[float, AfterValidator(_positive_or_unknown)]  # nan where every round was disturbed
FileName = Annotated[str, Field(pattern=r"^[^/\x00]*[^/\x00.][^/\x00]*$")]


class Layout(BaseModel):
    """An object of a JSON file."""

    model_config = ConfigDict(strict=True)


class Sizes(Layout, extra="forbid"):
    layers: Positive
    hidden: Positive
    ffn: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    vocab: Positive


class Parts(Layout):
    total: Positive
    non_embedding: Positive
    embedding: Count
    attention: Count
    mlp: Count
    norm: Count
