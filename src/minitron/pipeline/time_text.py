"""The beginning of a run's text is read and tokenized, which tells how long all of it is and takes."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minitron.core.files import scratch_directory
from minitron.core.progress import Pace, Silent
from minitron.data.config import DataConfig
from minitron.data.sources import TEACHER, Document, find_source
from minitron.data.writing import hold_out_none, prepare, read_documents
from minitron.model.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from minitron.model.weight_files import has_weights

# Tokenized first, and then as much as that says to take so long, within bounds: a tokenizer becomes several times as
# fast once it has met the common words.
FEW_CHARS = 100_000
PROBE_SECONDS = 2.0
LEAST_CHARS, MOST_CHARS = 400_000, 6_000_000


@dataclass(frozen=True)
class TextSize:
    """The text of a run as far as it is known before it is read; None where it is not.

    seconds: of reading and tokenizing all of it.
    """

    train_tokens: int | None
    heldout_tokens: int | None
    seconds: float | None


def measure_text(config: DataConfig, model: Checkpoint | ModelConfig, tokens: int | None) -> TextSize:
    """Tokenize the beginning of the text, and tell from the sizes of its files how much there is of it.

    Args:
        tokens: the training tokens that a text without end, or on the hub, is read for.
    """
    most = config.max_tokens or (tokens if config.source == TEACHER else None)
    files = {source: find_source(source).files for source in (config.source, config.heldout) if source}
    if config.source == TEACHER or not any(files.values()):
        beside = None if most is None else round(most * config.heldout_fraction / (1 - config.heldout_fraction))
        return TextSize(most, beside, None)
    sizes = {source: sum(file.stat().st_size for file in some) for source, some in files.items()}
    size, size_heldout = sizes[config.source], sizes[config.heldout] if config.heldout else 0
    if not has_weights(model.path):
        return TextSize(most, None, None)
    tokenizer, vocab = open_checkpoint(model.path).tokenizer, model.shape.vocab
    _, few = (_prepare_beginning(config, tokenizer, vocab, FEW_CHARS) for _ in range(2))  # the first is slower
    chars = round(few.size * PROBE_SECONDS / few.seconds)
    text = _prepare_beginning(config, tokenizer, vocab, max(LEAST_CHARS, min(chars, MOST_CHARS)))
    of_byte = text.tokens / text.size
    held = config.heldout_fraction if config.heldout is None else 0.0
    train = round(size * of_byte * (1 - held))
    used = train if most is None else min(train, most)
    heldout = round(size_heldout * of_byte) if size_heldout else round(used * held / (1 - held))
    each = text.seconds / text.tokens if text.per_second is None else 1 / text.per_second
    return TextSize(used, heldout, text.start + text.seconds + each * max(0, used + heldout - text.tokens))


@dataclass(frozen=True)
class _Beginning:
    """The beginning of a text: its bytes and tokens, and the seconds that it took to prepare.

    start: the seconds until the first document was there: files are looked for.
    seconds: those after it.
    per_second: the tokens of all batches of documents after the first; None where there were fewer than two.
    """

    size: int
    tokens: int
    start: float
    seconds: float
    per_second: float | None


class _Batches(Silent):
    """Is told the tokens so far after each batch of documents."""

    def __init__(self) -> None:
        self.pace = Pace()

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.pace.report(done, time.perf_counter())


def _prepare_beginning(config: DataConfig, tokenizer: Any, vocab: int, most: int) -> _Beginning:
    read, batches, first = 0, _Batches(), 0.0

    def documents() -> Iterator[Document]:
        nonlocal read, first
        for document in read_documents(config.source, config):
            first = first or time.perf_counter()
            read += len(document.text.encode())
            yield document
            if read >= most:
                return

    plain = hold_out_none(config.model_copy(update={"max_tokens": None}))
    with scratch_directory() as path:
        started = time.perf_counter()
        corpus = prepare(
            plain, tokenizer, vocab=vocab, block_tokens=8, out=path, documents=documents(), listener=batches
        )
        tokens = corpus.train_tokens + corpus.heldout_tokens
        return _Beginning(read, tokens, first - started, time.perf_counter() - first, batches.pace.per_second)
