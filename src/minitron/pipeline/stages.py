"""The stages of a run, each a function that does its work if its directory does not have it yet."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import Statistics
from minitron.core import parallel
from minitron.core.config import Section
from minitron.core.device import compute_dtype, pick_device
from minitron.core.files import write_json
from minitron.core.progress import Listener, layer_progress
from minitron.data.config import DataConfig
from minitron.data.corpus import Blocks, Corpus, draw_samples, open_corpus, require_undamaged
from minitron.data.sources import TEACHER
from minitron.data.supply import make_corpus
from minitron.data.writing import source_files
from minitron.distillation import train
from minitron.distillation.config import DistillConfig, of_correction, of_scratch, resolve, resolve_without_student
from minitron.distillation.recording import DEFAULT_TOP_K, record_logits
from minitron.distillation.recording import INDEX as LESSONS_INDEX
from minitron.distillation.state import forget_states
from minitron.distillation.train import CORRECTED
from minitron.evaluation.generate import generate
from minitron.evaluation.quality import EvaluateConfig, evaluate
from minitron.evaluation.speed import RATIO, Load, measure_speed, transformers_timer
from minitron.evaluation.tasks.measure import Plan as TaskPlan
from minitron.evaluation.tasks.measure import TaskOptions, measure_tasks, plan_tasks
from minitron.evaluation.tasks.rows import task_of
from minitron.evaluation.tasks.suite import kept
from minitron.model.architecture import PRUNABLE, Shape
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint
from minitron.model.describe import describe
from minitron.model.naming import run_name
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.model.weight_files import carried_files, model_files
from minitron.pipeline.directory import RunDirectory
from minitron.pipeline.student_shape import task_digest
from minitron.pruning.config import PruneConfig
from minitron.pruning.depth import LAYER_CRITERIA
from minitron.pruning.given import given_layers
from minitron.pruning.importance import CRITERIA, Scores
from minitron.pruning.plan import Plan
from minitron.pruning.repair import needed_steps
from minitron.pruning.steps import Pruner, Scoring, layers_need_a_pass
from minitron.recipe import Recipe
from minitron.report.card import write_card
from minitron.report.page import write_report
from minitron.report.records import RunRecords, read_run

SPEED_TOKENS = 32  # decoded by teacher and student, behind a prompt of a block or less


def prepare_data(stages: RunDirectory, config: DataConfig, teacher: Checkpoint, seed: int) -> Corpus:
    inputs = {
        "text": stages.digest(source_files(config)),
        "tokenizer": stages.digest(carried_files(teacher.path)),
    }
    facts: dict[str, Any] = {"data": config}
    state = None
    if config.source == TEACHER:
        inputs["teacher"] = stages.digest(model_files(teacher.path))
        facts["seed"] = seed
        state = stages.out / "data-state"

    def work(out: Path) -> dict[str, Any]:
        return make_corpus(config, teacher, seed=seed, out=out, state=state, listener=stages.listener)

    was_there = stages.layout.record("data").exists()
    stages.do("data", work, inputs=inputs, config=facts, state=state)
    if state is not None and parallel.is_first():
        shutil.rmtree(state, ignore_errors=True)
    corpus = open_corpus(stages.out / "data")
    if was_there and parallel.is_first():  # perhaps for long; what has just been written is not read again
        require_undamaged(corpus)
    return corpus


def collect_statistics(stages: RunDirectory, recipe: Recipe, teacher: Checkpoint, corpus: Corpus) -> Statistics:
    config, seed = recipe.calibrate, recipe.seed

    def collect(scratch: Path | None = None) -> Statistics:
        samples, pass_ = (
            draw_samples(corpus, config.samples, seed),
            config.as_pass(scratch, layer_progress(stages.listener)),
        )
        return measure_statistics(teacher, samples, pass_, second_moment=config.second_moment)

    def work(out: Path) -> dict[str, Any]:
        statistics = collect(out)
        statistics.save(out)
        return {"samples": statistics.samples, "tokens": statistics.tokens}

    stages.do(
        "statistics",
        work,
        inputs={"model": stages.digest(model_files(teacher.path)), "data": corpus.digest},
        config={"calibrate": config, "seed": seed},
        assist=collect,
    )
    return Statistics.load_of_shape(teacher, stages.out / "statistics")


def make_plan(stages: RunDirectory, pruner: Pruner, shape: Shape, corpus: Corpus) -> Plan:
    config, teacher = pruner.scoring.config, pruner.teacher
    given = given_layers(config, teacher.shape)
    first, *further = pruner.shapes(shape, given)
    criterion: dict[str, Any] = {
        "criterion": config.criterion,
        "sequence": config.sequence_aggregate,
        "batch": config.batch_aggregate,
    }
    criterion |= {"seed": config.seed} if "seed" in CRITERIA[config.criterion].options else {}
    inputs = {"statistics": stages.digest([stages.layout.statistics])}
    measured = {"model": stages.digest(model_files(teacher.path)), "data": corpus.digest}
    if layers_need_a_pass(config, teacher.shape, first):
        criterion |= {"layers": config.layer_criterion, "task": config.layer_task, "samples": config.layer_samples}
        of_number = LAYER_CRITERIA[config.layer_criterion].drops
        criterion |= {"dropped": teacher.shape.layers - first.layers} if of_number else {}
        inputs |= measured | task_digest(stages, config)

    def score(out: Path) -> dict[str, Any]:
        pruner.at(out).score(first).save(out)
        return criterion

    def plan(out: Path) -> dict[str, Any]:
        scores = Scores.load(stages.out / "scores", teacher.shape)
        made = pruner.at(out).plan(shape, given, scores)
        made.save(out / "plan.json")
        return {"plan": str(made)}

    stages.do("scores", score, inputs=inputs, config={"prune": criterion})
    shapes: dict[str, Any] = {"shape": asdict(shape), "drop_layers": config.drop_layers}
    shapes |= {"keep_layers": config.keep_layers} if config.keep_layers else {}
    shapes |= {"iterations": config.iterations, "criterion": criterion} if further else {}
    stages.do(
        "plan",
        plan,
        inputs={"scores": stages.digest([stages.layout.scores])} | (measured if further else {}),
        config=shapes,
    )
    return Plan.load(stages.layout.plan)


def found_shape(recipe: Recipe, shape: Shape) -> dict[str, Section]:
    """The sections of a recipe that makes the student of a search again, without the search."""
    sizes = {dim: getattr(shape, dim) for dim in PRUNABLE}
    return {
        "prune": recipe.prune.model_copy(update={"target": None, "shape": sizes}),
        "search": recipe.search.model_copy(update={"level": "off"}),
    }


def pruner_of(
    recipe: Recipe, teacher: Checkpoint, statistics: Statistics, corpus: Corpus, stages: RunDirectory
) -> Pruner:
    """What makes the pruned checkpoint, a search's candidates included."""
    assert recipe.repair.steps is not None, "resolve fills them in"
    samples = draw_samples(corpus, recipe.calibrate.samples, recipe.seed)
    pass_ = recipe.calibrate.as_pass(progress=layer_progress(stages.listener))
    scoring = Scoring(recipe.prune, samples, pass_, teacher.tokenizer)
    return Pruner(teacher, scoring, recipe.repair.steps, statistics)


def prune(stages: RunDirectory, pruner: Pruner, plan: Plan, recipe: Recipe, corpus: Corpus) -> Path:
    needed = needed_steps(pruner.repairs, plan.teacher, plan.student)
    digests: dict[str, str] = {}

    def work(out: Path) -> dict[str, Any]:
        repaired = pruner.at(out).cut(plan, out)
        repaired.plan.save(out / "plan.json")
        digests.update(repaired.digests)
        return describe(open_checkpoint(out)) | {"repairs": needed}

    inputs = {
        "model": stages.digest(model_files(pruner.teacher.path)),
        "plan": stages.digest([stages.layout.plan]),
    }
    config: dict[str, Any] = {"repair": {"steps": needed}}
    if needed:
        inputs |= {"data": corpus.digest, "statistics": stages.digest([stages.layout.statistics])}
        config |= {"calibrate": recipe.calibrate, "seed": recipe.seed}
    made = stages.do("pruned", work, inputs=inputs, config=config)
    stages.remember({made / file: digest for file, digest in digests.items()})
    return made


def resolve_distill(recipe: Recipe, shape: Shape, teacher: Checkpoint, corpus: Corpus) -> DistillConfig:
    return resolve(
        recipe.distill,
        shape,
        teacher.shape,
        weights_rms=teacher.weights_rms(),
        block_tokens=corpus.block_tokens,
        train_tokens=corpus.train_tokens,
        repaired=bool(recipe.repair.steps),
    )


def resolve_correction(recipe: Recipe, teacher: Checkpoint, corpus: Corpus) -> DistillConfig:
    return resolve_without_student(
        recipe.distill,
        teacher.shape,
        teacher_weights_rms=teacher.weights_rms(),
        block_tokens=corpus.block_tokens,
        train_tokens=corpus.train_tokens,
    )


def correct_teacher(stages: RunDirectory, config: DistillConfig, seed: int, teacher: Path, corpus: Corpus) -> Path:
    """Train the teacher on the text that it is going to teach, the first of it; returns the corrected one."""
    config, state = of_correction(config), stages.out / f"distill-{CORRECTED}"

    def learn(out: Path = state) -> train.Trained:
        return train.distill(
            teacher,
            None,
            corpus,
            config,
            seed=seed,
            work=state,
            out=out,
            rate_key="distill.correction_learning_rate",
            progress=stages.listener.progress,
            warn=stages.listener.warn,
        )

    def work(out: Path) -> dict[str, Any]:
        trained = learn(out)
        return describe(open_checkpoint(out)) | {"training": asdict(trained)}

    inputs = {"model": stages.digest(model_files(teacher)), "data": corpus.digest}
    made = stages.do(
        CORRECTED, work, inputs=inputs, config={"correction": config, "seed": seed}, state=state, assist=learn
    )
    if parallel.is_first():
        forget_states(state)
    return made


def record_teacher(
    stages: RunDirectory,
    config: DistillConfig,
    teacher: Checkpoint,
    corpus: Corpus,
    seed: int,
    judge: Blocks | None = None,
) -> Path:
    """What the teacher says of every block that will be trained on or looked at.

    Args:
        judge: further blocks.
    """

    def work(out: Path) -> dict[str, Any]:
        blocks = train.blocks_read(corpus, config, seed)
        if judge is not None:
            blocks = np.unique(np.concatenate([blocks, judge.select(slice(None))]), axis=0)
        dtype = compute_dtype(config.precision, pick_device())
        facts = record_logits(
            teacher,
            Samples(torch.from_numpy(blocks), corpus.separator),
            Pass(dtype, scratch=out, progress=layer_progress(stages.listener)),
            out,
            top_k=config.top_k or DEFAULT_TOP_K,
            temperature=config.temperature,
        )
        return {name: value for name, value in facts.items() if name != "shards"}

    read = ("top_k", "temperature", "tokens", "batch_blocks", "evaluate_blocks", "precision")
    return stages.do(
        "lessons",
        work,
        inputs={"model": stages.digest(model_files(teacher.path)), "data": corpus.digest},
        config={"distill": {name: getattr(config, name) for name in read}, "seed": seed},
    )


def distill_student(
    stages: RunDirectory,
    name: str,
    config: DistillConfig,
    seed: int,
    pruned: Path,
    teacher: Path | None,
    corpus: Corpus,
) -> Path:
    """Distil the pruned model, or (without a teacher) train its shape from random weights on the same tokens.

    A teacher that is corrected in parallel is another model in the end, beside the student.
    """
    if teacher is None:
        config = of_scratch(config)
    state = stages.out / ("distill" if teacher else f"distill-{name}")

    def learn(out: Path = state) -> train.Trained:
        return train.distill(
            pruned,
            teacher,
            corpus,
            config,
            seed=seed,
            work=state,
            out=out,
            initialize="weights" if teacher else "random",
            rate_key="distill.learning_rate" if teacher else "distill.scratch_learning_rate",
            progress=stages.listener.progress,
            warn=stages.listener.warn,
        )

    def work(out: Path) -> dict[str, Any]:
        trained = learn(out)
        if config.correction == "parallel":
            shutil.rmtree(stages.out / CORRECTED, ignore_errors=True)  # of a run that was killed just here
            (state / CORRECTED).rename(stages.out / CORRECTED)
        return describe(open_checkpoint(out)) | {"training": asdict(trained)}

    inputs = {"pruned": stages.digest(model_files(pruned)), "data": corpus.digest}
    places: dict[str, Path] = {}
    if teacher:
        recorded = config.teacher == "recorded"
        inputs["teacher"] = stages.digest([teacher / LESSONS_INDEX] if recorded else model_files(teacher))
        places = {"teacher": teacher / LESSONS_INDEX} if recorded else {}
    facts: dict[str, Any] = {"distill": config.for_record, "seed": seed}
    made = stages.do(name, work, inputs=inputs, config=facts, state=state, places=places, assist=learn)
    if parallel.is_first():
        forget_states(state)
    return made


def plan_benchmarks(config: EvaluateConfig, listener: Listener) -> TaskPlan | None:
    """What the evaluations measure besides text; asked before the work begins, so that it does not end in an error."""
    if not config.benchmarks:
        return None
    directory = Path(config.tasks_dir).expanduser() if config.tasks_dir else None
    options = TaskOptions(limit=config.limit, allow_code=config.allow_code)
    return plan_tasks(config.tasks, directory, options, warn=listener.warn)


def chosen_by(config: PruneConfig, tasks: Sequence[str]) -> list[str]:
    """Tasks of which questions decided what layers stay: what they say of the student is no result."""
    if config.layer_task is None:
        return []
    file = Path(config.layer_task)
    names = {task_of(name) for name in (config.layer_task, file.stem, file.parent.name)}
    return [task for task in tasks if task in names]


def evaluate_models(
    stages: RunDirectory,
    recipe: Recipe,
    models: Mapping[str, Path],
    corpus: Corpus,
    tokenizer: Any,
    benchmarks: TaskPlan | None,
) -> None:
    config = recipe.evaluate

    def work(out: Path) -> dict[str, Any]:
        device = pick_device()
        guides = {name: load_model(path).to(device) for name, path in models.items() if name in ("teacher", CORRECTED)}
        texts = {prompt: {"prompt": prompt} for prompt in config.prompts}
        for name, path in models.items():
            model = guides[name] if name in guides else load_model(path).to(device)
            against = partial(
                evaluate,
                model,
                corpus.heldout.head(config.blocks),
                batch=config.batch,
                progress=partial(stages.listener.progress, note=name),
            )
            quality = against(teacher=None if name == "teacher" else guides["teacher"])
            facts = describe(open_checkpoint(path)) | quality.to_dict()
            if CORRECTED in guides and name not in guides:
                facts["kl_to_corrected"] = against(teacher=guides[CORRECTED]).kl_to_teacher
            write_json(out / f"{name}.json", facts)
            for prompt, row in texts.items():
                row[name] = generate(model, tokenizer, prompt, new_tokens=config.new_tokens)
        write_json(out / "generations.json", list(texts.values()))
        if config.speed:
            pair = {"teacher": guides["teacher"], "student": load_model(models["student"]).to(device)}
            load = Load(1, min(256, corpus.block_tokens), SPEED_TOKENS)
            (row,) = measure_speed({name: transformers_timer(model) for name, model in pair.items()}, [load])
            write_json(out / "speed.json", {name: row[name] for name in (*pair, RATIO)})
            del pair
        if benchmarks is not None:
            del model
            guides.clear()  # the harness loads one model after the other
            results = measure_tasks(
                {name: models[name] for name in ("teacher", "student")},
                benchmarks,
                progress=stages.listener.progress,
                warn=stages.listener.warn,
            )
            of_models = {name: {task: one.to_dict() for task, one in of.items()} for name, of in results.items()}
            facts = {
                "tasks": of_models,
                "kept": {task: kept(one, results["teacher"][task]) for task, one in results["student"].items()},
                "chosen_by": chosen_by(recipe.prune, list(results["student"])),
            }
            write_json(out / "tasks.json", facts)
        return {"models": list(models)}

    inputs = {name: stages.digest(model_files(path)) for name, path in models.items()} | {"data": corpus.digest}
    inputs |= {"tasks": benchmarks.digest} if benchmarks is not None else {}
    stages.do("evaluations", work, inputs=inputs, config={"evaluate": config.for_record})


def quantize_student(stages: RunDirectory, recipe: Recipe, student: Path, corpus: Corpus) -> None:
    """GGUF files of the student."""
    from minitron.gguf.quantize import QUANTIZE_TOKENS, Text, quantize

    config, seed = recipe.gguf, recipe.seed
    name = run_name(recipe.model, recipe.prune.target)

    def work(out: Path) -> dict[str, Any]:
        tokens = draw_samples(corpus, config.samples, seed).tokens
        heldout = torch.from_numpy(corpus.heldout.head(config.blocks).select(slice(None)))
        source = recipe.data.source
        text = Text(tokens[:, :QUANTIZE_TOKENS], heldout[:, :QUANTIZE_TOKENS], Path(source).name or source)
        return quantize(open_checkpoint(student), config, out, text=text, name=name, listener=stages.listener)

    inputs = {"student": stages.digest(model_files(student)), "data": corpus.digest}
    stages.do("gguf", work, inputs=inputs, config={"gguf": config, "seed": seed})


def write_report_and_card(out: Path) -> RunRecords:
    """Write report.html and the student's card from the records."""
    records = read_run(out)
    if parallel.is_first():
        write_report(records)
        write_card(records)
    return records
