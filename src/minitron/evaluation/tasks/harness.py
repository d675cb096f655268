"""Tasks of lm-evaluation-harness, loaded and run by it.

Prompts, filters, metrics and standard errors are the harness's; the source of rows (definitions.py) and the process for
generated code (sandbox.py) are minitron's.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minitron.core.errors import TaskError
from minitron.evaluation.layouts import TaskResult
from minitron.evaluation.tasks.definitions import RUN_BY_CODE_EVAL, definition
from minitron.evaluation.tasks.rows import JsonRow, LocalTask
from minitron.evaluation.tasks.sandbox import code_eval
from minitron.evaluation.tasks.suite import PREFERRED, BenchmarkTask

INSTALL = "pip install 'minitron[eval]'"
FEWSHOT_SEED = 1234  # the harness's own
SAMPLING_SEED = 1234
BOOTSTRAP_DRAWS = 1000  # for metrics whose standard error has no formula


@dataclass(frozen=True)
class Task:
    """A task of the harness, or a group of them, ready to run.

    loaded: the argument of the harness's own evaluate.
    """

    benchmark: BenchmarkTask
    loaded: Any

    @property
    def members(self) -> list[Any]:
        return list(self.loaded["tasks"].values())

    @property
    def generates(self) -> bool:
        return any(member.OUTPUT_TYPE == "generate_until" for member in self.members)


def require_harness() -> None:
    """Raises: TaskError if the harness is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("lm_eval", "accelerate", "datasets") if find_spec(name) is None]
    if missing:
        raise TaskError(f"benchmarks need {' and '.join(missing)}, which is not installed: {INSTALL}")


def load_task(benchmark: BenchmarkTask, local: LocalTask | None) -> Task:
    """Load a task with its rows, from the hub where there are no local rows.

    Raises: TaskError if they cannot be loaded, or are too few for the shots.
    """
    from lm_eval.tasks import TaskManager

    with quietly(), _executing_code():
        spec, near = definition(benchmark, local)
        try:
            try:
                loaded = TaskManager(include_path=near, include_defaults=False).load([spec])
            except KeyError:  # a group of members from all over
                loaded = TaskManager().load([spec])
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise TaskError(
                f"task {benchmark.task!r} cannot be loaded: {reason}. Where the hub is out of reach, give its rows "
                "with --tasks-dir"
            ) from None
    if len(loaded["tasks"]) > 1 and benchmark.task not in loaded["groups"]:
        members = ",".join(loaded["tasks"])
        raise TaskError(f"{benchmark.task!r} stands for several tasks without a value of their own: --tasks {members}")
    task = Task(benchmark, loaded)
    for member in task.members:
        if benchmark.shots is not None:
            member.set_config("num_fewshot", benchmark.shots)
        elif member.get_config("num_fewshot") is None:
            member.set_config("num_fewshot", 0)
        if member.OUTPUT_TYPE == "generate_until" and benchmark.generation:
            member.set_config("generation_kwargs", dict(benchmark.generation), update=True)
    return task


def run_task(
    task: Task, model: Any, *, limit: int | None = None, chat: bool = False, samples: bool = False
) -> tuple[TaskResult, dict[str, list[JsonRow]]]:
    """Run a task with one model; returns the result, and with `samples` every item of every member of the task.

    Args:
        model: of models.py, or any other of the harness.
        limit: items of each member.
    """
    from lm_eval.evaluator import evaluate

    for member in task.members:
        member.set_fewshot_seed(seed=FEWSHOT_SEED)  # seeded again, so that teacher and student get the same prompts
    model.chat = chat  # the models of models.py tokenize a written chat otherwise
    devices = [model.device.index] if model.device is not None and model.device.type == "cuda" else []
    with quietly(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(SAMPLING_SEED)
        raw = evaluate(
            lm=model,
            task_dict=task.loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=samples,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=True,  # `require_known` has refused tasks without permission
        )
    assert raw is not None
    return _result(task, raw), raw.get("samples", {})


def _result(task: Task, raw: Mapping[str, Any]) -> TaskResult:
    name = task.benchmark.task
    groups = raw.get("groups") or {}
    key = name if name in raw["results"] or name in groups else next(iter(groups or raw["results"]))
    found = {**raw["results"].get(key, {}), **groups.get(key, {})}
    values = {one: value for one, value in found.items() if "," in one and "_stderr," not in one}
    values = {one: float(value) for one, value in values.items() if isinstance(value, int | float)}
    if not values:
        raise TaskError(f"task {name!r} has no value of its own: name its members instead")
    main = _main(values, task.benchmark)
    metric, _, how = main.partition(",")
    stderr = found.get(f"{metric}_stderr,{how}")
    higher = [raw["higher_is_better"].get(of, {}).get(metric) for of in (key, *raw["results"])]
    return TaskResult(
        title=task.benchmark.title,
        metric=metric,
        value=values[main],
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        n=sum(counts["effective"] for counts in raw["n-samples"].values()),
        shots=max(raw["n-shot"].values()),
        version=str(raw["versions"].get(key)),
        higher_is_better=next((value for value in higher if value is not None), True),
        filter=None if how in ("", "none") else how,
        others={_short(one): value for one, value in values.items() if one != main},
    )


def _main(values: Mapping[str, float], benchmark: BenchmarkTask) -> str:
    wanted = [benchmark.metric] if benchmark.metric else [*PREFERRED]
    ways = [benchmark.filter] if benchmark.filter else []
    for metric in wanted:
        of_metric = [one for one in values if one.partition(",")[0] == metric]
        exact = [one for one in of_metric if one.partition(",")[2] in ways]
        if of_metric:
            return (exact or of_metric)[0]
    return next(iter(values))


def _short(key: str) -> str:
    return key.removesuffix(",none")


@contextlib.contextmanager
def _executing_code() -> Iterator[None]:
    """In the block, tasks that ask the hub for the metric `code_eval` get the sandbox instead.

    Their modules keep the metric, so they are imported anew and forgotten afterwards.
    """
    import evaluate as metrics

    of_hub = metrics.load

    def load(path: str, *arguments: Any, **named: Any) -> Any:
        return code_eval() if path == "code_eval" else of_hub(path, *arguments, **named)

    names = [f"lm_eval.tasks.{folder}.utils" for folder in RUN_BY_CODE_EVAL]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    metrics.load = load
    try:
        yield
    finally:
        metrics.load = of_hub
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """In the block, the harness neither prints nor draws, and computes in this process alone."""
    import datasets
    import lm_eval.api.task
    import tqdm

    logger, alone = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level, no_bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    drawing = [(module, module.tqdm) for module in (tqdm, lm_eval.api.task)]
    for module, _ in drawing:
        module.tqdm = lambda rows, **_: rows
    os.environ["DISABLE_MULTIPROC"] = "1"  # else standard errors fork a process that holds a model and its threads
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logger.setLevel(level)
        if not no_bars:
            datasets.enable_progress_bars()
        for module, bars in drawing:
            module.tqdm = bars
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = alone
