"""The section data of a recipe: the text that is read, and the way it becomes blocks of tokens."""

from typing import Literal

from pydantic import Field

from minitron.core.config import Section, TokenCount, UserPath
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
    """A second source, all of which is held out; documents of `source` that it contains are not trained on. Without it,
    `heldout_fraction` of the documents of `source` is held out."""
    text_field: str = "text"
    """Field of .jsonl and .parquet rows, and of dataset rows, that holds the text."""
    delimiter: Literal["auto", "bos", "eos", "both", "none"] = "auto"
    """Tokens around each document. `auto` takes the tokens that the tokenizer adds by itself, else the end token after
    each document, else the start token before it, or no token if the tokenizer has neither."""
    separate_documents: bool = False
    """Keep the documents of a block apart: attention stays within a document, positions begin anew with each document,
    and its first token is not predicted from the document before. The delimiter's tokens separate documents."""
    block_tokens: TokenCount | None = Field(default=None, ge=8)
    """Tokens in a block. Default: the model's context length, at most 2048."""
    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents held out for evaluation, chosen by a hash of each document."""
    max_document_chars: int = Field(default=16384, ge=256)
    """A longer text file is several documents: it is cut at the first blank line after this many characters."""
    max_tokens: TokenCount | None = Field(default=None, ge=1)
    """Stop reading, or sampling, after this many training tokens. Default: read everything; from a dataset id, or from
    the teacher, take as many tokens as the run needs."""
    sample_temperature: float = Field(default=1.0, gt=0)
    """For text sampled from the teacher: its logits are divided by this number."""
    sample_top_k: int | None = Field(default=None, ge=1)
    """For text sampled from the teacher: only the k most likely tokens are drawn. Default: all tokens."""
    sample_top_p: float | None = Field(default=None, gt=0, le=1)
    """For text sampled from the teacher: only the most likely tokens with this total probability are drawn. Default:
    all tokens."""
    sample_batch: int = Field(default=64, ge=1)
    """For text sampled from the teacher: the number of documents at a time. Another number gives other text."""
