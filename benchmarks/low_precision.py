"""Do bfloat16 weights teach as well as float32 ones? KL after equal tokens, bytes a parameter, and time a step.

    python benchmarks/low_precision.py --cache /tmp/low-precision [--model DIR --data train.jsonl --heldout valid.jsonl]
        [--budgets 0.25M,1M] [--rates 1,0.1] [--seeds 0,1] [--part 0/1] [--out FILE]

One student, cut to half of the teacher and repaired, is taught with its weights in each format, on the same blocks in
the same order, all with matrix products in bfloat16. `nearest` is what the other two improve upon: bfloat16 weights
that are rounded to the nearest. Rates are multiples of the default peak learning rate; a small model's is large beside
the distance of neighbouring bfloat16 numbers, and a large model's is not, so low rates show what is to come there.
Runs are kept in the cache, and beside the result file, so the same command goes on where it was stopped.
"""

import statistics
import tempfile
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

from minitron.distillation.config import DistillConfig
from minitron.distillation.optim import LOW_PRECISION, OptimizerOptions, hold_weights, make_optimizer
from minitron.distillation.optim.low_precision import BFloat16AdamW
from minitron.distillation.schedule import ModelSize, Schedule, num_steps, resolve
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import Training, distill
from minitron.model.checkpoint import load_model
from minitron.pruning.repair import BEST

NEAREST = "bfloat16_nearest"  # no setting of a recipe
LOW_PRECISION[NEAREST] = BFloat16AdamW
FORMATS = ("float32", NEAREST, "bfloat16_kahan", "bfloat16_stochastic")
TITLES = {
    "float32": "float32",
    NEAREST: "bfloat16, rounded to the nearest",
    "bfloat16_kahan": "bfloat16, Kahan summation",
    "bfloat16_stochastic": "bfloat16, stochastic rounding",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--budgets", default="0.25M,1M")
    parser.add_argument("--rates", default="1,0.1")
    parser.set_defaults(seeds="0,1")
    args = parser.parse_args()
    bench = opened(args)
    pruned = cut(bench)
    grid = product(integers(args.seeds), token_counts(args.budgets), numbers(args.rates), FORMATS)
    for seed, tokens, rate, weights in to_do(args, grid):
        key = {"weights": weights, "tokens": tokens, "rate": rate, "seed": seed}
        if not bench.has(key):
            bench.record({"key": key} | run(bench, pruned, **key))
    published(bench, report(bench, args.name, pruned), args)


def cut(bench: Bench) -> Path:
    """The repaired cut that every run starts from, made once."""
    pruned = bench.cache / "pruned"
    if not pruned.exists():
        with tempfile.TemporaryDirectory(dir=bench.cache) as path:
            partial = Path(path) / "pruned"
            partial.mkdir()
            bench.cut(bench.shape("width"), list(BEST), partial)
            partial.rename(pruned)
    return pruned


def run(bench: Bench, pruned: Path, weights: str, tokens: int, rate: float, seed: int) -> dict[str, Any]:
    weights_rms = bench.teacher.weights_rms
    config = resolve(
        DistillConfig(tokens=tokens, precision="bfloat16", optimizer="adamw"),
        ModelSize(bench.shape("width"), weights_rms),
        ModelSize(bench.teacher.shape, weights_rms),
        block_tokens=BLOCK_TOKENS,
        train_tokens=bench.corpus.train_tokens,
        repaired=True,
    )
    assert config.learning_rate and config.batch_blocks
    steps, peak = num_steps(tokens, config.batch_blocks, BLOCK_TOKENS), config.learning_rate * rate
    config = config.model_copy(
        update={
            "weights": weights,
            "learning_rate": peak,
            "min_learning_rate": peak / 10,
            "evaluate_steps": steps,
            "evaluate_blocks": 1,
            "checkpoint_steps": steps,
        }
    )
    with tempfile.TemporaryDirectory(dir=bench.cache) as path:
        work, out = Path(path), Path(path) / "student"
        out.mkdir()
        source, schedule = TeacherSource(bench.teacher.path), Schedule.of_student(config, BLOCK_TOKENS, seed)
        trained = distill(Training(pruned, source, bench.corpus, schedule, work / "distill"), out)
        return {
            "student": bench.measure(out),
            "learning_rate": peak,
            "steps": trained.steps,
            "seconds_per_step": trained.seconds / trained.steps,
        }


def bytes_per_parameter(pruned: Path, weights: Any) -> float:
    """Weights, gradients and what the optimizer holds after a step, but for its step counts."""
    model = load_model(pruned, torch.float32)
    hold_weights(model, weights)
    options = OptimizerOptions(weights, betas=(0.9, 0.95), weight_decay=0.1, dtype=torch.float32, seed=0)
    optimizer = make_optimizer({"student": [*model.parameters()]}, "adamw", options, vocabulary=[])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [value.nbytes for entries in optimizer.state.values() for name, value in entries.items() if name != "step"]
    held += [2 * parameter.nbytes for parameter in model.parameters()]
    return sum(held) / sum(parameter.numel() for parameter in model.parameters())


def report(bench: Bench, name: str, pruned: Path) -> str:
    rows = bench.rows
    cells_of = sorted({(row["key"]["rate"], row["key"]["tokens"]) for row in rows}, key=lambda at: (-at[0], at[1]))
    columns = ["weights and optimizer", "bytes a parameter", "time a step"]
    columns += [f"{tokens / 1e6:g}M tokens, {rate:g}x the rate" for rate, tokens in cells_of]
    cells = []
    for weights in FORMATS:
        own = [row for row in rows if row["key"]["weights"] == weights]
        if own:
            kls = [kl_cell(own, rate, tokens) for rate, tokens in cells_of]
            cells.append([TITLES[weights], f"{bytes_per_parameter(pruned, weights):.1f}", time_cell(rows, own), *kls])
    rates = sorted({row["learning_rate"] for row in rows}, reverse=True)
    return "\n".join(
        [
            header(f"bfloat16 weights: {name}"),
            f"Teacher {bench.teacher.shape}; student {bench.shape('width')}, a repaired cut, KL "
            f"{bench.measure(pruned)['kl']:.3f} before training. KL to the teacher in nats a token on "
            f"{bench.heldout_blocks} held-out blocks of {BLOCK_TOKENS}, as the mean over seeds with the least and the "
            "most. Matrix products "
            "are bfloat16 in all runs. Bytes: weights, gradients and optimizer state. Time: of a step with everything "
            "in it, over that of float32 in the run of the same tokens, rate and seed; the median with the least and "
            f"the most. Peak learning rates {', '.join(f'{rate:.2g}' for rate in rates)}.",
            "",
            table(columns, cells),
            "",
        ]
    )


def kl_cell(own: list[dict[str, Any]], rate: float, tokens: int) -> str:
    found = [row["student"]["kl"] for row in own if (row["key"]["rate"], row["key"]["tokens"]) == (rate, tokens)]
    if not found:
        return ""
    spread = f" [{min(found):.4f}, {max(found):.4f}]" if len(found) > 1 else ""
    return f"{statistics.mean(found):.4f}{spread}"


def time_cell(rows: list[dict[str, Any]], own: list[dict[str, Any]]) -> str:
    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row["key"][name] for name in ("tokens", "rate", "seed"))

    float32 = {place(row): row["seconds_per_step"] for row in rows if row["key"]["weights"] == "float32"}
    ratios = [row["seconds_per_step"] / float32[place(row)] for row in own if place(row) in float32]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]" if ratios else ""


if __name__ == "__main__":
    main()
