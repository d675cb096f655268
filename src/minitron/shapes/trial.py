"""Candidates of a search, cut and trained for a while; what was measured is on disk, so that a search goes on."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minitron.core import parallel
from minitron.core.errors import RunError
from minitron.core.files import atomic_directory, write_json
from minitron.core.progress import SILENT, Listener
from minitron.core.typed_files import read_typed
from minitron.data.corpus import Blocks, Corpus, batch_rows
from minitron.distillation.config import DistillConfig
from minitron.distillation.schedule import ModelSize, Schedule, resolve
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import Training, distill_until
from minitron.model.architecture import Shape
from minitron.pruning.repair import REPAIRS, replaces_channels
from minitron.pruning.repair.residual_basis import reading_moment
from minitron.pruning.steps import Pruner
from minitron.shapes import layouts
from minitron.shapes.rank import Ranking, predictor, rank
from minitron.shapes.space import Candidate, Machine, SearchConfig, feasible_for


@dataclass(frozen=True)
class Trials:
    """The training that candidates are measured in, which is the first part of the winner's.

    distill: its settings, as far as the user gave them.
    teacher: the model, or the recorded logits, that candidates learn from.
    work: the directory of the candidates and of the losses measured so far.
    """

    distill: DistillConfig
    teacher: TeacherSource
    corpus: Corpus
    seed: int
    work: Path
    listener: Listener = SILENT


def rank_shapes(pruner: Pruner, search: SearchConfig, machine: Machine, trials: Trials | None) -> Ranking:
    """Every shape of the pruner's teacher within the budgets, ranked as far as `search.level` looks.

    Args:
        pruner: makes the candidates that are measured; it has statistics.
        machine: the machine that times are modelled for.
        trials: None for the level `predicted`, which measures nothing.
    """
    teacher, statistics = pruner.teacher, pruner.statistics
    assert statistics is not None and (trials is not None or search.level == "predicted")
    candidates = feasible_for(teacher, pruner.scoring.config, search, machine)
    predict = damage_of(pruner)
    if trials is None:
        found, step_tokens = rank(candidates, predict, None, search), 0
    else:
        trial = _Trial(trials, pruner, search)
        found = rank(candidates, predict, trial.loss_at, search, steps=trial.plain.steps, drop=trial.drop)
        step_tokens = trial.plain.step_tokens
    return Ranking(search.level, machine, search.context_tokens, search.batch, step_tokens, found)


def damage_of(pruner: Pruner) -> Callable[[Shape], float]:
    """Return `predictor` for the cuts of a pruner, which has statistics."""
    teacher, statistics = pruner.teacher, pruner.statistics
    assert statistics is not None
    reads = reading_moment(teacher, statistics) if replaces_channels(pruner.repairs) else None
    repaired = {dim for step in pruner.repairs for dim in REPAIRS[step].dims}
    return predictor(statistics, pruner.unit_scores, teacher.shape, repaired=repaired, reads=reads)


def predicted_shape(pruner: Pruner) -> Shape:
    """Return the shape for `prune.target` with the least predicted damage; the pruner has statistics.

    Raises: PlanError if the target is larger than the teacher, or if no shape comes near it.
    """
    config = SearchConfig()
    candidates = feasible_for(pruner.teacher, pruner.scoring.config, config, None)
    return rank(candidates, damage_of(pruner), None, config)[0].candidate.shape


def judging_blocks(corpus: Corpus, seed: int, num_blocks: int) -> Blocks:
    """The training blocks that the first pass of `distill` reads last, at most half of them.

    Candidates are compared on these, so that the held-out text that the student is reported on plays no part in the
    choice; and short runs, which read less than half a pass, have not seen them.
    """
    blocks = corpus.train
    order = batch_rows(len(blocks), seed=seed, step=0, batch=len(blocks))
    last = np.sort(order[-min(num_blocks, max(1, len(blocks) // 2)) :])
    return replace(blocks, tokens=np.asarray(blocks.tokens[last]))


class _Trial:
    """Measures candidates."""

    def __init__(self, trials: Trials, pruner: Pruner, search: SearchConfig):
        self.trials, self.pruner = trials, pruner
        self.judge = judging_blocks(trials.corpus, trials.seed, search.judge_blocks)
        self.file = trials.work / "losses.json"
        known: dict[str, dict[str, float]] = {}
        if parallel.is_first() and self.file.exists():
            again = f"remove {self.file} to measure them again"
            known = read_typed(self.file, layouts.CANDIDATE_LOSSES, RunError, way_out=again)
        self.known: dict[str, dict[str, float]] = parallel.agreed(known)
        self.plain = self.schedule(pruner.teacher.shape)  # batch and steps are the same for every shape

    def schedule(self, shape: Shape) -> Schedule:
        corpus, teacher = self.trials.corpus, self.pruner.teacher
        config = resolve(
            self.trials.distill,
            ModelSize(shape, teacher.weights_rms),
            ModelSize(teacher.shape, teacher.weights_rms),
            block_tokens=corpus.block_tokens,
            train_tokens=corpus.train_tokens,
            repaired=bool(self.pruner.repairs),
        )
        return Schedule.of_student(config, corpus.block_tokens, self.trials.seed)

    def loss_at(self, candidate: Candidate, step: int) -> float:
        losses = self.known.setdefault(candidate.name, {})
        if str(step) not in losses:
            here = self.trials.work / candidate.name
            if parallel.is_first() and not (here / "pruned").exists():
                with parallel.alone(), atomic_directory(here / "pruned") as partial:
                    self.pruner.at(here).make(candidate.shape, partial)
            parallel.require_all_well()  # the others wait for the candidate
            training = Training(
                here / "pruned",
                self.trials.teacher,
                self.trials.corpus,
                self.schedule(candidate.shape),
                here / "distill",
                _Named(candidate.name, self.trials.listener),
            )
            losses[str(step)] = distill_until(training, step, self.judge)
            if parallel.is_first():
                write_json(self.file, self.known)
        return losses[str(step)]

    def drop(self, candidate: Candidate) -> None:
        if parallel.is_first():
            shutil.rmtree(self.trials.work / candidate.name, ignore_errors=True)


@dataclass(frozen=True)
class _Named:
    """A listener that is told which candidate the progress is of."""

    name: str
    listener: Listener

    def stage(self, name: str, state: str) -> None:
        self.listener.stage(name, state)

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.listener.progress(done, total, f"{self.name}, {note}")

    def warn(self, text: str) -> None:
        self.listener.warn(text)
