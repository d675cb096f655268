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

import statistics
from dataclasses import asdict
from itertools import pairwise, product
from typing import Any

import torch
from lib.distillations import (
    BLOCK_TOKENS,
    STARTS,
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

RATES = (0.5, 1.0, 2.0)  # times the most that a default is


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", default="width")
    parser.add_argument("--starts", default="plain,basis,ffn_obs,basis + ffn_obs,scratch")
    parser.add_argument("--budgets", default="0.25M,0.5M,1M,2M")
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    args = parser.parse_args()
    bench = opened(args)
    grid = product(
        integers(args.seeds),
        token_counts(args.budgets),
        numbers(args.rates),
        args.shapes.split(","),
        args.starts.split(","),
    )
    for seed, tokens, rate, shape, start in to_do(args, grid):
        name, changes = variant(start)
        bench.run(shape, name, tokens, rate, seed, **changes)
    published(bench, report(bench, args.name), args)


def report(bench: Bench, name: str) -> str:
    lines = [
        header(f"Repair at the cut: {name}"),
        f"Teacher {bench.teacher.shape}, {bench.teacher.parameters.non_embedding:,} non-embedding parameters; "
        f"{bench.corpus.train_tokens:,} training tokens, read again where a budget is larger. KL to the teacher in "
        f"nats a token on {bench.heldout_blocks} "
        f"held-out blocks of {BLOCK_TOKENS}. Each cell is a run of its own with its "
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
        best[start] = {tokens: found for tokens in budgets if (found := best_rate(own, tokens, "kl"))}
        cells.append([start, f"{cut['kl']:.3f}" if cut else "", *(cell(best[start].get(tokens)) for tokens in budgets)])
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


def best_rate(rows: list[dict[str, Any]], tokens: int, measure: str) -> dict[str, Any] | None:
    """Of runs of one start, those with the learning rate that is best at this budget with the first seed.

    Args:
        measure: `kl` or `loss`, which is given as a mean over seeds (`mean`) and of each of them (`all`).
    """
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        if row["key"]["tokens"] == tokens:
            by_rate.setdefault(row["key"]["rate"], []).append(row["student"][measure])
    if not by_rate:
        return None
    rate = min(by_rate, key=lambda rate: by_rate[rate][0])
    return {"mean": statistics.mean(by_rate[rate]), "all": by_rate[rate], "rate": rate, "rates": len(by_rate)}


def cell(found: dict[str, Any] | None) -> str:
    """What `best_rate` found: the mean, the seeds' range and the rate."""
    if found is None:
        return ""
    spread = f" [{min(found['all']):.3f}, {max(found['all']):.3f}]" if len(found["all"]) > 1 else ""
    return f"{found['mean']:.3f}{spread} ({found['rate']:g}x of {found['rates']})"


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
            reached = tokens_to_reach(plain["mean"], {n: found["mean"] for n, found in by_tokens.items()})
            least = min(by_tokens)
            sooner = by_tokens[least]["mean"] < plain["mean"]  # at the smallest budget that was tried
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
