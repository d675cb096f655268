"""Multiple-choice questions as texts to continue, from a .jsonl file or a task of lm-evaluation-harness.

A local row has the fields of one of these:

    ctx, endings, label                      HellaSwag and its like; label counts from 0
    sentence, option1, option2, answer       Winogrande: the option stands in the blank, and the rest is scored
    question, choices{text, label}, answerKey    ARC
    goal, sol1, sol2, label                  PIQA
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minitron.core.errors import DataError, did_you_mean
from minitron.core.reading import json_name, read_text
from minitron.evaluation.tasks.rows import JsonRow, placed_rows
from minitron.model.tokens import first_token, put_around, text_ids

# The log-likelihood of a request's continuation in nats, and whether each of its tokens was the likeliest.
RequestResult = tuple[float, bool]


@dataclass(frozen=True)
class Question:
    """Requests, each a context and its continuation, and a function that grades their results from 0 to 1."""

    requests: tuple[tuple[str, str], ...]
    grade: Callable[[Sequence[RequestResult]], float]


def read_questions(source: str, limit: int | None = None) -> list[Question]:
    """Read the first `limit` questions of a .jsonl file, or of a task that lm-evaluation-harness knows by this name.

    Raises: DataError if there is neither, or a row is none of the forms above.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path) and path.suffix != ".yaml":
        questions = [_question(*placed) for placed in islice(placed_rows(path, DataError), limit)]
    elif path.suffix.lower() == ".jsonl":
        raise DataError(f"task file {source} does not exist")
    else:
        questions = _read_harness(source, limit)
    if not questions:
        raise DataError(f"task {source!r} has no questions")
    return questions


def multiple_choice(pairs: Sequence[tuple[str, str]], right: int) -> Question:
    """Make a question that is graded by the likeliest continuation per character, which the harness calls acc_norm.

    Where all continuations are one text, as in Winogrande, that is plain accuracy.
    """

    def grade(results: Sequence[RequestResult]) -> float:
        per_char = [nats / len(text) for (nats, _), (_, text) in zip(results, pairs, strict=True)]
        return float(per_char.index(max(per_char)) == right)

    return Question(tuple(pairs), grade)


@dataclass(frozen=True)
class Encoded:
    """Requests as rows of tokens, padded on the right, with a mask of the continuations."""

    tokens: Int[Tensor, "requests tokens"]
    scored: Bool[Tensor, "requests tokens"]


def encode(questions: Sequence[Question], tokenizer: Any, max_tokens: int) -> Encoded:
    """Tokenize every request of every question, in order.

    Context and continuation are tokenized as one text; spaces at the context's end go to the continuation. A text of
    more than `max_tokens` loses its beginning.
    """
    rows = [_encode(tokenizer, *request) for question in questions for request in question.requests]
    rows = [(tokens[-max_tokens:], min(count, max_tokens - 1)) for tokens, count in rows]
    longest = max(len(tokens) for tokens, _ in rows)
    padded = torch.zeros(len(rows), longest, dtype=torch.int64)
    scored = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (tokens, count) in enumerate(rows):
        padded[row, : len(tokens)] = torch.tensor(tokens)
        scored[row, len(tokens) - count : len(tokens)] = True
    return Encoded(padded, scored)


def _encode(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of both texts together, and the number of them that belong to the continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before, whole = text_ids(tokenizer, context), text_ids(tokenizer, context + continuation)
    prefix = put_around(tokenizer)[0]
    if not prefix and not before:
        need = (
            f"the question that goes on with {continuation[:40]!r} has an empty context, and the model cannot be asked"
        )
        prefix = [first_token(tokenizer, need, "give questions with a context")]
    count = max(1, len(whole) - len(before))
    return [*prefix, *whole], min(count, len(prefix) + len(whole) - 1)


def _question(where: str, row: JsonRow) -> Question:
    fields = next((fields for fields in FORMS if row.keys() >= set(fields)), None)
    if fields is None:
        known = "; ".join(", ".join(fields) for fields in FORMS)
        raise DataError(f"{where} has the fields {', '.join(row)}, and a question has those of one of: {known}")
    try:
        pairs, right = FORMS[fields](row)
        fits = 0 <= right < len(pairs) and all(text for _, text in pairs)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{where}: {', '.join(fields)} do not make a question: {error!r}") from None
    if not fits:
        raise DataError(f"{where}: the answer is number {right} of {len(pairs)}, or one of them is empty")
    return multiple_choice(pairs, right)


def _endings(row: JsonRow) -> tuple[list[tuple[str, str]], int]:
    return [(_text(row["ctx"]), f" {ending}") for ending in _texts(row["endings"])], _number(row["label"])


def _blank(row: JsonRow) -> tuple[list[tuple[str, str]], int]:
    before, blank, after = _text(row["sentence"]).partition("_")
    if not blank:
        raise ValueError("the sentence has no blank _")
    pairs = [(before + _text(row[option]), f" {after.strip()}") for option in ("option1", "option2")]
    return pairs, _number(row["answer"]) - 1


def _question_with_choices(row: JsonRow) -> tuple[list[tuple[str, str]], int]:
    choices = row["choices"]
    pairs = [(f"Question: {_text(row['question'])}\nAnswer:", f" {text}") for text in _texts(choices["text"])]
    return pairs, _texts(choices["label"]).index(row["answerKey"])


def _goal(row: JsonRow) -> tuple[list[tuple[str, str]], int]:
    context = f"Question: {_text(row['goal'])}\nAnswer:"
    return [(context, f" {_text(row[solution])}") for solution in ("sol1", "sol2")], _number(row["label"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{json_name(value)} where text is expected")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError(f"{json_name(value)} where a list of texts is expected")
    return [_text(text) for text in value]


def _number(value: Any) -> int:
    """The number of an answer, which some datasets write as text."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{value!r} where the number of the answer is expected")
    return int(value)


# Fields that tell a form -> pairs of context and continuation, and the number of the right one.
FORMS: dict[tuple[str, ...], Callable[[JsonRow], tuple[list[tuple[str, str]], int]]] = {
    ("ctx", "endings", "label"): _endings,
    ("sentence", "option1", "option2", "answer"): _blank,
    ("question", "choices", "answerKey"): _question_with_choices,
    ("goal", "sol1", "sol2", "label"): _goal,
}


def _read_harness(name: str, limit: int | None) -> list[Question]:
    """Read the questions of a task of lm-evaluation-harness, or of each task of a group, `limit` in all.

    The name may be a .yaml file that describes a task as the harness's files do. The task grades them: by acc_norm
    where it has that, else by acc.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise DataError(
            f"task {name!r} is no .jsonl file, and other tasks need lm-evaluation-harness: `pip install lm_eval`, "
            "or give a .jsonl file of questions"
        ) from None
    file = Path(name).expanduser()
    if file.suffix == ".yaml":
        known, manager = _name_in(file), TaskManager(include_path=str(file.parent), include_defaults=False)
    else:
        known, manager = name, TaskManager()
    if known not in manager.all_tasks:
        raise DataError(f"{name!r} is neither a .jsonl file nor a task of lm-evaluation-harness{_near(known, manager)}")
    try:
        tasks = list(manager.load([known])["tasks"].values())
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"task {name!r} cannot be loaded by lm-evaluation-harness: {reason}") from None
    of_each = None if limit is None else -(-limit // len(tasks))
    return [question for task in tasks for question in _harness_questions(task, of_each)][:limit]


def _harness_questions(task: Any, limit: int | None) -> list[Question]:
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    by_doc: dict[int, list[Any]] = {}
    for request in task.instances:
        if request.request_type != "loglikelihood":
            raise DataError(
                f"task {task.config.task!r} asks for {request.request_type}; layers are scored by tasks that ask for "
                "loglikelihood, such as winogrande or hellaswag"
            )
        by_doc.setdefault(request.doc_id, []).append(request)
    return [_harness_question(task, requests) for requests in by_doc.values()]


def _name_in(file: Path) -> str:
    """The name of the task in a task file, whose tags for functions of the harness are not resolved."""
    names = re.findall(r"^task:\s*(\S+)", read_text(file, DataError), re.MULTILINE) if file.is_file() else []
    if not names:
        raise DataError(f"task file {file} does not exist, or names no task")
    return names[0]


def _harness_question(task: Any, requests: Sequence[Any]) -> Question:
    def grade(results: Sequence[RequestResult]) -> float:
        measured = task.process_results(requests[0].doc, list(results))
        return float(measured["acc_norm"] if "acc_norm" in measured else measured["acc"])

    return Question(tuple((str(request.args[0]), str(request.args[1])) for request in requests), grade)


def _near(name: str, manager: Any) -> str:
    """Suggest the nearest task, without a list of the harness's thousands of tasks."""
    return did_you_mean(name, manager.all_tasks).partition(" Available:")[0].rstrip("?.;")
