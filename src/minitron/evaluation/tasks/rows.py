"""Benchmarks from local files: one folder per task, with rows as the task's own dataset has them.

    bench/
      hellaswag/dev.jsonl                     any file of a folder that is not its few-shot set is test set
      gsm8k/test.jsonl, gsm8k/fewshot.jsonl   examples for the prompt
      mmlu/dev/anatomy.jsonl, mmlu/fewshot/anatomy.jsonl   MMLU: a file per subject, or a key `subject`
      my_choices/rows.jsonl                   any name: ctx, endings, label, or ctx, target

Rows are read and checked here, without a network or a cache. A layout lists the fields that the harness's prompt of the
task reads.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.errors import TaskError, did_you_mean
from minitron.core.reading import Kind, find_files, read_rows, require_file, require_texts

JsonRow = dict[str, Any]
FEWSHOT = "fewshot"
SUFFIXES = (".jsonl",)
CHOICE, LAST_WORD = "choice", "last word"  # the kinds of rows that a folder of any name may hold


@dataclass(frozen=True)
class ValueKind:
    """What the value of a field must be: in words, and as a test that sees the whole row."""

    words: str
    fits: Callable[[Any, JsonRow], bool]


@dataclass(frozen=True)
class LocalTask:
    """The rows of a folder, read and checked.

    task: the harness's name of the task, or the folder's name where its rows are of a general kind.
    parts: subject -> rows of the test set; a task without subjects has one part named "".
    fewshot: subject -> rows of the few-shot set; empty where the folder has none.
    left_out: one sentence on files of the folder that are not read.
    """

    folder: Path
    task: str
    kind: str | None
    parts: Mapping[str, list[JsonRow]]
    fewshot: Mapping[str, list[JsonRow]]
    digest: str
    left_out: str | None = None


def _is_index(value: Any, most: int) -> bool:
    """Whether the value is the number of an answer, from 0; some datasets write it as text."""
    number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) <= len(str(most)) else value
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < most


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) and text for text in value)


def _has_answers(value: Any, row: JsonRow) -> bool:
    return (
        isinstance(value, dict)
        and _are_texts(value.get("text"))
        and _are_texts(value.get("label"))
        and len(value["text"]) == len(value["label"])
    )


def _has_truths(value: Any, row: JsonRow) -> bool:
    if not isinstance(value, dict) or not _are_texts(value.get("choices")):
        return False
    labels = value.get("labels")
    if not isinstance(labels, list) or len(labels) != len(value["choices"]):
        return False
    return all(isinstance(label, int) for label in labels) and {*labels} == {0, 1}


def _choices_of(row: JsonRow, key: str) -> int:
    return len(row[key]) if _are_texts(row.get(key)) else 0


TEXT = ValueKind("text that is not empty", lambda value, row: isinstance(value, str) and value.strip() != "")
ANY_TEXT = ValueKind("text", lambda value, row: isinstance(value, str))
TEXTS = ValueKind("a list of texts", lambda value, row: _are_texts(value))
BLANK = ValueKind("text with the blank _ in it", lambda value, row: isinstance(value, str) and "_" in value)
OPTION = ValueKind('"1" or "2"', lambda value, row: value in ("1", "2"))
LABEL_OF_ENDINGS = ValueKind(
    "the number of the right one of the endings, from 0",
    lambda value, row: _is_index(value, _choices_of(row, "endings")),
)
LABEL_OF_TWO = ValueKind("0 or 1", lambda value, row: _is_index(value, 2) and not isinstance(value, str))
ANSWER_OF_FOUR = ValueKind(
    "the number of the right choice, from 0 to 3", lambda value, row: _is_index(value, 4) and not isinstance(value, str)
)
FOUR_TEXTS = ValueKind("a list of four texts", lambda value, row: _are_texts(value) and len(value) == 4)
ANSWERS = ValueKind('{"text": [...], "label": [...]}, as many labels as texts', _has_answers)
ANSWER_KEY = ValueKind(
    "one of the labels of the choices",
    lambda value, row: _has_answers(row.get("choices"), row) and value in row["choices"]["label"],
)
TRUTHS = ValueKind(
    '{"choices": [...], "labels": [...]}, with a label 1 or 0 for each choice and both of them', _has_truths
)
THREE_TESTS = ValueKind("a list of at least three texts", lambda value, row: _are_texts(value) and len(value) >= 3)
FINAL_ANSWER = ValueKind(
    "text with the answer behind ####", lambda value, row: isinstance(value, str) and "#### " in value
)
WORDS = ValueKind("text of at least two words", lambda value, row: isinstance(value, str) and " " in value.strip())

_ARC = {"question": TEXT, "choices": ANSWERS, "answerKey": ANSWER_KEY}
# Task of the harness -> the fields of a row that its prompt reads.
LAYOUTS: dict[str, dict[str, ValueKind]] = {
    "winogrande": {"sentence": BLANK, "option1": TEXT, "option2": TEXT, "answer": OPTION},
    "arc_challenge": _ARC,
    "arc_easy": _ARC,
    "hellaswag": {
        "activity_label": TEXT,
        "ctx_a": TEXT,
        "ctx_b": ANY_TEXT,
        "endings": TEXTS,
        "label": LABEL_OF_ENDINGS,
    },
    "mmlu": {"question": TEXT, "choices": FOUR_TEXTS, "answer": ANSWER_OF_FOUR},
    "gsm8k": {"question": TEXT, "answer": FINAL_ANSWER},
    "truthfulqa_mc2": {"question": TEXT, "mc2_targets": TRUTHS},
    "xlsum_english": {"text": TEXT, "summary": TEXT},
    "mbpp": {"text": TEXT, "code": ANY_TEXT, "test_list": THREE_TESTS},
    "humaneval": {"prompt": TEXT, "test": TEXT, "entry_point": TEXT},
    "piqa": {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": LABEL_OF_TWO},
    "lambada_openai": {"text": WORDS},
}
GENERAL_ROWS: dict[str, dict[str, ValueKind]] = {
    CHOICE: {"ctx": TEXT, "endings": TEXTS, "label": LABEL_OF_ENDINGS},
    LAST_WORD: {"ctx": TEXT, "target": TEXT},
}
# Other names that a folder may have.
ALIASES = {
    "truthfulqa_mc": "truthfulqa_mc2",
    "truthfulqa": "truthfulqa_mc2",
    "arc": "arc_challenge",
    "lambada": "lambada_openai",
    "xlsum": "xlsum_english",
}


def task_of(folder: str) -> str:
    return ALIASES.get(folder, folder)


def find_folders(directory: Path) -> dict[str, Path]:
    """Find the folders that hold rows: task -> its folder.

    Raises: TaskError if the directory has none, or two for one task.
    """
    if not directory.is_dir():
        raise TaskError(f"--tasks-dir {directory} is not a directory")
    found: dict[str, Path] = {}
    for folder in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if find_files(folder, SUFFIXES, TaskError).files:
            other = found.setdefault(task_of(folder.name), folder)
            if other != folder:
                raise TaskError(f"{other} and {folder} both hold the task {task_of(folder.name)}: keep one of them")
    if not found:
        raise TaskError(f"{directory} has no folders with .jsonl files: one folder per task is expected")
    return found


def read_task(folder: Path) -> LocalTask:
    """Read the rows of a folder.

    Raises: TaskError naming file, line, key and the value that is expected there.
    """
    task = task_of(folder.name)
    found = find_files(folder, SUFFIXES, TaskError)
    parts: dict[str, list[JsonRow]] = {}
    fewshot: dict[str, list[JsonRow]] = {}
    digest, layout, kind = hashlib.sha256(), LAYOUTS.get(task), None
    for file in found.files:
        is_fewshot = FEWSHOT in file.relative_to(folder).with_suffix("").parts
        require_file(file, TaskError)
        data, rows = file.read_bytes(), list(placed_rows(file, TaskError))
        digest.update(f"{is_fewshot} {file.stem} {len(data)}\n".encode() + data)
        if not rows:
            raise TaskError(f"{file} has no rows")
        if layout is None:
            kind = _kind_of(file, rows[0][1], task)
            layout = GENERAL_ROWS[kind]
        for place, row in rows:
            _check(place, row, layout)
            subject = str(row.get("subject", file.stem)) if task == "mmlu" else ""
            (fewshot if is_fewshot else parts).setdefault(subject, []).append(row)
    if not parts:
        raise TaskError(f"{folder} has a few-shot set and no test set: add a .jsonl file of another name")
    return LocalTask(folder, task, kind, parts, fewshot, digest.hexdigest(), found.left_out)


def placed_rows(file: Path, error: Kind) -> Iterator[tuple[str, JsonRow]]:
    """Read the rows of a .jsonl file, each with its file and line.

    Raises: `error` for a line that is no JSON object, or has text that is not Unicode.
    """
    for number, row in read_rows(file, error):
        place = f"{file}, line {number}"
        require_texts(row, place, error)
        yield place, row


def _kind_of(file: Path, row: JsonRow, task: str) -> str:
    """The general kind of the rows in a folder whose name is no task."""
    for kind, layout in GENERAL_ROWS.items():
        if row.keys() >= layout.keys():
            return kind
    general = " or ".join(", ".join(layout) for layout in GENERAL_ROWS.values())
    known = did_you_mean(task, [*LAYOUTS, *ALIASES])
    raise TaskError(
        f"{file.parent.name} is no task whose rows are known{known}. A folder of another name needs rows with the keys "
        f"{general}, and those of {file} have {', '.join(row) or 'none'}"
    )


def _check(place: str, row: JsonRow, layout: Mapping[str, ValueKind]) -> None:
    for key, kind in layout.items():
        if key not in row:
            raise TaskError(
                f"{place}: key {key!r} is missing; {kind.words} is expected there (a row needs {', '.join(layout)})"
            )
        if not kind.fits(row[key], row):
            shown = json.dumps(row[key], ensure_ascii=False)
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            raise TaskError(f"{place}: key {key!r} is {shown}; {kind.words} is expected there")
