"""The whole pipeline on one screen. Only this module, student_shape.py and rooms.py compose the rooms."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minitron import data
from minitron.config import Section
from minitron.describe import describe
from minitron.device import compute_dtype, pick_device, settle_precision
from minitron.distill import train
from minitron.errors import RunError
from minitron.evaluate.generate import generate
from minitron.evaluate.quality import EvaluateConfig, evaluate
from minitron.evaluate.speed import measure_speed
from minitron.files import write_json
from minitron.model.architecture import PRUNABLE, Shape
from minitron.model.checkpoint import (
    Checkpoint,
    carried_files,
    load_model,
    load_tokenizer,
    model_files,
    open_checkpoint,
    resolve_model,
)
from minitron.model.model_config import ModelConfig
from minitron.prune.calibrate import CalibrateConfig, Statistics, calibrate
from minitron.prune.cut import cut
from minitron.prune.importance import CRITERIA, Scores
from minitron.prune.plan import Plan, PruneConfig, choose, given_layers, target_shape
from minitron.prune.shapes import needs_machine
from minitron.publish.card import write_card
from minitron.publish.records import RunRecords, read_run
from minitron.publish.report import write_report
from minitron.recipe import Recipe
from minitron.rundir import SILENT, Listener, RunDirectory
from minitron.student_shape import feasible_for, find_shape, machine_for, take_over

LARGEST_DEFAULT_BLOCK = 2048


def run(recipe: Recipe, out: Path, listener: Listener = SILENT) -> RunRecords:
    """Teacher -> statistics -> scores -> plan -> pruned -> student -> evaluations -> report, resuming what is done.

    Returns the run's records, which the report and the card are made from.

    Raises: MinitronError; RunError if `out` is in use or holds stages made from other inputs.
    """
    teacher = open_checkpoint(resolve_model(recipe.model, recipe.revision))
    tokenizer = load_tokenizer(teacher.path)
    recipe, shape = resolve(recipe, teacher)
    with RunDirectory(out, recipe, listener) as stages:
        corpus = prepare_data(stages, recipe.data, teacher, tokenizer)
        statistics = collect_statistics(stages, recipe, teacher, corpus)
        searching = recipe.search.level != "off"
        if searching:
            scores = score_units(statistics, teacher.shape, recipe.prune)
            make = student_maker(teacher, scores)
            shape = find_shape(stages, recipe, teacher, statistics, scores, corpus, make)
            recipe = stages.settle(**found_shape(recipe, shape))
        recipe = stages.settle(
            distill=train.resolve(
                recipe.distill, shape, block_tokens=corpus.block_tokens, train_tokens=corpus.train_tokens
            )
        )
        plan = make_plan(stages, recipe.prune, teacher, statistics, shape)
        pruned = prune(stages, teacher, plan)
        if searching:
            take_over(stages)
        student = teach(stages, "student", recipe.distill, recipe.seed, pruned, teacher.path, corpus)
        models = {"teacher": teacher.path, "pruned": pruned, "student": student}
        if recipe.scratch_baseline:
            models["scratch"] = teach(stages, "scratch", recipe.distill, recipe.seed, pruned, None, corpus)
        measure(stages, recipe.evaluate, models, corpus, tokenizer)
    return publish(out)


def resolve(recipe: Recipe, teacher: Checkpoint | ModelConfig) -> tuple[Recipe, Shape]:
    """Fill in every default that the teacher's config decides, and the student's shape; of a search, the largest."""
    if recipe.search.level == "off":
        shape = target_shape(teacher.architecture, teacher.config, teacher.shape, recipe.prune)
    else:
        machine = machine_for(recipe.search, teacher.dtype) if needs_machine(recipe.search) else None
        shape = feasible_for(teacher, recipe.prune, recipe.search, machine)[0].shape
    block_tokens = block_length(recipe.data, teacher)
    max_tokens = recipe.data.max_tokens
    if max_tokens is None and data.is_hub_id(recipe.data.source):
        if recipe.distill.tokens is None:
            raise RunError(
                f"{recipe.data.source!r} is a dataset id, which may be endless: "
                "say how many tokens to train on with --tokens (distill.tokens), or to read with data.max_tokens"
            )
        max_tokens = max(recipe.distill.tokens, recipe.calibrate.samples * block_tokens)
    return recipe.model_copy(
        update={
            "model": _whole_path(recipe.model),
            "data": recipe.data.model_copy(
                update={
                    "source": _whole_path(recipe.data.source),
                    "heldout": recipe.data.heldout and _whole_path(recipe.data.heldout),
                    "block_tokens": block_tokens,
                    "max_tokens": max_tokens,
                }
            ),
            "calibrate": recipe.calibrate.model_copy(
                update={"precision": settle_precision(recipe.calibrate.precision)}
            ),
        }
    ), shape


def _whole_path(source: str) -> str:
    """A local path made absolute, so that the stored recipe runs from anywhere; a hub id or `builtin` as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if source != data.BUILTIN and path.exists() else source


def prepare_data(stages: RunDirectory, config: data.DataConfig, teacher: Checkpoint, tokenizer: Any) -> data.Corpus:
    block_tokens = block_length(config, teacher)
    stages.do(
        "data",
        lambda out: asdict_without_path(
            data.prepare(
                config,
                tokenizer,
                vocab=teacher.shape.vocab,
                block_tokens=block_tokens,
                out=out,
                progress=stages.listener.progress,
            )
        ),
        inputs={
            "text": stages.digest(data.source_files(config)),
            "tokenizer": stages.digest(carried_files(teacher.path)),
        },
        config={"data": config},
    )
    return data.open_corpus(stages.out / "data")


def collect_statistics(stages: RunDirectory, recipe: Recipe, teacher: Checkpoint, corpus: data.Corpus) -> Statistics:
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
    return Statistics.load(stages.out / "statistics")


def make_plan(
    stages: RunDirectory, config: PruneConfig, teacher: Checkpoint, statistics: Statistics, shape: Shape
) -> Plan:
    criterion = {"criterion": config.criterion, "sequence": config.sequence_aggregate, "batch": config.batch_aggregate}

    def score(out: Path) -> dict[str, Any]:
        score_units(statistics, teacher.shape, config).save(out)
        return criterion

    def plan(out: Path) -> dict[str, Any]:
        made = choose(Scores.load(stages.out / "scores"), teacher.shape, shape, given_layers(config, teacher.shape))
        made.save(out / "plan.json")
        return {"plan": str(made)}

    statistics_digest = stages.digest([stages.out / "statistics" / "statistics.safetensors"])
    stages.do("scores", score, inputs={"statistics": statistics_digest}, config={"prune": criterion})
    stages.do(
        "plan",
        plan,
        inputs={"scores": stages.digest([stages.out / "scores" / "scores.json"])},
        config={"shape": asdict(shape), "drop_layers": config.drop_layers},
    )
    return Plan.load(stages.out / "plan" / "plan.json")


def found_shape(recipe: Recipe, shape: Shape) -> dict[str, Section]:
    """The sections of a recipe that makes the student of a search again, without the search."""
    sizes = {dim: getattr(shape, dim) for dim in PRUNABLE}
    return {
        "prune": recipe.prune.model_copy(update={"target": None, "shape": sizes}),
        "search": recipe.search.model_copy(update={"level": "off"}),
    }


def student_maker(teacher: Checkpoint, scores: Scores) -> Callable[[Shape, Path], dict[str, str]]:
    """A function that makes the pruned checkpoint of a shape in an empty directory, for the candidates of a search."""
    return lambda shape, out: make_student(teacher, choose(scores, teacher.shape, shape), out)


def make_student(teacher: Checkpoint, plan: Plan, out: Path) -> dict[str, str]:
    """The pruned checkpoint of a plan, candidates of a search included; returns the sha256 of its files of weights."""
    return cut(teacher, plan, out)


def prune(stages: RunDirectory, teacher: Checkpoint, plan: Plan) -> Path:
    digests: dict[str, str] = {}

    def work(out: Path) -> dict[str, Any]:
        digests.update(make_student(teacher, plan, out))
        return describe(open_checkpoint(out))

    inputs = {
        "model": stages.digest(model_files(teacher.path)),
        "plan": stages.digest([stages.out / "plan" / "plan.json"]),
    }
    made = stages.do("pruned", work, inputs=inputs, config={})
    stages.remember({made / file: digest for file, digest in digests.items()})
    return made


def teach(
    stages: RunDirectory,
    name: str,
    config: train.DistillConfig,
    seed: int,
    pruned: Path,
    teacher: Path | None,
    corpus: data.Corpus,
) -> Path:
    """Distil the pruned model, or (without a teacher) train its shape from random weights on the same tokens."""
    if teacher is None:
        config = config.model_copy(update={"loss": "cross_entropy"})
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
            progress=stages.listener.progress,
        )
        return describe(open_checkpoint(out)) | {"training": asdict(trained)}

    inputs = {"pruned": stages.digest(model_files(pruned)), "data": corpus.digest}
    if teacher:
        inputs["teacher"] = stages.digest(model_files(teacher))
    made = stages.do(name, work, inputs=inputs, config={"distill": config, "seed": seed}, state=state)
    train.forget_states(state)
    return made


def measure(
    stages: RunDirectory, config: EvaluateConfig, models: Mapping[str, Path], corpus: data.Corpus, tokenizer: Any
) -> None:
    def work(out: Path) -> dict[str, Any]:
        device = pick_device()
        teacher = load_model(models["teacher"]).to(device)
        texts = {prompt: {"prompt": prompt} for prompt in config.prompts}
        for name, path in models.items():
            model = teacher if name == "teacher" else load_model(path).to(device)
            quality = evaluate(
                model,
                corpus.heldout.head(config.blocks),
                teacher=None if name == "teacher" else teacher,
                batch=config.batch,
                progress=partial(stages.listener.progress, note=name),
            )
            write_json(out / f"{name}.json", describe(open_checkpoint(path)) | quality.to_dict())
            for prompt, row in texts.items():
                row[name] = generate(model, tokenizer, prompt, new_tokens=config.new_tokens)
        write_json(out / "generations.json", list(texts.values()))
        if config.speed:
            pair = {"teacher": teacher, "student": load_model(models["student"]).to(device)}
            speeds = measure_speed(pair, prompt_tokens=min(256, corpus.block_tokens))
            write_json(out / "speed.json", {name: speed.to_dict() for name, speed in speeds.items()})
        return {"models": list(models)}

    inputs = {name: stages.digest(model_files(path)) for name, path in models.items()}
    stages.do("evaluations", work, inputs=inputs | {"data": corpus.digest}, config={"evaluate": config})


def publish(out: Path) -> RunRecords:
    """Write report.html and the student's card from the records."""
    records = read_run(out)
    write_report(records)
    write_card(records)
    return records


def calibrate_on(
    teacher: Checkpoint, corpus: data.Corpus, config: CalibrateConfig, seed: int, *, scratch: Path, listener: Listener
) -> Statistics:
    tokens = calibration_tokens(corpus, config, seed)
    return calibrate_tokens(teacher, tokens, config, scratch=scratch, listener=listener)


def calibration_tokens(corpus: data.Corpus, config: CalibrateConfig, seed: int) -> torch.Tensor:
    """Token ids, int64 [samples, tokens]."""
    blocks = corpus.train
    rows = data.batch_rows(len(blocks), seed=seed, step=0, batch=min(config.samples, len(blocks)))
    return torch.from_numpy(blocks.select(rows))


def calibrate_tokens(
    teacher: Checkpoint,
    tokens: torch.Tensor,
    config: CalibrateConfig,
    *,
    scratch: Path | None = None,
    listener: Listener = SILENT,
) -> Statistics:
    return calibrate(
        teacher,
        tokens,
        dtype=compute_dtype(config.precision, pick_device()),
        batch=config.batch,
        second_moment=config.second_moment,
        scratch=scratch,
        progress=lambda done, total: listener.progress(done, total, "layers"),
    )


def score_units(statistics: Statistics, shape: Shape, config: PruneConfig) -> Scores:
    return CRITERIA[config.criterion](statistics, shape, config.sequence_aggregate, config.batch_aggregate)


def block_length(config: data.DataConfig, model: Checkpoint | ModelConfig) -> int:
    """Tokens in a block: what the config says, else the model's context, at most LARGEST_DEFAULT_BLOCK.

    Raises: RunError if the model's context is shorter.
    """
    context = model.config.get("max_position_embeddings") or LARGEST_DEFAULT_BLOCK
    length = config.block_tokens or min(context, LARGEST_DEFAULT_BLOCK)
    if length > context:
        raise RunError(f"data.block_tokens={length} is longer than the model's context of {context} tokens")
    return length


def asdict_without_path(corpus: data.Corpus) -> dict[str, Any]:
    return {name: value for name, value in vars(corpus).items() if name != "path"}
