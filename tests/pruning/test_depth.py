"""Variants that run side by side are the models that the cut would make."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from minitron.core.errors import CheckpointError, DataError, PlanError
from minitron.evaluation.tasks.questions import encode, multiple_choice, read_questions
from minitron.model import likelihood
from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Batch, Samples, Separator
from minitron.model.stream import Pass
from minitron.model.tokenizer import load_tokenizer
from minitron.pruning import depth
from minitron.pruning.cut import cut
from minitron.pruning.depth import by_loss, by_task, contiguous_blocks, leave_one_out, likelihoods
from minitron.pruning.given import Given
from minitron.pruning.importance import even_scores
from minitron.pruning.plan import choose

VARIANTS = [frozenset(layers) for layers in ([], [0], [3], [1, 2], [0, 2, 3])]


def cut_model(path: Path, dropped: frozenset[int], out: Path) -> Any:
    """transformers' own model of the checkpoint without some layers."""
    checkpoint = open_checkpoint(path)
    out.mkdir()
    kept = tuple(layer for layer in range(checkpoint.shape.layers) if layer not in dropped)
    student = replace(checkpoint.shape, layers=len(kept))
    cut(checkpoint, choose(even_scores(checkpoint.shape), checkpoint.shape, student, Given(layers=kept)), out)
    return tiny.model(out)


def log_likelihoods(model: Any, tokens: Tensor) -> Tensor:
    """Of each token after those before it, and whether it was the likeliest."""
    logits = tiny.logits(model, tokens)[:, :-1]
    nats = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return torch.stack([nats, (logits.argmax(-1) == tokens[:, 1:]).float()])


@pytest.mark.parametrize("directory", tiny.FIRST.values(), indirect=True)
def test_the_likelihoods_of_every_variant_are_those_of_the_cut_model(directory: Path, tmp_path: Path) -> None:
    tokens = tiny.tokens(3, 9)
    scored = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    scored[:, 0] = False
    found = likelihoods(open_checkpoint(directory), Samples(tokens), scored, VARIANTS, Pass(torch.float32, batch=2))
    for number, dropped in enumerate(VARIANTS):
        nats, likeliest = log_likelihoods(cut_model(directory, dropped, tmp_path / str(number)), tokens)
        mask = scored[:, 1:]
        torch.testing.assert_close(found.nats[number].float(), (nats * mask).sum(1), rtol=2e-5, atol=2e-5)
        assert found.greedy[number].tolist() == (likeliest.bool() | ~mask).all(1).tolist()


def test_the_loss_of_documents_kept_apart_is_that_of_their_predicted_tokens(llama: Path, tmp_path: Path) -> None:
    tokens, separator = tiny.tokens(3, 9), Separator(7, leads=False)
    tokens[0, 4] = tokens[1, 0] = tokens[1, 6] = 7
    batch = Batch(tokens, separator)
    found = by_loss(open_checkpoint(llama), Samples(tokens, separator), Pass(torch.float32, batch=2))(VARIANTS)
    for number, dropped in enumerate(VARIANTS):
        with torch.no_grad():
            logits = cut_model(llama, dropped, tmp_path / str(number))(**batch.inputs, use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(batch.predicting(logits), batch.targets)
        torch.testing.assert_close(found[number].float(), expected, rtol=2e-5, atol=2e-5)


def test_nothing_changes_when_samples_vocabulary_and_files_are_in_pieces(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, checkpoint = tiny.tokens(5, 7), open_checkpoint(llama)
    whole = by_loss(checkpoint, Samples(tokens), Pass(torch.float32))(VARIANTS)
    monkeypatch.setattr(depth, "VARIANT_STATES_BYTES", 0)
    monkeypatch.setattr("minitron.model.stream.HEAD_BYTES", 4 * 32 * 13)
    monkeypatch.setattr(likelihood, "chunk_tokens", lambda vocab: 5)
    monkeypatch.setattr("minitron.model.stream.STATES_IN_MEMORY_BYTES", 0)
    done: list[tuple[int, int]] = []
    measure = by_loss(
        checkpoint,
        Samples(tokens),
        Pass(torch.float32, batch=2, scratch=tmp_path, progress=lambda *now: done.append(now)),
    )
    torch.testing.assert_close(measure(VARIANTS), whole, rtol=1e-6, atol=1e-6)
    assert done == [(number, 12) for number in range(1, 13)]
    assert not list(tmp_path.iterdir())


def test_states_that_variants_share_are_computed_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = depth.Stream.run

    def counted(self: Any, index: int, *rest: Any) -> Any:
        runs.append(index)
        return run(self, index, *rest)

    monkeypatch.setattr(depth.Stream, "run", counted)
    leave_one_out(by_loss(open_checkpoint(llama), Samples(tiny.tokens(1, 4)), Pass(torch.float32)), 4)
    assert [runs.count(layer) for layer in range(4)] == [1, 2, 3, 4]  # the whole model, and those without one before


def pretended(losses: dict[tuple[int, ...], float]) -> Any:
    return lambda variants: torch.tensor([losses[tuple(sorted(variant))] for variant in variants]).double()


def test_a_layers_score_is_what_its_absence_costs() -> None:
    measure = pretended({(): 1.0, (0,): 3.0, (1,): 1.5, (2,): 0.5})
    assert leave_one_out(measure, 3).tolist() == [2.0, 0.5, -0.5]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_layers_of_the_lowest_scores_are_the_block_that_costs_least(count: int) -> None:
    blocks = [tuple(range(start, start + count)) for start in range(4 - count)]
    for best in blocks:
        losses = {block: 5.0 + block[0] for block in blocks} | {(): 1.0, best: 2.0}
        scores = contiguous_blocks(pretended(losses), 4, count)
        assert sorted(scores.argsort(stable=True)[:count].tolist()) == [*best]
        assert scores[best[0]] == 1.0 and scores[3] == torch.inf


def test_no_block_holds_every_layer() -> None:
    with pytest.raises(PlanError, match="a block of 4 layers cannot be dropped from 4, of which the last stays"):
        contiguous_blocks(pretended({}), 4, 4)


def test_a_loss_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path / "huge")
    tensors = tiny.tensors(path)
    tensors["model.norm.weight"] *= 1e38
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the loss of the model is not finite: its weights are damaged"):
        by_loss(open_checkpoint(path), Samples(tiny.tokens(2, 5)), Pass(torch.float32))([frozenset()])


# --- tasks -----------------------------------------------------------------------------------------------------------

ROWS = {
    "endings": {"ctx": "the rain in", "endings": ["the plain", "a grey boat", "sea"], "label": 2},
    "label as text": {"ctx": "over", "endings": ["some", "wide"], "label": "1"},
    "blank": {"sentence": "a _ sails home", "option1": "boat", "option2": "plain", "answer": "2"},
    "choices": {"question": "the sea", "choices": {"text": ["wide", "windy"], "label": ["A", "B"]}, "answerKey": "B"},
    "goal": {"goal": "sail home", "sol1": "over the sea", "sol2": "again", "label": 0},
}
PAIRS = {
    "endings": [("the rain in", " the plain"), ("the rain in", " a grey boat"), ("the rain in", " sea")],
    "label as text": [("over", " some"), ("over", " wide")],
    "blank": [("a boat", " sails home"), ("a plain", " sails home")],
    "choices": [("Question: the sea\nAnswer:", " wide"), ("Question: the sea\nAnswer:", " windy")],
    "goal": [("Question: sail home\nAnswer:", " over the sea"), ("Question: sail home\nAnswer:", " again")],
}
RIGHT = {"endings": 2, "label as text": 1, "blank": 1, "choices": 1, "goal": 0}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("form", ROWS)
def test_every_form_of_a_row_is_its_pairs_and_its_answer(form: str, tmp_path: Path) -> None:
    (question,) = read_questions(str(written(tmp_path / "task.jsonl", ROWS[form])))
    assert list(question.requests) == PAIRS[form]
    for right in range(len(PAIRS[form])):
        results = [(0.0 if number == right else -1e3, False) for number in range(len(PAIRS[form]))]
        assert question.grade(results) == float(right == RIGHT[form])


def test_long_and_short_continuations_are_compared_per_character() -> None:
    question = multiple_choice([("c", "x" * 10), ("c", "xx")], right=0)
    assert question.grade([(-9.0, False), (-2.0, False)]) == 1.0
    assert question.grade([(-11.0, False), (-2.0, False)]) == 0.0


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no json": ("{", "line 1, is not JSON"),
    "list": ("[1]", "line 1: a row must be a JSON object, not a list"),
    "other fields": (
        {"text": "a"},
        "line 1 has the fields text, and a question has those of one of: ctx, endings, lab",
    ),
    "answer": ({"ctx": "a", "endings": ["b"], "label": 1}, "line 1: the answer is number 1 of 1, or one of them is"),
    "label": ({"ctx": "a", "endings": ["b"], "label": "b"}, "ctx, endings, label do not make a question: ValueError"),
    "a part of a number": (
        {"ctx": "a", "endings": ["b"], "label": 0.5},
        "0.5 where the number of the answer is expected",
    ),
    "endings in one": ({"ctx": "a", "endings": "bc", "label": 1}, "a string where a list of texts is expected"),
    "no ending": ({"ctx": "a", "endings": ["b", None], "label": 0}, "null where text is expected"),
    "no blank": ({"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}, "the sentence has no blank _"),
    "NUL": ({"ctx": "a\0", "endings": ["b"], "label": 0}, "line 1 is binary: it holds a NUL character"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_is_no_question_is_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(str(written(tmp_path / "task.jsonl", row)))


def test_a_task_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task file .*nothing.jsonl does not exist"):
        read_questions(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(DataError, match="has no questions"):
        read_questions(str(written(tmp_path / "empty.jsonl", "")))


def test_a_task_of_the_harness_is_graded_as_the_file_that_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [ROWS["endings"] | {"label": label} for label in range(3)]
    file = written(tmp_path / "rows.jsonl", *rows)
    lines = ["task: small_choice", "dataset_path: json", "dataset_kwargs:", f"  data_files: {{test: {file}}}"]
    lines += [
        "test_split: test",
        "output_type: multiple_choice",
        'doc_to_text: "{{ctx}}"',
        'doc_to_choice: "{{endings}}"',
    ]
    lines += ['doc_to_target: "{{label}}"', "metric_list: [{metric: acc}, {metric: acc_norm}]"]
    questions = read_questions(str(written(tmp_path / "task.yaml", *lines)), limit=2)
    local = read_questions(str(file), limit=2)
    assert [question.requests for question in questions] == [question.requests for question in local]
    for nats in ([-1.0, -2.0, -3.0], [-9.0, -2.0, -3.0], [-9.0, -9.0, -0.1]):
        results = [(value, False) for value in nats]
        for one, other in zip(questions, local, strict=True):
            assert one.grade(results) == other.grade(results)
    with pytest.raises(DataError, match="does not exist, or names no task"):
        read_questions(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_scored_tokens_are_those_of_the_continuation(adds_bos: bool, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(tmp_path, adds_bos=adds_bos)
    questions = [
        multiple_choice([("the rain in ", "the plain"), ("", "boat")], 0),
        multiple_choice([("the sea", " is 漢字")], 0),
    ]
    rows = encode(questions, tokenizer, max_tokens=64)
    texts = [tokenizer.decode(t[s]) for t, s in zip(rows.tokens, rows.scored, strict=True)]
    assert texts == [" the plain", "boat", " is 漢字"]
    assert not rows.scored[:, 0].any()
    begins = tokenizer.bos_token_id if adds_bos else tokenizer("the").input_ids[0]
    assert (rows.tokens[0, 0] == begins) and rows.tokens[1, 0] in (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_what_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(tmp_path)
    request = ("the rain in the plain remains; le café", " ein Über-Wort")
    whole, part = (encode([multiple_choice([request], 0)], tokenizer, n) for n in (64, 9))
    length = whole.tokens.shape[1]
    assert torch.equal(part.tokens, whole.tokens[:, length - 9 :])
    assert torch.equal(part.scored[:, 1:], whole.scored[:, length - 8 :]) and not part.scored[0, 0]


def test_accuracies_of_variants_are_those_of_the_cut_models(tmp_path: Path) -> None:
    path = small.teacher(tmp_path / "teacher")
    tokenizer = load_tokenizer(path)
    questions = read_questions(str(written(tmp_path / "task.jsonl", *ROWS.values())))
    wrong = by_task(open_checkpoint(path), questions, tokenizer, 64, Pass(torch.float32, batch=3))(VARIANTS)
    for number, dropped in enumerate(VARIANTS):
        model, right = cut_model(path, dropped, tmp_path / str(number)), 0
        for form in ROWS:
            scores = []
            for context, continuation in PAIRS[form]:
                tokens = tokenizer(context + continuation, return_tensors="pt").input_ids
                start = len(tokenizer(context).input_ids)
                nats, _ = log_likelihoods(model, tokens)
                scores.append(nats[0, start - 1 :].sum().item() / len(continuation))
            right += scores.index(max(scores)) == RIGHT[form]
        assert wrong[number].item() == pytest.approx(1 - right / len(ROWS))
