"""Which shape the student gets: the stage that composes enumeration, prediction, cuts and short distillation runs."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.core import parallel
from minitron.core.errors import RunError
from minitron.core.files import atomic_directory, write_json
from minitron.core.machine import bytes_per_second, matmul_flops_per_second
from minitron.core.progress import Listener
from minitron.core.typed_files import as_typed, read_typed
from minitron.data.corpus import Blocks, Corpus, batch_rows
from minitron.distillation import train
from minitron.distillation.config import DistillConfig, num_steps, resolve
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, ModelConfig
from minitron.model.weight_files import model_files
from minitron.pipeline.directory import RunDirectory, read_record
from minitron.pruning.config import PruneConfig
from minitron.pruning.repair import replaces_channels
from minitron.pruning.repair.residual_basis import reading_moment
from minitron.pruning.steps import Pruner
from minitron.recipe import Recipe
from minitron.shapes import layouts
from minitron.shapes.rank import Ranked, distilled_steps, predictor, rank
from minitron.shapes.space import Candidate, Machine, SearchConfig, feasible

PROBE_SIZE = 1024  # of the matrix product that measures this machine's speed


def find_shape(
    stages: RunDirectory,
    recipe: Recipe,
    pruner: Pruner,
    guide: Path,
    corpus: Corpus,
) -> Shape:
    """The best shape within the budgets, as far as `search.level` looks; search/candidates.json holds all of them.

    Args:
        pruner: makes the candidates.
        guide: what candidates are distilled from: the teacher, or its lessons.
    """
    work = _work(stages)

    def measure() -> tuple[list[Ranked], dict[str, Any]]:
        return ranked(recipe, pruner, corpus, guide=guide, work=work, listener=stages.listener)

    def do(out: Path) -> dict[str, Any]:
        found, facts = measure()
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
            "model": stages.digest(model_files(pruner.teacher.path)),
            "statistics": stages.digest([stages.layout.statistics]),
            "data": corpus.digest,
            **task_digest(stages, recipe.prune),
        },
        config={
            "search": recipe.search,
            "prune": recipe.prune,
            "repair": recipe.repair,
            "distill": recipe.distill.for_record,
            "seed": recipe.seed,
        },
        state=work,
        assist=measure,
    )
    again = f"remove {stages.layout.stage('search')} and run the same command to search again"
    facts = read_typed(stages.layout.candidates, layouts.SEARCH, RunError, way_out=again)
    return Shape(**vars(facts.candidates[0].shape))


def ranked(
    recipe: Recipe,
    pruner: Pruner,
    corpus: Corpus | None,
    *,
    work: Path,
    listener: Listener,
    guide: Path | None = None,
) -> tuple[list[Ranked], dict[str, Any]]:
    """The candidates, best first, and what candidates.json says of them.

    Args:
        pruner: makes the candidates that are measured.
        corpus: needed where losses are measured.
        work: holds candidates that are measured, and what was measured so far.
        guide: what they are distilled from; default the teacher.
    """
    teacher, statistics = pruner.teacher, pruner.statistics
    assert statistics is not None
    search, machine = recipe.search, machine_for(recipe.search, teacher.dtype)
    candidates = feasible_for(teacher, recipe.prune, search, machine)
    reads = reading_moment(teacher, statistics) if replaces_channels(recipe.repair.steps) else None
    predict = predictor(statistics, pruner.unit_scores, teacher.shape, reads=reads)
    if corpus is None:
        assert search.level == "predicted"
        found, step_tokens = rank(candidates, predict, None, search), 0
    else:
        trial = _Trial(work, recipe, pruner, guide or teacher.path, corpus, listener)
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


def task_digest(stages: RunDirectory, config: PruneConfig) -> dict[str, str]:
    """Of the file of questions that layers are scored by, if there is one."""
    file = Path(config.layer_task or "").expanduser()
    return {"task": stages.digest([file])} if file.is_file() else {}


def adopt_search_state(stages: RunDirectory) -> None:
    """Let the final distillation go on from the winner's state, if there is one, and clear what the search left."""
    record = stages.layout.record("search")
    if not record.exists() or not parallel.is_first():
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
    """The machine that the search names, and where it names none that of the first process."""
    here = Machine(
        search.bytes_per_second or bytes_per_second(),
        search.flops_per_second or matmul_flops_per_second(dtype, PROBE_SIZE),
    )
    return Machine(*parallel.agreed([here.bytes_per_second, here.flops_per_second]))


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
        pruner: Pruner,
        guide: Path,
        corpus: Corpus,
        listener: Listener,
    ):
        self.work, self.recipe, self.pruner, self.corpus = work, recipe, pruner, corpus
        self.teacher, self.guide, self.listener = pruner.teacher, guide, listener
        self.judge = judging_blocks(corpus, recipe.seed, recipe.search.judge_blocks)
        self.file = work / "losses.json"
        known: dict[str, dict[str, float]] = {}
        if parallel.is_first() and self.file.exists():
            again = f"remove {self.file} to measure them again"
            known = read_typed(self.file, layouts.LOSSES, RunError, way_out=again)
        self.known: dict[str, dict[str, float]] = parallel.agreed(known)
        tokens = recipe.distill.tokens or corpus.train_tokens
        self.weights_rms = self.teacher.weights_rms()
        resolved = self._resolve(self.teacher.shape)
        assert resolved.batch_blocks
        self.steps = num_steps(tokens, resolved.batch_blocks, corpus.block_tokens)
        self.step_tokens = resolved.batch_blocks * corpus.block_tokens

    def loss_at(self, candidate: Candidate, step: int) -> float:
        losses = self.known.setdefault(candidate.name, {})
        if str(step) not in losses:
            here = self.work / candidate.name
            if parallel.is_first() and not (here / "pruned").exists():
                with parallel.alone(), atomic_directory(here / "pruned") as partial:
                    self.pruner.at(here).make(candidate.shape, partial)
            parallel.require_all_well()  # the others wait for the candidate
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
            if parallel.is_first():
                write_json(self.file, self.known)
        return losses[str(step)]

    def drop(self, candidate: Candidate) -> None:
        if parallel.is_first():
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
