"""What is a repaired cut worth, right after it and after distillation? Starts against the plain cut and random weights.

    python benchmarks/repair.py --cache /tmp/repair [--model DIR --data train.jsonl --heldout valid.jsonl]
        [--shapes width,depth,both] [--starts plain,basis,'plain: intermediate=off',...]
        [--budgets 0.25M,0.5M,1M,2M] [--seeds 0,1] [--out FILE]

Every (start, budget, learning rate, seed) is a training run of its own, with its own full schedule: a shorter budget is
no point on a longer curve. Each start gets the best of its learning rates, multiples of the most that a default is. A
start may be followed by changes of the distillation. Runs are kept
in the cache, and beside the result file, so the same command goes on where it was stopped, several can share one cache
(--part 0/2, --part 1/2), and the table is of what there is. The default model is the shipped demo teacher with the
built-in corpus.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from measure import header, publish, table

from minitron.cli import keep_freed_memory
from minitron.data import Corpus, DataConfig, batch_rows, open_corpus, prepare
from minitron.demo import HERE as DEMO
from minitron.device import compute_dtype, pick_device
from minitron.distill import settings, train
from minitron.distill.lessons import write_lessons
from minitron.distill.train import blocks_read
from minitron.evaluate.quality import evaluate
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from minitron.prune.calibrate import Statistics, calibrate
from minitron.prune.importance import activation_scores
from minitron.prune.plan import PruneConfig, choose, target_shape
from minitron.prune.repair import BEST, Step, repaired_cut

STARTS: dict[str, list[Step]] = {
    "plain": [],
    "norm_gain": ["norm_gain"],
    "basis": ["basis"],
    "ffn_least_squares": ["ffn_least_squares"],
    "ffn_obs": ["ffn_obs"],
    "heads_least_squares": ["heads_least_squares"],
    "heads_obs": ["heads_obs"],
    "residual_heads": ["residual_heads"],
    "refit": ["refit"],
    "basis + ffn_obs": ["basis", "ffn_obs"],
    "basis + ffn_obs + refit": ["basis", "ffn_obs", "refit"],
    "best": list(BEST),
    "scratch": [],
}
RATES = (0.5, 1.0, 2.0)  # times the most that a default is
KEY = ("shape", "start", "tokens", "rate", "seed")  # of every run; what else a run's key has are its changes
BLOCK_TOKENS, SAMPLES, HELDOUT_BLOCKS = 256, 256, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "demo-teacher")
    parser.add_argument("--name", default="the demo teacher", help="what the result file calls the model")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--heldout")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--shapes", default="width")
    parser.add_argument("--starts", default="plain,basis,ffn_obs,basis + ffn_obs,scratch")
    parser.add_argument("--budgets", default="0.25M,0.5M,1M,2M")
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--part", default="0/1", help="I/N: do every Nth run, from the Ith")
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    keep_freed_memory()
    args.cache.mkdir(parents=True, exist_ok=True)
    kept = args.out and args.out.with_suffix(".jsonl")
    if kept and kept.exists() and not (args.cache / "runs.jsonl").exists():
        shutil.copy(kept, args.cache / "runs.jsonl")
    bench = Bench(args.model, args.data, args.heldout, args.cache)
    part, parts = map(int, args.part.split("/"))
    budgets = [round(float(text.removesuffix("M")) * 1e6) for text in args.budgets.split(",")]
    grid = product(
        map(int, args.seeds.split(",")),
        budgets,
        map(float, args.rates.split(",")),
        args.shapes.split(","),
        args.starts.split(","),
    )
    for number, (seed, tokens, rate, shape, start) in enumerate(grid):
        if number % parts == part and not args.only_table:
            name, changes = variant(start)
            bench.run(shape, name, tokens, rate, seed, **changes)
    publish(report(bench, args.name), args.out)
    if kept:
        shutil.copy(bench.runs, kept)


def variant(text: str) -> tuple[str, dict[str, Any]]:
    """A start, and changes of the distillation: `best: teacher=recorded top_k=8`."""
    start, _, changes = text.partition(":")
    pairs = (change.split("=") for change in changes.split())
    return start, {key: int(value) if value.isdigit() else value for key, value in pairs}


def label(key: dict[str, Any]) -> str:
    """What `variant` was made from."""
    changes = " ".join(f"{name}={value}" for name, value in key.items() if name not in KEY)
    return f"{key['start']}: {changes}" if changes else key["start"]


class Bench:
    """A teacher, its text, and the runs that were made with them."""

    def __init__(self, model: Path, data: str, heldout: str | None, cache: Path):
        self.teacher = open_checkpoint(model)
        self.cache, self.runs = cache, cache / "runs.jsonl"
        self.corpus = _corpus(self.teacher, data, heldout, cache / "data")
        self.rows = [json.loads(line) for line in self.runs.read_text().splitlines()] if self.runs.exists() else []

    def shape(self, kind: str) -> Shape:
        """About half of the non-embedding parameters: less width, fewer layers, or some of both."""
        table, config, shape = self.teacher.architecture, self.teacher.config, self.teacher.shape
        if kind == "width":
            return target_shape(table, config, shape, PruneConfig(target="50%"))
        if kind == "depth":
            return replace(shape, layers=-(-shape.layers // 2))
        fewer = replace(shape, layers=shape.layers - max(1, shape.layers // 5))
        share = 50 * table.count(shape, config).non_embedding / table.count(fewer, config).non_embedding
        return target_shape(table, config, fewer, PruneConfig(target=f"{share}%"))

    def run(self, shape: str, start: str, tokens: int, rate: float, seed: int, **changes: Any) -> None:
        """One student, unless the cache has it.

        Args:
            rate: times the default of a plain cut, without regard to the size of the weights.
            changes: of the distillation.
        """
        key = {"shape": shape, "start": start, "tokens": tokens, "rate": rate, "seed": seed, **changes}
        if any(row["key"] == key for row in self.rows):
            return
        student = self.shape(shape)
        loss = {"loss": "cross_entropy"} if start == "scratch" else {}
        config = settings.resolve(
            settings.DistillConfig(tokens=tokens, **loss, **changes),
            student,
            self.teacher.shape,
            weights_rms=math.inf,
            block_tokens=BLOCK_TOKENS,
            train_tokens=self.corpus.train_tokens,
        )
        steps = settings.num_steps(tokens, config.batch_blocks or 1, BLOCK_TOKENS)
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
            guide, recorded = self.guide(config, seed, work)
            trained = train.distill(
                pruned,
                guide,
                self.corpus,
                config,
                seed=seed,
                work=work / "distill",
                out=out,
                initialize="random" if start == "scratch" else "weights",
            )
            row = {
                "key": key,
                "cut": None if start == "scratch" else self.measure(pruned),
                "student": self.measure(out),
                "learning_rate": peak,
                "seconds": trained.seconds,
                **recorded,
            }
        with self.runs.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    def guide(self, config: settings.DistillConfig, seed: int, work: Path) -> tuple[Path | None, dict[str, float]]:
        """What the student learns from, and what it took to record it, where it is recorded."""
        if config.loss == "cross_entropy":
            return None, {}
        if config.teacher == "online":
            return self.teacher.path, {}
        blocks, start = blocks_read(self.corpus, config, seed), time.monotonic()
        (work / "lessons").mkdir()
        assert config.top_k
        dtype = compute_dtype("auto", pick_device())
        write_lessons(self.teacher, blocks, work / "lessons", top_k=config.top_k, dtype=dtype)
        size = sum(file.stat().st_size for file in (work / "lessons").iterdir())
        seconds = time.monotonic() - start
        return work / "lessons", {"recording_seconds": seconds, "lesson_bytes_a_token": size / blocks.size}

    def cut(self, student: Shape, steps: list[Step], out: Path) -> None:
        rows = batch_rows(len(self.corpus.train), seed=0, step=0, batch=min(SAMPLES, len(self.corpus.train)))
        tokens = torch.from_numpy(self.corpus.train.select(rows))
        dtype = compute_dtype("auto", pick_device())
        statistics = self.statistics(tokens, dtype)
        scores = activation_scores(statistics, self.teacher.shape, "mean", "l2")
        plan = choose(scores, self.teacher.shape, student)
        repaired_cut(
            self.teacher, plan, out, steps=steps, statistics=statistics, scores=scores, tokens=tokens, dtype=dtype
        )

    def statistics(self, tokens: torch.Tensor, dtype: torch.dtype) -> Statistics:
        if not hasattr(self, "_statistics"):
            self._statistics = calibrate(self.teacher, tokens, dtype=dtype, second_moment=True)
        return self._statistics

    def measure(self, path: Path) -> dict[str, float]:
        """Held-out loss and KL to the teacher, in nats, both models in float32."""
        device = pick_device()
        if not hasattr(self, "_model"):
            self._model = load_model(self.teacher.path, torch.float32).to(device)
        model = load_model(path, torch.float32).to(device)
        quality = evaluate(model, self.corpus.heldout.head(HELDOUT_BLOCKS), teacher=self._model)
        assert quality.kl_to_teacher is not None
        return {"loss": quality.lm_loss, "kl": quality.kl_to_teacher}


def _corpus(teacher: Checkpoint, data: str, heldout: str | None, path: Path) -> Corpus:
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        partial.mkdir(exist_ok=True)
        config = DataConfig(source=data, heldout=heldout, block_tokens=BLOCK_TOKENS)
        tokenizer, vocab = load_tokenizer(teacher.path), teacher.shape.vocab
        prepare(config, tokenizer, vocab=vocab, block_tokens=BLOCK_TOKENS, out=partial)
        partial.rename(path)
    return open_corpus(path)


def report(bench: Bench, name: str) -> str:
    lines = [
        header(f"Repair at the cut: {name}"),
        f"Teacher {bench.teacher.shape}, {bench.teacher.parameters.non_embedding:,} non-embedding parameters; "
        f"{bench.corpus.train_tokens:,} training tokens, read again where a budget is larger. KL to the teacher in "
        f"nats a token on {HELDOUT_BLOCKS} held-out blocks of {BLOCK_TOKENS}. Each cell is a run of its own with its "
        "own schedule, at the best of the learning rates that were tried, in multiples of 0.4 / hidden at a batch of "
        "2048 tokens, less by the square root at a smaller one; the rate and the number of rates tried stand behind "
        "it. With two seeds the cell is their mean, and their range is given.",
        "",
    ]
    for shape in dict.fromkeys(row["key"]["shape"] for row in bench.rows):
        lines += _shape_lines(bench, shape)
    return "\n".join(lines)


def _shape_lines(bench: Bench, shape: str) -> list[str]:
    student = bench.shape(shape)
    count = bench.teacher.architecture.count(student, bench.teacher.config)
    share = count.non_embedding / bench.teacher.parameters.non_embedding
    rows = [row for row in bench.rows if row["key"]["shape"] == shape]
    budgets = sorted({row["key"]["tokens"] for row in rows})
    cells, best = [], {}
    for start in sorted(
        {label(row["key"]) for row in rows}, key=lambda name: ([*STARTS].index(variant(name)[0]), name)
    ):
        own = [row for row in rows if label(row["key"]) == start]
        cut = own[0]["cut"]
        best[start] = {tokens: found for tokens in budgets if (found := _best(own, tokens))}
        cells.append(
            [start, f"{cut['kl']:.3f}" if cut else "", *(_cell(best[start].get(tokens)) for tokens in budgets)]
        )
    columns = ["start", "right after the cut", *(f"{tokens / 1e6:g}M tokens" for tokens in budgets)]
    lines = [
        f"## {shape.capitalize()}: {', '.join(f'{dim} {size}' for dim, size in asdict(student).items())}",
        "",
        f"{count.non_embedding:,} non-embedding parameters, {share:.1%} of the teacher's.",
        "",
        table(columns, cells),
        "",
    ]
    return lines + _saving_lines(best, rows)


def _best(rows: list[dict[str, Any]], tokens: int) -> dict[str, Any] | None:
    """The learning rate of the lowest KL at this budget, a mean over seeds where they are the same for all rates."""
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        if row["key"]["tokens"] == tokens:
            by_rate.setdefault(row["key"]["rate"], []).append(row["student"]["kl"])
    if not by_rate:
        return None
    rate = min(by_rate, key=lambda rate: by_rate[rate][0])
    return {"kl": statistics.mean(by_rate[rate]), "all": by_rate[rate], "rate": rate, "rates": len(by_rate)}


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    spread = f" [{min(found['all']):.3f}, {max(found['all']):.3f}]" if len(found["all"]) > 1 else ""
    return f"{found['kl']:.3f}{spread} ({found['rate']:g}x of {found['rates']})"


def _saving_lines(best: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Tokens to reach the plain start's KL, by interpolating a start's own budgets in the logarithm of both."""
    if "plain" not in best:
        return []
    cells = []
    for start, by_tokens in best.items():
        if start == "plain" or start.startswith("scratch"):
            continue
        cut = next(row["cut"]["kl"] for row in rows if label(row["key"]) == start)
        plain_cut = next(row["cut"]["kl"] for row in rows if row["key"]["start"] == "plain")
        ratios = []
        for tokens, plain in best["plain"].items():
            reached = tokens_to_reach(plain["kl"], {n: found["kl"] for n, found in by_tokens.items()})
            least = min(by_tokens)
            sooner = by_tokens[least]["kl"] < plain["kl"]  # at the smallest budget that was tried
            ratios.append(f"< {least / tokens:.2f}" if sooner else f"{reached / tokens:.2f}" if reached else "")
        cells.append([start, f"{cut / plain_cut:.2f}", *ratios])
    columns = ["start", "KL after the cut / plain", *(f"tokens / {n / 1e6:g}M of plain" for n in best["plain"])]
    return [table(columns, cells), ""]


def tokens_to_reach(kl: float, budgets: dict[int, float]) -> float | None:
    points = sorted(budgets.items())
    for (less, high), (more, low) in pairwise(points):
        if high >= kl >= low and high > low:
            logs = torch.tensor([less, more, high, kl, low], dtype=torch.float64).log().tolist()
            return float(torch.tensor(logs[0] + (logs[1] - logs[0]) * (logs[2] - logs[3]) / (logs[2] - logs[4])).exp())
    return None


if __name__ == "__main__":
    main()
