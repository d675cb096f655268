"""The stages of a run, each a function that does its work if its directory does not have it yet."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import Statistics
from minitron.core import parallel
from minitron.core.config import Section
from minitron.core.device import compute_dtype, pick_device
from minitron.core.errors import RunError
from minitron.core.files import write_json
from minitron.core.progress import Listener, layer_progress
from minitron.core.typed_files import as_typed, read_typed
from minitron.data.corpus import Corpus, draw_samples, open_corpus, require_undamaged
from minitron.data.sources import TEACHER
from minitron.data.supply import make_corpus
from minitron.data.writing import source_files
from minitron.distillation.config import DistillConfig
from minitron.distillation.layouts import Budget, Fit
from minitron.distillation.recording import DEFAULT_TOP_K, LESSONS_INDEX, record_logits
from minitron.distillation.schedule import ModelSize, Schedule, resolve, resolve_without_student
from minitron.distillation.state import forget_states
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import CORRECTED, Trained, Training, blocks_read, distill
from minitron.evaluation.generate import generate_text
from minitron.evaluation.quality import EvaluateConfig, measure_quality
from minitron.evaluation.speed import RATIO, Load, measure_in_turn, transformers_timer
from minitron.evaluation.tasks.measure import TaskOptions, TaskPlan, measure_tasks, plan_tasks
from minitron.evaluation.tasks.rows import task_of
from minitron.evaluation.tasks.suite import kept
from minitron.model.architecture import PRUNABLE, Shape
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint
from minitron.model.describe import describe
from minitron.model.naming import run_name
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.model.weight_files import carried_files, model_files
from minitron.pipeline.directory import RunDirectory, read_record
from minitron.pruning.config import PruneConfig
from minitron.pruning.depth import LAYER_CRITERIA
from minitron.pruning.given import given_layers
from minitron.pruning.importance import CRITERIA, Scores
from minitron.pruning.plan import Plan
from minitron.pruning.repair import needed_steps
from minitron.pruning.steps import Pruner, Scoring, layers_need_a_pass
from minitron.recipe import Recipe
from minitron.report.card import described
from minitron.report.exporters import EXPORTERS, Export
from minitron.shapes import layouts
from minitron.shapes.rank import Ranking, distilled_steps
from minitron.shapes.space import machine_for
from minitron.shapes.trial import Trials, judging_blocks, rank_shapes

SPEED_TOKENS = 32  # decoded by teacher and student, behind a prompt of a block or less
StageResult = dict[str, object]  # what a record says of a stage


@dataclass
class Run:
    """A run in progress holds its settings, as far as they are resolved, and what its stages have made.

    teacher: one that is corrected before takes the place of the recipe's from that stage on.
    shape: the student's; until a search has found it, the largest within the budgets.
    benchmarks: what the evaluations measure besides text; None in processes other than the first.
    origin: a student that exists already; None where it is cut from the teacher.
    models: name -> the checkpoints to evaluate.
    budget: how the minutes of the distillation became tokens; None where its tokens were given.
    fit: the memory that a step may take, and the settings that were changed for it; None where nothing may be.
    """

    directory: RunDirectory
    recipe: Recipe
    teacher: Checkpoint
    shape: Shape
    benchmarks: TaskPlan | None = None
    origin: Checkpoint | None = None
    models: dict[str, Path] = field(default_factory=dict)
    budget: Budget | None = None
    fit: Fit | None = None
    corpus: Corpus = field(init=False)
    statistics: Statistics = field(init=False)
    pruner: Pruner = field(init=False)
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.models["teacher"] = self.teacher.path

    @property
    def listener(self) -> Listener:
        return self.directory.listener

    @property
    def source(self) -> TeacherSource:
        """The teacher that the student learns from."""
        if self.recipe.distill.teacher == "recorded":
            return TeacherSource(recording=self.directory.layout.stage("lessons"))
        return TeacherSource(checkpoint=self.teacher.path)

    def update(self, **sections: Section) -> None:
        """Replace sections of the recipe by their resolved form."""
        self.recipe = self.directory.update_recipe(self.recipe, sections)

    def digest(self, model: Path) -> str:
        """The digest of a checkpoint."""
        return self.directory.digest(model_files(model))

    def schedule(self, kind: Callable[[DistillConfig, int, int], Schedule]) -> Schedule:
        """The schedule of a training, such as `Schedule.of_student`."""
        return kind(self.recipe.distill, self.corpus.block_tokens, self.recipe.seed)

    def resolved_training(self) -> DistillConfig:
        """The settings of the distillation, resolved for the shape that the student has as far as it is known."""
        teacher = ModelSize(self.teacher.shape, self.teacher.weights_rms)
        student = ModelSize(self.shape, teacher.weights_rms if self.origin is None else self.origin.weights_rms)
        return resolve(
            self.recipe.distill,
            student,
            teacher,
            block_tokens=self.corpus.block_tokens,
            train_tokens=self.corpus.train_tokens,
            repaired=bool(self.recipe.repair.steps),
        )


def prepare_data(run: Run) -> None:
    """Make token blocks of the text, and hold out a part of its documents."""
    config, seed, directory = run.recipe.data, run.recipe.seed, run.directory
    inputs = {
        "text": directory.digest(source_files(config)),
        "tokenizer": directory.digest(carried_files(run.teacher.path)),
    }
    facts: StageResult = {"data": config}
    state = None
    if config.source == TEACHER:
        inputs["teacher"] = run.digest(run.teacher.path)
        facts["seed"] = seed
        state = directory.layout.work("data-state")

    def work(out: Path) -> StageResult:
        listener = directory.listener
        return make_corpus(config, run.teacher, seed=seed, out=out, state=state, listener=listener)

    was_there = directory.layout.record("data").exists()
    made = directory.do("data", work, inputs=inputs, config=facts, state=state)
    if state is not None and parallel.is_first():
        shutil.rmtree(state, ignore_errors=True)
    run.corpus = open_corpus(made)
    if was_there and parallel.is_first():  # perhaps for long; what has just been written is not read again
        require_undamaged(run.corpus)


def correct_teacher(run: Run) -> None:
    """Train the teacher on the first part of the text that it is going to teach; it takes the teacher's place."""
    resolved = resolve_without_student(
        run.recipe.distill,
        ModelSize(run.teacher.shape, run.teacher.weights_rms),
        block_tokens=run.corpus.block_tokens,
        train_tokens=run.corpus.train_tokens,
    )
    run.update(distill=resolved)
    schedule = run.schedule(Schedule.of_correction)
    inputs = {"model": run.digest(run.teacher.path), "data": run.corpus.digest}
    facts: StageResult = {"correction": schedule.config, "seed": schedule.seed}
    state = run.directory.layout.work(f"distill-{CORRECTED}")
    training = Training(run.teacher.path, TeacherSource(), run.corpus, schedule, state, run.listener)
    run.teacher = open_checkpoint(_train(run, CORRECTED, training, inputs, facts))


def collect_statistics(run: Run) -> None:
    """Collect the statistics of the calibration samples in one pass."""
    config, seed, directory = run.recipe.calibrate, run.recipe.seed, run.directory

    def collect(scratch: Path | None = None) -> Statistics:
        samples = draw_samples(run.corpus, config.num_samples, seed)
        pass_ = config.as_pass(scratch, layer_progress(run.listener))
        return measure_statistics(run.teacher, samples, pass_, second_moment=config.second_moment)

    def work(out: Path) -> StageResult:
        statistics = collect(out)
        statistics.save(out)
        return {"samples": statistics.samples, "tokens": statistics.tokens}

    made = directory.do(
        "statistics",
        work,
        inputs={"model": run.digest(run.teacher.path), "data": run.corpus.digest},
        config={"calibrate": config, "seed": seed},
        assist=collect,
    )
    run.statistics = Statistics.load_of_shape(run.teacher, made)
    run.pruner = _pruner(run)


def _pruner(run: Run) -> Pruner:
    """Make the pruner of the run, which also cuts a search's candidates."""
    recipe = run.recipe
    assert recipe.repair.steps is not None, "resolve fills them in"
    samples = draw_samples(run.corpus, recipe.calibrate.num_samples, recipe.seed)
    pass_ = recipe.calibrate.as_pass(progress=layer_progress(run.listener))
    scoring = Scoring(recipe.prune, samples, pass_, run.teacher.tokenizer)
    return Pruner(run.teacher, scoring, recipe.repair.steps, run.statistics)


def record_teacher(run: Run) -> None:
    """Record the teacher's logits for every block that will be trained on or evaluated."""
    config, corpus, seed = run.resolved_training(), run.corpus, run.recipe.seed

    def work(out: Path) -> StageResult:
        blocks = blocks_read(corpus, Schedule.of_student(config, corpus.block_tokens, seed))
        if run.recipe.searches:
            judge = judging_blocks(corpus, seed, run.recipe.search.judge_blocks)
            blocks = np.unique(np.concatenate([blocks, judge.select(slice(None))]), axis=0)
        facts = record_logits(
            run.teacher,
            Samples(torch.from_numpy(blocks), corpus.separator),
            Pass(compute_dtype(config.precision, pick_device()), scratch=out, progress=layer_progress(run.listener)),
            out,
            top_k=config.top_k or DEFAULT_TOP_K,
            temperature=config.temperature,
        )
        return {name: value for name, value in facts.items() if name != "shards"}

    read = ("top_k", "temperature", "tokens", "batch_blocks", "evaluate_blocks", "precision")
    run.directory.do(
        "lessons",
        work,
        inputs={"model": run.digest(run.teacher.path), "data": corpus.digest},
        config={"distill": {name: getattr(config, name) for name in read}, "seed": seed},
    )


def search_shape(run: Run) -> None:
    """Rank the shapes within the budgets, and give the student the best; search/candidates.json holds all of them."""
    recipe, directory, layout = run.recipe, run.directory, run.directory.layout
    trials = Trials(
        recipe.distill, run.source, run.corpus, recipe.seed, layout.work("search-state"), directory.listener
    )

    def measure() -> Ranking:
        return rank_shapes(run.pruner, recipe.search, machine_for(recipe.search, run.teacher.written_dtype), trials)

    def work(out: Path) -> StageResult:
        ranking = measure()
        found = ranking.candidates
        write_json(out / layout.candidates.name, ranking.to_dict())
        return {
            "winner": found[0].candidate.to_dict(),
            "candidates": len(found),
            "cut": sum(0 in one.losses for one in found),
            "distilled": sum(one.step > 0 for one in found),
            "tokens": distilled_steps(found) * ranking.step_tokens,
        }

    directory.do(
        "search",
        work,
        inputs={
            "model": run.digest(run.teacher.path),
            "statistics": directory.digest([layout.statistics]),
            "data": run.corpus.digest,
            **_task_digest(directory, recipe.prune),
        },
        config={
            "search": recipe.search,
            "prune": recipe.prune,
            "repair": recipe.repair,
            "distill": recipe.distill.for_record,
            "seed": recipe.seed,
        },
        state=trials.work,
        assist=measure,
    )
    again = f"remove {layout.stage('search')} and run the same command to search again"
    record = read_typed(layout.candidates, layouts.SEARCH, RunError, way_out=again)
    run.shape = Shape(**vars(record.candidates[0].shape))
    # The recipe of the run makes this student again, without the search.
    sizes = {dim: getattr(run.shape, dim) for dim in PRUNABLE}
    run.update(prune=recipe.prune.model_copy(update={"target": None, "shape": sizes}))


def _task_digest(directory: RunDirectory, config: PruneConfig) -> dict[str, str]:
    """Return the digest of the file of questions that layers are scored by, if there is one."""
    file = Path(config.layer_task or "").expanduser()
    return {"task": directory.digest([file])} if file.is_file() else {}


def _criterion(run: Run, first: Shape) -> tuple[StageResult, dict[str, str]]:
    """Return the settings that units are scored by, and the digests of the inputs of layers' scores.

    The digests are empty where the statistics hold the layers' scores.
    """
    config, teacher = run.pruner.scoring.config, run.teacher.shape
    facts: StageResult = {
        "criterion": config.criterion,
        "sequence": config.sequence_aggregate,
        "batch": config.batch_aggregate,
    }
    facts |= {"seed": config.seed} if "seed" in CRITERIA[config.criterion].options else {}
    if not layers_need_a_pass(config, teacher, first):
        return facts, {}
    facts |= {"layers": config.layer_criterion, "task": config.layer_task, "samples": config.layer_samples}
    of_number = LAYER_CRITERIA[config.layer_criterion].drops
    facts |= {"dropped": teacher.layers - first.layers} if of_number else {}
    measured = {"model": run.digest(run.teacher.path), "data": run.corpus.digest}
    return facts, measured | _task_digest(run.directory, config)


def score_teacher(run: Run) -> None:
    """Score the teacher's units for the first step of the cut.

    The shape is known now, and so is all of the training: impossible settings are refused before the cut.
    """
    run.update(distill=run.resolved_training())
    first, *_ = run.pruner.shapes(run.shape, given_layers(run.pruner.scoring.config, run.teacher.shape))
    criterion, measured = _criterion(run, first)

    def work(out: Path) -> StageResult:
        run.pruner.at(out).score(first).save(out)
        return criterion

    inputs = {"statistics": run.directory.digest([run.directory.layout.statistics])} | measured
    run.directory.do("scores", work, inputs=inputs, config={"prune": criterion})


def make_plan(run: Run) -> None:
    """Choose the units that stay, at once or in steps."""
    config, directory = run.pruner.scoring.config, run.directory
    given = given_layers(config, run.teacher.shape)
    first, *further = run.pruner.shapes(run.shape, given)

    def work(out: Path) -> StageResult:
        scores = Scores.load(directory.layout.stage("scores"), run.teacher.shape)
        plan = run.pruner.at(out).plan(run.shape, given, scores)
        plan.save(out / directory.layout.plan.name)
        return {"plan": str(plan)}

    inputs = {"scores": directory.digest([directory.layout.scores])}
    facts: StageResult = {"shape": asdict(run.shape), "drop_layers": config.drop_layers}
    facts |= {"keep_layers": config.keep_layers} if config.keep_layers else {}
    if further:
        inputs |= {"model": run.digest(run.teacher.path), "data": run.corpus.digest}
        facts |= {"iterations": config.iterations, "criterion": _criterion(run, first)[0]}
    directory.do("plan", work, inputs=inputs, config=facts)
    run.plan = Plan.load(directory.layout.plan)


def cut_teacher(run: Run) -> None:
    """Cut the teacher, and repair the cut."""
    needed, directory = needed_steps(run.pruner.repairs, run.plan.teacher, run.plan.student), run.directory
    digests: dict[str, str] = {}

    def work(out: Path) -> StageResult:
        repaired = run.pruner.at(out).cut(run.plan, out)
        repaired.plan.save(out / directory.layout.cut.name)
        digests.update(repaired.digests)
        return describe(open_checkpoint(out)).to_dict() | {"repairs": needed}

    inputs = {"model": run.digest(run.teacher.path), "plan": directory.digest([directory.layout.plan])}
    facts: StageResult = {"repair": {"steps": needed}}
    if needed:
        inputs |= {"data": run.corpus.digest, "statistics": directory.digest([directory.layout.statistics])}
        facts |= {"calibrate": run.recipe.calibrate, "seed": run.recipe.seed}
    made = directory.do("pruned", work, inputs=inputs, config=facts)
    directory.remember({made / file: digest for file, digest in digests.items()})
    run.models["pruned"] = made
    _adopt_search_state(run)


def _adopt_search_state(run: Run) -> None:
    """Let the distillation resume from the state of the search's winner, if there is one, and remove the others."""
    layout = run.directory.layout
    record = layout.record("search")
    if not record.exists() or not parallel.is_first():
        return
    found = as_typed(read_record(record.parent).result, layouts.SEARCH_RESULT, f"{record}: result", RunError)
    searched = layout.work("search-state")
    state, final = searched / found.winner.name / "distill", layout.work("distill")
    if state.exists() and not final.exists():
        state.rename(final)
    shutil.rmtree(searched, ignore_errors=True)


def train_student(run: Run) -> None:
    """Distil the student; a teacher that is corrected in parallel is written beside it."""
    run.update(distill=run.resolved_training())
    source, directory, config = run.source, run.directory, run.recipe.distill
    pruned = run.models["pruned"] if run.origin is None else run.origin.path
    inputs = {"pruned": run.digest(pruned), "data": run.corpus.digest}
    named: dict[str, Path] = {}
    if source.recording is not None:
        named = {"teacher": source.recording / LESSONS_INDEX}
        inputs["teacher"] = directory.digest([*named.values()])
    else:
        inputs["teacher"] = run.digest(run.teacher.path)
    facts: StageResult = {"distill": config.for_record, "seed": run.recipe.seed}
    schedule, state = run.schedule(Schedule.of_student), directory.layout.work("distill")
    training = Training(pruned, source, run.corpus, schedule, state, run.listener)
    made = _train(run, "student", training, inputs, facts, named)
    corrected = {CORRECTED: directory.layout.stage(CORRECTED)} if config.correction else {}
    run.models = {"teacher": run.models["teacher"]} | corrected | run.models | {"student": made}


def train_from_scratch(run: Run) -> None:
    """Train the baseline, a model of the student's shape from random weights, on the same text."""
    schedule, state = run.schedule(Schedule.of_scratch), run.directory.layout.work("distill-scratch")
    pruned = run.models["pruned"]
    training = Training(pruned, TeacherSource(), run.corpus, schedule, state, run.listener)
    inputs = {"pruned": run.digest(pruned), "data": run.corpus.digest}
    facts: StageResult = {"distill": schedule.config.for_record, "seed": schedule.seed}
    run.models["scratch"] = _train(run, "scratch", training, inputs, facts)


def _train(
    run: Run,
    name: str,
    training: Training,
    inputs: Mapping[str, str],
    facts: StageResult,
    named: Mapping[str, Path] | None = None,
) -> Path:
    """Make a stage that trains, with all processes; return the model's directory.

    Args:
        named: files that errors name for inputs, as `RunDirectory.do` takes them.
    """
    layout, state = run.directory.layout, training.work

    def learn(out: Path = state) -> Trained:
        return distill(training, out)

    def work(out: Path) -> StageResult:
        trained = learn(out)
        if training.schedule.teacher_rates is not None:
            corrected = layout.stage(CORRECTED)
            shutil.rmtree(corrected, ignore_errors=True)  # of a run that was killed just here
            (state / CORRECTED).rename(corrected)
        facts = describe(open_checkpoint(out)).to_dict() | {"training": asdict(trained)}
        if name == "student" and run.budget is not None:
            facts["budget"] = run.budget.model_dump()
        if name == "student" and run.fit is not None and run.fit.changes:
            facts["fit"] = run.fit.model_dump()
        return facts

    made = run.directory.do(name, work, inputs=inputs, config=facts, state=state, named=named, assist=learn)
    if parallel.is_first():
        forget_states(state)
    return made


def plan_benchmarks(config: EvaluateConfig, listener: Listener) -> TaskPlan | None:
    """Plan the benchmarks of the evaluations, or return None; a plan that cannot work is refused before the run."""
    if not config.benchmarks:
        return None
    directory = Path(config.tasks_dir).expanduser() if config.tasks_dir else None
    options = TaskOptions(limit=config.limit, allow_code=config.allow_code)
    return plan_tasks(config.tasks, directory, options, listener=listener)


def evaluate_models(run: Run) -> None:
    """Measure all models on held-out text and prompts, and teacher and student in speed and benchmarks too."""
    config = run.recipe.evaluate

    def work(out: Path) -> StageResult:
        _measure_quality(run, out)
        if config.speed:
            _measure_speed(run, out)
        if run.benchmarks is not None:
            _measure_tasks(run, run.benchmarks, out)
        return {"models": list(run.models)}

    inputs = {name: run.digest(path) for name, path in run.models.items()} | {"data": run.corpus.digest}
    inputs |= {"tasks": run.benchmarks.digest} if run.benchmarks is not None else {}
    run.directory.do("evaluations", work, inputs=inputs, config={"evaluate": config.for_record})


def _measure_quality(run: Run, out: Path) -> None:
    """Write each model's numbers on the held-out text, and its continuations of the prompts."""
    config, device = run.recipe.evaluate, pick_device()
    teachers = {name: load_model(run.models[name]).to(device) for name in ("teacher", CORRECTED) if name in run.models}
    texts: dict[str, dict[str, str]] = {prompt: {"prompt": prompt} for prompt in config.prompts}
    for name, path in run.models.items():
        model = teachers[name] if name in teachers else load_model(path).to(device)
        against = partial(
            measure_quality,
            model,
            run.corpus.heldout.head(config.blocks),
            batch=config.batch,
            progress=partial(run.listener.progress, note=name),
        )
        quality = against(teacher=None if name == "teacher" else teachers["teacher"])
        facts = describe(open_checkpoint(path)).to_dict() | quality.to_dict()
        if CORRECTED in teachers and name not in teachers:
            facts["kl_to_corrected"] = against(teacher=teachers[CORRECTED]).kl_to_teacher
        write_json(out / f"{name}.json", facts)
        for prompt, row in texts.items():
            row[name] = generate_text(model, run.teacher.tokenizer, prompt, new_tokens=config.new_tokens)
    write_json(out / run.directory.layout.generations.name, list(texts.values()))


def _measure_speed(run: Run, out: Path) -> None:
    """Write how fast teacher and student read and write."""
    pair = {name: load_model(run.models[name]).to(pick_device()) for name in ("teacher", "student")}
    load = Load(1, min(256, run.corpus.block_tokens), SPEED_TOKENS)
    (measured,) = measure_in_turn({name: transformers_timer(model) for name, model in pair.items()}, [load])
    facts = measured.to_dict()
    write_json(out / run.directory.layout.speed.name, {name: facts[name] for name in (*pair, RATIO)})


def _measure_tasks(run: Run, benchmarks: TaskPlan, out: Path) -> None:
    """Write the benchmarks of teacher and student; the harness loads one model after the other."""
    results = measure_tasks(
        {name: run.models[name] for name in ("teacher", "student")},
        benchmarks,
        listener=run.listener,
    )
    facts = {
        "tasks": {name: {task: one.to_dict() for task, one in of.items()} for name, of in results.items()},
        "kept": {task: kept(one, results["teacher"][task]) for task, one in results["student"].items()},
        "chosen_by": _chosen_by(run.recipe.prune, list(results["student"])),
    }
    write_json(out / run.directory.layout.tasks.name, facts)


def _chosen_by(config: PruneConfig, tasks: Sequence[str]) -> list[str]:
    """Return the tasks whose questions decided which layers stay; their scores of the student are no result."""
    if config.layer_task is None:
        return []
    file = Path(config.layer_task)
    names = {task_of(name) for name in (config.layer_task, file.stem, file.parent.name)}
    return [task for task in tasks if task in names]


def export_student(run: Run, name: str) -> None:
    """Write the student in another format, proven by the program that the format is for.

    Args:
        name: of a row of EXPORTERS.
    """
    exporter, student, seed = EXPORTERS[name], run.models["student"], run.recipe.seed
    config = exporter.config(run.recipe)

    def work(out: Path) -> StageResult:
        model_name = run_name(run.recipe.model, run.recipe.prune.target)
        source, checkpoint = run.recipe.data.source, open_checkpoint(student)
        card = described(run.recipe.model, run.recipe.revision, source, checkpoint.architecture.name)
        export = Export(checkpoint, model_name, card, config, run.corpus, source, seed, run.listener)
        return dict(exporter.write(export, out))

    facts: StageResult = {} if config is None else {name: config}
    inputs = {"student": run.digest(student), "data": run.corpus.digest}
    run.directory.do(name, work, inputs=inputs, config=facts | {"seed": seed})


def always(recipe: Recipe) -> bool:
    return True


@dataclass(frozen=True)
class Stage:
    """A row of PIPELINE: the function that makes a stage, and the recipes that have it."""

    make: Callable[[Run], None]
    wanted: Callable[[Recipe], bool] = always


# A run, from top to bottom. Each function leaves in the Run what those after it take.
PIPELINE: dict[str, Stage] = {
    "data": Stage(prepare_data),
    "corrected": Stage(correct_teacher, lambda recipe: recipe.distill.correction == "before"),
    "statistics": Stage(collect_statistics),
    "lessons": Stage(record_teacher, lambda recipe: recipe.distill.teacher == "recorded"),
    "search": Stage(search_shape, lambda recipe: recipe.searches),
    "scores": Stage(score_teacher),
    "plan": Stage(make_plan),
    "pruned": Stage(cut_teacher),
    "student": Stage(train_student),
    "scratch": Stage(train_from_scratch, lambda recipe: recipe.scratch_baseline),
    "evaluations": Stage(evaluate_models),
}
# The stages between a teacher and a student that exists already.
OF_DISTILLATION = ("data", "corrected", "lessons", "student")


def make_stages(run: Run, names: Iterable[str] = PIPELINE) -> None:
    """Make the stages of these names that the recipe wants, in their order."""
    for name in names:
        if PIPELINE[name].wanted(run.recipe):
            PIPELINE[name].make(run)
