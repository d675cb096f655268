"""The benchmarks of the Minitron papers, with their shots, and the results of a model and its teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minitron.core.errors import TaskError
from minitron.evaluation.layouts import TaskResult

# pass@1 at temperature 0.2 and top-p 0.95, as the papers measure it; the harness's own tasks are greedy.
SAMPLED_CODE = {"do_sample": True, "temperature": 0.2, "top_p": 0.95}


@dataclass(frozen=True)
class BenchmarkTask:
    """A task of the harness and how it is measured.

    shots: examples in the prompt; None for the task's number.
    metric: the metric that is the result; None for the first known.
    filter: the way of reading an answer; None for the first.
    generation: options of generated answers, on top of the task's.
    """

    task: str
    title: str
    shots: int | None = None
    metric: str | None = None
    filter: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)


# Paper: P1, "Evaluation Tasks" (section 4), and P2, "Evaluation"; the order is that of its tables.
SUITE: dict[str, BenchmarkTask] = {
    one.task: one
    for one in (
        BenchmarkTask("winogrande", "Winogrande", 5, "acc"),
        BenchmarkTask("arc_challenge", "ARC-Challenge", 25, "acc_norm"),
        BenchmarkTask("mmlu", "MMLU", 5, "acc"),
        BenchmarkTask("hellaswag", "HellaSwag", 10, "acc_norm"),
        BenchmarkTask("gsm8k", "GSM8K", 5, "exact_match", "strict-match"),
        BenchmarkTask("truthfulqa_mc2", "TruthfulQA mc2", 0, "acc"),
        BenchmarkTask("xlsum_english", "XL-Sum English", 3, "rougeL"),
        BenchmarkTask("mbpp", "MBPP", 0, "pass_at_1", generation=SAMPLED_CODE),
        BenchmarkTask("humaneval", "HumanEval", 0, "pass@1", generation=SAMPLED_CODE),
    )
}
# Names that stand for several tasks.
SUITES = {"minitron": SUITE}
# The metrics that are the result of a task outside the suite, in this order; else its first metric is.
PREFERRED = ("acc_norm", "acc", "exact_match", "pass@1")


def chosen(tasks: Sequence[str], shots: int | None = None) -> list[BenchmarkTask]:
    """The benchmarks of these names; the name of a suite stands for all of its tasks, measured as in the papers.

    Args:
        shots: instead of each task's number.

    Raises: TaskError for a name that is given twice.
    """
    tasks = [member for name in tasks for member in SUITES.get(name, [name])]
    twice = next((name for name in tasks if tasks.count(name) > 1), None)
    if twice is not None:
        raise TaskError(f"task {twice!r} is given twice")
    found = [SUITE.get(name, BenchmarkTask(name, name)) for name in tasks]
    return found if shots is None else [replace(one, shots=shots) for one in found]


def kept(student: TaskResult, teacher: TaskResult) -> float | None:
    """The student's share of the teacher's value; None where a smaller value is better or the teacher has none."""
    return student.value / teacher.value if teacher.higher_is_better and teacher.value > 0 else None


@dataclass(frozen=True)
class BenchmarkResult:
    """The results of one model in benchmarks, and of its teacher on the same items where there is one.

    tasks: task -> the model's result.
    teacher_tasks: task -> the teacher's result.
    """

    tasks: Mapping[str, TaskResult]
    teacher_tasks: Mapping[str, TaskResult] | None = None

    @property
    def kept(self) -> dict[str, float | None]:
        """Task -> the model's share of the teacher's value."""
        teacher = self.teacher_tasks or {}
        return {name: kept(result, teacher[name]) for name, result in self.tasks.items() if name in teacher}

    def to_dict(self) -> dict[str, object]:
        """The results as the command prints them; without a teacher, of the model alone."""
        facts: dict[str, object] = {"tasks": {name: result.to_dict() for name, result in self.tasks.items()}}
        if self.teacher_tasks is None:
            return facts
        teacher = {name: result.to_dict() for name, result in self.teacher_tasks.items()}
        return facts | {"teacher_tasks": teacher, "kept": self.kept}
