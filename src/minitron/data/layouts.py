"""The types of corpus.json and of the record of a corpus, checked when they are read."""

from typing import Annotated

from pydantic import Field, TypeAdapter

from minitron.core.layouts import Count, Layout, Positive
from minitron.core.typed_files import FileKind


class Separation(Layout):
    token: Count
    leads: bool


class CorpusFacts(Layout):
    """data/corpus.json."""

    block_tokens: Positive
    dtype: Annotated[str, Field(pattern=r"^uint(16|32)$")]
    delimiter: str
    train_documents: Count
    train_tokens: Count  # none where all of the text is held out
    heldout_documents: Count
    heldout_tokens: Positive
    digest: str
    bytes_dtype: Annotated[str, Field(pattern=r"^uint(16|32)$")] = "uint16"
    bytes_digest: str = ""
    shared_documents: Count = 0
    shared_chars: Count = 0
    separator: Separation | None = None


class SampledFacts(Layout):
    """The text that was sampled from the teacher."""

    documents: Count


class Text(Layout):
    """The result of the stage data."""

    train_tokens: Count
    heldout_tokens: Count
    sampled: SampledFacts | None = None


CORPUS = FileKind("the description of a corpus", TypeAdapter(CorpusFacts))
DATA_RESULT = FileKind("that of the stage data", TypeAdapter(Text))
