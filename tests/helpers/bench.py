"""Local rows of benchmarks, made up, in the layouts of their datasets."""

import json
import random
from pathlib import Path
from typing import Any

import small

WORDS = small.WORDS.split()


def _text(draw: random.Random, most: int = 5) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(2, most)))


def rows(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(f"{task} {seed}")
    return [_row(task, draw, number) for number in range(count)]


def _row(task: str, draw: random.Random, number: int) -> dict[str, Any]:
    texts = [_text(draw) for _ in range(4)]
    question = _text(draw, 8)
    match task:
        case "winogrande":
            sentence = f"{_text(draw)} _ {_text(draw)}"
            return {"sentence": sentence, "option1": texts[0], "option2": texts[1], "answer": draw.choice("12")}
        case "arc_challenge" | "arc_easy":
            choices = {"text": texts, "label": list("ABCD")}
            return {"question": question, "choices": choices, "answerKey": draw.choice("ABCD")}
        case "hellaswag":
            halves = {"ctx_a": question, "ctx_b": _text(draw), "activity_label": _text(draw)}
            return halves | {"endings": texts, "label": draw.randrange(4)}
        case "mmlu":
            return {"question": question, "choices": texts, "answer": draw.randrange(4)}
        case "gsm8k":
            return {"question": question, "answer": f"{texts[0]}\n#### {number}"}
        case "truthfulqa_mc":
            return {"question": question, "mc2_targets": {"choices": texts, "labels": [1, 0, 1, 0]}}
        case "xlsum_english":
            return {"text": question, "summary": texts[0]}
        case "mbpp":
            return {"text": question, "code": "pass", "test_list": [f"assert {number} == {n}" for n in range(3)]}
        case "humaneval":
            prompt, test = f"def same(x):  # {number}\n", "def check(same):\n    assert same(1) == 1\n"
            return {"prompt": prompt, "test": test, "entry_point": "same"}
        case "piqa":
            return {"goal": question, "sol1": texts[0], "sol2": texts[1], "label": draw.randrange(2)}
        case "lambada_openai":
            return {"text": _text(draw, 9)}
        case "stories":
            return {"ctx": question, "endings": texts, "label": draw.randrange(4)}
        case "last_words":
            return {"ctx": question, "target": draw.choice(WORDS)}
    raise AssertionError(task)


LIKELIHOOD = (
    *("winogrande", "arc_challenge", "arc_easy", "hellaswag", "mmlu", "truthfulqa_mc", "piqa", "lambada_openai"),
    *("stories", "last_words"),
)
GENERATED = ("gsm8k", "xlsum_english", "mbpp", "humaneval")
SUBJECTS = ("anatomy", "marketing")


def write(directory: Path, tasks: tuple[str, ...] = (*LIKELIHOOD, *GENERATED), count: int = 6) -> Path:
    """Folders of tasks; of MMLU some subjects with a few-shot set, of GSM8K a few-shot file."""
    for task in tasks:
        folder = directory / task
        if task == "mmlu":
            for number, subject in enumerate(SUBJECTS):
                dump(folder / "dev" / f"{subject}.jsonl", rows(task, count, number))
                dump(folder / "fewshot" / f"{subject}.jsonl", rows(task, 5, 10 + number))
            continue
        dump(folder / "dev.jsonl", rows(task, count))
        if task == "gsm8k":
            dump(folder / "fewshot.jsonl", rows(task, 5, 1))
    return directory


def dump(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
