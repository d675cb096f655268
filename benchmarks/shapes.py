"""How well is the damage of a cut predicted, and is the shape that a target gives the best of those that were tried?

    python benchmarks/shapes.py --cache DIR [--model DIR --data train.txt --heldout valid.txt]
        --shapes 'ffn=1024' 'layers=27 ffn=1152' ... [--targets 75%,50%] [--tokens 0,0.2M] [--part 0/2] [--out FILE]

Each shape names the dims that are cut. It is cut with the default repair, measured, and for each number of tokens above
0 distilled with the default settings and measured again. Shapes that a target allows and that are at most 2% below it
are compared with the one that the target gives, which is made too. Runs are kept in the cache, and beside the result
file, so the same command goes on where it was stopped, and several can share one cache.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.distillations import (
    BLOCK_TOKENS,
    Bench,
    arguments,
    as_text,
    of_target,
    opened,
    published,
    share_of,
    to_do,
    token_counts,
)
from lib.measure import header, kendall_tau, table

from minitron.model.architecture import Shape
from minitron.shapes.space import ABOVE
from minitron.shapes.trial import damage_of

BELOW = 0.02  # a target, as a share of its parameters


@dataclass(frozen=True)
class Lab:
    """The cuts and students of one teacher."""

    bench: Bench

    def shape(self, text: str) -> Shape:
        return self.bench.from_text(text)

    def share(self, text: str) -> float:
        return self.bench.share(self.shape(text))

    def run(self, text: str, budgets: Sequence[int]) -> None:
        """Cut a student, and distil it on each number of tokens, unless the cache has that."""
        bench, shape = self.bench, self.shape(text)
        missing = [tokens for tokens in budgets if not bench.has({"shape": text, "tokens": tokens})]
        if not missing:
            return
        with tempfile.TemporaryDirectory(dir=bench.cache) as directory:
            pruned = Path(directory) / "pruned"
            pruned.mkdir()
            self.bench.pruner.make(shape, pruned)
            for tokens in missing:
                key = {"key": {"shape": text, "tokens": tokens}}
                if tokens == 0:
                    bench.record({**key, **bench.measure(pruned)})
                    continue
                schedule = bench.schedule(shape, {"tokens": tokens}, repaired=bool(self.bench.pruner.repairs))
                student = Path(directory) / f"student-{tokens}"
                student.mkdir()
                bench.record({**key, **bench.distilled(pruned, schedule, student)})

    def kl(self, tokens: int) -> dict[str, float]:
        """The KL by shape after that many tokens."""
        return {row["key"]["shape"]: row["kl"] for row in self.bench.rows if row["key"]["tokens"] == tokens}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", required=True)
    parser.add_argument("--targets", default="75%,50%")
    parser.add_argument("--tokens", default="0", help="such as 0,0.2M")
    args = parser.parse_args()
    bench = opened(args)
    lab = Lab(bench)
    targets = {
        target: as_text(of_target(lab.bench.pruner, target), bench.teacher.shape) for target in args.targets.split(",")
    }
    budgets = token_counts(args.tokens)
    for shape in to_do(args, dict.fromkeys([*targets.values(), *args.shapes])):
        lab.run(shape, budgets)
    published(lab.bench, report(lab, args.name, targets, budgets), args)


def report(lab: Lab, name: str, targets: Mapping[str, str], budgets: Sequence[int]) -> str:
    teacher, damage = lab.bench.teacher, damage_of(lab.bench.pruner)
    found = {tokens: lab.kl(tokens) for tokens in budgets}
    shapes = sorted(found[0], key=lambda shape: -lab.share(shape))
    rows = [
        [
            shape,
            f"{lab.share(shape):.1%}",
            f"{damage(lab.shape(shape)):.3f}",
            *(f"{found[tokens][shape]:.3f}" if shape in found[tokens] else "" for tokens in budgets),
        ]
        for shape in shapes
    ]
    taus = [
        [
            _after(tokens),
            str(len(found[tokens])),
            f"{kendall_tau([damage(lab.shape(shape)) for shape in found[tokens]], [*found[tokens].values()]):.2f}",
        ]
        for tokens in budgets
    ]
    return "\n".join(
        [
            header(f"Shapes: {name}"),
            f"Teacher {teacher.shape}, {teacher.parameters.non_embedding:,} non-embedding parameters. Repaired with "
            f"{', '.join(lab.bench.pruner.repairs)} on {lab.bench.samples} calibration blocks. KL to the teacher in "
            f"nats a token on {lab.bench.heldout_blocks} held-out blocks of {BLOCK_TOKENS}, one seed; the prediction "
            "is of the KL right after the cut, from the statistics alone.",
            "",
            "Kendall's tau between the prediction and the measured KL, over all shapes:",
            "",
            table(["measured", "shapes", "tau"], taus),
            "",
            f"The shape that a target gives, among all measured shapes that it allows, at most {ABOVE:.1%} above its "
            f"parameters, and that are at most {BELOW:.0%} below:",
            "",
            table(
                ["target", "shape", *(f"{_after(tokens)}: KL, best, above it" for tokens in budgets)],
                [
                    [target, shape, *(_beside(lab, target, shape, found[t]) for t in budgets)]
                    for target, shape in targets.items()
                ],
            ),
            "",
            table(["shape", "parameters", "predicted", *map(_after, budgets)], rows),
            "",
        ]
    )


def _beside(lab: Lab, target: str, shape: str, found: Mapping[str, float]) -> str:
    if shape not in found:
        return ""
    share = share_of(target)
    near = {each: kl for each, kl in found.items() if -BELOW <= lab.share(each) / share - 1 <= ABOVE}
    best = min(near, key=lambda each: near[each])
    return f"{found[shape]:.3f}, {near[best]:.3f} ({best}, of {len(near)}), {found[shape] / near[best] - 1:.1%}"


def _after(tokens: int) -> str:
    return f"after {tokens / 1e6:g}M tokens" if tokens else "after the cut"


if __name__ == "__main__":
    main()
