"""Sources of text: files, directories of files, datasets on the hub, and the source text of Python's library.

Every source is a stream of documents in a fixed order. Each row of a .jsonl or .parquet file or of a dataset is a
document, and so is each .txt or .md file; a long file is several documents.
"""

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.errors import DataError
from minitron.core.reading import MARK, Folder, find_files, json_name, read_rows, read_text, require_file, require_text

BUILTIN = "builtin"
TEACHER = "teacher"  # text that `sampling` draws from the teacher
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
# Suffix of a file that is not read -> advice to the user.
_WAYS_OUT = {
    ".json": "write its objects one a line into a .jsonl file",
    **dict.fromkeys((".ndjson", ".jsonlines", ".jl"), "rename it to .jsonl if it holds one JSON object a line"),
    **dict.fromkeys((".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz", ".7z"), "unpack it"),
    **dict.fromkeys((".csv", ".tsv", ".arrow", ".feather", ".xlsx", ".db"), "convert it to .jsonl or .parquet"),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt", ".epub", ".html", ".htm"), "take its text into a .txt file"),
    **dict.fromkeys((".text", ".markdown", ".rst", ".tex"), "rename it to .txt if it is plain text"),
    **dict.fromkeys((".bin", ".npy", ".idx", ".pt", ".safetensors", ".gguf"), "give the text, not its tokens"),
}
# Generated tables instead of source text by people.
_NOT_SOURCE = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
_TESTS = {"test", "tests", "idle_test", "testsuite"}
# A text file is cut at line ends; if there is none within so many characters, at a space, or anywhere.
LONGEST_LINE_CHARS = 1 << 20
_BLANK_LINE = re.compile(r"\n\n|\r\n\r\n|\r\r")
_LINE_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True)
class Document:
    """A document of a source.

    key: decides the split; equal texts of a source have equal keys.
    section: whether it is from a text file, which has no rows, so that its beginning and end have no meaning.
    """

    key: str
    text: str
    section: bool = False


def keyed(text: str, *, section: bool = False) -> Document:
    """A document whose key is a digest of its text, without a byte order mark; the built-in corpus has other keys."""
    text = text.lstrip(MARK)
    return Document(key=hashlib.sha256(text.encode()).hexdigest(), text=text, section=section)


def read_source(source: str, *, text_field: str, max_chars: int) -> Iterator[Document]:
    """The documents of a source, in a fixed order; blank ones are skipped.

    Args:
        text_field: the field of rows that contains the text.
        max_chars: the length from which a text file is several documents.

    Raises: DataError if the source is missing, or contains no text.
    """
    found = False
    for document in _open_source(source, text_field, max_chars):
        if document.text.strip():
            found = True
            yield document
    if not found:
        raise DataError(f"data source {source!r} holds no text: every document in it is empty")


def find_source(source: str) -> Folder:
    """The files of a source, and a sentence about unread entries of a directory; no files for a hub dataset.

    Raises: DataError for a source that is missing or cannot be read.
    """
    path = local_path(source)
    if not source.strip():
        raise DataError("the data source is empty: give a file, a directory, a dataset id or 'builtin'")
    if source == BUILTIN:
        return Folder(_library_files(tests=False))
    if source == TEACHER or is_hub_id(source):
        return Folder([])
    if os.path.isdir(path):
        found = find_files(path, TEXT_SUFFIXES, DataError)
        if not found.files:
            left_out = f"; {found.left_out}" if found.left_out else ""
            raise DataError(f"directory {source} holds no {', '.join(TEXT_SUFFIXES)} file{left_out}")
        return found
    if os.path.lexists(path):
        require_file(path, DataError)
        _require_suffix(path)
        return Folder([path])
    if "://" in source:
        raise DataError(
            f"data source {source!r} is an address, and text is read from local files, or from the hub by a dataset's "
            "id such as owner/name: download it first"
        )
    raise DataError(f"data source {source!r} does not exist; give a file, a directory, a dataset id or {BUILTIN!r}")


def is_hub_id(source: str) -> bool:
    """Whether a source is no local path, and can be the id of a dataset on the hub."""
    path = local_path(source)
    named_as_file = path.suffix.lower() in (*TEXT_SUFFIXES, *_WAYS_OUT)
    looks_right = re.fullmatch(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", source) and not named_as_file
    return source not in (BUILTIN, TEACHER) and bool(looks_right) and not os.path.lexists(path)


def local_path(source: str) -> Path:
    return Path(os.path.expanduser(source))


def builtin_documents(*, tests: bool = False) -> Iterator[Document]:
    """The source files of the running Python's standard library.

    Their keys are paths, so that a file is in the same split under every version of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _library_files(tests=tests):
        try:
            yield Document(key=path.relative_to(root).as_posix(), text=path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a handful of library files are in other encodings on purpose


def _library_files(*, tests: bool) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = {path: set(path.relative_to(root).parts) for path in sorted(root.rglob("*.py")) if path.is_file()}
    return [path for path, names in parts.items() if not _NOT_SOURCE & names and bool(_TESTS & names) == tests]


def _open_source(source: str, text_field: str, max_chars: int) -> Iterator[Document]:
    if source == BUILTIN:
        yield from builtin_documents()
    elif source == TEACHER:
        raise DataError(f"{TEACHER!r} is text that is yet to be sampled: give a file, a directory or a dataset id")
    elif is_hub_id(source):
        yield from _read_hub(source, text_field)
    else:
        for file in find_source(source).files:
            yield from _read_file(file, text_field, max_chars)


def _read_file(path: Path, text_field: str, max_chars: int) -> Iterator[Document]:
    match path.suffix.lower():
        case ".jsonl":
            for number, row in read_rows(path, DataError):
                yield keyed(_text_of(row, text_field, f"{path}, line {number}"))
        case ".parquet":
            yield from _read_parquet(path, text_field)
        case _:
            text = require_text(read_text(path, DataError), str(path), DataError)
            yield from (keyed(part, section=True) for part in _sections(text, max_chars))


def _require_suffix(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix not in TEXT_SUFFIXES:
        said = f"has the suffix {path.suffix!r}" if suffix else "has no suffix"
        way_out = _WAYS_OUT.get(suffix, "convert it, or rename it if it is one of these")
        raise DataError(f"{path} {said}; data files end in {', '.join(TEXT_SUFFIXES)}: {way_out}")


def _sections(text: str, max_chars: int) -> Iterator[str]:
    """Cut long text at the first blank line (else at the first line end) after each `max_chars` characters."""
    start = 0
    while len(text) - start > max_chars:
        blank = _BLANK_LINE.search(text, start + max_chars, start + 2 * max_chars + 2)
        end = blank or _LINE_END.search(text, start + max_chars, start + max_chars + LONGEST_LINE_CHARS)
        if end is not None:
            stop = end.start()
            following = stop + (2 if text.startswith("\r\n", stop) else 1)
        elif len(text) - start > max_chars + LONGEST_LINE_CHARS:
            space = text.find(" ", start + LONGEST_LINE_CHARS, start + 2 * LONGEST_LINE_CHARS)
            stop = following = space if space >= 0 else start + LONGEST_LINE_CHARS
        else:
            break
        yield text[start:stop]
        start = following
    yield text[start:]


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as table:
            _require_text_column(table.schema_arrow, field, path)
            for batch in table.iter_batches(columns=[field]):
                for text in batch.column(field).to_pylist():
                    number += 1
                    yield keyed(_text_of({field: text}, field, f"{path}, row {number}"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, column {field!r} after row {number}, is not UTF-8 text: {error.reason}") from None
    except (pyarrow.ArrowException, OSError) as error:  # of damaged and of encrypted files: its OSError has no number
        reached = f" after row {number}" if number else ""
        raise DataError(f"{path} is not a readable Parquet file{reached}: {error}") from None


def _require_text_column(schema: Any, field: str, path: Path) -> None:
    from pyarrow import types

    count = schema.names.count(field)
    if count != 1:
        said = f"has {count} columns" if count else "has no column"
        raise DataError(f"{path} {said} {field!r} (data.text_field); it has {', '.join(schema.names) or 'none'}")
    kind = schema.field(field).type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(test(inner) for test in texts):
        raise DataError(
            f"{path}: column {field!r} (data.text_field) holds {kind}, not text; it has {', '.join(schema.names)}"
        )


def _read_hub(source: str, field: str) -> Iterator[Document]:
    import datasets
    import pyarrow
    from huggingface_hub.errors import HfHubHTTPError

    # The errors of the library and of the libraries that it uses about the network, files and layouts. The base of the
    # hub's error is the error of the HTTP library, whichever that is.
    kinds = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, pyarrow.ArrowException)
    try:
        rows = datasets.load_dataset(source, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield keyed(_text_of(row, field, f"dataset {source}, row {number}"))
    except (*kinds, *HfHubHTTPError.__bases__, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{source!r} is neither a local path nor a readable hub dataset: {reason}") from None


def _text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(f"{where}: no field {field!r} (data.text_field); it has {', '.join(map(str, row)) or 'none'}")
    value = row[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} (data.text_field) holds {json_name(value)}, not text{_chat(value)}")
    return require_text(value, f"{where}: field {field!r}", DataError)


def _chat(value: Any) -> str:
    is_chat = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    return ": write its messages as one text, as the model's chat template has them" if is_chat else ""
