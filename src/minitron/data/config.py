"""The section data of a recipe: which text is read, and how it becomes blocks of tokens."""

from typing import Literal

from pydantic import Field

from minitron.core.config import Section, UserPath
from minitron.data.sources import BUILTIN
from minitron.data.sources import TEACHER as TEACHER
from minitron.data.sources import TEXT_SUFFIXES as TEXT_SUFFIXES
from minitron.data.sources import builtin_documents as builtin_documents
from minitron.data.sources import is_hub_id as is_hub_id
from minitron.data.sources import keyed as keyed
from minitron.data.sources import local_path as local_path


class DataConfig(Section):
    source: UserPath = BUILTIN
    """A .txt, .md, .jsonl or .parquet file, a directory of these, a Hugging Face dataset id, `builtin`: the source text
    of the running Python's standard library, without its tests; or `teacher`: text sampled from the teacher."""
    heldout: UserPath | None = None
    """A second source, held out whole; documents of `source` that stand in it are not trained on. Without one,
    `heldout_fraction` of the documents of `source` is held out."""
    text_field: str = "text"
    """Field of .jsonl and .parquet rows, and of dataset rows, that holds the text."""
    delimiter: Literal["auto", "bos", "eos", "both", "none"] = "auto"
    """Tokens around each document. `auto` is what the tokenizer adds by itself, else the end token after each, else the
    start token before each; a tokenizer that has neither gets none."""
    separate_documents: bool = False
    """Keep the documents of a block apart: attention stays within a document, positions begin anew with each, and the
    first token of one is not predicted from the last of another. They are told apart by the delimiter's tokens."""
    block_tokens: int | None = Field(default=None, ge=8)
    """Tokens in a block. Default: the model's context length, at most 2048."""
    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents held out for evaluation, chosen by a hash of each document."""
    max_document_chars: int = Field(default=16384, ge=256)
    """A longer text file is several documents: it is cut at the first blank line after this many characters."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Stop reading, or sampling, after this many training tokens. Default: read everything; of a dataset id, and of
    text sampled from the teacher, what the run needs."""
    sample_temperature: float = Field(default=1.0, gt=0)
    """Of text sampled from the teacher: its logits are divided by this."""
    sample_top_k: int | None = Field(default=None, ge=1)
    """Of text sampled from the teacher: only the so many likeliest tokens are drawn. Default: all."""
    sample_top_p: float | None = Field(default=None, gt=0, le=1)
    """Of text sampled from the teacher: only the likeliest tokens that have this probability together are drawn.
    Default: all."""
    sample_batch: int = Field(default=32, ge=1)
    """Of text sampled from the teacher: documents at a time. Another number gives other text."""
