"""The types of what files hold: what all rooms have in common. Each room's layouts.py has those of its own files.

Keys that older versions did not write have a default; keys that nothing reads are left out.
"""

import math
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _positive_or_unknown(value: float) -> float:
    if not (value > 0 or math.isnan(value)):
        raise ValueError("must be above 0")
    return value


# Numbers beyond these are no counts or measurements, and would not be shown either.
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
Finite = Annotated[float, Field(ge=-1e30, le=1e30)]
Unbounded = Annotated[float, Field(ge=-1e30)]  # such as the score of a layer that stays in any case
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
