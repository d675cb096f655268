"""The verbs of minitron: each is a function that opens its inputs, calls a step, and writes its result whole."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minitron.calibration import collect
from minitron.calibration.statistics import CalibrateConfig, Statistics
from minitron.core import parallel
from minitron.core.device import pick_device
from minitron.core.errors import DataError, MinitronError, PlanError
from minitron.core.files import (
    atomic_directory,
    beside,
    prove_directory,
    put_directory,
    require_free_space,
    scratch_directory,
)
from minitron.core.progress import SILENT, Listener, layer_progress
from minitron.core.run_layout import METRICS_FILE, RECORD_FILE, RunLayout
from minitron.data.config import DataConfig
from minitron.data.corpus import SAMPLED, draw_samples
from minitron.data.sources import TEACHER
from minitron.data.supply import block_length, bounded, corpus_for, keep_sampled
from minitron.data.writing import separator
from minitron.distillation import trackers
from minitron.distillation.config import DistillConfig, require_correctable
from minitron.distillation.layouts import Budget, Fit
from minitron.distillation.teachers import TeacherSource, require_same_tokenizer, require_same_vocabulary
from minitron.distillation.train import CORRECTED, Trained
from minitron.evaluation.engines import measure_speed as measure_speed
from minitron.evaluation.generate import generate_text, num_new_tokens, prompt_of, require_temperature
from minitron.evaluation.quality import EvaluateConfig, Evaluation, measure_quality, measured_blocks
from minitron.evaluation.tasks.measure import TaskOptions, measure_tasks, plan_tasks
from minitron.evaluation.tasks.suite import BenchmarkResult
from minitron.gguf.config import QUANTIZE_TOKENS, QuantizeConfig, require_gguf
from minitron.gguf.layouts import QuantizedModel
from minitron.gguf.reader import GgufFacts, inspect_gguf, is_gguf
from minitron.gguf.source import model_directory
from minitron.model.architecture import PRUNABLE, Shape
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint, open_config
from minitron.model.config_json import read_config
from minitron.model.describe import Description, describe
from minitron.model.draft import Draft, draft_table
from minitron.model.naming import model_name
from minitron.model.samples import Samples
from minitron.model.tokenizer import load_tokenizer
from minitron.model.weight_files import has_weights, stored_tensors
from minitron.pipeline.asked import Asked
from minitron.pipeline.budget import (
    keep_budget,
    known_budget,
    measure_budget,
    require_one_length,
    with_budget,
    with_guess,
)
from minitron.pipeline.directory import RUN_ENTRIES, RunDirectory, read_record
from minitron.pipeline.fit import Planned, agreed_fit, find_fit, keep_fit, with_fit
from minitron.pipeline.probe import Modelled
from minitron.pipeline.rules import require_distill_effects
from minitron.pipeline.run import run as run
from minitron.pipeline.stages import OF_DISTILLATION, Run, make_stages
from minitron.pruning.config import PruneConfig
from minitron.pruning.plan import Given, Plan, load_given
from minitron.pruning.repair import RepairConfig, Step, needed_steps, replaces_channels, resolve_repair
from minitron.pruning.steps import Choice, CutNeeds, Pruner, Scoring, choice_left, cut_needs, wanted
from minitron.recipe import Recipe
from minitron.shapes.rank import Ranking
from minitron.shapes.space import SearchConfig, feasible_for, machine_for
from minitron.shapes.trial import Trials, predicted_shape, rank_shapes

if TYPE_CHECKING:
    from minitron.gguf.quantize import PlannedFile


Model = str | Path  # a local directory, a hub id, or a GGUF file


@dataclass(frozen=True)
class Inspected:
    """A model on disk in numbers.

    weights: whether the weights are there; then they were held against config.json.
    """

    description: Description
    weights: bool

    def to_dict(self) -> dict[str, object]:
        """Return the facts as `minitron inspect --json` prints them."""
        return self.description.to_dict() | {"weights": self.weights}


def inspect(model: Model, revision: str | None = None) -> Inspected | GgufFacts:
    """Describe a directory, a model of the hub (by its config alone), or a GGUF file."""
    if is_gguf(str(model)):
        require_gguf()
        facts = inspect_gguf(Path(model))
        try:
            made = describe(open_checkpoint(model_directory(str(model), revision)))
        except MinitronError as error:
            return replace(facts, obstacle=str(error))
        return replace(facts, prunable=made.prunable)
    path = model_directory(str(model), revision, config_only=True)
    weights = has_weights(path)
    return Inspected(describe(open_checkpoint(path) if weights else open_config(path)), weights)


def draft(model: Model, revision: str | None = None) -> Draft | None:
    """Draft the table of a model type that has none; None without weights, whose shapes it is drawn from."""
    path = model_directory(str(model), revision, config_only=True)
    if not has_weights(path):
        return None
    shapes = {name: stored.shape for name, stored in stored_tensors(path).items()}
    return draft_table(read_config(path), shapes)


def calibrate(
    model: Model,
    data: DataConfig,
    config: CalibrateConfig,
    *,
    seed: int = 0,
    out: Path,
    listener: Listener = SILENT,
) -> Statistics:
    """Calibrate one model and write its statistics to `out`; under torchrun, with all its processes."""
    with parallel.process_group() as here:
        if here.rank == 0:
            prove_directory(out, inputs=[str(model)])
        teacher = open_checkpoint(model_directory(str(model)))
        if here.rank > 0:
            told_by = separator(data, teacher.tokenizer)
            samples = Samples(parallel.broadcast(None), told_by)
            return collect.measure_statistics(teacher, samples, config.as_pass(), second_moment=config.second_moment)
        config = config.for_model(teacher.shape, block_length(data, teacher))
        with atomic_directory(out) as partial:
            with corpus_for(teacher, data, listener, config.num_samples, seed, scratch=partial) as corpus:
                samples = draw_samples(corpus, config.num_samples, seed)
                parallel.broadcast(samples.tokens)
                pass_ = config.as_pass(partial, layer_progress(listener))
                statistics = collect.measure_statistics(teacher, samples, pass_, second_moment=config.second_moment)
                keep_sampled(corpus.path, partial)
            statistics.save(partial)
    return statistics


def choice_of_search(model: Model, prune: PruneConfig, repair: RepairConfig | None = None) -> Choice:
    """Tell what `search` with the same arguments leaves to criteria."""
    teacher = open_checkpoint(model_directory(str(model)))
    steps = resolve_repair(repair or RepairConfig(), teacher).steps or []
    return choice_left(teacher, prune, None, Given(), steps)


def search(
    model: Model,
    *,
    prune: PruneConfig,
    search: SearchConfig,
    data: DataConfig | None = None,
    calibration: CalibrateConfig | None = None,
    repair: RepairConfig | None = None,
    statistics_dir: Path | None = None,
    listener: Listener = SILENT,
) -> Ranking:
    """Rank every shape of one model within the budgets.

    Args:
        data: needed without statistics, and for the level `cut`.
    """
    teacher = open_checkpoint(model_directory(str(model)))
    steps = resolve_repair(repair or RepairConfig(), teacher).steps or []
    calibration = calibration or CalibrateConfig()
    calibration = calibration.model_copy(update={"second_moment": replaces_channels(steps)})
    machine = machine_for(search, teacher.written_dtype)
    feasible_for(teacher, prune, search, machine)  # an empty search need not read text first
    with ExitStack() as stack:
        corpus, samples, tokenizer = None, None, None
        if data is not None:
            calibration = calibration.for_model(teacher.shape, block_length(data, teacher))
            corpus = stack.enter_context(corpus_for(teacher, data, listener, calibration.num_samples))
            samples, tokenizer = draw_samples(corpus, calibration.num_samples, 0), teacher.tokenizer
        work = stack.enter_context(scratch_directory())
        pass_ = calibration.as_pass(work, layer_progress(listener))
        if statistics_dir is not None:
            statistics = Statistics.load_for(teacher, statistics_dir)
        else:
            assert samples is not None
            statistics = collect.measure_statistics(teacher, samples, pass_, second_moment=calibration.second_moment)
        pruner = Pruner(teacher, Scoring(prune, samples, pass_, tokenizer), steps, statistics)
        listener.stage("search", "running")
        trials = None
        if corpus is not None:
            trials = Trials(DistillConfig(), TeacherSource(teacher.path), corpus, 0, work, listener)
        ranking = rank_shapes(pruner, search, machine, trials)
    listener.stage("search", "done")
    return ranking


@dataclass(frozen=True)
class Pruned:
    """A model that was cut.

    plan: the units that stayed.
    repairs: the repair steps that the cut needed.
    description: what `inspect` says of the model.
    """

    out: Path
    plan: Plan
    repairs: Sequence[str]
    description: Description


@dataclass(frozen=True)
class _Cut:
    """A cut that is asked for, with the model open and nothing read."""

    teacher: Checkpoint
    listed: Plan | Given
    shape: Shape | None  # None where it depends on the statistics
    given: Given
    repairs: Sequence[Step]
    needs: CutNeeds


def _asked_cut(
    model: Model, config: PruneConfig, repair: RepairConfig | None, plan_file: Path | None, statistics_dir: Path | None
) -> _Cut:
    teacher = open_checkpoint(model_directory(str(model)))
    listed = Given() if plan_file is None else load_given(plan_file, teacher.shape)
    if isinstance(listed, Plan) and (config.shape or config.drop_layers or config.keep_layers):
        raise PlanError(f"{plan_file} is a whole plan, which says what stays of every dim: give no sizes or layers too")
    fixed = [dim for dim in PRUNABLE if getattr(listed, dim) is not None]
    steps = resolve_repair(repair or RepairConfig(), teacher, fixed).steps or []
    shape, given = wanted(teacher, config, listed)
    needs = cut_needs(teacher, config, shape, given, steps, with_statistics=statistics_dir is not None)
    return _Cut(teacher, listed, shape, given, steps, needs)


def needs_of_prune(
    model: Model,
    config: PruneConfig,
    *,
    repair: RepairConfig | None = None,
    plan_file: Path | None = None,
    statistics_dir: Path | None = None,
) -> CutNeeds:
    """Tell what `prune` with the same arguments reads: statistics, text, or neither."""
    return _asked_cut(model, config, repair, plan_file, statistics_dir).needs


def prune(
    model: Model,
    config: PruneConfig,
    data: DataConfig | None = None,
    *,
    out: Path,
    repair: RepairConfig | None = None,
    calibration: CalibrateConfig | None = None,
    plan_file: Path | None = None,
    statistics_dir: Path | None = None,
    listener: Listener = SILENT,
) -> Pruned:
    """Cut one model and repair it.

    The units that stay are those of a plan file, or those that such a file or `config` lists, and by scores for the
    rest.

    Args:
        data: the text of the calibration samples, which scores and repair are fitted to; None where `needs_of_prune`
            says that no text is read.
        statistics_dir: what `calibrate` wrote; without it statistics are collected on `data`.
    """
    calibration = calibration or CalibrateConfig()
    prove_directory(out, inputs=[str(model), statistics_dir])
    with atomic_directory(out) as partial:
        cut = _asked_cut(model, config, repair, plan_file, statistics_dir)
        teacher, steps, needs = cut.teacher, cut.repairs, cut.needs
        # For a target, the largest shape that it allows.
        largest = cut.shape or feasible_for(teacher, config, SearchConfig(), None)[0].shape
        _require_free_space(teacher, largest, out, partial)
        calibration = calibration.model_copy(update={"second_moment": replaces_channels(steps)})
        pass_, text, tokenizer, statistics = calibration.as_pass(partial, layer_progress(listener)), None, None, None
        if needs.statistics and statistics_dir is not None:
            statistics = Statistics.load_for(teacher, statistics_dir)
        if needs.text:
            if data is None:
                raise DataError("this cut reads text, to score units or to repair them: give `data`")
            tokenizer = teacher.tokenizer
            num_samples = calibration.for_model(teacher.shape, block_length(data, teacher)).num_samples
            with corpus_for(teacher, data, listener, num_samples, scratch=partial) as corpus:
                text = draw_samples(corpus, num_samples, 0)
        if needs.statistics and statistics is None:
            assert text is not None
            statistics = collect.measure_statistics(teacher, text, pass_, second_moment=calibration.second_moment)
        pruner = Pruner(teacher, Scoring(config, text, pass_, tokenizer), steps, statistics)
        shape = cut.shape or predicted_shape(pruner)
        plan = cut.listed if isinstance(cut.listed, Plan) else pruner.plan(shape, cut.given)
        listener.stage("prune", "running")
        repairs = needed_steps(steps, plan.teacher, plan.student)
        plan = pruner.cut(plan, partial).plan
        plan.save(partial / "plan.json")
        description = describe(open_checkpoint(partial))
    listener.stage("prune", "done")
    return Pruned(out, plan, repairs, description)


def _require_free_space(teacher: Checkpoint, student: Shape, out: Path, at: Path) -> None:
    """Refuse a disk that has no room for a student of that shape.

    Raises: RunError.
    """
    counts = [teacher.architecture.count(shape, teacher.config) for shape in (student, teacher.shape)]
    # By share, for not every tensor need have the dtype of the embedding.
    require_free_space(out, round(teacher.written_bytes * counts[0].total / counts[1].total), at)


@dataclass(frozen=True)
class Distilled:
    """A student that was trained.

    corrected: the directory of the teacher that was corrected, if it was.
    description: what `inspect` says of the student.
    budget: how the minutes of the distillation became tokens; None where its tokens were given.
    fit: the memory that a step may take, and the settings that were changed for it; None where nothing may be.
    """

    out: Path
    corrected: Path | None
    training: Trained
    description: Description
    budget: Budget | None = None
    fit: Fit | None = None


def distill(
    teacher: Model,
    student: Model,
    data: DataConfig,
    config: DistillConfig,
    *,
    seed: int = 0,
    out: Path,
    listener: Listener = SILENT,
) -> Distilled | None:
    """Distil a student of any origin; under torchrun, with all its processes, of which the first returns the result.

    State lies beside `out` in `<out>.work` until the student is complete; the processes must all see it. A corrected
    teacher ends in `<out>.corrected`. Both lie in `out` where that is not replaced, as a mount point is not.
    """

    def planned() -> Planned:
        recipe = Recipe(model=str(teacher), seed=seed, data=data, prune=PruneConfig(), distill=with_guess(config))
        return Planned(recipe, *(open_config(model_directory(str(model))) for model in (student, teacher)))

    require_distill_effects(config)
    trackers.require_trackers(config.log_to)
    work, final = beside(out, "work"), {"student": out}
    final |= {CORRECTED: beside(out, CORRECTED)} if config.correction else {}
    first = parallel.ranks().rank == 0
    fit = find_fit(config, RunLayout(work).fit, planned, listener) if first else None
    with parallel.process_group():
        fit = agreed_fit(fit)
        config = config if fit is None else with_fit(config, fit)
        if parallel.is_first():
            _forget(work)
            inputs = [str(teacher), str(student), data.source, data.heldout]
            if not _is_complete(out, work):
                for made in final.values():
                    prove_directory(made, inputs=inputs)
            prove_directory(work, inputs=inputs, holds=True, writes=RUN_ENTRIES)
        require_correctable(config, data)
        of_teacher, origin = (
            open_checkpoint(model_directory(str(teacher))),
            open_checkpoint(model_directory(str(student))),
        )
        require_same_vocabulary(of_teacher, origin)
        require_same_tokenizer(of_teacher, origin)
        budget = _budget_of(config, data, of_teacher, origin, work, listener)
        config = config if budget is None else with_budget(config, budget)
        asked = Recipe(
            model=str(teacher), seed=seed, data=bounded(data, config.tokens), prune=PruneConfig(), distill=config
        )
        with RunDirectory(work, None, listener, final) as directory:
            keep_budget(budget, directory.layout.budget)
            keep_fit(fit, directory.layout.fit)
            run = Run(directory, asked, of_teacher, origin.shape, origin=origin, budget=budget, fit=fit)
            make_stages(run, OF_DISTILLATION)
            if not parallel.is_first():
                return None
            trained = run.models["student"]
            facts = read_record(trained).result
            if trained != out:
                _keep_beside(run, trained)
            for name, place in final.items():
                if (work / name).exists():  # it was moved, where this was interrupted just here
                    put_directory(work / name, place)
            work.rename(_leftover(work))
        _forget(work)
    training = facts["training"]
    assert isinstance(training, dict)
    return Distilled(out, final.get(CORRECTED), Trained(**training), describe(open_checkpoint(out)), budget, fit)


def _budget_of(
    config: DistillConfig, data: DataConfig, teacher: Checkpoint, student: Checkpoint, work: Path, listener: Listener
) -> Budget | None:
    """Find the tokens of a distillation that is given in minutes: those of `work`, or by a measurement."""
    require_one_length(config)
    if config.minutes is None:
        return None
    known = known_budget(RunLayout(work).budget, config.minutes)
    if known is not None:
        return known
    recipe = Recipe(model=str(teacher.path), data=data, prune=PruneConfig(), distill=config)
    models = Modelled.of(teacher), Modelled.of(student)
    asked = Asked(recipe, *models, block_length(data, teacher), None, ("student",), trainings_only=True)
    return measure_budget(asked, listener)


def _keep_beside(run: Run, trained: Path) -> None:
    """Move what a training leaves besides its student into the student's directory."""
    layout = run.directory.layout
    _keep_metrics(layout.work("distill"), trained)
    if run.recipe.distill.correction == "before":
        _keep_metrics(layout.work(f"distill-{CORRECTED}"), layout.stage(CORRECTED))
    trackers.keep(layout.work("distill"), trained)
    keep_sampled(run.corpus.path, trained)


def _is_complete(out: Path, work: Path) -> bool:
    """Tell whether the training in `work` is done and only its result is still to be moved."""
    return work.is_dir() and any((student / RECORD_FILE).exists() for student in (work / "student", out))


def _keep_metrics(work: Path, made: Path) -> None:
    if (work / METRICS_FILE).exists():
        (work / METRICS_FILE).replace(made / METRICS_FILE)


def _leftover(work: Path) -> Path:
    """Name a `work` that is no longer needed."""
    return work.with_name(f"{work.name}.partial")


def _forget(work: Path) -> None:
    shutil.rmtree(_leftover(work), ignore_errors=True)


def evaluate(
    model: Model,
    data: DataConfig,
    *,
    teacher: Model | None = None,
    blocks: int | None = None,
    batch: int = EvaluateConfig().batch,
    whole: bool = False,
    listener: Listener = SILENT,
) -> Evaluation:
    """Measure one model on the part of the data that a run holds out, or with `whole` on all of it.

    A GGUF file is measured in llama.cpp, block by block.

    Args:
        teacher: the model whose distributions the model is compared with.
        blocks: the most blocks to measure on; None for all with `whole`, else for as many as hold 65,536 tokens.
    """
    model, teacher = str(model), None if teacher is None else str(teacher)
    if is_gguf(model):
        require_gguf()
        from minitron.evaluation.gguf_files import evaluate_gguf

        return evaluate_gguf(Path(model), teacher, data, blocks=blocks, whole=whole, listener=listener)
    if data.source == TEACHER:
        raise DataError(
            "text is sampled from the teacher to prune or distil it, and not to evaluate: "
            f"give text, such as data/{SAMPLED} of a run that sampled some"
        )
    checkpoint = open_checkpoint(model_directory(str(model)))
    loaded_teacher = None
    if teacher is not None:
        reference = open_checkpoint(model_directory(str(teacher)))
        require_same_vocabulary(reference, checkpoint, padding=True)
        require_same_tokenizer(reference, checkpoint)
        loaded_teacher = load_model(reference.path).to(pick_device())
    with corpus_for(checkpoint, data, listener, whole=whole) as corpus:
        return measure_quality(
            load_model(checkpoint.path).to(pick_device()),
            measured_blocks(corpus, blocks, whole=whole),
            teacher=loaded_teacher,
            batch=batch,
            progress=partial(listener.progress, note="blocks"),
        )


def benchmark(
    model: Model,
    tasks: Sequence[str],
    options: TaskOptions | None = None,
    *,
    teacher: Model | None = None,
    directory: Path | None = None,
    cache: Path | None = None,
    listener: Listener = SILENT,
) -> BenchmarkResult:
    """Measure one model in benchmarks, and its teacher, which may be a GGUF file, on the same items.

    Args:
        directory: the rows of the tasks, for a machine without the hub.
        cache: where results are kept, to be read again for the same model and items.

    Raises: MinitronError for a GGUF file; TaskError for a task that cannot be measured.
    """
    model, teacher = str(model), None if teacher is None else str(teacher)
    if is_gguf(model):
        raise MinitronError(
            f"{model}: benchmarks are measured on checkpoints, not on GGUF files; measure the checkpoint, and what "
            "the file loses against it with `minitron evaluate FILE --teacher CHECKPOINT --data D`"
        )
    plan = plan_tasks(tasks, directory, options or TaskOptions(), listener=listener)
    paths = {"model": model_directory(str(model))} | ({"teacher": model_directory(str(teacher))} if teacher else {})
    listener.stage("benchmarks", "running")
    results = measure_tasks(paths, plan, cache=cache, listener=listener)
    listener.stage("benchmarks", "done")
    return BenchmarkResult(results["model"], results.get("teacher"))


def generate(
    model: Model, prompt: str, *, new_tokens: int | None = None, temperature: float = 0.0, seed: int = 0
) -> str:
    """Continue a prompt with a model on disk; a GGUF file runs in llama.cpp.

    Args:
        new_tokens: None for USUAL_NEW_TOKENS, or as many as the model's context has room for.
        temperature: 0 takes the likeliest token each time.
    """
    model = str(model)
    if is_gguf(model):
        require_gguf()
        from minitron.evaluation.gguf_files import generate_gguf

        return generate_gguf(Path(model), prompt, new_tokens=new_tokens, temperature=temperature, seed=seed)
    require_temperature(temperature)
    checkpoint = open_checkpoint(model_directory(str(model)))
    tokenizer, context = load_tokenizer(checkpoint.path), checkpoint.config.get("max_position_embeddings")
    num_ids = len(prompt_of(tokenizer, prompt, context, rows=checkpoint.shape.vocab))
    new_tokens = num_new_tokens(num_ids, new_tokens, context)
    loaded = load_model(checkpoint.path).to(pick_device())
    return generate_text(loaded, tokenizer, prompt, new_tokens=new_tokens, temperature=temperature, seed=seed)


def quantize(
    model: Model,
    config: QuantizeConfig,
    data: DataConfig | None = None,
    *,
    out: Path,
    importance_file: Path | None = None,
    listener: Listener = SILENT,
) -> QuantizedModel:
    """Write GGUF files of one model, with their table, and its importance matrix where there is one.

    Args:
        data: the text that the importance matrix is collected on; None for none.
        importance_file: an importance matrix that is there already.
    """
    require_gguf()
    model = str(model)
    from minitron.gguf.quantize import QuantizeText, require_possible, write_ladder

    prove_directory(out, inputs=[str(model)])
    checkpoint = open_checkpoint(model_directory(str(model)))
    informed = data is not None or importance_file is not None
    require_possible(checkpoint, config, informed=informed, importance_file=importance_file)
    with ExitStack() as stack:
        partial, text = stack.enter_context(atomic_directory(out)), None
        require_free_space(out, _bytes_of(checkpoint, config, informed=informed), partial)
        if data is not None:
            if data.block_tokens is None:
                usual = min(QUANTIZE_TOKENS, block_length(data, checkpoint))
                data = data.model_copy(update={"block_tokens": usual})
            corpus = stack.enter_context(corpus_for(checkpoint, data, listener, config.samples, scratch=partial))
            tokens = draw_samples(corpus, config.samples, 0).tokens
            heldout = torch.from_numpy(corpus.heldout.head(config.blocks).select(slice(None)))
            text = QuantizeText(tokens, heldout, data.source)
            keep_sampled(corpus.path, partial)
        name = model_name(model)
        listener.stage("quantize", "running")
        table = write_ladder(
            checkpoint, config, partial, text=text, importance_file=importance_file, name=name, listener=listener
        )
    listener.stage("quantize", "done")
    return table


def _bytes_of(checkpoint: Checkpoint, config: QuantizeConfig, *, informed: bool) -> int:
    """Return the bytes of all files that the config asks for; a mixture counts by its matrices alone."""
    from minitron.gguf.quantize import plan_files

    mixtures = [bits * checkpoint.parameters.total / 8 for bits in config.bits_per_weight]
    files = [file.bytes for file in plan_files(checkpoint, config, informed=informed)]
    return round(sum(files) + sum(config.sizes) + sum(mixtures))


def plan_quantized(model: Model, config: QuantizeConfig, *, informed: bool = False) -> "list[PlannedFile]":
    """Plan the files that `quantize` would write, without reading weights."""
    require_gguf()
    from minitron.gguf.quantize import plan_files

    return plan_files(open_checkpoint(model_directory(str(model))), config, informed=informed)
