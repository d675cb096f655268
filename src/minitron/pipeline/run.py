"""The whole pipeline: a recipe is resolved, its stages are made, and the report is written."""

import os
from pathlib import Path

from minitron.core import parallel
from minitron.core.device import settle_precision
from minitron.core.files import prove_directory
from minitron.core.progress import SILENT, Listener
from minitron.core.run_layout import RunLayout
from minitron.data.sources import BUILTIN, TEACHER, local_path
from minitron.data.supply import block_length, bounded
from minitron.distillation import trackers
from minitron.distillation.config import require_correctable
from minitron.distillation.layouts import Budget, Fit
from minitron.distillation.schedule import usual_evaluate_blocks
from minitron.evaluation.generate import prompt_of
from minitron.evaluation.quality import usual_blocks
from minitron.gguf.source import model_directory
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, ModelConfig, open_checkpoint, open_config, planned_checkpoint
from minitron.pipeline.asked import Asked
from minitron.pipeline.budget import (
    keep_budget,
    known_budget,
    measure_budget,
    require_one_length,
    with_budget,
    with_guess,
)
from minitron.pipeline.directory import RUN_ENTRIES, RunDirectory
from minitron.pipeline.fit import (
    Planned,
    Room,
    Settled,
    agreed_fit,
    find_fit,
    keep_fit,
    known_fit,
    settle,
    training_memory,
    with_fit,
)
from minitron.pipeline.probe import Modelled
from minitron.pipeline.rules import require_choice_effects, require_recipe_effects
from minitron.pipeline.stages import Run, export_student, make_stages, plan_benchmarks
from minitron.pruning.given import given_layers
from minitron.pruning.repair import replaces_channels, resolve_repair
from minitron.pruning.steps import choice_left
from minitron.pruning.target import given_shape, is_given
from minitron.recipe import Recipe
from minitron.report.card import write_card
from minitron.report.exporters import EXPORTERS
from minitron.report.page import write_report
from minitron.report.records import RunRecords, read_run
from minitron.shapes.space import feasible_for, machine_for, needs_machine


def run(recipe: Recipe, out: Path, listener: Listener = SILENT) -> RunRecords:
    """Make every stage of `PIPELINE` that the recipe wants, then the report and the card.

    A stage that is done is not done again. Under torchrun all processes share the calibration and every training; the
    first does what the others cannot help with, while they wait. They must all see `out`, the model and the text.

    A teacher that is corrected before stands for the teacher everywhere but in the evaluations: those are held against
    the one that the recipe names.

    Returns the run's records, which the report and the card are made from.

    Raises: MinitronError; RunError if `out` is in use or holds stages made from other inputs.
    """
    fit = None
    if parallel.ranks().rank == 0:
        _require_programs(recipe)
        fit = fit_of(recipe, out, listener)
    with parallel.process_group():
        _run(recipe, out, fit, listener)
        records = read_run(out)
        if parallel.is_first():
            write_report(records)
            write_card(records)
        return records


def _run(recipe: Recipe, out: Path, fit: Fit | None, listener: Listener) -> None:
    """Make the stages; input that no stage could use is refused before the first."""
    fit = agreed_fit(fit)
    if fit is not None:
        recipe = recipe.model_copy(update={"distill": with_fit(recipe.distill, fit)})
    inputs = [recipe.model, recipe.data.source, recipe.data.heldout, recipe.prune.layer_task, recipe.evaluate.tasks_dir]
    if parallel.is_first():
        prove_directory(out, inputs=inputs, holds=True, writes=RUN_ENTRIES)
    teacher = open_checkpoint(model_directory(recipe.model, recipe.revision))
    tokenizer = teacher.tokenizer
    budget = budget_of(recipe, teacher, out, listener)
    if budget is not None:
        recipe = recipe.model_copy(update={"distill": with_budget(recipe.distill, budget)})
    recipe, shape = resolve_recipe(recipe, teacher)
    for prompt in recipe.evaluate.prompts:
        prompt_of(tokenizer, prompt, teacher.config.get("max_position_embeddings"), rows=teacher.shape.vocab)
    benchmarks = plan_benchmarks(recipe.evaluate, listener) if parallel.is_first() else None
    with RunDirectory(out, recipe, listener) as directory:
        keep_budget(budget, directory.layout.budget)
        keep_fit(fit, directory.layout.fit)
        run = Run(directory, recipe, teacher, shape, benchmarks, budget=budget, fit=fit)
        make_stages(run)
        for name, exporter in EXPORTERS.items():
            if exporter.wanted(run.recipe):
                export_student(run, name)


def _require_programs(recipe: Recipe) -> None:
    """Refuse a run whose trackers or exporters are not installed, which only the first process would find."""
    trackers.require_trackers(recipe.distill.log_to)
    for exporter in EXPORTERS.values():
        if exporter.wanted(recipe):
            exporter.require()


def fit_of(recipe: Recipe, out: Path, listener: Listener = SILENT) -> Fit | None:
    """Find the settings with which the trainings of a run fit the memory, see `find_fit`."""

    def planned() -> Planned:
        return plan_trainings(recipe, open_config(model_directory(recipe.model, recipe.revision)))

    return find_fit(recipe.distill, RunLayout(out).fit, planned, listener)


def settle_memory(recipe: Recipe, teacher: ModelConfig, out: Path, gpus: Room | None = None) -> tuple[Recipe, Settled]:
    """Find the memory of a run's trainings, and what is settled of it, as the run would.

    Args:
        gpus: what is planned for; None for this machine, and what the run's directory has settled already.

    Returns the recipe with the settings that are changed, and the memory with them.
    """
    config, planned = recipe.distill, plan_trainings(recipe, teacher)
    room = Room.here(config) if gpus is None else gpus.given(config)
    if config.fit == "off":
        return recipe, Settled(training_memory(planned, room))
    known = known_fit(config, RunLayout(out).fit) if gpus is None else None
    found = settle(planned, room) if known is None else Settled(training_memory(planned, room, known.changes), known)
    assert found.fit is not None
    return recipe.model_copy(update={"distill": with_fit(config, found.fit)}), found


def plan_trainings(recipe: Recipe, teacher: Checkpoint | ModelConfig) -> Planned:
    """Plan the trainings of a run: with a guess of the tokens where its length is a time."""
    guess = recipe.model_copy(update={"distill": with_guess(recipe.distill)})
    resolved, shape = resolve_recipe(guess, teacher)
    return Planned(resolved, planned_checkpoint(teacher, shape), teacher)


def budget_of(
    recipe: Recipe, teacher: Checkpoint | ModelConfig, out: Path, listener: Listener = SILENT
) -> Budget | None:
    """Find the tokens of a run whose distillation is given in minutes: those of its directory, or by a measurement.

    Raises: MinitronError for tokens beside the minutes, and where they cannot be measured.
    """
    require_one_length(recipe.distill)
    minutes = recipe.distill.minutes
    if minutes is None:
        return None
    known = known_budget(RunLayout(out).budget, minutes)
    if known is not None:
        return known
    planned = plan_trainings(recipe, teacher)
    timed = planned.recipe.model_copy(update={"distill": recipe.distill})
    models = Modelled.of(teacher), Modelled.of(teacher, planned.student.shape)
    asked = Asked(timed, *models, planned.block_tokens, None, ("student",), trainings_only=True)
    return measure_budget(asked, listener)


def resolve_recipe(recipe: Recipe, teacher: Checkpoint | ModelConfig) -> tuple[Recipe, Shape]:
    """Fill in every default that the teacher's config decides, and find the student's shape: for a search, the largest.

    Raises: NoEffect for a key that could not change anything.
    """
    require_recipe_effects(recipe)
    require_correctable(recipe.distill, recipe.data)
    repair = resolve_repair(recipe.repair, teacher)
    given = given_layers(recipe.prune, teacher.shape)
    if recipe.searches:
        machine = machine_for(recipe.search, teacher.written_dtype) if needs_machine(recipe.search) else None
        shape = feasible_for(teacher, recipe.prune, recipe.search, machine)[0].shape
    else:
        is_given(recipe.prune)  # refuses a target beside the sizes
        shape = given_shape(teacher.architecture, teacher.shape, recipe.prune)
    known = None if recipe.searches else shape
    left = choice_left(teacher, recipe.prune, known, given, repair.steps or [])
    require_choice_effects(recipe, left)
    basis = replaces_channels(repair.steps) and (recipe.searches or shape.hidden < teacher.shape.hidden)
    block_tokens = block_length(recipe.data, teacher)
    calibrate = recipe.calibrate.for_model(teacher.shape, block_tokens)
    tokens = recipe.distill.tokens and max(recipe.distill.tokens, calibrate.num_samples * block_tokens)
    of_run = bounded(recipe.data, tokens)
    evaluated = recipe.distill.evaluate_blocks or usual_evaluate_blocks(block_tokens)
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
            "distill": recipe.distill.model_copy(update={"evaluate_blocks": evaluated}),
            "evaluate": recipe.evaluate.model_copy(
                update={
                    "tasks_dir": recipe.evaluate.tasks_dir and _whole_path(recipe.evaluate.tasks_dir),
                    "blocks": recipe.evaluate.blocks or usual_blocks(block_tokens),
                }
            ),
            "calibrate": calibrate.model_copy(
                update={
                    "precision": settle_precision(recipe.calibrate.precision),
                    "second_moment": recipe.calibrate.second_moment or basis,
                }
            ),
        }
    ), shape


def _whole_path(source: str) -> str:
    """Make a local path absolute, so that the stored recipe runs from anywhere; leave a hub id and the like alone."""
    is_path = source.strip() and source not in (BUILTIN, TEACHER)
    path = local_path(source)
    return str(path.resolve()) if is_path and os.path.exists(path) else source
