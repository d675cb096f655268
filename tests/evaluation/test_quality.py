"""Quality is what a naive float64 loop over transformers' logits finds."""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import tiny
import torch

import minitron
from minitron.core.errors import CheckpointError, DataError, MinitronError
from minitron.data.config import DataConfig
from minitron.data.corpus import Blocks, Corpus
from minitron.evaluation import quality
from minitron.evaluation.quality import Evaluation, measure_quality
from minitron.model.samples import Batch, Separator

VARIANTS = ["llama", "llama-tied", "mistral-window", "gemma2", "granite"]  # the last two transform their logits


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Corpus]:
    """A model, a teacher that differs from it a little, and held-out text."""
    path = tmp_path_factory.mktemp("pair")
    directory = small.teacher(path / "teacher", request.param)
    teacher, model = tiny.model(directory), tiny.model(directory)
    tiny.randomize(teacher, seed=1)
    with torch.no_grad():
        for one, other in zip(model.parameters(), teacher.parameters(), strict=True):
            one.mul_(0.1).add_(0.9 * other)
    return model, teacher, small.corpus(path / "corpus", directory)


@torch.no_grad()
def by_loop(model: Any, teacher: Any, blocks: Blocks) -> Evaluation:
    """Block by block and token by token, in float64."""
    model_logits, teacher_logits = (
        tiny.logits(of, torch.from_numpy(blocks.select(slice(None)))).double() for of in (model, teacher)
    )
    nats, kl, agreeing, count = 0.0, 0.0, 0, 0
    for block, tokens in enumerate(blocks.select(slice(None))):
        for position in range(len(tokens) - 1):
            q, p = model_logits[block, position].softmax(0), teacher_logits[block, position].softmax(0)
            nats -= math.log(q[tokens[position + 1]])
            kl += float((p * (p.log() - q.log())).sum())
            agreeing += int(q.argmax() == p.argmax())
            count += 1
    text_bytes = int(blocks.bytes[:, 1:].sum())
    return Evaluation(
        lm_loss=nats / count,
        perplexity=math.exp(nats / count),
        bits_per_byte=nats / math.log(2) / text_bytes,
        kl_to_teacher=kl / count,
        top1_agreement=agreeing / count,
        tokens=count,
    )


def test_every_number_is_that_of_a_naive_loop(pair: tuple[Any, Any, Corpus]) -> None:
    model, teacher, corpus = pair
    blocks = corpus.heldout.head(12)
    expected = by_loop(model, teacher, blocks)
    assert measure_quality(model, blocks, teacher=teacher).to_dict() == pytest.approx(expected.to_dict(), rel=1e-5)
    assert expected.kl_to_teacher > 0.01 and 0.1 < expected.top1_agreement < 1


def test_bits_per_byte_are_of_the_text_behind_the_tokens(pair: tuple[Any, Any, Corpus], tmp_path: Path) -> None:
    model, _, corpus = pair
    tokenizer = tiny.tokenizer(tmp_path)
    predicted = corpus.heldout.select(slice(None))[:, 1:]
    # The text is ASCII, so every token decodes by itself.
    text_bytes = sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in predicted)
    found = measure_quality(model, corpus.heldout)
    assert found.tokens == predicted.size
    assert found.bits_per_byte == pytest.approx(found.lm_loss * predicted.size / (math.log(2) * text_bytes), rel=1e-12)


def test_batches_and_chunks_do_not_matter(pair: tuple[Any, Any, Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher, corpus = pair
    blocks = corpus.heldout.head(10)
    expected = measure_quality(model, blocks, teacher=teacher).to_dict()
    for batch, chunk in ((1, None), (3, None), (64, None), (8, 7), (5, 1)):
        if chunk:
            monkeypatch.setattr(quality, "usual_chunk", lambda head, chunk=chunk: chunk)
        assert measure_quality(model, blocks, teacher=teacher, batch=batch).to_dict() == pytest.approx(
            expected, rel=1e-6
        )


def test_a_model_agrees_with_itself(pair: tuple[Any, Any, Corpus]) -> None:
    model, _, corpus = pair
    found = measure_quality(model, corpus.heldout, teacher=model)
    assert (found.kl_to_teacher, found.top1_agreement) == (0.0, 1.0)


def test_what_is_not_known_is_left_out(pair: tuple[Any, Any, Corpus]) -> None:
    model, _, corpus = pair
    blocks = corpus.train.head(3)
    found = measure_quality(model, blocks)
    assert (found.bits_per_byte, found.kl_to_teacher, found.top1_agreement) == (None, None, None)
    assert found.tokens == blocks.tokens.size - 3


def test_a_bfloat16_model_has_the_numbers_of_its_weights(pair: tuple[Any, Any, Corpus]) -> None:
    model, teacher, corpus = pair
    low, guide = (tiny.model(Path(of.name_or_path), torch.bfloat16) for of in (model, teacher))
    for rounded, full in ((low, model), (guide, teacher)):
        rounded.load_state_dict(full.state_dict())
    expected = measure_quality(model, corpus.heldout, teacher=teacher)
    found = measure_quality(low, corpus.heldout, teacher=guide)
    assert found.lm_loss == pytest.approx(expected.lm_loss, rel=0.01)
    assert found.kl_to_teacher == pytest.approx(expected.kl_to_teacher, rel=0.1)


def test_documents_kept_apart_are_measured_as_documents_alone(pair: tuple[Any, Any, Corpus]) -> None:
    model, teacher, corpus = pair
    separator = Separator(int(corpus.train.tokens.min()), leads=False)  # the end token
    blocks = replace(corpus.heldout.head(10), separator=separator)
    found = measure_quality(model, blocks, teacher=teacher, batch=4)
    nats, kl, agreeing, count = 0.0, 0.0, 0, 0
    for block in torch.from_numpy(blocks.select(slice(None))):
        cuts = [0, *((block == separator.token).nonzero()[:, 0] + 1).tolist(), len(block)]
        for start, stop in pairwise(cuts):
            if stop - start < 2:
                continue
            one = Blocks(block[None, start:stop].numpy())
            alone = measure_quality(model, one, teacher=teacher)
            assert alone.kl_to_teacher is not None and alone.top1_agreement is not None
            nats += alone.lm_loss * alone.tokens
            kl += alone.kl_to_teacher * alone.tokens
            agreeing += round(alone.top1_agreement * alone.tokens)
            count += alone.tokens
    assert count == found.tokens < 10 * (corpus.block_tokens - 1)
    assert (found.lm_loss, found.kl_to_teacher) == pytest.approx((nats / count, kl / count), rel=1e-5)
    assert found.top1_agreement == agreeing / count
    counted = Batch(torch.from_numpy(blocks.select(slice(None))), separator).predicted.numpy()
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / blocks.bytes[counted].sum(), rel=1e-5)


def test_text_of_which_no_token_is_predicted_is_refused(pair: tuple[Any, Any, Corpus]) -> None:
    model, _, corpus = pair
    end = int(corpus.train.tokens.min())
    blocks = replace(corpus.heldout.head(2), separator=Separator(end, leads=False))
    for empty in (blocks.head(0), replace(blocks, tokens=np.full_like(blocks.tokens, end))):
        with pytest.raises(DataError, match="no token of the held-out text is predicted"):
            measure_quality(model, empty)


def test_a_teacher_whose_logits_are_not_finite_is_named(pair: tuple[Any, Any, Corpus]) -> None:
    model, teacher, corpus = pair
    teacher = copy.deepcopy(teacher)
    with torch.no_grad():
        next(teacher.parameters()).mul_(math.nan)
    with pytest.raises(CheckpointError, match="KL to the teacher is not finite: the teacher's weights are damaged"):
        measure_quality(model, corpus.heldout.head(2), teacher=teacher)


def test_progress_counts_blocks(pair: tuple[Any, Any, Corpus]) -> None:
    model, _, corpus = pair
    seen: list[tuple[int, int]] = []
    measure_quality(model, corpus.heldout.head(7), batch=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_models_that_differ_by_rows_of_padding_are_compared_on_the_rows_that_both_have(
    pair: tuple[Any, Any, Corpus], tmp_path: Path
) -> None:
    model, teacher, corpus = pair
    blocks, vocab = corpus.heldout.head(3), model.config.vocab_size
    expected = measure_quality(model, blocks, teacher=teacher)
    for name, of in (("teacher", teacher), ("model", model)):
        of.save_pretrained(tmp_path / name)
        wide = tiny.model(tmp_path / name)
        wide.resize_token_embeddings(vocab + 16, mean_resizing=False)
        with torch.no_grad():
            wide.get_output_embeddings().weight[vocab:] = 3.0
        found = (
            measure_quality(model, blocks, teacher=wide)
            if name == "teacher"
            else measure_quality(wide, blocks, teacher=teacher)
        )
        assert found.kl_to_teacher == pytest.approx(expected.kl_to_teacher, rel=1e-5)
        assert found.top1_agreement == expected.top1_agreement
        assert (found.lm_loss > expected.lm_loss) == (name == "model")  # its own rows all count


def test_the_verbs_take_a_gguf_file_for_a_model(tmp_path: Path) -> None:
    model, text = str(small.teacher(tmp_path / "model")), small.text(tmp_path / "text.jsonl", documents=20)
    files = minitron.QuantizeConfig(types=["F32"], verify=False)
    table = minitron.quantize(model, files, out=tmp_path / "gguf")
    file, data = str(tmp_path / "gguf" / table.files[0].file), DataConfig(source=str(text), block_tokens=16)
    of_file, of_model = (minitron.evaluate(one, data, teacher=model, blocks=4, whole=True) for one in (file, model))
    assert of_file.tokens == of_model.tokens and of_file.kl_to_teacher == pytest.approx(0, abs=1e-4)
    assert of_file.lm_loss == pytest.approx(of_model.lm_loss, abs=1e-3)
    assert of_file.bits_per_byte == pytest.approx(of_model.bits_per_byte, abs=1e-3)
    how: dict[str, Any] = {"new_tokens": 8, "temperature": 0.0, "seed": 0}
    assert minitron.generate(file, "the rain", **how) == minitron.generate(model, "the rain", **how)
    with pytest.raises(MinitronError, match="benchmarks are measured on checkpoints, not on GGUF files"):
        minitron.benchmark(file, ["piqa"])
