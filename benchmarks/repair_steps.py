"""What does each repair step give right after a cut?

    python benchmarks/repair_steps.py --cache DIR [--model DIR --data train.txt --heldout valid.txt]
        [--cuts hidden=384 ffn=512 'layers=27 ffn=1152' ...] [--steps basis basis,refit ...] [--part 0/2] [--out FILE]

Each cut is made plainly and with each set of steps, of which those that the cut does not need are left out; sets that
come to the same are made once. Cuts are kept in the cache, and beside the result file, so the same command goes on
where it was stopped, and several can share one cache. What is left of a repair after a distillation is the question of
repair.py and of recovery.py.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lib.distillations import BLOCK_TOKENS, Bench, arguments, opened, published, to_do
from lib.measure import header, table

from minitron.pruning.repair import BEST, REPAIRS, needed_steps

STEPS = [*REPAIRS, ",".join(BEST), ",".join([*BEST, "refit"])]
CUTS = ["ffn=512", "hidden=192", "layers=3"]


@dataclass(frozen=True)
class Lab:
    """The cuts of one teacher, each with some steps."""

    bench: Bench

    def variants(self, cuts: Iterable[str], sets: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each cut with each set of steps that comes to something else."""
        teacher = self.bench.teacher.shape
        for cut in cuts:
            shape = self.bench.from_text(cut)
            needed = [tuple(needed_steps(one.split(","), teacher, shape)) for one in sets]
            yield from ((cut, steps) for steps in dict.fromkeys([(), *needed]))

    def run(self, cut: str, steps: tuple[str, ...]) -> None:
        key = {"cut": cut, "steps": list(steps)}
        if self.bench.has(key):
            return
        pruner = replace(self.bench.pruner, repairs=steps)
        with tempfile.TemporaryDirectory(dir=self.bench.cache) as out:
            started = time.monotonic()
            pruner.make(self.bench.from_text(cut), Path(out))
            seconds = time.monotonic() - started
            measured = self.bench.measure(Path(out))
        self.bench.record({"key": key, **measured, "seconds": seconds, "threads": torch.get_num_threads()})


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cuts", nargs="+", default=CUTS)
    parser.add_argument("--steps", nargs="+", default=STEPS)
    args = parser.parse_args()
    lab = Lab(opened(args))
    for cut, steps in to_do(args, lab.variants(args.cuts, args.steps)):
        lab.run(cut, steps)
    published(lab.bench, report(lab, args.name, args.cuts), args)


def report(lab: Lab, name: str, cuts: Iterable[str]) -> str:
    teacher = lab.bench.teacher
    rows = {cut: [row for row in lab.bench.rows if row["key"]["cut"] == cut] for cut in cuts}
    return "\n".join(
        [
            header(f"The steps of the repair: {name}"),
            f"Teacher {teacher.shape}, {teacher.parameters.non_embedding:,} non-embedding parameters; "
            f"{lab.bench.samples} calibration blocks of {BLOCK_TOKENS} tokens. KL to the teacher in nats a token on "
            f"{lab.bench.heldout_blocks} held-out blocks, right after the cut. Seconds are those of the cut, without "
            "the statistics; another run may have shared the machine.",
            "",
            table(
                ["cut", "parameters", "steps", "KL", "of the plain cut's", "loss", "seconds (threads)"],
                [line for cut, made in rows.items() for line in _lines(lab, cut, made)],
            ),
            "",
        ]
    )


def _lines(lab: Lab, cut: str, rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    plain = next((row["kl"] for row in rows if not row["key"]["steps"]), float("nan"))
    share = lab.bench.share(lab.bench.from_text(cut))
    for row in sorted(rows, key=lambda row: -row["kl"]):
        steps = ", ".join(row["key"]["steps"]) or "none"
        seconds = f"{row['seconds']:.0f} ({row['threads']})"
        yield [
            cut,
            f"{share:.1%}",
            steps,
            f"{row['kl']:.3f}",
            f"{row['kl'] / plain:.2f}",
            f"{row['loss']:.3f}",
            seconds,
        ]


if __name__ == "__main__":
    main()
