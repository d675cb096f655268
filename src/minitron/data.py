"""Text to token blocks: read documents, tokenize once, split by document, serve batches in a fixed order.

A corpus on disk is a directory:

    train.bin, heldout.bin    one long stream of token ids each (uint16 or uint32)
    heldout_bytes.bin         UTF-8 bytes of text that each held-out token stands for (uint16)
    corpus.json               written last: dtype, block length, counts, delimiter, separator, digest

Blocks are consecutive windows of a stream; the incomplete last one is dropped.
"""

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from minitron import layouts
from minitron.config import Section
from minitron.errors import DataError
from minitron.packing import Separator
from minitron.typed_files import read_typed

BUILTIN = "builtin"
TEACHER = "teacher"  # text that `sampling` draws from the teacher
SAMPLED = "sampled.jsonl"  # where that lies, in a run's data directory
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
# Generated tables, not source text that a person wrote.
_NOT_SOURCE = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
_TESTS = {"test", "tests", "idle_test", "testsuite"}


class DataConfig(Section):
    source: str = BUILTIN
    """A .txt, .md, .jsonl or .parquet file, a directory of these, a Hugging Face dataset id, `builtin`: the source text
    of the running Python's standard library, without its tests; or `teacher`: text sampled from the teacher."""
    heldout: str | None = None
    """A second source, held out whole. Without one, `heldout_fraction` of the documents of `source` is held out."""
    text_field: str = "text"
    """Field of .jsonl and .parquet rows, and of dataset rows, that holds the text."""
    delimiter: Literal["auto", "bos", "eos", "both", "none"] = "auto"
    """Tokens around each document. `auto` is what the tokenizer adds by itself, else the end token after each."""
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


@dataclass(frozen=True)
class Document:
    key: str  # decides the split; equal texts of one source have equal keys
    text: str


@dataclass(frozen=True)
class Blocks:
    """Token blocks of one split, memory-mapped. `bytes` (held-out only) counts the text bytes behind each token;
    `separator` tells documents apart that are to be kept so."""

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
    path: Path
    block_tokens: int
    dtype: str
    delimiter: str
    train_documents: int
    train_tokens: int
    heldout_documents: int
    heldout_tokens: int
    digest: str
    separator: Separator | None = None  # where documents are to be kept apart
    bytes_digest: str = ""  # of the bytes behind each held-out token; older versions did not keep it

    @property
    def train(self) -> Blocks:
        return Blocks(self._map("train.bin", self.dtype), separator=self.separator)

    @property
    def heldout(self) -> Blocks:
        return Blocks(self._map("heldout.bin", self.dtype), self._map("heldout_bytes.bin", "uint16"), self.separator)

    def _map(self, name: str, dtype: str) -> np.ndarray:
        stream = np.memmap(self.path / name, dtype=dtype, mode="r")
        num_blocks = len(stream) // self.block_tokens
        return stream[: num_blocks * self.block_tokens].reshape(num_blocks, self.block_tokens)


def open_corpus(path: Path) -> Corpus:
    """Open a corpus that `prepare` wrote.

    Raises: DataError if the directory holds none.
    """
    file = path / "corpus.json"
    if not file.exists():
        raise DataError(f"{path} is not a prepared corpus: it has no corpus.json")
    again = f"remove {path} and run the same command to prepare the text again"
    meta = read_typed(file, layouts.CORPUS, DataError, way_out=again)
    apart = meta.get("separator")
    known = {one.name: meta[one.name] for one in fields(Corpus) if one.name in meta and one.name != "separator"}
    corpus = Corpus(path=path, separator=apart and Separator(**apart), **known)
    itemsize = np.dtype(corpus.dtype).itemsize
    for name, size in (
        ("train.bin", itemsize * corpus.train_tokens),
        ("heldout.bin", itemsize * corpus.heldout_tokens),
        ("heldout_bytes.bin", 2 * corpus.heldout_tokens),
    ):
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise DataError(f"{path / name} has not the {size:,} bytes that corpus.json says: it is damaged; {again}")
    if _corpus_digest(path, corpus.block_tokens, corpus.separator) != corpus.digest:
        raise DataError(f"train.bin or heldout.bin in {path} are not those that corpus.json is of: damaged; {again}")
    if corpus.bytes_digest and _digest_files(path / "heldout_bytes.bin", salt="") != corpus.bytes_digest:
        raise DataError(f"{path / 'heldout_bytes.bin'} is not the one that corpus.json is of: it is damaged; {again}")
    return corpus


def batch_rows(num_blocks: int, *, seed: int, step: int, batch: int) -> np.ndarray:
    """Indices of the blocks that training step `step` (from 0) reads, where every step reads as many."""
    return next_rows(num_blocks, seed=seed, drawn=step * batch, count=batch)


def next_rows(num_blocks: int, *, seed: int, drawn: int, count: int) -> np.ndarray:
    """Indices of the `count` blocks that follow the first `drawn` ones of a training: a pure function, so resuming
    needs no more state than that number.

    Each pass over the data is a permutation of its own, drawn from (seed, pass); the blocks may straddle passes.
    """
    positions = np.arange(drawn, drawn + count)
    rows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions // num_blocks):
        here = positions // num_blocks == epoch
        rows[here] = np.random.default_rng([seed, int(epoch)]).permutation(num_blocks)[positions[here] % num_blocks]
    return rows


def prepare(
    config: DataConfig,
    tokenizer: Any,
    *,
    vocab: int,
    block_tokens: int,
    out: Path,
    documents: Iterable[Document] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Corpus:
    """Read, split and tokenize `config.source` into the existing directory `out`.

    Args:
        documents: those of the source, where it is none that could be read.
        progress: called with (tokens so far, 0, ""): how many there will be is not known before the end.

    Raises: DataError for text that is missing, empty, binary, or shorter than one block, and for a tokenizer that
        knows more tokens than the model (`vocab`).
    """
    if len(tokenizer) > vocab:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary only {vocab}: "
            "they do not belong together, or the model's embedding was never resized; use the model's own tokenizer"
        )
    prefix, suffix, delimiter = delimiters(config.delimiter, tokenizer)
    apart = separator(config, tokenizer)
    writer = _Writer(out, tokenizer, prefix, suffix, dtype="uint16" if vocab <= 2**16 else "uint32")
    with writer:
        for document in documents or read_documents(config.source, config):
            held = config.heldout is None and is_heldout(document, config.heldout_fraction)
            if writer.add(document, heldout=held):
                progress(sum(writer.tokens.values()), 0, "tokens")
            if config.max_tokens is not None and writer.tokens["train"] >= config.max_tokens:
                break
        if config.heldout is not None:
            for document in read_documents(config.heldout, config):
                writer.add(document, heldout=True)
    if writer.documents["heldout"] == 0:
        writer.hold_out_lowest(config.source)
    _require_blocks(writer, config, block_tokens)
    corpus = Corpus(
        path=out,
        block_tokens=block_tokens,
        dtype=writer.dtype,
        delimiter=delimiter,
        train_documents=writer.documents["train"],
        train_tokens=writer.tokens["train"],
        heldout_documents=writer.documents["heldout"],
        heldout_tokens=writer.tokens["heldout"],
        digest=_corpus_digest(out, block_tokens, apart),
        separator=apart,
        bytes_digest=_digest_files(out / "heldout_bytes.bin", salt=""),
    )
    meta = asdict(corpus) | {"path": None}
    del meta["path"]
    (out / "corpus.json").write_text(json.dumps(meta, indent=2))
    return corpus


def read_documents(source: str, config: DataConfig) -> Iterator[Document]:
    """The documents of a source, in a fixed order; blank ones are skipped.

    Raises: DataError if there is no such source, or it holds no text.
    """
    found = False
    for document in _open_source(source, config):
        if document.text.strip():
            found = True
            yield document
    if not found:
        raise DataError(f"data source {source!r} holds no text: every document in it is empty")


def builtin_documents(*, tests: bool = False) -> Iterator[Document]:
    """Python source files of the running interpreter's standard library, keyed by module path.

    Keyed by path and not by content, so that a file is on the same side of the split under every Python version.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _library_files(tests=tests):
        try:
            yield Document(key=path.relative_to(root).as_posix(), text=path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a handful of library files are in other encodings on purpose


def is_hub_id(source: str) -> bool:
    """Whether a source that is no local path can only be a dataset on the hub."""
    path = Path(source).expanduser()
    looks_local = path.exists() or source.startswith((".", "/", "~")) or path.suffix in TEXT_SUFFIXES
    return source not in (BUILTIN, TEACHER) and not looks_local and source.count("/") <= 1


def source_files(config: DataConfig) -> list[Path]:
    """The files that the sources consist of; none for a hub dataset."""
    files: list[Path] = []
    for source in filter(None, (config.source, config.heldout)):
        path = Path(source).expanduser()
        if source == BUILTIN:
            files += _library_files(tests=False)
        elif source == TEACHER:
            continue
        elif path.is_dir():
            files += _text_files(path)
        elif path.exists():
            files.append(path)
    return files


def is_heldout(document: Document, fraction: float) -> bool:
    """Whether the default split holds this document out."""
    return _fraction(document.key) < fraction


def _library_files(*, tests: bool) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = {path: set(path.relative_to(root).parts) for path in sorted(root.rglob("*.py"))}
    return [path for path, names in parts.items() if not _NOT_SOURCE & names and bool(_TESTS & names) == tests]


def _text_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.suffix in TEXT_SUFFIXES)


def _open_source(source: str, config: DataConfig) -> Iterable[Document]:
    if source == BUILTIN:
        return builtin_documents()
    path = Path(source).expanduser()
    if path.is_dir():
        files = _text_files(path)
        if not files:
            raise DataError(f"directory {source} holds no {', '.join(TEXT_SUFFIXES)} file")
        return (document for file in files for document in _read_file(file, config))
    if path.exists():
        return _read_file(path, config)
    if is_hub_id(source):
        return _read_hub(source, config)
    raise DataError(f"data source {source!r} does not exist; give a file, a directory, a dataset id or {BUILTIN!r}")


def _read_file(path: Path, config: DataConfig) -> Iterator[Document]:
    match path.suffix:
        case ".txt" | ".md":
            yield from (keyed(text) for text in _sections(_read_text(path), config.max_document_chars))
        case ".jsonl":
            yield from _read_jsonl(path, config.text_field)
        case ".parquet":
            yield from _read_parquet(path, config.text_field)
        case suffix:
            raise DataError(f"{path} has the suffix {suffix!r}; data files end in {', '.join(TEXT_SUFFIXES)}")


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or check that it is text"
        ) from None
    if "\x00" in text:
        raise DataError(f"{path} is binary: it holds a NUL character at position {text.index(chr(0))}")
    return text


def _sections(text: str, max_chars: int) -> Iterator[str]:
    """Cut long text at the first blank line (else at the first line end) after each `max_chars` characters."""
    start = 0
    while len(text) - start > max_chars:
        cut = text.find("\n\n", start + max_chars)
        if cut < 0 or cut > start + 2 * max_chars:
            cut = text.find("\n", start + max_chars)
        if cut < 0:
            break
        yield text[start:cut]
        start = cut + 1
    yield text[start:]


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a row must be a JSON object, not {type(row).__name__}")
        yield keyed(_text_of(row, field, f"{path}, line {number}"))


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as lines:
            yield from lines
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: convert it, or check that it is text") from None


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None
    columns = table.schema_arrow.names
    if field not in columns:
        raise DataError(f"{path} has no column {field!r} (data.text_field); it has {', '.join(columns)}")
    for batch in table.iter_batches(columns=[field]):
        for text in batch.column(0).to_pylist():
            yield keyed(_text_of({field: text}, field, str(path)))


def _read_hub(source: str, config: DataConfig) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(source, split="train", streaming=True)
        for row in rows:
            yield keyed(_text_of(row, config.text_field, f"dataset {source}"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source!r} is neither a local path nor a readable hub dataset: {error}") from None


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(f"{where}: no field {field!r} (data.text_field); it has {', '.join(map(str, row))}")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: field {field!r} holds {type(row[field]).__name__}, not text")
    try:
        row[field].encode()  # JSON can spell half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {field!r} is no Unicode text: {error.reason}") from None
    return row[field]


def keyed(text: str) -> Document:
    """A document of text from anywhere but the built-in corpus."""
    return Document(key=hashlib.sha256(text.encode()).hexdigest(), text=text)


def _fraction(key: str) -> float:
    """A document's place in [0, 1), from its key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def delimiters(choice: str, tokenizer: Any) -> tuple[list[int], list[int], str]:
    """Token ids before and after each document, and the resolved choice."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if choice == "auto":
        ids = tokenizer("a").input_ids
        starts, ends = bos is not None and ids[:1] == [bos], eos is not None and ids[-1:] == [eos]
        choice = {(True, True): "both", (True, False): "bos"}.get((starts, ends), "eos")
    for name, id in (("bos", bos), ("eos", eos)):
        if choice in (name, "both") and id is None:
            raise DataError(
                f"data.delimiter is {choice!r} but the tokenizer has no {name} token; set it to one of bos, eos, none"
            )
    return [bos] * (choice in ("bos", "both")), [eos] * (choice in ("eos", "both")), choice


def separator(config: DataConfig, tokenizer: Any) -> Separator | None:
    """What tells documents apart, where they are to be kept so.

    Raises: DataError if the delimiters do not tell.
    """
    if not config.separate_documents:
        return None
    prefix, suffix, choice = delimiters(config.delimiter, tokenizer)
    if choice == "none" or prefix == suffix:
        reason = "no token stands between documents" if choice == "none" else "BOS and EOS are the same token"
        raise DataError(
            f"data.separate_documents tells documents apart by their delimiter, but data.delimiter is {choice!r} and "
            f"{reason}: set it to one of {'bos, eos, both' if choice == 'none' else 'bos, eos'}"
        )
    return Separator((prefix or suffix)[0], leads=bool(prefix))


class _Writer:
    """Tokenizes documents in batches and appends each to the stream of its split."""

    BATCH_CHARS = 1 << 20

    def __init__(self, out: Path, tokenizer: Any, prefix: list[int], suffix: list[int], dtype: str):
        self.out, self.tokenizer, self.prefix, self.suffix, self.dtype = out, tokenizer, prefix, suffix, dtype
        self.documents = {"train": 0, "heldout": 0}
        self.tokens = {"train": 0, "heldout": 0}
        self.pending: list[tuple[Document, bool]] = []
        self.pending_chars = 0
        # The training document with the lowest hash, and (start, length) in the train stream of it and its equals.
        self.lowest: tuple[float, Document, list[tuple[int, int]]] | None = None

    def __enter__(self) -> "_Writer":
        self.files = {name: (self.out / f"{name}.bin").open("wb") for name in ("train", "heldout", "heldout_bytes")}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._flush()
        for file in self.files.values():
            file.close()

    def add(self, document: Document, *, heldout: bool) -> bool:
        """Take a document; returns whether that filled a batch and had it tokenized."""
        self.pending.append((document, heldout))
        self.pending_chars += len(document.text)
        if self.pending_chars < self.BATCH_CHARS:
            return False
        self._flush()
        return True

    def hold_out_lowest(self, source: str) -> None:
        """Move the training document with the lowest hash, and its equals, to the held-out split if that is empty."""
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

    def _flush(self) -> None:
        if not self.pending:
            return
        texts = [document.text for document, _ in self.pending]
        all_ids = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        for (document, heldout), ids in zip(self.pending, all_ids, strict=True):
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
        """UTF-8 bytes that each token of the document adds to the text; delimiters add none.

        A token ends at a character; what it adds is the text between the end before and its own. So the counts sum
        to the document's length whatever spaces or byte pieces the tokenizer makes.
        """
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = np.maximum.accumulate([0] + [end for _, end in offsets["offset_mapping"]])
        ends[-1] = len(text)  # byte-level tokenizers trim spaces off their offsets
        bytes_before = np.concatenate([[0], np.cumsum([len(char.encode()) for char in text])])
        counts = np.diff(bytes_before[ends])
        zeros = [np.zeros(len(part)) for part in (self.prefix, self.suffix)]
        return np.concatenate([zeros[0], counts, zeros[1]]).astype(np.uint16)


def _require_blocks(writer: _Writer, config: DataConfig, block_tokens: int) -> None:
    for split, way_out in (
        ("train", "give more text, or lower data.block_tokens"),
        ("heldout", "raise data.heldout_fraction, give data.heldout, or lower data.block_tokens"),
    ):
        if writer.tokens[split] < block_tokens:
            raise DataError(
                f"the {split} part of {config.source!r} has {writer.tokens[split]} tokens, "
                f"fewer than one block of {block_tokens}: {way_out}"
            )


def _corpus_digest(path: Path, block_tokens: int, apart: Separator | None) -> str:
    return _digest_files(path / "train.bin", path / "heldout.bin", salt=f"{block_tokens}{apart or ''}")


def _digest_files(*paths: Path, salt: str) -> str:
    digest = hashlib.sha256(salt.encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
