"""The seconds of each stage of a run, from what its work takes on a probe and how much of it there is."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from minitron.data.sources import TEACHER
from minitron.distillation.config import DistillConfig
from minitron.distillation.schedule import num_steps, of_correction, of_scratch
from minitron.evaluation.speed import DEFAULT_ROUNDS
from minitron.gguf.config import QUANTIZE_TOKENS
from minitron.gguf.reader import is_gguf
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from minitron.model.weight_files import has_weights
from minitron.pipeline.asked import Asked, Timed, TrainingKind, resolved
from minitron.pipeline.probe import Modelled
from minitron.pipeline.stages import PIPELINE, SPEED_TOKENS
from minitron.pipeline.time_text import TextSize, measure_text
from minitron.pipeline.timing import time_run
from minitron.pruning.steps import layers_need_a_pass
from minitron.recipe import Recipe
from minitron.report.exporters import EXPORTERS
from minitron.shapes.rank import elimination_rounds

REPORT_SECONDS = 2.0  # as it takes on one core, whatever the model


@dataclass(frozen=True)
class StageSeconds:
    """The estimate of a stage.

    seconds: None where they are not known.
    why: what they follow from, or why they are not known.
    """

    name: str
    seconds: float | None
    why: str


@dataclass(frozen=True)
class _Run:
    """What the seconds of the stages follow from.

    heldout_blocks: of the text.
    gguf_reading: the seconds of dequantizing the teacher, where it is a GGUF file.
    """

    recipe: Recipe
    teacher: Checkpoint | ModelConfig
    shape: Shape
    block_tokens: int
    text: TextSize
    config: DistillConfig
    timed: Timed
    heldout_blocks: int
    gguf_reading: float


Found = tuple[float | None, str]


def stage_seconds(recipe: Recipe, teacher: Checkpoint | ModelConfig, shape: Shape) -> list[StageSeconds]:
    """Time the work of a run whose defaults are resolved, and tell the seconds of each of its stages.

    Args:
        shape: the student's, or the largest that a search may find.

    Raises: MinitronError for settings of the training that exclude each other.
    """
    block_tokens = recipe.data.block_tokens
    assert block_tokens is not None, "resolve_recipe fills it in"
    text = measure_text(recipe.data, teacher, recipe.distill.tokens)
    names = [*(name for name, stage in PIPELINE.items() if stage.wanted(recipe))]
    exported = [name for name, row in EXPORTERS.items() if row.wanted(recipe)]
    tokens = recipe.distill.tokens or text.train_tokens
    if tokens is None:
        reason = "the length of the text is not known before it is read: give distill.tokens"
        return [StageSeconds(name, None, reason) for name in (*names, *exported, "report")]
    config = resolved(recipe, teacher.shape, shape, block_tokens=block_tokens, tokens=tokens)
    assert config.batch_blocks and config.evaluate_blocks
    kinds: list[TrainingKind] = ["student"]
    kinds += ["corrected"] if "corrected" in names else []
    kinds += ["scratch"] if "scratch" in names else []
    models = Modelled.of(teacher), Modelled.of(teacher, shape)
    timed = time_run(Asked(recipe, *models, block_tokens, config.batch_blocks * block_tokens, tuple(kinds)))
    heldout = max(1, (text.heldout_tokens or block_tokens * config.evaluate_blocks) // block_tokens)
    run = _Run(recipe, teacher, shape, block_tokens, text, config, timed, heldout, _gguf_reading(recipe, teacher))
    return [StageSeconds(name, *ESTIMATES[name](run)) for name in (*names, *exported, "report")]


def _gguf_reading(recipe: Recipe, teacher: Checkpoint | ModelConfig) -> float:
    """Read one layer of a GGUF file, which is dequantized, and multiply; 0 for a checkpoint, which the probe is too."""
    if not is_gguf(recipe.model) or not has_weights(teacher.path):
        return 0.0
    opened = open_checkpoint(teacher.path)
    names = [spec.name for spec in opened.specs() if spec.layer == 0]
    started = time.perf_counter()
    for name in names:
        opened.read(name)
    return (time.perf_counter() - started) * opened.shape.layers


def _data(run: _Run) -> Found:
    work, text = run.timed.work, run.text
    if run.recipe.data.source == TEACHER:
        assert work is not None and text.train_tokens is not None
        tokens = text.train_tokens + (text.heldout_tokens or 0)
        return tokens / run.recipe.data.sample_batch * work.sampled_step, f"{tokens:,} tokens sampled from the teacher"
    if text.seconds is None:
        return None, "the text is not here, so its reading cannot be timed"
    return text.seconds, f"about {(text.train_tokens or 0) + (text.heldout_tokens or 0):,} tokens"


def _training(kind: str) -> Callable[[_Run], Found]:
    def found(run: _Run) -> Found:
        config = {"student": lambda one: one, "corrected": of_correction, "scratch": of_scratch}[kind](run.config)
        parts = run.timed.trainings[kind]
        seconds = parts.of(config, run.block_tokens, run.heldout_blocks) + run.gguf_reading
        assert config.tokens and config.batch_blocks
        batch = config.batch_blocks * run.block_tokens
        speed = batch / (parts.update + batch * parts.token)
        steps = num_steps(config.tokens, config.batch_blocks, run.block_tokens)
        return seconds, f"{steps:,} steps of {batch:,} tokens at {speed:,.0f} tokens/s, evaluations and states"

    return found


def _calibration_tokens(run: _Run) -> int:
    there = run.text.train_tokens or run.recipe.calibrate.num_samples * run.block_tokens
    return min(run.recipe.calibrate.num_samples * run.block_tokens, there)


def _statistics(run: _Run) -> Found:
    assert run.timed.work is not None
    tokens, work = _calibration_tokens(run), run.timed.work
    seconds = work.calibration_start + tokens * work.calibration_token + run.gguf_reading
    return seconds, f"{tokens:,} tokens"


def _lessons(run: _Run) -> Found:
    assert run.timed.work is not None and run.config.tokens and run.config.evaluate_blocks
    tokens = min(run.config.tokens, run.text.train_tokens or run.config.tokens)
    tokens += min(run.config.evaluate_blocks, run.heldout_blocks) * run.block_tokens
    return tokens * run.timed.work.lessons_token, f"{tokens:,} tokens"


def _scores(run: _Run) -> Found:
    prune = run.recipe.prune
    if not layers_need_a_pass(prune, run.teacher.shape, run.shape):
        return 0.1, "from the statistics"
    if prune.layer_task is not None:
        return None, "the questions that layers are scored by are not timed"
    assert run.timed.work is not None
    tokens, passes = prune.layer_samples * run.block_tokens, (run.teacher.shape.layers + 1) / 2
    return tokens * passes * run.timed.work.calibration_token, f"{tokens:,} tokens without each layer in turn"


def _plan(run: _Run) -> Found:
    more = run.recipe.prune.iterations - 1
    if more == 0:
        return 0.1, "from the scores"
    seconds = _statistics(run)[0] or 0.0
    return more * seconds, f"{more} more passes over the calibration samples"


def _pruned(run: _Run) -> Found:
    if not run.timed.repair_known:
        return None, "a repair of layers this wide takes minutes a layer, and is not timed"
    assert run.timed.work is not None
    tokens, work = _calibration_tokens(run), run.timed.work
    seconds = work.repair_start + tokens * work.repair_token + 2 * run.gguf_reading
    return seconds, f"repaired on {tokens:,} tokens"


def _search(run: _Run) -> Found:
    search, work = run.recipe.search, run.timed.work
    assert work is not None and run.config.tokens and run.config.batch_blocks
    if search.level == "predicted":
        return 5.0, "shapes are ranked by the statistics"
    cut, _ = _pruned(run)
    if cut is None:
        return None, "as for pruned"
    judged = search.judge_blocks * run.block_tokens * work.student_token
    seconds, trained = search.cut_candidates * (cut + judged), 0
    if search.level == "distilled":
        steps = num_steps(run.config.tokens, run.config.batch_blocks, run.block_tokens)
        before = 0
        for rnd in elimination_rounds(search.distill_candidates, steps, search.first_rung):
            trained += rnd.enter * (rnd.step - before)
            before = rnd.step
        parts, batch = run.timed.trainings["student"], run.config.batch_blocks * run.block_tokens
        seconds += trained * (parts.update + batch * parts.token)
    return seconds, f"at most {search.cut_candidates} candidates cut, {trained:,} training steps"


def _evaluations(run: _Run) -> Found:
    config, work = run.recipe.evaluate, run.timed.work
    assert work is not None
    others = 2 + run.recipe.scratch_baseline + (run.config.correction is not None)
    assert config.blocks is not None, "resolve_recipe fills it in"
    blocks = min(config.blocks, run.heldout_blocks)
    tokens = blocks * run.block_tokens
    seconds = tokens * (work.teacher_token + others * work.student_token)
    seconds += (1 + others) * (work.load + len(config.prompts) * config.new_tokens * work.prompt_token)
    if config.speed:
        context = min(256, run.block_tokens)
        seconds += 2 * (DEFAULT_ROUNDS + 1) * (context * work.teacher_token + SPEED_TOKENS * work.prompt_token)
    seconds += 2 * run.gguf_reading
    why = f"{1 + others} models on {tokens:,} held-out tokens and {len(config.prompts)} prompts"
    return seconds, why + (", without the benchmarks, whose items are not timed" if config.benchmarks else "")


def _gguf(run: _Run) -> Found:
    config, parts, work = run.recipe.gguf, run.timed.gguf, run.timed.work
    if parts is None or work is None:
        return None, "files of a vocabulary this large are not timed"
    tokens = config.samples * min(run.block_tokens, QUANTIZE_TOKENS)
    blocks = min(config.blocks, run.heldout_blocks) if config.verify else 0
    files = len(config.types) + len(config.bits_per_weight) + len(config.sizes)
    seconds = parts.start + blocks * parts.block + tokens * work.calibration_token
    return seconds, f"{files} files, an importance matrix of {tokens:,} tokens, {blocks} blocks of proof"


def _report(run: _Run) -> Found:
    return REPORT_SECONDS, "report.html and the model card"


ESTIMATES: dict[str, Callable[[_Run], Found]] = {
    "data": _data,
    "corrected": _training("corrected"),
    "statistics": _statistics,
    "lessons": _lessons,
    "search": _search,
    "scores": _scores,
    "plan": _plan,
    "pruned": _pruned,
    "student": _training("student"),
    "scratch": _training("scratch"),
    "evaluations": _evaluations,
    "gguf": _gguf,
    "report": _report,
}
