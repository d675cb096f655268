"""How many tokens does pruning save? Held-out loss against tokens, from scratch and from a teacher.

    python benchmarks/token_efficiency.py --cache /tmp/efficiency [--model DIR --data train.jsonl --heldout valid.jsonl]
        [--budgets 0.25M,0.5M,1M] [--scratch-budgets 0.5M,1M,2M,4M] [--starts scratch,plain,...] [--rates 0.5,1,2]
        [--only-table] [--out FILE]

Four students of one shape: random weights on text, the plain cut on text, the plain cut and the repaired one on the
teacher's logits. Every (start, budget, rate) is a run of its own with its own schedule, kept in the cache and beside
the result file; each cell is the best of the rates tried. The tokens that a start needs to come down to a scratch run's
loss are interpolated in the logarithms between its own budgets, and given as a bound where the smallest is below.
"""

import argparse
from dataclasses import dataclass
from itertools import product
from typing import Any

from lib.distillations import (
    BLOCK_TOKENS,
    Bench,
    arguments,
    integers,
    label,
    numbers,
    opened,
    published,
    to_do,
    token_counts,
    variant,
)
from lib.measure import header, table
from repair import best_rate, cell, tokens_to_reach

from minitron.model.describe import forward_flops

# Training operations of P1's family, teacher first, in units of its own: 15B, 8B and 4B on as many tokens each.
FAMILY = (4.4, 2.5, 1.2)
STARTS = ("scratch", "plain: loss=cross_entropy", "plain", "best")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="width")
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--budgets", default="0.25M,0.5M,1M")
    parser.add_argument("--scratch-budgets", default="0.5M,1M,2M,4M")
    parser.add_argument("--rates", default="0.5,1,2")
    args = parser.parse_args()
    bench = opened(args)
    grid = (
        (seed, text, rate, tokens)
        for seed, text, rate in product(integers(args.seeds), args.starts.split(","), numbers(args.rates))
        for tokens in token_counts(args.scratch_budgets if variant(text)[0] == "scratch" else args.budgets)
    )
    for seed, text, rate, tokens in to_do(args, grid):
        start, changes = variant(text)
        bench.run(args.shape, start, tokens, rate, seed, **changes)
    published(bench, report(bench, args), args)


def report(bench: Bench, args: argparse.Namespace) -> str:
    student = bench.shape(args.shape)
    count = bench.teacher.architecture.count(student, bench.teacher.config)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in bench.rows:
        if row["key"]["shape"] == args.shape:
            rows.setdefault(label(row["key"]), []).append(row)
    budgets = sorted({row["key"]["tokens"] for own in rows.values() for row in own})
    found = {
        name: {tokens: best for tokens in budgets if (best := best_rate(own, tokens, "loss"))}
        for name, own in rows.items()
    }
    losses = {name: {tokens: best["mean"] for tokens, best in each.items()} for name, each in found.items()}
    names = [name for start in STARTS for name in (start, with_adamw(start)) if name in found]
    others = [name for name in names if not name.startswith("scratch")]
    cells = [
        [f"{tokens / 1e6:g}M ({tokens / count.total:.1f})", *(cell(found[name].get(tokens)) for name in names)]
        for tokens in budgets
    ]
    lines = [
        header(f"Tokens that pruning saves: {args.name}"),
        f"Teacher {bench.teacher.shape}; student {student}, {count.total:,} parameters, {count.non_embedding:,} "
        f"without embeddings. {bench.corpus.train_tokens:,} training tokens, read again where a budget is larger. "
        f"Held-out loss in nats a token on {bench.heldout_blocks} "
        f"blocks of {BLOCK_TOKENS}; each cell is a run of its own, "
        "at the best of its learning rates, with two seeds their mean and range. Tokens (and tokens a parameter of the "
        "student) down the side.",
        "",
        table(["tokens", *names], cells),
        "",
    ]
    if others == names:
        return "\n".join(lines)
    forward = {
        "teacher": forward_flops(bench.teacher.shape, bench.teacher.parameters, BLOCK_TOKENS),
        "student": forward_flops(student, count, BLOCK_TOKENS),
    }
    saved = [
        [
            [scratch, f"{tokens / 1e6:g}M", f"{tokens / count.total:.1f}", f"{loss:.3f}"],
            [_saved(tokens, loss, losses[name], name, forward) for name in others],
        ]
        for scratch in names
        if scratch not in others
        for tokens, loss in sorted(losses[scratch].items())
    ]
    columns = ["from scratch", "tokens", "tokens a parameter", "its loss", *others]
    lines += [
        "Tokens from scratch for each token of another start, to the same loss, and in brackets the same of operations "
        "(three forward passes of the student for a step, and one of the teacher where it is asked):",
        "",
        table(
            columns,
            [[*row, *(f"{one} ({one.bound}{one.operations:.1f})" for one in each)] for row, each in saved],
        ),
        "",
        "P1's family of 15B, 8B and 4B takes 1.8 times fewer operations where both students take a fortieth of what "
        "they took from scratch; with the ratios of operations above in place of 40:",
        "",
        table(columns, [[*row, *(f"{one.bound}{one.of_family:.2f}" for one in each)] for row, each in saved]),
        "",
    ]
    return "\n".join(lines)


def with_adamw(start: str) -> str:
    """What `label` calls a start whose runs were made with AdamW."""
    name, changes = variant(start)
    return label({"start": name, **changes, "optimizer": "adamw"})


@dataclass(frozen=True)
class _Saved:
    """What a run from scratch takes, over what another start takes to its loss."""

    tokens: float
    operations: float
    bound: str  # before the numbers: nothing, or what is known of them

    def __str__(self) -> str:
        return f"{self.bound}{self.tokens:.1f}"

    @property
    def of_family(self) -> float:
        """The same for P1's family, of operations."""
        teacher, *students = FAMILY
        return sum(FAMILY) / (teacher + sum(students) / self.operations)


def _saved(tokens: int, loss: float, own: dict[int, float], name: str, forward: dict[str, float]) -> _Saved:
    reached = tokens_to_reach(loss, own)
    bound = "" if reached else ">= " if own[min(own)] < loss else "< "
    reached = reached or (min(own) if own[min(own)] < loss else max(own))
    step = 3 * forward["student"] + (0 if "cross_entropy" in name else forward["teacher"])
    return _Saved(tokens / reached, tokens * 3 * forward["student"] / (reached * step), bound)


if __name__ == "__main__":
    main()
