"""Which shape the student gets: the stage that composes enumeration, prediction, cuts and short distillation runs."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.calibration.collect import Statistics
from minitron.core.device import bytes_per_second, matmul_flops_per_second
from minitron.core.errors import RunError
from minitron.core.files import atomic_directory, write_json
from minitron.core.progress import Listener
from minitron.core.typed_files import as_typed, read_typed
from minitron.data.corpus import Blocks, Corpus, batch_rows
from minitron.distillation import train
from minitron.distillation.config import DistillConfig, num_steps, resolve
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, model_files
from minitron.model.model_config import ModelConfig
from minitron.pipeline.directory import RunDirectory, read_record
from minitron.pruning.importance import Scores
from minitron.pruning.plan import PruneConfig
from minitron.pruning.repair.config import replaces_channels
from minitron.pruning.repair.residual_basis import reading_moment
from minitron.recipe import Recipe
from minitron.shapes import layouts
from minitron.shapes.rank import Ranked, distilled_steps, predictor, rank
from minitron.shapes.space import Candidate, Machine, SearchConfig, feasible

PROBE_SIZE = 1024  # of the matrix product that measures this machine's speed


def find_shape(
    stages: RunDirectory,
    recipe: Recipe,
    teacher: Checkpoint,
    guide: Path,
    statistics: Statistics,
    scores: Scores,
    corpus: Corpus,
    make: Callable[[Shape, Path], Any],
    *,
    inputs: Mapping[str, str],
) -> Shape:
    """The best shape within the budgets, as far as `search.level` looks; search/candidates.json holds all of them.

    Args:
        guide: what candidates are distilled from: the teacher, or its lessons.
        make: cuts the student of a shape into an empty directory.
        inputs: digests of what else `make` reads.
    """
    work = _work(stages)

    def do(out: Path) -> dict[str, Any]:
        found, facts = ranked(
            recipe, teacher, statistics, scores, corpus, make, guide=guide, work=work, listener=stages.listener
        )
        write_json(out / "candidates.json", facts)
        return {
            "winner": found[0].candidate.to_dict(),
            "candidates": len(found),
            "cut": sum(0 in one.losses for one in found),
            "distilled": sum(one.step > 0 for one in found),
            "tokens": distilled_steps(found) * facts["step_tokens"],
        }

    stages.do(
        "search",
        do,
        inputs={
            "model": stages.digest(model_files(teacher.path)),
            "statistics": stages.digest([stages.layout.statistics]),
            "data": corpus.digest,
            **inputs,
        },
        config={
            "search": recipe.search,
            "prune": recipe.prune,
            "repair": recipe.repair,
            "distill": recipe.distill.of_record,
            "seed": recipe.seed,
        },
        state=work,
    )
    again = f"remove {stages.layout.stage('search')} and run the same command to search again"
    facts = read_typed(stages.layout.candidates, layouts.SEARCH, RunError, way_out=again)
    return Shape(**vars(facts.candidates[0].shape))


def ranked(
    recipe: Recipe,
    teacher: Checkpoint,
    statistics: Statistics,
    scores: Scores,
    corpus: Corpus | None,
    make: Callable[[Shape, Path], Any] | None,
    *,
    work: Path,
    listener: Listener,
    guide: Path | None = None,
) -> tuple[list[Ranked], dict[str, Any]]:
    """The candidates, best first, and what candidates.json says of them.

    Args:
        corpus, make: needed where losses are measured; `make` cuts the student of a shape into an empty directory.
        work: holds candidates that are measured, and what was measured so far.
        guide: what they are distilled from; default the teacher.
    """
    search, machine = recipe.search, machine_for(recipe.search, teacher.dtype)
    candidates = feasible_for(teacher, recipe.prune, search, machine)
    reads = reading_moment(teacher, statistics) if replaces_channels(recipe.repair.steps) else None
    predict = predictor(statistics, scores, teacher.shape, reads=reads)
    if corpus is None or make is None:
        assert search.level == "predicted"
        found, step_tokens = rank(candidates, predict, None, search), 0
    else:
        trial = _Trial(work, recipe, teacher, guide or teacher.path, corpus, make, listener)
        found = rank(candidates, predict, trial.loss_at, search, steps=trial.steps, drop=trial.drop)
        step_tokens = trial.step_tokens
    facts = {
        "level": search.level,
        "machine": asdict(machine),
        "context_tokens": search.context_tokens,
        "batch": search.batch,
        "step_tokens": step_tokens,
        "candidates": [one.to_dict() for one in found],
    }
    return found, facts


def take_over(stages: RunDirectory) -> None:
    """Let the final distillation go on from the winner's state, if there is one, and clear what the search left."""
    record = stages.layout.record("search")
    if not record.exists():
        return
    found = as_typed(read_record(record.parent).result, layouts.SEARCH_RESULT, f"{record}: result", RunError)
    winner = found.winner.name
    state, final = _work(stages) / winner / "distill", stages.layout.work("distill")
    if state.exists() and not final.exists():
        state.rename(final)
    shutil.rmtree(_work(stages), ignore_errors=True)


def feasible_for(
    teacher: Checkpoint | ModelConfig, prune: PruneConfig, search: SearchConfig, machine: Machine | None
) -> list[Candidate]:
    """`feasible` of a model on disk."""
    return feasible(
        teacher.architecture,
        teacher.config,
        teacher.shape,
        prune,
        search,
        itemsize=teacher.dtype.itemsize,
        machine=machine,
    )


def machine_for(search: SearchConfig, dtype: torch.dtype) -> Machine:
    """The machine that the search names, and this one where it names none."""
    return Machine(
        search.bytes_per_second or bytes_per_second(),
        search.flops_per_second or matmul_flops_per_second(dtype, PROBE_SIZE),
    )


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
    """Measures candidates; what was measured is on disk, so that an interrupted search goes on."""

    def __init__(
        self,
        work: Path,
        recipe: Recipe,
        teacher: Checkpoint,
        guide: Path,
        corpus: Corpus,
        make: Callable[[Shape, Path], Any],
        listener: Listener,
    ):
        self.work, self.recipe, self.teacher, self.corpus, self.make = work, recipe, teacher, corpus, make
        self.guide, self.listener = guide, listener
        self.judge = judging_blocks(corpus, recipe.seed, recipe.search.judge_blocks)
        self.file = work / "losses.json"
        self.known: dict[str, dict[str, float]] = (
            read_typed(self.file, layouts.LOSSES, RunError, way_out=f"remove {self.file} to measure them again")
            if self.file.exists()
            else {}
        )
        tokens = recipe.distill.tokens or corpus.train_tokens
        self.weights_rms = teacher.weights_rms()
        resolved = self._resolve(teacher.shape)
        assert resolved.batch_blocks
        self.steps = num_steps(tokens, resolved.batch_blocks, corpus.block_tokens)
        self.step_tokens = resolved.batch_blocks * corpus.block_tokens

    def loss_at(self, candidate: Candidate, step: int) -> float:
        losses = self.known.setdefault(candidate.name, {})
        if str(step) not in losses:
            here = self.work / candidate.name
            if not (here / "pruned").exists():
                with atomic_directory(here / "pruned") as partial:
                    self.make(candidate.shape, partial)
            losses[str(step)] = train.distill_until(
                step,
                self.judge,
                here / "pruned",
                self.guide,
                self.corpus,
                self.config(candidate),
                seed=self.recipe.seed,
                work=here / "distill",
                progress=lambda done, total, note: self.listener.progress(done, total, f"{candidate.name}, {note}"),
                warn=self.listener.warn,
            )
            write_json(self.file, self.known)
        return losses[str(step)]

    def drop(self, candidate: Candidate) -> None:
        shutil.rmtree(self.work / candidate.name, ignore_errors=True)

    def config(self, candidate: Candidate) -> DistillConfig:
        return self._resolve(candidate.shape)

    def _resolve(self, shape: Shape) -> DistillConfig:
        corpus = self.corpus
        return resolve(
            self.recipe.distill,
            shape,
            self.teacher.shape,
            weights_rms=self.weights_rms,
            block_tokens=corpus.block_tokens,
            train_tokens=corpus.train_tokens,
            repaired=bool(self.recipe.repair.steps),
        )


def _work(stages: RunDirectory) -> Path:
    return stages.layout.work("search-state")
