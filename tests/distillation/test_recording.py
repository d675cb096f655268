"""A recording is what the teacher says, as far as its k tokens and 16 bits reach."""

import json
from pathlib import Path

import numpy as np
import pytest
import small
import tiny
import torch
from trainings import resolved, training

from minitron.core.errors import MinitronError
from minitron.distillation import recording as module
from minitron.distillation.config import DistillConfig
from minitron.distillation.objective import TopK
from minitron.distillation.recording import RecordedTeacher, record_logits
from minitron.distillation.train import blocks_read, distill
from minitron.model.architecture import Shape
from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Batch, Samples, Separator
from minitron.model.stream import Pass
from minitron.pipeline.run import run
from minitron.recipe import build_recipe

CPU = torch.device("cpu")


def written(teacher: Path, out: Path, *, k: int = 5, temperature: float = 1.0) -> tuple[torch.Tensor, RecordedTeacher]:
    checkpoint, tokens = open_checkpoint(teacher), tiny.tokens(6, 9, seed=1)
    out.mkdir()
    record_logits(checkpoint, Samples(tokens), Pass(torch.float32), out, top_k=k, temperature=temperature)
    return tokens, RecordedTeacher(out, CPU)


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "gemma2", "granite", "nemotron", "phi3"])
def test_a_recording_is_the_teachers_likeliest_tokens_and_the_rest(variant: str, tmp_path: Path) -> None:
    path = tiny.checkpoint(variant, tmp_path / "teacher")
    tokens, recorded = written(path, tmp_path / "lessons", temperature=2.0)
    expected = TopK.of(tiny.logits(tiny.model(path), tokens)[:, :-1].flatten(0, 1) / 2.0, 5)
    found = recorded(Batch(tokens)).logits
    assert isinstance(found, TopK)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=5e-3, rtol=0)
    torch.testing.assert_close(found.tail, expected.tail, atol=5e-3, rtol=0)
    same = found.ids == expected.ids
    assert same.float().mean() > 0.99  # where two are as likely, either may come first


def test_recorded_logits_do_not_depend_on_the_parts_of_text_or_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.checkpoint("llama", tmp_path / "teacher")
    tokens, whole = written(path, tmp_path / "whole")
    monkeypatch.setattr(module, "RECORDED_PART_BYTES", 4000)
    monkeypatch.setattr("minitron.model.stream.HEAD_BYTES", 1500)
    _, split = written(path, tmp_path / "split")
    assert len(list((tmp_path / "split").glob("shard-*"))) > 1
    one, other = whole(Batch(tokens)).logits, split(Batch(tokens)).logits
    assert isinstance(one, TopK) and isinstance(other, TopK)
    torch.testing.assert_close(one.log_probs, other.log_probs, atol=5e-3, rtol=0)
    torch.testing.assert_close(one.tail, other.tail, atol=5e-3, rtol=0)


def test_blocks_come_in_any_order_and_selection(tmp_path: Path) -> None:
    tokens, recorded = written(tiny.checkpoint("llama", tmp_path / "teacher"), tmp_path / "lessons")
    whole, some = recorded(Batch(tokens)).logits, recorded(Batch(tokens[[4, 1]])).logits
    assert isinstance(whole, TopK) and isinstance(some, TopK)
    assert torch.equal(some.ids, whole.ids.view(6, 8, 5)[[4, 1]].flatten(0, 1))
    assert torch.equal(some.tail, whole.tail.view(6, 8)[[4, 1]].flatten())


def test_recorded_logits_are_a_distribution(tmp_path: Path) -> None:
    tokens, recorded = written(tiny.checkpoint("llama", tmp_path / "teacher"), tmp_path / "lessons")
    logits = recorded(Batch(tokens)).logits
    assert isinstance(logits, TopK)
    torch.testing.assert_close(logits.log_probs.exp().sum(-1) + logits.tail.exp(), torch.ones(48), atol=1e-6, rtol=0)


def test_ids_of_large_vocabularies_are_whole() -> None:
    ids = torch.tensor([[[0, 65535, 65536, 131_071, 255_999]]])
    log_probs, tail = torch.zeros(1, 1, 5), torch.zeros(1, 1)
    packed = module._packed((ids, log_probs, tail), 256_000)
    assert torch.equal(packed["ids"].to(torch.int64) | packed["high_ids"].to(torch.int64) << 16, ids)
    assert "high_ids" not in module._packed((ids, log_probs, tail), 65_536)


def test_recorded_logits_of_other_text_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    tokens, recorded = written(tiny.checkpoint("llama", tmp_path / "teacher"), tmp_path / "lessons")
    with pytest.raises(MinitronError, match=r"no logits for a block of this text.*record the logits again"):
        recorded(Batch((tokens + 1) % 50))
    shard = tmp_path / "lessons" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(MinitronError, match=r"shard-00000.safetensors is missing or damaged"):
        RecordedTeacher(tmp_path / "lessons", CPU)


def test_recorded_logits_of_documents_kept_apart_are_of_the_tokens_that_predict(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path / "teacher")
    tokens, separator = tiny.tokens(4, 9, seed=1), Separator(7, leads=True)
    tokens[0, 3] = tokens[2, 8] = tokens[3, 1] = 7
    batch, out = Batch(tokens, separator), tmp_path / "lessons"
    out.mkdir()
    record_logits(open_checkpoint(path), Samples(tokens, separator), Pass(torch.float32), out, top_k=5)
    found = RecordedTeacher(out, CPU)(batch).logits
    with torch.no_grad():
        logits = tiny.model(path)(**batch.inputs, use_cache=False).logits
    expected = TopK.of(batch.predicting(logits), 5)
    assert isinstance(found, TopK) and len(found.ids) == batch.num_predicted == 4 * 8 - 3
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=5e-3, rtol=0)
    torch.testing.assert_close(found.tail, expected.tail, atol=5e-3, rtol=0)
    with pytest.raises(MinitronError, match="no logits for a block of this text"):
        RecordedTeacher(out, CPU)(Batch(tokens))


def test_what_a_token_takes_is_said(tmp_path: Path) -> None:
    written(tiny.checkpoint("llama", tmp_path / "teacher"), tmp_path / "lessons")
    facts = json.loads((tmp_path / "lessons" / "lessons.json").read_text())
    assert facts["bytes_per_token"] == pytest.approx((8 / 9) * (5 * 4 + 2), rel=0.5)
    assert facts["model"] == open_checkpoint(tmp_path / "teacher").fingerprint()
    assert np.prod([facts["blocks"], facts["block_tokens"]]) == 54


def test_a_student_of_recorded_logits_is_the_one_of_the_teacher(tmp_path: Path) -> None:
    """At k = vocabulary only the 16 bits of the record stand between them."""
    raw = {
        "model": str(small.teacher(tmp_path / "teacher")),
        "data": {"source": str(small.text(tmp_path / "text.jsonl")), "heldout_fraction": 0.2, "block_tokens": 16},
        "calibrate": {"samples": 8},
        "prune": {"shape": {"ffn": 24}},
        "distill": {"tokens": 20 * 4 * 16, "batch_blocks": 4, "evaluate_blocks": 4, "precision": "float32"},
        "evaluate": {"blocks": 8, "prompts": [], "speed": False},
    }
    students = {}
    for kind in ("online", "recorded"):
        recipe = build_recipe(
            raw,
            [
                f"distill.teacher={kind}",
                "distill.intermediate=off",
                *(["distill.top_k=100000"] if kind == "recorded" else []),
            ],
        )
        records = run(recipe, tmp_path / kind)
        student = records.evaluations["student"]
        students[kind] = {"first loss": records.metrics[0].loss}
        students[kind] |= {"kl_to_teacher": student.kl_to_teacher, "lm_loss": student.lm_loss}
    for name in ("kl_to_teacher", "lm_loss", "first loss"):
        assert students["recorded"][name] == pytest.approx(students["online"][name], rel=2e-3), name
    record = json.loads((tmp_path / "recorded" / "lessons" / "record.json").read_text())
    assert record["result"]["top_k"] == open_checkpoint(tmp_path / "teacher").shape.vocab


def test_recorded_logits_of_another_kind_than_the_recipe_asks_for_are_refused(tmp_path: Path) -> None:
    teacher = small.teacher(tmp_path / "teacher")
    corpus = small.corpus(tmp_path / "data", teacher, 16)
    checkpoint = open_checkpoint(teacher)
    config = DistillConfig(tokens=640, batch_blocks=4, teacher="recorded", top_k=5)
    config = resolved(config, checkpoint.shape, checkpoint.shape, block_tokens=16, train_tokens=corpus.train_tokens)
    learning = training(teacher, tmp_path / "lessons", corpus, config, tmp_path / "work")
    (tmp_path / "lessons").mkdir()
    blocks = blocks_read(corpus, learning.schedule)
    record_logits(checkpoint, Samples(torch.from_numpy(blocks)), Pass(torch.float32), tmp_path / "lessons", top_k=4)
    with pytest.raises(
        MinitronError, match=r"the logits recorded in .* have top_k 4, and 5 is wanted: record them again"
    ):
        (tmp_path / "out").mkdir()
        distill(learning, tmp_path / "out")


def test_losses_that_a_recorded_teacher_cannot_give_are_refused() -> None:
    shape = Shape(layers=2, hidden=8, ffn=8, heads=2, kv_heads=2, head_dim=4, vocab=50)
    for changes, message in (
        ({"loss": "mse"}, r"mse compares all logits, and distill.top_k=50 leaves only some"),
        ({"intermediate": "p1"}, r"a recorded teacher has no hidden states: set distill.intermediate=off"),
    ):
        config = DistillConfig(teacher="recorded", **changes)
        with pytest.raises(MinitronError, match=message):
            resolved(config, shape, shape, block_tokens=16, train_tokens=10_000)
