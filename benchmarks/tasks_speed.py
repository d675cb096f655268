"""How long do benchmarks take beside lm-evaluation-harness's own model class on the same items, and are they equal?

    python benchmarks/tasks_speed.py --model DIR_OR_GGUF --rows DIR [--tasks NAME:ITEMS ...] [--rounds N] [--out FILE]
    python benchmarks/tasks_speed.py --model DIR_OR_GGUF --rows DIR --equal [--tasks NAME:200 ...] [--out FILE]

--rows is a directory for --tasks-dir. ITEMS are those of a task, or of each subject of MMLU; 8 by default. Both sides
hold the same model in memory and run the same task of the harness; only the class that answers its requests differs.
The harness's class runs with each batch of --batches, and is compared by the fastest. Sides take turns in each round.
The time is of the whole task: prompts, tokens and metrics included. The share of tokens is that of the positions that
go through the model, padding included, of those of the harness's class: the ratio of time that sharing alone gives.
Before the first round each side answers one item of each task or subject.

In bfloat16 two orders of the same sums differ by much more than in float32, and a greedy text may go another way then:
--dtype float32 shows whether items are equal. The harness's own batches are compared with each other as well.

--equal runs each side once and lists every item whose answer differs, with both values. It compares with one batch of
the harness's own class, the first of --batches.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lib.measure import header, publish, table
from lm_eval.models.huggingface import HFLM
from transformers.utils.logging import set_verbosity_error

from minitron.evaluation.tasks import harness
from minitron.evaluation.tasks.definitions import version
from minitron.evaluation.tasks.in_memory import InMemory
from minitron.evaluation.tasks.measure import TaskOptions, plan_tasks
from minitron.gguf.source import model_directory
from minitron.model.checkpoint import load_model, load_tokenizer

TASKS = ("hellaswag", "arc_challenge", "winogrande", "mmlu", "gsm8k")
Items = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), metavar="NAME[:ITEMS]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help="of the harness's own class")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default that of the checkpoint")
    parser.add_argument("--equal", action="store_true", help="one round without times, and the items that differ")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.equal:
        args.rounds, args.batches = 1, args.batches[:1]
    set_verbosity_error()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    directory = model_directory(args.model)
    with harness.quietly():
        model, tokenizer = load_model(directory, dtype), load_tokenizer(directory)
        sides = {"ours": InMemory(model, tokenizer)} | {
            f"batch {batch}": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch) for batch in args.batches
        }
    counted = _count_tokens(model)
    found = [measured(*_name_and_items(name), sides, counted, args) for name in args.tasks]
    rows, differing = [row for row, _ in found], [line for _, lines in found for line in lines]
    columns = ["task", "shots", "items", "ours, s", "harness, s (its batch)", "ratio", "share of tokens"]
    columns += ["same answers", "largest gap, nats", "the harness's own gap"]
    batches, dtype_name = " and ".join(map(str, args.batches)), str(model.dtype).removeprefix("torch.")
    text = f"""{header("The time of benchmarks beside the harness's own class")}
lm_eval {version()}; the model of `{Path(args.model).name}` in {dtype_name}, {args.rounds} rounds. Seconds and
ratios are medians, with the lowest and highest ratio of a round. Tokens are the positions that go through the model,
padding included. A gap is the largest difference of an answer's log-likelihood in nats; the harness's own is between
its batches of {batches}. An answer is the choice of an item, or its whole generated text.

{table(columns, rows)}

Items whose answers differ between our class and batches of {args.batches[0]}: {len(differing)}
{"".join(differing) if args.equal else ""}"""
    publish(text, args.out)


def _name_and_items(task: str) -> tuple[str, int]:
    name, _, items = task.partition(":")
    return name, int(items or 8)


def _count_tokens(model: Any) -> list[int]:
    """Return a list to which each forward call of the model adds its number of positions."""
    counted: list[int] = []

    def count(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        counted.append((args[0] if args else named["input_ids"]).numel())

    model.register_forward_pre_hook(count, with_kwargs=True)
    return counted


def measured(
    name: str, limit: int, sides: dict[str, Any], counted: list[int], args: argparse.Namespace
) -> tuple[list[str], list[str]]:
    """A row of the table, and a line for each item that differs."""
    plan = plan_tasks([name], args.rows, TaskOptions())
    task = harness.load_task(plan.benchmarks[0], plan.local[plan.benchmarks[0].task])
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    items: dict[str, Items] = {}
    tokens: dict[str, int] = {}
    shots = 0
    if not args.equal:
        for model in sides.values():
            harness.run_task(task, model, limit=1)
    for number in range(args.rounds):
        for side, model in list(sides.items())[:: 1 if number % 2 == 0 else -1]:
            counted.clear()
            started = time.perf_counter()
            result, samples = harness.run_task(task, model, limit=limit, samples=True)
            seconds[side].append(time.perf_counter() - started)
            tokens[side] = sum(counted)
            items[side], shots = [item for member in samples.values() for item in member], result.shots
    peers = [side for side in sides if side != "ours"]
    best = min(peers, key=lambda side: statistics.median(seconds[side]))
    ratios = [own / other for own, other in zip(seconds["ours"], seconds[best], strict=True)]
    same = sum(map(_same, items["ours"], items[peers[0]]))
    own_same = sum(map(_same, items[peers[-1]], items[peers[0]]))
    row = [
        name,
        str(shots),
        str(len({(item["doc_hash"], item["target"]) for item in items["ours"]})),
        f"{statistics.median(seconds['ours']):.1f}",
        f"{statistics.median(seconds[best]):.1f} ({best.removeprefix('batch ')})",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{tokens['ours'] / tokens[best]:.2f}",
        f"{same} of {len(items['ours'])} (its own {own_same})",
        *("-" if task.generates else f"{_gap(items[one], items[peers[0]]):.1e}" for one in ("ours", peers[-1])),
    ]
    print(row, flush=True)
    pairs = zip(items["ours"], items[peers[0]], strict=True)
    return row, [_difference(name, *pair) for pair in pairs if not _same(*pair)]


def _difference(name: str, one: dict[str, Any], other: dict[str, Any]) -> str:
    """A line with both values of an item: the texts, or the log-likelihoods of its answers in nats."""
    if isinstance(one["filtered_resps"][0], str):
        values = [repr(item["resps"][0][0]) for item in (one, other)]
    else:
        values = [" ".join(f"{float(nats[0]):.4f}" for nats in item["filtered_resps"]) for item in (one, other)]
    return f"\n- {name}, item {one['doc_id']} (right: {one['target']!r}): ours {values[0]}; harness {values[1]}\n"


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if isinstance(one["filtered_resps"][0], str):
        return bool(one["resps"] == other["resps"])
    return _choice(one) == _choice(other)


def _choice(item: dict[str, Any]) -> int:
    nats = [float(response[0]) for response in item["filtered_resps"]]
    return nats.index(max(nats))


def _gap(one: Items, other: Items) -> float:
    pairs = zip(one, other, strict=True)
    both = [pair for a, b in pairs for pair in zip(a["filtered_resps"], b["filtered_resps"], strict=True)]
    return max(abs(float(a[0]) - float(b[0])) for a, b in both)


if __name__ == "__main__":
    main()
