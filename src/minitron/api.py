"""The verbs: what minitron does with models, each a function that opens its inputs and writes its result whole."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from minitron.calibration import collect
from minitron.calibration.statistics import CalibrateConfig, Statistics
from minitron.core import parallel
from minitron.core.device import pick_device
from minitron.core.errors import DataError, PlanError
from minitron.core.files import (
    atomic_directory,
    beside,
    prove_directory,
    put_directory,
    require_free_space,
    scratch_directory,
)
from minitron.core.progress import SILENT, Listener, layer_progress
from minitron.data.config import DataConfig
from minitron.data.corpus import SAMPLED, Corpus, draw_samples
from minitron.data.sources import TEACHER
from minitron.data.supply import block_length, bounded, corpus_for, keep_sampled
from minitron.data.writing import separator
from minitron.distillation import trackers
from minitron.distillation.config import DistillConfig, require_correctable, resolve
from minitron.distillation.teachers import require_same_tokenizer, require_same_vocabulary
from minitron.distillation.train import CORRECTED
from minitron.evaluation import engines, quality
from minitron.evaluation import generate as generation
from minitron.evaluation.generate import num_new_tokens, prompt_of, require_temperature
from minitron.evaluation.quality import EvaluateConfig
from minitron.evaluation.tasks.measure import TaskOptions, measure_tasks, plan_tasks
from minitron.evaluation.tasks.suite import kept
from minitron.gguf import quantize as ladder
from minitron.gguf.config import QuantizeConfig
from minitron.gguf.quantize import QUANTIZE_TOKENS, Text, plan_files, require_possible
from minitron.model.architecture import PRUNABLE, Shape
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint, open_config
from minitron.model.config_json import read_config
from minitron.model.describe import describe
from minitron.model.draft import Draft, draft_table
from minitron.model.hub import resolve_model
from minitron.model.naming import model_name
from minitron.model.samples import Samples
from minitron.model.weight_files import has_weights, stored_tensors
from minitron.pipeline.directory import RUN_ENTRIES, RunDirectory, read_record
from minitron.pipeline.rules import require_distill_effects
from minitron.pipeline.run import run as run
from minitron.pipeline.stages import correct_teacher, distill_student, prepare_data, record_teacher
from minitron.pipeline.student_shape import feasible_for, machine_for, ranked
from minitron.pruning.config import PruneConfig
from minitron.pruning.given import Given
from minitron.pruning.plan import Plan, load_given
from minitron.pruning.repair import RepairConfig, needed_steps, replaces_channels, resolve_repair
from minitron.pruning.steps import CutNeeds, Pruner, Scoring, cut_needs, wanted
from minitron.recipe import Recipe
from minitron.shapes.space import SearchConfig

measure_speed = engines.measure_models


def inspect(path: Path) -> dict[str, Any]:
    """What `describe` says, and whether weights are there; where they are, they are held against config.json."""
    weights = has_weights(path)
    return describe(open_checkpoint(path) if weights else open_config(path)) | {"weights": weights}


def draft(path: Path) -> Draft | None:
    """A draft of the table for a model type that has none; None without weights, whose shapes it is drawn from."""
    if not has_weights(path):
        return None
    shapes = {name: stored.shape for name, stored in stored_tensors(path).items()}
    return draft_table(read_config(path), shapes)


def calibrate(
    model: str,
    data_config: DataConfig,
    config: CalibrateConfig,
    *,
    seed: int,
    out: Path,
    listener: Listener = SILENT,
) -> Statistics:
    """Calibrate one model and write its statistics to `out`; under torchrun, with all its processes."""
    with parallel.process_group() as here:
        if here.rank == 0:
            prove_directory(out, inputs=[model])
        teacher = open_checkpoint(resolve_model(model))
        if here.rank > 0:
            told_by = separator(data_config, teacher.tokenizer)
            samples = Samples(parallel.broadcast(None), told_by)
            return collect.measure_statistics(teacher, samples, config.as_pass(), second_moment=config.second_moment)
        with atomic_directory(out) as partial:
            with corpus_for(teacher, data_config, listener, config.samples, seed, scratch=partial) as corpus:
                samples = draw_samples(corpus, config.samples, seed)
                parallel.broadcast(samples.tokens)
                pass_ = config.as_pass(partial, layer_progress(listener))
                statistics = collect.measure_statistics(teacher, samples, pass_, second_moment=config.second_moment)
                keep_sampled(corpus.path, partial)
            statistics.save(partial)
    return statistics


def search(
    model: str,
    *,
    prune: PruneConfig,
    search: SearchConfig,
    calibration: CalibrateConfig | None = None,
    repair: RepairConfig | None = None,
    statistics_dir: Path | None,
    data_config: DataConfig | None,
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Every shape of one model within the budgets, ranked; the keys are those of a run's search/candidates.json.

    Args:
        data_config: needed without statistics, and for the level `cut`.
    """
    teacher = open_checkpoint(resolve_model(model))
    repair = resolve_repair(repair or RepairConfig(), teacher)
    calibration = calibration or CalibrateConfig()
    calibration = calibration.model_copy(update={"second_moment": replaces_channels(repair.steps)})
    feasible_for(teacher, prune, search, machine_for(search, teacher.dtype))  # an empty search need not read text first
    with ExitStack() as stack:
        corpus = None
        if data_config is not None:
            corpus = stack.enter_context(corpus_for(teacher, data_config, listener, calibration.samples))
        work = stack.enter_context(scratch_directory())
        samples, tokenizer = None, None
        if corpus is not None:
            samples = draw_samples(corpus, calibration.samples, 0)
            tokenizer = teacher.tokenizer
        pass_ = calibration.as_pass(work, layer_progress(listener))
        if statistics_dir is not None:
            statistics = Statistics.load_for(teacher, statistics_dir)
        else:
            assert samples is not None
            statistics = collect.measure_statistics(teacher, samples, pass_, second_moment=calibration.second_moment)
        recipe = Recipe(model=model, prune=prune, search=search, calibrate=calibration, repair=repair)
        pruner = Pruner(teacher, Scoring(prune, samples, pass_, tokenizer), repair.steps or [], statistics)
        listener.stage("search", "running")
        _, facts = ranked(recipe, pruner, corpus, work=work, listener=listener)
    listener.stage("search", "done")
    return facts


def prune(
    model: str,
    *,
    config: PruneConfig,
    repair: RepairConfig,
    plan_file: Path | None,
    statistics_dir: Path | None,
    data_config: Callable[[], DataConfig],
    samples: int = CalibrateConfig().samples,
    calibration: CalibrateConfig | None = None,
    check: Callable[[CutNeeds], None] = lambda needs: None,
    out: Path,
    listener: Listener = SILENT,
) -> tuple[Plan, dict[str, Any]]:
    """Cut one model by a plan file, or by units that such a file or `config` lists and by scores for the rest, and
    repair it.

    Statistics are those given, else collected on `data_config`, which is asked for only where text is needed.

    Args:
        samples: blocks of that text, which the repair is fitted to also where statistics are given.
        calibration: these blocks, and how they are read; default `samples` and the defaults.
        check: told what the cut needs before anything is read or chosen; may refuse.
    """
    calibration = calibration or CalibrateConfig(samples=samples)
    prove_directory(out, inputs=[model, statistics_dir])
    teacher = open_checkpoint(resolve_model(model))
    with atomic_directory(out) as partial:
        listed = Given() if plan_file is None else load_given(plan_file, teacher.shape)
        if isinstance(listed, Plan):
            _require_nothing_else(config, plan_file)
        fixed = [dim for dim in PRUNABLE if getattr(listed, dim) is not None]
        steps = resolve_repair(repair, teacher, fixed).steps or []
        shape, given = wanted(teacher, config, listed)
        needs = cut_needs(teacher, config, shape, given, steps, with_statistics=statistics_dir is not None)
        check(needs)
        _require_free_space(teacher, shape, out, partial)
        calibration = calibration.model_copy(update={"second_moment": replaces_channels(steps)})
        pass_, text, tokenizer, statistics = calibration.as_pass(partial, layer_progress(listener)), None, None, None
        if needs.statistics and statistics_dir is not None:
            statistics = Statistics.load_for(teacher, statistics_dir)
        if needs.text:
            tokenizer = teacher.tokenizer
            with corpus_for(teacher, data_config(), listener, calibration.samples, scratch=partial) as corpus:
                text = draw_samples(corpus, calibration.samples, 0)
        if needs.statistics and statistics is None:
            assert text is not None
            statistics = collect.measure_statistics(teacher, text, pass_, second_moment=calibration.second_moment)
        pruner = Pruner(teacher, Scoring(config, text, pass_, tokenizer), steps, statistics)
        plan = listed if isinstance(listed, Plan) else pruner.plan(shape, given)
        listener.stage("prune", "running")
        needed = needed_steps(steps, plan.teacher, plan.student)
        plan = pruner.cut(plan, partial).plan
        plan.save(partial / "plan.json")
        facts = describe(open_checkpoint(partial)) | {"repairs": needed}
    listener.stage("prune", "done")
    return plan, facts


def _require_free_space(teacher: Checkpoint, student: Shape, out: Path, at: Path) -> None:
    """Raises: RunError if the disk has no room for a student of that shape."""
    counts = [teacher.architecture.count(shape, teacher.config) for shape in (student, teacher.shape)]
    # By share, for not every tensor need have the dtype of the embedding.
    require_free_space(out, round(teacher.weight_bytes * counts[0].total / counts[1].total), at)


def _require_nothing_else(config: PruneConfig, plan_file: Path | None) -> None:
    if config.shape or config.drop_layers or config.keep_layers:
        raise PlanError(f"{plan_file} is a whole plan, which says what stays of every dim: give no sizes or layers too")


def distill(
    teacher: str,
    student: str,
    data_config: DataConfig,
    config: DistillConfig,
    *,
    seed: int,
    out: Path,
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Distil a student of any origin; under torchrun, with all its processes.

    State lives beside `out` in `<out>.work` until the student is complete; the processes must all see it. A corrected
    teacher ends in `<out>.corrected`. Both lie in `out` where that is not replaced, as a mount point is not.
    """
    require_distill_effects(config)
    trackers.require_installed(config.log_to)
    work, final = beside(out, "work"), {"student": out}
    final |= {CORRECTED: beside(out, CORRECTED)} if config.correction else {}
    with parallel.process_group():
        inputs = [teacher, student, data_config.source, data_config.heldout]
        if parallel.is_first():
            _forget(work)
            if not _is_complete(out, work):
                for made in final.values():
                    prove_directory(made, inputs=inputs)
            prove_directory(work, inputs=inputs, holds=True, writes=RUN_ENTRIES)
        require_correctable(config, data_config)
        guide, pupil = open_checkpoint(resolve_model(teacher)), open_checkpoint(resolve_model(student))
        require_same_vocabulary(guide, pupil)
        require_same_tokenizer(guide, pupil)
        data_config = bounded(data_config, config.tokens)
        with RunDirectory(work, None, listener, final) as stages:
            corpus = prepare_data(stages, data_config, guide, seed)
            config = _resolved(config, guide, pupil, corpus)
            if config.correction == "before":
                guide = open_checkpoint(correct_teacher(stages, config, seed, guide.path, corpus))
            source = guide.path
            if config.teacher == "recorded":
                source = record_teacher(stages, config, guide, corpus, seed)
            made = distill_student(stages, "student", config, seed, pupil.path, source, corpus)
            if not parallel.is_first():
                return {}
            facts = read_record(made).result
            if made != out:
                _keep_metrics(work / "distill", made)
                if config.correction == "before":
                    _keep_metrics(work / f"distill-{CORRECTED}", work / CORRECTED)
                trackers.keep(work / "distill", made)
                keep_sampled(corpus.path, made)
            for name, place in final.items():
                if (work / name).exists():  # it was moved, where this was interrupted just here
                    put_directory(work / name, place)
            work.rename(_leftover(work))
        _forget(work)
    return {"out": str(out)} | ({CORRECTED: str(final[CORRECTED])} if CORRECTED in final else {}) | facts


def _is_complete(out: Path, work: Path) -> bool:
    """Whether what `work` was for is done, but for moving it to `out` and beside it."""
    return work.is_dir() and any((student / "record.json").exists() for student in (work / "student", out))


def _keep_metrics(work: Path, made: Path) -> None:
    if (work / "metrics.jsonl").exists():
        (work / "metrics.jsonl").replace(made / "metrics.jsonl")


def _leftover(work: Path) -> Path:
    """The name of a `work` that is no longer needed."""
    return work.with_name(f"{work.name}.partial")


def _forget(work: Path) -> None:
    shutil.rmtree(_leftover(work), ignore_errors=True)


def _resolved(config: DistillConfig, guide: Checkpoint, pupil: Checkpoint, corpus: Corpus) -> DistillConfig:
    return resolve(
        config,
        pupil.shape,
        guide.shape,
        weights_rms=pupil.weights_rms(),
        teacher_weights_rms=guide.weights_rms(),
        block_tokens=corpus.block_tokens,
        train_tokens=corpus.train_tokens,
    )


def evaluate(
    model: str,
    teacher: str | None,
    data_config: DataConfig,
    *,
    blocks: int | None,
    batch: int = EvaluateConfig().batch,
    whole: bool = False,
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Measure one model on the part of the data that a run holds out, or with `whole` on all of it."""
    if data_config.source == TEACHER:
        raise DataError(
            "text is sampled from the teacher to prune or distil it, and not to evaluate: "
            f"give text, such as data/{SAMPLED} of a run that sampled some"
        )
    checkpoint = open_checkpoint(resolve_model(model))
    guide = None
    if teacher is not None:
        reference = open_checkpoint(resolve_model(teacher))
        require_same_vocabulary(reference, checkpoint, padding=True)
        require_same_tokenizer(reference, checkpoint)
        guide = load_model(reference.path).to(pick_device())
    with corpus_for(checkpoint, data_config, listener, whole=whole) as corpus:
        measured = quality.evaluate(
            load_model(checkpoint.path).to(pick_device()),
            corpus.heldout.head(blocks),
            teacher=guide,
            batch=batch,
            progress=lambda done, total: listener.progress(done, total, "blocks"),
        )
    return measured.to_dict()


def benchmark(
    model: str,
    teacher: str | None,
    tasks: Sequence[str],
    directory: Path | None,
    options: TaskOptions,
    *,
    cache: Path | None,
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Measure one model in benchmarks, and its teacher on the same items.

    Keys: tasks, of the model, and with a teacher also teacher_tasks, and kept: the model's value over the teacher's.
    """
    plan = plan_tasks(tasks, directory, options, warn=listener.warn)
    paths = {"model": resolve_model(model)} | ({"teacher": resolve_model(teacher)} if teacher else {})
    listener.stage("benchmarks", "running")
    results = measure_tasks(paths, plan, cache=cache, progress=listener.progress, warn=listener.warn)
    listener.stage("benchmarks", "done")
    facts: dict[str, Any] = {"tasks": {name: one.to_dict() for name, one in results["model"].items()}}
    if teacher:
        facts["teacher_tasks"] = {name: one.to_dict() for name, one in results["teacher"].items()}
        facts["kept"] = {name: kept(one, results["teacher"][name]) for name, one in results["model"].items()}
    return facts


def generate(model: str, prompt: str, *, new_tokens: int | None, temperature: float, seed: int) -> str:
    """The continuation of a prompt by a model on disk.

    Args:
        new_tokens: None for USUAL_NEW_TOKENS, or as many as the model's context has room for.
    """
    require_temperature(temperature)
    checkpoint = open_checkpoint(resolve_model(model))
    tokenizer, context = checkpoint.tokenizer, checkpoint.config.get("max_position_embeddings")
    num_ids = len(prompt_of(tokenizer, prompt, context, rows=checkpoint.shape.vocab))
    new_tokens = num_new_tokens(num_ids, new_tokens, context)
    loaded = load_model(checkpoint.path).to(pick_device())
    return generation.generate(loaded, tokenizer, prompt, new_tokens=new_tokens, temperature=temperature, seed=seed)


def quantize(
    model: str,
    config: QuantizeConfig,
    data_config: DataConfig | None,
    *,
    importance_file: Path | None,
    out: Path,
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Write GGUF files of one model, with their table, and its importance matrix where there is one.

    Args:
        data_config: None for no calibration.
    """
    prove_directory(out, inputs=[model])
    checkpoint = open_checkpoint(resolve_model(model))
    informed = data_config is not None or importance_file is not None
    require_possible(checkpoint, config, informed=informed, importance_file=importance_file)
    with ExitStack() as stack:
        partial, text = stack.enter_context(atomic_directory(out)), None
        require_free_space(out, _bytes_of(checkpoint, config, informed=informed), partial)
        if data_config is not None:
            if data_config.block_tokens is None:
                usual = min(QUANTIZE_TOKENS, block_length(data_config, checkpoint))
                data_config = data_config.model_copy(update={"block_tokens": usual})
            corpus = stack.enter_context(corpus_for(checkpoint, data_config, listener, config.samples, scratch=partial))
            tokens = draw_samples(corpus, config.samples, 0).tokens
            heldout = torch.from_numpy(corpus.heldout.head(config.blocks).select(slice(None)))
            text = Text(tokens, heldout, data_config.source)
            keep_sampled(corpus.path, partial)
        name = model_name(model)
        listener.stage("quantize", "running")
        table = ladder.quantize(
            checkpoint, config, partial, text=text, importance_file=importance_file, name=name, listener=listener
        )
    listener.stage("quantize", "done")
    return table


def _bytes_of(checkpoint: Checkpoint, config: QuantizeConfig, *, informed: bool) -> int:
    """Of all files that the config asks for; of a mixture of so many bits, of its matrices alone."""
    mixtures = [bits * checkpoint.parameters.total / 8 for bits in config.bits_per_weight]
    files = [row["bytes"] for row in plan_files(checkpoint, config, informed=informed)]
    return round(sum(files) + sum(config.sizes) + sum(mixtures))


def plan_quantized(model: str, config: QuantizeConfig, *, informed: bool) -> list[dict[str, Any]]:
    """What `quantize` would write; no weights are read."""
    return plan_files(open_checkpoint(resolve_model(model)), config, informed=informed)
