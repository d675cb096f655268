"""The types of candidates.json, losses.json and the record of a search, checked when they are read."""

from typing import Annotated

from pydantic import Field, TypeAdapter

from minitron.core.layouts import Amount, Count, FileName, Finite, Layout, Positive, Sizes, Unbounded
from minitron.core.typed_files import FileKind


class CandidateRecord(Layout):
    name: FileName
    shape: Sizes
    total: Positive
    non_embedding: Positive
    weight_bytes: Amount
    kv_cache_bytes: Amount
    decode_seconds: Amount
    prefill_seconds: Amount
    predicted: Unbounded
    losses: dict[Annotated[str, Field(pattern=r"^[0-9]{1,12}$")], Finite]


class Throughput(Layout):
    bytes_per_second: Amount
    flops_per_second: Amount


class Search(Layout):
    """search/candidates.json lists the candidates, best first."""

    machine: Throughput
    context_tokens: Positive
    batch: Positive
    candidates: Annotated[list[CandidateRecord], Field(min_length=1)]


class Named(Layout):
    name: FileName


class Searched(Layout):
    """The result in the record of the stage search."""

    tokens: Count
    winner: Named


SEARCH = FileKind("the result of a search", TypeAdapter(Search))
CANDIDATE_LOSSES = FileKind("losses of candidates", TypeAdapter(dict[str, dict[str, float]]))
SEARCH_RESULT = FileKind("that of the stage search", TypeAdapter(Searched))
