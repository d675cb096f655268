"""Write a corpus: read documents, tokenize them once, split them into training and held-out text."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minitron.core.errors import CheckpointError, DataError
from minitron.core.progress import SILENT, Listener
from minitron.data.config import DataConfig
from minitron.data.corpus import Corpus, corpus_digest, digest_content
from minitron.data.overlap import HeldOut
from minitron.data.sources import Document, find_source, read_source
from minitron.model.samples import Separator
from minitron.model.tokens import put_around, require_rows, require_within, text_ends, texts_ids

BYTES_DTYPE = "uint32"  # one token may stand for more than 65,535 bytes: a run of characters that has no token


def hold_out_all(config: DataConfig) -> DataConfig:
    """The config by which all of the source is held out and `heldout` is not read, which no recipe can ask for."""
    return config.model_copy(update={"heldout": None, "heldout_fraction": 1.0})


def hold_out_none(config: DataConfig) -> DataConfig:
    """The config by which all of the source is trained on, which no recipe can ask for."""
    return config.model_copy(update={"heldout": None, "heldout_fraction": 0.0})


def prepare(
    config: DataConfig,
    tokenizer: Any,
    *,
    vocab: int,
    block_tokens: int,
    out: Path,
    documents: Iterable[Document] | None = None,
    listener: Listener = SILENT,
) -> Corpus:
    """Read, split and tokenize `config.source` into the existing directory `out`.

    The listener is told the number of tokens so far, of a total that is not known before the end. It is warned of files
    of a directory that are not read, and of text that is not trained on because it is held out.

    Args:
        vocab: the number of rows of the model's embedding.
        documents: the documents of the source, where it cannot be read by its name.

    Raises: DataError for text that is missing, empty, binary, or shorter than one block, for training text that is all
        held out, and for a tokenizer that makes text into tokens that the model does not have.
    """
    try:
        require_rows(tokenizer, vocab)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    for source in dict.fromkeys(filter(None, (config.source, config.heldout))):
        if left_out := find_source(source).left_out:
            listener.warn(left_out)
    writer = _Writer(out, tokenizer, config.delimiter, vocab)
    apart = separator(config, tokenizer)
    with writer:
        _write(writer, config, documents or read_documents(config.source, config), listener)
    if writer.shared_chars:
        listener.warn(_shared(writer, config))
    if writer.documents["heldout"] == 0 and config.heldout_fraction > 0:
        writer.hold_out_lowest(config.source)
    _require_blocks(writer, config, block_tokens)
    corpus = Corpus(
        path=out,
        block_tokens=block_tokens,
        dtype=writer.dtype,
        delimiter=writer.delimiter,
        train_documents=writer.documents["train"],
        train_tokens=writer.tokens["train"],
        heldout_documents=writer.documents["heldout"],
        heldout_tokens=writer.tokens["heldout"],
        digest=corpus_digest(out, block_tokens, apart),
        separator=apart,
        bytes_dtype=BYTES_DTYPE,
        shared_documents=writer.shared_documents,
        shared_chars=writer.shared_chars,
        bytes_digest=digest_content(out / "heldout_bytes.bin", salt=""),
    )
    (out / "corpus.json").write_text(json.dumps(corpus.facts(), indent=2))
    return corpus


def _write(writer: "_Writer", config: DataConfig, documents: Iterable[Document], listener: Listener) -> None:
    heldout = None
    if config.heldout is not None:
        heldout = HeldOut()
        for document in read_documents(config.heldout, config):
            heldout.add(document.text)
            writer.add(document, heldout=True)
        writer.flush()
    for document in documents:
        held = heldout is None and is_heldout(document, config.heldout_fraction)
        if heldout is not None:
            document = writer.take_out(document, heldout.without(document))
        if document.text and writer.add(document, heldout=held):
            listener.progress(sum(writer.tokens.values()), 0, "tokens")
        if config.max_tokens is not None and writer.tokens["train"] >= config.max_tokens:
            break


def _shared(writer: "_Writer", config: DataConfig) -> str:
    """The warning about training text that was left out.

    Raises: DataError if no training text is left.
    """
    if writer.documents["train"] == 0:
        raise DataError(
            f"the training text {config.source!r} and the held-out text {config.heldout!r} are the same, or the one is "
            "a part of the other: nothing is left to train on; give another text as data.heldout, or none, and a part "
            "of the source is held out"
        )
    return (
        f"the held-out text {config.heldout} is also in the training text {config.source}: "
        f"{writer.shared_documents:,} documents and {writer.shared_chars:,} characters in all are not trained on"
    )


def read_documents(source: str, config: DataConfig) -> Iterator[Document]:
    """The documents of a source, in a fixed order; blank ones are skipped.

    Raises: DataError if there is no such source, or it holds no text.
    """
    return read_source(source, text_field=config.text_field, max_chars=config.max_document_chars)


def source_files(config: DataConfig) -> list[Path]:
    """The files of the sources; none for a hub dataset.

    Raises: DataError for a missing source, or a file that cannot be read.
    """
    return [file for source in filter(None, (config.source, config.heldout)) for file in find_source(source).files]


def is_heldout(document: Document, fraction: float) -> bool:
    """Whether the default split holds this document out."""
    return _fraction(document.key) < fraction


def _fraction(key: str) -> float:
    """A number in [0, 1) that depends only on the document's key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def delimiters(choice: str, tokenizer: Any) -> tuple[list[int], list[int], str]:
    """The token ids before and after each document, and the resolved choice.

    Raises: DataError for a choice with a token that the tokenizer does not have.
    """
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    there = [name for name, id in ids.items() if id is not None]
    if choice == "auto":
        before, behind = put_around(tokenizer)
        starts, ends = ids["bos"] in before[:1], ids["eos"] in behind[-1:]
        own = {(True, True): "both", (True, False): "bos"}.get((starts, ends), "eos")
        choice = own if own == "both" or own in there else (*there, "none")[0]
    for name, id in ids.items():
        if choice in (name, "both") and id is None:
            raise DataError(
                f"data.delimiter is {choice!r} but the tokenizer has no {name} token; "
                f"set it to {' or '.join([*there, 'none'])}"
            )
    prefix, suffix = (["bos"] if choice in ("bos", "both") else []), (["eos"] if choice in ("eos", "both") else [])
    return [ids[name] for name in prefix], [ids[name] for name in suffix], choice


def separator(config: DataConfig, tokenizer: Any) -> Separator | None:
    """The separator of documents, if they are to be kept apart.

    Raises: DataError if the delimiters do not separate them.
    """
    if not config.separate_documents:
        return None
    prefix, suffix, choice = delimiters(config.delimiter, tokenizer)
    if choice == "none" or prefix == suffix:
        reason = "no token stands between documents" if choice == "none" else "BOS and EOS are the same token"
        there = [name for name in ("bos", "eos") if getattr(tokenizer, f"{name}_token_id") is not None]
        choices = [*there, *(["both"] if choice == "none" and len(there) == 2 else [])]
        raise DataError(
            f"data.separate_documents tells documents apart by their delimiter, but data.delimiter is {choice!r} and "
            f"{reason}: "
            + (f"set it to one of {', '.join(choices)}" if there else "the tokenizer has none, so leave it out")
        )
    return Separator((prefix or suffix)[0], leads=bool(prefix))


class _Writer:
    """Tokenizes documents in batches, and appends each that has tokens to the stream of its split."""

    BATCH_CHARS = 1 << 20

    def __init__(self, out: Path, tokenizer: Any, delimiter: str, vocab: int):
        self.out, self.tokenizer, self.vocab = out, tokenizer, vocab
        self.prefix, self.suffix, self.delimiter = delimiters(delimiter, tokenizer)
        self.dtype = "uint16" if vocab <= 2**16 else "uint32"
        self.documents = {"train": 0, "heldout": 0}
        self.tokens = {"train": 0, "heldout": 0}
        self.shared_documents = self.shared_chars = 0
        self.pending: list[tuple[Document, bool]] = []
        self.pending_chars = 0
        # The training document with the lowest hash, and (start, length) in the stream of it and of equal documents.
        self.lowest: tuple[float, Document, list[tuple[int, int]]] | None = None

    def __enter__(self) -> "_Writer":
        self.files = {name: (self.out / f"{name}.bin").open("wb") for name in ("train", "heldout", "heldout_bytes")}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.flush()
        for file in self.files.values():
            file.close()

    def add(self, document: Document, *, heldout: bool) -> bool:
        """Add a document; returns whether a batch was full and has been tokenized."""
        self.pending.append((document, heldout))
        self.pending_chars += len(document.text)
        if self.pending_chars < self.BATCH_CHARS:
            return False
        self.flush()
        return True

    def take_out(self, document: Document, rest: str) -> Document:
        """The document with the rest of its text, after the held-out part is taken out."""
        self.shared_documents += not rest
        self.shared_chars += len(document.text) - len(rest)
        return replace(document, text=rest)

    def hold_out_lowest(self, source: str) -> None:
        """Move the training document with the lowest hash, and equal documents, to the empty held-out split."""
        if self.lowest is None or len(self.lowest[2]) == self.documents["train"]:
            raise DataError(
                f"data source {source!r} is a single document, so nothing can be held out: "
                "give held-out text as data.heldout, or split the text into several documents"
            )
        _, document, spans = self.lowest
        stream = np.fromfile(self.out / "train.bin", dtype=self.dtype)
        held = np.concatenate([np.arange(start, start + length) for start, length in spans])
        (self.out / "train.bin").write_bytes(np.delete(stream, held).tobytes())
        (self.out / "heldout.bin").write_bytes(stream[held].tobytes())
        (self.out / "heldout_bytes.bin").write_bytes(np.tile(self._bytes(document.text), len(spans)).tobytes())
        self.documents = {"train": self.documents["train"] - len(spans), "heldout": len(spans)}
        self.tokens = {"train": self.tokens["train"] - len(held), "heldout": len(held)}

    def flush(self) -> None:
        if not self.pending:
            return
        texts = [document.text for document, _ in self.pending]
        for (document, heldout), ids in zip(self.pending, texts_ids(self.tokenizer, texts), strict=True):
            if not ids:
                continue  # the tokenizer drops the text, such as spaces: a delimiter alone would be no document
            require_within(ids, self.vocab, self.tokenizer, f"the text {document.text[:40]!r}")
            self._append(document, np.array([*self.prefix, *ids, *self.suffix], dtype=self.dtype), heldout)
        self.pending, self.pending_chars = [], 0

    def _append(self, document: Document, ids: np.ndarray, heldout: bool) -> None:
        split = "heldout" if heldout else "train"
        if heldout:
            self.files["heldout_bytes"].write(self._bytes(document.text).tobytes())
        else:
            self._remember_lowest(document, len(ids))
        self.files[split].write(ids.tobytes())  # not tofile, whose error on a full disk says nothing
        self.documents[split] += 1
        self.tokens[split] += len(ids)

    def _remember_lowest(self, document: Document, length: int) -> None:
        fraction = _fraction(document.key)
        if self.lowest is None or fraction < self.lowest[0]:
            self.lowest = (fraction, document, [])
        if fraction == self.lowest[0]:
            self.lowest[2].append((self.tokens["train"], length))

    def _bytes(self, text: str) -> np.ndarray:
        """The number of UTF-8 bytes that each token of a document adds to the text; delimiters add none.

        A token adds the text between the end of the token before and its own end. So the counts sum to the length of
        the document, whatever the tokenizer does with spaces and parts of characters.
        """
        ends = np.maximum.accumulate([0, *text_ends(self.tokenizer, text)])
        ends[-1] = len(text)  # byte-level tokenizers trim spaces off their offsets
        counts = np.diff(_bytes_before(text)[ends])
        zeros = [np.zeros(len(part), dtype=BYTES_DTYPE) for part in (self.prefix, self.suffix)]
        return np.concatenate([zeros[0], counts.astype(BYTES_DTYPE), zeros[1]])


def _bytes_before(text: str) -> np.ndarray:
    """The number of UTF-8 bytes before each character of a text, and in the whole text."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(lengths)])


def _require_blocks(writer: _Writer, config: DataConfig, block_tokens: int) -> None:
    lower = "" if config.heldout else ", lower data.heldout_fraction"
    ways_out = {
        "train": f"give more text{lower}, or lower data.block_tokens",
        "heldout": "raise data.heldout_fraction, give data.heldout, or lower data.block_tokens",
    }
    if config.heldout_fraction == 1:
        ways_out = {"heldout": "give more text, or lower data.block_tokens"}
    if config.heldout_fraction == 0:
        del ways_out["heldout"]
    for split, way_out in ways_out.items():
        if writer.tokens[split] < block_tokens:
            raise DataError(
                f"the {split} part of {config.source!r} has {writer.tokens[split]} tokens, "
                f"fewer than one block of {block_tokens}: {way_out}"
            )
