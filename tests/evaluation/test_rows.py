"""Local rows are read as they are, and a wrong layout is named by file, line and key."""

import json
from pathlib import Path
from typing import Any

import bench
import pytest

from minitron.core.errors import TaskError
from minitron.evaluation.tasks.rows import CHOICE, LAST_WORD, find_folders, read_task


@pytest.mark.parametrize("task", [*bench.LIKELIHOOD, *bench.GENERATED])
def test_rows_are_those_of_the_files(task: str, tmp_path: Path) -> None:
    bench.write(tmp_path, (task,))
    read = read_task(tmp_path / task)
    names = {"truthfulqa_mc": "truthfulqa_mc2"}
    assert read.task == names.get(task, task)
    assert read.kind == {"stories": CHOICE, "last_words": LAST_WORD}.get(task)
    if task == "mmlu":
        assert read.parts == {subject: bench.rows(task, 6, n) for n, subject in enumerate(bench.SUBJECTS)}
        assert read.fewshot == {subject: bench.rows(task, 5, 10 + n) for n, subject in enumerate(bench.SUBJECTS)}
    else:
        assert read.parts == {"": bench.rows(task, 6)}
        assert read.fewshot == ({"": bench.rows(task, 5, 1)} if task == "gsm8k" else {})


def test_any_file_that_is_not_the_few_shot_set_is_test_set(tmp_path: Path) -> None:
    one, two = bench.rows("gsm8k", 3), bench.rows("gsm8k", 2, 5)
    bench.dump(tmp_path / "gsm8k" / "a.jsonl", one)
    bench.dump(tmp_path / "gsm8k" / "more" / "z.jsonl", two)
    bench.dump(tmp_path / "gsm8k" / "fewshot" / "train.jsonl", bench.rows("gsm8k", 4, 7))
    read = read_task(tmp_path / "gsm8k")
    assert read.parts == {"": one + two} and len(read.fewshot[""]) == 4


def test_subjects_are_also_told_by_a_key(tmp_path: Path) -> None:
    rows = [row | {"subject": subject} for subject in bench.SUBJECTS for row in bench.rows("mmlu", 2)]
    bench.dump(tmp_path / "mmlu" / "test.jsonl", rows)
    assert {name: len(part) for name, part in read_task(tmp_path / "mmlu").parts.items()} == dict.fromkeys(
        bench.SUBJECTS, 2
    )


def test_the_digest_tells_rows_and_sides_apart(tmp_path: Path) -> None:
    bench.dump(tmp_path / "gsm8k" / "test.jsonl", bench.rows("gsm8k", 4))
    first = read_task(tmp_path / "gsm8k").digest
    assert read_task(tmp_path / "gsm8k").digest == first
    bench.dump(tmp_path / "gsm8k" / "fewshot.jsonl", bench.rows("gsm8k", 4))
    both = read_task(tmp_path / "gsm8k").digest
    bench.dump(tmp_path / "gsm8k" / "test.jsonl", bench.rows("gsm8k", 4, 1))
    assert len({first, both, read_task(tmp_path / "gsm8k").digest}) == 3


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (
        "winogrande",
        {"sentence": "no gap here"},
        "key 'sentence' is \"no gap here\"; text with the blank _ in it",
    ),
    ("winogrande", {"answer": 1}, 'key \'answer\' is 1; "1" or "2" is expected'),
    ("winogrande", {"option2": None}, "key 'option2' is null; text that is not empty is expected"),
    ("arc_challenge", {"choices": ["a", "b"]}, "key 'choices' is .*as many labels as texts is expected"),
    ("arc_challenge", {"answerKey": "E"}, "key 'answerKey' is \"E\"; one of the labels of the choices is expected"),
    ("hellaswag", {"label": 4}, "key 'label' is 4; the number of the right one of the endings, from 0 is expected"),
    ("hellaswag", {"endings": "one"}, "key 'endings' is \"one\"; a list of texts is expected"),
    ("mmlu", {"choices": ["a"] * 3}, "a list of four texts is expected"),
    ("mmlu", {"answer": "B"}, "key 'answer' is \"B\"; the number of the right choice, from 0 to 3 is expected"),
    ("gsm8k", {"answer": "42"}, "text with the answer behind #### is expected"),
    ("truthfulqa_mc", {"mc2_targets": {"choices": ["a"], "labels": [2]}}, "a label 1 or 0 for each choice"),
    ("truthfulqa_mc", {"mc2_targets": {"choices": ["a"], "labels": [[1]]}}, "a label 1 or 0 for each choice"),
    ("hellaswag", {"label": "1" * 5000}, "the number of the right one of the endings, from 0 is expected"),
    ("mbpp", {"test_list": ["assert True"]}, "a list of at least three texts is expected"),
    ("piqa", {"label": True}, "key 'label' is true; 0 or 1 is expected"),
    ("lambada_openai", {"text": "word"}, "text of at least two words is expected"),
    ("stories", {"label": -1}, "the number of the right one of the endings, from 0 is expected"),
]


@pytest.mark.parametrize(("task", "change", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_value_is_named_with_what_is_expected(
    task: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = bench.rows(task, 3)
    file = bench.dump(tmp_path / task / "dev.jsonl", [rows[0], rows[1], rows[2] | change])
    with pytest.raises(TaskError, match=rf"dev.jsonl, line 3: .*{message}"):
        read_task(file.parent)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    for task in [*bench.LIKELIHOOD, *bench.GENERATED]:
        rows = bench.rows(task, 2)
        key = list(rows[1])[-1]
        del rows[1][key]
        bench.dump(tmp_path / task / "dev.jsonl", rows)
        with pytest.raises(TaskError, match=rf"line 2: key '{key}' is missing; .* is expected there \(a row needs"):
            read_task(tmp_path / task)


def test_what_is_no_row_is_named(tmp_path: Path) -> None:
    file = bench.dump(tmp_path / "piqa" / "dev.jsonl", bench.rows("piqa", 1))
    good = file.read_text()
    for text, message in (
        (f"{good}\n{{oops", r"dev.jsonl, line 3, is not JSON: .* one JSON object a line"),
        (f"{good}[1]\n", "dev.jsonl, line 2: a row must be a JSON object, not a list"),
        ("\n", "dev.jsonl has no rows"),
    ):
        file.write_text(text)
        with pytest.raises(TaskError, match=message):
            read_task(file.parent)
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(TaskError, match="line 1, is UTF-16 text, by its byte order mark"):
        read_task(file.parent)
    for change, message in (
        ({"goal": "a\0b"}, "line 1 is binary: .* NUL"),
        ({"goal": "\ud83d"}, "line 1 is no Unicode"),
    ):
        bench.dump(file, [bench.rows("piqa", 1)[0] | change])
        with pytest.raises(TaskError, match=message):
            read_task(file.parent)


def test_rows_of_hidden_files_are_not_measured_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    file = bench.dump(tmp_path / "piqa" / "DEV.JSONL", bench.rows("piqa", 3))
    bench.dump(tmp_path / "piqa" / ".ipynb_checkpoints" / "dev-checkpoint.jsonl", bench.rows("piqa", 3))
    (tmp_path / "piqa" / "test.jsonl.gz").write_bytes(b"")
    bench.dump(tmp_path / ".hidden" / "dev.jsonl", bench.rows("piqa", 3))
    read = read_task(file.parent)
    assert len(read.parts[""]) == 3 and find_folders(tmp_path) == {"piqa": file.parent}
    assert read.left_out and "1 .gz (test.jsonl.gz)" in read.left_out and "1 hidden" in read.left_out
    file.unlink()
    file.symlink_to("nowhere")
    with pytest.raises(TaskError, match="is a link to nowhere, which does not exist"):
        read_task(file.parent)


def test_a_folder_that_tells_nothing_needs_rows_of_a_general_kind(tmp_path: Path) -> None:
    bench.dump(tmp_path / "helaswag" / "dev.jsonl", [{"a": 1}])
    message = (
        "helaswag is no task whose rows are known; did you mean 'hellaswag'.* needs rows with the keys "
        "ctx, endings, label or ctx, target, and those of .* have a"
    )
    with pytest.raises(TaskError, match=message):
        read_task(tmp_path / "helaswag")
    bench.dump(tmp_path / "gsm8k" / "fewshot.jsonl", bench.rows("gsm8k", 2))
    with pytest.raises(TaskError, match="has a few-shot set and no test set"):
        read_task(tmp_path / "gsm8k")


def test_folders_are_found_by_task(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="nowhere is not a directory"):
        find_folders(tmp_path / "nowhere")
    (tmp_path / "notes").mkdir()
    with pytest.raises(TaskError, match=r"has no folders with .jsonl files: one folder per task is expected"):
        find_folders(tmp_path)
    bench.write(tmp_path, ("piqa", "truthfulqa_mc"))
    assert find_folders(tmp_path) == {"piqa": tmp_path / "piqa", "truthfulqa_mc2": tmp_path / "truthfulqa_mc"}
    bench.dump(tmp_path / "truthfulqa_mc2" / "dev.jsonl", bench.rows("truthfulqa_mc", 1))
    with pytest.raises(TaskError, match=r"truthfulqa_mc and .*truthfulqa_mc2 both hold the task truthfulqa_mc2"):
        find_folders(tmp_path)


def test_a_number_that_is_text_stands_for_its_number(tmp_path: Path) -> None:
    rows = [row | {"label": str(row["label"])} for row in bench.rows("hellaswag", 2)]
    file = bench.dump(tmp_path / "hellaswag" / "dev.jsonl", rows)
    assert read_task(file.parent).parts[""] == [json.loads(line) for line in file.read_text().splitlines()]
