"""The work of a run other than its trainings is timed on a probe: calls of the functions that the stages call."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import CalibrateConfig, Statistics
from minitron.core.device import pick_device
from minitron.core.files import scratch_directory
from minitron.data.corpus import draw_samples
from minitron.data.sampling import Sampling, next_tokens
from minitron.data.sources import TEACHER
from minitron.evaluation.quality import measure_quality
from minitron.evaluation.speed import Load, transformers_timer
from minitron.gguf.config import QUANTIZE_TOKENS, QuantizeConfig
from minitron.model.caches import GrowingLayer
from minitron.model.checkpoint import load_model
from minitron.pipeline.asked import Asked, GgufSeconds, WorkSeconds
from minitron.pipeline.probe import Probe
from minitron.pipeline.time_training import record
from minitron.pruning.config import PruneConfig
from minitron.pruning.repair import Step, columns_of, needed_steps
from minitron.pruning.steps import Pruner, Scoring

_Made = TypeVar("_Made")
# The operations of the longer one of two passes over samples.
PASS_FLOPS, PASS_FLOPS_ON_GPU = 2e11, 2e13
# A repair that solves for more columns takes minutes a layer, and is not timed.
MOST_COLUMNS = 4096
DECODED = 16  # tokens


def time_work(asked: Asked, probe: Probe) -> WorkSeconds:
    """Time the work of the other stages on the probe."""
    recipe, block_tokens = asked.recipe, probe.corpus.block_tokens
    calibrate = recipe.calibrate
    few, many = 1, _blocks_of_pass(asked, probe)
    _calibration(probe, calibrate, few)  # the first is slower
    start, each = _line(lambda blocks: _calibration(probe, calibrate, blocks)[0], few, many)
    repair = (0.0, 0.0)
    if repair_is_timed(asked):
        columns = _columns(asked)
        least = max(2, -(-columns // block_tokens))
        repair = _line(lambda blocks: _repair(asked, probe, blocks), least, max(2 * least, many))
    lessons = 0.0
    if recipe.distill.teacher == "recorded":
        with scratch_directory(probe.path, prefix="timed-") as path:
            lessons = record(asked, probe, path)
    load, teacher = _timed(lambda: load_model(probe.teacher.path).to(pick_device()))
    student = load_model(probe.student.path).to(pick_device())
    blocks = probe.corpus.heldout.head(max(1, min(8, 2048 // block_tokens)))
    tokens = len(blocks) * block_tokens
    alone, _ = _best(lambda: measure_quality(teacher, blocks))
    pair, _ = _best(lambda: measure_quality(student, blocks, teacher=teacher))
    timer = transformers_timer(teacher)
    timer(Load(1, 16, 2))
    one = timer(Load(1, 16, DECODED)).decode_seconds / DECODED
    sampled = _sampled_step(teacher, asked) if recipe.data.source == TEACHER else 0.0
    return WorkSeconds(
        calibration_start=start,
        calibration_token=each / block_tokens,
        lessons_token=lessons,
        repair_start=repair[0],
        repair_token=repair[1] / block_tokens,
        load=load,
        teacher_token=alone / tokens,
        student_token=pair / tokens,
        prompt_token=one,
        sampled_step=sampled,
    )


def _sampled_step(model: Any, asked: Asked) -> float:
    """Return the seconds of a token of each document that is sampled, behind half as many as it may have."""
    config, before = asked.recipe.data, asked.block_tokens // 2
    sampling = Sampling(
        0, (), asked.teacher.shape.vocab, config.sample_temperature, config.sample_top_k, config.sample_top_p
    )
    tokens, at = torch.zeros(config.sample_batch, 1, dtype=torch.long, device=pick_device()), torch.rand(1)
    _, cache = next_tokens(model, sampling, tokens, None, at.expand(config.sample_batch))
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer) and layer.keys is not None:
            earlier = layer.keys[:, :, :1].expand(-1, -1, before - 1, -1)
            layer.update(earlier, earlier)
    step = partial(next_tokens, model, sampling, tokens, cache, at.expand(config.sample_batch))
    return median(_timed(step)[0] for _ in range(DECODED))


def _calibration(probe: Probe, config: CalibrateConfig, blocks: int) -> tuple[float, Statistics]:
    samples = draw_samples(probe.corpus, blocks, 0)
    return _timed(
        lambda: measure_statistics(
            probe.teacher, samples, config.as_pass(probe.path), second_moment=config.second_moment
        )
    )


def _columns(asked: Asked) -> int:
    """Return the most columns that a repair of the run solves for."""
    return max((columns_of(step, asked.teacher.shape) for step in _needed(asked)), default=0)


def _needed(asked: Asked) -> list[Step]:
    return needed_steps(asked.recipe.repair.steps or [], asked.teacher.shape, asked.student.shape)


def repair_is_timed(asked: Asked) -> bool:
    return _columns(asked) <= MOST_COLUMNS


def _repair(asked: Asked, probe: Probe, blocks: int) -> float:
    """Cut the probe's teacher to its student with the repairs of the run; return the seconds."""
    config = asked.recipe.calibrate
    _, statistics = _calibration(probe, config.model_copy(update={"second_moment": True}), blocks)
    samples = draw_samples(probe.corpus, blocks, 0)
    scoring = Scoring(PruneConfig(), samples, config.as_pass(probe.path), None)
    pruner = Pruner(probe.teacher, scoring, asked.recipe.repair.steps or [], statistics)
    with scratch_directory(probe.path, prefix="timed-") as out:
        return _timed(lambda: pruner.make(probe.student.shape, out))[0]


def time_gguf(asked: Asked, probe: Probe) -> GgufSeconds | None:
    """Time the files of the probe's student, and multiply by the parameters of the real one.

    Returns None where the probe lacks rows of the vocabulary: a file has the whole tokenizer.
    """
    from minitron.gguf.quantize import QuantizeText, write_ladder

    if probe.size.vocab != asked.teacher.shape.vocab:
        return None
    config, corpus = asked.recipe.gguf, probe.corpus
    tokens = draw_samples(corpus, 1, 0).tokens[:, :QUANTIZE_TOKENS]
    heldout = draw_samples(corpus, 4, 1).tokens[:, :QUANTIZE_TOKENS]

    def write(blocks: int) -> float:
        asked_for: QuantizeConfig = config.model_copy(update={"samples": 1, "blocks": blocks})
        with scratch_directory(probe.path, prefix="timed-") as out:
            text = QuantizeText(tokens, heldout[:blocks], "random")
            return _timed(lambda: write_ladder(probe.student, asked_for, out, text=text, name="probe"))[0]

    start, block = _line(write, 1, 4)
    student = asked.student
    real = student.architecture.count(student.shape, student.config).total
    ratio = real / probe.student.parameters.total
    return GgufSeconds(ratio * start, ratio * block)


def _blocks_of_pass(asked: Asked, probe: Probe) -> int:
    flops = PASS_FLOPS if pick_device().type == "cpu" else PASS_FLOPS_ON_GPU
    blocks = round(flops / (2 * asked.parameters(probe.size) * probe.corpus.block_tokens))
    return max(4, min(blocks, len(probe.corpus.train)))


def _line(seconds: Callable[[int], float], few: int, many: int) -> tuple[float, float]:
    """Return the seconds of work that do not depend on its amount, and those of each more."""
    less, more = seconds(few), seconds(many)
    each = max(0.0, more - less) / (many - few)
    return max(0.0, less - few * each), each


def _timed(work: Callable[[], _Made]) -> tuple[float, _Made]:
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made


def _best(work: Callable[[], _Made]) -> tuple[float, _Made]:
    """Return the shorter time of two: the first is slower."""
    return min((_timed(work) for _ in range(2)), key=lambda one: one[0])
