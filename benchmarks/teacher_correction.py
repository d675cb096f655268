"""What is it worth to correct a teacher of one text that is distilled on another? Not at all, before, in parallel.

    python benchmarks/teacher_correction.py --cache /tmp/correction --data train.jsonl --heldout valid.jsonl
        [--model DIR] [--shape width] [--corrections none,before,parallel] [--budgets 0.25M,0.5M,1M] [--rates 0.5,1,2,5]
        [--seeds 0,1] [--out FILE]

Every (correction, budget, rate, seed) is a whole run of its own: correction, calibration, the default cut with its
repair, distillation. Rates are of the correction, as multiples of its default. Runs are kept in the cache, and beside
the result file, so the same command goes on where it was stopped, several can share one cache (--part 0/2, --part 1/2),
and the table is of what there is. The default model is the shipped demo teacher, whose text is Python's own library.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lib.distillations import (
    BLOCK_TOKENS,
    Bench,
    arguments,
    integers,
    numbers,
    opened,
    published,
    to_do,
    token_counts,
)
from lib.measure import header, table

from minitron.core.device import pick_device
from minitron.distillation.config import DistillConfig
from minitron.distillation.schedule import ModelSize, Schedule, resolve
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import CORRECTED, Training, distill
from minitron.evaluation.quality import measure_quality
from minitron.model.checkpoint import load_model
from minitron.pruning.repair import BEST

CORRECTIONS = ("none", "before", "parallel")


def main() -> None:
    parser = arguments(__doc__, data=None)
    parser.add_argument("--text", default="a text of another kind", help="what the result file calls the data")
    parser.add_argument("--shape", default="width", choices=["width", "depth", "both"])
    parser.add_argument("--corrections", default=",".join(CORRECTIONS))
    parser.add_argument("--budgets", default="0.25M,0.5M,1M", help="tokens of the student")
    parser.add_argument("--rates", default="1", help="of the correction, times its default")
    args = parser.parse_args()
    bench = opened(args)
    rates = numbers(args.rates)
    grid = product(integers(args.seeds), token_counts(args.budgets), args.corrections.split(","), rates)
    for seed, tokens, correction, rate in to_do(args, grid):
        if correction != "none" or rate == rates[0]:
            run(bench, args.shape, correction, tokens, 0.0 if correction == "none" else rate, seed)
    published(bench, report(bench, args), args)


def run(bench: Bench, shape: str, correction: str, tokens: int, rate: float, seed: int) -> None:
    """One student, unless the cache has it."""
    key = {"shape": shape, "correction": correction, "tokens": tokens, "rate": rate, "seed": seed}
    if bench.has(key):
        return
    config = settled(bench, shape, correction, tokens, rate)
    with tempfile.TemporaryDirectory(dir=bench.cache) as path:
        work, cut_from, teacher, seconds = Path(path), bench, bench.teacher.path, 0.0
        pruned, out, corrected = (work / name for name in ("pruned", "student", CORRECTED))
        for directory in (pruned, out, corrected):
            directory.mkdir()
        if correction == "before":
            own = Schedule.of_correction(config, BLOCK_TOKENS, seed)
            made = distill(Training(teacher, TeacherSource(), bench.corpus, own, work / "own"), corrected)
            cut_from, teacher, seconds = (
                Bench(corrected, "cached", None, bench.cache, heldout_blocks=bench.heldout_blocks),
                corrected,
                made.seconds,
            )
        cut_from.cut(bench.shape(shape), list(BEST), pruned)
        schedule = Schedule.of_student(config, BLOCK_TOKENS, seed)
        made = distill(Training(pruned, TeacherSource(teacher), bench.corpus, schedule, work / "distill"), out)
        teacher = work / "distill" / CORRECTED if correction == "parallel" else teacher
        row = {
            "key": key,
            "correction_tokens": config.correction_tokens,
            "correction_learning_rate": config.correction_learning_rate,
            "learning_rate": config.learning_rate,
            "teacher": bench.measure(teacher),
            "cut": bench.measure(pruned),
            "student": bench.measure(out) | {"kl_to_its_teacher": kl(bench, out, teacher)},
            "seconds": seconds + made.seconds,
        }
    bench.record(row)


def settled(bench: Bench, shape: str, correction: str, tokens: int, rate: float) -> DistillConfig:
    """Everything by the default rules, which see the teacher as it was given; the correction's rate times `rate`."""
    config = DistillConfig(tokens=tokens, correction=None if correction == "none" else correction, evaluate_blocks=1)
    weights_rms = bench.teacher.weights_rms
    config = resolve(
        config,
        ModelSize(bench.shape(shape), weights_rms),
        ModelSize(bench.teacher.shape, weights_rms),
        block_tokens=BLOCK_TOKENS,
        train_tokens=bench.corpus.train_tokens,
        repaired=True,
    )
    if config.correction_learning_rate is None:
        return config
    return config.model_copy(update={"correction_learning_rate": rate * config.correction_learning_rate})


def kl(bench: Bench, student: Path, teacher: Path) -> float:
    device = pick_device()
    models = [load_model(path, torch.float32).to(device) for path in (student, teacher)]
    found = measure_quality(models[0], bench.corpus.heldout.head(bench.heldout_blocks), teacher=models[1]).kl_to_teacher
    assert found is not None
    return found


def report(bench: Bench, args: argparse.Namespace) -> str:
    rows = [row for row in bench.rows if row["key"]["shape"] == args.shape]
    student, before = bench.shape(args.shape), bench.measure(bench.teacher.path)
    count = bench.teacher.architecture.count(student, bench.teacher.config)
    share = count.non_embedding / bench.teacher.parameters.non_embedding
    lines = [
        header(f"Teacher correction: {args.name} on {args.text}"),
        f"Teacher {bench.teacher.shape}, held-out loss {before['loss']:.3f}; student {student}, {share:.1%} of the "
        f"non-embedding parameters, cut with the default repair. {bench.corpus.train_tokens:,} training tokens, read "
        "again where a budget is larger; a teacher is trained on one pass at most. Loss and KL in nats a token on "
        f"{bench.heldout_blocks} "
        f"held-out blocks of {BLOCK_TOKENS}; KL of teachers and students is to the teacher as it was "
        "given, and the last but one to the teacher that the student learnt from. The rate is a multiple of the "
        "default of the correction. With more than one seed a cell is their mean, and their range is given. Seconds "
        "are those of training.",
        "",
    ]
    for tokens in sorted({row["key"]["tokens"] for row in rows}):
        here = [row for row in rows if row["key"]["tokens"] == tokens]
        lines += [f"## {tokens / 1e6:g}M tokens", "", _table(here), ""]
    return "\n".join(lines)


COLUMNS: dict[str, Callable[[dict[str, Any]], float]] = {
    "teacher's loss": lambda row: row["teacher"]["loss"],
    "teacher's KL": lambda row: row["teacher"]["kl"],
    "loss after the cut": lambda row: row["cut"]["loss"],
    "student's loss": lambda row: row["student"]["loss"],
    "student's KL": lambda row: row["student"]["kl"],
    "to its teacher": lambda row: row["student"]["kl_to_its_teacher"],
}


def _table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for correction, rate in sorted(
        {(row["key"]["correction"], row["key"]["rate"]) for row in rows},
        key=lambda found: (CORRECTIONS.index(found[0]), found[1]),
    ):
        own = [row for row in rows if (row["key"]["correction"], row["key"]["rate"]) == (correction, rate)]
        first = own[0]
        tokens = f"{first['correction_tokens'] / 1e6:.2g}M" if first["correction_tokens"] else ""
        learning_rate = f"{first['correction_learning_rate']:.2g} ({rate:g}x)" if rate else ""
        values = [_cell([value(row) for row in own]) for value in COLUMNS.values()]
        seconds = f"{statistics.mean(row['seconds'] for row in own):.0f}"
        cells.append([correction, tokens, learning_rate, *values, seconds])
    return table(["correction", "its tokens", "its rate", *COLUMNS, "seconds"], cells)


def _cell(values: list[float]) -> str:
    spread = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
