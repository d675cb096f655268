"""What benchmarks of distillations share: their arguments, a teacher with its text, and a cache of runs."""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lib.even import even_width
from lib.measure import publish
from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import Statistics
from minitron.cli.process import keep_freed_memory
from minitron.core.device import compute_dtype, pick_device
from minitron.data.config import DataConfig
from minitron.data.corpus import Corpus, draw_samples, open_corpus
from minitron.data.writing import prepare
from minitron.distillation.config import DistillConfig
from minitron.distillation.recording import record_logits
from minitron.distillation.schedule import ModelSize, Schedule, num_steps, resolve
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import Training, blocks_read, distill
from minitron.evaluation.quality import measure_quality
from minitron.gguf.source import model_directory
from minitron.model.architecture import PRUNABLE, Shape, with_sizes
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.model.tokenizer import load_tokenizer
from minitron.pruning.config import PruneConfig
from minitron.pruning.importance import activation_scores
from minitron.pruning.plan import choose
from minitron.pruning.repair import BEST, RepairConfig, Step, resolve_repair
from minitron.pruning.repair.writer import Evidence, repaired_cut
from minitron.pruning.steps import Pruner, Scoring
from minitron.recipe import DEMO_TEACHER
from minitron.shapes.trial import predicted_shape

STARTS: dict[str, list[Step]] = {
    "plain": [],
    "norm_gain": ["norm_gain"],
    "basis": ["basis"],
    "ffn_least_squares": ["ffn_least_squares"],
    "ffn_obs": ["ffn_obs"],
    "heads_least_squares": ["heads_least_squares"],
    "heads_obs": ["heads_obs"],
    "residual_heads": ["residual_heads"],
    "layers_least_squares": ["layers_least_squares"],
    "refit": ["refit"],
    "basis + ffn_obs": ["basis", "ffn_obs"],
    "basis + ffn_obs + refit": ["basis", "ffn_obs", "refit"],
    "best": list(BEST),
    "scratch": [],
}
KEY = ("shape", "start", "tokens", "rate", "seed")  # of every run; what else a run's key has are its changes
RUNS = "runs.jsonl"  # in the cache
BLOCK_TOKENS, SAMPLES, HELDOUT_BLOCKS = 256, 256, 128


def arguments(description: str, *, data: str | None = "builtin") -> argparse.ArgumentParser:
    """What every benchmark of distillations can be told; without a default for `data`, it must be given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_TEACHER)
    parser.add_argument("--name", default="the demo teacher", help="what the result file calls the model")
    parser.add_argument("--data", default=data, required=data is None)
    parser.add_argument("--heldout")
    parser.add_argument("--heldout-blocks", type=int, default=HELDOUT_BLOCKS, help="to measure on")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="blocks of calibration")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--part", default="0/1", help="I/N: do every Nth run, from the Ith")
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser


def opened(args: argparse.Namespace) -> "Bench":
    """The teacher, its text and the runs so far: those in the cache, or those beside the result file."""
    keep_freed_memory()
    args.cache.mkdir(parents=True, exist_ok=True)
    runs, kept = args.cache / RUNS, _kept(args)
    if kept and kept.exists() and not runs.exists():
        shutil.copy(kept, runs)
    return Bench(
        args.model, args.data, args.heldout, args.cache, samples=args.samples, heldout_blocks=args.heldout_blocks
    )


def to_do(args: argparse.Namespace, grid: Iterable[Any]) -> Iterator[Any]:
    """The part of the grid that this process is to run."""
    part, parts = map(int, args.part.split("/"))
    return islice(() if args.only_table else grid, part, None, parts)


def published(bench: "Bench", text: str, args: argparse.Namespace) -> None:
    """Print or write the result, and put the runs beside it."""
    publish(text, args.out)
    kept = _kept(args)
    if kept:
        shutil.copy(bench.runs, kept)


def _kept(args: argparse.Namespace) -> Path | None:
    return args.out and args.out.with_suffix(".jsonl")


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def token_counts(text: str) -> list[int]:
    """0.25M,1M -> [250000, 1000000]"""
    return [round(float(number.removesuffix("M")) * 1e6) for number in text.split(",")]


def variant(text: str) -> tuple[str, dict[str, Any]]:
    """A start, and changes of the distillation: `best: teacher=recorded top_k=8`."""
    start, _, changes = text.partition(":")
    pairs = (change.split("=") for change in changes.split())
    return start, {key: int(value) if value.isdigit() else value for key, value in pairs}


def label(key: dict[str, Any]) -> str:
    """What `variant` was made from."""
    changes = " ".join(f"{name}={value}" for name, value in key.items() if name not in KEY)
    return f"{key['start']}: {changes}" if changes else key["start"]


def of_target(pruner: Pruner, target: str) -> Shape:
    """The shape that a target gives."""
    return predicted_shape(replace(pruner, scoring=replace(pruner.scoring, config=PruneConfig(target=target))))


def as_text(shape: Shape, teacher: Shape) -> str:
    """The dims that are cut, such as `layers=26 ffn=832`."""
    cut = [dim for dim in PRUNABLE if getattr(shape, dim) != getattr(teacher, dim)]
    return " ".join(f"{dim}={getattr(shape, dim)}" for dim in cut)


def share_of(target: str) -> float:
    """50% -> 0.5"""
    return float(target.rstrip("%")) / 100


class Bench:
    """A teacher, its text, and the runs that were made with them."""

    def __init__(
        self,
        model: Path,
        data: str,
        heldout: str | None,
        cache: Path,
        *,
        samples: int = SAMPLES,
        heldout_blocks: int = HELDOUT_BLOCKS,
    ):
        self.samples, self.heldout_blocks = samples, heldout_blocks
        self.teacher = open_checkpoint(model_directory(str(model)))
        self.cache, self.runs = cache, cache / RUNS
        self.corpus = _corpus(self.teacher, data, heldout, cache / "data")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The runs so far, those of other processes too."""
        return [json.loads(line) for line in self.runs.read_text().splitlines()] if self.runs.exists() else []

    def shape(self, kind: str) -> Shape:
        """About half of the non-embedding parameters: less width, fewer layers, or some of both; `width 30%` is that
        share instead.
        """
        table, config, shape = self.teacher.architecture, self.teacher.config, self.teacher.shape
        if kind.startswith("width"):
            return even_width(self.teacher, kind.removeprefix("width").strip() or "50%")
        if kind == "depth":
            return replace(shape, layers=-(-shape.layers // 2))
        fewer = replace(shape, layers=shape.layers - max(1, shape.layers // 5))
        share = 50 * table.count(shape, config).non_embedding / table.count(fewer, config).non_embedding
        return even_width(self.teacher, f"{share}%", fewer)

    def from_text(self, text: str) -> Shape:
        """The shape that `as_text` wrote."""
        pairs = (pair.split("=") for pair in text.split())
        return with_sizes(self.teacher.shape, **{dim: int(size) for dim, size in pairs})

    def share(self, shape: Shape) -> float:
        """The share of the teacher's non-embedding parameters that a shape has."""
        count = self.teacher.architecture.count(shape, self.teacher.config)
        return count.non_embedding / self.teacher.parameters.non_embedding

    def run(self, shape: str, start: str, tokens: int, rate: float, seed: int, **changes: Any) -> None:
        """One student, unless the cache has it.

        Args:
            rate: times the default of a plain cut, without regard to the size of the weights.
            changes: of the distillation.
        """
        key = {"shape": shape, "start": start, "tokens": tokens, "rate": rate, "seed": seed, **changes}
        if self.has(key):
            return
        student = self.shape(shape)
        loss = {"loss": "cross_entropy"} if start == "scratch" else {}
        config = resolve(
            DistillConfig(tokens=tokens, **loss, **changes),
            ModelSize(student, math.inf),
            ModelSize(self.teacher.shape, math.inf),
            block_tokens=BLOCK_TOKENS,
            train_tokens=self.corpus.train_tokens,
        )
        steps = num_steps(tokens, config.batch_blocks or 1, BLOCK_TOKENS)
        peak = (config.learning_rate or 0) * rate
        config = config.model_copy(
            update={
                "learning_rate": peak,
                "min_learning_rate": peak / 10,
                "evaluate_steps": steps,
                "evaluate_blocks": 1,
                "checkpoint_steps": steps,
            }
        )
        with tempfile.TemporaryDirectory(dir=self.cache) as path:
            work = Path(path)
            pruned, out = work / "pruned", work / "student"
            for directory in (pruned, out):
                directory.mkdir()
            self.cut(student, STARTS[start], pruned)
            schedule = Schedule.of_student(config, BLOCK_TOKENS, seed)
            if start == "scratch":
                schedule = replace(schedule, initialize="random")
            source, recorded = self.source(schedule, work)
            trained = distill(Training(pruned, source, self.corpus, schedule, work / "distill"), out)
            row = {
                "key": key,
                "cut": None if start == "scratch" else self.measure(pruned),
                "student": self.measure(out),
                "learning_rate": peak,
                "seconds": trained.seconds,
                **recorded,
            }
        self.record(row)

    def schedule(self, shape: Shape, settings: dict[str, Any], *, repaired: bool, rate: float = 1.0) -> Schedule:
        """The schedule of a student by the default settings.

        Args:
            settings: what the section `distill` of a recipe would name; `initialize` and `seed` may be among them.
            rate: times the default learning rate.
        """
        teacher, given = self.teacher, dict(settings)
        initialize, seed = given.pop("initialize", "weights"), given.pop("seed", 0)
        # The bound of random weights is the papers' alone.
        size = math.inf if initialize == "random" else teacher.weights_rms
        config = resolve(
            DistillConfig(evaluate_blocks=1, **given),
            ModelSize(shape, size),
            ModelSize(teacher.shape, teacher.weights_rms),
            block_tokens=BLOCK_TOKENS,
            train_tokens=self.corpus.train_tokens,
            repaired=repaired,
        )
        peak = (config.learning_rate or 0) * rate
        config = config.model_copy(update={"learning_rate": peak, "min_learning_rate": peak / 10})
        return replace(Schedule.of_student(config, BLOCK_TOKENS, seed), initialize=initialize)

    def distilled(self, pruned: Path, schedule: Schedule, out: Path) -> dict[str, float]:
        """Distil a student into the existing directory `out`, and measure it.

        What was stopped goes on where it was, from the directory `work` beside `out`; the seconds are of all its calls.
        """
        work = out.parent / f"{out.name}.work"
        spent, started = work / "seconds", time.monotonic()
        before = float(spent.read_text()) if spent.exists() else 0.0
        try:
            distill(Training(pruned, TeacherSource(self.teacher.path), self.corpus, schedule, work), out)
        finally:
            seconds = before + time.monotonic() - started
            work.mkdir(exist_ok=True)
            spent.write_text(str(seconds))
        row = {**self.measure(out), "seconds": seconds, "learning_rate": schedule.rates.peak}
        shutil.rmtree(work)
        return row

    def has(self, key: dict[str, Any]) -> bool:
        return any(row["key"] == key for row in self.rows)

    def record(self, row: dict[str, Any]) -> None:
        """Keep a run, whose `key` says what it was."""
        with self.runs.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)

    def source(self, schedule: Schedule, work: Path) -> tuple[TeacherSource, dict[str, float]]:
        """The teacher of the student, and what it took to record its logits, where they are recorded."""
        config = schedule.config
        if config.loss == "cross_entropy":
            return TeacherSource(), {}
        if config.teacher == "online":
            return TeacherSource(self.teacher.path), {}
        blocks, start = blocks_read(self.corpus, schedule), time.monotonic()
        (work / "lessons").mkdir()
        assert config.top_k
        dtype = compute_dtype("auto", pick_device())
        record_logits(
            self.teacher, Samples(torch.from_numpy(blocks)), Pass(dtype), work / "lessons", top_k=config.top_k
        )
        size = sum(file.stat().st_size for file in (work / "lessons").iterdir())
        seconds = time.monotonic() - start
        return TeacherSource(recording=work / "lessons"), {
            "recording_seconds": seconds,
            "lesson_bytes_a_token": size / blocks.size,
        }

    def cut(self, student: Shape, steps: list[Step], out: Path) -> None:
        samples, pass_ = draw_samples(self.corpus, self.samples, seed=0), Pass(compute_dtype("auto", pick_device()))
        statistics = self.statistics(samples, pass_)
        scores = activation_scores(statistics, self.teacher.shape, "mean", "l2")
        plan = choose(scores, self.teacher.shape, student)
        repaired_cut(self.teacher, plan, out, steps, Evidence(statistics, scores, samples), pass_)

    @cached_property
    def pruner(self) -> Pruner:
        """What makes students by the default settings."""
        steps = resolve_repair(RepairConfig(), self.teacher).steps or []
        drawn, pass_ = draw_samples(self.corpus, self.samples, seed=0), Pass(compute_dtype("auto", pick_device()))
        scoring = Scoring(PruneConfig(target="50%"), drawn, pass_, None)
        return Pruner(self.teacher, scoring, steps, self.statistics(drawn, pass_))

    def statistics(self, samples: Samples, pass_: Pass) -> Statistics:
        if not hasattr(self, "_statistics"):
            self._statistics = measure_statistics(self.teacher, samples, pass_, second_moment=True)
        return self._statistics

    @cached_property
    def model(self) -> Any:
        """The teacher in float32."""
        return load_model(self.teacher.path, torch.float32).to(pick_device())

    def measure(self, path: Path) -> dict[str, float]:
        """Held-out loss, KL to the teacher in nats and top-1 agreement, both models in float32."""
        return self.measured(load_model(path, torch.float32).to(pick_device()))

    def measured(self, model: Any) -> dict[str, float]:
        """The same for a model in memory."""
        quality = measure_quality(model, self.corpus.heldout.head(self.heldout_blocks), teacher=self.model)
        assert quality.kl_to_teacher is not None
        return {"loss": quality.lm_loss, "kl": quality.kl_to_teacher, "top1": quality.top1_agreement or 0.0}


def _corpus(teacher: Checkpoint, data: str, heldout: str | None, path: Path) -> Corpus:
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        partial.mkdir(exist_ok=True)
        config = DataConfig(source=data, heldout=heldout, block_tokens=BLOCK_TOKENS)
        tokenizer, vocab = load_tokenizer(teacher.path), teacher.shape.vocab
        prepare(config, tokenizer, vocab=vocab, block_tokens=BLOCK_TOKENS, out=partial)
        partial.rename(path)
    return open_corpus(path)
