"""A training is timed on a probe: the steps that the stages run, a few of them."""

import time
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch

from minitron.core.device import compute_dtype, pick_device
from minitron.core.files import scratch_directory
from minitron.core.progress import Silent
from minitron.distillation.recording import DEFAULT_TOP_K, record_logits
from minitron.distillation.schedule import ModelSize, Schedule, resolve
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import Training, distill
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.pipeline.asked import Asked, TrainingKind, TrainingSeconds
from minitron.pipeline.probe import WEIGHTS_RMS, Probe

# Steps that are timed, one of which changes SOAP's axes and one of which saves; fewer of a batch of twice the size.
STEPS, SAVED_STEP, STEPS_OF_LARGER = 10, 5, 4
EVALUATED_BLOCKS = 4


def time_training(asked: Asked, probe: Probe, kind: TrainingKind) -> TrainingSeconds:
    """Time the steps, an evaluation and a state of a training of the probe."""
    block_tokens = probe.corpus.block_tokens
    most = max(1, asked.recipe.distill.micro_batch_tokens // block_tokens)
    fits = max(1, asked.timed_block(probe.size) // block_tokens)
    wanted = most if asked.batch_tokens is None else max(1, asked.batch_tokens // block_tokens)
    blocks = min(wanted, most, fits)
    started = time.perf_counter()
    steps = _steps(asked, probe, kind, blocks, STEPS)
    took = time.perf_counter() - started
    usual = [seconds for step, seconds in enumerate(steps, start=1) if step not in (1, SAVED_STEP, STEPS)]
    save = max(0.0, steps[SAVED_STEP - 1] - median(usual))
    evaluation = max(0.0, steps[-1] - save - median(usual)) / EVALUATED_BLOCKS
    token, update = mean(usual) / (blocks * block_tokens), 0.0
    if asked.batch_tokens != blocks * block_tokens:
        larger = median(_steps(asked, probe, kind, 2 * blocks, STEPS_OF_LARGER)[1:-1])
        token = min(token, max(0.0, larger - median(usual)) / (blocks * block_tokens))
        update = mean(usual) - token * blocks * block_tokens
    start = max(0.0, took - sum(steps[1:]) - median(usual))
    evaluation *= asked.block_tokens / block_tokens
    return TrainingSeconds(start, token, update, evaluation, save)


def _steps(asked: Asked, probe: Probe, kind: TrainingKind, blocks: int, steps: int) -> list[float]:
    """Return the seconds of each step of a short training, the first of which starts with nothing loaded."""
    block_tokens = probe.corpus.block_tokens
    config = asked.recipe.distill.model_copy(
        update={
            "tokens": steps * blocks * block_tokens,
            "minutes": None,
            "batch_blocks": blocks,
            "evaluate_steps": steps,
            "checkpoint_steps": min(SAVED_STEP, steps),
            "evaluate_blocks": EVALUATED_BLOCKS,
            "learning_rate": 1e-6,
            "min_learning_rate": 0.0,
            "warmup_steps": 0,
            "stop_at_loss": None,
            "compile": False,  # it would take longer than all the rest, to find a step that is a tenth shorter
            "correction_tokens": None,
            "log_to": [],
        }
    )
    sizes = (ModelSize(model.shape, WEIGHTS_RMS) for model in (probe.student, probe.teacher))
    train_tokens = probe.corpus.train_tokens
    resolved = resolve(config, *sizes, block_tokens=block_tokens, train_tokens=max(train_tokens, config.tokens or 0))
    schedules = {"student": Schedule.of_student, "corrected": Schedule.of_correction, "scratch": Schedule.of_scratch}
    clock, origin, source = _Clock(), probe.student.path, TeacherSource(checkpoint=probe.teacher.path)
    with scratch_directory(probe.path, prefix="timed-") as path:
        if kind != "student":
            source, origin = TeacherSource(), (probe.teacher if kind == "corrected" else probe.student).path
        elif resolved.teacher == "recorded":
            record(asked, probe, path)
            source = TeacherSource(recording=path)
        (path / "out").mkdir()
        clock.times = [time.perf_counter()]
        schedule = schedules[kind](resolved, block_tokens, asked.recipe.seed)
        distill(Training(origin, source, probe.corpus, schedule, path / "work", clock), path / "out")
    return clock.steps


class _Clock(Silent):
    """Notes when each step is done."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.times.append(time.perf_counter())

    def warn(self, text: str) -> None:
        pass

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def record(asked: Asked, probe: Probe, out: Path) -> float:
    """Record the logits of all blocks of the probe; return the seconds of a token."""
    corpus, config = probe.corpus, asked.recipe.distill
    blocks = np.concatenate([each.select(slice(None)) for each in (corpus.train, corpus.heldout)])
    pass_ = Pass(compute_dtype(config.precision, pick_device()))
    top_k = min(config.top_k or DEFAULT_TOP_K, probe.size.vocab)
    started = time.perf_counter()
    record_logits(
        probe.teacher, Samples(torch.from_numpy(blocks)), pass_, out, top_k=top_k, temperature=config.temperature
    )
    return (time.perf_counter() - started) / blocks.size
