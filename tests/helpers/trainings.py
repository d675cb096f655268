"""Trainings in few words: settings resolved for two shapes, and what hears a training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.progress import SILENT, Listener
from minitron.data.corpus import Corpus
from minitron.distillation.config import DistillConfig
from minitron.distillation.schedule import ModelSize, Schedule, resolve
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import Training
from minitron.model.architecture import Shape


def resolved(
    config: DistillConfig,
    student: Shape,
    teacher: Shape,
    *,
    weights_rms: float = 1.0,
    teacher_weights_rms: float | None = None,
    **text: Any,
) -> DistillConfig:
    """Resolve settings for two shapes whose weights have a size.

    Args:
        text: block_tokens, train_tokens and repaired, as `resolve` takes them.
    """
    of_teacher = ModelSize(teacher, teacher_weights_rms or weights_rms)
    return resolve(config, ModelSize(student, weights_rms), of_teacher, **text)


def training(
    student: Path,
    teacher: Path | None,
    corpus: Corpus,
    config: DistillConfig,
    work: Path,
    *,
    seed: int = 0,
    kind: Callable[[DistillConfig, int, int], Schedule] = Schedule.of_student,
    listener: Listener = SILENT,
) -> Training:
    """A training by resolved settings; with `config.teacher` `recorded` the teacher is a directory of its logits."""
    recorded = config.teacher == "recorded"
    source = TeacherSource(None if recorded else teacher, teacher if recorded else None)
    return Training(student, source, corpus, kind(config, corpus.block_tokens, seed), work, listener)


@dataclass
class Heard:
    """A listener made of two functions."""

    progress: Callable[..., None] = lambda done, total, note="": None
    warn: Callable[[str], None] = lambda text: None

    def stage(self, name: str, state: str) -> None:
        pass
