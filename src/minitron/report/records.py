"""What a run directory says about itself; the only source of the report, the card and the result table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from minitron.core import layouts
from minitron.core.errors import RunError
from minitron.core.typed_files import FileKind, as_typed, read_typed, read_typed_lines, read_yaml
from minitron.data.corpus import TEACHER
from minitron.distillation.losses import LOSSES
from minitron.model.architecture import Parameters, Shape
from minitron.model.describe import forward_flops
from minitron.report.tables import source_name

# The order in which models and stages are shown.
MODELS = ("teacher", "corrected", "pruned", "student", "scratch")
STAGES = (
    *("data", "corrected", "statistics", "lessons", "search", "scores", "plan"),
    *("pruned", "student", "scratch", "evaluations", "gguf"),
)

PER_LAYER = ("ffn", "heads", "kv_heads")
WAY_OUT = "put the file back, or remove its directory and run the same command that made it again"


@dataclass(frozen=True)
class RunRecords:
    """The records of a run, as they lie on disk. A stage or model that the run has not reached is absent.

    evaluations: model -> its description (family, shape, parameters, bytes) and its measured quality.
    generations: one row per prompt: {"prompt": ..., model: continuation}.
    metrics: rows of distill/metrics.jsonl, training steps and held-out evaluations in one sequence.
    cut: pruned/plan.json: the plan with the units that the repair chose. Of a run that has none, the plan as it is.
    speed: evaluations/speed.json: teacher, student, and `ratio`, the median of the rounds' ratios, if the run has it.
    search: search/candidates.json, or nothing where the shape was not searched for.
    ladder: gguf/quantization.json, or nothing where no GGUF files were written.
    tasks: evaluations/tasks.json: {"tasks": {model: {task: result}}, "kept": {task: share of the teacher's value},
        "chosen_by": [task, ...]}, or nothing.
    """

    path: Path
    recipe: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    generations: list[dict[str, str]]
    speed: dict[str, dict[str, Any]]
    metrics: list[dict[str, Any]]
    scores: dict[str, Any]
    plan: dict[str, Any]
    cut: dict[str, Any]
    search: dict[str, Any]
    ladder: dict[str, Any]
    tasks: dict[str, Any]


def read_run(path: Path) -> RunRecords:
    """Read the records of a run, each of which must be what a run writes, and all of one run.

    Raises: RunError if the directory is no run, has no evaluations yet, or a file in it is missing or damaged.
    """
    if not (path / "recipe.yaml").exists():
        raise RunError(f"{path} is not a run directory: it has no recipe.yaml")
    if not (path / "evaluations" / "record.json").exists():
        raise RunError(
            f"the run in {path} is not finished: it has no evaluations/record.json; the same command that started it "
            "goes on with it"
        )
    recipe = as_typed(
        read_yaml(path / "recipe.yaml", yaml.SafeLoader, RunError),
        layouts.RUN_RECIPE,
        str(path / "recipe.yaml"),
        RunError,
    )
    stages = {name: record for name in STAGES if (record := _record(path / name / "record.json", name))}
    evaluations = {
        name: row
        for name in MODELS
        if (row := _optional(path / "evaluations" / f"{name}.json", layouts.EVALUATED, None))
    }
    _require_all(path, stages, evaluations)
    metrics = path / "distill" / "metrics.jsonl"
    plan = _plan(path / "plan" / "plan.json")
    records = RunRecords(
        path=path,
        recipe=recipe,
        stages=stages,
        evaluations=evaluations,
        generations=_optional(path / "evaluations" / "generations.json", layouts.GENERATIONS, []),
        speed=_optional(path / "evaluations" / "speed.json", layouts.SPEEDS, {}),
        metrics=read_typed_lines(metrics, layouts.LOGGED, RunError, way_out=WAY_OUT) if exists(metrics) else [],
        scores=_optional(path / "scores" / "scores.json", layouts.SCORES, {}),
        plan=plan,
        cut=_plan(path / "pruned" / "plan.json") or plan,
        search=_optional(path / "search" / "candidates.json", layouts.SEARCH, {}),
        ladder=_optional(path / "gguf" / "quantization.json", layouts.LADDER, {}),
        tasks=_optional(path / "evaluations" / "tasks.json", layouts.TASKS, {}),
    )
    _require_of_one_run(records)
    return records


def _require_all(path: Path, stages: Mapping[str, Any], evaluations: Mapping[str, Any]) -> None:
    """Of a run that has evaluations, the stages before them are there too."""
    files = [f"{name}/record.json" for name in ("data", "statistics", "plan", "student") if name not in stages]
    files += [f"evaluations/{name}.json" for name in ("teacher", "pruned", "student") if name not in evaluations]
    if files:
        raise RunError(f"{path / files[0]} is missing: the run in {path} was changed after it ended; {WAY_OUT}")


def _require_of_one_run(records: RunRecords) -> None:
    """What one file says must fit to what another does."""
    path, teacher = records.path, records.evaluations["teacher"]["shape"]
    for name, plan in (("plan/plan.json", records.plan), ("pruned/plan.json", records.cut)):
        if plan and plan["teacher"] != {dim: teacher[dim] for dim in plan["teacher"]}:
            raise RunError(f"{path / name} is of another model than evaluations/teacher.json; {WAY_OUT}")
    if records.plan and records.cut["layers"] != records.plan["layers"]:
        raise RunError(f"{path / 'pruned' / 'plan.json'} keeps other layers than plan/plan.json; {WAY_OUT}")
    if records.scores:
        sizes = {dim: [len(row) for row in records.scores[dim]] for dim in PER_LAYER}
        sizes |= {dim: [len(records.scores[dim])] for dim in ("layers", "hidden")}
        wanted = {dim: [teacher[dim]] * (teacher["layers"] if dim in PER_LAYER else 1) for dim in sizes}
        if bad := [dim for dim in sizes if sizes[dim] != wanted[dim]]:
            file = path / "scores" / "scores.json"
            raise RunError(f"{file}: {bad[0]} has not a score for each of the teacher's units; {WAY_OUT}")
    if records.tasks:
        measured = records.tasks["tasks"]
        of_student = measured.get("student", {}).keys()
        if missing := [name for name in ("teacher", "student") if measured.get(name, {}).keys() != of_student]:
            file = path / "evaluations" / "tasks.json"
            raise RunError(f"{file} has other tasks for {missing[0]} than for student; {WAY_OUT}")


def result_table(records: RunRecords) -> list[dict[str, Any]]:
    """One row per measured model: what it is and what it kept.

    Keys: model, total, non_embedding, non_embedding_share (of the teacher's), lm_loss, perplexity, bits_per_byte,
    kl_to_teacher, top1_agreement, weight_bytes. KL and agreement of the teacher itself are None.
    """
    whole = records.evaluations["teacher"]["parameters"]["non_embedding"]
    quality = ("lm_loss", "perplexity", "bits_per_byte", "kl_to_teacher", "top1_agreement", "weight_bytes")
    return [
        {
            "model": name,
            "total": row["parameters"]["total"],
            "non_embedding": row["parameters"]["non_embedding"],
            "non_embedding_share": row["parameters"]["non_embedding"] / whole,
        }
        | {key: row[key] for key in quality}
        for name, row in records.evaluations.items()
    ]


def benchmarks(records: RunRecords) -> list[dict[str, Any]]:
    """One row per task, in the order they were measured. Keys: task, title, teacher and student (results), kept (the
    student's share of the teacher's value, or None), chosen_by (whether it had a say in the choice of layers)."""
    if not records.tasks:
        return []
    teacher, student = (records.tasks["tasks"][name] for name in ("teacher", "student"))
    by_number = layers_by_number(records)  # then no task had a say
    return [
        {
            "task": task,
            "title": row["title"],
            "teacher": teacher[task],
            "student": row,
            "kept": records.tasks.get("kept", {}).get(task),  # older runs do not have it
            "chosen_by": task in records.tasks["chosen_by"] and not by_number,
        }
        for task, row in student.items()
    ]


def speed_ratios(records: RunRecords) -> dict[str, float]:
    """Student to teacher, of prefill and decode; nothing where speed was not measured.

    Older runs do not have the ratios of the rounds; theirs is of the medians.
    """
    if not records.speed:
        return {}
    teacher, student = records.speed["teacher"], records.speed["student"]
    found = records.speed.get("ratio") or {}
    return {kind: found.get(kind, student[kind] / teacher[kind]) for kind in ("prefill", "decode")}


def stage_flops(records: RunRecords) -> dict[str, int]:
    """Floating-point operations of calibration and trainings, counted as `minitron run --dry-run` does: a training step
    takes three forward passes, and the teacher's one where it is there. What other stages take is not counted."""
    context, recipe = records.recipe["data"]["block_tokens"], records.recipe["distill"]

    def forward(name: str) -> int:
        row = records.evaluations[name]
        parameters = Parameters(**{part.name: row["parameters"][part.name] for part in fields(Parameters)})
        return forward_flops(Shape(**row["shape"]), parameters, context)

    teacher, student = forward("teacher"), forward("student")
    beside = 0 if recipe.get("teacher") == "recorded" else 3 if recipe.get("correction") == "parallel" else 1
    steps = {"corrected": 3 * teacher, "student": 3 * student + beside * teacher, "scratch": 3 * student}
    found = {"statistics": records.stages["statistics"]["result"]["tokens"] * teacher}
    for name, step in steps.items():
        if name in records.stages:
            found[name] = records.stages[name]["result"]["training"]["tokens"] * step
    return found


def public_recipe(records: RunRecords) -> dict[str, Any]:
    """The recipe as it may be published: whose machine it was, and how its directories are called, is nobody's."""
    data = dict(records.recipe["data"])
    for key in ("source", "heldout"):
        data[key] = source_name(data[key]) if data[key] else data[key]
    evaluate = dict(records.recipe["evaluate"])
    if evaluate.get("tasks_dir"):
        evaluate["tasks_dir"] = source_name(evaluate["tasks_dir"])
    return records.recipe | {"model": source_name(records.recipe["model"]), "data": data, "evaluate": evaluate}


def layer_criterion(records: RunRecords) -> str:
    """By what the layers in scores.json are scored. The stage names it only where it took a pass of its own."""
    criterion: str = records.stages["scores"]["result"].get("layers", "block_influence")
    return criterion


def layers_by_number(records: RunRecords) -> bool:
    """Whether the recipe says which layers stay, so that their scores chose none."""
    return bool(records.recipe["prune"].get("drop_layers") or records.recipe["prune"].get("keep_layers"))


def heldout_source(records: RunRecords) -> str:
    """Where the text comes from that everything was measured on."""
    config = records.recipe["data"]
    source: str = config["heldout"] or config["source"]
    return source


def sampling(records: RunRecords) -> str | None:
    """How the text was sampled from the teacher; None where it was not."""
    config = records.recipe["data"]
    if config["source"] != TEACHER:
        return None
    facts = records.stages["data"]["result"]["sampled"]
    limits = {"top-k": config["sample_top_k"], "top-p": config["sample_top_p"]}
    ways = [
        f"temperature {config['sample_temperature']:g}",
        *(f"{k} {v:g}" for k, v in limits.items() if v is not None),
    ]
    return f"{facts['documents']:,} documents at {', '.join(ways)}"


def correction(records: RunRecords) -> str | None:
    """How the teacher was trained on the text that it taught; None where it was not."""
    config = records.recipe["distill"]
    if config.get("correction") is None:
        return None
    tokens = records.stages["student"]["result"]["training"]["tokens"]
    own = min(config["correction_tokens"], tokens if config["correction"] == "parallel" else math.inf)
    when = {
        "before": "before it was measured, cut and distilled from",
        "parallel": "while the student, cut from it as it was, learnt from it",
    }
    return f"trained by cross-entropy on {own:,} tokens of the same text {when[config['correction']]}"


def repairs(records: RunRecords) -> list[str] | None:
    """The repair steps that ran; None where the records do not say."""
    steps: list[str] | None = records.stages.get("pruned", {}).get("result", {}).get("repairs")
    return steps


def _optional(path: Path, kind: FileKind, default: Any) -> Any:
    """What a file holds that not every run has."""
    return read_typed(path, kind, RunError, way_out=WAY_OUT) if exists(path) else default


def _record(path: Path, stage: str) -> Any:
    """A stage's record, with a result of that stage; None where the stage is not there."""
    record = _optional(path, layouts.RECORD, None)
    if record is not None and stage in layouts.RESULTS:
        as_typed(record["result"], layouts.RESULTS[stage], f"{path}: the result", RunError)
    return record


def _plan(path: Path) -> dict[str, Any]:
    plan: dict[str, Any] = _optional(path, layouts.MADE_PLAN, {})
    return plan


def exists(path: Path) -> bool:
    """Whether there is a file or what should be one: a dangling link is there, and damaged."""
    return path.exists() or path.is_symlink()


def loss_name(distill: Mapping[str, Any]) -> str:
    """What the student was trained for, from a recipe's section."""
    terms = {distill["loss"]: 1} if isinstance(distill["loss"], str) else distill["loss"]
    name = " + ".join(f"{'' if weight == 1 else f'{weight:g} '}{LOSSES[loss].title}" for loss, weight in terms.items())
    if distill.get("top_k") is not None:
        name += f" over the teacher's {distill['top_k']} likeliest tokens"
    if distill.get("temperature", 1) != 1:
        name += f" at temperature {distill['temperature']:g}"
    return name + ("" if distill.get("intermediate") in (None, False, "off") else ", states between layers too")
