"""Each room on its own, as the command line's single verbs use it."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron.calibration.collect import CalibrateConfig, Statistics
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
    scratch_errors,
)
from minitron.core.progress import SILENT, Listener
from minitron.data.corpus import SAMPLED, TEACHER, Corpus, DataConfig, open_corpus, separator
from minitron.distillation import trackers, train
from minitron.distillation.config import DistillConfig, of_correction, resolve
from minitron.distillation.teachers import require_same_tokenizer, require_same_vocabulary
from minitron.distillation.train import CORRECTED
from minitron.evaluation.generate import generate, num_new_tokens, prompt_of, require_temperature
from minitron.evaluation.quality import EvaluateConfig, evaluate
from minitron.evaluation.tasks.measure import TaskOptions, measure_tasks, plan_tasks
from minitron.evaluation.tasks.suite import kept
from minitron.model.architecture import PRUNABLE, Shape
from minitron.model.checkpoint import (
    Checkpoint,
    load_model,
    load_tokenizer,
    open_checkpoint,
    resolve_model,
)
from minitron.model.config_json import read_config
from minitron.model.describe import describe
from minitron.model.draft import Draft, draft_table
from minitron.model.model_config import open_config
from minitron.model.weight_files import has_weights, stored_tensors
from minitron.pipeline.directory import RUN_ENTRIES, RunDirectory, read_record
from minitron.pipeline.rules import require_distill_effects
from minitron.pipeline.run import bounded, require_correctable
from minitron.pipeline.stages import (
    block_length,
    calibrate_on,
    calibrate_tokens,
    calibration_tokens,
    correct,
    make_corpus,
    prepare_data,
    record_lessons,
    repairing,
    scoring_on,
    student_maker,
    teach,
)
from minitron.pipeline.student_shape import feasible_for, machine_for, ranked
from minitron.pruning.cut import cut
from minitron.pruning.importance import Scores, even_scores
from minitron.pruning.plan import (
    Given,
    Plan,
    PruneConfig,
    choose,
    given_layers,
    load_given,
    needs_scores,
    step_shapes,
    target_shape,
)
from minitron.pruning.repair.writer import CutNeeds, RepairConfig, Step, choice_left, needed_steps, repaired_cut
from minitron.pruning.repair.writer import resolve as resolve_repair
from minitron.pruning.scoring import Scoring, layers_need_a_pass, plan_student, score_layers, score_units
from minitron.recipe import Recipe
from minitron.shapes.space import SearchConfig


def inspect_model(path: Path) -> dict[str, Any]:
    """What `describe` says, and whether weights are there; where they are, they are held against config.json."""
    weights = has_weights(path)
    return describe(open_checkpoint(path) if weights else open_config(path)) | {"weights": weights}


def draft_model(path: Path) -> Draft | None:
    """A draft of the table for a model type that has none; None without weights, whose shapes it is drawn from."""
    if not has_weights(path):
        return None
    shapes = {name: stored.shape for name, stored in stored_tensors(path).items()}
    return draft_table(read_config(path), shapes)


def calibrate_model(
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
            told_by = separator(data_config, load_tokenizer(teacher.path))
            return calibrate_tokens(teacher, parallel.broadcast(None), config, separator=told_by)
        with atomic_directory(out) as partial:
            with corpus_for(teacher, data_config, listener, config.samples, seed, scratch=partial) as corpus:
                tokens = parallel.broadcast(calibration_tokens(corpus, config, seed))
                statistics = calibrate_tokens(
                    teacher, tokens, config, scratch=partial, separator=corpus.separator, listener=listener
                )
                keep_sampled(corpus.path, partial)
            statistics.save(partial)
    return statistics


def search_model(
    model: str,
    *,
    prune: PruneConfig,
    search: SearchConfig,
    calibrate: CalibrateConfig | None = None,
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
    calibration = (calibrate or CalibrateConfig()).model_copy(update={"second_moment": "basis" in (repair.steps or [])})
    feasible_for(teacher, prune, search, machine_for(search, teacher.dtype))  # an empty search need not read text first
    with ExitStack() as stack:
        corpus = None
        if data_config is not None:
            corpus = stack.enter_context(corpus_for(teacher, data_config, listener, calibration.samples))
        work = stack.enter_context(scratch_directory())
        if statistics_dir is not None:
            statistics = Statistics.load_for(teacher, statistics_dir)
        else:
            assert corpus is not None
            statistics = calibrate_on(teacher, corpus, calibration, 0, scratch=work, listener=listener)
        scores = score_units(statistics, teacher.shape, prune)
        recipe = Recipe(model=model, prune=prune, search=search, calibrate=calibration, repair=repair)
        make = None
        if corpus is not None:
            scoring = scoring_on(corpus, prune, calibration, 0, load_tokenizer(teacher.path), listener)
            mend = repairing(recipe, statistics, scores, corpus, listener)
            make = student_maker(teacher, scores, scoring, mend)
        listener.stage("search", "running")
        _, facts = ranked(recipe, teacher, statistics, scores, corpus, make, work=work, listener=listener)
    listener.stage("search", "done")
    return facts


def prune_model(
    model: str,
    *,
    config: PruneConfig,
    repair: RepairConfig,
    plan_file: Path | None,
    statistics_dir: Path | None,
    data_config: Callable[[], DataConfig],
    samples: int = CalibrateConfig().samples,
    calibrate: CalibrateConfig | None = None,
    check: Callable[[CutNeeds], None] = lambda needs: None,
    out: Path,
    listener: Listener = SILENT,
) -> tuple[Plan, dict[str, Any]]:
    """Cut one model by a plan file, or by units that such a file or `config` lists and by scores for the rest, and
    repair it.

    Statistics are those given, else collected on `data_config`, which is asked for only where text is needed.

    Args:
        samples: blocks of that text, which the repair is fitted to also where statistics are given.
        calibrate: these blocks, and how they are read; default `samples` and the defaults.
        check: told what the cut needs before anything is read or chosen; may refuse.
    """
    calibrate = calibrate or CalibrateConfig(samples=samples)
    prove_directory(out, inputs=[model, statistics_dir])
    teacher = open_checkpoint(resolve_model(model))
    with atomic_directory(out) as partial:
        given = Given() if plan_file is None else load_given(plan_file, teacher.shape)
        fixed = [dim for dim in PRUNABLE if getattr(given, dim) is not None]
        steps = resolve_repair(repair, teacher, fixed).steps or []
        if isinstance(given, Plan):
            _require_nothing_else(config, plan_file)
        check(_needs(teacher, config, given, steps, with_statistics=statistics_dir is not None))
        known = _Known(teacher, config, steps, statistics_dir, data_config, calibrate, out, partial, listener)
        plan = given if isinstance(given, Plan) else _choose(known, given)
        if isinstance(given, Plan):
            known.require_free_space(plan.student)
        needed = needed_steps(steps, plan)
        listener.stage("prune", "running")
        if needed:
            scoring = known.scoring
            plan = repaired_cut(
                teacher,
                plan,
                partial,
                steps=needed,
                statistics=known.statistics,
                scores=known.scores,
                tokens=scoring.tokens,
                **scoring.pass_options,
            ).plan
        else:
            cut(teacher, plan, partial)
        plan.save(partial / "plan.json")
        facts = describe(open_checkpoint(partial)) | {"repairs": needed}
    listener.stage("prune", "done")
    return plan, facts


def _needs(
    teacher: Checkpoint, config: PruneConfig, given: Plan | Given, steps: Sequence[Step], *, with_statistics: bool
) -> CutNeeds:
    if isinstance(given, Plan):
        shape, listed = given.student, Given(**{dim: getattr(given, dim) for dim in PRUNABLE})
    else:
        shape = target_shape(teacher.architecture, teacher.config, teacher.shape, config, given)
        by_number = given_layers(config, teacher.shape)
        listed = given if by_number.layers is None else replace(given, layers=by_number.layers)
    choice = choice_left(teacher.architecture, config, teacher.shape, shape, listed, steps)
    passes = choice.steps > 1 or (choice.layers and config.layer_criterion != "block_influence")
    scored = needs_scores(teacher.shape, shape, listed)
    return CutNeeds(
        choice,
        statistics=scored or bool(choice.repairs),
        text=bool(choice.repairs) or (scored and (passes or not with_statistics)),
    )


@dataclass
class _Known:
    """What a cut is chosen by and its repair fitted to, got when it is first needed."""

    teacher: Checkpoint
    config: PruneConfig
    steps: list[Step]
    statistics_dir: Path | None
    data_config: Callable[[], DataConfig]
    calibrate: CalibrateConfig
    out: Path
    work: Path
    listener: Listener

    def require_free_space(self, student: Shape) -> None:
        """Raises: RunError if the disk has no room for a student of that shape."""
        counts = [
            self.teacher.architecture.count(shape, self.teacher.config) for shape in (student, self.teacher.shape)
        ]
        # By share, for not every tensor need have the dtype of the embedding.
        require_free_space(self.out, round(self.teacher.weight_bytes * counts[0].total / counts[1].total), self.work)

    @cached_property
    def scoring(self) -> Scoring:
        calibration = self.calibrate.model_copy(update={"second_moment": "basis" in self.steps})
        tokenizer = load_tokenizer(self.teacher.path)
        samples = calibration.samples
        with corpus_for(self.teacher, self.data_config(), self.listener, samples, scratch=self.work) as corpus:
            scoring = scoring_on(corpus, self.config, calibration, 0, tokenizer, self.listener)
        return replace(scoring, scratch=self.work)

    @cached_property
    def statistics(self) -> Statistics:
        if self.statistics_dir is not None:
            return Statistics.load_for(self.teacher, self.statistics_dir)
        scoring = self.scoring
        return calibrate_tokens(
            self.teacher,
            scoring.tokens,
            scoring.calibrate,
            scratch=self.work,
            separator=scoring.separator,
            listener=self.listener,
        )

    @cached_property
    def scores(self) -> Scores:
        return score_units(self.statistics, self.teacher.shape, self.config)


def _choose(known: _Known, given: Given) -> Plan:
    teacher, config = known.teacher, known.config
    shape = target_shape(teacher.architecture, teacher.config, teacher.shape, config, given)
    known.require_free_space(shape)
    by_number = given_layers(config, teacher.shape)
    given = given if by_number.layers is None else replace(given, layers=by_number.layers)
    if not needs_scores(teacher.shape, shape, given):
        return choose(even_scores(teacher.shape), teacher.shape, shape, given)
    first, *further = step_shapes(teacher.architecture, teacher.shape, shape, config.iterations, given)
    if not further and not layers_need_a_pass(config, teacher.shape, first):
        return choose(known.scores, teacher.shape, first, given)
    scoring = known.scoring
    return plan_student(
        teacher, lambda first: score_layers(teacher, known.scores, first, scoring), shape, scoring, given
    )


def _require_nothing_else(config: PruneConfig, plan_file: Path | None) -> None:
    if config.shape or config.drop_layers or config.keep_layers:
        raise PlanError(f"{plan_file} is a whole plan, which says what stays of every dim: give no sizes or layers too")


def distill_models(
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
    with parallel.process_group() as here:
        if here.rank == 0:
            inputs = [teacher, student, data_config.source, data_config.heldout]
            _forget(work)
            if not _is_complete(out, work):
                for made in final.values():
                    prove_directory(made, inputs=inputs)
            prove_directory(work, inputs=inputs, holds=True, writes=RUN_ENTRIES)
        require_correctable(config, data_config)
        guide, pupil = open_checkpoint(resolve_model(teacher)), open_checkpoint(resolve_model(student))
        require_same_vocabulary(guide, pupil)
        require_same_tokenizer(guide, pupil)
        if here.rank > 0:
            _assist(guide, pupil, config, seed, work, final)
            return {}
        data_config = bounded(data_config, config.tokens)
        with RunDirectory(work, None, listener, final) as stages:
            corpus = prepare_data(stages, data_config, guide, load_tokenizer(guide.path), seed)
            parallel.require_all_well()  # the others wait for the text
            config = _resolved(config, guide, pupil, corpus)
            if config.correction == "before":
                guide = open_checkpoint(correct(stages, config, seed, guide.path, corpus))
            source = guide.path
            if config.teacher == "recorded":
                source = record_lessons(stages, config, guide, corpus, seed)
            parallel.require_all_well()  # the others wait for the teacher, or what it says
            made = teach(stages, "student", config, seed, pupil.path, source, corpus)
            facts = read_record(made)["result"]
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


def _assist(
    guide: Checkpoint,
    pupil: Checkpoint,
    config: DistillConfig,
    seed: int,
    work: Path,
    final: Mapping[str, Path],
) -> None:
    """What processes other than the first do of a distillation."""

    def done(stage: str) -> bool:
        return any((path / "record.json").exists() for path in (work / stage, final[stage]))

    parallel.require_all_well()
    corpus = open_corpus(work / "data")
    config = _resolved(config, guide, pupil, corpus)
    if config.correction == "before" and not done(CORRECTED):
        own = of_correction(config)
        train.distill(guide.path, None, corpus, own, seed=seed, work=work / f"distill-{CORRECTED}", out=work)
    parallel.require_all_well()
    source = work / CORRECTED if config.correction == "before" else guide.path
    source = work / "lessons" if config.teacher == "recorded" else source
    if not done("student"):
        train.distill(pupil.path, source, corpus, config, seed=seed, work=work / "distill", out=work)


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


def evaluate_model(
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
        quality = evaluate(
            load_model(checkpoint.path).to(pick_device()),
            corpus.heldout.head(blocks),
            teacher=guide,
            batch=batch,
            progress=lambda done, total: listener.progress(done, total, "blocks"),
        )
    return quality.to_dict()


def benchmark_models(
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


def generate_text(model: str, prompt: str, *, new_tokens: int | None, temperature: float, seed: int) -> str:
    """The continuation of a prompt by a model on disk.

    Args:
        new_tokens: None for USUAL_NEW_TOKENS, or as many as the model's context has room for.
    """
    require_temperature(temperature)
    checkpoint = open_checkpoint(resolve_model(model))
    tokenizer, context = load_tokenizer(checkpoint.path), checkpoint.config.get("max_position_embeddings")
    num_ids = len(prompt_of(tokenizer, prompt, context, rows=checkpoint.shape.vocab))
    new_tokens = num_new_tokens(num_ids, new_tokens, context)
    loaded = load_model(checkpoint.path).to(pick_device())
    return generate(loaded, tokenizer, prompt, new_tokens=new_tokens, temperature=temperature, seed=seed)


def keep_sampled(corpus: Path, out: Path) -> None:
    """Text that was sampled took longest of all, and can be given to the next command."""
    if (corpus / SAMPLED).exists():
        shutil.copyfile(corpus / SAMPLED, out / SAMPLED)


@contextmanager
def corpus_for(
    checkpoint: Checkpoint,
    config: DataConfig,
    listener: Listener,
    samples: int | None = None,
    seed: int = 0,
    *,
    whole: bool = False,
    scratch: Path | None = None,
) -> Iterator[Corpus]:
    """A corpus that is gone after the block.

    Args:
        samples: training blocks that are needed of text without end, which may be the checkpoint's own.
        seed: of text that is sampled.
        whole: hold out all of the text.
        scratch: an existing directory to keep it in; default the system's temporary directory.
    """
    listener.stage("data", "running")
    if samples is not None:
        config = bounded(config, samples * block_length(config, checkpoint))
    with scratch_directory(scratch) as path:
        tokenizer = load_tokenizer(checkpoint.path)
        with scratch_errors(scratch):
            make_corpus(config, checkpoint, tokenizer, seed=seed, out=path, whole=whole, listener=listener)
        yield open_corpus(path)
