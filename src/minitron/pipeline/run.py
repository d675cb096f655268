"""The whole pipeline on one screen. Only this module and those beside it (docs/explain/design.md) compose the rooms."""

import os
from pathlib import Path

from minitron.core import parallel
from minitron.core.device import settle_precision
from minitron.core.files import prove_directory
from minitron.core.progress import SILENT, Listener
from minitron.data.sources import BUILTIN, TEACHER, local_path
from minitron.data.supply import block_length, bounded
from minitron.distillation import trackers
from minitron.distillation.config import require_correctable
from minitron.distillation.train import CORRECTED
from minitron.evaluation.generate import prompt_of
from minitron.gguf.config import require_installed
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from minitron.model.hub import resolve_model
from minitron.pipeline.directory import RUN_ENTRIES, RunDirectory
from minitron.pipeline.rules import require_choice_effects, require_recipe_effects
from minitron.pipeline.stages import (
    collect_statistics,
    correct_teacher,
    distill_student,
    evaluate_models,
    found_shape,
    make_plan,
    plan_benchmarks,
    prepare_data,
    prune,
    pruner_of,
    quantize_student,
    record_teacher,
    resolve_correction,
    resolve_distill,
    write_report_and_card,
)
from minitron.pipeline.student_shape import adopt_search_state, feasible_for, find_shape, judging_blocks, machine_for
from minitron.pruning.given import given_layers
from minitron.pruning.repair import replaces_channels, resolve_repair
from minitron.pruning.steps import choice_left
from minitron.pruning.target import target_shape
from minitron.recipe import Recipe
from minitron.report.records import RunRecords
from minitron.shapes.space import needs_machine


def run(recipe: Recipe, out: Path, listener: Listener = SILENT) -> RunRecords:
    """Teacher -> statistics -> scores -> plan -> pruned -> student -> evaluations -> GGUF files -> report.

    What is done is not done again. Under torchrun all processes share the calibration and every training; what the
    others cannot help with, the first does while they wait. They must all see `out`, the model and the text.

    A teacher that is corrected before stands for the teacher everywhere but in the evaluations: those are held against
    the one that the recipe names.

    Returns the run's records, which the report and the card are made from.

    Raises: MinitronError; RunError if `out` is in use or holds stages made from other inputs.
    """
    with parallel.process_group():
        return _run(recipe, out, listener)


def _run(recipe: Recipe, out: Path, listener: Listener) -> RunRecords:
    inputs = [recipe.model, recipe.data.source, recipe.data.heldout, recipe.prune.layer_task, recipe.evaluate.tasks_dir]
    if parallel.is_first():
        prove_directory(out, inputs=inputs, holds=True, writes=RUN_ENTRIES)
    trackers.require_installed(recipe.distill.log_to)
    if recipe.gguf.wanted:
        require_installed()
    teacher = open_checkpoint(resolve_model(recipe.model, recipe.revision))
    tokenizer = teacher.tokenizer
    recipe, shape = resolve(recipe, teacher)
    for prompt in recipe.evaluate.prompts:
        prompt_of(tokenizer, prompt, teacher.config.get("max_position_embeddings"), rows=teacher.shape.vocab)
    benchmarks = plan_benchmarks(recipe.evaluate, listener) if parallel.is_first() else None
    with RunDirectory(out, recipe, listener) as stages:
        corpus = prepare_data(stages, recipe.data, teacher, recipe.seed)
        models = {"teacher": teacher.path}
        if recipe.distill.correction == "before":
            recipe = stages.update_recipe(distill=resolve_correction(recipe, teacher, corpus))
            teacher = open_checkpoint(correct_teacher(stages, recipe.distill, recipe.seed, teacher.path, corpus))
        statistics = collect_statistics(stages, recipe, teacher, corpus)
        pruner = pruner_of(recipe, teacher, statistics, corpus, stages)
        searching = recipe.search.level != "off"
        guide = teacher.path
        if recipe.distill.teacher == "recorded":
            judge = judging_blocks(corpus, recipe.seed, recipe.search.judge_blocks) if searching else None
            resolved = resolve_distill(recipe, shape, teacher, corpus)
            guide = record_teacher(stages, resolved, teacher, corpus, recipe.seed, judge)
        if searching:
            shape = find_shape(stages, recipe, pruner, guide, corpus)
            recipe = stages.update_recipe(**found_shape(recipe, shape))
        recipe = stages.update_recipe(distill=resolve_distill(recipe, shape, teacher, corpus))
        pruned = prune(stages, pruner, make_plan(stages, pruner, shape, corpus), recipe, corpus)
        if searching:
            adopt_search_state(stages)
        student = distill_student(stages, "student", recipe.distill, recipe.seed, pruned, guide, corpus)
        models |= {CORRECTED: stages.out / CORRECTED} if recipe.distill.correction else {}
        models |= {"pruned": pruned, "student": student}
        if recipe.scratch_baseline:
            models["scratch"] = distill_student(stages, "scratch", recipe.distill, recipe.seed, pruned, None, corpus)
        evaluate_models(stages, recipe, models, corpus, tokenizer, benchmarks)
        if recipe.gguf.wanted:
            quantize_student(stages, recipe, student, corpus)
    return write_report_and_card(out)


def resolve(recipe: Recipe, teacher: Checkpoint | ModelConfig) -> tuple[Recipe, Shape]:
    """Fill in every default that the teacher's config decides, and the student's shape; of a search, the largest.

    Raises: NoEffect for a key that could not change anything.
    """
    require_recipe_effects(recipe)
    require_correctable(recipe.distill, recipe.data)
    if recipe.search.level == "off":
        shape = target_shape(teacher.architecture, teacher.config, teacher.shape, recipe.prune)
    else:
        machine = machine_for(recipe.search, teacher.dtype) if needs_machine(recipe.search) else None
        shape = feasible_for(teacher, recipe.prune, recipe.search, machine)[0].shape
    repair = resolve_repair(recipe.repair, teacher)
    given = given_layers(recipe.prune, teacher.shape)
    left = choice_left(teacher, recipe.prune, shape, given, repair.steps or [])
    require_choice_effects(recipe, left)
    basis = replaces_channels(repair.steps) and (shape.hidden < teacher.shape.hidden or recipe.search.level != "off")
    block_tokens = block_length(recipe.data, teacher)
    tokens = recipe.distill.tokens and max(recipe.distill.tokens, recipe.calibrate.samples * block_tokens)
    of_run = bounded(recipe.data, tokens)
    return recipe.model_copy(
        update={
            "model": _whole_path(recipe.model),
            "data": of_run.model_copy(
                update={
                    "source": _whole_path(of_run.source),
                    "heldout": of_run.heldout and _whole_path(of_run.heldout),
                    "block_tokens": block_tokens,
                }
            ),
            "prune": recipe.prune.model_copy(
                update={"layer_task": recipe.prune.layer_task and _whole_path(recipe.prune.layer_task)}
            ),
            "repair": repair,
            "evaluate": recipe.evaluate.model_copy(
                update={"tasks_dir": recipe.evaluate.tasks_dir and _whole_path(recipe.evaluate.tasks_dir)}
            ),
            "calibrate": recipe.calibrate.model_copy(
                update={
                    "precision": settle_precision(recipe.calibrate.precision),
                    "second_moment": recipe.calibrate.second_moment or basis,
                }
            ),
        }
    ), shape


def _whole_path(source: str) -> str:
    """A local path made absolute, so that the stored recipe runs from anywhere; a hub id and the like as it is."""
    is_path = source.strip() and source not in (BUILTIN, TEACHER)
    path = local_path(source)
    return str(path.resolve()) if is_path and os.path.exists(path) else source
