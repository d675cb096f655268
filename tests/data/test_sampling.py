"""Sampled text follows the model's own distribution, and is a function of the seed however often it is interrupted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import tiny
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from minitron.core.errors import CheckpointError, DataError
from minitron.data import sampling
from minitron.data.config import DataConfig
from minitron.data.sampling import Sampling, draw, end_tokens, probabilities, sample_batch, sample_text, start_token
from minitron.data.sources import keyed
from minitron.data.writing import is_heldout, prepare, read_documents
from minitron.model.checkpoint import open_checkpoint
from minitron.model.tokenizer import load_tokenizer

BLOCK = 16
VOCAB = 300  # of the tokenizer; the models have some rows more
START = 0
CONFIG = DataConfig(source="teacher", max_tokens=600, heldout_fraction=0.2, sample_batch=8)


def draws(documents: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((documents, tokens), np.float32)


# --- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "directory", ["llama", "mistral-window", "qwen2", "gemma2", "gemma3", "smollm3"], indirect=True
)
@torch.no_grad()
def test_tokens_are_where_the_draws_lie_in_the_models_distribution(directory: Path) -> None:
    """Against the whole sequence again for every token, without a cache, one document at a time."""
    model, numbers, temperature = tiny.model(directory), draws(8, 12), 0.8
    ends = set(range(0, VOCAB, 8))  # so many that documents end early, and some go on alone
    documents = sample_batch(model, Sampling(START, ends, VOCAB, temperature), numbers)
    lengths = {len(ids) for ids in documents}
    assert len(lengths) > 2 and max(lengths) <= 12
    for ids, row in zip(documents, numbers, strict=True):
        assert not ends & set(ids[:-1]) and (ids[-1] in ends or len(ids) == 12)
        logits = tiny.logits(model, torch.tensor([[START, *ids[:-1]]]))[0, :, :VOCAB]
        cumulated = (logits.double() / temperature).softmax(-1).cumsum(-1)
        for position, token in enumerate(ids):
            below = cumulated[position, token - 1] if token else 0.0
            assert below - 1e-5 <= row[position] <= cumulated[position, token] + 1e-5


def test_the_likeliest_token_alone_is_greedy_text(llama: Path) -> None:
    model = tiny.model(llama)
    (ids,) = sample_batch(model, Sampling(START, [], tiny.SIZES["vocab_size"], top_k=1), draws(1, 12))
    start = torch.tensor([[START]])
    greedy = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=12, do_sample=False)
    assert ids == greedy[0, 1:].tolist()


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.6), (20, 0.3), (1, 0.9), (900, 1.0)])
def test_the_truncated_distribution_is_that_of_transformers(top_k: int | None, top_p: float | None) -> None:
    logits = 3 * torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(probabilities(logits, top_k, top_p), expected.softmax(-1), atol=1e-6, rtol=1e-5)


def test_draws_pick_tokens_as_often_as_they_are_likely_and_never_one_that_cannot_be() -> None:
    likely = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]]).expand(4000, -1)
    chosen = draw(likely, torch.from_numpy(draws(4000, 1)[:, 0]))
    shares = torch.bincount(chosen, minlength=6) / 4000
    torch.testing.assert_close(shares, likely[0], atol=0.03, rtol=0)
    edges = draw(likely[:2], torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [1, 4] and not shares[likely[0] == 0].any()


def test_tokens_that_the_tokenizer_does_not_know_are_never_drawn(llama: Path) -> None:
    model = tiny.model(llama)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 100
    documents = sample_batch(model, Sampling(START, [], VOCAB), draws(16, 12))
    assert max(map(max, documents)) < VOCAB


def test_logits_that_are_not_finite_are_an_error_that_says_where(llama: Path) -> None:
    model = tiny.model(llama)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(
        CheckpointError, match=r"logits are not finite after 1 tokens of its own text: .* torch\.float32"
    ):
        sample_batch(model, Sampling(START, [], VOCAB), draws(2, 4))


# --- where documents begin and end -----------------------------------------------------------------------------------


def test_a_document_starts_at_bos_or_else_at_eos(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(tmp_path, adds_bos=True)
    assert start_token(tokenizer) == tokenizer.bos_token_id
    tokenizer = tiny.tokenizer(tmp_path)
    assert start_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="its tokenizer has neither a BOS nor an EOS token to start from; give text as"):
        start_token(tokenizer)


def test_a_document_ends_at_every_token_that_ends_one(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny.model(llama), tiny.tokenizer(tmp_path, adds_bos=True)
    both = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for named, expected in ((None, both), (7, both | {7}), ([7, 9], both | {7, 9})):
        model.generation_config.eos_token_id = named
        assert end_tokens(tokenizer, model) == expected


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.teacher(tmp_path_factory.mktemp("teacher"))


def sampled(teacher: Path, file: Path, seed: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """The rows of the file."""
    config = CONFIG.model_copy(update=changes)
    made = sample_text(open_checkpoint(teacher), config, file, block_tokens=BLOCK, seed=seed)
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    assert rows == [vars(row) for row in made]
    return rows


def test_text_is_a_function_of_seed_and_settings(teacher: Path, tmp_path: Path) -> None:
    first = sampled(teacher, tmp_path / "first")
    assert sampled(teacher, tmp_path / "again") == first
    others = [
        sampled(teacher, tmp_path / "seed", seed=1),
        sampled(teacher, tmp_path / "temperature", sample_temperature=0.5),
        sampled(teacher, tmp_path / "top_k", sample_top_k=5),
        sampled(teacher, tmp_path / "top_p", sample_top_p=0.5),
    ]
    texts = [[row["text"] for row in rows] for rows in (first, *others)]
    assert all(one != other for index, one in enumerate(texts) for other in texts[:index])
    assert len({text for text in texts[0] if text}) > 0.9 * len(texts[0])


def test_rows_are_the_text_of_tokens_that_end_by_themselves_or_fill_a_block(teacher: Path, tmp_path: Path) -> None:
    rows = sampled(teacher, tmp_path / "rows", max_tokens=3000)
    assert {row["ended"] for row in rows} == {True, False}
    assert all(row["tokens"] == BLOCK - 1 for row in rows if not row["ended"])
    assert all(1 <= row["tokens"] <= BLOCK - 1 for row in rows)
    assert not [row for row in rows if "</s>" in row["text"]]
    assert not [row for row in rows if not row["ended"] and row["text"].endswith("\N{REPLACEMENT CHARACTER}")]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("own_heldout", [False, True])
def test_there_is_as_much_text_as_asked_for_and_a_block_to_hold_out(
    adds_bos: bool, own_heldout: bool, tmp_path: Path
) -> None:
    teacher = tiny.checkpoint("llama", tmp_path / "teacher")
    tokenizer = tiny.tokenizer(teacher, adds_bos=adds_bos)
    heldout = str(small.text(tmp_path / "text.jsonl")) if own_heldout else None
    config = CONFIG.model_copy(update={"heldout": heldout})
    file = tmp_path / "sampled.jsonl"
    sample_text(open_checkpoint(teacher), config, file, block_tokens=BLOCK, seed=0)
    documents = list(read_documents(str(file), DataConfig()))
    (tmp_path / "out").mkdir()
    whole = config.model_copy(update={"max_tokens": None})
    options = {"vocab": tiny.SIZES["vocab_size"], "block_tokens": BLOCK, "out": tmp_path / "out"}
    corpus = prepare(whole, tokenizer, documents=documents, **options)
    assert 600 <= corpus.train_tokens < 600 + 8 * 2 * BLOCK
    assert corpus.heldout_tokens >= BLOCK
    held = [document for document in documents if is_heldout(keyed(document.text), 0.2)]
    assert corpus.train_documents == len(documents) - (0 if own_heldout else len(held))


def test_a_teacher_that_says_nothing_is_given_up_on(teacher: Path, tmp_path: Path) -> None:
    """Greedy text is always the same, so that nothing or everything is held out."""
    rows = sampled(teacher, tmp_path / "rows", sample_top_k=1)
    assert len({row["text"] for row in rows}) == 1
    expected = 600 / 0.8 + BLOCK / 0.2
    assert expected < sum(row["tokens"] for row in rows) < 5 * expected


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("steps", [(3,), (BLOCK + 3,), (30,), (20, 2, 16)], ids=str)
def test_an_interrupted_sampling_ends_with_the_bytes_of_an_undisturbed_one(
    teacher: Path, tmp_path: Path, steps: tuple[int, ...]
) -> None:
    for most in steps:
        calls, before = 0, 1

        def interrupt(done: int, total: int, note: str) -> None:
            nonlocal calls, before
            calls += 1
            assert before <= done <= total == 600 and "tokens sampled" in note
            before = done
            if calls == most:  # noqa: B023
                raise PowerCut

        with pytest.raises(PowerCut):
            sample_text(
                open_checkpoint(teacher), CONFIG, tmp_path / "cut", block_tokens=BLOCK, seed=0, progress=interrupt
            )
    with (tmp_path / "cut").open("a") as file:
        file.write('{"text": "half a li')
    sampled(teacher, tmp_path / "cut")
    sampled(teacher, tmp_path / "undisturbed")
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "undisturbed").read_bytes()


def test_sampled_text_can_be_read_whatever_tokens_were_drawn(teacher: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    ids = [*tokenizer("the rain").input_ids, *tokenizer("\0").input_ids, *tokenizer(" remains").input_ids, 0]
    assert sampling._decoded(ids, {0}, tokenizer).text == "the rain remains"


def test_a_damaged_file_of_sampled_text_is_named(teacher: Path, tmp_path: Path) -> None:
    sampled(teacher, tmp_path / "rows")
    lines = (tmp_path / "rows").read_text().split("\n")
    for damaged, message in (("{oops", "line 2, is not JSON"), ('{"text": "a"}', "missing")):
        (tmp_path / "rows").write_text("\n".join([lines[0], damaged, *lines[2:]]))
        with pytest.raises(
            DataError, match=f"rows, the text sampled so far, is damaged .*{message}.* sampling begins anew"
        ):
            sampled(teacher, tmp_path / "rows")


def test_the_last_batches_have_only_what_is_missing(teacher: Path, tmp_path: Path) -> None:
    heldout = str(small.text(tmp_path / "text.jsonl"))
    rows = sampled(teacher, tmp_path / "rows", sample_batch=500, heldout=heldout)
    tokens = [row["tokens"] for row in rows]
    before_the_last = sum(tokens[: -sampling.LEAST_ROWS])
    assert before_the_last < 600 and len(rows) < 500


def test_what_is_complete_is_not_sampled_again(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sampled(teacher, tmp_path / "rows")
    monkeypatch.setattr(sampling, "load_model", None)
    assert sampled(teacher, tmp_path / "rows") == rows
