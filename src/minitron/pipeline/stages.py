"""The stages of a run, each a function that does its work if its directory does not have it yet."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.calibration.collect import CalibrateConfig, Statistics, calibrate, pass_options
from minitron.core.config import Section
from minitron.core.device import compute_dtype, pick_device
from minitron.core.errors import RunError
from minitron.core.files import write_json
from minitron.core.progress import SILENT, Listener
from minitron.data.corpus import (
    SAMPLED,
    TEACHER,
    Blocks,
    Corpus,
    DataConfig,
    batch_rows,
    open_corpus,
    prepare,
    read_documents,
    require_undamaged,
    source_files,
)
from minitron.data.sampling import sample_text
from minitron.distillation import train
from minitron.distillation.config import DistillConfig, of_correction, of_scratch, resolve, resolve_without_student
from minitron.distillation.recording import DEFAULT_TOP_K, write_lessons
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
from minitron.model.checkpoint import (
    Checkpoint,
    carried_files,
    load_model,
    model_files,
    open_checkpoint,
)
from minitron.model.describe import describe
from minitron.model.model_config import ModelConfig
from minitron.model.naming import run_name
from minitron.model.samples import Separator
from minitron.pipeline.directory import RunDirectory
from minitron.pruning.depth import LAYER_CRITERIA
from minitron.pruning.importance import CRITERIA, Scores
from minitron.pruning.plan import Given, Plan, PruneConfig, given_layers, step_shapes
from minitron.pruning.repair.config import Step, needed_steps
from minitron.pruning.repair.writer import Repaired, repaired_cut
from minitron.pruning.scoring import Scoring, layers_need_a_pass, plan_student, score_layers, score_units
from minitron.recipe import Recipe
from minitron.report.card import write_card
from minitron.report.page import write_report
from minitron.report.records import RunRecords, read_run

LARGEST_DEFAULT_BLOCK = 2048
SPEED_TOKENS = 32  # decoded by teacher and student, behind a prompt of a block or less
STATISTICS = Path("statistics") / "statistics.safetensors"  # in a run directory


def prepare_data(stages: RunDirectory, config: DataConfig, teacher: Checkpoint, tokenizer: Any, seed: int) -> Corpus:
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
        return make_corpus(config, teacher, tokenizer, seed=seed, out=out, state=state, listener=stages.listener)

    was_there = (stages.out / "data" / "record.json").exists()
    stages.do("data", work, inputs=inputs, config=facts, state=state)
    if state is not None:
        shutil.rmtree(state, ignore_errors=True)
    corpus = open_corpus(stages.out / "data")
    if was_there:  # perhaps for long; what has just been written is not read again
        require_undamaged(corpus)
    return corpus


def make_corpus(
    config: DataConfig,
    teacher: Checkpoint,
    tokenizer: Any,
    *,
    seed: int,
    out: Path,
    state: Path | None = None,
    whole: bool = False,
    listener: Listener,
) -> dict[str, Any]:
    """Make a corpus in the existing directory `out`, of text that is sampled first where the config says so.

    Args:
        state: where sampled text is kept from one call to the next.
        whole: hold out all of the text.

    Returns what a record should say of it.
    """
    block_tokens = block_length(config, teacher)
    facts: dict[str, Any] = {}
    documents = None
    if config.source == TEACHER:
        file = (state or out) / SAMPLED
        rows = sample_text(
            teacher.path, tokenizer, config, file, block_tokens=block_tokens, seed=seed, progress=listener.progress
        )
        if state is not None:
            shutil.copyfile(file, out / SAMPLED)
        facts["sampled"] = {"documents": len(rows), "ended": sum(row.ended for row in rows)}
        documents = read_documents(str(file), DataConfig())
        config = config.model_copy(update={"max_tokens": None})  # all of it is read
    corpus = prepare(
        config,
        tokenizer,
        vocab=teacher.shape.vocab,
        block_tokens=block_tokens,
        out=out,
        documents=documents,
        whole=whole,
        progress=listener.progress,
        warn=listener.warn,
    )
    if (config.delimiter, corpus.delimiter) == ("auto", "none"):
        listener.warn("the tokenizer has neither a BOS nor an EOS token: nothing stands between documents")
    return asdict_without_path(corpus) | facts


def collect_statistics(stages: RunDirectory, recipe: Recipe, teacher: Checkpoint, corpus: Corpus) -> Statistics:
    config, seed = recipe.calibrate, recipe.seed

    def work(out: Path) -> dict[str, Any]:
        statistics = calibrate_on(teacher, corpus, config, seed, scratch=out, listener=stages.listener)
        statistics.save(out)
        return {"samples": statistics.samples, "tokens": statistics.tokens}

    stages.do(
        "statistics",
        work,
        inputs={"model": stages.digest(model_files(teacher.path)), "data": corpus.digest},
        config={"calibrate": config, "seed": seed},
    )
    return Statistics.load_of_shape(teacher, stages.out / "statistics")


def make_plan(
    stages: RunDirectory,
    recipe: Recipe,
    teacher: Checkpoint,
    corpus: Corpus,
    tokenizer: Any,
    statistics: Statistics,
    shape: Shape,
) -> Plan:
    config, given = recipe.prune, given_layers(recipe.prune, teacher.shape)
    first, *further = step_shapes(teacher.architecture, teacher.shape, shape, config.iterations, given)
    scoring = scoring_on(corpus, config, recipe.calibrate, recipe.seed, tokenizer, stages.listener)
    criterion: dict[str, Any] = {
        "criterion": config.criterion,
        "sequence": config.sequence_aggregate,
        "batch": config.batch_aggregate,
    }
    criterion |= {"seed": config.seed} if "seed" in CRITERIA[config.criterion].options else {}
    inputs = {"statistics": stages.digest([stages.out / STATISTICS])}
    measured = {"model": stages.digest(model_files(teacher.path)), "data": corpus.digest}
    if layers_need_a_pass(config, teacher.shape, first):
        criterion |= {"layers": config.layer_criterion, "task": config.layer_task, "samples": config.layer_samples}
        of_number = LAYER_CRITERIA[config.layer_criterion].drops
        criterion |= {"dropped": teacher.shape.layers - first.layers} if of_number else {}
        inputs |= measured | task_digest(stages, config)

    def score(out: Path) -> dict[str, Any]:
        scores = score_units(statistics, teacher.shape, config)
        score_layers(teacher, scores, first, replace(scoring, scratch=out)).save(out)
        return criterion

    def plan(out: Path) -> dict[str, Any]:
        scores = Scores.load(stages.out / "scores", teacher.shape)
        made = plan_student(teacher, lambda _: scores, shape, replace(scoring, scratch=out), given)
        made.save(out / "plan.json")
        return {"plan": str(made)}

    stages.do("scores", score, inputs=inputs, config={"prune": criterion})
    shapes: dict[str, Any] = {"shape": asdict(shape), "drop_layers": config.drop_layers}
    shapes |= {"keep_layers": config.keep_layers} if config.keep_layers else {}
    shapes |= {"iterations": config.iterations, "criterion": criterion} if further else {}
    stages.do(
        "plan",
        plan,
        inputs={"scores": stages.digest([stages.out / "scores" / "scores.json"])} | (measured if further else {}),
        config=shapes,
    )
    return Plan.load(stages.out / "plan" / "plan.json")


def task_digest(stages: RunDirectory, config: PruneConfig) -> dict[str, str]:
    """Of the file of questions that layers are scored by, if there is one."""
    file = Path(config.layer_task or "").expanduser()
    return {"task": stages.digest([file])} if file.is_file() else {}


def found_shape(recipe: Recipe, shape: Shape) -> dict[str, Section]:
    """The sections of a recipe that makes the student of a search again, without the search."""
    sizes = {dim: getattr(shape, dim) for dim in PRUNABLE}
    return {
        "prune": recipe.prune.model_copy(update={"target": None, "shape": sizes}),
        "search": recipe.search.model_copy(update={"level": "off"}),
    }


Mend = Callable[[Checkpoint, Plan, Path], Repaired]


def repairing(recipe: Recipe, statistics: Statistics, scores: Scores, corpus: Corpus, listener: Listener) -> Mend:
    """A function (teacher, plan, directory) that makes the pruned checkpoint, a search's candidates included."""
    assert recipe.repair.steps is not None, "resolve fills them in"
    tokens = calibration_tokens(corpus, recipe.calibrate, recipe.seed)
    options = pass_options(recipe.calibrate, separator=corpus.separator, progress=_layers(listener))
    return partial(
        repaired_cut, steps=recipe.repair.steps, statistics=statistics, scores=scores, tokens=tokens, **options
    )


def student_maker(
    teacher: Checkpoint, scores: Scores, scoring: Scoring, mend: Mend
) -> Callable[[Shape, Path], Repaired]:
    """A function that makes the pruned checkpoint of a shape in an empty directory, for the candidates of a search."""

    known: dict[int, Scores] = {}  # by the number of layers: they depend on nothing else, and may take many passes

    def make(shape: Shape, out: Path) -> Repaired:
        here = replace(scoring, scratch=out.parent)

        def score(first: Shape) -> Scores:
            if first.layers not in known:
                known[first.layers] = score_layers(teacher, scores, first, here)
            return known[first.layers]

        return mend(teacher, plan_student(teacher, score, shape, here, Given()), out)

    return make


def prune(
    stages: RunDirectory,
    teacher: Checkpoint,
    plan: Plan,
    mend: Mend,
    steps: Sequence[Step] = (),
    *,
    inputs: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """
    Args:
        steps: the repairs that `mend` makes where they are needed.
        inputs, config: what they are fitted to.
    """
    needed = needed_steps(steps, plan)
    digests: dict[str, str] = {}

    def work(out: Path) -> dict[str, Any]:
        repaired = mend(teacher, plan, out)
        repaired.plan.save(out / "plan.json")
        digests.update(repaired.digests)
        return describe(open_checkpoint(out)) | {"repairs": needed}

    made = stages.do(
        "pruned",
        work,
        inputs={
            "model": stages.digest(model_files(teacher.path)),
            "plan": stages.digest([stages.out / "plan" / "plan.json"]),
            **((inputs or {}) if needed else {}),
        },
        config={"repair": {"steps": needed}, **((config or {}) if needed else {})},
    )
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


def correct(stages: RunDirectory, config: DistillConfig, seed: int, teacher: Path, corpus: Corpus) -> Path:
    """Train the teacher on the text that it is going to teach, the first of it; returns the corrected one."""
    config, state = of_correction(config), stages.out / f"distill-{CORRECTED}"

    def work(out: Path) -> dict[str, Any]:
        trained = train.distill(
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
        return describe(open_checkpoint(out)) | {"training": asdict(trained)}

    inputs = {"model": stages.digest(model_files(teacher)), "data": corpus.digest}
    made = stages.do(CORRECTED, work, inputs=inputs, config={"correction": config, "seed": seed}, state=state)
    forget_states(state)
    return made


def record_lessons(
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
        facts = write_lessons(
            teacher,
            blocks,
            out,
            top_k=config.top_k or DEFAULT_TOP_K,
            temperature=config.temperature,
            separator=corpus.separator,
            dtype=compute_dtype(config.precision, pick_device()),
            scratch=out,
            progress=_layers(stages.listener),
        )
        return {name: value for name, value in facts.items() if name != "shards"}

    read = ("top_k", "temperature", "tokens", "batch_blocks", "evaluate_blocks", "precision")
    return stages.do(
        "lessons",
        work,
        inputs={"model": stages.digest(model_files(teacher.path)), "data": corpus.digest},
        config={"distill": {name: getattr(config, name) for name in read}, "seed": seed},
    )


def teach(
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

    def work(out: Path) -> dict[str, Any]:
        trained = train.distill(
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
    facts: dict[str, Any] = {"distill": config.of_record, "seed": seed}
    made = stages.do(name, work, inputs=inputs, config=facts, state=state, places=places)
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


def measure(
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
    stages.do("evaluations", work, inputs=inputs, config={"evaluate": config.of_record})


def ship(stages: RunDirectory, recipe: Recipe, student: Path, corpus: Corpus) -> None:
    """GGUF files of the student."""
    from minitron.gguf.quantize import QUANTIZE_TOKENS, Text, quantize

    config, seed = recipe.gguf, recipe.seed
    name = run_name(recipe.model, recipe.prune.target)

    def work(out: Path) -> dict[str, Any]:
        tokens = calibration_tokens(corpus, CalibrateConfig(samples=config.samples), seed)
        heldout = torch.from_numpy(corpus.heldout.head(config.blocks).select(slice(None)))
        source = recipe.data.source
        text = Text(tokens[:, :QUANTIZE_TOKENS], heldout[:, :QUANTIZE_TOKENS], Path(source).name or source)
        return quantize(open_checkpoint(student), config, out, text=text, name=name, listener=stages.listener)

    inputs = {"student": stages.digest(model_files(student)), "data": corpus.digest}
    stages.do("gguf", work, inputs=inputs, config={"gguf": config, "seed": seed})


def publish(out: Path) -> RunRecords:
    """Write report.html and the student's card from the records."""
    records = read_run(out)
    write_report(records)
    write_card(records)
    return records


def calibrate_on(
    teacher: Checkpoint, corpus: Corpus, config: CalibrateConfig, seed: int, *, scratch: Path, listener: Listener
) -> Statistics:
    tokens = calibration_tokens(corpus, config, seed)
    return calibrate_tokens(teacher, tokens, config, scratch=scratch, separator=corpus.separator, listener=listener)


def calibration_tokens(corpus: Corpus, config: CalibrateConfig, seed: int) -> torch.Tensor:
    """Token ids, int64 [samples, tokens]."""
    blocks = corpus.train
    rows = batch_rows(len(blocks), seed=seed, step=0, batch=min(config.samples, len(blocks)))
    return torch.from_numpy(blocks.select(rows))


def calibrate_tokens(
    teacher: Checkpoint,
    tokens: torch.Tensor,
    config: CalibrateConfig,
    *,
    scratch: Path | None = None,
    separator: Separator | None = None,
    listener: Listener = SILENT,
) -> Statistics:
    options = pass_options(config, scratch=scratch, separator=separator, progress=_layers(listener))
    return calibrate(teacher, tokens, second_moment=config.second_moment, **options)


def _layers(listener: Listener) -> Callable[[int, int], None]:
    return lambda done, total: listener.progress(done, total, "layers")


def scoring_on(
    corpus: Corpus, prune: PruneConfig, calibrate: CalibrateConfig, seed: int, tokenizer: Any, listener: Listener
) -> Scoring:
    tokens = calibration_tokens(corpus, calibrate, seed)
    return Scoring(prune, calibrate, tokens, tokenizer, separator=corpus.separator, progress=_layers(listener))


def block_length(config: DataConfig, model: Checkpoint | ModelConfig) -> int:
    """Tokens in a block: what the config says, else the model's context, at most LARGEST_DEFAULT_BLOCK.

    Raises: RunError if the model's context is shorter.
    """
    context = model.config.get("max_position_embeddings") or LARGEST_DEFAULT_BLOCK
    length = config.block_tokens or min(context, LARGEST_DEFAULT_BLOCK)
    if length > context:
        raise RunError(f"data.block_tokens={length} is longer than the model's context of {context} tokens")
    return length


def asdict_without_path(corpus: Corpus) -> dict[str, Any]:
    return {name: value for name, value in asdict(corpus).items() if name != "path"}
