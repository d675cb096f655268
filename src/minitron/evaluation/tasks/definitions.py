"""The definition of a task of lm-evaluation-harness by its name, with local rows where there are some.

The harness's definitions stay as they are but for the source of rows. Only XL-Sum, which the harness lacks, and folders
of a general kind are defined here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from minitron.core.errors import TaskError, did_you_mean
from minitron.evaluation.tasks.rows import CHOICE, LAST_WORD, LAYOUTS, JsonRow, LocalTask
from minitron.evaluation.tasks.suite import SUITE, BenchmarkTask

# The keys of a task's definition, as the harness reads them.
TaskConfig = dict[str, Any]
# The harness's files of common tasks; other tasks are found by searching its files.
FILES = {
    "winogrande": "winogrande/default.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "mmlu": "mmlu/default/_mmlu.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "mbpp": "mbpp/mbpp.yaml",
    "humaneval": "humaneval/humaneval.yaml",
    "piqa": "piqa/piqa.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}
SUBJECTS = "mmlu/default/mmlu_{subject}.yaml"
# Folders of tasks that run programs through the metric code_eval, and of tasks that run them by themselves.
RUN_BY_CODE_EVAL = ("humaneval", "humaneval_infilling", "mbpp")
RUN_BY_THEMSELVES = ("cruxeval", "longproc")
NAMED = re.compile(r"""^["']?(?:task|group|tag)["']?:[ \t]*["']?([^\s"'\[]+)["']?[ \t]*$""", re.MULTILINE)
TAGS = re.compile(r"^tag:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n)+)", re.MULTILINE)

# The harness has no XL-Sum. Every fifth article of its test set is measured, 20%, as in the papers.
XLSUM: TaskConfig = {
    "task": "xlsum_english",
    "dataset_path": "csebuetnlp/xlsum",
    "dataset_name": "english",
    "dataset_kwargs": {"revision": "refs/convert/parquet"},
    "output_type": "generate_until",
    "training_split": "train",
    "fewshot_split": "train",
    "test_split": "test",
    "doc_to_text": "Article: {{text}}\nSummary:",
    "doc_to_target": "{{summary}}",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 128},
    "metadata": {"version": 1.0},
}
# Rows of local folders whose name is no task of the harness.
GENERAL_TASKS: dict[str, TaskConfig] = {
    CHOICE: {
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "{{label}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    },
    LAST_WORD: {
        "output_type": "loglikelihood",
        "doc_to_text": "{{ctx}}",
        "doc_to_target": "{{' ' + target}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
        "metadata": {"version": 1.0},
    },
}


def version() -> str:
    from importlib.metadata import version as of

    return of("lm_eval")


def require_known(benchmark: BenchmarkTask, local: LocalTask | None, *, allow_code: bool) -> None:
    """Raises: TaskError for an unknown task, or a task that runs generated code without permission."""
    name = benchmark.task
    if local is not None and local.kind is not None:
        return
    if name == XLSUM["task"]:
        return
    file = _file_of(name)
    folder = file.relative_to(_root()).parts[0]
    unsafe = bool(_plain(file).get("unsafe_code")) or folder in (*RUN_BY_CODE_EVAL, *RUN_BY_THEMSELVES)
    if unsafe and folder not in RUN_BY_CODE_EVAL:
        raise TaskError(
            f"task {name!r} runs what the model writes by itself, outside of the sandbox; it cannot be measured here"
        )
    if unsafe and not allow_code:
        raise TaskError(
            f"task {name!r} runs Python code that the model writes. It runs in a sandbox without network or files; "
            "allow it with --allow-code, or leave the task out"
        )


def runs_code(name: str) -> bool:
    return name != XLSUM["task"] and _file_of(name).relative_to(_root()).parts[0] in RUN_BY_CODE_EVAL


def definition(benchmark: BenchmarkTask, local: LocalTask | None) -> tuple[Any, str | None]:
    """The task as the harness loads it, and the folder of the harness's files that belong to it."""
    name = benchmark.task
    if local is None:
        if name == XLSUM["task"]:
            return XLSUM | {"process_docs": _every_fifth} | _rouge(), None
        file = _file_of(name)
        return name, str(_root() / file.relative_to(_root()).parts[0])
    if local.task == "mmlu":
        return _group(
            _plain(_file_of("mmlu")), [_subject(benchmark, local, name) for name in sorted(local.parts)]
        ), None
    if local.kind is not None:
        stock = GENERAL_TASKS[local.kind] | {"task": name}
    elif name == XLSUM["task"]:
        stock = XLSUM | _rouge()
    else:
        stock = _loaded_yaml(_file_of(name))
    return _on_rows(stock, benchmark, local.folder, local.parts[""], local.fewshot.get("", [])), None


def _group(stock: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> Any:
    """Make a group of the harness with other members, whose metrics it averages alike."""
    from lm_eval.api.group import Group
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.config.group import GroupConfig

    group = Group.from_config(GroupConfig(**{**stock, "task": []}))
    for member in members:
        group.add(ConfigurableTask(config=dict(member)))
    return group


def _subject(benchmark: BenchmarkTask, local: LocalTask, subject: str) -> TaskConfig:
    file = _root() / SUBJECTS.format(subject=subject)
    if not file.is_file():
        known = [one.stem.removeprefix("mmlu_") for one in (_root() / "mmlu" / "default").glob("mmlu_*.yaml")]
        raise TaskError(f"{local.folder}: MMLU has no subject {subject!r}{did_you_mean(subject, known)}")
    return _on_rows(
        _loaded_yaml(file), benchmark, local.folder, local.parts[subject], local.fewshot.get(subject, []), subject
    )


def _on_rows(
    stock: Mapping[str, Any],
    benchmark: BenchmarkTask,
    folder: Path,
    rows: Sequence[JsonRow],
    fewshot: Sequence[JsonRow],
    subject: str = "",
) -> TaskConfig:
    """Replace the rows of the harness's definition of a task."""
    of_task = (stock.get("fewshot_config") or {}).get("samples")  # the task brings its own examples
    shots = benchmark.shots if benchmark.shots is not None else stock.get("num_fewshot") or 0
    pool = [] if of_task else fewshot or rows
    # Without a few-shot set the harness takes other rows of the test set, never the one that is asked.
    least = shots if of_task or fewshot else shots + 1
    if not of_task and len(pool) < least:
        where = f"{folder}{f', subject {subject}' if subject else ''}"
        kind = "few-shot" if fewshot else "test"
        raise TaskError(f"{where}: {shots} shots need {least} {kind} rows, and there are {len(pool)}; use --shots")
    changes: TaskConfig = {
        "dataset_path": "local",
        "dataset_name": None,
        "dataset_kwargs": None,
        "custom_dataset": _dataset({"test": rows, "fewshot": fewshot}),
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": None if of_task else "fewshot" if fewshot else "test",
    }
    return {key: value for key, value in stock.items() if key not in ("tag", "group")} | changes


def _dataset(splits: Mapping[str, Sequence[JsonRow]]) -> Callable[..., Any]:
    """Make a function that gives the harness its dataset in memory, with the keys of all rows in each row."""

    def make(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict
        from pyarrow import ArrowException

        made = {}
        for split, rows in splits.items():
            keys = dict.fromkeys(key for row in rows for key in row)
            try:
                if rows:
                    made[split] = Dataset.from_list([{key: row.get(key) for key in keys} for row in rows])
            except (ArrowException, TypeError) as error:
                raise ValueError(f"its rows are not of one kind: {error}") from None
        return DatasetDict(made)

    return make


def _every_fifth(docs: Any) -> Any:
    return docs.select(range(0, len(docs), 5))


def _rouge() -> TaskConfig:
    """The metric of XL-Sum: ROUGE-L of a summary, the F-measure with stemming, by the rouge_score package."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def process(doc: JsonRow, results: Sequence[str]) -> dict[str, float]:
        return {"rougeL": scorer.score(doc["summary"].strip(), results[0].strip())["rougeL"].fmeasure}

    metric = {"metric": "rougeL", "aggregation": "mean", "higher_is_better": True}
    return {"process_results": process, "metric_list": [metric]}


@cache
def _root() -> Path:
    from importlib.util import find_spec

    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def _file_of(name: str) -> Path:
    """Find the harness's file that defines a task or a group.

    Raises: TaskError, with the nearest name.
    """
    if name in FILES:
        return _root() / FILES[name]
    known = _all_files()
    if name not in known:
        near = did_you_mean(name, [*known, *SUITE, *LAYOUTS]).partition(" Available:")[0].rstrip(";")
        raise TaskError(f"there is no task {name!r} in lm-evaluation-harness {version()}{near}")
    return known[name]


@cache
def _all_files() -> dict[str, Path]:
    """Map each task, group and tag to the first file that names it, faster than the harness's index."""
    found: dict[str, Path] = {}
    for file in sorted(_root().rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        listed = [name for block in TAGS.findall(text) for name in re.findall(r"-[ \t]*(\S+)", block)]
        for name in [*NAMED.findall(text), *listed]:
            found.setdefault(name, file)
    return found


def _plain(file: Path) -> TaskConfig:
    """Load a definition with the names of its functions, without importing them."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(file, resolve_func=False)


def _loaded_yaml(file: Path) -> TaskConfig:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(file)
