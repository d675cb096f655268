"""A prepared corpus: its blocks of tokens, and the fixed order in which a training reads them.

A corpus on disk is a directory:

    train.bin, heldout.bin    one long stream of token ids each (uint16 or uint32)
    heldout_bytes.bin         the number of UTF-8 bytes behind each held-out token (uint32)
    corpus.json               written last: dtypes, block length, counts, delimiter, separator, digest

Blocks are consecutive windows of a stream; the incomplete last one is dropped.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from minitron.core.errors import DataError
from minitron.core.typed_files import read_typed
from minitron.data import layouts
from minitron.model.samples import Samples, Separator

SAMPLED = "sampled.jsonl"  # text sampled from the teacher, in a run's data directory


@dataclass(frozen=True)
class Blocks:
    """The token blocks of a split, memory-mapped. `bytes` (held-out only) counts the text bytes behind each token;
    `separator` separates documents that are kept apart."""

    tokens: np.ndarray  # [num_blocks, block_tokens]
    bytes: np.ndarray | None = None  # [num_blocks, block_tokens]
    separator: Separator | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def head(self, num_blocks: int | None) -> "Blocks":
        """The first `num_blocks` blocks; all of them if None or more than there are."""
        num_bytes = None if self.bytes is None else self.bytes[:num_blocks]
        return replace(self, tokens=self.tokens[:num_blocks], bytes=num_bytes)

    def select(self, rows: np.ndarray | slice) -> np.ndarray:
        """Token ids of the given blocks, int64 [rows, block_tokens]."""
        return self.tokens[rows].astype(np.int64)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus on disk, as its corpus.json describes it.

    separator: the separator of documents, where they are kept apart.
    bytes_dtype: the dtype of heldout_bytes.bin; uint16 in older corpora.
    shared_documents, shared_chars: the training text that was left out because the held-out text contains it:
        documents without any other text, and characters.
    bytes_digest: the digest of heldout_bytes.bin; empty in older corpora.
    """

    path: Path
    block_tokens: int
    dtype: str
    delimiter: str
    train_documents: int
    train_tokens: int
    heldout_documents: int
    heldout_tokens: int
    digest: str
    separator: Separator | None = None
    bytes_dtype: str = "uint16"
    shared_documents: int = 0
    shared_chars: int = 0
    bytes_digest: str = ""

    @property
    def train(self) -> Blocks:
        return Blocks(self._map("train.bin", self.dtype), separator=self.separator)

    @property
    def heldout(self) -> Blocks:
        return Blocks(
            self._map("heldout.bin", self.dtype), self._map("heldout_bytes.bin", self.bytes_dtype), self.separator
        )

    def facts(self) -> dict[str, object]:
        """Everything but the path, as corpus.json and the record of a stage hold it."""
        return {name: value for name, value in asdict(self).items() if name != "path"}

    def _map(self, name: str, dtype: str) -> np.ndarray:
        file = self.path / name
        stream = np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)
        num_blocks = len(stream) // self.block_tokens
        return stream[: num_blocks * self.block_tokens].reshape(num_blocks, self.block_tokens)


def open_corpus(path: Path) -> Corpus:
    """Open a corpus that `writing.prepare` wrote.

    Raises: DataError if the directory holds no corpus, or an incomplete one.
    """
    file = path / "corpus.json"
    if not file.exists():
        raise DataError(f"{path} is not a prepared corpus: it has no corpus.json")
    meta = read_typed(file, layouts.CORPUS, DataError, way_out=_again(path))
    apart = None if meta.separator is None else Separator(**vars(meta.separator))
    corpus = Corpus(path=path, **{**vars(meta), "separator": apart})
    for name, tokens, dtype in (
        ("train.bin", corpus.train_tokens, corpus.dtype),
        ("heldout.bin", corpus.heldout_tokens, corpus.dtype),
        ("heldout_bytes.bin", corpus.heldout_tokens, corpus.bytes_dtype),
    ):
        expected = tokens * np.dtype(dtype).itemsize
        found = (path / name).stat().st_size if (path / name).is_file() else 0
        if found != expected:
            raise DataError(
                f"{path / name} has {found:,} bytes, and corpus.json beside it says {expected:,}: it is damaged; "
                f"{_again(path)}"
            )
    return corpus


def require_undamaged(corpus: Corpus) -> None:
    """Raises: DataError if the tokens of a corpus, all of which are read, differ from the tokens that were written."""
    path = corpus.path
    if corpus_digest(path, corpus.block_tokens, corpus.separator) != corpus.digest:
        raise DataError(
            f"train.bin or heldout.bin in {path} are not those that corpus.json is of: damaged; {_again(path)}"
        )
    if corpus.bytes_digest and digest_content(path / "heldout_bytes.bin", salt="") != corpus.bytes_digest:
        raise DataError(
            f"{path / 'heldout_bytes.bin'} is not the one that corpus.json is of: it is damaged; {_again(path)}"
        )


def _again(path: Path) -> str:
    return f"remove {path} and run the same command to prepare the text again"


def draw_samples(corpus: Corpus, count: int, seed: int) -> Samples:
    """At most `count` training blocks: the first blocks that a training of that seed reads, in its order."""
    blocks = corpus.train
    rows = batch_rows(len(blocks), seed=seed, step=0, batch=min(count, len(blocks)))
    return Samples(torch.from_numpy(blocks.select(rows)), corpus.separator)


def batch_rows(num_blocks: int, *, seed: int, step: int, batch: int) -> np.ndarray:
    """The indices of the blocks that the training step `step` (from 0) reads, if every step reads `batch` blocks."""
    return next_rows(num_blocks, seed=seed, drawn=step * batch, count=batch)


def next_rows(num_blocks: int, *, seed: int, drawn: int, count: int) -> np.ndarray:
    """The indices of the next `count` blocks of a training after `drawn` blocks: a pure function, so to resume takes no
    state but that number.

    Each pass over the data is another permutation, drawn from (seed, pass); the blocks may belong to two passes.
    """
    positions = np.arange(drawn, drawn + count)
    rows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions // num_blocks):
        here = positions // num_blocks == epoch
        rows[here] = _order(num_blocks, seed, int(epoch))[positions[here] % num_blocks]
    return rows


@lru_cache(maxsize=2)  # of the pass that is read, and of the next: to draw one takes seconds for millions of blocks
def _order(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_blocks)
    return order.astype(np.uint32) if num_blocks < 1 << 32 else order


def corpus_digest(path: Path, block_tokens: int, apart: Separator | None) -> str:
    return digest_content(path / "train.bin", path / "heldout.bin", salt=f"{block_tokens}{apart or ''}")


def digest_content(*paths: Path, salt: str) -> str:
    digest = hashlib.sha256(salt.encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
