"""The records of a run directory, the only source of the report, the card and the result table."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

import yaml

from minitron.calibration.layouts import STATISTICS_RESULT, Calibrated
from minitron.core.errors import RunError
from minitron.core.run_layout import MODELS, RECORD, STAGES, Record, RunLayout
from minitron.core.typed_files import FileKind, Value, as_typed, read_typed, read_typed_lines, read_yaml
from minitron.data.layouts import DATA_RESULT, Text
from minitron.data.sources import TEACHER
from minitron.distillation.layouts import LOGGED, Logged, TrainedStage, TrainingFacts, training_result
from minitron.distillation.losses import LOSSES
from minitron.evaluation.layouts import (
    EVALUATED,
    GENERATIONS,
    SPEEDS,
    TASKS,
    Continued,
    Evaluated,
    Speeds,
    TaskResult,
    Tasks,
)
from minitron.model.architecture import Parameters, Shape
from minitron.model.describe import forward_flops
from minitron.pruning.layouts import MADE_PLAN, SCORES, MadePlan, UnitScores
from minitron.report.exporters import EXPORTERS, Exporter
from minitron.report.layouts import (
    PLAN_RESULT,
    PRUNED_RESULT,
    RUN_RECIPE,
    SCORES_RESULT,
    PlanResult,
    PrunedResult,
    RunRecipe,
    ScoresResult,
    TrainingRecipe,
)
from minitron.report.tables import source_name
from minitron.shapes.layouts import SEARCH, SEARCH_RESULT, Search, Searched

DIMS_PER_LAYER = ("ffn", "heads", "kv_heads")
WAY_OUT = "put the file back, or remove its directory and run the same command that made it again"


@dataclass(frozen=True)
class StageResults:
    """The results in the records of a run's stages; None for a stage that the run does not have."""

    data: Text
    statistics: Calibrated
    plan: PlanResult
    student: TrainedStage
    corrected: TrainedStage | None = None
    search: Searched | None = None
    scores: ScoresResult | None = None
    pruned: PrunedResult | None = None
    scratch: TrainedStage | None = None

    @property
    def trainings(self) -> dict[str, TrainingFacts]:
        """Stage -> its training, for the stages that train."""
        stages = {"corrected": self.corrected, "student": self.student, "scratch": self.scratch}
        return {name: result.training for name, result in stages.items() if result is not None}


@dataclass(frozen=True)
class RunRecords:
    """The records of a run. A part that the run has not reached or was not asked for is absent, None or empty.

    recipe: the keys of recipe.yaml that report and card read; `whole_recipe` has all.
    stages: stage -> its record, in the order of the run.
    evaluations: model -> its shape and its measured quality.
    cut: pruned/plan.json: the plan with the units that the repair chose; the plan itself where a run has none.
    exports: exporter -> the table of the files that it wrote.
    """

    path: Path
    recipe: RunRecipe
    whole_recipe: Mapping[str, Any]
    stages: Mapping[str, Record]
    results: StageResults
    evaluations: Mapping[str, Evaluated]
    generations: list[Continued] = field(default_factory=list)
    speed: Speeds | None = None
    metrics: list[Logged] = field(default_factory=list)
    scores: UnitScores | None = None
    plan: MadePlan | None = None
    cut: MadePlan | None = None
    search: Search | None = None
    tasks: Tasks | None = None
    exports: Mapping[str, Any] = field(default_factory=dict)


def read_run(path: Path) -> RunRecords:
    """Read the records of a run, and check that each is well-formed and all are of one run.

    Raises: RunError if the directory is no run, has no evaluations yet, or a file in it is missing or damaged.
    """
    run = RunLayout(path)
    if not run.recipe.exists():
        raise RunError(f"{path} is not a run directory: it has no {run.recipe.name}")
    if not run.record("evaluations").exists():
        raise RunError(
            f"the run in {path} is not finished: it has no {run.record('evaluations').relative_to(path)}; the same "
            "command that started it goes on with it"
        )
    whole_recipe = read_yaml(run.recipe, yaml.SafeLoader, RunError)
    recipe = as_typed(whole_recipe, RUN_RECIPE, str(run.recipe), RunError)
    stages = {name: record for name in (*STAGES, *EXPORTERS) if (record := _optional(run.record(name), RECORD))}
    results = {
        name: as_typed(stages[name].result, kind, f"{run.record(name)}: the result", RunError)
        for name, kind in _RESULTS.items()
        if name in stages
    }
    evaluations = {name: found for name in MODELS if (found := _optional(run.evaluation(name), EVALUATED))}
    _require_all(run, stages, evaluations)
    plan = _optional(run.plan, MADE_PLAN)
    records = RunRecords(
        path=path,
        recipe=recipe,
        whole_recipe=whole_recipe,
        stages=stages,
        results=StageResults(**results),
        evaluations=evaluations,
        generations=_optional(run.generations, GENERATIONS) or [],
        speed=_optional(run.speed, SPEEDS),
        metrics=read_typed_lines(run.metrics, LOGGED, RunError, way_out=WAY_OUT) if exists(run.metrics) else [],
        scores=_optional(run.scores, SCORES),
        plan=plan,
        cut=_optional(run.cut, MADE_PLAN) or plan,
        search=_optional(run.candidates, SEARCH),
        tasks=_optional(run.tasks, TASKS),
        exports={
            name: found
            for name, row in EXPORTERS.items()
            if (found := _optional(run.stage(name) / row.table, row.kind)) is not None
        },
    )
    _require_of_one_run(run, records)
    return records


# Stage -> the type of the result in its record, for the stages that the report describes.
_RESULTS: dict[str, FileKind[Any]] = {
    "data": DATA_RESULT,
    "statistics": STATISTICS_RESULT,
    "search": SEARCH_RESULT,
    "scores": SCORES_RESULT,
    "plan": PLAN_RESULT,
    "pruned": PRUNED_RESULT,
    **{name: training_result(name) for name in ("corrected", "student", "scratch")},
}


def _require_all(run: RunLayout, stages: Mapping[str, Any], evaluations: Mapping[str, Any]) -> None:
    """Raises: RunError if a stage or an evaluation is missing that a finished run has."""
    files = [run.record(name) for name in ("data", "statistics", "plan", "student") if name not in stages]
    files += [run.evaluation(name) for name in ("teacher", "pruned", "student") if name not in evaluations]
    if files:
        raise RunError(f"{files[0]} is missing: the run in {run.out} was changed after it ended; {WAY_OUT}")


def _require_of_one_run(run: RunLayout, records: RunRecords) -> None:
    """Raises: RunError if the contents of two files do not fit together."""
    teacher = vars(records.evaluations["teacher"].shape)
    for file, plan in ((run.plan, records.plan), (run.cut, records.cut)):
        if plan and vars(plan.teacher) != teacher:
            raise RunError(f"{file} is of another model than evaluations/teacher.json; {WAY_OUT}")
    if records.plan and records.cut and records.cut.layers != records.plan.layers:
        raise RunError(f"{run.cut} keeps other layers than plan/plan.json; {WAY_OUT}")
    if records.scores:
        of_dims = vars(records.scores)
        sizes = {dim: [len(row) for row in of_dims[dim]] for dim in DIMS_PER_LAYER}
        sizes |= {dim: [len(of_dims[dim])] for dim in ("layers", "hidden")}
        wanted = {dim: [teacher[dim]] * (teacher["layers"] if dim in DIMS_PER_LAYER else 1) for dim in sizes}
        if bad := [dim for dim in sizes if sizes[dim] != wanted[dim]]:
            raise RunError(f"{run.scores}: {bad[0]} has not a score for each of the teacher's units; {WAY_OUT}")
    if records.tasks:
        measured = records.tasks.tasks
        of_student = measured.get("student", {}).keys()
        if missing := [name for name in ("teacher", "student") if measured.get(name, {}).keys() != of_student]:
            raise RunError(f"{run.tasks} has other tasks for {missing[0]} than for student; {WAY_OUT}")


class ResultRow(TypedDict):
    """The size and quality of a measured model. KL and agreement of the teacher itself are None.

    non_embedding_share: of the teacher's parameters.
    """

    model: str
    total: int
    non_embedding: int
    non_embedding_share: float
    lm_loss: float
    perplexity: float
    bits_per_byte: float | None
    kl_to_teacher: float | None
    top1_agreement: float | None
    weight_bytes: int


def result_table(records: RunRecords) -> list[ResultRow]:
    """A row for each measured model."""
    whole = records.evaluations["teacher"].parameters.non_embedding
    return [
        ResultRow(
            model=name,
            total=found.parameters.total,
            non_embedding=found.parameters.non_embedding,
            non_embedding_share=found.parameters.non_embedding / whole,
            lm_loss=found.lm_loss,
            perplexity=found.perplexity,
            bits_per_byte=found.bits_per_byte,
            kl_to_teacher=found.kl_to_teacher,
            top1_agreement=found.top1_agreement,
            weight_bytes=found.weight_bytes,
        )
        for name, found in records.evaluations.items()
    ]


@dataclass(frozen=True)
class BenchmarkRow:
    """A task that teacher and student were measured on.

    kept: the student's share of the teacher's value; None where there is none, or an older version did not write it.
    chosen_by: whether the task decided which layers stay.
    """

    task: str
    teacher: TaskResult
    student: TaskResult
    kept: float | None
    chosen_by: bool


def benchmarks(records: RunRecords) -> list[BenchmarkRow]:
    """A row for each task, in the order of measuring."""
    if records.tasks is None:
        return []
    teacher, student = (records.tasks.tasks[name] for name in ("teacher", "student"))
    by_number = layers_by_number(records)  # then no task decided
    return [
        BenchmarkRow(
            task=task,
            teacher=teacher[task],
            student=asked,
            kept=records.tasks.kept.get(task),
            chosen_by=task in records.tasks.chosen_by and not by_number,
        )
        for task, asked in student.items()
    ]


def exported(records: RunRecords) -> list[tuple[str, Exporter]]:
    """The exporters that wrote files in the run, in the order of the table."""
    return [(name, row) for name, row in EXPORTERS.items() if name in records.exports]


def stage_flops(records: RunRecords) -> dict[str, int]:
    """The floating-point operations of calibration and trainings, counted as `minitron run --dry-run` does.

    A training step takes three forward passes of the student, and one of a teacher that is not recorded.
    """
    context, recipe = records.recipe.data.block_tokens, records.recipe.distill

    def forward(name: str) -> int:
        found = records.evaluations[name]
        parameters = Parameters(**{part.name: getattr(found.parameters, part.name) for part in fields(Parameters)})
        return forward_flops(Shape(**vars(found.shape)), parameters, context)

    teacher, student = forward("teacher"), forward("student")
    beside = 0 if recipe.teacher == "recorded" else 3 if recipe.correction == "parallel" else 1
    steps = {"corrected": 3 * teacher, "student": 3 * student + beside * teacher, "scratch": 3 * student}
    trained = {name: training.tokens * steps[name] for name, training in records.results.trainings.items()}
    return {"statistics": records.results.statistics.tokens * teacher} | trained


def public_recipe(records: RunRecords) -> Mapping[str, Any]:
    """The recipe as it may be published, with only the last part of local paths."""
    recipe = records.whole_recipe
    data = dict(recipe["data"])
    for key in ("source", "heldout"):
        data[key] = source_name(data[key]) if data[key] else data[key]
    evaluate = dict(recipe["evaluate"])
    if evaluate.get("tasks_dir"):
        evaluate["tasks_dir"] = source_name(evaluate["tasks_dir"])
    return {**recipe, "model": source_name(recipe["model"]), "data": data, "evaluate": evaluate}


def layer_criterion(records: RunRecords) -> str:
    """The criterion of the layers' scores in scores.json."""
    return (records.results.scores or ScoresResult()).layers


def layers_by_number(records: RunRecords) -> bool:
    """Whether the recipe names the layers that stay, so that their scores chose none."""
    return bool(records.recipe.prune.drop_layers or records.recipe.prune.keep_layers)


def heldout_source(records: RunRecords) -> str:
    """The source of the text that everything was measured on."""
    return records.recipe.data.heldout or records.recipe.data.source


def sampling(records: RunRecords) -> str | None:
    """How the text was sampled from the teacher; None if it was not."""
    config, sampled = records.recipe.data, records.results.data.sampled
    if config.source != TEACHER or sampled is None:
        return None
    limits = {"top-k": config.sample_top_k, "top-p": config.sample_top_p}
    ways = [f"temperature {config.sample_temperature:g}", *(f"{k} {v:g}" for k, v in limits.items() if v is not None)]
    return f"{sampled.documents:,} documents at {', '.join(ways)}"


def correction(records: RunRecords) -> str | None:
    """How the teacher was trained on the text; None if it was not."""
    config = records.recipe.distill
    if config.correction is None:
        return None
    of_student = records.results.student.training.tokens
    tokens = of_student if config.correction_tokens is None else config.correction_tokens
    when = {
        "before": "before it was measured, cut and distilled from",
        "parallel": "while the student, cut from it as it was, learnt from it",
    }
    own = min(tokens, of_student) if config.correction == "parallel" else tokens
    return f"trained by cross-entropy on {own:,} tokens of the same text {when[config.correction]}"


def repairs(records: RunRecords) -> list[str] | None:
    """The repair steps that ran; None where the records do not tell."""
    return None if records.results.pruned is None else records.results.pruned.repairs


def _optional(path: Path, kind: FileKind[Value]) -> Value | None:
    """Read a file that not every run has."""
    return read_typed(path, kind, RunError, way_out=WAY_OUT) if exists(path) else None


def exists(path: Path) -> bool:
    """Whether a path is in use; a dangling link is, and counts as damaged."""
    return path.exists() or path.is_symlink()


def loss_name(distill: TrainingRecipe) -> str:
    """The student's training loss in words, from a recipe's section."""
    terms = {distill.loss: 1.0} if isinstance(distill.loss, str) else distill.loss
    name = " + ".join(f"{'' if weight == 1 else f'{weight:g} '}{LOSSES[loss].title}" for loss, weight in terms.items())
    if distill.top_k is not None:
        name += f" over the teacher's {distill.top_k} likeliest tokens"
    if distill.temperature != 1:
        name += f" at temperature {distill.temperature:g}"
    return name + (", hidden states too" if distill.intermediate not in (None, False, "off") else "")
