"""What does it cost to record the teacher, what does training without it save, and what does the student lose?

    python benchmarks/recorded_teacher.py --cache /tmp/recorded [--model DIR --data train.jsonl --heldout valid.jsonl]
        [--ks 8,16,32,64,128,256,512] [--tokens 0.5M] [--rates 0.5] [--seeds 0,1] [--only-table] [--out FILE]

The repaired width cut of `repair.py`, distilled from a teacher beside it, with and without hidden states,
and from one that was recorded with its k likeliest tokens. Runs are kept in the cache and beside the result file.
Speeds are worth something only where nothing else ran.
"""

import statistics
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

ONLINE, ON_LOGITS = "best", "best: intermediate=off"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ks", default="8,16,32,64,128,256,512")
    parser.add_argument("--tokens", default="0.5M")
    parser.add_argument("--rates", default="0.5")
    args = parser.parse_args()
    bench = opened(args)
    (tokens,) = token_counts(args.tokens)
    teachers = [ONLINE, ON_LOGITS, *(f"best: teacher=recorded top_k={k}" for k in args.ks.split(","))]
    for seed, rate, text in to_do(args, product(integers(args.seeds), numbers(args.rates), teachers)):
        start, changes = variant(text)
        bench.run("width", start, tokens, rate, seed, **changes)
    published(bench, report(bench, args.name, tokens, teachers), args)


def report(bench: Bench, name: str, tokens: int, teachers: list[str]) -> str:
    found = {}
    for text in teachers:
        own = [row for row in bench.rows if label(row["key"]) == text and row["key"]["tokens"] == tokens]
        if own:
            rate = min(own, key=lambda row: row["student"]["kl"])["key"]["rate"]
            found[text] = [row for row in own if row["key"]["rate"] == rate]
    return "\n".join(
        [
            header(f"A recorded teacher: {name}"),
            f"Teacher {bench.teacher.shape}; student {bench.shape('width')}, cut and repaired; {tokens / 1e6:g}M "
            f"tokens of distillation. KL to the teacher in nats a token on {bench.heldout_blocks} held-out blocks of "
            f"{BLOCK_TOKENS}, at the best of the learning rates tried. Recording is one streamed pass over the "
            "tokens. The change is to the teacher beside the student on logits alone, as a recorded one has no states "
            "between layers.",
            "",
            table(
                ["teacher", "bytes a token", "recording, s", "training, tokens/s", "KL", "change"],
                [_cells(text, rows, found, tokens) for text, rows in found.items()],
            ),
            "",
        ]
    )


def _cells(text: str, rows: list[dict[str, Any]], found: dict[str, list[dict[str, Any]]], tokens: int) -> list[str]:
    kls = [row["student"]["kl"] for row in rows]
    kl, base = statistics.mean(kls), statistics.mean(row["student"]["kl"] for row in found.get(ON_LOGITS, rows))
    spread = f" [{min(kls):.4f}, {max(kls):.4f}]" if len(kls) > 1 else ""
    name = {ONLINE: "beside the student", ON_LOGITS: "beside it, logits alone"}.get(text)
    recorded = (
        [f"{rows[0]['lesson_bytes_a_token']:.0f}", f"{rows[0]['recording_seconds']:.0f}"] if name is None else ["", ""]
    )
    speed = f"{tokens / statistics.median(row['seconds'] for row in rows):,.0f}"
    return [
        name or f"recorded, k = {rows[0]['key']['top_k']}",
        *recorded,
        speed,
        f"{kl:.4f}{spread}",
        f"{kl / base - 1:+.1%}",
    ]


if __name__ == "__main__":
    main()
