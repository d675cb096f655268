"""Text becomes token blocks: nothing lost, nothing shared between the splits, errors that name the file."""

import copy
import gzip
import json
import os
import string
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from minitron.core.errors import DataError
from minitron.core.files import digest_files
from minitron.core.progress import Silent
from minitron.data import sources
from minitron.data.config import DataConfig
from minitron.data.corpus import Corpus, batch_rows, next_rows, open_corpus
from minitron.data.sources import builtin_documents, is_hub_id
from minitron.data.writing import hold_out_all, is_heldout, prepare, read_documents, source_files
from minitron.model.samples import Batch
from minitron.model.tokenizer import load_tokenizer

BLOCK = 8
VOCAB = tiny.SIZES["vocab_size"]
# Each document is one character over and over, which no merge of the tokenizer joins: its tokens tell its name.
LETTERS = [letter for letter in string.ascii_uppercase + string.digits if letter not in "UW"]
NAMED = [letter * (9 + index) for index, letter in enumerate(LETTERS)]
MULTIBYTE = ["café  über 漢字 🙂 ", "\n\nthe rain in the plain\n", "naïve 🙂🙂 tail\t ", "  " * 20, "plain"]


@pytest.fixture(scope="module", params=[False, True], ids=["eos_only", "adds_bos"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_bos=request.param)


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.tokenizer(tmp_path_factory.mktemp("simple"))


def write_rows(path: Path, texts: list[str], field: str = "text") -> Path:
    """A .jsonl or .parquet file with one document a row."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path)
    else:
        path.write_text("\n".join(json.dumps({field: text}) for text in texts))
    return path


class Warned(Silent):
    """Keeps warnings."""

    def __init__(self, heard: list[str]):
        self.heard = heard

    def warn(self, text: str) -> None:
        self.heard.append(text)


def prepared(
    source: Path | str,
    tokenizer: Any,
    out: Path,
    *,
    block: int = BLOCK,
    whole: bool = False,
    warnings: list[str] | None = None,
    **config: Any,
) -> Corpus:
    """A corpus; a warning that the test does not ask for fails it."""
    out.mkdir(exist_ok=True)
    settings = DataConfig(source=str(source), **config)
    heard = [] if warnings is None else warnings
    if whole:
        settings = hold_out_all(settings)
    corpus = prepare(settings, tokenizer, vocab=VOCAB, block_tokens=block, out=out, listener=Warned(heard))
    assert not heard or warnings is not None
    return corpus


def stream(corpus: Corpus, name: str) -> np.ndarray:
    """A whole stream, with the incomplete last block."""
    dtype = corpus.dtype if name != "heldout_bytes" else corpus.bytes_dtype
    return np.fromfile(corpus.path / f"{name}.bin", dtype=dtype)


def texts(source: Path | str, **config: Any) -> list[str]:
    return [document.text for document in read_documents(str(source), DataConfig(**config))]


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_are_documents_in_order(tmp_path: Path, name: str) -> None:
    rows = [text for text in MULTIBYTE if text.strip()]
    assert texts(write_rows(tmp_path / name, MULTIBYTE)) == rows
    assert texts(write_rows(tmp_path / name, MULTIBYTE, field="body"), text_field="body") == rows


@pytest.mark.parametrize("name", ["text.txt", "text.md"])
def test_a_short_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("".join(MULTIBYTE))
    assert texts(tmp_path / name) == ["".join(MULTIBYTE)]


def test_a_directory_is_its_text_files_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "a.md").write_text("first")
    write_rows(tmp_path / "b" / "rows.jsonl", ["second"])
    (tmp_path / "D.TXT").write_text("capitals")
    (tmp_path / "image.png").write_bytes(b"\x00\xff")
    assert texts(tmp_path) == ["capitals", "first", "second", "third"]


@pytest.mark.parametrize("gap", ["\n\n", "\n", "\n\n\n\n"])
def test_a_long_text_file_is_cut_into_sections_with_nothing_lost(tmp_path: Path, gap: str) -> None:
    text = gap.join(f"line {number} " + "x" * (number % 90) for number in range(400))
    (tmp_path / "long.txt").write_text(text)
    sections = texts(tmp_path / "long.txt", max_document_chars=256)
    assert len(sections) > 10
    assert "\n".join(sections) == text  # the line end at each cut is all that goes
    assert all(256 <= len(section) < 3 * 256 for section in sections[:-1])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old mac"])
def test_text_files_of_all_line_ends_are_cut_at_the_same_places(tmp_path: Path, end: str) -> None:
    text = "".join(
        f"line {number} " + "x" * (number % 90) + ("\n\n" if number % 7 == 0 else "\n") for number in range(400)
    )
    (tmp_path / "unix.txt").write_text(text)
    (tmp_path / "other.txt").write_bytes(text.replace("\n", end).encode())
    expected = texts(tmp_path / "unix.txt", max_document_chars=300)
    sections = texts(tmp_path / "other.txt", max_document_chars=290 if end == "\r\n" else 300)
    assert len(sections) > 10
    if end != "\r\n":  # where a character more at each end moves the places
        assert [section.replace(end, "\n") for section in sections] == expected
    assert end.join(sections).strip() == text.replace("\n", end).strip()


def test_a_byte_order_mark_is_no_text_in_any_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "plain"}\n\xef\xbb\xbf{"text": "\\ufeffplain"}\n')
    write_rows(tmp_path / "c.parquet", ["\ufeffplain"])
    assert texts(tmp_path) == ["plain"] * 4


def test_a_line_without_end_is_cut_at_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE_CHARS", 1000)
    text = "word " * 2000
    (tmp_path / "long.txt").write_text(text)
    sections = texts(tmp_path / "long.txt", max_document_chars=256)
    assert "".join(sections) == text and max(map(len, sections)) <= 1000 + 256
    (tmp_path / "long.txt").write_text("x" * 5000)
    assert "".join(texts(tmp_path / "long.txt", max_document_chars=256)) == "x" * 5000


def test_text_without_line_ends_stays_whole(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 10_000)
    assert texts(tmp_path / "long.txt", max_document_chars=256) == ["x" * 10_000]


def test_builtin_text_is_the_standard_library_without_tests() -> None:
    sources = {document.key: document.text for document in builtin_documents()}
    assert sources["json/__init__.py"] == Path(json.__file__).read_text()
    assert not [key for key in sources if {"test", "tests", "site-packages"} & set(key.split("/"))]
    assert sources.keys().isdisjoint(document.key for document in builtin_documents(tests=True))


def test_builtin_text_can_be_prepared(simple: Any, tmp_path: Path) -> None:
    corpus = prepared("builtin", simple, tmp_path, max_tokens=1, heldout_fraction=0.3)
    assert corpus.train_documents > 1 and corpus.heldout_documents >= 1


# --- splitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1e-12, 0.05, 0.4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_heldout_shares_no_document_with_training(
    tokenizer: Any, tmp_path: Path, fraction: float, repeats: int
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", NAMED * repeats)
    corpus = prepared(source, tokenizer, tmp_path / "out", heldout_fraction=fraction)
    names = {name: set(tokenizer.convert_ids_to_tokens(stream(corpus, name).tolist())) for name in ("train", "heldout")}
    names = {name: {token for token in tokens if token not in ("<s>", "</s>")} for name, tokens in names.items()}
    assert names["train"] | names["heldout"] == set(LETTERS)
    assert names["train"].isdisjoint(names["heldout"])
    assert len(names["heldout"]) * repeats == corpus.heldout_documents >= 1
    assert corpus.train_documents + corpus.heldout_documents == len(NAMED) * repeats


def test_the_split_is_by_hash_of_each_document(simple: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", NAMED)
    held = [d.text[0] for d in read_documents(str(source), DataConfig()) if is_heldout(d, 0.3)]
    corpus = prepared(source, simple, tmp_path / "out", heldout_fraction=0.3)
    assert set(simple.convert_ids_to_tokens(stream(corpus, "heldout").tolist())) == {*held, "</s>"}
    assert 0.1 < len(held) / len(NAMED) < 0.5


def test_a_heldout_source_is_held_out_whole(simple: Any, tmp_path: Path) -> None:
    train, heldout = write_rows(tmp_path / "a.jsonl", NAMED[:8]), write_rows(tmp_path / "b.parquet", NAMED[8:11])
    corpus = prepared(train, simple, tmp_path / "out", heldout=str(heldout))
    assert (corpus.train_documents, corpus.heldout_documents) == (8, 3)
    assert set(simple.convert_ids_to_tokens(stream(corpus, "heldout").tolist())) == {*LETTERS[8:11], "</s>"}


def test_text_that_is_held_out_whole_needs_no_training_part(simple: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", NAMED[:1])
    corpus = prepared(source, simple, tmp_path / "out", whole=True)
    assert (corpus.train_documents, corpus.heldout_documents, len(corpus.train)) == (0, 1, 0)
    assert open_corpus(tmp_path / "out") == corpus
    with pytest.raises(
        DataError, match=r"heldout part of .* has 10 tokens, fewer than one block of 16: give more text"
    ):
        prepared(source, simple, tmp_path / "out", whole=True, block=16)


ANIMALS = ("fox", "hen", "owl", "cat", "dog", "bee", "elk", "yak", "ant", "emu")
STORIES = [
    f"Once there was a {animal} by the sea.\nIt had {number} boats, a red one first.\n\n'Ahoy!'\n\n"
    f"So it sailed home, the {animal}, over the wide and windy sea again."
    for number, animal in enumerate(ANIMALS)
]
OTHER_WORDS = {"line ends": "\r\n", "old line ends": "\r", "spaces": " \n"}


def written(path: Path, stories: list[str], form: str) -> Path:
    """The stories in a file of one of the formats, or with other line ends."""
    if form in ("txt", "md"):
        file = path.with_suffix(f".{form}")
        file.write_text("\n\n".join(stories) + "\n")
        return file
    if form in ("jsonl", "parquet"):
        return write_rows(path.with_suffix(f".{form}"), stories)
    return write_rows(
        path.with_suffix(".jsonl"), ["\ufeff" + s.replace("\n", OTHER_WORDS[form]) + "\n" for s in stories]
    )


@pytest.mark.parametrize("heldout", ["jsonl", "parquet", "txt", *OTHER_WORDS])
@pytest.mark.parametrize("source", ["jsonl", "txt", "md"])
def test_what_is_held_out_is_not_trained_on_whatever_format_it_is_in(
    simple: Any, tmp_path: Path, source: str, heldout: str
) -> None:
    train, held = written(tmp_path / "train", STORIES, source), written(tmp_path / "held", STORIES[3:6], heldout)
    warnings: list[str] = []
    options = {"heldout": str(held), "max_document_chars": 300}
    corpus = prepared(train, simple, tmp_path / "out", warnings=warnings, **options)
    trained, measured = (simple.decode(stream(corpus, name)) for name in ("train", "heldout"))
    for number, animal in enumerate(ANIMALS):
        assert (f"the {animal}, over" in trained) == (number not in (3, 4, 5))
        assert (f"the {animal}, over" in measured) == (number in (3, 4, 5))
    assert corpus.shared_chars == pytest.approx(sum(map(len, STORIES[3:6])), abs=10)
    if source == "jsonl":
        assert (corpus.train_documents, corpus.shared_documents) == (7, 3)
    (warning,) = warnings
    assert f"the held-out text {held} is also in the training text {train}" in warning
    assert f"{corpus.shared_chars:,} characters in all are not trained on" in warning


def test_a_row_is_dropped_for_the_held_out_document_in_it_and_not_for_a_common_phrase(
    simple: Any, tmp_path: Path
) -> None:
    more = " ".join(f"word{n}" for n in range(200))
    rows = [f"{more}\n{STORIES[0]}", f"{more}\n'Ahoy!'", f"{more}\nOnce there was a fox by the sea.", STORIES[1]]
    held = write_rows(tmp_path / "held.jsonl", [STORIES[0], "'Ahoy!'"])
    corpus = prepared(
        write_rows(tmp_path / "rows.jsonl", rows), simple, tmp_path / "out", warnings=[], heldout=str(held)
    )
    assert (corpus.train_documents, corpus.shared_documents) == (3, 1)


@pytest.mark.parametrize("form", ["jsonl", "txt", "parquet"])
def test_training_text_that_is_all_held_out_is_refused(simple: Any, tmp_path: Path, form: str) -> None:
    source, heldout = written(tmp_path / "a", STORIES, "jsonl"), written(tmp_path / "b", STORIES, form)
    with pytest.raises(DataError, match=r"a.jsonl' and the held-out text .* are the same, .* nothing is left to train"):
        prepared(source, simple, tmp_path / "out", heldout=str(heldout))


def test_text_that_shares_nothing_with_the_held_out_text_is_read_as_without_it(simple: Any, tmp_path: Path) -> None:
    source, held = write_rows(tmp_path / "rows.jsonl", NAMED), write_rows(tmp_path / "held.jsonl", STORIES)
    corpus = prepared(source, simple, tmp_path / "out", heldout=str(held))
    assert corpus.shared_documents == corpus.shared_chars == 0
    whole = prepared(source, simple, tmp_path / "whole", whole=True)
    assert np.array_equal(stream(corpus, "train"), stream(whole, "heldout"))


# --- tokenizing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "bos", "eos", "both", "none"])
def test_delimiters_stand_around_each_document(tokenizer: Any, tmp_path: Path, choice: Any) -> None:
    source = write_rows(tmp_path / "rows.jsonl", NAMED)
    options: dict[str, Any] = {"delimiter": choice, "whole": True}
    if tokenizer.bos_token is None and choice in ("bos", "both"):
        with pytest.raises(DataError, match=f"data.delimiter is '{choice}' but the tokenizer has no bos token"):
            prepared(source, tokenizer, tmp_path / "out", **options)
        return
    corpus = prepared(source, tokenizer, tmp_path / "out", **options)
    resolved = choice if choice != "auto" else "eos" if tokenizer.bos_token is None else "bos"
    assert corpus.delimiter == resolved
    before = [tokenizer.bos_token_id] if resolved in ("bos", "both") else []
    after = [tokenizer.eos_token_id] if resolved in ("eos", "both") else []
    expected: list[int] = []
    for text in NAMED:
        expected += before + tokenizer.encode(text, add_special_tokens=False) + after
    assert stream(corpus, "heldout").tolist() == expected


def test_blocks_are_consecutive_windows_without_the_incomplete_last(simple: Any, tmp_path: Path) -> None:
    corpus = prepared(write_rows(tmp_path / "rows.jsonl", NAMED), simple, tmp_path / "out")
    assert corpus.train_tokens == len(stream(corpus, "train")) and corpus.train_tokens % BLOCK
    whole = len(corpus.train) * BLOCK
    assert corpus.train_tokens - BLOCK < whole <= corpus.train_tokens
    assert (
        corpus.train.select(np.arange(len(corpus.train))).flatten().tolist() == stream(corpus, "train")[:whole].tolist()
    )
    assert np.array_equal(corpus.heldout.head(1).tokens, corpus.heldout.tokens[:1])
    assert len(corpus.heldout.head(None)) == len(corpus.heldout)


@pytest.mark.parametrize("fraction", [None, 0.75, 1e-12], ids=["whole", "by hash", "lowest hash"])
def test_heldout_bytes_are_the_utf8_length_of_the_heldout_documents(
    tokenizer: Any, tmp_path: Path, fraction: float | None
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", MULTIBYTE * 2)
    options: dict[str, Any] = {"whole": True} if fraction is None else {"heldout_fraction": fraction}
    corpus = prepared(source, tokenizer, tmp_path / "out", **options)
    counts, ids = stream(corpus, "heldout_bytes"), stream(corpus, "heldout")
    assert len(counts) == len(ids) == corpus.heldout_tokens > 0
    assert counts.sum() == len(tokenizer.decode(ids, skip_special_tokens=True).encode())
    assert not counts[np.isin(ids, tokenizer.all_special_ids)].any()


def test_a_token_may_stand_for_more_bytes_than_two_bytes_count(tmp_path: Path) -> None:
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, "<unk>")),
        unk_token="<unk>",
        eos_token="</s>",
    )
    text = "漢" * 50_000  # one token, which the tokenizer does not know
    corpus = prepared(write_rows(tmp_path / "rows.jsonl", [text] * 8), words, tmp_path / "out", whole=True)
    assert stream(corpus, "heldout").tolist() == [0, 1] * 8
    assert stream(corpus, "heldout_bytes").tolist() == [len(text.encode()), 0] * 8
    assert int(corpus.heldout.bytes.sum(dtype="int64")) == 8 * len(text.encode())


def test_a_corpus_that_does_not_name_the_width_of_its_bytes_has_two_of_them(simple: Any, tmp_path: Path) -> None:
    corpus = prepared(write_rows(tmp_path / "rows.jsonl", NAMED), simple, tmp_path / "out")
    expected = np.array(corpus.heldout.bytes)
    stream(corpus, "heldout_bytes").astype("uint16").tofile(corpus.path / "heldout_bytes.bin")
    meta = json.loads((corpus.path / "corpus.json").read_text())
    old = {name: meta[name] for name in meta if name not in ("bytes_dtype", "shared_documents", "shared_chars")}
    (corpus.path / "corpus.json").write_text(json.dumps(old))
    assert open_corpus(corpus.path).bytes_dtype == "uint16"
    assert np.array_equal(open_corpus(corpus.path).heldout.bytes, expected)


NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFKC": normalizers.NFKC(),
    "lower case": normalizers.Lowercase(),
    "strip": normalizers.Strip(),
    "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "spaces": normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")]),
}


@pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS)
def test_bytes_are_those_of_the_text_and_not_of_what_a_tokenizer_makes_of_it(normalizer: Any, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizer
    hard = [
        "e\u0301 caf\u00e9 \ufb01ne \u212b",
        "\u0130STANBUL Stra\u00dfe",
        "  before and behind \n\n",
        "\u3000\uff21 🙂 漢字",
    ]
    corpus = prepared(write_rows(tmp_path / "rows.jsonl", hard * 3), tokenizer, tmp_path / "out", whole=True)
    assert int(stream(corpus, "heldout_bytes").sum()) == 3 * sum(len(text.encode()) for text in hard)


def test_a_document_without_a_token_is_none(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    corpus = prepared(write_rows(tmp_path / "rows.jsonl", [*NAMED, "zzz"]), tokenizer, tmp_path / "out", whole=True)
    assert corpus.heldout_documents == len(NAMED)


def test_a_damaged_corpus_is_not_opened(simple: Any, tmp_path: Path) -> None:
    corpus = prepared(write_rows(tmp_path / "rows.jsonl", NAMED), simple, tmp_path / "out")
    os.truncate(corpus.path / "train.bin", 100)
    with pytest.raises(DataError, match=r"train.bin has 100 bytes, and corpus.json beside it says .*: it is damaged"):
        open_corpus(corpus.path)


def test_a_corpus_reopens_as_it_was_written(simple: Any, tmp_path: Path) -> None:
    corpus = prepared(write_rows(tmp_path / "rows.jsonl", NAMED), simple, tmp_path / "out")
    assert open_corpus(tmp_path / "out") == corpus
    with pytest.raises(DataError, match=r"is not a prepared corpus: it has no corpus\.json"):
        open_corpus(tmp_path)


@pytest.mark.parametrize("choice", ["auto", "bos", "eos", "both", "none"])
def test_documents_that_are_kept_apart_are_told_by_their_delimiter(tokenizer: Any, tmp_path: Path, choice: Any) -> None:
    source = write_rows(tmp_path / "rows.jsonl", NAMED)
    options: dict[str, Any] = {"delimiter": choice, "separate_documents": True, "block": 16}
    if choice == "none":
        with pytest.raises(DataError, match=r"is 'none' and no token stands between documents: set it to one of "):
            prepared(source, tokenizer, tmp_path / "out", **options)
        return
    if tokenizer.bos_token is None and choice in ("bos", "both"):
        return
    corpus = prepared(source, tokenizer, tmp_path / "out", **options)
    assert corpus.separator and open_corpus(tmp_path / "out") == corpus
    tokens = torch.from_numpy(corpus.train.select(slice(None)))
    letters = set(range(VOCAB)) - set(tokenizer.all_special_ids)
    for block, positions in zip(tokens, Batch(tokens, corpus.train.separator).positions, strict=True):
        starts = [*positions.eq(0).nonzero()[:, 0].tolist(), len(block)]
        documents = [letters & set(block[start:stop].tolist()) for start, stop in pairwise(starts)]
        assert all(len(names) <= 1 for names in documents)
        assert len(documents) <= 1 + len(set().union(*documents))
    assert corpus.heldout.separator == corpus.heldout.head(1).separator == corpus.separator


def test_documents_that_share_no_delimiter_are_not_kept_apart(simple: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", NAMED)
    assert prepared(source, simple, tmp_path / "out").separator is None
    simple = copy.deepcopy(simple)
    simple.bos_token = simple.eos_token
    with pytest.raises(DataError, match=r"is 'both' and BOS and EOS are the same token: set it to one of bos, eos"):
        prepared(source, simple, tmp_path / "out", delimiter="both", separate_documents=True)


# --- serving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "batch"), [(10, 3), (7, 7), (4, 9), (1, 2)])
def test_every_pass_serves_each_block_once_and_steps_straddle_passes(num_blocks: int, batch: int) -> None:
    rows = np.concatenate([batch_rows(num_blocks, seed=1, step=step, batch=batch) for step in range(num_blocks)])
    passes = rows.reshape(batch, num_blocks)
    assert all(sorted(order) == list(range(num_blocks)) for order in passes.tolist())
    assert num_blocks < 4 or len({tuple(order) for order in passes.tolist()}) > 1


@pytest.mark.parametrize("counts", [(3, 3, 3, 11), (1, 9, 10), (20,), (4, 0, 13, 3)], ids=str)
def test_batches_of_any_sizes_read_the_same_blocks_in_the_same_order(counts: tuple[int, ...]) -> None:
    ends = np.cumsum(counts)
    parts = [next_rows(7, seed=1, drawn=int(end) - n, count=n) for end, n in zip(ends, counts, strict=True)]
    assert np.concatenate(parts).tolist() == next_rows(7, seed=1, drawn=0, count=20).tolist()


def test_batch_rows_is_a_pure_function_of_seed_and_step() -> None:
    def rows(**changes: int) -> list[int]:
        return batch_rows(50, **{"seed": 3, "step": 7, "batch": 4, **changes}).tolist()

    assert rows() == rows()
    assert rows() != rows(seed=4) and rows() != rows(step=8)


# --- digests ---------------------------------------------------------------------------------------------------------


def test_the_digest_changes_with_the_tokens_and_only_with_them(simple: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", NAMED)

    def digest(**options: Any) -> str:
        return prepared(source, simple, tmp_path / "out", **options).digest

    before = digest()
    os.utime(source, (0, 0))
    assert digest() == before
    assert digest(block=16) != before
    assert digest(heldout_fraction=0.5) != before
    assert digest(separate_documents=True) != before
    write_rows(source, [*NAMED[:-1], NAMED[-1] + "!"])
    assert digest() != before


def test_source_files_are_the_files_that_are_read(tmp_path: Path) -> None:
    train, heldout = tmp_path / "train", tmp_path / "heldout.txt"
    (train / "inner").mkdir(parents=True)
    for name in ("train/a.txt", "train/inner/b.md", "train/c.png", "heldout.txt"):
        (tmp_path / name).write_text("text")
    expected = [train / "a.txt", train / "inner" / "b.md"]
    assert source_files(DataConfig(source=str(train))) == expected
    assert source_files(DataConfig(source=str(train), heldout=str(heldout))) == [*expected, heldout]
    assert source_files(DataConfig(source="owner/dataset")) == []
    assert Path(json.__file__) in source_files(DataConfig())


@pytest.mark.parametrize(
    ("source", "expected"),
    [("owner/dataset", True), ("wikitext", True), ("builtin", False), ("./a", False), ("/a", False), ("a/b/c", False)],
)
def test_a_hub_id_is_what_can_be_nothing_else(source: str, expected: bool) -> None:
    assert is_hub_id(source) == expected
    assert not is_hub_id("rows.jsonl")


# --- errors ----------------------------------------------------------------------------------------------------------

LONG = "words and words\n" * 40
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "holds no text: every document in it is empty"),
    "blank": ("a.md", b" \n\n ", "holds no text"),
    "binary": ("a.txt", b"ab\x00cd", "a.txt is binary: it holds a NUL character at position 2"),
    "latin-1 text": ("a.txt", "café".encode("latin-1"), r"a.txt is not UTF-8 text \(byte 3\)"),
    "latin-1 rows": ("a.jsonl", '{"text": "café"}'.encode("latin-1"), "a.jsonl, line 1, is not UTF-8 text"),
    "not JSON": ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2, is not JSON: Expecting value"),
    "no object": ("a.jsonl", b'["text"]', "line 1: a row must be a JSON object, not a list; .* one JSON object a line"),
    "no field": ("a.jsonl", b'{"body": "a", "id": 1}', r"line 1: no field 'text' \(data.text_field\); it has body, id"),
    "no text": ("a.jsonl", b'{"text": 7}', r"line 1: field 'text' \(data.text_field\) holds a number, not"),
    "no value": ("a.jsonl", b'{"text": null}', "holds null, not text"),
    "messages": ("a.jsonl", b'{"text": [{"role": "user"}]}', "holds a list, not text: write its messages as one text"),
    "array": ("a.jsonl", b'[\n{"text": "a"}\n]', "a.jsonl, line 1, begins a JSON array; .* one JSON object a line"),
    "two texts": ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1, says 'text' twice"),
    "cut off": ("a.jsonl", b'{"text": "a"}\n{"text": "b', "line 2, is not JSON: Unterminated string"),
    "digits": ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1, is no JSON that can be read: Exceeds"),
    "NUL in a row": ("a.jsonl", b'{"text": "a\\u0000b"}', "line 1: field 'text' is binary: .* NUL .* position 1"),
    "NUL behind rows": ("a.jsonl", b'{"text": "a"}\n\0\0', "line 2, is binary: it holds a NUL character"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "a.txt is UTF-16 text, by its byte order mark, and not UTF-8 text"),
    "UTF-32 rows": ("a.jsonl", '{"text": "a"}'.encode("utf-32"), "line 1, is UTF-32 text, by its byte order mark"),
    "packed rows": ("a.jsonl", gzip.compress(b'{"text": "a"}'), "line 1, is compressed with gzip, and not UTF-8 text"),
    "half a character": ("a.jsonl", b'{"text": "\\ud83d"}', "line 1: field 'text' is no Unicode text: surrogate"),
    "no parquet": ("a.parquet", b"PAR0", "a.parquet is not a readable Parquet file"),
    "suffix": ("a.csv", b"a,b", "a.csv has the suffix '.csv'; data files end in .*: convert it to .jsonl or .parquet"),
    "JSON": ("a.json", b"[]", "a.json has the suffix '.json'; .*: write its objects one a line into a .jsonl file"),
    "packed": ("a.jsonl.gz", b"", "has the suffix '.gz'; data files end in .*: unpack it"),
    "no suffix": ("a", b"text", "a has no suffix; data files end in .txt"),
    "single document": ("a.txt", LONG.encode(), "is a single document, so nothing can be held out"),
    "one document twice": ("a.jsonl", (json.dumps({"text": LONG}) + "\n").encode() * 2, "is a single document"),
    "short": ("a.jsonl", b'{"text": "a"}\n{"text": "b"}', "train part of .* has 2 tokens, fewer than one block of 8"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_unusable_files_are_refused_with_a_reason(
    simple: Any, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / name, simple, tmp_path / "out")


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.parquet", NAMED, field="body")
    with pytest.raises(DataError, match=r"rows.parquet has no column 'text' \(data.text_field\); it has id, body"):
        texts(source)


def _damaged(path: Path, place: slice) -> None:
    content = bytearray(path.read_bytes())
    content[place] = b"\xff" * len(content[place])
    path.write_bytes(content)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    from pyarrow.parquet import ParquetFile

    source = write_rows(tmp_path / "rows.parquet", NAMED * 20)
    page = ParquetFile(source).metadata.row_group(0).column(1).dictionary_page_offset
    for place in (slice(page + 20, page + 60), slice(-60, -40), slice(-4, None)):
        write_rows(source, NAMED * 20)
        _damaged(source, place)
        with pytest.raises(DataError, match=r"rows\.parquet is not a readable Parquet file"):
            texts(source)


def test_a_parquet_column_must_hold_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def column(values: Any) -> Path:
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "rows.parquet")
        return tmp_path / "rows.parquet"

    fine = pyarrow.array(NAMED)
    for values in (fine, fine.dictionary_encode(), fine.cast(pyarrow.large_string())):
        assert texts(column(values)) == NAMED
    for values, message in (
        ([b"a"], r"column 'text' \(data.text_field\) holds binary, not text"),
        ([["a"]], "holds list<element: string>, not text"),
        ([{"a": "b"}], "holds struct<a: string>, not text"),
        ([1], "holds int64, not text"),
        (["a", None], "row 2: field 'text' .* holds null, not text"),
        (["a", "b\0"], "row 2: field 'text' is binary: it holds a NUL character"),
        (pyarrow.array([], pyarrow.string()), "holds no text"),
    ):
        with pytest.raises(DataError, match=message):
            texts(column(values))


def test_what_a_directory_leaves_out_is_said_once(simple: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_rows(folder_of(folder) / "a.jsonl", NAMED)
    for name in ("b.jsonl.gz", "d.json", "._a.jsonl", "LICENSE", "e\nf.json"):
        (folder / name).write_text("x")
    write_rows(folder_of(folder / ".ipynb_checkpoints") / "a-checkpoint.jsonl", NAMED)
    write_rows(folder_of(folder / "named.txt") / "part.JSONL", STORIES)
    (folder / "again").symlink_to(".")
    os.link(folder / "a.jsonl", folder / "z.jsonl")
    warnings: list[str] = []
    corpus = prepared(folder, simple, tmp_path / "out", warnings=warnings)
    assert corpus.train_documents + corpus.heldout_documents == len(NAMED) + len(STORIES)
    assert warnings == [
        f"{folder}: 8 of 10 entries are not read: 2 hidden (._a.jsonl, ...); 2 .json (d.json, ...); "
        "1 without a suffix (LICENSE); 1 linked folders (again); 1 .gz (b.jsonl.gz); "
        "1 once more under another name (z.jsonl). Files are read that end in .txt, .md, .jsonl, .parquet"
    ]
    assert source_files(DataConfig(source=str(folder))) == [folder / "a.jsonl", folder / "named.txt" / "part.JSONL"]


def folder_of(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_a_data_file_of_a_directory_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder")
    write_rows(folder / "a.jsonl", NAMED)
    bad = folder / "b.txt"
    for make, message in (
        (lambda: bad.symlink_to("nowhere"), "b.txt is a link to nowhere, which does not exist"),
        (lambda: bad.symlink_to("b.txt"), "cannot read .*b.txt: Too many levels of symbolic links"),
        (lambda: os.mkfifo(bad), "b.txt is a pipe, and no file"),
        (lambda: bad.symlink_to("/dev/zero"), "b.txt is a device, and no file"),
    ):
        make()
        for read in (texts, lambda source: source_files(DataConfig(source=str(source)))):
            with pytest.raises(DataError, match=message):
                read(folder)
        bad.unlink()


def test_files_of_any_name_are_read_and_digested(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder")
    for name in (b"\xff.txt", b"new\nline.txt", "漢.txt".encode()):
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_text("words")
    assert texts(folder) == ["words"] * 3
    assert digest_files(source_files(DataConfig(source=str(folder))), {})


BAD_SOURCES: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing file": (lambda path: f"{path}/nothing.txt", "does not exist; give a file, a directory"),
    "missing directory": (lambda path: "./nothing", "'./nothing' does not exist"),
    "no name": (lambda path: "", "the data source is empty: give a file"),
    "device": (lambda path: "/dev/zero", "/dev/zero is a device, and no file"),
    "address": (lambda path: "https://example.com/a.jsonl", "is an address, .*: download it first"),
    "home of nobody": (lambda path: "~nobody-here/a.txt", "'~nobody-here/a.txt' does not exist"),
    "long name": (lambda path: "a" * 5000, "does not exist"),
    "missing table": (lambda path: "nothing.csv", "'nothing.csv' does not exist"),
    "text to be sampled": (lambda path: "teacher", "is text that is yet to be sampled"),
    "directory without text": (lambda path: str(path), "holds no .txt, .md, .jsonl, .parquet file"),
    "unknown dataset": (lambda path: "nobody/nothing", "'nobody/nothing' is neither a local path nor a readable hub"),
}


@pytest.mark.parametrize(("source", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_missing_sources_are_named(tmp_path: Path, source: Callable[[Path], str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        texts(source(tmp_path))


def test_a_heldout_part_shorter_than_a_block_names_the_way_out(simple: Any, tmp_path: Path) -> None:
    train, heldout = write_rows(tmp_path / "a.jsonl", NAMED), write_rows(tmp_path / "b.jsonl", ["ab"])
    with pytest.raises(DataError, match=r"heldout part of .* fewer than one block of 8: raise data.heldout_fraction"):
        prepared(train, simple, tmp_path / "out", heldout=str(heldout))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(simple: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", NAMED)
    with pytest.raises(DataError, match=f"tokenizer has {len(simple)} tokens but the model's vocabulary only 100"):
        prepare(DataConfig(source=str(source)), simple, vocab=100, block_tokens=BLOCK, out=tmp_path)


OTHERS = [f"other {text}" for text in NAMED]


def test_special_tokens_of_a_stream_are_its_delimiters_alone(tokenizer: Any, tmp_path: Path) -> None:
    spelled = [f"<s>{text}</s> and more{number}</s>" for number, text in enumerate(NAMED)]
    source = write_rows(tmp_path / "rows.jsonl", spelled)
    others = [f"other {text}" for text in spelled]
    corpus = prepared(source, tokenizer, tmp_path / "out", heldout=str(write_rows(tmp_path / "held.jsonl", others)))
    ids = stream(corpus, "train").tolist()
    for token, name in ((tokenizer.bos_token_id, "bos"), (tokenizer.eos_token_id, "eos")):
        assert token is None or ids.count(token) == len(spelled) * (corpus.delimiter == name)
    assert int(stream(corpus, "heldout_bytes").sum()) == sum(len(text.encode()) for text in others)


def test_nothing_stands_between_documents_where_the_tokenizer_has_no_token_for_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.sentencepiece(tmp_path / "model", special=False))
    source = write_rows(tmp_path / "rows.jsonl", NAMED)
    corpus = prepared(source, tokenizer, tmp_path / "out", heldout=str(write_rows(tmp_path / "held.jsonl", OTHERS)))
    expected = [id for text in NAMED for id in tokenizer(text).input_ids]
    assert corpus.delimiter == "none" and stream(corpus, "train").tolist() == expected
    with pytest.raises(DataError, match=r"data\.delimiter is 'eos' but the tokenizer has no eos token; set it to none"):
        prepared(source, tokenizer, tmp_path / "out", delimiter="eos")
    with pytest.raises(DataError, match="no token stands between documents: the tokenizer has none, so leave it out"):
        prepared(source, tokenizer, tmp_path / "out", separate_documents=True)


def test_a_start_token_alone_stands_before_each_document(tmp_path: Path) -> None:
    path = tiny.sentencepiece(tmp_path / "model", bos=False)
    (path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    source = write_rows(tmp_path / "rows.jsonl", NAMED)
    corpus = prepared(
        source, load_tokenizer(path), tmp_path / "out", heldout=str(write_rows(tmp_path / "b.jsonl", OTHERS))
    )
    assert corpus.delimiter == "bos" and stream(corpus, "train").tolist().count(1) == len(NAMED)
